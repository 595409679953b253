"""TODO study/protocol.py"""
import argparse
from pathlib import Path

from ccra import NAMED
from core import common
from study.findings import SEEDS
from training import options

OUT, TOWERS, RESULTS = Path("out/study"), common.ROOT / "study" / "towers", Path(
    "study/results.csv")
STEPS, LLAMA_STEPS, QUESTIONS, SWEEP_SEEDS = (900, 600), 400, 5000, 3
RATES = 1e-2, 2e-3      # of the two stages; with train.py's 3e-3 and 1e-3 seeds differ by 20 points
# name: (train.py's flags, fields of the fuser's configuration that have none)
ROWS = {name: (f"--fuser {name}", {}) for name in NAMED} | {
    "decoupled": ("--order decoupled", {}), "shuffled": ("--order shuffled", {}),
    **{f"without {part}": (f"--off {part}", {}) for part in ("lpwca", "lwca", "pwca", "smooth")},
    "token": ("--norm token", {}), "stack": ("--norm stack", {}),
    "token without": ("--norm token --off lpwca pwca", {})}
SWEEPS = {"stage1 neutral": ("--stage1-ccra neutral", {}), "stage1 on": ("--stage1-ccra on", {}),
          "query sofar": ("--query sofar", {}), "query first": ("--query first", {}),
          "anchor -2": ("", dict(anchor_layer=-2)),
          **{f"d_hidden {n}": ("", dict(d_hidden=n)) for n in (16, 256)},
          **{f"kernel {n}": ("", dict(kernel_size=n)) for n in (3, 7)}}
KEPT_ROWS = "ccra", "token", "stack"  # whose trained models are kept, for `off`,
NEUTRAL = (), ("lpwca",), ("pwca",), ("lpwca", "pwca"), ("lwca",)  # which makes these parts neutral


# --------------------------------------------------------------------------------------------------
# Runs


def plan() -> list[tuple[str, int]]:
    """(row, seed) of all runs, seed by seed, so that a study that is cut short has all rows: three
    seeds of these, then the sweeps, then the other seeds."""
    seeds = [(name, seed) for seed in range(SEEDS) for name in ROWS]
    first = SWEEP_SEEDS * len(ROWS)
    return seeds[:first] + [
        (name, seed) for seed in range(SWEEP_SEEDS) for name in SWEEPS] + seeds[first:]


def arguments_of(name: str, seed: int, stage: int, args) -> argparse.Namespace:
    """train.py's, of one stage of a run."""
    flags = (ROWS | SWEEPS)[name][0].split()
    return options.arguments([
        "--stage",
        str(stage), "--seed",
        str(seed), *flags, "--steps",
        str(args.steps[stage - 1]), "--lr",
        str(RATES[stage - 1]), "--out",
        str(args.out / "runs" / f"{name}-{seed}".replace(" ", "-") / f"stage{stage}"), "--threads",
        "1", "--workers", "0", "--save-every", "300", "--device", "cpu"])
