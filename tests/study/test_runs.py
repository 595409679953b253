"""A run comes out twice, goes on where it was stopped, and is the model that its row says; what is
made neutral after training is the part that is named."""
import argparse
import csv
import shutil

import pytest
import torch

from ccra import CCRA, CCRAConfig
from clip import CLIPVision
from core.common import UserError
from core.device import autocast_dtype
from llama import Llama
from study import __main__ as program
from study import protocol, results, runs
from toy.towers import clip_config, llama_config


def command(world, *words):
    """Runs of two and two steps, and 20 questions; the rows of results.csv after them."""
    file = world.out / "results.csv"
    program.main(["run", "--towers", str(world.towers), "--out", str(world.out), "--results",
                  str(file), "--steps", "2", "2", "--questions", "20", "--seeds", "0", *words])
    return results.read(file)


def losses(folder):
    """A stage's log.csv but for speeds."""
    return [row[:4] for row in csv.reader((folder / "log.csv").read_text().splitlines())]


def stop_after(monkeypatch, step):
    """Each stage stops after a step, as if interrupted; 0: no longer."""
    def arguments(*of):
        a = protocol.arguments_of(*of)
        a.stop_after = step
        return a

    monkeypatch.setattr(runs, "arguments_of", arguments)


def test_a_run_comes_out_twice_and_none_is_done_twice(world, one_thread, monkeypatch, capsys):
    rows = command(world, "--only", "ccra", "anchor -2")
    assert [(row["row"], row["seed"], row["config"]) for row in rows] == \
        [("ccra", "0", "--fuser ccra"), ("anchor -2", "0", "anchor_layer=-2")]
    bits = results.bits(rows[0])
    assert float(rows[0]["accuracy"]) == sum(bits) / 20 and len(bits) == 20
    stage2 = world.out / "runs" / "ccra-0" / "stage2"
    before = losses(stage2)
    capsys.readouterr()
    assert command(world, "--only", "ccra") == rows                          # nothing to do
    assert "accuracy" not in capsys.readouterr().out
    again = []
    monkeypatch.setattr(runs, "add", lambda path, row: again.append(row))
    command(world, "--only", "ccra", "--again")
    assert again[0]["right"] == rows[0]["right"] and losses(stage2) == before
    assert results.read(world.out / "results.csv") == rows
    with pytest.raises(UserError, match=r"has runs of 2\+2 steps and 20 questions, not of "
                                        r"2\+2 and 30"):
        command(world, "--only", "llava", "--questions", "30")


def test_rows_that_train_the_projector_alike_share_it(world, one_thread, monkeypatch):
    """Stage 1 without CCRA is the same for all of CCRA's variants, but for the anchor; a row made
    so is one made alone. Not those of a CCRA that is there in stage 1, of another fuser."""
    sharing, alone = ["pwca", "token", "query first"], ["ccra", "anchor -2", "stage1 on", "llava"]

    def trained_alone(name):
        return (protocol.folder_of(name, 0, world.out) / "stage1" / "log.csv").exists()

    def of_stage2():
        return [losses(protocol.folder_of(name, 0, world.out) / "stage2") for name in sharing]

    monkeypatch.setattr(runs, "add", lambda path, row: None)
    command(world, "--only", *alone, *sharing)
    assert [name for name in alone + sharing if trained_alone(name)] == alone
    together = of_stage2()
    command(world, "--only", *sharing, "--again")
    assert of_stage2() == together and len(set(map(str, together))) == len(sharing)
    assert all(trained_alone(name) for name in sharing)
    states = [torch.load(path, weights_only=True) for path in world.out.glob("stage1-*.pt")]
    assert len(states) == 2                                                            # 2 anchors
    assert not any(torch.equal(a, b) for a, b in zip(*(state.values() for state in states)))


def test_every_row_is_the_model_it_says(tmp_path):
    args = argparse.Namespace(steps=(2, 2), out=tmp_path)
    names = [name for name, _ in protocol.plan()]
    assert names.count("ccra") == protocol.SEEDS
    assert names.count("anchor -2") == protocol.SWEEP_SEEDS
    tower, llm = CLIPVision(clip_config(64)[0]), Llama(llama_config(64))
    models, said = {}, {}
    for name in protocol.ROWS | protocol.SWEEPS:
        a = protocol.arguments_of(name, 7, 2, args)
        model = models[name] = runs.build(name, a, tower, llm)
        said[name] = (model.fuser.name, model.fuser.config, model.query,
                      protocol.arguments_of(name, 7, 1, args).mode)
    for name in models:                                                   # no two are the same
        assert [other for other in models if said[other] == said[name]] == [name]
    assert said["kernel 7"][1].kernel_size == 7
    assert said["query first"][2] == "first" and said["stage1 on"][3] == "on"
    first = [models[name].fuser.scorer.q.weight for name in ("ccra", "token")]
    assert torch.equal(*first)    # the same first values, as far as shapes allow


def test_a_run_that_was_stopped_goes_on_bit_for_bit(world, one_thread, monkeypatch):
    args = argparse.Namespace(towers=world.towers, out=world.out / "stopped", steps=(3, 3))
    tower = world.tower.to(autocast_dtype(torch.device("cpu")))
    whole = runs.train_stage(2, "ccra", 1, args, tower, None)
    shutil.rmtree(args.out / "runs")
    stop_after(monkeypatch, 2)
    assert runs.train_stage(2, "ccra", 1, args, tower, None) is None
    stop_after(monkeypatch, 0)
    resumed = runs.train_stage(2, "ccra", 1, args, tower, None)
    assert all(torch.equal(p, q)
               for p, q in zip(whole.parameters(), resumed.parameters(), strict=True))


def test_the_hours_of_a_run_are_those_of_all_its_pieces(world, one_thread, monkeypatch):
    args = argparse.Namespace(towers=world.towers, out=world.out / "pieces", steps=(1, 3),
                              questions=10, again=False)
    stop_after(monkeypatch, 2)
    assert runs.finish("llava", 1, args) is None
    seconds = args.out / "runs" / "llava-1" / "seconds"
    assert 0 < float(seconds.read_text()) < 100
    seconds.write_text("5000\n")
    stop_after(monkeypatch, 0)
    assert 5000 <= int(runs.finish("llava", 1, args)["train_s"]) < 5100


def test_what_is_asked_for_is_run_seed_by_seed():
    args = program.arguments(["run", "--only", "token", "kernel 3", "--seeds", "1", "3"])
    assert runs.chosen(args) == [("token", 1), ("kernel 3", 1), ("token", 3)]
    args = program.arguments(["run", "--pilot", "--seeds", "101"])
    assert runs.chosen(args) == [("ccra", 101), ("llava", 101)]


# --------------------------------------------------------------------------------------------------
# Parts made neutral

def test_parts_made_neutral_after_training(world, one_thread, monkeypatch, capsys):
    """The kept model answers as its row says. What is made neutral is the part that is named: with
    the token norm LPWCA and PWCA go without a trace, LWCA doesn't; with the joint norm none does.
    """
    command(world, "--only", "ccra", "token")
    file = world.out / "results.csv"

    def off(file):
        program.main(["off", "--towers", str(world.towers), "--out", str(world.out),
                      "--questions", "20", "--results", str(file)])
        return results.read(file.parent / "off.csv")

    right = {(row["row"], row["off"]): row["right"] for row in off(file)}
    kept = {row["row"]: row["right"] for row in results.read(file)}
    assert all(right[name, ""] == kept[name] for name in ("ccra", "token"))
    capsys.readouterr()
    off(file)
    assert not capsys.readouterr().out                                         # nothing is left

    monkeypatch.setattr(runs, "ask", what_it_sees)
    monkeypatch.setattr(runs, "score",
                        lambda texts, items: dict(accuracy=0, commit="", right="1"))
    found = off(world.out / "features" / "results.csv")
    same = {(row["row"], row["off"]): float(row["same"]) for row in found}
    assert len(same) == 2 * len(protocol.NEUTRAL)
    assert all(same["token", off] == 1 for off in ("", "lpwca", "pwca", "lpwca pwca"))
    assert same["token", "lwca"] < 0.9 and same["ccra", ""] == 1
    assert all(same["ccra", off] < 0.9 for off in ("lpwca", "pwca", "lpwca pwca", "lwca"))
    # and so it is so
    assert all(float(row["negative_W_lp"]) == float(row["negative_w_p"]) == 0 for row in found)


def what_it_sees(model, tower, items, args):
    """A fuser's features of one picture, for answers."""
    g, config = torch.Generator().manual_seed(0), model.fuser.config
    F_stack = torch.randn(1, config.n_layers, 4, config.vision_dim, generator=g)
    F_t = 0.5 * torch.randn(1, 5, config.text_dim, generator=g)
    with torch.no_grad():
        F_fused, _ = model.fuser(F_stack, F_t, torch.ones(1, 5, dtype=torch.bool))
    some = [*F_fused.mean(-1).flatten(), *F_fused.flatten()[:16]]
    return [f"{x:.2f}" for x in some]


def test_factors_below_0_are_counted():
    torch.manual_seed(0)
    fuser = CCRA(CCRAConfig(text_dim=8, vision_dim=8, n_layers=3, d_hidden=4, norm="token"))
    seen = runs.watch_signs(fuser)
    F_t, mask = 30 * torch.randn(2, 5, 8), torch.ones(2, 5, dtype=torch.bool)
    _, maps = fuser(torch.randn(2, 3, 4, 8), F_t, mask)
    assert seen["W_lp"] == [(1 + maps["W_lp"] < 0).float().mean().item()]
    assert 0.1 < seen["W_lp"][0] < 0.9
