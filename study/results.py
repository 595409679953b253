"""results.csv and off.csv: one row a finished run, with a bit for each question, so that all tables
come from these files."""
import csv
import os
import platform
import subprocess
import sys
from contextlib import closing
from functools import cache
from pathlib import Path

import torch

from core.common import ROOT, UserError, wait_for, write_text
from study.world import KINDS
from toy.exam import Item


def read(path: Path) -> list[dict[str, str]]:
    """The rows of such a file; none if there is no file."""
    with open(path if path.exists() else os.devnull, newline="") as file:
        return list(csv.DictReader(file))


def add(path: Path, row: dict, key: tuple[str, ...] = ("row", "seed")) -> None:
    """A row more in a file, by one process at a time. UserError if it's there already with another
    result. key: the columns that tell rows apart."""
    with closing(wait_for(path.parent)):
        rows = read(path)
        for old in rows:
            if [old[k] for k in key] == [str(row[k]) for k in key]:
                if old["right"] == row["right"]:
                    return
                raise UserError(
                    f"{path}: {row['row']}, seed {row['seed']} had accuracy {old['accuracy']} at "
                    f"{old['commit']}, now {row['accuracy']}: not the same code, towers or machine")
        lines = [list(row)] + [[str(line[column]) for column in row] for line in [*rows, row]]
        write_text(path, "".join(",".join(line) + "\n" for line in lines))


def score(texts: list[str], items: list[Item]) -> dict:
    """What a row says of answers: how many are right, of each kind, by which code, where, and a bit
    for each (behind a 1, in hexadecimal digits)."""
    right = [text == item.turns[-1].answer for text, item in zip(texts, items)]
    row = {"questions": len(items), "accuracy": share(right)}
    for kind in KINDS:
        row[kind] = share([ok for ok, item in zip(right, items) if item.kind == kind])
    digits = "1" + "".join(str(int(ok)) for ok in right)
    return {**row, "commit": commit(), "cpu": cpu_name(), "right": f"{int(digits, 2):x}"}


def share(right: list[bool]) -> str:
    """How many of them, as a row says it."""
    return f"{sum(right) / len(right):.4f}"


def bits(row: dict) -> list[int]:
    """1 for each question that was answered right, else 0."""
    return [int(bit) for bit in f"{int(row['right'], 16):b}"[1:]]


@cache
def commit() -> str:
    """The commit that the code is of, with "+" if it was changed since; as it was when first asked
    for."""
    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True)
        return done.stdout.strip()

    changed = git("status", "--porcelain", "--", "*.py")
    return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")


@cache
def cpu_name() -> str:
    """What this machine's processor calls itself: another kind rounds otherwise, and training
    carries that far."""
    name = platform.processor()
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2]
                break
    words = [*name.split(), torch.backends.cpu.get_cpu_capability()]
    return " ".join(words).replace(",", "")
