"""Draw what the model looks at: the paper's Figures 2, 3, 4 and 6 as PNG, and an explorer in one HTML file.

    python sample.py --image x.png --q "Where is the cat?" --heatmap out.png --html out.html

Everything here takes a Sight of look.py. Maps are drawn patch by patch, as they are, and lie where the model saw the
picture; Pillow does all of it.
"""
import math

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from core import canvas
from core.canvas import (
    COLOURS,
    FAINT,
    HEAT,
    INK,
    PAPER,
    SMALL,
    TEXT,
    TILE,
    below,
    beside,
    framed,
    hues,
    number,
    text,
    tile,
)
from core.common import UserError
from viz.maps import Sight
from viz.pointing import depth


def tile_size(sight: Sight):
    scale = TILE / max(sight.image.size)
    return tuple(max(1, round(scale * side)) for side in sight.image.size)


def overlay(sight: Sight, values: Tensor, lo: float, hi: float, size) -> Image.Image:
    """A map (N) over the picture in grey, at a size in pixels: every pixel takes the colour of the patch it lies in."""
    level = ((values - lo) / ((hi - lo) or 1)).clamp(0, 1).view(sight.grid, sight.grid).numpy()
    left, top, right, bottom = sight.box
    column = (left + (np.arange(size[0]) + 0.5) / size[0] * (right - left)) * sight.grid         # (w)
    row = (top + (np.arange(size[1]) + 0.5) / size[1] * (bottom - top)) * sight.grid             # (h)
    heat = COLOURS[(255 * level).round().astype(int)][row.astype(int)][:, column.astype(int)]    # (h, w, 3)
    grey = sight.image.convert("L").resize(size, Image.Resampling.LANCZOS)
    grey = grey.point(lambda v: 80 + v * 0.4).convert("RGB")       # of little contrast, so that it doesn't pass for map
    return Image.blend(grey, Image.fromarray(heat), HEAT)


def blocks(sight: Sight) -> str:
    first, last = sight.layers[0], sight.layers[-1]
    return f"language model, block {first}" if first == last else f"language model, blocks {first} to {last}"


def colour_bar(lo: float, hi: float, height: int) -> Image.Image:
    """What the colours mean, from lo (below) to hi, as they look over a middle grey."""
    height, letters = max(height, 4 * SMALL), canvas.font(SMALL)
    sheet = Image.new("RGB", (16 + 6 + round(max(letters.getlength(number(v)) for v in (lo, (lo + hi) / 2, hi))) + 8,
                              height), PAPER)
    ramp = COLOURS[np.linspace(255, 0, height).round().astype(int)][:, None].repeat(16, 1)       # (height, 16, 3)
    sheet.paste(Image.blend(Image.new("RGB", (16, height), (128, 128, 128)), Image.fromarray(ramp), HEAT), (0, 0))
    pen = ImageDraw.Draw(sheet)
    for value, y, anchor in ((hi, 0, "lt"), ((lo + hi) / 2, height / 2, "lm"), (lo, height - 1, "lb")):
        pen.text((22, y), number(value), fill=INK, font=letters, anchor=anchor)
    return sheet


def strip(sight: Sight, maps: dict) -> Image.Image:
    """Some maps of one scale, {title: (N)}, side by side with their colour bar."""
    size = tile_size(sight)
    seen = torch.stack([inside(sight, values) for values in maps.values()])
    lo, hi = seen.min().item(), seen.max().item()
    tiles = [tile(title, overlay(sight, values, lo, hi, size)) for title, values in maps.items()]
    head = tiles[0].height - size[1]
    bar = colour_bar(lo, hi, size[1])
    return beside(*tiles, below(Image.new("RGB", (1, head), PAPER), bar, gap=0))


def inside(sight: Sight, values: Tensor) -> Tensor:
    """The values of a map (N) that lie on the picture, not on its padding alone."""
    left, top, right, bottom = (side * sight.grid for side in sight.box)
    rows, columns = slice(int(top), math.ceil(bottom)), slice(int(left), math.ceil(right))
    return values.view(sight.grid, sight.grid)[rows, columns].flatten()


def plot(lines, size) -> Image.Image:
    """Curves over the layers: lines [(values (L), colour, dashed)]; a thin line stands at 1/L, where all are equal."""
    (w, h), L, letters = size, len(lines[0][0]), canvas.font(SMALL)
    flat = [float(v) for values, _, _ in lines for v in values] + [1 / L]
    lo, hi = min(flat), max(flat)
    lo, hi = lo - 0.06 * (hi - lo or lo), hi + 0.06 * (hi - lo or hi)
    ticks = [lo + (hi - lo) * share for share in (0.05, 0.5, 0.95)]
    left, right, top, bottom = round(max(letters.getlength(number(t)) for t in ticks)) + 10, 10, 6, 38

    def place(l, v):
        return left + (w - left - right) * l / max(1, L - 1), h - bottom - (h - top - bottom) * (v - lo) / (hi - lo)

    fine = 4                                   # drawn so much larger, for smooth lines
    sheet = Image.new("RGB", (w * fine, h * fine), PAPER)
    pen = ImageDraw.Draw(sheet)

    def line(points, colour, width, dash=False):
        """Straight pieces through points; dashed: every other 4 pixels."""
        for (x0, y0), (x1, y1) in zip(points, points[1:]):
            n = max(1, round(math.hypot(x1 - x0, y1 - y0) / 4)) if dash else 1
            for i in range(0, n, 2):
                pen.line([(fine * (x0 + (x1 - x0) * t), fine * (y0 + (y1 - y0) * t)) for t in (i / n, (i + 1) / n)],
                         fill=colour, width=round(fine * width))

    line([place(0, 1 / L), place(L - 1, 1 / L)], (205, 205, 210), 1)
    for values, colour, dashed in lines:
        points = [place(l, float(v)) for l, v in enumerate(values)]
        line(points, colour, 1.3 if dashed else 2.2, dashed)
        for x, y in [] if dashed else points:
            pen.ellipse([fine * (x - 3), fine * (y - 3), fine * (x + 3), fine * (y + 3)], fill=colour)
    sheet = sheet.resize(size, Image.Resampling.LANCZOS)
    pen = ImageDraw.Draw(sheet)
    pen.line([left - 4, top, left - 4, h - bottom + 4, w - right, h - bottom + 4], fill=FAINT)
    for tick in ticks:
        pen.text((left - 8, place(0, tick)[1]), number(tick), fill=INK, font=letters, anchor="rm")
    for l in range(0, L, math.ceil(L * 20 / (w - left - right))):
        pen.text((place(l, lo)[0], h - bottom + 8), str(l + 1), fill=INK, font=letters, anchor="mt")
    pen.text(((left + w - right) / 2, h - 2), "layer", fill=FAINT, font=letters, anchor="mb")
    return sheet


def words(sight: Sight) -> list:
    """The question's tokens on grounds that tell their alpha; paper for 0."""
    if "alpha" not in sight.maps:
        return [(word, None) for word in sight.words]
    alpha, red = sight.maps["alpha"], COLOURS[150].astype(float)
    grounds = 255 + (red - 255) * (alpha / alpha.max().clamp(min=1e-9)).numpy()[:, None]         # (T, 3)
    return [(word, tuple(ground)) for word, ground in zip(sight.words, grounds.astype(int).tolist())]


def chosen(sight: Sight, layers) -> list:
    """The layers to draw, counted from 1; without a choice the paper's, half, three quarters and all of the depth."""
    L = len(sight.maps["w_hat"])
    layers = sorted({max(1, L // 2), max(1, 3 * L // 4), L}) if layers is None else layers
    if bad := [layer for layer in layers if not 1 <= layer <= L]:
        raise UserError(f"there is no layer {bad[0]}; the vision tower has layers 1 to {L}")
    return layers


def figure3(sight: Sight, layers=None) -> Image.Image:
    """Figure 3, and Figure 2's map, of one question. layers: those of the vision tower to draw, counted from 1."""
    maps, size = sight.maps, tile_size(sight)
    picture = tile("picture", sight.image.resize(size, Image.Resampling.LANCZOS))
    attention = strip(sight, {blocks(sight): sight.looked()})
    if "w_hat" not in maps:
        body, scale = beside(picture, attention), []
    else:
        least, most = map(number, torch.aminmax(maps["alpha"]))
        scale = [text(f"alpha of the words: {least} to {most}; the redder, the higher", TILE * 2, SMALL, FAINT)]
        layers, (blue,) = chosen(sight, layers), hues(1)
        curve = plot([(maps["w_l"].softmax(-1), FAINT, True), (maps["w_hat"], blue, False)], (TILE, max(size[1], 150)))
        body = below(
            beside(picture, strip(sight, {f"LPWCA, layer {l}": maps["W_lp"][l - 1] for l in layers})),
            beside(tile("LWCA: smoothed, and raw (dashed)", curve),
                   strip(sight, {f"LWCA, layer {l}": maps["layer_map"][l - 1] for l in layers})),
            beside(strip(sight, {"PWCA": maps["w_p"]}), attention))
    said = "answer: " + "".join(sight.tokens)
    return framed(below(text(words(sight), body.width, TEXT + 3), *scale, text(said, body.width), body, gap=8))


def figure4(sights: list) -> Image.Image:
    """Figure 4: LWCA's weights for several questions about one picture; dashed, before they are smoothed."""
    if "w_hat" not in sights[0].maps:
        raise UserError("this model's fuser doesn't weigh layers, so it has no curves; ask one question")
    colours, lines, legend = hues(len(sights)), [], []
    for sight, colour in zip(sights, colours):
        w_hat = sight.maps["w_hat"]
        lines += [(sight.maps["w_l"].softmax(-1), colour, True), (w_hat, colour, False)]
        mark = Image.new("RGB", (22, 4), colour)
        label = text(f"{sight.question} {''.join(sight.tokens)} (mean depth {depth(w_hat):.2f})", 2 * TILE, SMALL + 1)
        legend.append(beside(below(Image.new("RGB", (1, 9), PAPER), mark, gap=0), label, gap=8))
    picture = tile("picture", sights[0].image.resize(tile_size(sights[0]), Image.Resampling.LANCZOS))
    curves = tile("LWCA: weights of the layers, smoothed, and raw (dashed)", plot(lines, (2 * TILE + 30, 260)))
    return framed(beside(picture, below(curves, below(*legend, gap=2))))


def side_by_side(rows: list) -> Image.Image:
    """Figures 2 and 6: rows of Sights, a question each, one Sight for each model: where its language model looked."""
    sheet = []
    for row in rows:
        first = row[0]
        shown = [tile("picture", first.image.resize(tile_size(first), Image.Resampling.LANCZOS))]
        shown += [below(strip(sight, {blocks(sight): sight.looked()}),
                        text(f"{sight.name}: {''.join(sight.tokens)}", TILE, SMALL + 1), gap=6) for sight in row]
        body = beside(*shown)
        sheet.append(below(text(first.question, body.width, TEXT + 1), body, gap=6))
    return framed(below(*sheet))
