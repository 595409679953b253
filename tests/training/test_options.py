"""train.py's arguments: the paper's recipe, what makes no sense, and what is missing."""
import pytest

import train
from core.common import UserError, run
from training import options


def test_the_recipe_is_table_5s():
    for stage, batch, lr in ((1, 256, 1e-3), (2, 128, 1e-5)):
        args = options.arguments(["--stage", str(stage), "--data", "x"])
        assert (args.batch, args.lr, args.warmup, args.steps) == (batch, lr, 0.03, None)


@pytest.mark.parametrize("words, said", [
    (["--micro", "-1"], "--micro -1: should be a whole number from 1"),
    (["--batch", "0"], "--batch 0"),
    (["--steps", "0"], "--steps 0"), (["--max-length", "-5"], "--max-length -5"),
    (["--save-every", "0"], "--save-every"), (["--keep", "0"], "--keep 0"),
    (["--workers", "-1"], "--workers -1: should be a whole number from 0"), (["--lr", "0"], "--lr"),
    (["--warmup", "2"], "--warmup"), (["--images", "x"], "--images belongs"),
    (["--model", "x"], "--model is what stage 2")])
def test_numbers_and_flags_that_make_no_sense(words, said):
    with pytest.raises(UserError, match=said):
        options.arguments(["--stage", "1", *words])
    args = options.arguments(["--stage", "2", "--world", "llava", "--images", "x"])
    assert args.images == "x"                                                   # of data/stage2


def test_upright_decides_a_run_where_it_is_given():
    """And leaves the settings of runs as they were where it isn't, so that they can go on."""
    class Rows(list):
        sha256 = "0"

    with pytest.raises(UserError, match="--upright belongs to --json or --data"):
        options.arguments(["--stage", "2", "--upright"])
    args = options.arguments(["--stage", "2", "--json", "x"])
    assert "upright" not in train.settings(args, Rows("abc"))
    args.upright = True
    assert train.settings(args, Rows("abc"))["upright"] is True


def test_the_toy_worlds_towers_and_first_stage(tmp_path, monkeypatch):
    """Where they are looked for when nobody says so, and how to make them."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="out/toy/clip: not there yet; `sh toy/retrain.sh`"):
        train.main(["--stage", "1"])
    with pytest.raises(UserError, match="out/toy/llama: not there yet"):
        train.main(["--stage", "1", "--vision", str(tmp_path)])
    with pytest.raises(UserError, match="out/toy/stage1: not there yet; run --stage 1 first"):
        train.main(["--stage", "2"])
    assert not list(tmp_path.iterdir())


def test_what_is_missing_is_said_at_once(tmp_path, monkeypatch, capsys):
    """The paper's command where nothing is: what it looked for, where to get it and how to say
    where it is."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "1")                                   # as torchrun does it
    with pytest.raises(SystemExit) as end:
        run(lambda: train.main(["--stage", "2"]))
    said = capsys.readouterr()
    for name in ("--data", "--model", "prepare", "data/llava_v1_5_mix665k.json", "huggingface.co",
                 "--world toy"):
        assert name in said.err, said.err
    assert end.value.code == 2 and not said.out and not list(tmp_path.iterdir())
