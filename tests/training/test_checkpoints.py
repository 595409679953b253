"""A run that was stopped goes on as if nothing had been, and only where it may."""
import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

import train
from core.common import ROOT, UserError
from tests.training.helpers import log_of, parameters, same_parameters
from training.checkpoints import Checkpoints
from training.damage import signed

pytestmark = pytest.mark.usefixtures("one_thread")


def command(stage1, out, *more):
    """Stage 2 of a few steps of two samples."""
    return ["--stage", "2", "--model", str(stage1), "--out", str(out), "--batch", "2", *more]


def test_train_6_is_train_3_stop_resume(stage1, tmp_path):
    """Stopped and gone on in processes of their own, as a user would: nothing survives but the
    files."""
    flags = ["--steps", "6", "--micro", "1", "--threads", "1"]
    train.main(command(stage1, tmp_path / "whole", *flags))
    for more in (["--stop-after", "3"], []):
        assert not (tmp_path / "parts" / "model.safetensors").exists()
        words = command(stage1, tmp_path / "parts", *flags, *more)
        run = subprocess.run([sys.executable, str(ROOT / "train.py"), *words], capture_output=True,
                             text=True)
        assert run.returncode == 0, (run.returncode, run.stderr)
    assert same_parameters(tmp_path / "whole", tmp_path / "parts")
    assert log_of(tmp_path / "whole") == log_of(tmp_path / "parts")
    assert len(log_of(tmp_path / "whole")) == 6
    one, two = (load_file(tmp_path / out / "checkpoints" / "step-00000006" /
                          "rank-0000.safetensors") for out in ("whole", "parts"))
    assert one.keys() == two.keys() and sum(name.startswith("exp_avg_sq.") for name in one) > 20
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_foreign_checkpoint_is_refused(stage1, tmp_path):
    short = command(stage1, tmp_path, "--workers", "0", "--steps")
    train.main([*short, "2", "--stop-after", "1"])
    with pytest.raises(UserError, match="a run with steps 2, not 3"):
        train.main([*short, "3"])
    state = tmp_path / "checkpoints" / "step-00000001" / "state.json"
    before = json.loads(state.read_text())
    state.write_text(json.dumps(signed({**before, "shapes": {"x": [2]}})))
    with pytest.raises(UserError, match="another model"):
        train.main([*short, "2"])
    state.write_text(json.dumps(before))
    slices = state.with_name("rank-0000.safetensors")
    os.truncate(slices, slices.stat().st_size - 9)
    with pytest.raises(UserError, match="step-00000001: is damaged .*remove it"):
        train.main([*short, "2"])
    slices.unlink()
    with pytest.raises(UserError, match="step-00000001: is damaged .*remove it"):
        train.main([*short, "2"])
    # what a kill left behind is no checkpoint
    shutil.rmtree(tmp_path / "checkpoints" / "step-00000001")
    (tmp_path / "checkpoints" / "step-00000001.tmp").mkdir()
    (tmp_path / "checkpoints" / "step-00000001.tmp" / "state.json").write_text("{")
    (tmp_path / "checkpoints" / "step-00000007").mkdir()       # nor is one that was being removed
    train.main([*short, "2"])
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-00000002"]
    assert (tmp_path / "model.safetensors").exists()


def test_a_resume_has_the_same_flags(stage1, tmp_path):
    """Also those that are only left out now: what was begun is another training."""
    short = command(stage1, tmp_path, "--workers", "0", "--steps", "3")
    train.main([*short, "--norm", "token", "--stop-after", "1"])
    with pytest.raises(UserError, match="is of a run with norm token, not None; remove it"):
        train.main(short)
    train.main([*short, "--norm", "token", "--stop-after", "1"])             # it is there already
    assert [row[0] for row in log_of(tmp_path)] == [1]
    train.main([*short, "--norm", "token"])
    assert json.loads((tmp_path / "train.json").read_text())["model"]["norm"] == "token"


def test_a_json_is_the_same_as_before(stage1, tmp_path):
    turns = [{"from": "human", "value": "Who?"}, {"from": "gpt", "value": "I am"}]
    file = tmp_path / "d.json"
    file.write_text(json.dumps([{"id": str(i), "conversations": turns} for i in range(4)]))
    text = file.read_text()
    short = command(stage1, tmp_path / "out", "--workers", "0", "--steps", "3", "--json", str(file))
    train.main([*short, "--stop-after", "1"])
    file.write_text(text.replace("I am", "We", 1))
    with pytest.raises(UserError, match="is of a run with sha256_of_json [0-9a-f]{64}, not"):
        train.main(short)
    file.write_text(text)
    train.main(short)


HOLD = "import sys; from core.common import Lock; from pathlib import Path; " \
       "held = Lock(Path(sys.argv[1])); print(flush=True); input()"


def test_a_folder_has_one_trainer(stage1, tmp_path):
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], cwd=ROOT, text=True,
                          stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == "\n"
        with pytest.raises(UserError, match="another training writes there"):
            train.main(command(stage1, tmp_path, "--steps", "1"))
        other.communicate("\n")


def test_sigterm_saves_and_leaves(stage1, tmp_path, capsys):
    """What a scheduler sends, to the process and all that it started: the step is finished and
    saved, and the same command goes on to the same end."""
    words = command(stage1, tmp_path, "--batch", "4", "--steps", "40", "--threads", "1",
                    "--save-every", "1000")
    run = subprocess.Popen([sys.executable, str(ROOT / "train.py"), *words], text=True,
                           stdout=subprocess.PIPE, start_new_session=True)
    for line in run.stdout:
        if line.startswith("step 3/"):
            os.killpg(run.pid, signal.SIGTERM)
            break
    rest = run.stdout.read()
    assert run.wait() == 0 and "stopped early" in rest
    [saved] = [p.name for p in (tmp_path / "checkpoints").iterdir()]
    assert 3 <= int(saved[5:]) < 40
    train.main(words)
    assert f"going on after step {int(saved[5:])}" in capsys.readouterr().out
    assert [row[0] for row in log_of(tmp_path)] == list(range(1, 41))
    assert parameters(tmp_path)


def test_old_checkpoints_that_cannot_be_looked_for(tmp_path, monkeypatch, capsys):
    """A disk that doesn't answer for a moment: nothing is lost, but it is said."""
    checkpoints = Checkpoints(tmp_path, keep=1)

    def broken():
        raise UserError("checkpoints: cannot read it (Input/output error)")

    monkeypatch.setattr(checkpoints, "steps", broken)
    checkpoints._prune(3)
    assert "cannot read it (Input/output error); older checkpoints stay" in capsys.readouterr().err
