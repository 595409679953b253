"""The exam about the toy world: honest about what is held out."""
import re

from toy import questions
from toy import world as toy
from toy.exam import exam
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
