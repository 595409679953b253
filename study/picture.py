"""The study's picture: how far every row is from one of them, with intervals and seeds."""
from PIL import Image

from core.canvas import PAPER, Sheet
from study.findings import Rows, by_kind, compare, paired, questions_of

# In pixels of the finished picture
LEFT = 130               # beside the first column: the rows' names
TOP = 76                 # above the first row: the title, kinds and reaches
WIDTH = 110              # of a column; of the first, which claims are about, twice that
LINE = 22                # of a row

INK, GREY, RULE = (60, 60, 60), (150, 150, 150), (200, 200, 200)
BLUE = (31, 80, 160)     # 0 is outside of the interval


def plot(rows: Rows, base: str) -> Image.Image:
    """A column for each kind of question, a line for each row: its difference from the row `base`
    (a ring), the 95% interval, and a dot for each seed. A column is wide enough for four intervals
    of five; the others leave it."""
    found = compare(rows, rows[base])
    kinds = by_kind(questions_of(rows))
    sheet = Sheet(LEFT + WIDTH * (len(kinds) + 1) + 10, TOP + LINE * len(found) + 20)
    sheet.write((10, 14), f"points more than {base}, with 95% intervals (blue: 0 is outside), and "
                "each seed's (dots); columns reach as far as they say, arrows go on", "lm", INK)
    for i, name in enumerate(found):
        sheet.write((LEFT - 8, TOP + LINE * (i + 0.5)), name, "rm", INK)
    for column, (kind, places) in enumerate(kinds.items()):
        reach = sorted(abs(mean) + half for _, cells in found.values()
                       for mean, half in (cells[kind],))
        most = max(1.0, reach[int(0.8 * (len(reach) - 1))])
        middle = LEFT + WIDTH * (column + 1.5 if column else 1)
        sheet.write((middle, 40), kind, "mm", INK)
        sheet.write((middle, 58), f"± {most:.1f}", "mm", INK)
        sheet.line([(middle, TOP), (middle, TOP + LINE * len(found))], RULE)
        side = WIDTH * (1 if column else 2) / 2 - 8
        for i, (name, (_, cells)) in enumerate(found.items()):
            each = paired(rows[name], rows[base])[:, places].mean(1).tolist()
            cell(sheet, middle, side, TOP + LINE * (i + 0.5), most, cells[kind], each)
    return sheet.reduce()


def cell(sheet: Sheet, middle: float, side: float, y: float, most: float,
         found: tuple[float, float], each: list[float]) -> None:
    """One row's difference in one column.

    middle: where 0 is; side: pixels from there to `most` points; found: (mean, half of the
    interval); each: every seed's difference.
    """
    def x(value: float) -> float:
        return middle + side * max(-1.0, min(1.0, value / most))

    mean, half = found
    color = BLUE if len(each) > 1 and abs(mean) > half else GREY
    sheet.line([(x(mean - half), y), (x(mean + half), y)], color, 2)
    for sign in (-1, 1):
        if sign * mean + half > most:                      # it goes on beyond the column
            end = x(sign * most) - sign
            tip = x(sign * most) + 5 * sign
            sheet.polygon([(tip, y), (end, y - 4), (end, y + 4)], color)
    sheet.dot((x(mean), y), 4, PAPER, color)
    for value in each:
        sheet.dot((x(value), y), 1.5, INK)
