"""The study's tables, in markdown: accuracies, differences, claims, beside the paper's figures."""
import io
import re
from collections.abc import Iterable
from contextlib import redirect_stdout
from pathlib import Path

import torch

from benchmarks.table1 import COLUMNS, REPORTED
from core.common import UserError, write_beside, write_text
from study.findings import (
    Cells,
    Rows,
    by_kind,
    collect,
    compare,
    interval,
    least,
    paired,
    questions_of,
    verdict,
)
from study.picture import plot
from study.protocol import CLAIMS, LESS, PILOT_ROWS, SEEDS
from study.results import bits, read
from study.world import KINDS

TABLE = re.compile(r"(?:^\|.*\n)+", re.MULTILINE)           # in markdown

# What the paper reports of the study's rows, in the columns of Table 1; the last six are of Tables
# 3 and 4
PAPER = {
    "llava": REPORTED["LLaVA-v1.5-7B (a)"],
    "mmfuser": REPORTED["MMFuser"],
    "igva": REPORTED["IGVA"],
    **{name: REPORTED["DenseConnector"] for name in ("sti", "sci", "dci")},
    "decoupled": "63.1 70.2 58.7 53.0 67.0 36.5 68.5 36.6 1497.7 87.4",
    "shuffled": "63.8 70.8 59.3 53.7 67.3 37.0 68.9 36.8 1501.6 88.2",
    "without pwca": "62.9 69.5 58.8 53.2 67.1 36.8 68.3 36.4 1513.2 87.5",
    "without lwca": "63.4 70.1 58.2 53.9 66.7 36.0 68.1 36.9 1510.3 87.0",
    "without lpwca": "62.7 70.6 59.0 52.8 66.9 37.1 68.7 36.3 1514.6 88.7",
    "without smooth": "63.8 70.9 59.1 54.0 67.3 36.5 69.0 36.7 1516.2 88.2",
}


def reported(name: str) -> dict[str, float]:
    """{benchmark: points more than CCRA} by the paper, where it has both. MME-p isn't in percent,
    so it's left out."""
    values = PAPER[name].split()
    ours = REPORTED["CCRA (c)"].split()
    return {column: float(a) - float(b) for column, a, b in zip(COLUMNS.values(), values, ours)
            if a != "-" and column != "MME-p"}


# --------------------------------------------------------------------------------------------------
# Tables

def show_table(header: list[str], lines: Iterable[list]) -> None:
    """Print a table in markdown."""
    def row(cells: list) -> str:
        return "|" + "".join(f" {cell} |" if cell != "" else " |" for cell in cells)

    print(row(header))
    print("|---" * len(header) + "|")
    for line in lines:
        print(row(line))


def points(mean: float, half: float) -> str:
    """A difference with its interval."""
    return f"{mean:+.1f} ± {half:.1f}"


def show_accuracies(rows: Rows) -> None:
    """The accuracy of every row, by kind of question."""
    print("\nAccuracy in percent, with its 95% interval\n")
    lines = [[name, seeds, *(f"{mean:.1f} ± {half:.1f}" for mean, half in cells.values())]
             for name, (seeds, cells) in compare(rows, None).items()]
    show_table(["row", "seeds", "all", *KINDS], lines)


def show_differences(found: dict[str, tuple[int, Cells]], base: str) -> None:
    """`compare`'s paired differences from the row `base`."""
    print(f"\nPoints more than {base}, paired; bold: the 95% interval excludes 0\n")
    lines = []
    for name, (seeds, cells) in found.items():
        line = [name, seeds]
        for mean, half in cells.values():
            bold = "**" if seeds > 1 and abs(mean) > half else ""
            line.append(bold + points(mean, half) + bold)
        lines.append(line)
    show_table(["row", "seeds", "all", *KINDS], lines)


def show_beside(found: dict[str, tuple[int, Cells]]) -> None:
    """The differences from ccra that the paper reports, and ours where it has the row."""
    columns = ("GQA", "TextVQA", "POPE")
    kinds = ("all", "word", "presence")
    print("\nPoints more than CCRA: reported, and measured here\n")
    lines = []
    for name in PAPER:
        if name in found:
            paper = reported(name)
            theirs = [paper[column] for column in columns] + [sum(paper.values()) / len(paper)]
            _, cells = found[name]
            lines.append([name, *(f"{value:+.1f}" for value in theirs),
                          *(points(*cells[kind]) for kind in kinds)])
    show_table(["row", f"paper: {columns[0]}", *columns[1:], "mean of all",
                f"here: {kinds[0]}", *kinds[1:]], lines)


def show_claims(rows: Rows) -> None:
    """Every claim's parts as far as both rows were run."""
    kinds = by_kind(questions_of(rows))
    lines = []
    for claim, parts in CLAIMS.items():
        for row, base, kind, side in parts:
            d = paired(rows.get(row, {}), rows.get(base, {}))
            if len(d):
                d = d[:, kinds[kind]]
                said = verdict(d, side, LESS.get(claim))
                lines.append([claim, row, base, kind, len(d), points(*interval(d)), said])
    print()
    show_table(["claim", "row", "less", "kind", "seeds", "points", ""], lines)


def show_off(table: list[dict]) -> None:
    """Of off.csv: how many answers stay the same, and the points won, with parts made neutral after
    training; and how often a factor was below 0, which is the only way that a weight gets past the
    token norm."""
    groups = {}                                               # {(row, off): {seed: row of off.csv}}
    for row in table:
        groups.setdefault((row["row"], row["off"]), {})[int(row["seed"])] = row
    right = {key: {seed: 100.0 * torch.tensor(bits(row)) for seed, row in seeds.items()}
             for key, seeds in groups.items()}
    print("\nParts made neutral after training\n")
    lines = []
    for (name, off), seeds in groups.items():
        won = points(*interval(paired(right[name, off], right[name, ""]))) if off else "-"
        stay, lp, p = (sum(float(row[key]) for row in seeds.values()) / len(seeds)
                       for key in ("same", "negative_W_lp", "negative_w_p"))
        lines.append([name, off or "nothing", len(seeds), f"{stay:.1%}", won, f"{lp:.1%}",
                      f"{p:.1%}"])
    show_table(["model", "without", "seeds", "answers that stay", "points", "1 + W_lp < 0",
                "1 + w_p < 0"], lines)


def show_pilot(rows: Rows) -> None:
    """What difference the study could see, by the pilot's runs."""
    ours, other = PILOT_ROWS
    d = paired(rows.get(other, {}), rows.get(ours, {}))                                 # (S, Q)
    if len(d) < 2:
        return
    for kind, places in by_kind(d.shape[1]).items():
        part = d[:, places]
        print(f"pilot, {len(d)} seeds, {kind}: {other} - {ours} = {part.mean():+.1f}; with {SEEDS} "
              f"seeds a difference of {least(part):.1f} would be found in 80% of studies")


# --------------------------------------------------------------------------------------------------
# The commands

def show_tables(results: Path, base: str) -> None:
    """Print the tables of a results.csv, and draw the differences from the row `base` beside it."""
    table = read(results)
    rows = collect(table)
    show_pilot(collect(table, pilot=True))
    if not rows:
        return print(f"{results}: no run of the study yet")
    if base not in rows:
        raise UserError(f"{results} has no row {base!r} to compare with")
    found = compare(rows, rows[base])
    show_accuracies(rows)
    show_differences(found, base)
    if base == "ccra":
        show_beside(found)
    show_claims(rows)
    if off := read(results.parent / "off.csv"):
        show_off(off)
    path = results.parent / f"differences-from-{base.replace(' ', '-')}.png"
    write_beside(path, lambda tmp: plot(rows, base).save(tmp, format="PNG"))
    seconds = sum(float(row["train_s"]) + float(row["exam_s"]) for row in table)
    print(f"\n{len(table)} runs, {seconds / 3600:.1f} hours of one core; drawn in {path}")


def write_tables(path: Path, results: Path) -> None:
    """Put the tables that `show_tables` prints in the place of those after "## Results" in a
    markdown file. UserError if there are more or fewer."""
    with redirect_stdout(io.StringIO()) as said:
        show_tables(results, "ccra")
    head, mark, tail = path.read_text().partition("\n## Results\n")
    old = TABLE.findall(tail)
    new = TABLE.findall(said.getvalue())
    if len(old) != len(new):
        raise UserError(f"{path}: has {len(old)} tables after its line '## Results', but "
                        f"{len(new)} are printed")
    write_text(path, head + mark + TABLE.sub(lambda _: new.pop(0), tail))
