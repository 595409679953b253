"""What the model looks at, drawn: the paper's Figures 2, 3, 4 and 6.

    python sample.py --image x.png --q "Where is the cat?" --heatmap out.png

Everything here takes a Sight of maps.py. Maps are drawn patch by patch, as they are, and lie where
the model saw the picture.
"""
import math

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from core.canvas import (
    COLOURS,
    FAINT,
    INK,
    PAPER,
    SMALL,
    TEXT,
    Axes,
    Colour,
    below,
    beside,
    font,
    framed,
    hues,
    number,
    text,
    titled,
)
from core.common import UserError
from viz.maps import Sight
from viz.pointing import depth

TILE = 224               # pixels: the longer side of a picture
HEAT = 0.62              # how much of the map's colour covers the picture, which is grey below it
MARK = 22, 4             # a line in a legend
RULE = (205, 205, 210)


# --------------------------------------------------------------------------------------------------
# One map

def tile_size(sight: Sight) -> tuple[int, int]:
    """Width and height at which a picture is drawn."""
    width, height = sight.image.size
    scale = TILE / max(width, height)
    return max(1, round(scale * width)), max(1, round(scale * height))


def photo(sight: Sight) -> Image.Image:
    """The picture itself."""
    image = sight.image.resize(tile_size(sight), Image.Resampling.LANCZOS)
    return titled("picture", image)


def inside(sight: Sight, values: Tensor) -> Tensor:
    """The values of a map (N) that lie on the picture, not on its padding alone."""
    left, top, right, bottom = (side * sight.grid for side in sight.box)
    square = values.view(sight.grid, sight.grid)
    return square[int(top):math.ceil(bottom), int(left):math.ceil(right)].flatten()


def overlay(sight: Sight, values: Tensor, lo: float, hi: float,
            size: tuple[int, int]) -> Image.Image:
    """A map (N) over the picture in grey, at a size in pixels: every pixel takes the colour of the
    patch it lies in."""
    width, height = size
    left, top, right, bottom = sight.box
    level = ((values - lo) / ((hi - lo) or 1)).clamp(0, 1)                          # (N)
    levels = (255 * level.view(sight.grid, sight.grid).numpy()).round().astype(int)
    column = (left + (np.arange(width) + 0.5) / width * (right - left)) * sight.grid      # (w)
    row = (top + (np.arange(height) + 0.5) / height * (bottom - top)) * sight.grid        # (h)
    heat = COLOURS[levels][row.astype(int)][:, column.astype(int)]                  # (h, w, 3)
    grey = sight.image.convert("L").resize(size, Image.Resampling.LANCZOS)
    # of little contrast, so that it doesn't pass for map
    grey = grey.point(lambda v: 80 + v * 0.4).convert("RGB")
    return Image.blend(grey, Image.fromarray(heat), HEAT)


def colour_bar(lo: float, hi: float, height: int) -> Image.Image:
    """What the colours mean, from lo (below) to hi, as they look over a middle grey."""
    height = max(height, 4 * SMALL)
    marks = [(hi, 0, "lt"), ((lo + hi) / 2, height / 2, "lm"), (lo, height - 1, "lb")]
    letters = font(SMALL)
    widest = max(letters.getlength(number(value)) for value, _, _ in marks)
    sheet = Image.new("RGB", (16 + 6 + round(widest) + 8, height), PAPER)
    ramp = COLOURS[np.linspace(255, 0, height).round().astype(int)]                 # (h, 3)
    ramp = Image.fromarray(ramp[:, None].repeat(16, 1))
    sheet.paste(Image.blend(Image.new("RGB", ramp.size, (128, 128, 128)), ramp, HEAT), (0, 0))
    pen = ImageDraw.Draw(sheet)
    for value, y, anchor in marks:
        pen.text((22, y), number(value), fill=INK, font=letters, anchor=anchor)
    return sheet


def strip(sight: Sight, maps: dict[str, Tensor]) -> Image.Image:
    """Some maps of one scale, {title: (N)}, side by side with their colour bar."""
    size = tile_size(sight)
    seen = torch.stack([inside(sight, values) for values in maps.values()])
    lo, hi = seen.min().item(), seen.max().item()
    tiles = [titled(title, overlay(sight, values, lo, hi, size)) for title, values in maps.items()]
    head = Image.new("RGB", (1, tiles[0].height - size[1]), PAPER)
    return beside(*tiles, below(head, colour_bar(lo, hi, size[1]), gap=0))


# --------------------------------------------------------------------------------------------------
# Curves, words

def curves(lines: list[tuple[Tensor, Colour, bool]], width: int, height: int) -> Image.Image:
    """Curves over the layers: lines [(values (L), colour, dashed)]; a thin line stands at 1/L,
    where all layers are equal."""
    L = len(lines[0][0])
    flat = [float(v) for values, _, _ in lines for v in values] + [1 / L]
    lo, hi = min(flat), max(flat)
    room = 0.06 * (hi - lo or hi)
    lo -= room
    hi += room
    ticks = [lo + (hi - lo) * share for share in (0.05, 0.5, 0.95)]
    widest = max(font(SMALL).getlength(number(tick)) for tick in ticks)
    margins = round(widest) + 10, 6, 10, 38
    axes = Axes(width, height, margins, (0, max(1, L - 1)), (lo, hi), fine=4)
    axes.line([axes.place(0, 1 / L), axes.place(L - 1, 1 / L)], RULE)
    for values, colour, dashed in lines:
        points = [axes.place(l, float(v)) for l, v in enumerate(values)]
        if dashed:
            axes.dashes(points, colour, 1.3)
            continue
        axes.line(points, colour, 2.2)
        for point in points:
            axes.dot(point, 3, colour)
    axes.reduce()
    axes.frame(FAINT, away=4)
    for tick in ticks:
        axes.label_y(tick, number(tick))
    for l in range(0, L, math.ceil(L * 20 / (axes.right - axes.left))):
        axes.label_x(l, str(l + 1))
    axes.write(((axes.left + axes.right) / 2, height - 2), "layer", "mb", FAINT)
    return axes.image


def words(sight: Sight) -> list[tuple[str, Colour | None]]:
    """The question's tokens on grounds that tell their alpha; paper for 0."""
    if "alpha" not in sight.maps:
        return [(word, None) for word in sight.words]
    alpha = sight.maps["alpha"]                                                     # (T)
    share = (alpha / alpha.max().clamp(min=1e-9)).numpy()[:, None]                  # (T, 1)
    grounds = 255 + (COLOURS[150].astype(float) - 255) * share                      # (T, 3)
    grounds = [tuple(ground) for ground in grounds.astype(int).tolist()]
    return list(zip(sight.words, grounds))


def blocks(sight: Sight) -> str:
    """The blocks of the language model that were watched, in words."""
    first, last = sight.layers[0], sight.layers[-1]
    which = f"block {first}" if first == last else f"blocks {first} to {last}"
    return f"language model, {which}"


def said(sight: Sight) -> str:
    """The answer."""
    return "".join(sight.tokens)


# --------------------------------------------------------------------------------------------------
# The figures

def chosen(sight: Sight, layers: list[int] | None) -> list[int]:
    """The layers to draw, counted from 1; without a choice the paper's, half, three quarters and
    all of the depth. UserError for one that there isn't."""
    L = len(sight.maps["w_hat"])
    if layers is None:
        layers = sorted({max(1, L // 2), max(1, 3 * L // 4), L})
    if bad := [layer for layer in layers if not 1 <= layer <= L]:
        raise UserError(f"there is no layer {bad[0]}; the vision tower has layers 1 to {L}")
    return layers


def figure3(sight: Sight, layers: list[int] | None = None) -> Image.Image:
    """Figure 3, and Figure 2's map, of one question. layers: those of the vision tower to draw,
    counted from 1."""
    attention = strip(sight, {blocks(sight): sight.looked()})
    scale = []
    if "w_hat" in sight.maps:
        least, most = (number(x) for x in torch.aminmax(sight.maps["alpha"]))
        note = f"alpha of the words: {least} to {most}; the redder, the higher"
        scale = [text(note, 2 * TILE, SMALL, FAINT)]
        body = three_maps(sight, chosen(sight, layers), attention)
    else:
        body = beside(photo(sight), attention)
    question = text(words(sight), body.width, TEXT + 3)
    answer = text(f"answer: {said(sight)}", body.width)
    return framed(below(question, *scale, answer, body, gap=8))


def three_maps(sight: Sight, layers: list[int], attention: Image.Image) -> Image.Image:
    """LPWCA's, LWCA's and PWCA's maps, one below the other."""
    maps = sight.maps
    (blue,) = hues(1)
    lines = [(maps["w_l"].softmax(-1), FAINT, True), (maps["w_hat"], blue, False)]
    curve = curves(lines, TILE, max(tile_size(sight)[1], 150))
    lpwca = strip(sight, {f"LPWCA, layer {l}": maps["W_lp"][l - 1] for l in layers})
    lwca = strip(sight, {f"LWCA, layer {l}": maps["layer_map"][l - 1] for l in layers})
    return below(beside(photo(sight), lpwca),
                 beside(titled("LWCA: smoothed, and raw (dashed)", curve), lwca),
                 beside(strip(sight, {"PWCA": maps["w_p"]}), attention))


def figure4(sights: list[Sight]) -> Image.Image:
    """Figure 4: LWCA's weights for several questions about one picture; dashed, before they are
    smoothed. UserError for a model without such weights."""
    if "w_hat" not in sights[0].maps:
        raise UserError(
            "this model's fuser doesn't weigh layers, so it has no curves; ask one question")
    lines, legend = [], []
    for sight, colour in zip(sights, hues(len(sights))):
        w_hat = sight.maps["w_hat"]
        lines += [(sight.maps["w_l"].softmax(-1), colour, True), (w_hat, colour, False)]
        label = f"{sight.question} {said(sight)} (mean depth {depth(w_hat):.2f})"
        mark = below(Image.new("RGB", (1, 9), PAPER), Image.new("RGB", MARK, colour), gap=0)
        legend.append(beside(mark, text(label, 2 * TILE, SMALL + 1), gap=8))
    title = "LWCA: weights of the layers, smoothed, and raw (dashed)"
    drawn = titled(title, curves(lines, 2 * TILE + 30, 260))
    return framed(beside(photo(sights[0]), below(drawn, below(*legend, gap=2))))


def side_by_side(rows: list[list[Sight]]) -> Image.Image:
    """Figures 2 and 6: a row for each question, in it a Sight of each model: where its language
    model looked."""
    sheet = []
    for row in rows:
        shown = [photo(row[0])]
        for sight in row:
            answer = text(f"{sight.name}: {said(sight)}", TILE, SMALL + 1)
            shown.append(below(strip(sight, {blocks(sight): sight.looked()}), answer, gap=6))
        body = beside(*shown)
        sheet.append(below(text(row[0].question, body.width, TEXT + 1), body, gap=6))
    return framed(below(*sheet))
