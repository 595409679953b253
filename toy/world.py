"""The embedded world: little pictures, and questions about them.

Nobody can rent eight A100s to find out whether a line of code is right, so this repository carries
a world in which the whole recipe of the paper runs for real on a laptop: (a) a small CLIP learns
from captions, (b) a small Llama learns from text alone (both in towers.py), both are saved in the
public Hugging Face layout, and from there on nothing is special: train.py loads them with the code
that loads openai/clip-vit-large-patch14-336 and Vicuna, and runs stage 1 and stage 2.

    python toy.py show  --n 12        draws scenes with their questions into out/toy/scenes.png
    python toy.py retrain             everything from nothing: tokenizer, CLIP, Llama, stage 1, stage 2 (resumable)
    python toy.py study               CCRA beside the other fusers, several seeds each, and the tables (resumable)

A scene has nine places. Some hold emoji objects (40 kinds in 4 categories, 8 of them look-alikes of
another), one may hold a coloured shape, one a printed word; things differ in size, are turned,
shifted, overlap and lie on clutter. A scene is a pure function of a string such as "train2/17": no
picture is stored, and training and held-out scenes differ in that string. Training never shows
certain pairs of kinds together and never uses certain phrasings: the exam does. Questions are
balanced, so that they don't give their answers away (tests/test_toy.py).
"""
import random
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations
from pathlib import Path

from PIL import Image, ImageDraw

from core.canvas import font
from core.common import ROOT

SCENE = "test/207"               # the scene that the README asks about
ASSETS = ROOT / "assets"
MODEL = ASSETS / "toy"           # the embedded model that ships with the repository
OUT = Path("out/toy")            # where retraining works


# --------------------------------------------------------------------------------------------------
# the world

SIZE, CELL, PATCH = 96, 32, 12   # pixels: a picture is 3 x 3 places, and 8 x 8 patches for its CLIP
CATEGORIES = {
    "animal": ["cat", "dog", "cow", "pig", "frog", "owl", "crab", "bee", "tiger", "wolf"],
    "food": [
        "apple", "banana", "lemon", "carrot", "pizza", "egg", "cake", "donut", "tomato", "peach"],
    "vehicle": [
        "car", "bus", "train", "boat", "rocket", "bicycle", "plane", "tractor", "taxi", "tram"],
    "tool": [
        "hammer", "wrench", "axe", "saw", "key", "pencil", "magnet", "ladder", "pick", "brush"], }
KINDS = [kind for kinds in CATEGORIES.values() for kind in kinds]
CATEGORY = {kind: category for category, kinds in CATEGORIES.items() for kind in kinds}
ALIKE = [("cat", "tiger"), ("dog", "wolf"), ("apple", "tomato"), ("lemon", "peach"),
         ("car", "taxi"), ("bus", "tram"), ("hammer", "pick"), ("pencil", "brush")]
LOOKALIKE = dict(ALIKE) | {b: a for a, b in ALIKE}
HELD_OUT = {
    frozenset(pair)
    for pair in random.Random("pairs").sample(list(combinations(KINDS, 2)), 60)}  # of 780
COLORS = {
    "red": (214, 39, 40), "green": (44, 160, 44), "blue": (31, 80, 200), "yellow": (245, 215, 40),
    "orange": (255, 127, 14), "purple": (128, 50, 160), "black": (20, 20, 20),
    "white": (255, 255, 255)}
SHAPES = ["square", "circle", "triangle", "diamond"]
WORDS = [
    "sun", "moon", "tea", "ink", "jam", "fog", "oak", "zip", "map", "ice", "gold", "wind", "rain",
    "lake", "song", "milk", "coin", "rope", "door", "leaf", "nest", "salt", "wool", "yard"]
PLACES = [
    "top left", "top", "top right", "left", "middle", "right", "bottom left", "bottom",
    "bottom right"]
AT = {
    "top": "at the top", "bottom": "at the bottom", "left": "on the left", "right": "on the right"}


@dataclass
class Thing:
    """What one place holds. name: a kind, a shape or a word; what: "object", "shape" or "word";
    color for shapes."""
    what: str
    name: str
    cell: int              # 0..8, row by row
    color: str = ""

    def text(self):
        return {
            "object": self.name, "shape": f"{self.color} {self.name}",
            "word": f"word {self.name}"}[self.what]


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
    """The scene of a key: 1 to 6 objects of 1 to 3 kinds, a shape (70%) and a word (50%), each in
    its own place.

    limit: keep so many things at most (training begins with small scenes). new_pair: with a
    held-out pair of kinds, for the exam; all other scenes have none.
    """
    rng = random.Random("scene/" + key)
    cells = rng.sample(range(9), 9)
    kinds, wanted = [], rng.choice([2, 2, 3]) if new_pair else rng.choice([1, 2, 2, 3, 3])
    while not kinds or held_out(kinds) != new_pair:
        kinds = rng.sample(KINDS, wanted)
    names = []
    for kind in kinds:
        names += [kind] * rng.choices([1, 2, 3], weights=[45, 30, 25])[0]
    if new_pair:               # all kinds before second ones: the pair shall survive the cut to six
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


def layout(scene: Scene) -> list:
    """Where and how each thing is drawn: [(thing, x, y of its middle, side, degrees)], the large
    ones first, so that what overlaps never hides a small thing. In pixels; a middle stays inside
    its place, by 10 pixels or more."""
    rng = random.Random("draw/" + scene.key)
    found = []
    for thing in scene.things:
        middle = [CELL * at + CELL / 2 for at in (thing.cell % 3, thing.cell // 3)]
        side = rng.randint(18, 34) if thing.what == "object" else rng.randint(18, 30)
        free = 6 if thing.what != "word" else 3
        x, y = (min(max(m + rng.uniform(-free, free), 13), SIZE - 13) for m in middle)
        found.append((thing, x, y, side,
                      rng.uniform(-35, 35) if thing.what == "object" else rng.uniform(-10, 10)))
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
    # clutter: strokes, rings and dots in tints of the background
    for _ in range(rng.randint(4, 14)):
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
            draw_shape(pen, thing.name, COLORS[thing.color], round(x - side / 2),
                       round(y - side / 2), side)
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
    ImageDraw.Draw(picture).text((22, 9), word.upper(), fill=(0, 0, 0), font=font(11), anchor="mm",
                                 stroke_width=1, stroke_fill=(255, 255, 255))
    return picture


KNOWS = (
    "this is the embedded model, which knows drawn scenes of 96 x 96 pixels only (python toy.py show): "
    f"{', '.join(KINDS)}; coloured {', '.join(SHAPES)}; printed words. This picture is none: expect nonsense."
)


def knows(image: Image.Image) -> bool:
    """Whether a picture can be one of this world: its size, and one pale colour, the background, on
    much of it."""
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
        pen.polygon([(x + s / 2, y), (x + s, y + s / 2), (x + s / 2, y + s), (x, y + s / 2)],
                    **line)
