"""The embedded world: reproducible, balanced, honest about what is held out."""
import hashlib
import random
import re
from collections import Counter

import pytest
from PIL import Image, ImageChops

from core.tokenizer import Tokenizer
from toy import exam, questions
from toy import world as toy
from toy.towers import sibling


def test_a_scene_is_a_function_of_its_key():
    assert toy.make_scene("train/3") == toy.make_scene("train/3") != toy.make_scene("train/4")
    assert toy.draw(toy.make_scene("train/3")).tobytes() == toy.draw(toy.make_scene("train/3")).tobytes()


def test_pictures_are_what_they_were():
    """To the pixel: a faster way to draw is no reason for others. (A new world is; then write down its hash.)"""
    pictures = b"".join(toy.draw(toy.make_scene(f"pixels/{i}")).tobytes() for i in range(40))
    assert hashlib.sha256(pictures).hexdigest() == "a711be7428d459badc45f46723bd31353722a63e6fb4d60c89a5f21c2916b932"


def test_every_thing_has_a_place_of_its_own():
    for i in range(500):
        things = toy.make_scene(f"cells/{i}").things
        assert len({t.cell for t in things}) == len(things)
        assert 1 <= sum(t.what == "object" for t in things) <= 6


def test_things_are_drawn_in_their_places():
    """The middle of each lies in its place; taking a thing away changes pixels there, and none far away."""
    for i in range(60):
        scene = toy.make_scene(f"where/{i}")
        rows = toy.layout(scene)
        assert len(rows) == len(scene.things)
        for thing, x, y, side, _ in rows:
            assert (int(y // toy.CELL) * 3 + int(x // toy.CELL)) == thing.cell
        thing, x, y, side, degrees = rows[-1]                     # on top of all others
        whole, layout = toy.draw(scene), toy.layout
        try:
            toy.layout = lambda scene: rows[:-1]
            box = ImageChops.difference(whole, toy.draw(scene)).getbbox()
        finally:
            toy.layout = layout
        assert box and x - 28 <= box[0] and box[2] <= x + 28 and y - 28 <= box[1] and box[3] <= y + 28


def test_names_do_not_collide():
    names = toy.KINDS + toy.SHAPES + list(toy.COLORS) + toy.WORDS
    assert len(set(names)) == len(names) and len(toy.KINDS) == 40
    assert all(toy.emoji(kind).size == (48, 48) for kind in toy.KINDS)


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


def fact(scene, kind, asked, about):
    """What is true, by rules written a second time: (short answer, sentence). about: the name that "it" stands for."""
    cell, objects = {t.name: t.cell for t in scene.things}, [t.name for t in scene.things if t.what == "object"]
    words = re.findall(r"\w+", asked)
    named = [n for n in words if n in toy.KINDS + toy.SHAPES]
    if kind in ("presence", "where", "left-of") and about:
        named = [about] + named
    if kind in ("count", "category"):
        one = [n for n in toy.KINDS + list(toy.CATEGORIES) if questions.plural(n) in words][0]
        n = objects.count(one) + sum(o in toy.CATEGORIES.get(one, []) for o in objects)
        return str(n), f"There is 1 {one}." if n == 1 else f"There are {n} {questions.plural(one)}."
    if kind == "presence":
        yes = named[0] in objects
        return ("yes", f"Yes, there is {questions.article(named[0])}.") if yes else ("no", f"No, there is no {named[0]}.")
    if kind == "where":
        if named[0] not in cell:
            return "nowhere", f"There is no {named[0]}."
        row, column = divmod(cell[named[0]], 3)
        short = " ".join(filter(None, [["top", "", "bottom"][row], ["left", "", "right"][column]])) or "middle"
        at = {"top": "at the top", "bottom": "at the bottom", "left": "on the left", "right": "on the right"}
        return short, f"{'It' if about else 'The ' + named[0]} is {at.get(short, 'in the ' + short)}."
    if kind == "left-of":
        left = cell[named[0]] % 3 < cell[named[1]] % 3
        who = "it" if about else f"the {named[0]}"
        return ("yes", f"Yes, {who} is left of the {named[1]}.") if left else \
            ("no", f"No, {who} is right of the {named[1]}.")
    if kind == "colour":
        color = next(t.color for t in scene.things if t.name == named[0])
        return color, f"The {named[0]} is {color}."
    word = next(t.name for t in scene.things if t.what == "word")
    return word, f"The word is {word}."


def test_answers_are_right():
    """Each answer, short or as a sentence, to each question, in known and in new phrasings, against the scene."""
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
                guess = kind if kind != "follow-up" else "left-of" if " left of " in asked else \
                    "colour" if "color" in asked else "where" if it else \
                    "count" if re.search("How many|how many|Count|umber|And", asked) else "presence"
                short, sentence = fact(scene, guess, asked, it)
                assert turn.short == short
                assert turn.answer == (short if asked == turn.question else sentence)
                sentences += asked != turn.question
                about = next((n for n in re.findall(r"\w+", asked) if n in toy.KINDS + toy.SHAPES), None)
    assert sentences > 500


def test_a_missing_kind_is_asked_for_as_often_as_not():
    """Presence can't be guessed from which kind is asked for: yes and no come from the same set of kinds."""
    yes, no = Counter(), Counter()
    for i in range(8000):
        [turn] = questions.ask(toy.make_scene(f"prior/{i}"), "presence", random.Random(i))
        named = next(k for k in toy.KINDS if k in re.findall(r"\w+", turn.question))
        (yes if turn.short == "yes" else no)[named] += 1
    assert all(0.35 < yes[k] / (yes[k] + no[k]) < 0.65 for k in toy.KINDS)


def test_what_is_held_out():
    """The exam has keys, pairs of kinds and phrasings of its own: no training sample of any part has them."""
    items = exam.exam(0, 320)
    keys = {item.scene.key for item in items}
    assert len(keys) == 320 and all(key.startswith("test0/") for key in keys)
    assert all(toy.held_out(item.scene.objects()) == item.new_pair for item in items)
    assert sum(item.new_pair for item in items) == sum(item.new_phrasing for item in items) == 160
    assert len(toy.HELD_OUT) == 60
    for i in range(1500):
        for scene in (toy.make_scene(f"train2/{i}"), sibling(toy.make_scene(f"clip/{i}"))):
            assert not toy.held_out(scene.objects())

    def pattern(question):       # with names left out
        names = toy.KINDS + toy.SHAPES + list(toy.CATEGORIES)
        plurals = "|".join(questions.plural(name) for name in names)
        for ending in questions.SENTENCE:
            question = question.removesuffix(ending)
        return re.sub(rf"\b({plurals}|(an? )?({'|'.join(names)}))\b", "X", question)
    trained = {pattern(question) for i in range(3000)
               for question, _ in questions.conversation(toy.make_scene(f"train2/{i}"))}
    for item in items:
        assert (pattern(item.turns[-1].question) in trained) == (not item.new_phrasing)
    words = {word for question in trained for word in re.findall(r"\w+", question)}
    assert all(word in words for item in items for word in re.findall(r"\w+", pattern(item.turns[-1].question)))

    # a held-out scene as a whole (things and places) doesn't occur among many training scenes either
    def content(scene):
        return tuple(sorted((t.what, t.name, t.cell, t.color) for t in scene.things))
    seen = {content(toy.make_scene(f"train2/{i}")) for i in range(3000)}
    assert sum(content(item.scene) in seen for item in items) <= 6      # one of a single object can be


def test_glimpses_tell_everything_in_its_place():
    for i in range(100):
        scene = toy.make_scene(f"glimpses/{i}")
        told = {f"{thing.text()} {toy.PLACES[thing.cell]}" for thing in scene.things}
        text, heard = questions.glimpses(scene), set()
        while text:                                         # every phrase of it is one of the caption's
            phrase = max((phrase for phrase in told if f"{text} ".startswith(phrase + " ")), key=len)
            heard.add(phrase)
            text = text[len(phrase) + 1:]
        assert heard == told
        ground = questions.glimpses(scene, "green background 3")                          # the same, and that between
        assert "green background 3" in ground and ground.replace("green background 3", "").split() == \
            questions.glimpses(scene).split()


def test_names_are_single_tokens():
    """In a plural, too: the token that a question asks with is the one that the answer is found by."""
    tokenizer = Tokenizer.from_pretrained(toy.MODEL)
    for name in toy.KINDS + list(toy.CATEGORIES):
        [token] = tokenizer.encode(name)
        assert tokenizer.encode(questions.plural(name))[0] == token
    for name in toy.SHAPES + list(toy.COLORS) + toy.WORDS:
        assert len(tokenizer.encode(name)) == 1


def test_it_knows_its_own_pictures():
    assert all(toy.knows(toy.draw(toy.make_scene(f"knows/{i}"))) for i in range(200))
    noise = Image.frombytes("RGB", (96, 96), random.Random(0).randbytes(96 * 96 * 3))
    assert not toy.knows(noise) and not toy.knows(Image.new("RGB", (640, 480), (200, 200, 200)))
