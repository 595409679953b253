"""Training: accumulation changes nothing, a resume is bit for bit, and each stage touches only what
it should."""
import fcntl
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import warnings
from functools import partial

import pytest
import sentencepiece
import torch
import torch.distributed as dist
from PIL import Image
from safetensors.torch import load_file
from torch.testing._internal.distributed.fake_pg import FakeStore

import data
import train
from ccra import VLM, CCRAConfig
from clip import CLIPVision
from core.common import ROOT, UserError
from core.tokenizer import Tokenizer
from llama import Llama, LlamaConfig
from toy import questions
from toy import world as toy
from training import options, sharding


@pytest.fixture(scope="module")
def stage1(towers, tmp_path_factory):
    out = tmp_path_factory.mktemp("stage1")
    train.main([
        "--stage", "1", "--vision",
        str(towers / "clip"), "--llm",
        str(towers / "llama"), "--out",
        str(out), "--steps", "3", "--batch", "4"])
    return out


def parameters(folder):
    return load_file(folder / "model.safetensors")


def changed(before, after):
    return {name.split(".")[0] for name in after if not torch.equal(before[name], after[name])}


def test_stage_1_trains_the_projector_alone(towers, stage1):
    torch.manual_seed(42)       # train.py's default seed
    tower, llm = CLIPVision.from_pretrained(towers / "clip"), Llama.from_pretrained(towers /
                                                                                    "llama")
    before = VLM.build(tower, llm, CCRAConfig(text_dim=32, vision_dim=16, n_layers=3,
                                              d_hidden=64)).state_dict()
    assert changed(before, parameters(stage1)) == {"projector"}


def test_stage_2_leaves_the_vision_tower_alone(stage1, tmp_path):
    train.main([
        "--stage", "2", "--model",
        str(stage1), "--out",
        str(tmp_path), "--steps", "3", "--batch", "4", "--dtype", "float32"])
    assert changed(parameters(stage1), parameters(tmp_path)) == {"projector", "fuser", "llm"}
    rows = (tmp_path / "log.csv").read_text().splitlines()
    assert rows[0].startswith("step,loss,lr") and [r.split(",")[0]
                                                   for r in rows[1:]] == ["1", "2", "3"]
    assert Image.open(tmp_path / "loss.png").format == "PNG"


@pytest.fixture(scope="module")
def seeded(towers, tmp_path_factory):
    """A language model with a tokenizer of its own, both from seeds alone: nothing in it changes
    with assets/toy. Its matrices are large, so that ten steps change much."""
    folder = tmp_path_factory.mktemp("seeded")
    said = [phrase for halves in questions.PHRASES.values() for half in halves for phrase in half]
    with open(folder / "tokenizer.model", "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(said + toy.KINDS), model_writer=file, model_type="bpe",
            vocab_size=400, byte_fallback=True, normalization_rule_name="identity",
            remove_extra_whitespaces=False, unk_id=0, bos_id=1, eos_id=2, pad_id=-1, num_threads=1,
            minloglevel=2, user_defined_symbols=[data.SYSTEM.replace(" ", "\u2581")])
    torch.manual_seed(1)
    llm = Llama(
        LlamaConfig(vocab_size=400, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=1024,
                    tie_word_embeddings=True, bos_token_id=1, eos_token_id=2))
    for p in llm.parameters():
        if p.ndim == 2:
            p.data.normal_(std=0.2)
    llm.save_pretrained(folder)
    return ["--vision", str(towers / "clip"), "--llm", str(folder)]


GOLDEN = {
    1: [
        6.625288, 6.589047, 6.558465, 6.509178, 6.449803, 6.44675, 6.467709, 6.464921, 6.454645,
        6.395715], 2: [
            6.764438, 6.548511, 6.32046, 6.186037, 5.991753, 5.979524, 5.876437, 5.804268, 5.835008,
            5.828271]}


def test_the_first_ten_steps_are_as_they_were(seeded, tmp_path):
    """Losses of both stages of the embedded world by the recipe (RECIPES["toy", stage]), in
    float32, within 1e-3.

    They change with the recipe, the order of samples, what the loss is divided by, and with
    toy.py's scenes and questions. Then, and only then, write down the new ones, which the failure
    prints.
    """
    def losses(out, *flags):
        train.main([
            *flags, "--out",
            str(tmp_path / out), "--steps", "10", "--dtype", "float32", "--device", "cpu"])
        return [
            float(row.split(",")[1])
            for row in (tmp_path / out / "log.csv").read_text().splitlines()[1:]]

    stages = {1: ["--stage", "1", *seeded], 2: ["--stage", "2", "--model", str(tmp_path / "1")]}
    for stage, flags in stages.items():
        found, close = losses(str(stage), *flags), pytest.approx(GOLDEN[stage], rel=1e-3)
        assert found == close, (stage, found)
        # learning rates that are a fifth lower are seen: the test can fail
        lower = losses(f"{stage}x", *flags, "--lr", str(0.8 * options.RECIPES["toy", stage]["lr"]))
        assert lower[0] == found[0] and lower != close


def test_other_recipes_touch_what_they_say(towers, stage1, tmp_path):
    short = ["--steps", "2", "--batch", "2"]
    stage_1 = [
        "--stage", "1", "--vision",
        str(towers / "clip"), "--llm",
        str(towers / "llama"), *short]
    for mode, parts in (("neutral", {"projector"}), ("on", {"projector", "fuser"})):
        train.main([*stage_1, "--stage1-ccra", mode, "--out", str(tmp_path / mode)])
        assert changed(parameters(stage1), parameters(tmp_path / mode)) == parts
    train.main([
        "--stage", "2", "--model",
        str(stage1), "--train-vision", "--out",
        str(tmp_path / "v"), "--dtype", "float32",
        *short])  # bfloat16 would change all by rounding it
    assert changed(parameters(stage1),
                   parameters(tmp_path / "v")) == {"projector", "fuser", "llm", "vision"}
    with pytest.raises(UserError, match="--stage 2"):
        train.main([*stage_1, "--train-vision"])


def test_variants_of_ccra_can_be_chosen_in_stage_2(stage1, tmp_path):
    """No flag changes a shape; what a variant doesn't use stays as it was, and --query travels with
    the model."""
    for name, flags, still in (("parts", ["--off", "lpwca", "smooth"], ("lpwca.q", "lpwca.k")),
                               ("apart", ["--order", "decoupled", "--norm", "stack"], ("lpwca",)),
                               ("sofar", ["--order", "shuffled", "--query", "sofar"], ())):
        train.main([
            "--stage", "2", "--model",
            str(stage1), "--out",
            str(tmp_path / name), "--steps", "2", "--batch", "2", "--dtype", "float32", *flags])
        before, after = parameters(stage1), parameters(tmp_path / name)
        unmoved = {
            key for key in after
            if key.startswith("fuser.") and torch.equal(before[key], after[key])}
        assert unmoved == {
            key for key in after for part in still if key.startswith(f"fuser.{part}")}
    model = VLM.from_pretrained(tmp_path / "sofar")
    assert model.query == "sofar" and model.fuser.config.order == "shuffled" and model.fuser.config.norm == "joint"


def test_train_6_is_train_3_stop_resume(stage1, tmp_path):
    """In processes of their own, as a user would: nothing survives but the files."""
    def command(out, *more):
        run = subprocess.run([
            sys.executable,
            str(ROOT / "train.py"), "--stage", "2", "--model",
            str(stage1), "--out",
            str(tmp_path / out), "--steps", "6", "--batch", "4", "--micro", "2", "--threads", "1",
            *more], capture_output=True, text=True)
        assert run.returncode == 0, (run.returncode, run.stderr)
    command("whole")
    command("parts", "--stop-after", "3")
    assert not (tmp_path / "parts" / "model.safetensors").exists()
    command("parts")
    whole, parts = parameters(tmp_path / "whole"), parameters(tmp_path / "parts")
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    logs = [[row.split(",")[:4] for row in (tmp_path / out / "log.csv").read_text().splitlines()]
            for out in ("whole", "parts")]
    assert logs[0] == logs[1] and len(logs[0]) == 7
    one, two = (load_file(tmp_path / out / "checkpoints" / "step-00000006" /
                          "rank-0000.safetensors") for out in ("whole", "parts"))
    assert one.keys() == two.keys() and sum(name.startswith("exp_avg_sq.") for name in one) > 20
    assert all(torch.equal(one[name], two[name]) for name in one)


def uneven_samples(tokenizer):
    """8 samples, two of them text only, with answers of 1 to 43 words."""
    samples = []
    for i in range(8):
        scene, image = toy.make_scene(f"cut/{i}"), "x" if i % 4 else ""
        sample = data.render(questions.record([("Describe.", "yes " * (1 + 6 * i))], image=image),
                             tokenizer, "v1")
        pixels = data.preprocess(toy.draw(scene), 32, pad=True) if image else torch.zeros(3, 32, 32)
        samples.append(dict(ids=sample.ids, labels=sample.labels, query=sample.query,
                            pixels=pixels))
    return samples


def test_gradients_do_not_depend_on_how_a_batch_is_cut(stage1):
    """8 samples with answers of very different lengths as 1 x 8, 2 x 4 and 8 x 1 (float32, relative
    1e-5)."""
    model = VLM.from_pretrained(stage1, dtype=torch.float32)
    trained, samples = train.freeze(model, 2), uneven_samples(Tokenizer.from_pretrained(stage1))
    results = []
    for micro in (8, 4, 1):
        model.zero_grad()
        batches = [data.collate(rows) for rows in train.split(samples, micro)]
        loss = train.train_step(model, batches, torch.device("cpu"), torch.float32)
        results.append((loss, {name: p.grad.clone() for name, p in trained.items()}))
    for loss, grads in results[1:]:
        assert abs(loss - results[0][0]) < 1e-5 * loss
        for name, g in grads.items():
            scale = results[0][1][name].norm()
            assert scale > 0 or name.startswith("fuser"), name
            assert (g - results[0][1][name]).norm() <= 1e-5 * scale + 1e-12, name
    # a mean of micro-batch means, which LLaVA takes, is another thing: the test above can fail
    model.zero_grad()
    for rows in train.split(samples, 1):
        train.train_step(model, [data.collate(rows)], torch.device("cpu"), torch.float32)
    other = trained["projector.0.weight"].grad / 8
    assert (other - results[0][1]["projector.0.weight"]).norm() > 0.01 * other.norm()


def test_compiled_blocks_may_be_recomputed(stage1, monkeypatch):
    """Every block is compiled, inside of what is computed twice: two graphs, one for each kind of
    block, and the gradients that come without."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    samples, results = uneven_samples(Tokenizer.from_pretrained(stage1)), []
    for compiled in (False, True):
        model = VLM.from_pretrained(stage1, dtype=torch.float32)
        trained = train.freeze(model, 2)
        if compiled:
            torch._dynamo.reset()
            torch._dynamo.utils.counters.clear()
            train.compile_blocks(model)
            train.recompute(model)
        train.train_step(model, [data.collate(samples)], torch.device("cpu"), torch.float32)
        results.append([p.grad for p in trained.values()])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
    assert all(torch.allclose(*pair, rtol=1e-4, atol=1e-7) for pair in zip(*results, strict=True))


def test_schedule():
    rates = [train.get_lr(step, 1000, 1.0, 0.03) for step in range(1000)]
    assert rates[29] == rates[30] == 1.0 and abs(rates[0] - 1 / 30) < 1e-12
    assert all(a >= b for a, b in zip(rates[30:], rates[31:])) and rates[-1] < 1e-5
    assert abs(train.get_lr(515, 1000, 2.0, 0.03) - 1.0) < 1e-9                 # half of the cosine


def test_every_sample_comes_once_an_epoch():
    steps = list(train.order(10, 6, 4, seed=0))
    assert [len(rows) for rows in steps] == [4, 4, 2, 4, 4, 2]
    assert sorted(sum(steps[:3], [])) == sorted(sum(steps[3:], [])) == list(range(10))
    assert steps[:3] != steps[3:]
    assert steps == list(train.order(10, 6, 4, seed=0)) != list(train.order(10, 6, 4, seed=1))


def test_a_llava_json_trains(stage1, tmp_path):
    """Real files: two pictures, a text-only record and an empty answer that is counted and left
    out."""
    for i in range(2):
        toy.draw(toy.make_scene(f"json/{i}")).save(tmp_path / f"{i}.png")
    turn = lambda q, a: [{"from": "human", "value": q}, {"from": "gpt", "value": a}]
    records = [{"id": "a", "image": "0.png", "conversations": turn("<image>\nWhat?", "A cat.")},
               {"id": "b", "image": "1.png", "conversations": turn("Where?\n<image>", "Top left.")},
               {"id": "c", "conversations": turn("Hello", "Hi")},
               {"id": "d", "image": "1.png", "conversations": turn("<image>\nWhat?", "")}]
    (tmp_path / "d.json").write_text(json.dumps(records))
    command = [
        sys.executable,
        str(ROOT / "train.py"), "--stage", "2", "--model",
        str(stage1), "--json",
        str(tmp_path / "d.json"), "--images",
        str(tmp_path), "--steps", "2", "--batch", "3"]
    run = subprocess.run([*command, "--workers", "1", "--out",
                          str(tmp_path / "out")], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "left out 1 of 4 records" in run.stdout and "record 3" in run.stdout
    assert (tmp_path / "out" / "model.safetensors").exists()
    # found by the reading process, in the first step
    (tmp_path / "1.png").write_bytes(b"not a picture")
    run = subprocess.run([*command, "--workers", "1", "--out",
                          str(tmp_path / "out1")], capture_output=True, text=True)
    assert run.returncode == 2 and "1.png: cannot be read" in run.stderr and len(
        run.stderr.splitlines()) == 1
    assert run.stderr.startswith(f"error: {tmp_path}")
    (tmp_path / "1.png").unlink()
    run = subprocess.run([*command, "--out", str(tmp_path / "out2")], capture_output=True,
                         text=True)
    assert run.returncode == 2 and "1 of 2 pictures" in run.stderr and "Traceback" not in run.stderr
    assert not (tmp_path / "out2").exists()


def test_a_foreign_checkpoint_is_refused(stage1, tmp_path):
    command = ["--stage", "2", "--model", str(stage1), "--out", str(tmp_path), "--batch", "2"]
    train.main([*command, "--steps", "2", "--stop-after", "1"])
    with pytest.raises(UserError, match="a run with steps 2, not 3"):
        train.main([*command, "--steps", "3"])
    state = tmp_path / "checkpoints" / "step-00000001" / "state.json"
    before = json.loads(state.read_text())
    state.write_text(json.dumps({**before, "shapes": {"x": [2]}}))
    with pytest.raises(UserError, match="another model"):
        train.main([*command, "--steps", "2"])
    state.write_text(json.dumps(before))
    slices = state.with_name("rank-0000.safetensors")
    os.truncate(slices, slices.stat().st_size - 9)
    with pytest.raises(UserError, match="step-00000001: is damaged .*remove it"):
        train.main([*command, "--steps", "2"])
    slices.unlink()
    with pytest.raises(UserError, match="step-00000001: is damaged .*remove it"):
        train.main([*command, "--steps", "2"])
    # what a kill left behind is no checkpoint
    shutil.rmtree(tmp_path / "checkpoints" / "step-00000001")
    (tmp_path / "checkpoints" / "step-00000001.tmp").mkdir()
    (tmp_path / "checkpoints" / "step-00000001.tmp" / "state.json").write_text("{")
    (tmp_path / "checkpoints" / "step-00000007").mkdir()       # nor is one that was being removed
    train.main([*command, "--steps", "2"])
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-00000002"]
    assert (tmp_path / "model.safetensors").exists()


def test_a_resume_has_the_same_flags(stage1, tmp_path):
    """Also those that are only left out now: what was begun is another training."""
    command = [
        "--stage", "2", "--model",
        str(stage1), "--out",
        str(tmp_path), "--batch", "2", "--steps", "3"]
    train.main([*command, "--norm", "token", "--stop-after", "1"])
    with pytest.raises(UserError, match="is of a run with norm token, not None; remove it"):
        train.main(command)
    train.main([*command, "--norm", "token", "--stop-after", "1"])             # it is there already
    assert [r.split(",")[0] for r in (tmp_path / "log.csv").read_text().splitlines()[1:]] == ["1"]
    train.main([*command, "--norm", "token"])
    assert json.loads((tmp_path / "train.json").read_text())["model"]["norm"] == "token"


def test_a_json_is_the_same_as_before(stage1, tmp_path):
    turns = [{"from": "human", "value": "Who?"}, {"from": "gpt", "value": "I am"}]
    command = [
        "--stage", "2", "--model",
        str(stage1), "--out",
        str(tmp_path / "out"), "--batch", "2", "--steps", "3", "--workers", "0", "--json",
        str(tmp_path / "d.json")]
    (tmp_path / "d.json").write_text(text := json.dumps([{"id": str(i), "conversations": turns}
                                                         for i in range(4)]))
    train.main([*command, "--stop-after", "1"])
    (tmp_path / "d.json").write_text(text.replace("I am", "We", 1))
    with pytest.raises(UserError, match="is of a run with sha256_of_json [0-9a-f]{64}, not"):
        train.main(command)
    (tmp_path / "d.json").write_text(text)
    train.main(command)


@pytest.mark.parametrize("words, said", [
    (["--micro", "-1"], "--micro -1: should be 1"), (["--batch", "0"], "--batch 0"), (["--steps", "0"], "--steps 0"),
    (["--max-length", "-5"], "--max-length -5"), (["--save-every", "0"], "--save-every"), (["--keep", "0"], "--keep 0"),
    (["--workers", "-1"], "--workers -1: should be 0"), (["--lr", "0"], "--lr"), (["--warmup", "2"], "--warmup"),
    (["--images", "x"], "--images belongs"), (["--model", "x"], "--model is what stage 2")])
def test_numbers_and_flags_that_make_no_sense(words, said):
    with pytest.raises(UserError, match=said):
        options.arguments(["--stage", "1", *words])
    assert options.arguments(["--stage", "2", "--world", "llava", "--images", "x"
                              ]).images == "x"  # of data/stage2


def test_what_is_trained_keeps_its_digits(stage1):
    """Float32 master weights whatever products are in: in bfloat16 a step of 1e-5 would round away.
    """
    model = VLM.from_pretrained(stage1)
    train.save_precision(train.freeze(model, 2), model, torch.bfloat16)
    kinds = {p.requires_grad: p.dtype for p in model.parameters()}
    assert kinds == {True: torch.float32, False: torch.bfloat16}
    assert all(p.dtype == kinds[p.requires_grad] for p in model.parameters())


def test_the_recipe_is_table_5s():
    for stage, batch, lr in ((1, 256, 1e-3), (2, 128, 1e-5)):
        args = options.arguments(["--stage", str(stage), "--data", "x"])
        assert (args.batch, args.lr, args.warmup, args.steps) == (batch, lr, 0.03, None)
    how = train.adamw({"x": torch.nn.Parameter(torch.zeros(1))}, 1.0).defaults
    assert how["weight_decay"] == 0 and how["betas"] == (0.9, 0.999) and how["eps"] == 1e-8


def test_slices_are_summed_in_float32(stage1, monkeypatch):
    """What FSDP is told: gathered in bfloat16, but gradients summed in float32, and CCRA in float32
    altogether."""
    model, seen = VLM.from_pretrained(stage1), {}
    monkeypatch.setattr(sharding, "fully_shard",
                        lambda module, mp_policy, **how: seen.update({module: mp_policy}))
    sharding.share(model, "fsdp", torch.device("cpu"), torch.bfloat16)
    assert all(policy.reduce_dtype == torch.float32 for policy in seen.values())
    assert seen[model].param_dtype == torch.bfloat16 and seen[
        model.fuser].param_dtype == torch.float32
    assert {*model.llm.layers, *model.vision.layers, model.fuser, model} == seen.keys()


def test_copies_and_slices(monkeypatch):
    """Of 8 processes on two machines: each machine's four share one copy, unless said otherwise."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    dist.init_process_group("fake", rank=0, world_size=8, store=FakeStore())
    try:
        for shard_size, shape in ((0, (2, 4)), (2, (4, 2)), (8, (8,))):
            mesh = sharding.layout(torch.device("cpu"), shard_size)
            assert mesh.shape == shape and mesh["shard"].size() == shape[-1]
        with pytest.raises(UserError, match="groups of 3"):
            sharding.layout(torch.device("cpu"), 3)
    finally:
        dist.destroy_process_group()


def test_no_room_beside_the_picture(stage1, tmp_path):
    command = ["--stage", "2", "--model", str(stage1), "--steps", "1", "--batch", "2"]
    rows = VLM.from_pretrained(stage1).picture_rows
    with pytest.raises(UserError, match=f"no room beside the picture's {rows}"):
        train.main([*command, "--max-length", str(rows), "--out", str(tmp_path / "a")])
    (tmp_path / "b").touch()
    with pytest.raises(UserError, match="b: is a file; choose a folder"):
        train.main([*command, "--out", str(tmp_path / "b")])


def test_what_is_counted_is_what_is_learnt(stage1, tmp_path, monkeypatch):
    """A row that is longer than the language model's context is cut there before its tokens are
    counted."""
    words = " ".join(["yes"] * 3000)
    turns = [{"from": "human", "value": "Who?"}, {"from": "gpt", "value": words}]
    (tmp_path / "d.json").write_text(json.dumps([{"id": "1", "conversations": turns}]))
    counted, in_loss, real = [], [], train.total
    monkeypatch.setattr(train, "total",
                        lambda *x, device: counted.append(x) or real(*x, device=device))
    monkeypatch.setattr(
        VLM, "loss", lambda self, states, target: in_loss.append(len(target)) or states.sum() * 0)
    monkeypatch.setattr("ccra.LOSS_ROWS", 10 ** 6)
    train.main([
        "--stage", "2", "--model",
        str(stage1), "--out",
        str(tmp_path / "out"), "--batch", "1", "--steps", "1", "--workers", "0", "--json",
        str(tmp_path / "d.json"), "--max-length", "9999"])
    context = VLM.from_pretrained(stage1).llm.config.max_position_embeddings
    assert in_loss == [counted[1][0]] and 100 < in_loss[0] < context


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_answers_on_the_way(dtype, towers, stage1, tmp_path, capsys, monkeypatch):
    """--ask-every, in either precision; stage 1's answers are those of the model that stage 1
    trains, without CCRA."""
    modes, real = set(), VLM.look
    monkeypatch.setattr(VLM, "look", lambda self, pixels, query, mask, mode="on": modes.add(mode)
                        or real(self, pixels, query, mask, mode))
    common = ["--steps", "2", "--batch", "2", "--ask-every", "2", "--dtype", dtype]
    train.main([
        "--stage", "1", "--vision",
        str(towers / "clip"), "--llm",
        str(towers / "llama"), "--out",
        str(tmp_path / "1"), *common])
    assert modes == {"off"}
    train.main(["--stage", "2", "--model", str(stage1), "--out", str(tmp_path / "2"), *common])
    assert modes == {"off", "on"} and capsys.readouterr().out.count("  step 2: ") == 8


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """A LLaVA json that mixes text-only and picture samples with answers of very different lengths;
    22 records."""
    folder = tmp_path_factory.mktemp("mixed")
    records = []
    for i in range(22):
        said = [{"from": "human", "value": "Describe."},
                {"from": "gpt", "value": "yes " * (1 + 3 * (i % 7))}]
        if i % 3:
            toy.draw(toy.make_scene(f"mixed/{i}")).save(folder / f"{i}.png")
            said[0]["value"] = "<image>\n" + said[0]["value"]
        records.append({"id": i, "conversations": said, **({"image": f"{i}.png"} if i % 3 else {})})
    (folder / "data.json").write_text(json.dumps(records))
    return folder


def go(stage1, mixed, out, *more, processes=1):
    """20 float32 steps in a process of their own, or in several; then log.csv as rows of step,
    loss, lr, norm."""
    launch = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--standalone"
              ] if processes > 1 else []
    command = [
        sys.executable, *launch,
        str(ROOT / "train.py"), "--stage", "2", "--model",
        str(stage1), "--device", "cpu", "--json",
        str(mixed / "data.json"), "--images",
        str(mixed), "--out",
        str(out), "--steps", "20", "--batch", "7", "--threads", "1", "--lr", "1e-3", "--workers",
        "0", "--dtype", "float32", *more]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    # seen once in 35 runs, cause unknown: not in silence
    if processes > 1 and "Signal 6 (SIGABRT)" in run.stderr:
        warnings.warn(f"a two-process run aborted and is given again; it said: {run.stderr}")
        run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    return [[float(x) for x in row.split(",")[:4]]
            for row in (out / "log.csv").read_text().splitlines()[1:]]


def same_curve(one, other):
    assert len(one) == len(other) == 20 and one[-1][1] < one[0][1]
    for a, b in zip(one, other):
        assert a[0] == b[0] and a[2] == b[2]
        assert abs(a[1] - b[1]) < 1e-4 * a[1] and abs(a[3] - b[3]) < 1e-3 * a[3] + 1e-4, (a, b)


def test_processes_and_accumulation_give_one_loss_curve(stage1, mixed, tmp_path):
    """1 process, DDP and FSDP on 2, with accumulation, too. 22 samples in batches of 7: an epoch
    ends with one."""
    one = go(stage1, mixed, tmp_path / "one")
    ddp = ["--parallel", "ddp"]
    runs = dict(cut=(["--micro", "2"], 1), ddp=(ddp, 2), both=([*ddp, "--micro", "2"], 2),
                fsdp=(["--micro", "2"], 2), grad=(["--shard", "grad", "--no-recompute"], 2),
                recomputed=(["--recompute"], 1))
    if os.environ.get("NANOCCRA_BIG"):               # two copies, each in slices over two processes
        runs["hsdp"] = (["--shard-size", "2", "--ask-every", "10"], 4)
    for name, (more, processes) in runs.items():
        same_curve(one, go(stage1, mixed, tmp_path / name, *more, processes=processes))
        ours, theirs = parameters(tmp_path / "one"), parameters(tmp_path / name)
        assert all(torch.allclose(ours[key], theirs[key], atol=2e-4) for key in ours)


def test_a_run_goes_on_with_another_number_of_processes(stage1, mixed, tmp_path):
    """Alone to step 5, sliced over two processes to 9, whole in two to 14, then alone again."""
    one = go(stage1, mixed, tmp_path / "one")
    assert len(go(stage1, mixed, tmp_path / "two", "--stop-after", "5")) == 5
    assert len(go(stage1, mixed, tmp_path / "two", "--stop-after", "9", processes=2)) == 9
    assert len(
        go(stage1, mixed, tmp_path / "two", "--stop-after", "14", "--parallel", "ddp",
           processes=2)) == 14
    assert not (tmp_path / "two" / "model.safetensors").exists()
    assert [p.name for p in sorted((tmp_path / "two" / "checkpoints").iterdir())
            ] == ["step-00000009", "step-00000014"]
    same_curve(one, go(stage1, mixed, tmp_path / "two"))


def test_a_folder_has_one_trainer(stage1, tmp_path):
    with open(tmp_path / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another training writes there"):
            train.main([
                "--stage", "2", "--model",
                str(stage1), "--out",
                str(tmp_path), "--steps", "1", "--batch", "2"])


def test_sigterm_saves_and_leaves(stage1, tmp_path):
    """What a scheduler sends, to the process and all that it started: the step is finished and
    saved, and the same command goes on to the same end."""
    command = [
        sys.executable,
        str(ROOT / "train.py"), "--stage", "2", "--model",
        str(stage1), "--out",
        str(tmp_path), "--steps", "40", "--batch", "4", "--threads", "1", "--save-every", "1000"]
    run = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    for line in run.stdout:
        if line.startswith("step 3/"):
            os.killpg(run.pid, signal.SIGTERM)
            break
    rest = run.stdout.read()
    assert run.wait() == 0 and "stopped early" in rest
    [saved] = [p.name for p in (tmp_path / "checkpoints").iterdir()]
    assert 3 <= int(saved[5:]) < 40
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0 and f"going on after step {int(saved[5:])}" in run.stdout
    assert [int(r.split(",")[0])
            for r in (tmp_path / "log.csv").read_text().splitlines()[1:]] == list(range(1, 41))


def test_a_step_that_is_not_finite_changes_nothing(stage1, tmp_path, monkeypatch, capsys):
    """One spoilt step is left out and said; three in a row end the run."""
    real, bad, overflow = train.train_step, {2}, False

    def spoilt(model, *args, **kwargs):
        spoilt.step += 1
        loss = real(model, *args, **kwargs)
        if overflow and spoilt.step in bad:                              # in the backward alone
            model.projector[0].weight.grad[0, 0] = math.inf
        return float("nan") if spoilt.step in bad and not overflow else loss
    spoilt.step = 0
    monkeypatch.setattr(train, "train_step", spoilt)
    command = ["--stage", "2", "--model", str(stage1), "--batch", "2", "--save-every", "1"]
    for overflow, name, words in ((False, "a", "step 2: loss nan"), (True, "c",
                                                                     "gradient norm inf")):
        spoilt.step = 0
        train.main([*command, "--out", str(tmp_path / name), "--steps", "2"])
        assert words in (said := capsys.readouterr().out) and "train2/" in said
        first, second = (load_file(tmp_path / name / "checkpoints" / f"step-0000000{i}" /
                                   "rank-0000.safetensors") for i in (1, 2))
        assert all(torch.equal(first[name], second[name]) for name in first)
    spoilt.step, bad, overflow = 0, {2, 3, 4}, False
    with pytest.raises(UserError, match="step 4: loss nan.*third step in a row"):
        train.main([*command, "--out", str(tmp_path / "b"), "--steps", "9"])


def test_what_is_missing_is_said_at_once(tmp_path):
    """The paper's command where nothing is: what it looked for, where to get it and how to say
    where it is."""
    run = subprocess.run([
        sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=1", "--standalone",
        str(ROOT / "train.py"), "--stage", "2"], capture_output=True, text=True, cwd=tmp_path)
    for name in ("--data", "--model", "prepare", "data/llava_v1_5_mix665k.json", "huggingface.co",
                 "--world toy"):
        assert name in run.stderr, run.stderr
    assert "step 1/" not in run.stdout and not list(tmp_path.iterdir())


WORKER = """
import sys, time, torch, torch.distributed as dist
sys.path.insert(0, {root!r})
import data, train
from ccra import VLM
from torch.nn.parallel import DistributedDataParallel
torch.set_num_threads(1)
dist.init_process_group("gloo")
model = VLM.from_pretrained({model!r}, dtype=torch.float32)
trained = train.freeze(model, 2)
samples = torch.load({samples!r}, weights_only=True)
share, counting = train.pieces(samples, dist.get_rank(), 2, 3)      # 3 + 1 rows, and 3 + one that doesn't count
batches = [data.collate(rows) for rows in share]
train.train_step(DistributedDataParallel(model), batches, torch.device("cpu"), torch.float32, counting=counting)
if dist.get_rank() == 0:
    torch.save({{name: p.grad for name, p in trained.items()}}, {out!r})
dist.barrier()
time.sleep(0.5)
dist.destroy_process_group()
"""


def test_two_processes_give_the_gradients_of_one(stage1, tmp_path):
    """DDP with accumulation against one process at once: relative 1e-5, text-only samples among the
    others."""
    model = VLM.from_pretrained(stage1, dtype=torch.float32)
    trained, samples = train.freeze(model, 2), uneven_samples(Tokenizer.from_pretrained(stage1))[:7]
    train.train_step(model, [data.collate(samples)], torch.device("cpu"), torch.float32)
    torch.save(samples, tmp_path / "samples.pt")
    (tmp_path / "worker.py").write_text(
        WORKER.format(root=str(ROOT), model=str(stage1), samples=str(tmp_path / "samples.pt"),
                      out=str(tmp_path / "grads.pt")))
    run = subprocess.run([
        sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone",
        str(tmp_path / "worker.py")], capture_output=True, text=True, timeout=300)
    assert (tmp_path / "grads.pt").exists(), run.stderr
    for name, grad in torch.load(tmp_path / "grads.pt", weights_only=True).items():
        assert (grad - trained[name].grad).norm() <= 1e-5 * trained[name].grad.norm() + 1e-12, name
