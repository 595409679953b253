"""study.starts: which programs make a row, and what the table makes of it."""
import json
from types import SimpleNamespace

import pytest

from study import starts
from training.options import arguments


@pytest.fixture
def called(monkeypatch, tmp_path):
    """What would be run; trainings leave what their table's row is made of."""
    commands = []

    def call(program, *words):
        commands.append((program, *words))
        if program == "eval.py":
            return json.dumps({"accuracy": 0.25})
        out = tmp_path / words[words.index("--out") + 1]
        (out / "checkpoints" / "step-00000009").mkdir(parents=True, exist_ok=True)
        (out / "log.csv").write_text("step,samples_per_s\n1,32\n2,16\n")
        (out / "checkpoints" / "step-00000009" / "state.json").write_text(
            json.dumps({"shapes": {"a": [3, 4], "b": [5]}}))
        (out / "fuser.safetensors").write_bytes(b"x" * 250_000)
        if "--lora" in words:
            (out / "nanoccra.json").write_text("{}")
        return ""

    monkeypatch.setattr(starts, "call", call)
    monkeypatch.setattr(starts, "FILE", tmp_path / "starts.csv")
    return commands


def test_rows(called, tmp_path, capsys):
    args = SimpleNamespace(out=tmp_path, seed=3, steps=7, threads=1, questions=10)
    row = starts.measure("lora", args)
    assert [command[0] for command in called] == ["train.py"] * 3 + ["eval.py"]
    first, llava, lora, asked = called
    assert first[first.index("--fuser") + 1] == "llava" and "llava-1-3" in llava[4]
    assert lora[lora.index("--seed") + 1] == "1003" and "--adapter" in asked
    assert asked[asked.index("--model") + 1].endswith("llava-3")
    for command in called[:3]:
        arguments(list(command[1:]))                    # train.py takes it
    assert row == dict(row="lora", seed=3, steps=7, accuracy="0.2500", minutes="0.1", trained=17,
                       saved_mb="0.2")
    starts.add(row)
    starts.add({**row, "accuracy": "0.5000"})           # the same once more, in its place
    starts.main(["--table"])
    assert "| ... LoRA 16, fuser, projector | 50.0% | 0.1 | 17 | 0.2 |" in capsys.readouterr().out


def test_every_row_is_a_training(called, tmp_path):
    args = SimpleNamespace(out=tmp_path, seed=0, steps=7, threads=1, questions=10)
    for name in starts.ROWS:
        starts.train(name, args)
    for command in called:
        arguments(list(command[1:]))
