"""What is run and what is claimed, as docs/study.md has it: rows, sweeps, steps, seeds, claims."""
import argparse
from pathlib import Path

from ccra import NAMED
from core.common import ROOT
from training import options

OUT = Path("out/study")                  # features and unfinished runs
TOWERS = ROOT / "study" / "towers"
RESULTS = Path("study/results.csv")
STEPS = (900, 600)                       # of the two stages
RATES = 1e-2, 2e-3      # of the two stages; with train.py's 3e-3 and 1e-3 seeds differ by 20 points
LLAMA_STEPS = 400
QUESTIONS = 5000
SEEDS = 5
SWEEP_SEEDS = 3
PILOT_SEEDS = (100, 101, 102)

# --------------------------------------------------------------------------------------------------
# Runs

# name: (train.py's flags, fields of the fuser's configuration that have none)
ROWS = {
    **{name: (f"--fuser {name}", {}) for name in NAMED},
    "decoupled": ("--order decoupled", {}),
    "shuffled": ("--order shuffled", {}),
    **{f"without {part}": (f"--off {part}", {}) for part in ("lpwca", "lwca", "pwca", "smooth")},
    "token": ("--norm token", {}),
    "stack": ("--norm stack", {}),
    "token without": ("--norm token --off lpwca pwca", {}),
}
SWEEPS = {
    "stage1 neutral": ("--stage1-ccra neutral", {}),
    "stage1 on": ("--stage1-ccra on", {}),
    "query sofar": ("--query sofar", {}),
    "query first": ("--query first", {}),
    "anchor -2": ("", {"anchor_layer": -2}),
    **{f"d_hidden {n}": ("", {"d_hidden": n}) for n in (16, 256)},
    **{f"kernel {n}": ("", {"kernel_size": n}) for n in (3, 7)},
}
PILOT_ROWS = "ccra", "llava"
# whose trained models are kept for `off`, which makes these parts neutral
KEPT_ROWS = "ccra", "token", "stack"
NEUTRAL = (), ("lpwca",), ("pwca",), ("lpwca", "pwca"), ("lwca",)


def plan() -> list[tuple[str, int]]:
    """(row, seed) of all runs, seed by seed, so that a study that is cut short has all rows: three
    seeds of these, then the sweeps, then the other seeds."""
    first = [(name, seed) for seed in range(SWEEP_SEEDS) for name in ROWS]
    sweeps = [(name, seed) for seed in range(SWEEP_SEEDS) for name in SWEEPS]
    others = [(name, seed) for seed in range(SWEEP_SEEDS, SEEDS) for name in ROWS]
    return first + sweeps + others


def pilot() -> list[tuple[str, int]]:
    """(row, seed) of the pilot's runs."""
    return [(name, seed) for seed in PILOT_SEEDS for name in PILOT_ROWS]


def folder_of(name: str, seed: int, out: Path) -> Path:
    """Where a run works."""
    return out / "runs" / f"{name}-{seed}".replace(" ", "-")


def arguments_of(name: str, seed: int, stage: int, args: argparse.Namespace) -> argparse.Namespace:
    """train.py's arguments, of one stage of a run. args: of the study."""
    flags, _ = (ROWS | SWEEPS)[name]
    given = {"stage": stage, "seed": seed, "steps": args.steps[stage - 1], "lr": RATES[stage - 1],
             "out": folder_of(name, seed, args.out) / f"stage{stage}",
             "threads": 1, "workers": 0, "save-every": 300, "device": "cpu"}
    words = [word for key, value in given.items() for word in (f"--{key}", str(value))]
    return options.arguments(flags.split() + words)


# --------------------------------------------------------------------------------------------------
# Claims

# {claim: [(row, the row it's compared with, kind of question, side)]}, side 1 where the claim has
# the row above, -1 below, 0 if it names no side
CLAIMS = {
    "0 layers differ in use": [
        (row, "llava", kind, 1) for row in ("sci", "dci", "mlvf") for kind in ("tint", "shade")],
    "1 CCRA is best": [
        (row, "ccra", "all", -1) for row in ("llava", "sti", "sci", "dci", "mmfuser", "igva")],
    "2 and not by its size": [("wide", "ccra", "all", -1)],
    "3 better than its parts alone": [(row, "ccra", "all", -1) for row in ("pwca", "lwca")],
    "4 progressive, shuffled, decoupled": [
        ("decoupled", "ccra", "all", -1),
        ("shuffled", "ccra", "all", -1),
        ("decoupled", "shuffled", "all", -1)],
    "5 every part helps": [
        (f"without {part}", "ccra", "all", -1) for part in ("lpwca", "lwca", "pwca", "smooth")],
    "6 PWCA: text and grounding": [
        ("without pwca", "ccra", kind, -1) for kind in ("word", "where")],
    "7 LWCA: reasoning": [
        ("without lwca", "ccra", kind, -1) for kind in ("category", "follow-up")],
    "8 LPWCA: consistency": [("without lpwca", "ccra", "presence", -1)],
    "9 smoothing: small gains": [("without smooth", "ccra", "all", -1)],
    "10 robust to h and k": [
        (row, "ccra", "all", 0) for row in ("d_hidden 16", "d_hidden 256", "kernel 3", "kernel 7")],
    "the norm": [
        ("token", "token without", "all", 0),
        ("ccra", "token", "all", 1),
        ("stack", "token", "all", 1),
        ("stack", "ccra", "all", 0)],
    "defaults": [
        (row, "ccra", "all", 0)
        for row in ("stage1 neutral", "stage1 on", "query sofar", "query first", "anchor -2")],
}
# claims that say "by less than 2 points", if below
LESS = {"9 smoothing: small gains": 2.0, "10 robust to h and k": 2.0}
