"""A training that would learn nothing says so: before the first step where that can be known, at
the step where it can't."""
import json
import re

import pytest
import torch
from safetensors.torch import load_file

import train
from core.common import UserError
from core.tokenizer import Tokenizer
from tests.training.helpers import log_of, parameters
from tests.training.records import LLM, make, make_world, noise, record
from training import before
from training.prepared import Prepared

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def uneven(tmp_path):
    """Ten records: short ones, with a long answer, with a long question; as json, and prepared."""
    (tmp_path / "images").mkdir()
    noise(tmp_path / "images" / "a.png")
    records = [record("<image>\nHow?", "yes", image="a.png")] * 4
    records += [record("How?", "yes " * 200), record("<image>\nHow?", "yes " * 200, image="a.png")]
    records += [record("How " * 200, "yes")] * 4
    (tmp_path / "x.json").write_text(json.dumps(records))
    make(tmp_path)
    return tmp_path


def flags(model, world, out, *more):
    return ["--stage", "2", "--model", str(model), "--out", str(world / out), "--batch", "2",
            "--workers", "0", *more]


def both(world):
    return {"json": ["--json", str(world / "x.json"), "--images", str(world / "images")],
            "data": ["--data", str(world / "out")]}


def test_answers_that_are_cut_are_counted(stage1, uneven, capsys):
    for out, given in both(uneven).items():
        train.main(flags(stage1, uneven, out, *given, "--max-length", "150", "--stop-after", "1"))
        said = capsys.readouterr().err
        assert "warning: of 10 samples 2 lose a part of their answers beyond 150 positions" in said
        assert "4 of them a picture's, and 4 lose all: nothing is learnt from these" in said
        with pytest.raises(UserError, match="10 samples 0 lose a part .*10 lose all.*a larger --m"):
            train.main(flags(stage1, uneven, out + "2", *given, "--max-length", "6"))
        assert not (uneven / (out + "2")).exists()
    report = json.loads((uneven / "out" / "report.json").read_text())
    assert report["cut"]["some"] == report["cut"]["all"] == 0 and "2048" in report["cut"]["what"]


def test_the_two_counts_are_one(tmp_path):
    make_world(tmp_path)
    make(tmp_path)
    prepared = Prepared(tmp_path / "out", None, Tokenizer.from_pretrained(LLM), "v1", 28)
    for length in (40, 60, 90, 110, 150, 2048):
        slow = before.Cut()
        for i in range(len(prepared)):
            slow.count(*before.learnt(prepared.sample(i), length, 36))
        assert vars(prepared.cut(length, 36)) == vars(slow)
    assert slow.some == slow.all == 0


def test_prepare_counts_for_the_usual_length(tmp_path, monkeypatch):
    monkeypatch.setattr("training.reading.USUAL", (40, 36))
    monkeypatch.setattr("training.prepare.USUAL", (40, 36))
    make_world(tmp_path)
    said = make(tmp_path)
    cut = json.loads((tmp_path / "out" / "report.json").read_text())["cut"]
    prepared = Prepared(tmp_path / "out", None, Tokenizer.from_pretrained(LLM), "v1", 28)
    assert (cut["some"], cut["all"]) == (prepared.cut(40, 36).some, prepared.cut(40, 36).all)
    assert cut["some"] > 9 and cut["all"] > 9
    assert any(line.startswith(f"warning: of {len(prepared)} samples {cut['some']} lose") for line
               in said)


def test_a_json_that_is_too_long_to_count(stage1, uneven, monkeypatch, capsys):
    monkeypatch.setattr(before, "MAX_RENDERED", 9)
    train.main(flags(stage1, uneven, "o", *both(uneven)["json"], "--stop-after", "1"))
    assert "was not counted" in capsys.readouterr().err


def test_a_step_without_a_supervised_token(stage1, uneven, capsys, monkeypatch):
    """Nothing is updated, momentum neither; the third in a row ends the run."""
    alone = flags(stage1, uneven, "o", *both(uneven)["json"], "--max-length", "150", "--dtype",
                  "float32", "--batch", "1", "--seed")
    monkeypatch.setattr(train, "order", lambda *_: iter([[0], [6], [7], [1]]))
    train.main([*alone, "1", "--steps", "4", "--save-every", "1", "--keep", "9"])
    said = capsys.readouterr().out
    assert said.count("not one supervised token; not updated; samples record ") == 2
    assert [str(row[1]) for row in log_of(uneven / "o")[1:3]] == ["nan", "nan"]
    folders = [uneven / "o" / "checkpoints" / f"step-0000000{i}" / "rank-0000.safetensors"
               for i in (1, 2, 3, 4)]
    one, two, three, four = map(load_file, folders)
    assert all(torch.equal(one[key], x[key]) for key in one for x in (two, three))
    assert not all(torch.equal(one[key], four[key]) for key in one)
    assert (uneven / "o" / "loss.png").exists() and parameters(uneven / "o")
    monkeypatch.setattr(train, "order", lambda *_: iter([[0], [6], [7], [8], [1]]))
    with pytest.raises(UserError, match="step 4: not one supervised token.*third step in a row: "
                                        "give a larger --max-length"):
        train.main([*alone, "2", "--steps", "5", "--out", str(uneven / "p")])


def test_pictures_of_a_prepared_folder_that_are_gone(stage1, uneven, capsys):
    (uneven / "elsewhere").mkdir()
    with pytest.raises(UserError, match="1 of 1 pictures are missing under .*elsewhere; first: "
                                        "'a.png' of record 0 .id 'r'.; say where"):
        train.main(flags(stage1, uneven, "o", *both(uneven)["data"], "--images",
                         str(uneven / "elsewhere")))
    assert not (uneven / "o").exists()


@pytest.mark.parametrize("n, batch, steps, said", [
    (20, 128, None, "20 samples make 1 step of at most 128: .*--batch 4 --steps 50 for ten"),
    (1, 128, None, "1 samples make 1 step .*--batch 1 --steps 10"), (20, 2, None, "10 steps"),
    (22, 2, None, ""), (20, 128, 50, "")])
def test_a_small_set_in_large_batches(n, batch, steps, said):
    class Args:
        world = "llava"
    Args.batch, Args.steps = batch, steps
    lines = before.few_steps(Args, n)
    assert bool(lines) == bool(said)
    if said:
        assert re.search(said, lines[0])
