"""The losses of a training as a picture: a dot for each step, and a line through their moving mean;
larger dots for what was measured on held-out records (--val).

    python -m training.curve out/toy/stage2      reads log.csv there and draws loss.png beside it,
                                                 as train.py does itself
"""
import csv
import math
from collections.abc import Iterable, Iterator
from pathlib import Path

from PIL import Image

from core import flags
from core.canvas import Axes
from core.common import UserError, run, write_beside

WIDTH, HEIGHT = 900, 480                                     # pixels
LEFT, TOP, RIGHT, BOTTOM = MARGINS = 60, 40, 70, 50
LETTERS = 13
BLACK, GREY, PALE = (0, 0, 0), (90, 90, 90), (228, 228, 228)
DOT, LINE = (170, 195, 230), (31, 80, 160)
HELD = (200, 80, 20)


def smooth(values: Iterable[float], width: float) -> Iterator[float]:
    """The mean of each value and those before it, weighted by exp(-distance / width)."""
    fade = math.exp(-1 / width)
    total = weight = 0.0
    for value in values:
        total = fade * total + value
        weight = fade * weight + 1
        yield total / weight


def ticks(low: float, high: float, most: int = 10) -> list[float]:
    """At most `most` round numbers from low to high, 1, 2 or 5 times a power of ten apart."""
    rough = (high - low) / (most - 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(k * power for k in (1, 2, 5, 10) if k * power >= rough)
    return [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def plot(rows: list[tuple[int, float]], title: str,
         held: list[tuple[int, float, float | None]] = ()) -> Image.Image:
    """rows: (step, loss), at least one; held: (step, loss, share of right answers) of held-out
    records. What isn't finite is left out; of the steps what is above the lines' top is drawn
    there."""
    held = [row for row in held if math.isfinite(row[1])]
    rows = [row for row in rows if math.isfinite(row[1])] or [(rows[0][0], 0.0)]
    steps = [step for step, _ in rows]
    losses = [loss for _, loss in rows]
    line = list(smooth(losses, max(1, len(steps) / 150)))
    apart = [loss for _, loss, _ in held]
    low, high = min(losses + apart), max(line + apart)
    high += 0.05 * (high - low) or 1
    last = max(1, steps[-1])
    axes = Axes(WIDTH, HEIGHT, MARGINS, (0, last), (low, high))
    for loss in ticks(low, high):
        axes.line([axes.place(0, loss), axes.place(last, loss)], PALE)
        axes.label_y(loss, f"{loss:.6g}", GREY, LETTERS)
    for step in ticks(0, last):
        x, y = axes.place(step, low)
        axes.line([(x, y), (x, y + 5)], GREY)
        axes.label_x(step, f"{step:.6g}", GREY, LETTERS)
    axes.frame(GREY)
    for step, loss in rows:
        axes.dot(axes.place(step, min(loss, high)), 1, DOT)
    axes.line([axes.place(step, loss) for step, loss in zip(steps, line)], LINE, 2)
    x, y = axes.place(steps[-1], line[-1])
    axes.write((x + 6, y), f"{line[-1]:.4f}", "lm", LINE, LETTERS)
    axes.write((LEFT, TOP / 2), f"loss of a supervised token: {title}", "lm", BLACK, LETTERS)
    if held:
        draw_held(axes, held)
    axes.write((axes.right, axes.bottom + 26), "step", "rt", GREY, LETTERS)
    return axes.reduce()


def draw_held(axes: Axes, held: list[tuple[int, float, float | None]]) -> None:
    """Dots, a line through them, and the last one's numbers below."""
    places = [axes.place(step, loss) for step, loss, _ in held]
    if len(places) > 1:
        axes.line(places, HELD)
    for place in places:
        axes.dot(place, 3, HELD)
    _, loss, right = held[-1]
    said = f"held out: {loss:.4f}" + ("" if right is None else f", right {right:.1%}")
    axes.write((LEFT, axes.bottom + 26), said, "lt", HELD, LETTERS)


def draw(folder: Path) -> None:
    """folder/loss.png of folder/log.csv. UserError if there is no step to draw."""
    path = folder / "log.csv"
    if not path.is_file():
        raise UserError(f"{path}: no such file; give the folder that train.py writes to (--out)")
    with open(path, newline="") as file:
        try:
            table = list(csv.DictReader(file))
            rows = [(int(row["step"]), float(row["loss"])) for row in table]
            held = [(int(row["step"]), float(row["val_loss"]),
                     float(row["val_right"]) if row["val_right"] else None)
                    for row in table if row.get("val_loss")]
        except (KeyError, TypeError, ValueError):
            raise UserError(f"{path}: not a log.csv that train.py wrote, or its last line is cut "
                            "off") from None
    if not rows:
        raise UserError(f"{path}: no step is logged there yet")
    image = plot(rows, str(folder), held)
    write_beside(folder / "loss.png", lambda tmp: image.save(tmp, format="PNG"))


def main() -> None:
    p = flags.Parser(description=__doc__)
    p.add_argument("folder", type=Path, help="what train.py wrote")
    draw(p.parse_args().folder)


if __name__ == "__main__":
    run(main)
