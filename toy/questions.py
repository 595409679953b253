"""TODO toy/questions.py"""
import random
from dataclasses import dataclass, replace

from toy.world import (
    AT,
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
# what can be said and asked about a scene


def article(name):
    return ("an " if name[0] in "aeiou" else "a ") + name


def plural(name):
    return name + ("es" if name.endswith(("s", "x", "ch", "sh", "o")) else "s")


def caption(scene: Scene) -> str:
    """Everything in the scene with its place, in the scene's (random) order: "cat top left, red
    square middle, ..."."""
    return ", ".join(f"{thing.text()} {PLACES[thing.cell]}" for thing in scene.things)


def grid(scene: Scene) -> str:
    """The same by place, row by row, as a picture's patches come: "top left - top cat top right red
    square ..."."""
    cell = {thing.cell: thing.text() for thing in scene.things}
    return " ".join(f"{place} {cell.get(i, '-')}" for i, place in enumerate(PLACES))


def glimpses(scene: Scene, ground="") -> str:
    """The same as a picture's patches would tell it, row by row: a large thing again and again, so
    that whoever counts has to count places. ground: what patches with nothing on them tell,
    anywhere."""
    rng, seen = random.Random("glimpses/" + scene.key), []
    for thing, x, y, side, _ in layout(scene):
        left, top, right, bottom = box(thing, x, y, side)
        for _ in range(rng.randint(1, 4)):
            at = rng.uniform(top, bottom) // PATCH, rng.uniform(left, right) // PATCH
            seen.append((at, f"{thing.text()} {PLACES[thing.cell]}"))
    for _ in range(rng.randint(1, 4) if ground else 0):
        seen.append(((rng.randrange(SIZE // PATCH), rng.randrange(SIZE // PATCH)), ground))
    return " ".join(text for _, text in sorted(seen, key=lambda row: row[0]))


# Phrasings in training, and after the bar those that only the exam uses. {a} is "a cat" or "an
# apple", {s} is "cats". No word of the latter is new, only their order is: a model of six layers
# can't know what it has never read.
PHRASES = {
    "count": (
        "How many {s} are there?/How many {s} do you see?/Count the {s}./What is the number of {s}?/"
        "How many {s} are in the picture?|How many {s} can you see?/Tell me the number of {s}."),
    "presence":
        ("Is there {a}?/Do you see {a}?/Is {a} in the picture?/Can you see {a}?/Is there {a} here?|"
         "Is {a} here?/Do you see {a} in the picture?"),
    "where":
        ("Where is the {k}?/In which place is the {k}?/Find the {k}./Tell me where the {k} is./"
         "Where can you see the {k}?|Where do you see the {k}?/In which place do you see the {k}?"),
    "left-of": (
        "Is the {k} left of the {j}?/Is the {k} to the left of the {j}?/Do you see the {k} left of the {j}?/"
        "Can you see the {k} to the left of the {j}?|Do you see the {k} to the left of the {j}?/"
        "Can you see the {k} left of the {j}?"),
    "colour":
        ("What color is the {k}?/What is the color of the {k}?/Which color does the {k} have?/"
         "Tell me the color of the {k}.|Which color is the {k}?/What color does the {k} have?"),
    "word": (
        "What word is printed?/What does the text say?/Read the word./Tell me the word./Which word do you see?/"
        "What is the word?/What is the text?/Which text is printed?/Read the printed text.|"
        "What word do you see?/Read the text."),
    "it": "Where is it?/In which place is it?/Tell me where it is.|Where can you see it?/Where do you see it?",
    "it-left":
        ("Is it left of the {j}?/Is it to the left of the {j}?/Do you see it left of the {j}?|"
         "Do you see it to the left of the {j}?/Can you see it left of the {j}?"),
    "and": "And how many {s}?/And the {s}?|And how many {s} are there?/And the number of {s}?", }
PHRASES = {kind: [part.split("/") for part in text.split("|")] for kind, text in PHRASES.items()}
PHRASES["category"] = PHRASES["count"]
SENTENCE = [" Answer in a sentence.", " Say it in a sentence."]
QUESTIONS = ["count", "presence", "where", "left-of", "colour", "word", "category", "follow-up"]


@dataclass
class Turn:
    """A question and its answer; short: the answer without its sentence, by which the commonest
    answer is told."""
    question: str
    answer: str
    short: str


def phrase(kind, rng, new=False, **names) -> str:
    return rng.choice(PHRASES[kind][new]).format(**names)


def say(turn: Turn, sentence: str, rng, chance=0.25) -> Turn:
    """The turn as it is, or, by chance, with the wish for a sentence and the sentence for an
    answer."""
    if rng.random() >= chance:
        return turn
    return replace(turn, question=turn.question + rng.choice(SENTENCE), answer=sentence)


def count(scene, rng, new, kind="count", first=""):
    """"How many cats", "How many animals": a fifth asks for what isn't there, else every number
    that occurs is equally likely. first: the name that the turn before asked about, not to be asked
    again ("And how many dogs?")."""
    if not (objects := scene.objects()):
        return None
    totals = {k: objects.count(k) for k in KINDS} if kind != "category" else \
             {c: sum(CATEGORY[o] == c for o in objects) for c in CATEGORIES}
    totals.pop(first, None)
    there = sorted({n for n in totals.values() if n})
    n = 0 if not there or rng.random() < 0.2 else rng.choice(there)
    k = rng.choice([k for k in totals if totals[k] == n])
    sentence = f"There is 1 {k}." if n == 1 else f"There are {n} {plural(k)}."
    return k, say(Turn(phrase(kind, rng, new, s=plural(k)), str(n), str(n)), sentence, rng)


def missing(scene, rng) -> str:
    """A kind that isn't there; sometimes the look-alike of one that is."""
    objects = scene.objects()
    alike = [LOOKALIKE[o] for o in objects if o in LOOKALIKE and LOOKALIKE[o] not in objects]
    return rng.choice(
        alike if alike and rng.random() < 0.2 else [k for k in KINDS if k not in objects])


def presence(scene, rng, new, kind="presence"):
    if not scene.objects():
        return None
    answer = rng.choice(["yes", "no"])
    k = rng.choice(sorted(set(scene.objects()))) if answer == "yes" else missing(scene, rng)
    sentence = f"Yes, there is {article(k)}." if answer == "yes" else f"No, there is no {k}."
    return k, say(Turn(phrase(kind, rng, new, a=article(k)), answer, answer), sentence, rng)


def singles(scene):
    """What "the cat" can mean: the shape, and the objects of which there is one."""
    objects = scene.objects()
    return [
        t for t in scene.things
        if t.what == "shape" or t.what == "object" and objects.count(t.name) == 1]


def place(scene, rng, new, kind="where", it=None):
    """"Where is the cat?" (sometimes of what isn't there), or "Where is it?" of a thing that was
    spoken of."""
    single = singles(scene)
    absent = it is None and rng.random() < 0.15
    if not single and not absent:
        return None
    thing = it or (Thing("object", missing(scene, rng), -1) if absent else rng.choice(single))
    k, short = thing.name, "nowhere" if absent else PLACES[thing.cell]
    subject = "It" if it else f"The {k}"
    sentence = f"There is no {k}." if absent else f"{subject} is {AT.get(short, f'in the {short}')}."
    return k, say(Turn(phrase(kind, rng, new, k=k), short, short), sentence, rng)


def left_of(scene, rng, new, kind="left-of", it=None):
    """"Is the cat left of the dog?", of two single things in different columns; of a held-out pair
    if there is one."""
    pairs = [(a, b) for a in singles(scene) for b in singles(scene)
             if a.cell % 3 != b.cell % 3 and (it is None or a.name == it.name)]
    if not pairs:
        return None
    a, b = rng.choice([pair for pair in pairs if held_out([t.name for t in pair])] or pairs)
    # both orders are in the list, so yes and no are equally likely
    short, side = ("yes", "left") if a.cell % 3 < b.cell % 3 else ("no", "right")
    sentence = f"{short.capitalize()}, {'it' if it else f'the {a.name}'} is {side} of the {b.name}."
    return a.name, say(Turn(phrase(kind, rng, new, k=a.name, j=b.name), short, short), sentence,
                       rng)


def told(scene, rng, new, kind):
    """The colour of the shape, or the printed word."""
    things = [t for t in scene.things if t.what == dict(colour="shape", word="word")[kind]]
    if not things:
        return None
    k, short = (things[0].name, things[0].color) if kind == "colour" else ("word", things[0].name)
    return k, say(Turn(phrase(kind, rng, new, k=k), short, short), f"The {k} is {short}.", rng)


def ask(scene: Scene, kind: str, rng: random.Random, new=False):
    """A question of a kind about a scene: [Turn], or None if this scene doesn't allow the kind.

    A "follow-up" is two turns, of which the second can't be understood without the first: "Is there
    a cat?", "Where is it?". new: in a phrasing that training never uses.
    """
    if kind == "follow-up":
        return follow(scene, rng, new)
    makers = {
        "count": count, "category": count, "presence": presence, "where": place, "left-of": left_of,
        "colour": told, "word": told}
    made = makers[kind](scene, rng, new, kind)
    return made and [made[1]]


def follow(scene: Scene, rng, new):
    """Two turns about one thing, or "How many cats?", "And the dogs?". Only the second is in a new
    phrasing."""
    style = rng.choice(["it", "it", "it-left", "it-left", "and"])
    if style == "and":
        first = count(scene, rng, False)
        return first and [first[1], count(scene, rng, new, "and", first[0])[1]]
    opener = rng.choice(["presence", "presence", "colour", "left-of"])
    first = dict(presence=presence, colour=told)[opener](scene, rng, False, opener) if opener != "left-of" else \
        left_of(scene, rng, False)
    it = [thing for thing in singles(scene) if first and thing.name == first[0]]
    second = it and (place if style == "it" else left_of)(scene, rng, new, style, it[0])
    return [first[1], second[1]] if second else None


def conversation(scene: Scene, max_turns=8, also=()) -> list:
    """One question (30%) or up to max_turns with their answers, of different kinds as far as the
    scene allows: [(question, answer)]; empty if the scene allows none. also: kinds to be asked more
    often than the others."""
    rng = random.Random("ask/" + scene.key)
    kinds = QUESTIONS + ["count", "presence", "where", "left-of", "follow-up", *also]
    rng.shuffle(kinds)
    wanted, turns = 1 if rng.random() < 0.3 else rng.randint(2, max_turns), []
    for kind in kinds:
        new = ask(scene, kind, rng) or []
        if len(turns) < wanted and not {turn.question
                                        for turn in new[:1]} & {question for question, _ in turns}:
            turns += [(turn.question, turn.answer) for turn in new]
    return turns


def record(turns, image="") -> dict:
    """Turns as a LLaVA record; with an image its slot stands before the first question."""
    said = []
    for i, (question, answer) in enumerate(turns):
        said.append({
            "from": "human", "value": ("<image>\n" if image and i == 0 else "") + question})
        said.append({"from": "gpt", "value": answer})
    return {"id": image, **({"image": image} if image else {}), "conversations": said}
