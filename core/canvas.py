"""TODO core/canvas.py"""
import math
from bisect import bisect_right
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont


@lru_cache(maxsize=None)
def font(size: int):
    return ImageFont.load_default(size)  # comes with Pillow, so a picture looks the same everywhere


# --------------------------------------------------------------------------------------------------
# Colours


def oklch(L, C, h) -> np.ndarray:
    """Lightness, chroma and hue (radians) in OKLab (Ottosson 2020) -> sRGB (..., 3) of 8 bits."""
    a, b = C * np.cos(h), C * np.sin(h)
    l, m, s = (np.asarray(L + p * a + q * b)**3
               for p, q in ((0.3963377774, 0.2158037573), (-0.1055613458, -0.0638541728),
                            (-0.0894841775, -1.2914855480)))
    rgb = np.stack([4.0767416621 * l - 3.3077115913 * m + 0.2309699292 * s,
                    -1.2684380046 * l + 2.6097574011 * m - 0.3413193965 * s,
                    -0.0041960863 * l - 0.7034186147 * m + 1.7076147010 * s], -1).clip(0, 1)
    rgb = np.where(rgb <= 0.0031308, 12.92 * rgb, 1.055 * rgb ** (1 / 2.4) - 0.055)
    return (255 * rgb).round().astype(np.uint8)


def colour_map(n: int = 256) -> np.ndarray:
    """(n, 3) uint8, from dark blue by red to pale yellow. Lightness rises evenly, so equal steps
    look equal, and a grey print has them still; the chroma stays inside sRGB all along."""
    t = np.linspace(0, 1, n)
    return oklch(0.2 + 0.75 * t, 0.11 + 0.05 * np.sin(np.pi * t), np.radians(280 + 185 * t))


COLOURS = colour_map()
HEAT = 0.62                # how much of the map's colour covers the picture, which is grey below it


def hues(n: int) -> list:
    """n colours of one lightness, for lines."""
    return [tuple(map(int, oklch(0.55, 0.13, math.radians(260 + 360 * i / n)))) for i in range(n)]


# --------------------------------------------------------------------------------------------------
# Pictures. Every piece is a picture of the size it needs, put into rows and columns: nothing can
# overlap or be cut off.

TILE, GAP, TEXT, SMALL = 224, 14, 15, 12
INK, FAINT, PAPER = (30, 30, 34), (125, 125, 130), (255, 255, 255)


def stack(images, down: bool, gap: int):
    ends = [
        sum((i.height if down else i.width) + gap for i in images[:n])
        for n in range(len(images) + 1)]
    widest = max(i.width if down else i.height for i in images)
    sheet = Image.new("RGB", (widest, ends[-1] - gap) if down else (ends[-1] - gap, widest), PAPER)
    for image, at in zip(images, ends):
        sheet.paste(image, (0, at) if down else (at, 0))
    return sheet


def beside(*images, gap=GAP):
    """In a row, their tops in line."""
    return stack(images, False, gap)


def below(*images, gap=GAP):
    """In a column, their left sides in line."""
    return stack(images, True, gap)


def framed(image):
    sheet = Image.new("RGB", (image.width + 2 * GAP, image.height + 2 * GAP), PAPER)
    sheet.paste(image, (GAP, GAP))
    return sheet


def text(chunks, width: int, size=TEXT, ink=INK) -> Image.Image:
    """Chunks of text, [(string, colour of the ground or None)], set in lines of a width. A string
    is one plain chunk for each of its words. What is too long for a line is broken anywhere.
    Pillow's own font knows ASCII and little more (the explorer shows any text)."""
    if isinstance(chunks, str):
        chunks = [(word + " ", None) for word in chunks.split()]
    letters, height, x, y, placed = font(size), round(1.5 * size), 0, 0, []
    for string, ground in chunks:
        string = string.replace("\n", " ")
        while string:
            if x and x + letters.getlength(string.rstrip()) > width:
                x, y, string = 0, y + height, string.lstrip()
            n = bisect_right(range(1,
                                   len(string) + 1), width,
                             key=lambda n: letters.getlength(string[:n].rstrip()))
            n = max(1, n)
            placed.append((x, y, string[:n], ground))
            x, string = x + letters.getlength(string[:n]), string[n:]
    sheet = Image.new("RGB", (width, y + height), PAPER)
    pen = ImageDraw.Draw(sheet)
    for x, y, string, ground in placed:
        if ground is not None:
            pen.rectangle([x, y, x + letters.getlength(string) - 1, y + height - 2], fill=ground)
        pen.text((x, y + height / 2), string, fill=ink, font=letters, anchor="lm")
    return sheet


def number(x: float) -> str:
    return f"{x:.3g}"


def tile(title: str, image: Image.Image) -> Image.Image:
    """With its title above, on one line."""
    width = math.ceil(font(SMALL + 1).getlength(title))
    return below(text(title, max(image.width, width), SMALL + 1), image, gap=2)
