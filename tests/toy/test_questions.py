"""Questions about the toy world: right, balanced, and told by texts as by pictures."""
import random
import re
from collections import Counter

import pytest

from toy import questions
from toy import world as toy

NAMES = toy.KINDS + toy.SHAPES


@pytest.mark.parametrize("kind", questions.QUESTIONS)
def test_answers_are_balanced(kind):
    """No kind's commonest answer exceeds 45%, or 55% where the answer is yes or no."""
    answers = Counter()
    for i in range(3000):
        if turns := questions.ask(toy.make_scene(f"balance/{i}"), kind, random.Random(i)):
            answers[turns[-1].short] += 1
    commonest = answers.most_common(1)[0][1] / answers.total()
    assert answers.total() > 1000
    assert commonest <= (0.55 if set(answers) == {"yes", "no"} else 0.45)


def fact(scene: toy.Scene, kind: str, asked: str, about: str | None) -> tuple[str, str]:
    """What is true, by rules written a second time: (short answer, sentence). about: the name that
    "it" stands for."""
    cell = {t.name: t.cell for t in scene.things}
    objects = [t.name for t in scene.things if t.what == "object"]
    words = re.findall(r"\w+", asked)
    named = [n for n in words if n in NAMES]
    if kind in ("presence", "where", "left-of") and about:
        named = [about] + named
    if kind in ("count", "category"):
        one = [n for n in toy.KINDS + list(toy.CATEGORIES) if questions.plural(n) in words][0]
        n = objects.count(one) + sum(o in toy.CATEGORIES.get(one, []) for o in objects)
        there = f"There is 1 {one}." if n == 1 else f"There are {n} {questions.plural(one)}."
        return str(n), there
    if kind == "presence":
        if named[0] in objects:
            return "yes", f"Yes, there is {questions.article(named[0])}."
        return "no", f"No, there is no {named[0]}."
    if kind == "where":
        if named[0] not in cell:
            return "nowhere", f"There is no {named[0]}."
        row, column = divmod(cell[named[0]], 3)
        both = [["top", "", "bottom"][row], ["left", "", "right"][column]]
        short = " ".join(filter(None, both)) or "middle"
        at = {"top": "at the top", "bottom": "at the bottom", "left": "on the left",
              "right": "on the right"}.get(short, "in the " + short)
        return short, f"{'It' if about else 'The ' + named[0]} is {at}."
    if kind == "left-of":
        who = "it" if about else f"the {named[0]}"
        if cell[named[0]] % 3 < cell[named[1]] % 3:
            return "yes", f"Yes, {who} is left of the {named[1]}."
        return "no", f"No, {who} is right of the {named[1]}."
    if kind == "colour":
        color = next(t.color for t in scene.things if t.name == named[0])
        return color, f"The {named[0]} is {color}."
    word = next(t.name for t in scene.things if t.what == "word")
    return word, f"The word is {word}."


def kind_of(asked: str, it: str | None) -> str:
    """The kind of a follow-up's turn, by its words."""
    if " left of " in asked:
        return "left-of"
    if "color" in asked:
        return "colour"
    if it:
        return "where"
    return "count" if re.search("How many|how many|Count|umber|And", asked) else "presence"


def test_answers_are_right():
    """Each answer, short or as a sentence, to each question, in known and in new phrasings, against
    the scene."""
    sentences = 0
    for i in range(800):
        scene = toy.make_scene(f"right/{i}", new_pair=i % 2 == 1)
        for kind in questions.QUESTIONS:
            about = None
            for turn in questions.ask(scene, kind, random.Random(i), new=i % 3 == 0) or []:
                asked = turn.question
                for ending in questions.SENTENCE:
                    asked = asked.removesuffix(ending)
                it = about if " it " in f" {re.sub(r'[?.]', ' ', asked)} " else None
                guess = kind_of(asked, it) if kind == "follow-up" else kind
                short, sentence = fact(scene, guess, asked, it)
                assert turn.short == short
                assert turn.answer == (short if asked == turn.question else sentence)
                sentences += asked != turn.question
                about = next((n for n in re.findall(r"\w+", asked) if n in NAMES), None)
    assert sentences > 500


def test_a_missing_kind_is_asked_for_as_often_as_not():
    """Presence can't be guessed from which kind is asked for: yes and no come from the same set of
    kinds."""
    yes, no = Counter(), Counter()
    for i in range(8000):
        [turn] = questions.ask(toy.make_scene(f"prior/{i}"), "presence", random.Random(i))
        named = next(k for k in toy.KINDS if k in re.findall(r"\w+", turn.question))
        (yes if turn.short == "yes" else no)[named] += 1
    assert all(0.35 < yes[k] / (yes[k] + no[k]) < 0.65 for k in toy.KINDS)


def test_glimpses_tell_everything_in_its_place():
    for i in range(100):
        scene = toy.make_scene(f"glimpses/{i}")
        told = {f"{thing.text()} {toy.PLACES[thing.cell]}" for thing in scene.things}
        text, heard = questions.glimpses(scene), set()
        while text:                                # every phrase of it is one of the caption's
            those = [phrase for phrase in told if f"{text} ".startswith(phrase + " ")]
            phrase = max(those, key=len)
            heard.add(phrase)
            text = text[len(phrase) + 1:]
        assert heard == told
        ground = questions.glimpses(scene, "green background 3")      # the same, and that between
        assert "green background 3" in ground
        without = ground.replace("green background 3", "").split()
        assert without == questions.glimpses(scene).split()
