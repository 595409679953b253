"""`python data.py show`."""
import random
import re
import subprocess
import sys

import pytest

import data
from core.common import UserError
from data import IGNORE, SYSTEM, render
from tests.data.helpers import random_record, record, turns_of


def test_paint_marks_exactly_what_is_learnt(tokenizer):
    rng, seen = random.Random(7), 0
    while seen < 50:
        made = random_record(rng)
        answers = turns_of(made)[1]
        if not all(c.isprintable() and c != "\u2581" or c == "\n" for c in "".join(answers)):
            continue
        seen += 1
        painted = data.paint(render(made, tokenizer, "v1"), tokenizer, color=True)
        green = re.findall("\033\\[32m(.*?)\033\\[0m", painted, re.S)
        assert green == [text for answer in answers for text in (" " + answer, "</s>")]
        assert painted.count("\033[7m<image>\033[0m") == ("image" in made)
        assert re.sub("\033\\[[0-9;]*m", "", painted).startswith(f"<s>{SYSTEM} USER:")


def test_show_can_not_drive_the_terminal(tokenizer, capsys):
    samples = [render(record("a \033[31m <image>", "b \033[2J 🙂", image="x.png"), tokenizer)]
    data.show(samples, tokenizer, False, ["record 0"])
    out = capsys.readouterr().out
    assert "\033" not in out
    assert "[<image>]\n‹a \\x1b[31m›" in out and "« b \\x1b[2J 🙂»«</s>»" in out
    ids, n = len(samples[0].ids), sum(label != IGNORE for label in samples[0].labels)
    assert f"{ids} ids" in out and f"supervised {n} ({n / ids:.1%})" in out
    data.show([render(record("Say it.<image>", "a cat", image="x.png"), tokenizer, "plain")],
              tokenizer, False, ["0"])
    assert "not in the text: ‹Say it.›" in capsys.readouterr().out


def test_show_command(world, folders, monkeypatch, capsys):
    def call(*args):
        monkeypatch.setattr(sys, "argv", ["data.py", "show", *map(str, args)])
        data.main()
        return capsys.readouterr().out

    where = [
        "--json", world / "x.json", "--images", world / "images", "--tokenizer", folders["tiny"]]
    out = call(*where, "--n", 2)
    assert "left out 3 of 7" in out and "record 0 (id 'r')" in out
    assert "record 4" in out and "record 5" not in out
    assert "« A cat.»«</s>»" in out and "‹What?›" in out
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert "\033[32m A cat." in call(*where)
    drawn = {call(*where, "--n", 1, "--seed", seed) for seed in range(8)}
    assert len(drawn) > 1 and call(*where, "--n", 1, "--seed", 3) in drawn
    for bad in (where[:-2], where[2:], where + ["--n", 0], where[:-1] + [world]):
        with pytest.raises(UserError):
            call(*bad)


def test_one_line_and_exit_2(world, folders):
    (world / "bad.json").write_text("[")
    done = subprocess.run([sys.executable, data.__file__, "show", "--json", world / "bad.json",
                           "--tokenizer", folders["tiny"]], capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
