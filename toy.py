"""The embedded world: little pictures, questions about them, and the two small towers that are pretrained on it.

Nobody can rent eight A100s to find out whether a line of code is right, so this repository carries a world in which the
whole recipe of the paper runs for real on a laptop: (a) a small CLIP learns from captions, (b) a small Llama learns
from text alone, both are saved in the public Hugging Face layout, and from there on nothing is special: train.py loads
them with the code that loads openai/clip-vit-large-patch14-336 and Vicuna, and runs stage 1 and stage 2.

    python toy.py show  --n 12        draws scenes with their questions into out/scenes.png
    python toy.py retrain             everything from nothing: tokenizer, CLIP, Llama, stage 1, stage 2 (resumable)

A scene has nine places. Some hold emoji objects (40 kinds in 4 categories, 8 of them look-alikes of another), one may
hold a coloured shape, one a printed word; things differ in size, are turned, shifted, overlap and lie on clutter. A
scene is a pure function of a string such as "train2/17": no picture is stored, and training and held-out scenes differ
in that string. Training never shows certain pairs of kinds together and never uses certain phrasings: the exam does.
Questions are balanced, so that they don't give their answers away (tests/test_toy.py).
"""
import argparse
import math
import os
import random
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import combinations
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

from clip import CLIP, CLIPTextConfig, CLIPVisionConfig, preprocess
from data import IGNORE, SYSTEM, item, render
from llama import Llama, LlamaConfig, Tokenizer
from weights import Tensors, autocast_dtype, read_config, run, save

ROOT = Path(__file__).resolve().parent
SCENE = "test/207"                        # the scene that the README asks about
ASSETS = ROOT / "assets"
MODEL = ASSETS / "toy"                    # the embedded model that ships with the repository
OUT = Path("out/toy")                     # where retraining works

# ---------------------------------------------------------------------------------------------------------------------
# the world

SIZE, CELL, PATCH = 96, 32, 12            # pixels: a picture is 3 x 3 places, and 8 x 8 patches for its CLIP
CATEGORIES = {
    "animal": ["cat", "dog", "cow", "pig", "frog", "owl", "crab", "bee", "tiger", "wolf"],
    "food": ["apple", "banana", "lemon", "carrot", "pizza", "egg", "cake", "donut", "tomato", "peach"],
    "vehicle": ["car", "bus", "train", "boat", "rocket", "bicycle", "plane", "tractor", "taxi", "tram"],
    "tool": ["hammer", "wrench", "axe", "saw", "key", "pencil", "magnet", "ladder", "pick", "brush"],
}
KINDS = [kind for kinds in CATEGORIES.values() for kind in kinds]
CATEGORY = {kind: category for category, kinds in CATEGORIES.items() for kind in kinds}
ALIKE = [("cat", "tiger"), ("dog", "wolf"), ("apple", "tomato"), ("lemon", "peach"), ("car", "taxi"), ("bus", "tram"),
         ("hammer", "pick"), ("pencil", "brush")]
LOOKALIKE = dict(ALIKE) | {b: a for a, b in ALIKE}
HELD_OUT = {frozenset(pair) for pair in random.Random("pairs").sample(list(combinations(KINDS, 2)), 60)}    # of 780
COLORS = {"red": (214, 39, 40), "green": (44, 160, 44), "blue": (31, 80, 200), "yellow": (245, 215, 40),
          "orange": (255, 127, 14), "purple": (128, 50, 160), "black": (20, 20, 20), "white": (255, 255, 255)}
SHAPES = ["square", "circle", "triangle", "diamond"]
WORDS = ["sun", "moon", "tea", "ink", "jam", "fog", "oak", "zip", "map", "ice", "gold", "wind", "rain", "lake", "song",
         "milk", "coin", "rope", "door", "leaf", "nest", "salt", "wool", "yard"]
PLACES = ["top left", "top", "top right", "left", "middle", "right", "bottom left", "bottom", "bottom right"]
AT = {"top": "at the top", "bottom": "at the bottom", "left": "on the left", "right": "on the right"}


@dataclass
class Thing:
    """What one place holds. name: a kind, a shape or a word; what: "object", "shape" or "word"; color for shapes."""
    what: str
    name: str
    cell: int              # 0..8, row by row
    color: str = ""

    def text(self):
        return {"object": self.name, "shape": f"{self.color} {self.name}", "word": f"word {self.name}"}[self.what]


@dataclass
class Scene:
    key: str               # the string that everything random about this scene comes from
    things: list

    def objects(self):
        return [thing.name for thing in self.things if thing.what == "object"]


def held_out(names) -> bool:
    """Whether two of these kinds are a pair that training never shows together."""
    return any(frozenset(pair) in HELD_OUT for pair in combinations(set(names), 2))


def make_scene(key: str, limit=8, new_pair=False) -> Scene:
    """The scene of a key: 1 to 6 objects of 1 to 3 kinds, a shape (70%) and a word (50%), each in its own place.

    limit: keep so many things at most (training begins with small scenes). new_pair: with a held-out pair of kinds, for
    the exam; all other scenes have none.
    """
    rng = random.Random("scene/" + key)
    cells = rng.sample(range(9), 9)
    kinds, wanted = [], rng.choice([2, 2, 3]) if new_pair else rng.choice([1, 2, 2, 3, 3])
    while not kinds or held_out(kinds) != new_pair:
        kinds = rng.sample(KINDS, wanted)
    names = []
    for kind in kinds:
        names += [kind] * rng.choices([1, 2, 3], weights=[45, 30, 25])[0]
    if new_pair:                           # all kinds before second ones: the pair shall survive the cut to six
        names = kinds + [name for i, name in enumerate(names) if name in names[:i]]
    things = [Thing("object", name, cells.pop()) for name in names[:6]]
    if rng.random() < 0.7:
        things.append(Thing("shape", rng.choice(SHAPES), cells.pop(), rng.choice(list(COLORS))))
    if rng.random() < 0.5:
        things.append(Thing("word", rng.choice(WORDS), cells.pop()))
    rng.shuffle(things)
    return Scene(key, things[:limit])


@lru_cache(maxsize=None)
def emoji(kind: str, side=48) -> Image.Image:
    picture = Image.open(ASSETS / "emoji" / f"{kind}.png").convert("RGBA")
    return picture.resize((side, side), Image.LANCZOS)


@lru_cache(maxsize=None)
def font(size: int):
    return ImageFont.load_default(size)     # comes with Pillow, so a picture looks the same everywhere


def layout(scene: Scene) -> list:
    """Where and how each thing is drawn: [(thing, x, y of its middle, side, degrees)], the large ones first, so that
    what overlaps never hides a small thing. In pixels; a middle stays inside its place, by 10 pixels or more."""
    rng = random.Random("draw/" + scene.key)
    found = []
    for thing in scene.things:
        middle = [CELL * at + CELL / 2 for at in (thing.cell % 3, thing.cell // 3)]
        side = rng.randint(18, 34) if thing.what == "object" else rng.randint(18, 30)
        free = 6 if thing.what != "word" else 3
        x, y = (min(max(m + rng.uniform(-free, free), 13), SIZE - 13) for m in middle)
        found.append((thing, x, y, side, rng.uniform(-35, 35) if thing.what == "object" else rng.uniform(-10, 10)))
    return sorted(found, key=lambda row: (row[0].what == "word", -row[3]))


def box(thing: Thing, x, y, side) -> tuple:
    """(left, top, right, bottom) of a thing that is drawn so, in pixels; of its upright outline."""
    half_width, half_height = (20, 7) if thing.what == "word" else (side / 2, side / 2)
    return x - half_width, y - half_height, x + half_width, y + half_height


def draw(scene: Scene) -> Image.Image:
    """The scene's picture: RGB, SIZE x SIZE. Objects are 18 to 34 pixels wide."""
    rng = random.Random("background/" + scene.key)
    ground = [rng.randint(190, 245) for _ in range(3)]
    image = Image.new("RGB", (SIZE, SIZE), tuple(ground))
    pen = ImageDraw.Draw(image)
    for _ in range(rng.randint(4, 14)):     # clutter: strokes, rings and dots in tints of the background
        tint = tuple(max(0, c + rng.randint(-70, 10)) for c in ground)
        x, y, w, h = (rng.randint(0, SIZE) for _ in range(4))
        if rng.random() < 0.5:
            pen.line([x, y, x + w // 3 - 16, y + h // 3 - 16], fill=tint, width=rng.randint(1, 3))
        else:
            r = 1 + w // 10
            pen.ellipse([x - r, y - r, x + r, y + r], outline=tint, fill=tint if r < 4 else None)
    for thing, x, y, side, degrees in layout(scene):
        if thing.what == "object":
            paste(image, emoji(thing.name, side), x, y, degrees)
        elif thing.what == "shape":
            draw_shape(pen, thing.name, COLORS[thing.color], round(x - side / 2), round(y - side / 2), side)
        else:
            paste(image, printed(thing.name), x, y, degrees)
    return image


def paste(image, picture, x, y, degrees):
    """An RGBA picture onto another one, its middle at (x, y), turned."""
    picture = picture.rotate(degrees, Image.BICUBIC, expand=True)
    image.paste(picture, (round(x - picture.width / 2), round(y - picture.height / 2)), picture)


@lru_cache(maxsize=None)
def printed(word: str) -> Image.Image:
    """A word in black with a white rim, so that it can be read on anything."""
    picture = Image.new("RGBA", (44, 18))
    ImageDraw.Draw(picture).text((22, 9), word.upper(), fill=(0, 0, 0), font=font(11), anchor="mm", stroke_width=1,
                                 stroke_fill=(255, 255, 255))
    return picture


KNOWS = ("this is the embedded model, which knows drawn scenes of 96 x 96 pixels only (python toy.py show): "
         f"{', '.join(KINDS)}; coloured {', '.join(SHAPES)}; printed words. This picture is none: expect nonsense.")


def knows(image: Image.Image) -> bool:
    """Whether a picture can be one of this world: its size, and one pale colour, the background, on much of it."""
    if image.size != (SIZE, SIZE):
        return False
    often, color = max(image.getcolors(SIZE * SIZE))
    return often > SIZE * SIZE / 10 and all(190 <= c <= 245 for c in color)


def draw_shape(pen, shape, color, x, y, s):
    line = dict(fill=color, outline=(60, 60, 60))
    if shape == "square":
        pen.rectangle([x, y, x + s, y + s], **line)
    elif shape == "circle":
        pen.ellipse([x, y, x + s, y + s], **line)
    elif shape == "triangle":
        pen.polygon([(x, y + s), (x + s, y + s), (x + s / 2, y)], **line)
    else:
        pen.polygon([(x + s / 2, y), (x + s, y + s / 2), (x + s / 2, y + s), (x, y + s / 2)], **line)


# ---------------------------------------------------------------------------------------------------------------------
# what can be said and asked about a scene

def article(name):
    return ("an " if name[0] in "aeiou" else "a ") + name


def plural(name):
    return name + ("es" if name.endswith(("s", "x", "ch", "sh", "o")) else "s")


def caption(scene: Scene) -> str:
    """Everything in the scene with its place, in the scene's (random) order: "cat top left, red square middle, ..."."""
    return ", ".join(f"{thing.text()} {PLACES[thing.cell]}" for thing in scene.things)


def grid(scene: Scene) -> str:
    """The same by place, row by row, as a picture's patches come: "top left - top cat top right red square ..."."""
    cell = {thing.cell: thing.text() for thing in scene.things}
    return " ".join(f"{place} {cell.get(i, '-')}" for i, place in enumerate(PLACES))


def glimpses(scene: Scene, ground="") -> str:
    """The same as a picture's patches would tell it, row by row: a large thing again and again, so that whoever counts
    has to count places. ground: what patches with nothing on them tell, anywhere."""
    rng, seen = random.Random("glimpses/" + scene.key), []
    for thing, x, y, side, _ in layout(scene):
        left, top, right, bottom = box(thing, x, y, side)
        for _ in range(rng.randint(1, 4)):
            at = rng.uniform(top, bottom) // PATCH, rng.uniform(left, right) // PATCH
            seen.append((at, f"{thing.text()} {PLACES[thing.cell]}"))
    for _ in range(rng.randint(1, 4) if ground else 0):
        seen.append(((rng.randrange(SIZE // PATCH), rng.randrange(SIZE // PATCH)), ground))
    return " ".join(text for _, text in sorted(seen, key=lambda row: row[0]))


# Phrasings in training, and after the bar those that only the exam uses. {a} is "a cat" or "an apple", {s} is "cats".
# No word of the latter is new, only their order is: a model of four layers can't know what it has never read.
PHRASES = {
    "count": ("How many {s} are there?/How many {s} do you see?/Count the {s}./What is the number of {s}?/"
              "How many {s} are in the picture?|How many {s} can you see?/Tell me the number of {s}."),
    "presence": ("Is there {a}?/Do you see {a}?/Is {a} in the picture?/Can you see {a}?/Is there {a} here?|"
                 "Is {a} here?/Do you see {a} in the picture?"),
    "where": ("Where is the {k}?/In which place is the {k}?/Find the {k}./Tell me where the {k} is./"
              "Where can you see the {k}?|Where do you see the {k}?/In which place do you see the {k}?"),
    "left-of": ("Is the {k} left of the {j}?/Is the {k} to the left of the {j}?/Do you see the {k} left of the {j}?/"
                "Can you see the {k} to the left of the {j}?|Do you see the {k} to the left of the {j}?/"
                "Can you see the {k} left of the {j}?"),
    "colour": ("What color is the {k}?/What is the color of the {k}?/Which color does the {k} have?/"
               "Tell me the color of the {k}.|Which color is the {k}?/What color does the {k} have?"),
    "word": ("What word is printed?/What does the text say?/Read the word./Tell me the word./Which word do you see?/"
             "What is the word?/What is the text?/Which text is printed?/Read the printed text.|"
             "What word do you see?/Read the text."),
    "it": "Where is it?/In which place is it?/Tell me where it is.|Where can you see it?/Where do you see it?",
    "it-left": ("Is it left of the {j}?/Is it to the left of the {j}?/Do you see it left of the {j}?|"
                "Do you see it to the left of the {j}?/Can you see it left of the {j}?"),
    "and": "And how many {s}?/And the {s}?|And how many {s} are there?/And the number of {s}?",
}
PHRASES = {kind: [part.split("/") for part in text.split("|")] for kind, text in PHRASES.items()}
PHRASES["category"] = PHRASES["count"]
SENTENCE = [" Answer in a sentence.", " Say it in a sentence."]
QUESTIONS = ["count", "presence", "where", "left-of", "colour", "word", "category", "follow-up"]


@dataclass
class Turn:
    """A question and its answer; short: the answer without its sentence, by which the commonest answer is told."""
    question: str
    answer: str
    short: str


def phrase(kind, rng, new=False, **names) -> str:
    return rng.choice(PHRASES[kind][new]).format(**names)


def say(turn: Turn, sentence: str, rng, chance=0.25) -> Turn:
    """The turn as it is, or, by chance, with the wish for a sentence and the sentence for an answer."""
    if rng.random() >= chance:
        return turn
    return replace(turn, question=turn.question + rng.choice(SENTENCE), answer=sentence)


def count(scene, rng, new, kind="count", first=""):
    """"How many cats", "How many animals": a fifth asks for what isn't there, else every number that occurs is equally
    likely. first: the name that the turn before asked about, not to be asked again ("And how many dogs?")."""
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
    return rng.choice(alike if alike and rng.random() < 0.2 else [k for k in KINDS if k not in objects])


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
    return [t for t in scene.things if t.what == "shape" or t.what == "object" and objects.count(t.name) == 1]


def place(scene, rng, new, kind="where", it=None):
    """"Where is the cat?" (sometimes of what isn't there), or "Where is it?" of a thing that was spoken of."""
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
    """"Is the cat left of the dog?", of two single things in different columns; of a held-out pair if there is one."""
    pairs = [(a, b) for a in singles(scene) for b in singles(scene)
             if a.cell % 3 != b.cell % 3 and (it is None or a.name == it.name)]
    if not pairs:
        return None
    a, b = rng.choice([pair for pair in pairs if held_out([t.name for t in pair])] or pairs)
    # both orders are in the list, so yes and no are equally likely
    short, side = ("yes", "left") if a.cell % 3 < b.cell % 3 else ("no", "right")
    sentence = f"{short.capitalize()}, {'it' if it else f'the {a.name}'} is {side} of the {b.name}."
    return a.name, say(Turn(phrase(kind, rng, new, k=a.name, j=b.name), short, short), sentence, rng)


def told(scene, rng, new, kind):
    """The colour of the shape, or the printed word."""
    things = [t for t in scene.things if t.what == dict(colour="shape", word="word")[kind]]
    if not things:
        return None
    k, short = (things[0].name, things[0].color) if kind == "colour" else ("word", things[0].name)
    return k, say(Turn(phrase(kind, rng, new, k=k), short, short), f"The {k} is {short}.", rng)


def ask(scene: Scene, kind: str, rng: random.Random, new=False):
    """A question of a kind about a scene: [Turn], or None if this scene doesn't allow the kind.

    A "follow-up" is two turns, of which the second can't be understood without the first: "Is there a cat?", "Where is
    it?". new: in a phrasing that training never uses.
    """
    if kind == "follow-up":
        return follow(scene, rng, new)
    makers = {"count": count, "category": count, "presence": presence, "where": place, "left-of": left_of,
              "colour": told, "word": told}
    made = makers[kind](scene, rng, new, kind)
    return made and [made[1]]


def follow(scene: Scene, rng, new):
    """Two turns about one thing, or "How many cats?", "And the dogs?". Only the second is in a new phrasing."""
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
    """One question (30%) or up to max_turns with their answers, of different kinds as far as the scene allows:
    [(question, answer)]; empty if the scene allows none. also: kinds to be asked more often than the others."""
    rng = random.Random("ask/" + scene.key)
    kinds = QUESTIONS + ["count", "presence", "where", "left-of", "follow-up", *also]
    rng.shuffle(kinds)
    wanted, turns = 1 if rng.random() < 0.3 else rng.randint(2, max_turns), []
    for kind in kinds:
        new = ask(scene, kind, rng) or []
        if len(turns) < wanted and not {turn.question for turn in new[:1]} & {question for question, _ in turns}:
            turns += [(turn.question, turn.answer) for turn in new]
    return turns


def record(turns, image="") -> dict:
    """Turns as a LLaVA record; with an image its slot stands before the first question."""
    said = []
    for i, (question, answer) in enumerate(turns):
        said.append({"from": "human", "value": ("<image>\n" if image and i == 0 else "") + question})
        said.append({"from": "gpt", "value": answer})
    return {"id": image, **({"image": image} if image else {}), "conversations": said}


@dataclass
class Item:
    """A question of the exam: the last of turns. Its phrasing, or a pair of kinds in its scene, may be held out."""
    scene: Scene
    kind: str
    turns: list
    new_phrasing: bool
    new_pair: bool


def exam(seed: int, n: int) -> list:
    """n held-out Items, every kind equally often, half of them in new phrasings, half of them with a new pair."""
    items = []
    for i in range(n):
        kind, new_phrasing, new_pair = QUESTIONS[i % 8], i // 8 % 2 == 1, i // 16 % 2 == 1
        for attempt in range(1000):
            scene = make_scene(f"test{seed}/{i}/{attempt}", new_pair=new_pair)       # training has no such keys
            if turns := ask(scene, kind, random.Random("exam/" + scene.key), new_phrasing):
                items.append(Item(scene, kind, turns, new_phrasing, new_pair))
                break
    return items


class ToyScenes(torch.utils.data.Dataset):
    """Scenes as train.py wants its samples. Item i is a pure function of (split, i); nothing lies on disk.

    stage 1: the picture and its caption ("plain"); stage 2: the picture and a conversation ("v1"). Three scenes in
    eight are small: in these a question is easily answered, and what answers it carries over. "How many animals" is
    what is learnt last, so it's asked three times as often as it would be.
    """

    def __init__(self, split, n, stage, tokenizer, size=SIZE):
        self.split, self.n, self.stage, self.tokenizer, self.size = split, n, stage, tokenizer, size

    def __len__(self):
        return self.n

    def record_id(self, i):
        return f"{self.split}/{i}"

    def scene(self, i):
        key = self.record_id(i)
        return make_scene(key, limit=random.Random("limit/" + key).choice([2, 3, 4] + 5 * [8]))

    def sample(self, i):
        """The text alone."""
        scene = self.scene(i)
        turns = conversation(scene, also=["category", "category"]) if self.stage == 2 else []
        turns = turns or [("Describe the picture.", caption(scene))]
        return render(record(turns, image="toy"), self.tokenizer, "plain" if self.stage == 1 else "v1")

    def length(self, i):
        """Tokens of sample i's text."""
        return len(self.sample(i).ids)

    def __getitem__(self, i):
        return item(self.sample(i), preprocess(draw(self.scene(i)), self.size, pad=True))


# ---------------------------------------------------------------------------------------------------------------------
# pretraining: the tokenizer, the small CLIP, the small Llama

VOCAB, BOS, EOS = 896, 1, 2


def train_tokenizer(out: Path):
    """A sentencepiece BPE in Llama-2's style (byte fallback, dummy prefix) from sentences of this world.

    The names of things are pieces from the start, so that "peaches" comes apart into "peach" and "es": the question
    then holds the very token that names the thing, and looking it up is a match of equal tokens. So is what the prompt
    repeats in every sample: the system's sentences would be a third of the tokens of a short question.
    """
    import sentencepiece

    def sentences():
        rng = random.Random("tokenizer")
        names = KINDS + SHAPES + list(COLORS) + WORDS + list(CATEGORIES) + list("0123456") + ["yes", "no"]
        for i in range(3000):
            scene = make_scene(f"tokenizer/{i}")
            for turn in ask(scene, rng.choice(QUESTIONS), rng) or []:
                yield turn.question + " " + turn.answer
                yield f"({turn.question}"          # a question after a picture's newline begins without a space
            yield grid(scene) + " " + caption(scene)
            yield " ".join(rng.sample(names, 40))
        yield from (chr(c) for c in range(32, 127))

    whole = [" " + SYSTEM, " USER:", "USER:", " ASSISTANT:"] + [" " + name for name in KINDS + list(CATEGORIES)]
    whole = [text.replace(" ", "\u2581") for text in whole]
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "tokenizer.model.tmp", "wb") as f:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=sentences(), model_writer=f, model_type="bpe", vocab_size=VOCAB, byte_fallback=True,
            normalization_rule_name="identity", remove_extra_whitespaces=False, character_coverage=1.0,
            user_defined_symbols=whole, unk_id=0, bos_id=1, eos_id=2, pad_id=-1, num_threads=1, minloglevel=2)
    os.replace(out / "tokenizer.model.tmp", out / "tokenizer.model")


class Muon(torch.optim.Optimizer):
    """Momentum whose update is made orthogonal by five Newton-Schulz steps (Jordan et al. 2024), for matrices.

    torch.optim.Muon does these steps in bfloat16, which takes a CPU that can't three seconds a step; this does them in
    what suits the machine.
    """

    def __init__(self, params, lr, momentum=0.95):
        super().__init__(params, dict(lr=lr, momentum=momentum))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                buffer = self.state[p].setdefault("momentum", torch.zeros_like(p))
                buffer.lerp_(p.grad, 1 - group["momentum"])
                u = torch.lerp(p.grad, buffer, group["momentum"])                     # Nesterov
                u = u.T if p.shape[0] > p.shape[1] else u
                u = (u / (u.norm() + 1e-7)).to(autocast_dtype(p.device))
                for _ in range(5):
                    gram = u @ u.T
                    u = 3.4445 * u + (-4.775 * gram + 2.0315 * gram @ gram) @ u
                u = u.T if p.shape[0] > p.shape[1] else u
                p.add_(u, alpha=-group["lr"] * 0.2 * max(p.shape) ** 0.5)       # as large as AdamW's steps


def optimizers(model, lr):
    """Muon for the matrices inside the blocks, AdamW for everything else.

    Stage 1 and 2 are AdamW alone, as in the paper (train.py); here, where two cores have to teach a small model to look
    things up, Muon gets there in a fraction of the steps.
    """
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "layers." in name]
    chosen = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    return [Muon(matrices, lr), torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.95), weight_decay=0.0)]


def pretrain(name, model, loss_of_step, steps, lr, out: Path):
    """Train model for a number of steps. loss_of_step(model, step) gives, in one part or several, the loss on the
    step's own, reproducible batch, and the share of its predictions that are right: [(loss, right)], to be summed.

    Warm-up over 50 steps, constant, linear to zero over the last quarter. Every 100 steps everything is written to
    out/NAME.ckpt, beside and renamed, and a run that was stopped goes on from there.
    """
    opts, start, log, dtype = optimizers(model, lr), 0, out / f"{name}.csv", autocast_dtype(torch.device("cpu"))
    ckpt = out / f"{name}.ckpt"
    if ckpt.exists():
        state = torch.load(ckpt, weights_only=True)
        model.load_state_dict(state["model"])
        for opt, saved in zip(opts, state["opts"]):
            opt.load_state_dict(saved)
        start = state["step"]
    rows = log.read_text().splitlines()[1:] if start else []       # what was logged after the checkpoint is done again
    rows = ["step,loss,right"] + [row for row in rows if int(row.split(",")[0]) <= start]
    log.write_text("".join(f"{row}\n" for row in rows))
    began = time.perf_counter()
    for step in range(start, steps):
        rate = min(1, (step + 1) / 50, (steps - step) / (steps / 4))
        for opt in opts:
            for group in opt.param_groups:
                group["lr"] = lr * rate
        loss = right = 0.0
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            for part, share in loss_of_step(model, step):
                part.backward()
                loss, right = loss + part.item(), right + share
        for opt in opts:
            opt.step()
            opt.zero_grad(set_to_none=True)
        if (step + 1) % 20 == 0 or step + 1 == steps:
            each = (time.perf_counter() - began) / (step + 1 - start)
            print(f"{name} {step + 1}/{steps} loss {loss:.3f} right {right:.3f} {each:.2f} s/step "
                  f"eta {each * (steps - step - 1) / 60:.0f} min", flush=True)
            with open(log, "a") as f:
                f.write(f"{step + 1},{loss:.4f},{right:.3f}\n")
        if (step + 1) % 100 == 0 or step + 1 == steps:
            torch.save(dict(model=model.state_dict(), opts=[o.state_dict() for o in opts], step=step + 1),
                       f"{ckpt}.tmp")
            os.replace(f"{ckpt}.tmp", ckpt)


def sibling(scene: Scene) -> Scene:
    """Nearly the same scene: two things have changed places, or one has become another, if it can its look-alike. A
    negative for CLIP, which has to see what and where everything is to tell the two apart."""
    rng = random.Random("sibling/" + scene.key)
    things = [replace(thing) for thing in scene.things]
    one = rng.choice(things)
    if rng.random() < 0.5:
        cell = rng.choice([cell for cell in range(9) if cell != one.cell])
        for other in things:
            if other.cell == cell:
                other.cell = one.cell
        one.cell = cell
    elif one.what == "word":
        one.name = rng.choice([word for word in WORDS if word != one.name])
    elif one.what == "shape":
        one.color = rng.choice([color for color in COLORS if color != one.color])
    else:
        others = [thing.name for thing in things if thing.what == "object" and thing is not one]
        fine = [kind for kind in KINDS if kind != one.name and not held_out(others + [kind])]
        alike = LOOKALIKE.get(one.name)
        one.name = alike if alike in fine and rng.random() < 0.5 else rng.choice(fine)
    return Scene(scene.key + "/sibling", things)


CLIP_GROW = 100


def regions(scenes: list) -> tuple:
    """Which patches show what: (weights (things, pictures * N), the things' phrases).

    A phrase is a thing's part of the caption, "cat top left". A row of weights is the share of a thing's box that falls
    into each patch: their sum of all patches' features is the mean over the box.
    """
    grid = SIZE // PATCH
    edges = torch.arange(grid + 1) * PATCH
    rows, phrases = [], []
    for i, scene in enumerate(scenes):
        for thing, x, y, side, _ in layout(scene):
            left, top, right, bottom = box(thing, x, y, side)
            across = (edges.clamp(left, right)).diff()                                # (grid), pixels of every column
            down = (edges.clamp(top, bottom)).diff()
            inside = torch.zeros(len(scenes), grid, grid)
            inside[i] = torch.outer(down, across)
            rows.append((inside / inside.sum()).flatten())
            phrases.append(f"{thing.text()} {PLACES[thing.cell]}")
    return torch.stack(rows), phrases


def clip_config(vocab_size):
    vision = CLIPVisionConfig(image_size=SIZE, patch_size=PATCH, hidden_size=128, intermediate_size=512,
                              num_hidden_layers=8, num_attention_heads=4)
    text = CLIPTextConfig(vocab_size=vocab_size + 1, hidden_size=128, intermediate_size=512, num_hidden_layers=2,
                          num_attention_heads=4, max_position_embeddings=80, eos_token_id=vocab_size)
    return vision, text          # a text ends with an id of its own, above the tokenizer's


def as_text(tokenizer, texts: list):
    """Texts as CLIP's text tower takes them: (B, T), filled up with the id that ends a text."""
    ids, end = [tokenizer.encode(text) for text in texts], tokenizer.vocab_size
    width = 1 + max(map(len, ids))
    return torch.tensor([row + [end] * (width - len(row)) for row in ids])            # pooled at the first end


def contrast(logits, target):
    """Cross-entropy of every row, and the share of rows whose highest logit is the right one."""
    return F.cross_entropy(logits, target), (logits.argmax(-1) == target).float().mean().item()


def train_clip(out: Path, tokenizer, steps, batch=48):
    """Contrastive learning (CLIP, Radford et al. 2021) on pictures and captions, half of the batch being siblings; and
    on the parts of both, as RegionCLIP (Zhong et al. 2022) has it: the patches where a thing lies against its phrase.

    The real CLIP has seen 12.8 billion pictures and learns from whole captions alone what lies where; here the parts
    make up for that. Scenes of one thing come first and grow by one in CLIP_GROW steps.
    """
    torch.manual_seed(1)
    model = CLIP(*clip_config(tokenizer.vocab_size), projection_dim=128)

    def loss_of_step(model, step):
        model.logit_scale.data.clamp_(max=math.log(100))                              # as OpenAI's training does
        rng = random.Random(f"clip/{step}")
        scenes = [make_scene(f"clip/{step}/{i}", limit=rng.randint(1, 1 + step // CLIP_GROW)) for i in range(batch)]
        scenes += [sibling(scene) for scene in scenes]
        pixels = torch.stack([preprocess(draw(scene), SIZE, pad=True) for scene in scenes])
        weights, phrases = regions(scenes)                                             # (things, B N)
        names = sorted(set(phrases))
        hidden = model.vision.states(pixels)[-1]                                       # (B, 1 + N, d)
        features = model.visual_projection(model.vision.post_layernorm(hidden))        # (B, 1 + N, P)
        things = F.normalize(weights @ features[:, 1:].flatten(0, 1).float(), dim=-1)  # (things, P)
        told = F.normalize(model.encode_text(as_text(tokenizer, names)).float(), dim=-1)
        parts, right = contrast(model.logit_scale.exp() * things @ told.T,
                                torch.tensor([names.index(phrase) for phrase in phrases]))
        whole = F.normalize(features[:, 0].float(), dim=-1)                            # (B, P)
        captions = F.normalize(model.encode_text(as_text(tokenizer, [caption(s) for s in scenes])).float(), dim=-1)
        logits, target = model.logit_scale.exp() * whole @ captions.T, torch.arange(len(scenes))
        return [(parts + (contrast(logits, target)[0] + contrast(logits.T, target)[0]) / 2, right)]

    pretrain("clip", model, loss_of_step, steps, 1e-3, out)
    model.save_pretrained(out / "clip")


def llama_config(vocab_size):
    return LlamaConfig(vocab_size=vocab_size, hidden_size=192, intermediate_size=512, num_hidden_layers=6,
                       num_attention_heads=6, num_key_value_heads=6, rms_norm_eps=1e-5, rope_theta=10000.0,
                       max_position_embeddings=1024, tie_word_embeddings=True, bos_token_id=BOS, eos_token_id=EOS)


REPEATS, TEXT_GROW = 600, 100      # steps of repeated sequences before the scenes; steps until these grow by one thing


def text_rows(tokenizer, step, batch):
    """What the Llama learns to read in one step: [(ids, labels)].

    First repeated sequences of random names: to predict the second half is to find the earlier token and copy what
    followed it, and that head is what every later question needs. Then scenes as text, as captions of grids ("plain",
    like stage 1) or with a conversation ("v1"), told in one of three ways. They are small at first and grow: what finds
    the asked thing among two carries over to more.
    """
    rng = random.Random(f"text/{step}")
    if step < REPEATS:
        names = [tokenizer.encode(name)[0] for name in KINDS + WORDS + SHAPES + list(COLORS)]
        n = rng.randint(8, 20)
        half = [rng.choices(names, k=n) for _ in range(batch)]
        return [([BOS] + h + h, [IGNORE] * (n + 1) + h) for h in half]
    rows = []
    for i in range(batch):
        scene = make_scene(f"text/{step}/{i}", limit=2 + rng.randrange(1 + (step - REPEATS) // TEXT_GROW))
        if i % 12 == 0:
            seen = tokenizer.encode(grid(scene))
            told = tokenizer.encode(caption(scene)) + tokenizer.encode("\n", continues=True)
            rows.append(([BOS] + seen + told, [IGNORE] * (1 + len(seen)) + told))
        elif turns := conversation(scene, 12):
            context = (caption, grid, glimpses, glimpses)[i % 4](scene)
            sample = render(record([(context + "\n" + turns[0][0], turns[0][1])] + turns[1:]), tokenizer, "v1")
            rows.append((sample.ids, sample.labels))
    return rows


def text_loss(rows_of_step, piece=8):
    """pretrain's loss_of_step for rows_of_step(step), [(ids, labels)]: next-token prediction where there are labels. A
    step's rows are sorted by length and taken `piece` at a time, to save padding."""
    def loss_of_step(model, step):
        rows = sorted(rows_of_step(step), key=lambda row: len(row[0]))
        supervised = sum(label != IGNORE for _, labels in rows for label in labels)
        for at in range(0, len(rows), piece):
            part = rows[at:at + piece]
            width = len(part[-1][0])
            ids = torch.tensor([row + [0] * (width - len(row)) for row, _ in part])        # (piece, T)
            labels = torch.tensor([row + [IGNORE] * (width - len(row)) for _, row in part])
            keep = labels[:, 1:] != IGNORE
            logits = model.lm_head(model.hidden(tokens=ids)[:, :-1][keep]).float()         # (answers, V)
            loss, right = contrast(logits, labels[:, 1:][keep])
            yield loss * (len(logits) / supervised), right * (len(logits) / supervised)
    return loss_of_step


def train_llama(out: Path, tokenizer, steps, batch=32):
    """The loss on answers and captions of texts: the part that Vicuna plays in the paper."""
    torch.manual_seed(2)
    model = Llama(llama_config(tokenizer.vocab_size))
    pretrain("llama", model, text_loss(lambda step: text_rows(tokenizer, step, batch)), steps, 2e-3, out)
    model.save_pretrained(out / "llama")


# ---------------------------------------------------------------------------------------------------------------------
# commands

def pretrain_towers(args):
    """(a) tokenizer and CLIP, (b) Llama; each saved as a public model folder with the tokenizer beside it."""
    OUT.mkdir(parents=True, exist_ok=True)
    if not (OUT / "llama" / "tokenizer.model").exists():
        train_tokenizer(OUT / "llama")
    tokenizer = Tokenizer.from_pretrained(OUT / "llama")
    if not (OUT / "clip" / "config.json").exists():
        train_clip(OUT, tokenizer, args.clip_steps)
    if not (OUT / "llama" / "config.json").exists():
        train_llama(OUT, tokenizer, args.llama_steps)


def retrain(args):
    """Everything from nothing, in order; what is already there is not done again."""
    pretrain_towers(args)
    for stage in (1, 2):
        if not (OUT / f"stage{stage}" / "model.safetensors").exists():
            subprocess.run([sys.executable, str(ROOT / "train.py"), "--stage", str(stage)], check=True)
    print(f"the model is in {OUT / 'stage2'}; `python toy.py ship` puts it where sample.py looks")


def ship(args):
    """Write stage 2's model to assets/toy in float16, and the README's pictures."""
    source = OUT / "stage2"
    tensors = {name: tensor.half() for name, tensor in Tensors(source).items()}
    save(MODEL, tensors, {**read_config(source), "world": "toy"})
    shutil.copyfile(source / "tokenizer.model", MODEL / "tokenizer.model")
    for log in ("clip.csv", "llama.csv", "stage1/log.csv", "stage2/log.csv"):       # how it was trained
        (MODEL / "logs").mkdir(exist_ok=True)
        shutil.copyfile(OUT / log, MODEL / "logs" / log.replace("/log", ""))
    draw(make_scene(SCENE)).save(ASSETS / "scene.png")
    sheet([f"show/{i}" for i in range(12)]).save(ASSETS / "scenes.png", optimize=True)
    size = sum(f.stat().st_size for f in MODEL.iterdir())
    print(f"{MODEL}: {size / 1e6:.1f} MB")


def sheet(keys, columns=6):
    """The pictures of some scenes on one, at twice their size."""
    rows, step = math.ceil(len(keys) / columns), SIZE + 8
    image = Image.new("RGB", (columns * step, rows * step), "black")
    for i, key in enumerate(keys):
        image.paste(draw(make_scene(key)), (i % columns * step + 4, i // columns * step + 4))
    return image.resize((image.width * 2, image.height * 2))


def show(args):
    """Scenes and their questions, as a picture to look at and as text."""
    keys = [f"{args.split}/{i}" for i in range(args.n)]
    for scene in map(make_scene, keys):
        print(f"{scene.key}: {caption(scene)}")
        for question, answer in conversation(scene):
            print(f"    {question}  {answer}")
    OUT.mkdir(parents=True, exist_ok=True)
    sheet(keys).save(OUT / "scenes.png")
    print(f"drawn in {OUT / 'scenes.png'}")


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sub = p.add_subparsers(dest="command", required=True)
    s = sub.add_parser("show", help="draw scenes and print their questions")
    s.add_argument("--n", type=int, default=12)
    s.add_argument("--split", default="train2", help="which scenes: train1, train2, or test0 (held out)")
    s = sub.add_parser("retrain", help="train everything from nothing (hours; goes on where it stopped)")
    s.add_argument("--clip-steps", type=int, default=4000)
    s.add_argument("--llama-steps", type=int, default=4500)
    sub.add_parser("ship", help="copy the retrained model to assets/toy, where sample.py looks")
    args = p.parse_args()
    dict(show=show, retrain=retrain, ship=ship)[args.command](args)


if __name__ == "__main__":
    run(main)
