"""The canvas under every picture that is drawn here, by Pillow alone: the losses of a training
(training/curve.py), what a model looks at (viz/figures.py), the study's differences
(study/picture.py).

    colours   a colour map for values, hues for lines
    pieces    a picture of just the size it needs: text, and pieces in rows and columns. So nothing
              can overlap or be cut off
    sheets    a white picture to draw on, smoothly, in its own pixels; and axes, in those of data
"""
import math
from bisect import bisect_right
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

Colour = tuple[int, int, int]
Point = tuple[float, float]

GAP = 14                             # pixels between pieces
TEXT, SMALL = 15, 12                 # sizes of letters
INK, FAINT, PAPER = (30, 30, 34), (125, 125, 130), (255, 255, 255)


@lru_cache(maxsize=None)
def font(size: int) -> ImageFont.FreeTypeFont:
    """Pillow's own, so a picture looks the same everywhere. It knows ASCII and little more."""
    return ImageFont.load_default(size)


def number(x: float) -> str:
    """With three digits."""
    return f"{x:.3g}"


# --------------------------------------------------------------------------------------------------
# Colours

def oklch(lightness, chroma, hue) -> np.ndarray:
    """A colour of OKLab (Ottosson 2020), its hue in radians, as sRGB (..., 3) of 8 bits."""
    a = chroma * np.cos(hue)
    b = chroma * np.sin(hue)
    l = (lightness + 0.3963377774 * a + 0.2158037573 * b) ** 3
    m = (lightness - 0.1055613458 * a - 0.0638541728 * b) ** 3
    s = (lightness - 0.0894841775 * a - 1.2914855480 * b) ** 3
    red = 4.0767416621 * l - 3.3077115913 * m + 0.2309699292 * s
    green = -1.2684380046 * l + 2.6097574011 * m - 0.3413193965 * s
    blue = -0.0041960863 * l - 0.7034186147 * m + 1.7076147010 * s
    rgb = np.stack([red, green, blue], -1).clip(0, 1)                            # (..., 3) linear
    rgb = np.where(rgb <= 0.0031308, 12.92 * rgb, 1.055 * rgb ** (1 / 2.4) - 0.055)
    return (255 * rgb).round().astype(np.uint8)


def colour_map(n: int = 256) -> np.ndarray:
    """(n, 3) uint8, from dark blue by red to pale yellow. Lightness rises evenly, so equal steps
    look equal, and a grey print has them still; the chroma stays inside sRGB all along."""
    t = np.linspace(0, 1, n)
    return oklch(0.2 + 0.75 * t, 0.11 + 0.05 * np.sin(np.pi * t), np.radians(280 + 185 * t))


COLOURS = colour_map()


def hues(n: int) -> list[Colour]:
    """n colours of one lightness, for lines."""
    turns = [math.radians(260 + 360 * i / n) for i in range(n)]
    return [tuple(oklch(0.55, 0.13, turn).tolist()) for turn in turns]


# --------------------------------------------------------------------------------------------------
# Pieces

def beside(*pieces: Image.Image, gap: int = GAP) -> Image.Image:
    """In a row, their tops in line."""
    width = sum(piece.width + gap for piece in pieces) - gap
    sheet = Image.new("RGB", (width, max(piece.height for piece in pieces)), PAPER)
    x = 0
    for piece in pieces:
        sheet.paste(piece, (x, 0))
        x += piece.width + gap
    return sheet


def below(*pieces: Image.Image, gap: int = GAP) -> Image.Image:
    """In a column, their left sides in line."""
    height = sum(piece.height + gap for piece in pieces) - gap
    sheet = Image.new("RGB", (max(piece.width for piece in pieces), height), PAPER)
    y = 0
    for piece in pieces:
        sheet.paste(piece, (0, y))
        y += piece.height + gap
    return sheet


def framed(piece: Image.Image) -> Image.Image:
    """With a margin of GAP."""
    sheet = Image.new("RGB", (piece.width + 2 * GAP, piece.height + 2 * GAP), PAPER)
    sheet.paste(piece, (GAP, GAP))
    return sheet


def titled(title: str, piece: Image.Image) -> Image.Image:
    """With its title above, on one line."""
    width = math.ceil(font(SMALL + 1).getlength(title))
    return below(text(title, max(piece.width, width), SMALL + 1), piece, gap=2)


def text(chunks: str | list[tuple[str, Colour | None]], width: int, size: int = TEXT,
         ink: Colour = INK) -> Image.Image:
    """Text in lines of a width: a string, or chunks [(string, colour of the ground or None)], each
    of which stays on one line if it can. What is too long for a line is broken anywhere."""
    if isinstance(chunks, str):
        chunks = [(word + " ", None) for word in chunks.split()]
    letters = font(size)
    height = round(1.5 * size)
    x, y = 0, 0
    placed = []
    for string, ground in chunks:
        string = string.replace("\n", " ")
        while string:
            if x and x + letters.getlength(string.rstrip()) > width:
                x, y = 0, y + height
                string = string.lstrip()
            part = string[:fitting(string, width, letters)]
            placed.append((x, y, part, ground))
            x += letters.getlength(part)
            string = string[len(part):]
    sheet = Image.new("RGB", (width, y + height), PAPER)
    pen = ImageDraw.Draw(sheet)
    for x, y, part, ground in placed:
        if ground is not None:
            pen.rectangle([x, y, x + letters.getlength(part) - 1, y + height - 2], fill=ground)
        pen.text((x, y + height / 2), part, fill=ink, font=letters, anchor="lm")
    return sheet


def fitting(string: str, width: int, letters: ImageFont.FreeTypeFont) -> int:
    """How many of a string's characters fit a line; one at least."""
    def length(n: int) -> float:
        return letters.getlength(string[:n].rstrip())

    return max(1, bisect_right(range(1, len(string) + 1), width, key=length))


# --------------------------------------------------------------------------------------------------
# Sheets

class Sheet:
    """A white picture, drawn on in its own pixels. It is drawn `fine` times as large, and `reduce`
    makes it as large as it should be: that smooths all lines. What is drawn later is sharp."""

    def __init__(self, width: int, height: int, fine: int = 2):
        self.width, self.height, self.fine = width, height, fine
        self.image = Image.new("RGB", (width * fine, height * fine), PAPER)
        self.pen = ImageDraw.Draw(self.image)

    def reduce(self) -> Image.Image:
        """The picture, in its size."""
        self.image = self.image.resize((self.width, self.height), Image.Resampling.LANCZOS)
        self.pen = ImageDraw.Draw(self.image)
        self.fine = 1
        return self.image

    def line(self, points: list[Point], colour: Colour, width: float = 1) -> None:
        """Straight from point to point."""
        self.pen.line([(self.fine * x, self.fine * y) for x, y in points], fill=colour,
                      width=round(self.fine * width), joint="curve")

    def dashes(self, points: list[Point], colour: Colour, width: float = 1) -> None:
        """Like `line`, but only every other 4 pixels of each piece."""
        for (x0, y0), (x1, y1) in zip(points, points[1:]):
            n = max(1, round(math.hypot(x1 - x0, y1 - y0) / 4))
            for i in range(0, n, 2):
                dash = [(x0 + (x1 - x0) * t, y0 + (y1 - y0) * t) for t in (i / n, (i + 1) / n)]
                self.line(dash, colour, width)

    def dot(self, at: Point, radius: float, colour: Colour, rim: Colour | None = None) -> None:
        """rim: the colour of a ring of 2 pixels inside of it."""
        x, y = at
        edges = [x - radius, y - radius, x + radius, y + radius]
        self.pen.ellipse([self.fine * edge for edge in edges], colour, rim, 2 * self.fine)

    def polygon(self, corners: list[Point], colour: Colour) -> None:
        self.pen.polygon([(self.fine * x, self.fine * y) for x, y in corners], colour)

    def write(self, at: Point, string: str, anchor: str, colour: Colour = INK,
              size: int = SMALL) -> None:
        """anchor: which point of the text is there, in Pillow's two letters."""
        x, y = at
        self.pen.text((self.fine * x, self.fine * y), string, fill=colour,
                      font=font(self.fine * size), anchor=anchor)


class Axes(Sheet):
    """A sheet with axes: x and y are the (lowest, highest) values of data, `place` says where they
    are. margins: pixels to the left of the axes, above, to the right, and below."""

    def __init__(self, width: int, height: int, margins: tuple[int, int, int, int],
                 x: tuple[float, float], y: tuple[float, float], fine: int = 2):
        super().__init__(width, height, fine)
        self.left, self.top = margins[:2]
        self.right = width - margins[2]
        self.bottom = height - margins[3]
        self.x, self.y = x, y

    def place(self, x: float, y: float) -> Point:
        """Pixels of a point of data."""
        across = (self.right - self.left) * (x - self.x[0]) / (self.x[1] - self.x[0])
        up = (self.bottom - self.top) * (y - self.y[0]) / (self.y[1] - self.y[0])
        return self.left + across, self.bottom - up

    def frame(self, colour: Colour, away: int = 0) -> None:
        """Both axes as lines, some pixels away from where data are."""
        left, bottom = self.left - away, self.bottom + away
        self.line([(left, self.top), (left, bottom), (self.right, bottom)], colour)

    def label_x(self, x: float, string: str, colour: Colour = INK, size: int = SMALL) -> None:
        self.write((self.place(x, self.y[0])[0], self.bottom + 8), string, "mt", colour, size)

    def label_y(self, y: float, string: str, colour: Colour = INK, size: int = SMALL) -> None:
        self.write((self.left - 8, self.place(self.x[0], y)[1]), string, "rm", colour, size)
