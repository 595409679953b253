"""The toy world: little pictures of a few things each.

Nobody can rent eight A100s to find out whether a line of code is right, so this repository carries
a world in which the whole recipe of the paper runs for real on a laptop: (a) a small CLIP learns
from captions, (b) a small Llama learns from text alone, both in toy/towers.py and both saved in the
public Hugging Face layout, and from there on nothing is special: train.py loads them with the code
that loads openai/clip-vit-large-patch14-336 and Vicuna, and runs stage 1 and stage 2.

A scene has nine places. Some hold emoji objects (40 kinds in 4 categories, with 8 pairs of
look-alikes), one may hold a coloured shape, one a printed word. Things differ in size, are turned,
shifted, overlap and lie on clutter. A scene is a pure function of a string, its key, such as
"train2/17": no picture is stored, and training and held-out scenes differ in that string. Training
never shows certain pairs of kinds together: the exam does (toy/exam.py).

Draws from `random` in another order make another world, in which the bundled model knows nothing.
"""
import random
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw

from core.canvas import font
from core.common import ROOT

SCENE = "test/207"               # the scene that the README asks about
ASSETS = ROOT / "assets"
MODEL = ASSETS / "toy"           # the bundled model
OUT = Path("out/toy")            # where retraining works

SIZE = 96                        # pixels: a picture is SIZE x SIZE
CELL = 32                        # pixels: its 3 x 3 places
PATCH = 12                       # pixels: its CLIP's 8 x 8 patches
CATEGORIES = {
    "animal": ["cat", "dog", "cow", "pig", "frog", "owl", "crab", "bee", "tiger", "wolf"],
    "food": ["apple", "banana", "lemon", "carrot", "pizza", "egg", "cake", "donut", "tomato",
             "peach"],
    "vehicle": ["car", "bus", "train", "boat", "rocket", "bicycle", "plane", "tractor", "taxi",
                "tram"],
    "tool": ["hammer", "wrench", "axe", "saw", "key", "pencil", "magnet", "ladder", "pick",
             "brush"],
}
KINDS = [kind for kinds in CATEGORIES.values() for kind in kinds]
CATEGORY = {kind: category for category, kinds in CATEGORIES.items() for kind in kinds}
ALIKE = [("cat", "tiger"), ("dog", "wolf"), ("apple", "tomato"), ("lemon", "peach"),
         ("car", "taxi"), ("bus", "tram"), ("hammer", "pick"), ("pencil", "brush")]
LOOKALIKE = dict(ALIKE) | {b: a for a, b in ALIKE}
PAIRS = list(combinations(KINDS, 2))                                                   # 780
HELD_OUT = {frozenset(pair) for pair in random.Random("pairs").sample(PAIRS, 60)}
COLORS = {
    "red": (214, 39, 40), "green": (44, 160, 44), "blue": (31, 80, 200), "yellow": (245, 215, 40),
    "orange": (255, 127, 14), "purple": (128, 50, 160), "black": (20, 20, 20),
    "white": (255, 255, 255),
}
SHAPES = ["square", "circle", "triangle", "diamond"]
WORDS = ["sun", "moon", "tea", "ink", "jam", "fog", "oak", "zip", "map", "ice", "gold", "wind",
         "rain", "lake", "song", "milk", "coin", "rope", "door", "leaf", "nest", "salt", "wool",
         "yard"]
PLACES = ["top left", "top", "top right", "left", "middle", "right", "bottom left", "bottom",
          "bottom right"]


# --------------------------------------------------------------------------------------------------
# Scenes

@dataclass
class Thing:
    """What one place holds."""
    what: str              # "object", "shape" or "word"
    name: str              # a kind, a shape or a word
    cell: int              # its place, 0..8, row by row
    color: str = ""        # of a shape

    def text(self) -> str:
        """What it is called: "cat", "red square", "word sun"."""
        if self.what == "shape":
            return f"{self.color} {self.name}"
        return f"word {self.name}" if self.what == "word" else self.name


@dataclass
class Scene:
    """Some things, and the string that everything random about this scene comes from."""
    key: str
    things: list[Thing]

    def objects(self) -> list[str]:
        """The kinds of its objects, one for each object."""
        return [thing.name for thing in self.things if thing.what == "object"]


def held_out(names: Iterable[str]) -> bool:
    """Whether two of these kinds are a pair that training never shows together."""
    return any(frozenset(pair) in HELD_OUT for pair in combinations(set(names), 2))


def make_scene(key: str, limit: int = 8, new_pair: bool = False) -> Scene:
    """The scene of a key: 1 to 6 objects of 1 to 3 kinds, a shape (70%) and a word (50%), each in
    its own place.

    limit: keep so many things at most (training begins with small scenes). new_pair: with a
    held-out pair of kinds, for the exam; all other scenes have none.
    """
    rng = random.Random("scene/" + key)
    cells = rng.sample(range(9), 9)
    wanted = rng.choice([2, 2, 3]) if new_pair else rng.choice([1, 2, 2, 3, 3])
    kinds = rng.sample(KINDS, wanted)
    while held_out(kinds) != new_pair:
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


# --------------------------------------------------------------------------------------------------
# Pictures

class Drawn(NamedTuple):
    """Where and how a thing is drawn, in pixels: its middle, its side, and how far it is turned."""
    thing: Thing
    x: float
    y: float
    side: int
    degrees: float


def layout(scene: Scene) -> list[Drawn]:
    """How each thing of a scene is drawn, the large ones first, so that what overlaps never hides a
    small thing. A middle stays inside its place, by 10 pixels or more."""
    rng = random.Random("draw/" + scene.key)

    def near(middle: float, free: float) -> float:
        return min(max(middle + rng.uniform(-free, free), 13), SIZE - 13)

    rows = []
    for thing in scene.things:
        row, column = divmod(thing.cell, 3)
        largest, turned = (34, 35) if thing.what == "object" else (30, 10)
        free = 3 if thing.what == "word" else 6
        side = rng.randint(18, largest)
        x = near(CELL * column + CELL / 2, free)
        y = near(CELL * row + CELL / 2, free)
        rows.append(Drawn(thing, x, y, side, rng.uniform(-turned, turned)))
    return sorted(rows, key=lambda row: (row.thing.what == "word", -row.side))


def box(thing: Thing, x: float, y: float, side: float) -> tuple[float, float, float, float]:
    """(left, top, right, bottom) of a thing that is drawn so, in pixels; of its upright outline."""
    half_width, half_height = (20, 7) if thing.what == "word" else (side / 2, side / 2)
    return x - half_width, y - half_height, x + half_width, y + half_height


def draw(scene: Scene) -> Image.Image:
    """The scene's picture: RGB, SIZE x SIZE. Objects are 18 to 34 pixels wide. 0.5 ms."""
    image = background(random.Random("background/" + scene.key))
    for thing, x, y, side, degrees in layout(scene):
        if thing.what == "object":
            paste(image, emoji(thing.name, side), x, y, degrees)
        elif thing.what == "word":
            paste(image, printed(thing.name), x, y, degrees)
        else:
            corner = round(x - side / 2), round(y - side / 2)
            draw_shape(ImageDraw.Draw(image), thing.name, COLORS[thing.color], *corner, side)
    return image


def background(rng: random.Random) -> Image.Image:
    """A pale ground with clutter on it: strokes, rings and dots in tints of the ground."""
    ground = [rng.randint(190, 245) for _ in range(3)]
    image = Image.new("RGB", (SIZE, SIZE), tuple(ground))
    pen = ImageDraw.Draw(image)
    for _ in range(rng.randint(4, 14)):
        tint = tuple(max(0, c + rng.randint(-70, 10)) for c in ground)
        x, y, w, h = (rng.randint(0, SIZE) for _ in range(4))
        if rng.random() < 0.5:
            pen.line([x, y, x + w // 3 - 16, y + h // 3 - 16], fill=tint, width=rng.randint(1, 3))
        else:
            r = 1 + w // 10
            pen.ellipse([x - r, y - r, x + r, y + r], outline=tint, fill=tint if r < 4 else None)
    return image


@lru_cache(maxsize=None)
def emoji(kind: str, side: int = 48) -> Image.Image:
    """An object's picture: RGBA, side x side."""
    picture = Image.open(ASSETS / "emoji" / f"{kind}.png").convert("RGBA")
    return picture.resize((side, side), Image.LANCZOS)


@lru_cache(maxsize=None)
def printed(word: str) -> Image.Image:
    """A word's picture: RGBA, black with a white rim, so that it can be read on anything."""
    picture = Image.new("RGBA", (44, 18))
    ImageDraw.Draw(picture).text((22, 9), word.upper(), fill=(0, 0, 0), font=font(11), anchor="mm",
                                 stroke_width=1, stroke_fill=(255, 255, 255))
    return picture


def paste(image: Image.Image, picture: Image.Image, x: float, y: float, degrees: float) -> None:
    """Put an RGBA picture onto another one, its middle at (x, y), turned."""
    picture = picture.rotate(degrees, Image.BICUBIC, expand=True)
    image.paste(picture, (round(x - picture.width / 2), round(y - picture.height / 2)), picture)


def draw_shape(pen: ImageDraw.ImageDraw, shape: str, color: tuple, x: int, y: int, s: int) -> None:
    """Draw a shape of side s whose top left corner is (x, y)."""
    line = dict(fill=color, outline=(60, 60, 60))
    if shape == "square":
        pen.rectangle([x, y, x + s, y + s], **line)
    elif shape == "circle":
        pen.ellipse([x, y, x + s, y + s], **line)
    elif shape == "triangle":
        pen.polygon([(x, y + s), (x + s, y + s), (x + s / 2, y)], **line)
    else:
        corners = [(x + s / 2, y), (x + s, y + s / 2), (x + s / 2, y + s), (x, y + s / 2)]
        pen.polygon(corners, **line)


# --------------------------------------------------------------------------------------------------
# What the bundled model can be asked about

KNOWS = (f"this is the bundled model, which knows drawn scenes of {SIZE} x {SIZE} pixels only "
         f"(python -m toy show): {', '.join(KINDS)}; coloured {', '.join(SHAPES)}; printed words. "
         "This picture is none: expect nonsense.")


def knows(image: Image.Image) -> bool:
    """Whether a picture can be one of this world: its size, and one pale colour, the background, on
    much of it."""
    if image.size != (SIZE, SIZE):
        return False
    often, color = max(image.getcolors(SIZE * SIZE))
    return often > SIZE * SIZE / 10 and all(190 <= c <= 245 for c in color)
