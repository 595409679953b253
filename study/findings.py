"""What do the runs of study.py say? Accuracies, paired differences, their intervals, a picture of
them.

    python study.py table

Everything is told from results.csv and off.csv, which have a bit for each question of each run.
"""
import csv
import io
import math
import os
import re
from contextlib import redirect_stdout
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from benchmarks.table1 import COLUMNS, REPORTED
from core.common import UserError, write_beside
from study.probes import KINDS
from toy import questions

SEEDS, PILOT_SEEDS = 5, (100, 101, 102)
TABLE = re.compile(r"(?:^\|.*\n)+", re.MULTILINE)           # in markdown
# Quantiles of Student's t by degrees of freedom: what leaves 2.5% above it, and what leaves 20%
T = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
T80 = {1: 1.376, 2: 1.061, 3: 0.978, 4: 0.941, 5: 0.920, 6: 0.906, 7: 0.896, 8: 0.889, 9: 0.883}

# What docs/study.md tests: {claim: [(row, the row it's compared with, kind of question, side)]},
# side 1 where the claim has the row above, -1 below, 0 if it names no side. LESS: claims that say
# "by less than 2 points", if below
CLAIMS = {
    "0 layers differ in use": [
        (row, "llava", kind, 1) for row in ("sci", "dci", "mlvf") for kind in ("tint", "shade")],
    "1 CCRA is best": [
        (row, "ccra", "all", -1) for row in ("llava", "sti", "sci", "dci", "mmfuser", "igva")],
    "2 and not by its size": [("wide", "ccra", "all", -1)],
    "3 better than its parts alone": [(row, "ccra", "all", -1) for row in ("pwca", "lwca")],
    "4 progressive, shuffled, decoupled": [("decoupled", "ccra", "all", -1),
                                           ("shuffled", "ccra", "all", -1),
                                           ("decoupled", "shuffled", "all", -1)],
    "5 every part helps": [
        (f"without {part}", "ccra", "all", -1) for part in ("lpwca", "lwca", "pwca", "smooth")],
    "6 PWCA: text and grounding": [
        ("without pwca", "ccra", kind, -1) for kind in ("word", "where")],
    "7 LWCA: reasoning": [("without lwca", "ccra", kind, -1) for kind in ("category", "follow-up")],
    "8 LPWCA: consistency": [("without lpwca", "ccra", "presence", -1)],
    "9 smoothing: small gains": [("without smooth", "ccra", "all", -1)],
    "10 robust to h and k": [
        (row, "ccra", "all", 0) for row in ("d_hidden 16", "d_hidden 256", "kernel 3", "kernel 7")],
    "the norm": [("token", "token without", "all", 0), ("ccra", "token", "all", 1),
                 ("stack", "token", "all", 1), ("stack", "ccra", "all", 0)],
    "defaults": [
        (row, "ccra", "all", 0)
        for row in ("stage1 neutral", "stage1 on", "query sofar", "query first", "anchor -2")], }
LESS = {"9 smoothing: small gains": 2.0, "10 robust to h and k": 2.0}

# The rows of Tables 3 and 4 that the study has (reported, in the columns of tables.REPORTED)
VARIANTS = {
    "decoupled": "63.1 70.2 58.7 53.0 67.0 36.5 68.5 36.6 1497.7 87.4",
    "shuffled": "63.8 70.8 59.3 53.7 67.3 37.0 68.9 36.8 1501.6 88.2",
    "without pwca": "62.9 69.5 58.8 53.2 67.1 36.8 68.3 36.4 1513.2 87.5",
    "without lwca": "63.4 70.1 58.2 53.9 66.7 36.0 68.1 36.9 1510.3 87.0",
    "without lpwca": "62.7 70.6 59.0 52.8 66.9 37.1 68.7 36.3 1514.6 88.7",
    "without smooth": "63.8 70.9 59.1 54.0 67.3 36.5 69.0 36.7 1516.2 88.2"}
PAPER = {
    "llava": REPORTED["LLaVA-v1.5-7B (a)"], "mmfuser": REPORTED["MMFuser"],
    "igva": REPORTED["IGVA"], **{name: REPORTED["DenseConnector"] for name in ("sti", "sci", "dci")},
    **VARIANTS}


def read(path: Path) -> list[dict]:
    """The rows of a results.csv; none if there is no file."""
    with open(path if path.exists() else os.devnull, newline="") as file:
        return list(csv.DictReader(file))


def error(d: Tensor) -> tuple[float, float]:
    """(mean, standard error) of d (S, Q): seeds down, questions across.

    Seeds and questions are both samples, and both are crossed: every seed answers every question.
    So the variance is that of the seeds' means over S, plus that of the questions' means over Q.
    (What is due to neither is in both terms, so it's a little too much.) With one seed only that of
    the questions is known.
    """
    S, Q = d.shape
    seeds = d.mean(1).var().item() / S if S > 1 else 0.0
    return d.mean().item(), math.sqrt(seeds + d.mean(0).var().item() / Q)


def interval(d: Tensor) -> tuple[float, float]:
    """(mean, half of the 95% interval): `error` times Student's t with S - 1 degrees of freedom."""
    mean, e = error(d)
    return mean, T[max(1, len(d) - 1)] * e


def bits(row: dict) -> list[int]:
    return [int(b) for b in f"{int(row['right'], 16):b}"[1:]]


def collect(rows: list[dict], pilot=False) -> dict[str, dict[int, Tensor]]:
    """{row: {seed: right (Q)}} in percent, of the study's seeds or of the pilot's."""
    if len({(row["steps"], row["questions"]) for row in rows}) > 1:
        raise UserError(
            "results.csv: its rows are of different numbers of steps or questions, which don't compare"
        )
    found = {}
    for row in rows:
        if (int(row["seed"]) in PILOT_SEEDS) == pilot:
            found.setdefault(row["row"], {})[int(row["seed"])] = 100.0 * torch.tensor(bits(row))
    return found


def paired(a: dict[int, Tensor], b: dict[int, Tensor]) -> Tensor:
    """a - b (S, Q), of the seeds that both have."""
    seeds = sorted(a.keys() & b.keys())
    return torch.stack([a[seed] - b[seed] for seed in seeds]) if seeds else torch.zeros(0, 1)


def by_kind(Q: int) -> dict[str, list[int]]:
    """{kind: its questions' places in `exam`}, and of all."""
    old = Q * len(questions.QUESTIONS) // len(KINDS)
    kinds = [KINDS[i % 8] if i < old else KINDS[8 + i % 2] for i in range(Q)]
    return {
        "all": list(range(Q)), **{kind: [i for i in range(Q) if kinds[i] == kind] for kind in KINDS}}


def lines(rows: dict[str, dict[int, Tensor]],
          base: dict[int, Tensor] | None) -> dict[str, tuple[int, dict]]:
    """{row: (seeds, {kind: (mean, half)})}: accuracies, or paired differences from base."""
    found, kinds = {}, by_kind(len(next(iter(next(iter(rows.values())).values()))))
    for name, seeds in rows.items():
        d = torch.stack([seeds[s] for s in sorted(seeds)]) if base is None else paired(seeds, base)
        if len(d) and seeds is not base:
            found[name] = len(d), {kind: interval(d[:, places]) for kind, places in kinds.items()}
    return found


def show(title: str, found: dict[str, tuple[int, dict]], mark=False) -> None:
    """lines as markdown. mark: what excludes 0 is bold."""
    print(f"\n{title}\n\n| row | seeds | " + " | ".join(["all"] + KINDS) + " |\n" + "|---" *
          (len(KINDS) + 3) + "|")
    for name, (seeds, cells) in found.items():
        texts = [
            f"{mean:+.1f} ± {half:.1f}" if mark else f"{mean:.1f} ± {half:.1f}"
            for mean, half in cells.values()]
        bold = [mark and seeds > 1 and abs(mean) > half for mean, half in cells.values()]
        print(f"| {name} | {seeds} | " + " | ".join(f"**{t}**" if b else t
                                                    for t, b in zip(texts, bold)) + " |")


def verdict(d: Tensor, side: int, less: float | None = None) -> str:
    """What d (S, Q) says of a claim: it "holds" or is "reversed" if its 95% interval lies on that
    side of 0 or on the other ("above", "below" if the claim has none), else it "can't be told".
    less: the claim is that d isn't above 0 (side 0) or is below it (-1), but by less than that:
    then all of the interval has to lie between -less and 0, or, as d may well be nothing, between
    -less and less.
    """
    mean, half = interval(d)
    if len(d) < 2:                                 # what other seeds would change isn't known
        return "can't be told"
    if less is not None:
        if mean - half > 0 or mean + half < -less:
            return "reversed"
        return "holds" if mean - half > -less and mean + half < (
            0 if side else less) else "can't be told"
    if abs(mean) <= half:
        return "can't be told"
    return ("holds" if mean *
            side > 0 else "reversed") if side else "above" if mean > 0 else "below"


def show_claims(rows: dict[str, dict[int, Tensor]]) -> None:
    """Every claim's parts as far as both rows were run, as markdown."""
    kinds = by_kind(len(next(iter(next(iter(rows.values())).values()))))
    print("\n| claim | row | less | kind | seeds | points | |\n|---|---|---|---|---|---|---|")
    for claim, parts in CLAIMS.items():
        for row, base, kind, side in parts:
            if len(d := paired(rows.get(row, {}), rows.get(base, {}))):
                d = d[:, kinds[kind]]
                points, said = "{:+.1f} ± {:.1f}".format(*interval(d)), verdict(
                    d, side, LESS.get(claim))
                print(f"| {claim} | {row} | {base} | {kind} | {len(d)} | {points} | {said} |")


def reported(name: str) -> dict[str, float]:
    """{benchmark: points more than CCRA} by the paper, where it has both. MME-p isn't in percent,
    so it's left out."""
    values, ours = PAPER[name].split(), REPORTED["CCRA (c)"].split()
    return {column: float(a) - float(b) for column, a, b in zip(COLUMNS.values(), values, ours)
            if a != "-" and column != "MME-p"}


def show_beside(found: dict[str, tuple[int, dict]]) -> None:
    """The differences from ccra that the paper reports, and ours where it has the row; as markdown.
    """
    columns, kinds = ("GQA", "TextVQA", "POPE"), ("all", "word", "presence")
    print("\nPoints more than CCRA: reported, and measured here\n")
    print(f"| row | paper: {' | '.join(columns)} | mean of all | here: {' | '.join(kinds)} |\n"
          + "|---" * (len(columns) + len(kinds) + 2) + "|")
    for name in (name for name in PAPER if name in found):
        paper, here = reported(name), found[name][1]
        cells = [
            f"{points:+.1f}"
            for points in (*map(paper.get, columns), sum(paper.values()) / len(paper))]
        print(f"| {name} | " +
              " | ".join(cells + ["{:+.1f} ± {:.1f}".format(*here[kind]) for kind in kinds]) + " |")


def show_off(table: list[dict]) -> None:
    """Of off.csv: how many answers stay the same, and the points won, with parts made neutral after
    training; and how often a factor was below 0, which is the only way that a weight gets past the
    token norm."""
    rows = {}
    for row in table:
        rows.setdefault((row["row"], row["off"]), {})[int(row["seed"])] = row
    right = {
        key: {seed: 100.0 * torch.tensor(bits(row)) for seed, row in seeds.items()}
        for key, seeds in rows.items()}
    print("\nParts made neutral after training\n")
    print(
        "| model | without | seeds | answers that stay | points | 1 + W_lp < 0 | 1 + w_p < 0 |\n" +
        "|---" * 7 + "|")
    for (name, off), seeds in rows.items():
        stay, lp, p = (sum(float(row[key]) for row in seeds.values()) / len(seeds)
                       for key in ("same", "negative_W_lp", "negative_w_p"))
        points = "{:+.1f} ± {:.1f}".format(*interval(paired(right[name,
                                                                  off], right[name,
                                                                              ""]))) if off else "-"
        print(
            f"| {name} | {off or 'nothing'} | {len(seeds)} | {stay:.1%} | {points} | {lp:.1%} | {p:.1%} |"
        )


def plot(rows: dict[str, dict[int, Tensor]], base: str) -> Image.Image:
    """A column for each kind of question, a line for each row: its difference from the row `base`
    (a ring), the 95% interval, and a dot for each seed. A column is wide enough for four intervals
    of five; the others leave it."""
    found, kinds = lines(rows, rows[base]), by_kind(len(next(iter(rows[base].values()))))
    left, top, width, line, fine = 130, 76, 110, 22, 2
    size = fine * (left + width * (len(kinds) + 1) + 10), fine * (top + line * len(found) + 20)
    image = Image.new("RGB", size, "white")
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(12 * fine)
    write = lambda x, y, text, anchor: pen.text(
        (fine * x, fine * y), text, font=font, fill=(60, 60, 60), anchor=anchor)
    write(
        10, 14,
        f"points more than {base}, with 95% intervals (blue: 0 is outside), and each seed's (dots); "
        "columns reach as far as they say, arrows go on", "lm")
    for column, (kind, places) in enumerate(kinds.items()):
        reach = sorted(
            abs(mean) + half for _, cells in found.values() for mean, half in [cells[kind]])
        most = max(1.0, reach[int(0.8 * (len(reach) - 1))])
        room = width * (2 if kind == "all" else 1)                         # what claims are about
        middle = left + width * (column + 1.5 if column else 1)
        x = lambda value: fine * (middle + (room / 2 - 8) * max(-1.0, min(1.0, value / most)))
        write(middle, 40, kind, "mm")
        write(middle, 58, f"± {most:.1f}", "mm")
        pen.line([x(0), fine * top, x(0), fine * (top + line * len(found))], fill=(200, 200, 200),
                 width=fine)
        for i, (name, (seeds, cells)) in enumerate(found.items()):
            y, (mean, half) = fine * (top + line * (i + 0.5)), cells[kind]
            color = (31, 80, 160) if seeds > 1 and abs(mean) > half else (150, 150, 150)
            pen.line([x(mean - half), y, x(mean + half), y], fill=color, width=2 * fine)
            for side in (-1, 1):
                if side * mean + half > most:
                    end, tip = x(side * most) - side * fine, x(side * most) + side * 5 * fine
                    pen.polygon([tip, y, end, y - 4 * fine, end, y + 4 * fine], color)
            pen.ellipse([x(mean) - 4 * fine, y - 4 * fine,
                         x(mean) + 4 * fine, y + 4 * fine], "white", color, 2 * fine)
            for each in paired(rows[name], rows[base])[:, places].mean(1).tolist():
                pen.ellipse(
                    [x(each) - 1.5 * fine, y - 1.5 * fine,
                     x(each) + 1.5 * fine, y + 1.5 * fine], (60, 60, 60))
            write(left - 8, top + line * (i + 0.5), name, "rm")
    return image.resize((image.width // fine, image.height // fine), Image.LANCZOS)


def write_tables(path: Path, results: Path) -> None:
    """Put the tables that `show_tables` prints in the place of those after "## Results" in a
    markdown file."""
    with redirect_stdout(io.StringIO()) as said:
        show_tables(results, "ccra")
    head, mark, tail = path.read_text().partition("\n## Results\n")
    old, new = TABLE.findall(tail), TABLE.findall(said.getvalue())
    if len(old) != len(new):
        raise UserError(
            f"{path}: has {len(old)} tables after its line '## Results', but {len(new)} are printed"
        )
    text = head + mark + TABLE.sub(lambda _: new.pop(0), tail)
    write_beside(path, lambda tmp: tmp.write_text(text))


def show_tables(results: Path, base: str) -> None:
    """Print the tables of a results.csv, and draw the differences from the row `base` beside it."""
    table = read(results)
    rows, pilot = collect(table), collect(table, pilot=True)
    if pilot.keys() >= {"ccra", "llava"} and len(d := paired(pilot["llava"], pilot["ccra"])) > 1:
        for kind, places in by_kind(d.shape[1]).items():
            part, S = d[:, places], len(d)
            e = math.sqrt(
                part.mean(1).var().item() / SEEDS + part.mean(0).var().item() / len(places))
            print(
                f"pilot, {S} seeds, {kind}: llava - ccra = {part.mean():+.1f}; with {SEEDS} seeds a difference of "
                f"{(T[SEEDS - 1] + T80[SEEDS - 1]) * e:.1f} would be found in 80% of studies")
    if not rows:
        return print(f"{results}: no run of the study yet")
    if base not in rows:
        raise UserError(f"{results} has no row {base!r} to compare with")
    found = lines(rows, rows[base])
    show("Accuracy in percent, with its 95% interval", lines(rows, None))
    show(f"Points more than {base}, paired; bold: the 95% interval excludes 0", found, mark=True)
    if base == "ccra":
        show_beside(found)
    show_claims(rows)
    if off := read(results.parent / "off.csv"):
        show_off(off)
    path = results.parent / f"differences-from-{base.replace(' ', '-')}.png"
    write_beside(path, lambda tmp: plot(rows, base).save(tmp, format="PNG"))
    seconds = sum(float(row["train_s"]) + float(row["exam_s"]) for row in table)
    print(f"\n{len(table)} runs, {seconds / 3600:.1f} hours of one core; drawn in {path}")
