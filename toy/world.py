"""The embedded world: little pictures, and questions about them.

Nobody can rent eight A100s to find out whether a line of code is right, so this repository carries a world in which the
whole recipe of the paper runs for real on a laptop: (a) a small CLIP learns from captions, (b) a small Llama learns
from text alone (both in towers.py), both are saved in the public Hugging Face layout, and from there on nothing is
special: train.py loads them with the code that loads openai/clip-vit-large-patch14-336 and Vicuna, and runs stage 1
and stage 2.

    python toy.py show  --n 12        draws scenes with their questions into out/toy/scenes.png
    python toy.py retrain             everything from nothing: tokenizer, CLIP, Llama, stage 1, stage 2 (resumable)
    python toy.py study               CCRA beside the other fusers, several seeds each, and the tables (resumable)

A scene has nine places. Some hold emoji objects (40 kinds in 4 categories, 8 of them look-alikes of another), one may
hold a coloured shape, one a printed word; things differ in size, are turned, shifted, overlap and lie on clutter. A
scene is a pure function of a string such as "train2/17": no picture is stored, and training and held-out scenes differ
in that string. Training never shows certain pairs of kinds together and never uses certain phrasings: the exam does.
Questions are balanced, so that they don't give their answers away (tests/test_toy.py).
"""
import argparse
import math
import random
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import combinations
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

from clip import preprocess
from data import item, render
from core.weights import Tensors, UserError, read_config, run, save

ROOT = Path(__file__).resolve().parent.parent
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
# No word of the latter is new, only their order is: a model of six layers can't know what it has never read.
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
# commands

def retrain(args):
    """Everything from nothing, in order; what is already there is not done again."""
    from toy.towers import train_towers             # which imports this file
    train_towers(OUT, args.clip_steps, args.llama_steps)
    for stage in (1, 2):
        if not (OUT / f"stage{stage}" / "model.safetensors").exists():
            call("train.py", "--stage", str(stage))
    print(f"the model is in {OUT / 'stage2'}; `python toy.py ship` puts it where sample.py looks")


def study(args):
    """study.py's runs that are not done yet, and what they say."""
    for command in ("run", "off", "table"):
        call("study.py", command)


def call(program: str, *words: str) -> None:
    """Another of these programs, in a process of its own. If it fails it has said why, and so this one ends, too."""
    if code := subprocess.run([sys.executable, str(ROOT / program), *words]).returncode:
        sys.exit(code)


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
    sub.add_parser("study", help="does CCRA work? (docs/study.md; hours; started twice, it uses two cores)")
    sub.add_parser("ship", help="copy the retrained model to assets/toy, where sample.py looks")
    args = p.parse_args()
    if args.command == "show" and args.n < 1:
        raise UserError("--n should be at least 1")
    dict(show=show, retrain=retrain, study=study, ship=ship)[args.command](args)


if __name__ == "__main__":
    run(main)
