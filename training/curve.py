"""The losses of a training as a picture, by Pillow alone: a dot for each step, and a line through
their moving mean.

    python curve.py out/toy/stage2          reads log.csv there and draws loss.png beside it, as train.py does itself
"""
import argparse
import csv
import math
from collections.abc import Iterable, Iterator
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from core.common import UserError, run, write_beside

# pixels; drawn FINE times as large and then reduced, which smooths lines
WIDTH, HEIGHT, FINE = 900, 480, 2
LEFT, TOP, RIGHT, BOTTOM = 60, 40, 70, 50  # margins
GREY, PALE, DOT, LINE = (90, 90, 90), (228, 228, 228), (170, 195, 230), (31, 80, 160)


def smooth(values: Iterable[float], width: float) -> Iterator[float]:
    """The mean of each value and those before it, weighted by exp(-distance / width)."""
    total = weight = 0.0
    for value in values:
        total, weight = (math.exp(-1 / width) * x + more
                         for x, more in ((total, value), (weight, 1)))
        yield total / weight


def ticks(low: float, high: float, most: int = 10) -> list[float]:
    """At most `most` round numbers from low to high, 1, 2 or 5 times a power of ten apart."""
    rough = (high - low) / (most - 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(k * power for k in (1, 2, 5, 10) if k * power >= rough)
    return [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def plot(rows: list[tuple[int, float]], title: str) -> Image.Image:
    """rows: (step, loss), at least one. What isn't finite is left out; what is above the line's top
    is drawn there."""
    steps, losses = zip(*[row for row in rows if math.isfinite(row[1])] or [(rows[0][0], 0.0)])
    line = list(smooth(losses, max(1, len(steps) / 150)))
    low, high = min(losses), max(line)
    high += 0.05 * (high - low) or 1
    x = lambda step: FINE * (LEFT + (WIDTH - LEFT - RIGHT) * step / max(1, steps[-1]))
    y = lambda loss: FINE * (HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (min(loss, high) - low) /
                             (high - low))
    image = Image.new("RGB", (FINE * WIDTH, FINE * HEIGHT), "white")
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(13 * FINE)
    write = lambda at, text, anchor, fill=GREY: pen.text(at, text, font=font, fill=fill, anchor=
                                                         anchor)
    for loss in ticks(low, high):
        pen.line([x(0), y(loss), x(steps[-1]), y(loss)], fill=PALE, width=FINE)
        write((x(0) - 8 * FINE, y(loss)), f"{loss:.6g}", "rm")
    for step in ticks(0, max(1, steps[-1])):
        pen.line([x(step), y(low), x(step), y(low) + 5 * FINE], fill=GREY, width=FINE)
        write((x(step), y(low) + 8 * FINE), f"{step:.6g}", "mt")
    pen.line([x(0), y(high), x(0), y(low), x(steps[-1]), y(low)], fill=GREY, width=FINE)
    for step, loss in zip(steps, losses):
        pen.ellipse([x(step) - FINE, y(loss) - FINE, x(step) + FINE, y(loss) + FINE], fill=DOT)
    pen.line([(x(step), y(loss)) for step, loss in zip(steps, line)], fill=LINE, width=2 * FINE,
             joint="curve")
    write((x(steps[-1]) + 6 * FINE, y(line[-1])), f"{line[-1]:.4f}", "lm", LINE)
    write((x(0), FINE * TOP / 2), f"loss of a supervised token: {title}", "lm", (0, 0, 0))
    write((x(steps[-1]), y(low) + 26 * FINE), "step", "rt")
    return image.resize((WIDTH, HEIGHT), Image.LANCZOS)


def draw(folder: Path) -> None:
    """folder/loss.png of folder/log.csv. UserError if there is no step to draw."""
    path = folder / "log.csv"
    if not path.is_file():
        raise UserError(f"{path}: no such file; give the folder that train.py writes to (--out)")
    with open(path, newline="") as file:
        try:
            rows = [(int(row["step"]), float(row["loss"])) for row in csv.DictReader(file)]
        except (KeyError, TypeError, ValueError):
            raise UserError(
                f"{path}: not a log.csv that train.py wrote, or its last line is cut off") from None
    if not rows:
        raise UserError(f"{path}: no step is logged there yet")
    image = plot(rows, str(folder))
    write_beside(folder / "loss.png", lambda tmp: image.save(tmp, format="PNG"))


def main():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("folder", type=Path, help="what train.py wrote")
    draw(p.parse_args().folder)


if __name__ == "__main__":
    run(main)
