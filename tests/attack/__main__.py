"""Damage what people bring, at random, and see what the programs make of it.

    python -m tests.attack --minutes 10                     every door in turn
    python -m tests.attack --minutes 10 --doors pictures    one of them
    python -m tests.attack --only records/0/1234            one try again

A try ends well if the thing is taken, or refused in one line. Everything else is a fault: another
exception, a message of several lines, 20 seconds without an end. Faults are printed with the name
of the try, and counted; the exit status is 1 if there is one.
"""
import argparse
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

from tests.attack import doors, folders

SECONDS = 20                  # until a try counts as hanging


def model_folders(rng: random.Random, folder: Path) -> str:
    folders.attack(rng, folder, limit=False)
    return "tried"


DOORS = {**doors.DOORS, "folders": model_folders}


def attempt(name: str, place: Path) -> str:
    """One try, by its name: "door/seed/number". Returns how it ended."""
    door = DOORS[name.split("/")[0]]
    folder = place / "here"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    signal.alarm(SECONDS)
    try:
        return door(random.Random(name), folder)
    finally:
        signal.alarm(0)


def late(*_) -> None:
    raise AssertionError(f"no end within {SECONDS} seconds")


def attack(names: list[str], seed: int, seconds: float, place: Path) -> tuple[Counter, list[str]]:
    """Tries at these doors in turn until the time is over: how they ended, and the faults."""
    ends, faults, number = Counter(), [], 0
    stop = time.monotonic() + seconds
    while time.monotonic() < stop:
        name = f"{names[number % len(names)]}/{seed}/{number}"
        try:
            ends[f"{names[number % len(names)]}: {attempt(name, place)}"] += 1
        except Exception as e:
            where = traceback.extract_tb(e.__traceback__)[-1]
            line = " ".join(str(e).split())[:300]
            faults.append(f"{name}: {type(e).__name__} at {where.filename}:{where.lineno}: {line}")
            print(f"FAULT {faults[-1]}", flush=True)
        number += 1
    return ends, faults


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--minutes", type=float, default=1.0)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--doors", nargs="+", choices=DOORS, default=list(DOORS))
    p.add_argument("--only", metavar="NAME", help="a try that ended badly, once more")
    args = p.parse_args()
    signal.signal(signal.SIGALRM, late)
    with tempfile.TemporaryDirectory() as place:
        if args.only:
            return print(attempt(args.only, Path(place)))
        ends, faults = attack(args.doors, args.seed, 60 * args.minutes, Path(place))
    for end, count in sorted(ends.items()):
        print(f"{end:28} {count:8,}")
    print(f"{sum(ends.values()) + len(faults):,} tries, {len(faults)} ended badly")
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
