"""What can be said and asked about a scene of the toy world.

A caption, for stage 1 and for CLIP; the same as text by place or by patch, for a Llama that hasn't
seen any picture yet; questions of eight kinds with their answers, each in several phrasings, for
stage 2 and for the exam. Questions are balanced, so that they don't give their answers away
(tests/toy/test_questions.py).

A new kind of question is a maker, a line in MAKERS, its PHRASES and its name in QUESTIONS.
"""
import random
from collections.abc import Iterable
from dataclasses import dataclass

from toy.world import (
    CATEGORIES,
    CATEGORY,
    KINDS,
    LOOKALIKE,
    PATCH,
    PLACES,
    SIZE,
    Scene,
    Thing,
    box,
    held_out,
    layout,
)

# --------------------------------------------------------------------------------------------------
# A scene as text

def caption(scene: Scene) -> str:
    """Everything in the scene with its place, in the scene's (random) order: "cat top left, red
    square middle, ..."."""
    return ", ".join(located(thing) for thing in scene.things)


def located(thing: Thing) -> str:
    """A thing's part of the caption: "cat top left"."""
    return f"{thing.text()} {PLACES[thing.cell]}"


def grid(scene: Scene) -> str:
    """The same by place, row by row, as a picture's patches come: "top left - top cat top right red
    square ..."."""
    text = {thing.cell: thing.text() for thing in scene.things}
    return " ".join(f"{place} {text.get(cell, '-')}" for cell, place in enumerate(PLACES))


def glimpses(scene: Scene, ground: str = "") -> str:
    """The same as a picture's patches would tell it, row by row: a large thing again and again, so
    that whoever counts has to count places. ground: what patches with nothing on them tell,
    anywhere."""
    rng = random.Random("glimpses/" + scene.key)
    seen = []                                                    # ((row, column of a patch), text)
    for thing, x, y, side, _ in layout(scene):
        left, top, right, bottom = box(thing, x, y, side)
        for _ in range(rng.randint(1, 4)):
            row = rng.uniform(top, bottom) // PATCH
            seen.append(((row, rng.uniform(left, right) // PATCH), located(thing)))
    for _ in range(rng.randint(1, 4) if ground else 0):
        row = rng.randrange(SIZE // PATCH)
        seen.append(((row, rng.randrange(SIZE // PATCH)), ground))
    return " ".join(text for _, text in sorted(seen, key=lambda glimpse: glimpse[0]))


# --------------------------------------------------------------------------------------------------
# How it is put

# [those of training, those that only the exam uses]. {a} is "a cat" or "an apple", {k} is "cat",
# {j} another one, {s} is "cats". No word of the exam's is new, only their order is: a model of six
# layers can't know what it has never read.
PHRASES = {
    "count": [
        ["How many {s} are there?", "How many {s} do you see?", "Count the {s}.",
         "What is the number of {s}?", "How many {s} are in the picture?"],
        ["How many {s} can you see?", "Tell me the number of {s}."]],
    "presence": [
        ["Is there {a}?", "Do you see {a}?", "Is {a} in the picture?", "Can you see {a}?",
         "Is there {a} here?"],
        ["Is {a} here?", "Do you see {a} in the picture?"]],
    "where": [
        ["Where is the {k}?", "In which place is the {k}?", "Find the {k}.",
         "Tell me where the {k} is.", "Where can you see the {k}?"],
        ["Where do you see the {k}?", "In which place do you see the {k}?"]],
    "left-of": [
        ["Is the {k} left of the {j}?", "Is the {k} to the left of the {j}?",
         "Do you see the {k} left of the {j}?", "Can you see the {k} to the left of the {j}?"],
        ["Do you see the {k} to the left of the {j}?", "Can you see the {k} left of the {j}?"]],
    "colour": [
        ["What color is the {k}?", "What is the color of the {k}?",
         "Which color does the {k} have?", "Tell me the color of the {k}."],
        ["Which color is the {k}?", "What color does the {k} have?"]],
    "word": [
        ["What word is printed?", "What does the text say?", "Read the word.", "Tell me the word.",
         "Which word do you see?", "What is the word?", "What is the text?",
         "Which text is printed?", "Read the printed text."],
        ["What word do you see?", "Read the text."]],
    "it": [
        ["Where is it?", "In which place is it?", "Tell me where it is."],
        ["Where can you see it?", "Where do you see it?"]],
    "it-left": [
        ["Is it left of the {j}?", "Is it to the left of the {j}?",
         "Do you see it left of the {j}?"],
        ["Do you see it to the left of the {j}?", "Can you see it left of the {j}?"]],
    "and": [
        ["And how many {s}?", "And the {s}?"],
        ["And how many {s} are there?", "And the number of {s}?"]],
}
PHRASES["category"] = PHRASES["count"]
SENTENCE = [" Answer in a sentence.", " Say it in a sentence."]
QUESTIONS = ["count", "presence", "where", "left-of", "colour", "word", "category", "follow-up"]


@dataclass
class Turn:
    """A question and its answer."""
    question: str
    answer: str
    short: str             # the answer without its sentence, by which the commonest one is told


Made = tuple[str, Turn] | None     # what a maker returns: the name asked about, and the question


def article(name: str) -> str:
    """The name with its article: "a cat", "an apple"."""
    return ("an " if name[0] in "aeiou" else "a ") + name


def plural(name: str) -> str:
    """The name for several: "cats", "peaches"."""
    return name + ("es" if name.endswith(("s", "x", "ch", "sh", "o")) else "s")


def phrase(kind: str, rng: random.Random, new: bool = False, **names: str) -> str:
    """A question of a kind in one of its phrasings; new: in one that training never uses."""
    return rng.choice(PHRASES[kind][new]).format(**names)


def make_turn(question: str, short: str, sentence: str, rng: random.Random) -> Turn:
    """The question with its short answer, or, a quarter of them, with the wish for a sentence and
    the sentence for an answer."""
    if rng.random() >= 0.25:
        return Turn(question, short, short)
    return Turn(question + rng.choice(SENTENCE), sentence, short)


# --------------------------------------------------------------------------------------------------
# What is asked. A maker takes a scene and gives a question of its kind, or None where it has none.

def count(scene: Scene, rng: random.Random, new: bool, kind: str = "count",
          first: str = "") -> Made:
    """Such as "How many cats?", "How many animals?": a fifth asks for what isn't there, else every
    number that occurs is equally likely. first: the name that the turn before asked about, not to
    be asked again ("And how many dogs?")."""
    objects = scene.objects()
    if not objects:
        return None
    if kind == "category":
        totals = {c: sum(CATEGORY[o] == c for o in objects) for c in CATEGORIES}
    else:
        totals = {k: objects.count(k) for k in KINDS}
    totals.pop(first, None)
    there = sorted({n for n in totals.values() if n})
    n = 0 if not there or rng.random() < 0.2 else rng.choice(there)
    k = rng.choice([k for k in totals if totals[k] == n])
    sentence = f"There is 1 {k}." if n == 1 else f"There are {n} {plural(k)}."
    return k, make_turn(phrase(kind, rng, new, s=plural(k)), str(n), sentence, rng)


def missing(scene: Scene, rng: random.Random) -> str:
    """A kind that isn't there; sometimes the look-alike of one that is."""
    objects = scene.objects()
    alike = [LOOKALIKE[o] for o in objects if o in LOOKALIKE and LOOKALIKE[o] not in objects]
    if alike and rng.random() < 0.2:
        return rng.choice(alike)
    return rng.choice([k for k in KINDS if k not in objects])


def presence(scene: Scene, rng: random.Random, new: bool, kind: str = "presence") -> Made:
    """Such as "Is there a cat?": yes as often as no."""
    if not scene.objects():
        return None
    short = rng.choice(["yes", "no"])
    if short == "yes":
        k = rng.choice(sorted(set(scene.objects())))
        sentence = f"Yes, there is {article(k)}."
    else:
        k = missing(scene, rng)
        sentence = f"No, there is no {k}."
    return k, make_turn(phrase(kind, rng, new, a=article(k)), short, sentence, rng)


def singles(scene: Scene) -> list[Thing]:
    """What "the cat" can mean: the shape, and the objects of which there is one."""
    objects = scene.objects()
    return [thing for thing in scene.things if thing.what == "shape"
            or thing.what == "object" and objects.count(thing.name) == 1]


def where(scene: Scene, rng: random.Random, new: bool, kind: str = "where",
          it: Thing | None = None) -> Made:
    """Such as "Where is the cat?", sometimes of what isn't there. it: what was spoken of, for
    "Where is it?"."""
    single = singles(scene)
    if it is None and rng.random() < 0.15:
        k, short = missing(scene, rng), "nowhere"
        sentence = f"There is no {k}."
    elif it or single:
        thing = it or rng.choice(single)
        k, short = thing.name, PLACES[thing.cell]
        at = {"top": "at the top", "bottom": "at the bottom", "left": "on the left",
              "right": "on the right"}.get(short, f"in the {short}")
        sentence = f"{'It' if it else f'The {k}'} is {at}."
    else:
        return None
    return k, make_turn(phrase(kind, rng, new, k=k), short, sentence, rng)


def left_of(scene: Scene, rng: random.Random, new: bool, kind: str = "left-of",
            it: Thing | None = None) -> Made:
    """Such as "Is the cat left of the dog?", of two single things in different columns; of a
    held-out pair if there is one."""
    single = singles(scene)
    pairs = [(a, b) for a in single for b in single
             if a.cell % 3 != b.cell % 3 and (it is None or a.name == it.name)]
    if not pairs:
        return None
    a, b = rng.choice([pair for pair in pairs if held_out(t.name for t in pair)] or pairs)
    who = "it" if it else f"the {a.name}"
    if a.cell % 3 < b.cell % 3:        # both orders are in the list: yes and no are equally likely
        short, sentence = "yes", f"Yes, {who} is left of the {b.name}."
    else:
        short, sentence = "no", f"No, {who} is right of the {b.name}."
    return a.name, make_turn(phrase(kind, rng, new, k=a.name, j=b.name), short, sentence, rng)


def colour(scene: Scene, rng: random.Random, new: bool, kind: str = "colour") -> Made:
    """Such as "What color is the square?"."""
    for thing in scene.things:
        if thing.what == "shape":
            k, short = thing.name, thing.color
            return k, make_turn(phrase(kind, rng, new, k=k), short, f"The {k} is {short}.", rng)
    return None


def word(scene: Scene, rng: random.Random, new: bool, kind: str = "word") -> Made:
    """Such as "What word is printed?"."""
    for thing in scene.things:
        if thing.what == "word":
            short = thing.name
            return "word", make_turn(phrase(kind, rng, new), short, f"The word is {short}.", rng)
    return None


MAKERS = {"count": count, "category": count, "presence": presence, "where": where,
          "left-of": left_of, "colour": colour, "word": word}


def ask(scene: Scene, kind: str, rng: random.Random, new: bool = False) -> list[Turn] | None:
    """A question of a kind about a scene, or None if this scene doesn't allow the kind.

    A "follow-up" is two turns, of which the second can't be understood without the first: "Is there
    a cat?", "Where is it?". new: in a phrasing that training never uses.
    """
    if kind == "follow-up":
        return follow_up(scene, rng, new)
    made = MAKERS[kind](scene, rng, new, kind)
    return made and [made[1]]


def follow_up(scene: Scene, rng: random.Random, new: bool) -> list[Turn] | None:
    """Two turns about one thing, or "How many cats?", "And the dogs?". Only the second is in a new
    phrasing."""
    style = rng.choice(["it", "it", "it-left", "it-left", "and"])
    if style == "and":
        first = count(scene, rng, False)
        return first and [first[1], count(scene, rng, new, "and", first[0])[1]]
    opener = rng.choice(["presence", "presence", "colour", "left-of"])
    first = MAKERS[opener](scene, rng, False, opener)
    it = [thing for thing in singles(scene) if first and thing.name == first[0]]
    if not it:
        return None
    maker = where if style == "it" else left_of
    second = maker(scene, rng, new, style, it[0])
    return second and [first[1], second[1]]


# --------------------------------------------------------------------------------------------------
# What is trained on

def conversation(scene: Scene, max_turns: int = 8,
                 also: Iterable[str] = ()) -> list[tuple[str, str]]:
    """One question (30%) or up to max_turns with their answers, of different kinds as far as the
    scene allows: [(question, answer)]; empty if the scene allows none. also: kinds to be asked more
    often than the others."""
    rng = random.Random("ask/" + scene.key)
    kinds = QUESTIONS + ["count", "presence", "where", "left-of", "follow-up", *also]
    rng.shuffle(kinds)
    wanted = 1 if rng.random() < 0.3 else rng.randint(2, max_turns)
    turns = []
    for kind in kinds:
        if len(turns) >= wanted:
            break
        new = ask(scene, kind, rng)
        if new and new[0].question not in {question for question, _ in turns}:
            turns += [(turn.question, turn.answer) for turn in new]
    return turns


def record(turns: list[tuple[str, str]], image: str = "") -> dict:
    """Turns as a LLaVA record; with an image its slot stands before the first question."""
    said = []
    for question, answer in turns:
        slot = "<image>\n" if image and not said else ""
        said.append({"from": "human", "value": slot + question})
        said.append({"from": "gpt", "value": answer})
    return {"id": image, **({"image": image} if image else {}), "conversations": said}
