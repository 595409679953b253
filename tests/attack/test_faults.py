"""A few of tests.attack.faults, in this process: a disk that fails, or a death, at some event of a
small training. (All of them: python -m tests.attack.faults.)"""
import random
import shutil
from contextlib import suppress

import pytest

import train
from core.common import UserError
from tests.attack import faults as attack
from tests.attack.faults import HOWS, Faults, Killed, differences, flags, traces
from training import curve

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_training_under_faults(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(curve, "plot", attack.no_plot)
    model, out = attack.tiny_model(tmp_path / "model"), tmp_path / "out"
    with Faults(tmp_path / "whole") as faults:
        train.main(flags(model, tmp_path / "whole"))
    whole = traces(tmp_path / "whole")
    assert len(whole) == 9
    rng = random.Random(0)
    moments: dict[str, list[int]] = {}
    for i, (name, _) in enumerate(faults.events, 1):
        moments.setdefault(name, []).append(i)
    assert moments.keys() >= {"open", "write", "save_file", "fsync", "replace", "mkdir", "unlink"}
    any_name = rng.choice(sorted(moments))
    for name, how in (("replace", "dead"), ("write", "ENOSPC"), (any_name, None)):
        at, how = rng.choice(moments[name]), how or HOWS[name][0]
        shutil.rmtree(out, ignore_errors=True)
        with Faults(out, at, how), suppress(UserError, Killed):
            train.main(flags(model, out))
        train.main(flags(model, out))
        assert differences(out, whole) == [], (name, at, how)


def test_the_faults_themselves(tmp_path):
    """What is counted, what fails, what reaches the disk."""
    (tmp_path / "in").mkdir()
    with Faults(tmp_path / "in", 2, "ENOSPC") as faults:
        with pytest.raises(OSError, match="No space left"):
            (tmp_path / "in" / "a").write_text("abcd")
        (tmp_path / "out").write_text("abcd")
        (tmp_path / "in" / "a").replace(tmp_path / "in" / "b")
    assert [name for name, _ in faults.events] == ["open", "write", "replace"]
    assert (tmp_path / "in" / "b").read_text() == "ab" and (tmp_path / "out").read_text() == "abcd"
    with Faults(tmp_path / "in", 1, "dead"), suppress(Killed):
        try:
            (tmp_path / "in" / "b").unlink()
        finally:
            (tmp_path / "in" / "c").mkdir()
    assert [path.name for path in (tmp_path / "in").iterdir()] == ["b"]
