"""Numbers of the command line: each has its range where it is parsed, in every program."""
import argparse
import subprocess
import sys

import pytest

import data
import eval as evaluation
import sample
from bench import __main__ as bench
from bench import big, card, decode, make_llava, peak
from benchmarks import score as scoring
from core import flags
from core.common import ROOT, UserError
from study import __main__ as study
from tests.benchmarks.helpers import fails
from toy import __main__ as toy
from training import curve, options, prepare
from viz import __main__ as viz

ODD = ["nan", "-nan", "inf", "-inf", "1e400", "-1", "1e-400x", "", " ", "x", "0x10", "1.5e",
       str(10 ** 19), "9" * 5000, "-" + "9" * 30, "1\n2", "\udcff", "None", "1,5", "3 4"]


@pytest.mark.parametrize("kind", [flags.whole(0, 7), flags.whole(1, flags.MANY), flags.seed,
                                  flags.real(1e-12, 10), flags.share, flags.top_p, flags.batch,
                                  flags.temperature, flags.threads, flags.workers])
@pytest.mark.parametrize("text", ODD)
def test_odd_numbers(kind, text):
    """One line that names flag, value and range."""
    p = flags.Parser(prog="p")
    p.add_argument("--x", type=kind)
    with pytest.raises(UserError, match="^--x .{0,70}: should be a (whole )?number [^\n]*$") as e:
        p.parse_args([f"--x={text}"])
    assert len(str(e.value)) < 160
    str(e.value).encode()                                            # any terminal can show it


def test_what_is_in_range():
    for kind, text, value in [(flags.whole(0, 7), "7", 7), (flags.share, "1", 1.0),
                              (flags.seed, str(2 ** 63 - 1), 2 ** 63 - 1), (flags.share, "0", 0.0),
                              (flags.temperature, "0", 0), (flags.temperature, "1e-6", 1e-6)]:
        assert kind(text) == value
    for kind, text in [(flags.whole(0, 7), "8"), (flags.temperature, "1e-40"),
                       (flags.seed, str(2 ** 63)), (flags.share, "1.0001"), (flags.top_p, "0")]:
        with pytest.raises(argparse.ArgumentTypeError, match="should be"):
            kind(text)


def test_argparses_own_complaints_are_one_line_too():
    p = flags.Parser(prog="p", description="One.\n\n  Two.")
    p.add_argument("--kind", choices=("a", "b"), required=True)
    for words, said in [(["--kind", "c\nd"], "--kind: invalid choice"), ([], "required: --kind"),
                        (["--kind"], "expected one argument"), (["--kind", "a", "--no"], "--no"),
                        (["--kind=--"], "expected")]:
        with fails(said, "p -h"):
            p.parse_args(words)
    assert "\n\n  Two." in p.format_help()


PROGRAMS = dict(
    train=lambda words: options.arguments(["--stage", "2", *words]), sample=sample.arguments,
    eval=evaluation.arguments, score=scoring.main, bench=bench.main, viz=viz.main,
    toy=lambda words: toy.main(["towers", *words]), prepare=prepare.main,
    study=lambda words: study.main(["run", *words]))
OTHERS = dict(curve=curve.main, show=data.arguments, big=big.main, card=card.main,
              decode=decode.main, make_llava=make_llava.main, peak=peak.main)      # by sys.argv


def parsers(monkeypatch):
    """Every program's flags, as they are when it parses them."""
    for name, main in (PROGRAMS | OTHERS).items():
        seen = []

        def stop(p, *_):
            seen.append(p)
            raise UserError("seen")

        with monkeypatch.context() as patch:
            patch.setattr(argparse.ArgumentParser, "parse_args", stop)
            with pytest.raises(UserError, match="seen"):
                main() if name in OTHERS else main([])
        for action in seen[0]._actions:
            subs = isinstance(action, argparse._SubParsersAction)
            for p in action.choices.values() if subs else [seen[0]]:
                yield name, p


def test_no_program_has_a_number_without_a_range(monkeypatch):
    count = 0
    for name, p in parsers(monkeypatch):
        assert isinstance(p, flags.Parser), name
        for action in p._actions:
            ranged = action.choices or action.type not in (int, float)
            assert ranged, (name, action.option_strings)
            count += action.type is not None
    assert count > 60


@pytest.mark.parametrize("words, said", [
    (["train", "--lr", "nan"], "--lr nan: should be a number from 1e-12 to 10"),
    (["train", "--workers", "1000000"], "--workers 1000000: should be a whole number"),
    (["train", "--plan", "--batch", str(2 ** 31)], "--batch 2147483648: should be"),
    (["train", "--seed", "9" * 23], "--seed 9+: should be"),
    (["sample", "--image", "x", "--q", "y", "--temperature", "nan"], "--temperature nan: should"),
    (["sample", "--image", "x", "--q", "y", "--temperature", "1e-40"], "--temperature 1e-40: sho"),
    (["sample", "--image", "x", "--q", "y", "--top-p", "0"], "--top-p 0: should be"),
    (["eval", "--task", "toy", "--n", "0"], "--n 0: should be"),
    (["eval", "--task", "toy", "--wrong", "-1"], "--wrong -1: should be"),
    (["bench", "--tokens", "1"], "--tokens 1: should be"),
    (["study", "--seeds", "1", "x"], "--seeds x: should be"),
    (["viz", "--pointing", "--n", "1"], "--n 1: should be"),
    (["toy", "--clip-steps", "1e3"], "--clip-steps 1e3: should be a whole number")])
def test_every_program(words, said):
    with pytest.raises(UserError, match=said):
        PROGRAMS[words[0]](words[1:])


def test_exit_status_and_one_line():
    done = subprocess.run([sys.executable, ROOT / "eval.py", "--score", "gqa", "--no"],
                          capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith("error: unrecognized arguments: --no")
