"""The exam about the toy world: honest about what is held out; its score."""
import re

from toy import questions
from toy import world as toy
from toy.exam import Item, exam, score
from toy.towers import sibling


def pattern(question: str) -> str:
    """A question with names left out, and the wish for a sentence."""
    names = toy.KINDS + toy.SHAPES + list(toy.CATEGORIES)
    plurals = "|".join(questions.plural(name) for name in names)
    for ending in questions.SENTENCE:
        question = question.removesuffix(ending)
    return re.sub(rf"\b({plurals}|(an? )?({'|'.join(names)}))\b", "X", question)


def content(scene: toy.Scene) -> tuple:
    """A held-out scene as a whole: things and places."""
    return tuple(sorted((t.what, t.name, t.cell, t.color) for t in scene.things))


def test_what_is_held_out():
    """The exam has keys, pairs of kinds and phrasings of its own: no training sample of any part
    has them."""
    items = exam(0, 320)
    keys = {item.scene.key for item in items}
    assert len(keys) == 320 and all(key.startswith("test0/") for key in keys)
    assert all(toy.held_out(item.scene.objects()) == item.new_pair for item in items)
    assert sum(item.new_pair for item in items) == sum(item.new_phrasing for item in items) == 160
    assert len(toy.HELD_OUT) == 60
    for i in range(1500):
        for scene in (toy.make_scene(f"train2/{i}"), sibling(toy.make_scene(f"clip/{i}"))):
            assert not toy.held_out(scene.objects())

    scenes = [toy.make_scene(f"train2/{i}") for i in range(3000)]
    asked = {question for scene in scenes for question, _ in questions.conversation(scene)}
    trained = {pattern(question) for question in asked}
    words = {word for question in trained for word in re.findall(r"\w+", question)}
    for item in items:
        put = pattern(item.turns[-1].question)
        assert (put in trained) == (not item.new_phrasing)
        assert words.issuperset(re.findall(r"\w+", put))

    # a held-out scene doesn't occur among many training scenes either
    seen = {content(scene) for scene in scenes}
    assert sum(content(item.scene) in seen for item in items) <= 6      # one of a single object can


def test_score_by_hand():
    def asked(kind, short, answer=None, new=False):
        first = questions.Turn("first?", "x", "x")
        return Item(None, kind, [first, questions.Turn("q?", answer or short, short)], new, not new)

    items = [asked("count", short) for short in "112"]
    items += [asked("count", "3", "There are 3 cats.", new=True), asked("word", "sun")]
    result = score(items, ["1", "2", "2", "x", "sun"])
    assert result == dict(
        accuracy=0.6, n=5,
        kinds=dict(count=dict(accuracy=0.5, n=4, majority=0.5),
                   word=dict(accuracy=1.0, n=1, majority=1.0)),
        groups={"known phrasing": dict(accuracy=0.75, n=4),
                "new phrasing": dict(accuracy=0.0, n=1),
                "known pair": dict(accuracy=0.0, n=1),
                "new pair": dict(accuracy=0.75, n=4),
                "sentences": dict(accuracy=0.0, n=1)},
        worst="count", confusion={"1": {"1": 1, "2": 1}, "2": {"2": 1}})
