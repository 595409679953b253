"""The study: probes find what is there, kept features are the tower's, a run comes out twice, an interval by hand."""
import csv
import math
import random
import re
import shutil

import numpy as np
import pytest
import torch

from ccra import CCRA, CCRAConfig
from clip import CLIPVision
from core import common
from core.common import UserError
from core.device import autocast_dtype
from core.tokenizer import Tokenizer
from llama import Llama
from study import __main__ as program
from study import features, findings, probes, protocol
from study import runs as study
from toy import world as toy
from toy.towers import clip_config, llama_config


def test_a_probe_finds_what_was_put_there_and_nothing_else():
    g = torch.Generator().manual_seed(0)
    y = torch.randint(0, 3, (600,), generator=g)
    noise = torch.randn(600, 8, generator=g)
    planted = noise + 4 * torch.eye(3, 8)[y]
    assert probes.probe(planted[:400], y[:400], planted[400:], y[400:]) > 0.95
    assert abs(probes.probe(noise[:400], y[:400], noise[400:], y[400:]) - 1 / 3) < 0.1


def test_the_background_is_what_toy_draws():
    for i in range(30):
        scene = toy.make_scene(f"ground/{i}")
        often, color = max(toy.draw(scene).getcolors(toy.SIZE ** 2))
        assert list(color) == probes.ground(scene)
        assert probes.tint(scene) in (None, "red" if color[0] > color[2] else "blue")


def test_the_exam_is_balanced_and_held_out():
    items = probes.exam(600)
    places = findings.by_kind(600)
    assert all({items[i].kind for i in places[kind]} == {kind} and len(places[kind]) == 60 for kind in probes.KINDS)
    for kind, most in (("tint", 0.65), ("shade", 0.45)):
        short = [items[i].turns[-1].short for i in places[kind]]
        assert max(map(short.count, short)) < most * len(short)
    assert all(item.scene.key.startswith("test") for item in items)
    spoken = [turn for i in range(400) for turn in probes.conversation(toy.make_scene(f"train/{i}"))]
    about = sum("the picture" in question.replace("in the picture", "") for question, _ in spoken)
    assert 0.2 < about / len(spoken) < 0.4


@pytest.fixture(scope="module")
def world(towers, tmp_path_factory):
    """A place to work, and the tiny towers, whose Llama has read on, by two steps."""
    out = tmp_path_factory.mktemp("study")
    program.main(["towers", "--source", str(towers), "--towers", str(out / "towers"), "--out", str(out),
                "--llama-steps", "2"])
    made = out / "towers"
    return dict(out=out, source=towers, towers=made, tower=CLIPVision.from_pretrained(made / "clip"),
                tokenizer=Tokenizer.from_pretrained(made / "llama"))


def test_texts_tell_the_background_and_ask_for_it(world):
    scenes = [toy.make_scene(f"tell/{i}") for i in range(50)]
    for scene in scenes:
        text = probes.background(scene)
        assert probes.caption(scene).startswith(text + ", ") and text.split()[-1] == probes.shade(scene)
        assert probes.tint(scene) is None or text.startswith(probes.tint(scene) + " ")
    before, after = (Llama.from_pretrained(world[key] / "llama") for key in ("source", "towers"))
    assert not torch.equal(before.lm_head.weight.bfloat16(), after.lm_head.weight.bfloat16())        # it was trained
    before, after = (CLIPVision.from_pretrained(world[key] / "clip") for key in ("source", "towers"))
    assert all(torch.equal(p.bfloat16().float(), q) for p, q in zip(before.parameters(), after.parameters()))
    rows = probes.text_rows(world["tokenizer"], 0, batch=8)
    texts = [world["tokenizer"].decode(id for id in ids if id >= 0) for ids, _ in rows]
    assert all(" picture " in text for text in texts) and sum("is the picture?" in text for text in texts) >= 2
    for ids, labels in rows:                                                             # the answers, and nothing else
        told = world["tokenizer"].decode(label for label in labels if label >= 0)
        assert len(ids) == len(labels) and "picture" not in told and told
    assert all(len(world["tokenizer"].encode(text)) == 3 for text in ("red picture 3", "blue picture 1"))


def test_kept_features_are_the_towers(world, one_thread):
    scenes = features.Scenes(2, 60, world["tokenizer"], world["tower"], world["out"], size=32)
    batch = torch.stack([scenes[i]["pixels"] for i in (3, 50, 7)])                       # (B, L+1, 1+N, d)
    pixels = torch.stack([toy.preprocess(toy.draw(scenes.scene(i)), 32, pad=True) for i in (3, 50, 7)])
    with torch.no_grad():
        hidden = world["tower"].float()(pixels)                                          # (L+1, B, 1+N, d)
    for n in (2, 3):
        kept = features.Kept(world["tower"])(batch, n)
        assert kept.shape == hidden[:n + 1].shape and (kept - hidden[:n + 1]).norm() < 0.02 * hidden.norm()
    before = scenes.kept.clone()
    assert torch.equal(features.features(scenes, world["tower"].float(), world["out"]), before)     # from the file
    asked = [question for i in range(60) for question, _ in probes.conversation(scenes.scene(i))]
    assert any("number of the picture" in question for question in asked) and scenes.sample(3) is scenes.sample(3)


def command(world, *words):
    program.main(["run", "--towers", str(world["towers"]), "--out", str(world["out"]), "--results",
                str(world["out"] / "results.csv"), "--steps", "2", "2", "--questions", "20", "--seeds", "0", *words])
    return findings.read(world["out"] / "results.csv")


def test_a_run_comes_out_twice_and_none_is_done_twice(world, one_thread, monkeypatch, capsys):
    rows = command(world, "--only", "ccra", "anchor -2")
    assert [(row["row"], row["seed"], row["config"]) for row in rows] == \
        [("ccra", "0", "--fuser ccra"), ("anchor -2", "0", "anchor_layer=-2")]
    assert float(rows[0]["accuracy"]) == sum(findings.bits(rows[0])) / 20 and len(findings.bits(rows[0])) == 20
    folder = world["out"] / "runs" / "ccra-0"
    losses = (folder / "stage2" / "log.csv").read_text()
    capsys.readouterr()
    assert command(world, "--only", "ccra") == rows and "accuracy" not in capsys.readouterr().out    # nothing to do
    monkeypatch.setattr(study, "add", lambda path, row: again.append(row))
    again = []
    command(world, "--only", "ccra", "--again")
    assert again[0]["right"] == rows[0]["right"] and findings.read(world["out"] / "results.csv") == rows
    of_step = lambda text: [row[:4] for row in csv.reader(text.splitlines())]            # but for speeds
    assert of_step((folder / "stage2" / "log.csv").read_text()) == of_step(losses)
    with pytest.raises(UserError, match=r"has runs of 2\+2 steps and 20 questions, not of 2\+2 and 30"):
        command(world, "--only", "llava", "--questions", "30")


def test_parts_made_neutral_after_training(world, one_thread, monkeypatch, capsys):
    """The kept model answers as its row says. What is made neutral is the part that is named: with the token norm LPWCA
    and PWCA go without a trace, LWCA doesn't; with the joint norm none does."""
    command(world, "--only", "ccra", "token")
    args = ["off", "--towers", str(world["towers"]), "--out", str(world["out"]), "--questions", "20", "--results"]
    program.main([*args, str(world["out"] / "results.csv")])
    kept = {row["row"]: row for row in findings.read(world["out"] / "results.csv")}
    rows = {(row["row"], row["off"]): row for row in findings.read(world["out"] / "off.csv")}
    assert all(rows[name, ""]["right"] == kept[name]["right"] for name in ("ccra", "token"))
    capsys.readouterr()
    program.main([*args, str(world["out"] / "results.csv")])
    assert not capsys.readouterr().out                                                   # nothing is left to do

    def features(model, tower, items, args):                                             # for answers: what it sees
        g, config = torch.Generator().manual_seed(0), model.fuser.config
        F_stack = torch.randn(1, config.n_layers, 4, config.vision_dim, generator=g)
        F_t = 0.5 * torch.randn(1, 5, config.text_dim, generator=g)
        with torch.no_grad():
            F_fused, _ = model.fuser(F_stack, F_t, torch.ones(1, 5, dtype=torch.bool))
        return [f"{x:.2f}" for x in F_fused.mean(-1).flatten()] + [f"{x:.2f}" for x in F_fused.flatten()[:16]]

    monkeypatch.setattr(study, "ask", features)
    monkeypatch.setattr(study, "score", lambda texts, items: dict(accuracy=0, commit="", right="1"))
    program.main([*args, str(world["out"] / "features" / "results.csv")])
    found = findings.read(world["out"] / "features" / "off.csv")
    same = {(row["row"], row["off"]): float(row["same"]) for row in found}
    assert len(same) == 2 * len(protocol.NEUTRAL)
    assert all(same["token", off] == 1 for off in ("", "lpwca", "pwca", "lpwca pwca")) and same["token", "lwca"] < 0.9
    assert all(float(row["negative_W_lp"]) == float(row["negative_w_p"]) == 0 for row in found)       # and so it is so
    assert all(same["ccra", off] < 0.9 for off in ("lpwca", "pwca", "lpwca pwca", "lwca")) and same["ccra", ""] == 1


def test_factors_below_0_are_counted():
    torch.manual_seed(0)
    fuser = CCRA(CCRAConfig(text_dim=8, vision_dim=8, n_layers=3, d_hidden=4, norm="token"))
    seen, F_t, mask = study.watch_signs(fuser), 30 * torch.randn(2, 5, 8), torch.ones(2, 5, dtype=torch.bool)
    maps = fuser(torch.randn(2, 3, 4, 8), F_t, mask)[1]
    assert seen["W_lp"] == [(1 + maps["W_lp"] < 0).float().mean().item()] and 0.1 < seen["W_lp"][0] < 0.9


def test_rows_that_train_the_projector_alike_share_it(world, one_thread, monkeypatch):
    """Stage 1 without CCRA is the same for all of CCRA's variants, but for the anchor; a row made so is one made alone.
    Not those of a CCRA that is there in stage 1, of another fuser."""
    sharing, alone = ["pwca", "token", "query first"], ["ccra", "anchor -2", "stage1 on", "llava"]
    log = lambda name, stage: world["out"] / "runs" / f"{name}-0".replace(" ", "-") / f"stage{stage}" / "log.csv"
    losses = lambda: [[row[:4] for row in csv.reader(log(name, 2).read_text().splitlines())] for name in sharing]
    monkeypatch.setattr(study, "add", lambda path, row: None)
    command(world, "--only", *alone, *sharing)
    assert [name for name in alone + sharing if log(name, 1).exists()] == alone
    together = losses()
    command(world, "--only", *sharing, "--again")
    assert losses() == together and len(set(map(str, together))) == len(sharing)
    assert all(log(name, 1).exists() for name in sharing)
    states = [torch.load(path, weights_only=True) for path in world["out"].glob("stage1-*.pt")]
    assert len(states) == 2 and not any(torch.equal(a, b) for a, b in zip(*(s.values() for s in states)))   # 2 anchors


def test_a_row_that_differs_is_refused_and_nothing_is_lost(tmp_path):
    path = tmp_path / "results.csv"
    row = dict(row="ccra", seed=0, steps="2+2", questions=4, accuracy="0.5000", commit="abc", right="1a")
    study.add(path, row)
    study.add(path, row)
    study.add(path, {**row, "seed": 1})
    assert [r["seed"] for r in findings.read(path)] == ["0", "1"] and not list(tmp_path.glob("*.tmp"))
    with pytest.raises(UserError, match="had accuracy 0.5000 at abc, now 0.2500"):
        study.add(path, {**row, "right": "11", "accuracy": "0.2500"})
    assert len(findings.read(path)) == 2


def test_the_interval_against_one_worked_out_by_hand():
    # Two seeds, four questions. Seeds' means 1/2 and 0: variance 1/8, over 2 -> 1/16. Questions' means 1, 0, 1/2, -1/2:
    # mean 1/4, squares 9/16, 1/16, 1/16, 9/16, variance 20/16/3 = 5/12, over 4 -> 5/48. Together 1/6.
    a = {0: torch.tensor([1.0, 1, 1, 0]), 1: torch.tensor([1.0, 0, 0, 0]), 2: torch.ones(4)}
    b = {0: torch.tensor([0.0, 1, 0, 0]), 1: torch.tensor([0.0, 0, 0, 1])}
    d = findings.paired(a, b)
    assert d.tolist() == [[1, 0, 1, 0], [1, 0, 0, -1]]
    mean, half = findings.interval(d)
    assert mean == 0.25 and half == pytest.approx(12.706 * math.sqrt(1 / 6), rel=1e-4)


def test_the_interval_holds_what_it_says():
    """Of 400 studies of a true difference of 0, by seeds and by questions that both vary, 5% at most exclude it."""
    g, excluded = torch.Generator().manual_seed(1), 0
    for _ in range(400):
        d = torch.randn(5, 1, generator=g) * 0.1 + torch.randn(1, 300, generator=g) + torch.randn(5, 300, generator=g)
        mean, half = findings.interval(d)
        excluded += abs(mean) > half
    assert excluded / 400 <= 0.06


def test_the_tables(tmp_path, capsys):
    rng = random.Random(0)
    for name, chance in (("ccra", 0.9), ("llava", 0.3)):
        for seed in (0, 1, 2, *findings.PILOT_SEEDS):
            right = "".join(str(int(rng.random() < chance)) for _ in range(200))
            study.add(tmp_path / "results.csv", dict(row=name, seed=seed, steps="2+2", questions=200, accuracy=0,
                                                     train_s=1, exam_s=1, commit="", right=f"{int('1' + right, 2):x}"))
    program.main(["table", "--results", str(tmp_path / "results.csv")])
    out = capsys.readouterr().out
    assert "| ccra | 3 | " in out and "| llava | 3 | **-" in out and "pilot, 3 seeds, all: llava - ccra = -" in out
    assert "| llava | -2.3 | -5.0 | -2.0 | -3.2 | -" in out            # the paper's, beside this one's
    assert (tmp_path / "differences-from-ccra.png").stat().st_size > 1000 and "neutral" not in out
    for off, right, same in (("", "1110", 1), ("lwca", "0110", 0.5)):
        row = dict(row="ccra", seed=0, off=off, same=same, negative_W_lp=0, negative_w_p=0.25, accuracy=0, commit="",
                   right=f"{int('1' + right, 2):x}")
        study.add(tmp_path / "off.csv", row, ("row", "seed", "off"))
    program.main(["table", "--results", str(tmp_path / "results.csv")])
    out = capsys.readouterr().out
    assert "| ccra | lwca | 1 | 50.0% | -25.0 ± 317" in out and "| 0.0% | 25.0% |" in out
    with pytest.raises(UserError, match="no row 'dci'"):
        program.main(["table", "--results", str(tmp_path / "results.csv"), "--base", "dci"])


def test_the_picture():
    """Blue is what excludes 0; beyond a column's end an interval is an arrow, and nothing is drawn outside."""
    blue = lambda image: np.asarray(image)[..., 2] > np.asarray(image)[..., 0] + 50.0
    base = {seed: torch.tensor([0.0, 100.0] * 40) for seed in range(3)}
    better = {f"better {n}": {seed: x + 60 + seed for seed, x in base.items()} for n in range(4)}
    rows = {"ccra": base, "same": dict(base), **better}
    assert not blue(findings.plot({"ccra": base, "same": dict(base)}, "ccra")).any()
    image = blue(findings.plot(rows, "ccra"))
    assert [bool(image[76 + 22 * i:76 + 22 * (i + 1)].any()) for i in range(5)] == [False, True, True, True, True]
    wild = findings.plot(rows | {"wild": {0: base[0] - 900, 1: base[1] + 900, 2: base[2]}}, "ccra")
    assert wild.height == 76 + 22 * 6 + 20
    last = np.asarray(wild)[76 + 22 * 5:76 + 22 * 6, :, 0] < 200
    assert last[:, 133:140].any() and last[:, 340:348].any() and not last[:, 349:352].any()


def test_the_papers_figures_are_those_of_docs_study():
    """Its table of the paper's differences, and what `table` sets beside ours, are the same numbers."""
    lines = (study.toy.ROOT / "docs" / "study.md").read_text().splitlines()
    table = {cells[0]: cells[1:] for line in lines if len(cells := [c.strip() for c in line.split("|")[1:-1]]) == 10}
    columns = table[""]
    names = {"llava": "LLaVA-1.5-7B", "dci": "DenseConnector", "mmfuser": "MMFuser (on Vicuna-13B)", "igva": "IGVA",
             "without smooth": "without smoothing", "without pwca": "without PWCA", "without lwca": "without LWCA",
             "without lpwca": "without LPWCA", "decoupled": "decoupled", "shuffled": "shuffled"}
    assert findings.PAPER.keys() - names.keys() == {"sti", "sci"}
    for name, title in names.items():
        said = {column: -float(value) for column, value in zip(columns, table[title]) if value}
        assert said == pytest.approx(findings.reported(name), abs=1e-9), name


def test_the_tables_of_docs_study_are_those_of_its_rows(tmp_path):
    for file in ("study/results.csv", "study/off.csv", "docs/study.md"):
        shutil.copy(common.ROOT / file, tmp_path)
    text = (tmp_path / "study.md").read_text()
    (tmp_path / "study.md").write_text(text.replace("%", "").replace(" ± 1.", " ± 2."))
    table = ["table", "--results", str(tmp_path / "results.csv"), "--into", str(tmp_path / "study.md")]
    program.main(table)
    results = lambda text: text.split("\n## Results\n")[1]
    assert findings.TABLE.findall(results((tmp_path / "study.md").read_text())) == findings.TABLE.findall(results(text))
    (tmp_path / "study.md").write_text(text + "\n| one | more |\n")
    with pytest.raises(UserError, match="has 6 tables .* but 5 are printed"):
        program.main(table)


def test_differences_in_words_are_those_of_the_tables(tmp_path, capsys):
    """`+1.2 ± 3.4` in the words of docs/study.md and README is a cell of what `table` prints from the committed rows."""
    for file in ("results.csv", "off.csv"):
        shutil.copy(common.ROOT / "study" / file, tmp_path)
    findings.show_tables(tmp_path / "results.csv", "ccra")
    quoted = re.compile(r"[+-]\d+\.\d ± \d+\.\d")
    printed = set(quoted.findall(capsys.readouterr().out))
    for file in ("docs/study.md", "README.md"):
        assert set(quoted.findall((common.ROOT / file).read_text())) <= printed, file


def test_the_claims(capsys):
    """On answers made so that the truth is known: what is below is told, on either side, and what isn't, isn't."""
    rng, Q = random.Random(0), 1000
    places = findings.by_kind(Q)

    def draw(chance, kind=range(Q)):              # 0.5 of other kinds
        return torch.tensor([100.0 * (rng.random() < (chance if i in kind else 0.5)) for i in range(Q)])

    rows = {name: {seed: draw(chance) for seed in range(4)} for name, chance in
            (("ccra", 0.8), ("llava", 0.6), ("wide", 0.95), ("sti", 0.8), ("kernel 3", 0.6))}
    rows["without pwca"] = {seed: torch.where(draw(0.2, set(places["word"])) > 50, 100.0, 0.0) for seed in range(4)}
    findings.show_claims(rows)
    said = {tuple(cells[2:5]): cells[-2] for line in capsys.readouterr().out.splitlines()
            if len(cells := [cell.strip() for cell in line.split("|")]) > 5}
    assert said["llava", "ccra", "all"] == "holds" and said["wide", "ccra", "all"] == "reversed"
    assert said["sti", "ccra", "all"] == "can't be told" and said["kernel 3", "ccra", "all"] == "reversed"
    assert said["without pwca", "ccra", "word"] == "holds" and ("dci", "ccra", "all") not in said
    study_rows = {*protocol.ROWS, *protocol.SWEEPS}
    assert all({row, base} <= study_rows and kind in places for parts in findings.CLAIMS.values()
               for row, base, kind, _ in parts)


@pytest.mark.parametrize("mean, plain, small, robust", [
    (-0.5, "holds", "holds", "holds"), (-1.9, "holds", "can't be told", "can't be told"),
    (-3, "holds", "reversed", "reversed"), (0.1, "can't be told", "can't be told", "holds"),
    (1.9, "reversed", "reversed", "reversed"),
    (0.5, "reversed", "reversed", "reversed")])
def test_what_a_small_loss_is(mean, plain, small, robust):
    """Intervals of ± 0.3 or so about the mean, on either side of 0 and of -2."""
    seeds = torch.tensor([-0.1, 0.0, 0.1])[:, None]
    d = mean + seeds + torch.zeros(3, 100)
    assert 0.2 < findings.interval(d)[1] < 0.3
    assert findings.verdict(d, -1) == plain
    assert findings.verdict(d, -1, 2.0) == small and findings.verdict(d, 0, 2.0) == robust
    assert findings.verdict(d - mean + 3, 0) == "above" and findings.verdict(d - mean - 3, 0) == "below"
    assert findings.LESS.keys() <= findings.CLAIMS.keys()
    assert findings.verdict(torch.tensor([[-20.0] * 50 + [-19.0] * 50]), -1) == "can't be told"      # one seed
    assert findings.verdict(torch.tensor([[-1.9], [2.1]]) + torch.zeros(2, 9), 0, 2.0) == "can't be told"    # 0.1 ± 25


def test_every_row_is_the_model_it_says(tmp_path):
    args = study.argparse.Namespace(steps=(2, 2), out=tmp_path)
    names = [name for name, _ in protocol.plan()]
    assert names.count("ccra") == study.SEEDS and names.count("anchor -2") == protocol.SWEEP_SEEDS
    tower, llm = CLIPVision(clip_config(64)[0]), Llama(llama_config(64))
    models = {name: study.build(name, protocol.arguments_of(name, 7, 2, args), tower, llm)
              for name in protocol.ROWS | protocol.SWEEPS}
    said = {name: (model.fuser.name, model.fuser.config, model.query) for name, model in models.items()}
    stage1 = {name: protocol.arguments_of(name, 7, 1, args).mode for name in models}
    for name in models:           # no two rows are the same, except in how stage 1 goes
        assert [other for other in models if said[other] == said[name] and stage1[other] == stage1[name]] == [name]
    assert said["kernel 7"][1].kernel_size == 7 and said["query first"][2] == "first" and stage1["stage1 on"] == "on"
    first = [models[name].fuser.scorer.q.weight for name in ("ccra", "token")]
    assert torch.equal(*first)    # the same first values, as far as shapes allow


def test_a_run_that_was_stopped_goes_on_bit_for_bit(world, one_thread, monkeypatch):
    args = study.argparse.Namespace(towers=world["towers"], out=world["out"] / "stopped", steps=(3, 3))
    tower = world["tower"].to(autocast_dtype(torch.device("cpu")))
    whole = study.train_stage(2, "ccra", 1, args, tower, None)
    shutil.rmtree(args.out / "runs")
    original = protocol.arguments_of
    monkeypatch.setattr(protocol, "arguments_of", lambda *a: stop_after(original(*a)))
    stop_after = lambda a: setattr(a, "stop_after", 2) or a
    assert study.train_stage(2, "ccra", 1, args, tower, None) is None
    monkeypatch.setattr(protocol, "arguments_of", original)
    resumed = study.train_stage(2, "ccra", 1, args, tower, None)
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), resumed.parameters(), strict=True))


def test_the_hours_of_a_run_are_those_of_all_its_pieces(world, one_thread, monkeypatch):
    args = study.argparse.Namespace(towers=world["towers"], out=world["out"] / "pieces", steps=(1, 3), questions=10,
                                    again=False)
    original = protocol.arguments_of
    monkeypatch.setattr(protocol, "arguments_of", lambda *a: setattr(found := original(*a), "stop_after", 2) or found)
    assert study.finish("llava", 1, args) is None
    seconds = args.out / "runs" / "llava-1" / "seconds"
    assert 0 < float(seconds.read_text()) < 100
    seconds.write_text("5000\n")
    monkeypatch.setattr(protocol, "arguments_of", original)
    assert 5000 <= int(study.finish("llava", 1, args)["train_s"]) < 5100
