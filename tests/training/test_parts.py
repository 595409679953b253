"""What is trained, by name: CCRA in a LLaVA's place with --train, LoRA and rates of its own, alone
and in several processes; what comes out is an adapter."""
import json

import pytest
import torch
from safetensors.torch import load_file

import train
from ccra import VLM
from core.common import UserError
from eval import load_model
from tests.core.helpers import worded_llava
from tests.training.helpers import log_of, mixed_json
from tests.training.test_sharding import torchrun
from training import adapters

pytestmark = pytest.mark.usefixtures("one_thread")
STEPS = 8
LORA = ["--lora", "4"]
TOGETHER = {"ddp": ["--parallel", "ddp"], "fsdp": ["--parallel", "fsdp"]}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A plain LLaVA of ours, stored in bfloat16, and flags to train CCRA in its place."""
    folder = tmp_path_factory.mktemp("base")
    worded = worded_llava(folder)
    plain = VLM.from_pretrained(worded / "hf").bfloat16()
    plain.save_pretrained(folder / "plain", tokenizer_file=worded / "hf" / "tokenizer.model")
    return folder


@pytest.fixture(scope="module")
def flags(base, tmp_path_factory):
    mixed = mixed_json(tmp_path_factory.mktemp("mixed"))
    return ["--model", str(base / "plain"), "--fuser", "ccra", "--device", "cpu", *mixed, "--steps",
            str(STEPS), "--batch", "7", "--micro", "3", "--threads", "1", "--lr", "1e-2",
            "--lr-projector", "1e-3", "--workers", "0", "--dtype", "float32"]


@pytest.fixture(scope="module")
def runs(flags, tmp_path_factory):
    """Of LoRA: alone, with recomputation, in two pieces, in two processes."""
    out = tmp_path_factory.mktemp("runs")
    for name, more in {"one": [], "recompute": ["--recompute"]}.items():
        train.main([*flags, *LORA, "--out", str(out / name), *more])
    train.main([*flags, *LORA, "--out", str(out / "parts"), "--stop-after", "3"])
    train.main([*flags, *LORA, "--out", str(out / "parts")])
    jobs = [[*flags, *LORA, "--out", str(out / name), *more] for name, more in TOGETHER.items()]
    (out / "jobs.json").write_text(json.dumps(jobs))
    torchrun(2, "-m", "tests.training.pair", out / "jobs.json")
    return out


def tensors(folder):
    found = {}
    for name in ("adapter_model.safetensors", "fuser.safetensors"):
        found |= load_file(folder / name)
    return found


@pytest.mark.parametrize("name", ["recompute", *TOGETHER])
def test_one_curve(runs, name):
    one, other = log_of(runs / "one"), log_of(runs / name)
    assert len(one) == len(other) == STEPS and one[-1][1] < one[0][1]
    for a, b in zip(one, other):
        assert a[0] == b[0] and a[2] == b[2]
        assert abs(a[1] - b[1]) < 1e-4 * a[1] and abs(a[3] - b[3]) < 1e-3 * a[3] + 1e-4, (a, b)
    ours, theirs = tensors(runs / "one"), tensors(runs / name)
    assert ours.keys() == theirs.keys()
    assert all(torch.allclose(ours[key], theirs[key], atol=2e-3) for key in ours)


def test_going_on_gives_the_same_bits(runs):
    one, parts = tensors(runs / "one"), tensors(runs / "parts")
    assert all(torch.equal(one[key], parts[key]) for key in one)
    assert log_of(runs / "one") == log_of(runs / "parts")


def test_what_is_saved(runs, base):
    """Only what was learnt, in the checkpoints, too; the base isn't touched."""
    files = {p.name for p in (runs / "one").iterdir()}
    assert not any(name.startswith("model") or name == "config.json" for name in files)
    names = set(load_file(next(runs.glob("one/checkpoints/*8/rank-0000.safetensors"))))
    assert not any("vision" in name for name in names)
    assert {name for name in names if name.startswith("weight.llm")} == {
        f"weight.llm.layers.{i}.{part}.lora_{x}" for i in (0, 1) for x in "AB" for part in (
            "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
            "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")}
    model, *_ = load_model(base / "plain", "cpu", "float32", adapter=runs / "one")
    plain, *_ = load_model(base / "plain", "cpu", "float32")
    assert model.fuser.name == "ccra" and not torch.equal(
        model.llm.layers[0].mlp.up_proj.weight, plain.llm.layers[0].mlp.up_proj.weight)
    assert torch.equal(model.llm.embed_tokens.weight, plain.llm.embed_tokens.weight)
    about = json.loads((runs / "one" / "nanoccra.json").read_text())
    assert about["trained"] == ["fuser", "lora", "projector"]
    assert about["lora"] == {"r": 4, "alpha": 8.0} and about["base"]["path"].endswith("plain")


def test_before_anything_is_learnt_it_is_llava(base, flags, tmp_path):
    """A rate of next to nothing: the adapter's answers are the base's."""
    still = [*flags, "--lr", "1e-12", "--lr-projector", "1e-12", "--steps", "1"]
    train.main([*still, *LORA, "--out", str(tmp_path)])
    plain = VLM.from_pretrained(base / "plain", dtype=torch.float32)
    model = adapters.put(VLM.from_pretrained(base / "plain", dtype=torch.float32), tmp_path)
    ids = torch.tensor([[1, -200, 5, 6, 7]])
    given = (torch.randn(1, 3, 12, 12), ids, ids[:, 2:], torch.ones(1, 3, dtype=torch.bool))
    with torch.no_grad():
        torch.testing.assert_close(model(*given), plain(*given), atol=1e-5, rtol=1e-5)


def test_the_language_model_stays_as_it_is_stored(base, flags):
    """bfloat16 in memory, though products are float32; a stage 2 of the usual kind widens it."""
    for more, narrow in ((["--train", "fuser", "projector"], True), (LORA, True), ([], False)):
        args = train.arguments([*flags, *more])
        model, tokenizer = train.build(args)
        run = train.begin(args, model, tokenizer, train.open_dataset(args, tokenizer, 12),
                          torch.device("cpu"))
        up = run.vlm.llm.layers[0].mlp.up_proj
        assert (up.weight.dtype == torch.bfloat16) == narrow
        assert all(p.dtype == torch.float32 for p in run.trained.values())
        peaks = {group["peak"]: len(group["params"]) for group in run.optimizer.param_groups}
        assert set(peaks) == {1e-2, 1e-3} and peaks[1e-3] == 4
        parts = {name.partition(".")[0] for name in run.trained}
        assert parts == {"fuser", "projector", "llm"} - ({"llm"} if more == ["--train", "fuser",
                                                                            "projector"] else set())


def test_start_kept(stage1, flags, tmp_path):
    """Stage 2 of ours begins as [0 | Wa + Wb]: the first step's loss is stage 1's answer."""
    own = [*flags, "--model", str(stage1), "--steps", "1"]
    model, _ = train.build(train.arguments([*own, "--start", "kept"]))
    whole = VLM.from_pretrained(stage1)
    left, right = model.projector[0].weight.chunk(2, dim=1)
    assert not left.any()
    assert torch.equal(right, sum(whole.projector[0].weight.chunk(2, dim=1)))
    ids = torch.tensor([[1, -200, 5, 6, 7]])
    given = (torch.randn(1, 3, 32, 32), ids, ids[:, 2:], torch.ones(1, 3, dtype=torch.bool))
    with torch.no_grad():
        torch.testing.assert_close(model(*given), whole(*given, mode="off"), atol=1e-5, rtol=1e-4)
    train.main([*own, "--start", "kept", "--out", str(tmp_path)])
    with pytest.raises(UserError, match="is of a run with start kept, not None"):
        train.main([*own, "--out", str(tmp_path)])
    with pytest.raises(UserError, match="isn't of a stage 1 without CCRA"):
        train.main([*own, "--model", str(tmp_path), "--start", "kept"])


def test_towers_that_are_trained_make_a_model(flags, tmp_path):
    more = ["--steps", "1", "--train", "llm", "vision", "projector", "--out", str(tmp_path)]
    train.main([*flags, *more])
    assert VLM.from_pretrained(tmp_path).fuser.name == "ccra"
    assert not (tmp_path / "nanoccra.json").exists()


def test_lora_beside_a_tower_that_is_trained_is_merged(base, flags, tmp_path):
    """A tower's weights are no adapter, so the model is written, LoRA in its weights."""
    train.main([*flags, *LORA, "--steps", "2", "--train", "projector", "vision", "--out",
                str(tmp_path)])
    model, plain = VLM.from_pretrained(tmp_path), VLM.from_pretrained(base / "plain").float()
    for part in ("self_attn.q_proj", "mlp.up_proj"):
        name = f"layers.1.{part}.weight"
        assert not torch.equal(model.llm.get_parameter(name), plain.llm.get_parameter(name))
    assert torch.equal(model.llm.embed_tokens.weight, plain.llm.embed_tokens.weight)


@pytest.mark.parametrize("more, words", [
    (["--lora", "4", "--train", "llm"], "choose one"), (["--lora", "0"], "--lora"),
    (["--lora", "40000"], "LoRA of rank 40000: should be from 1 to 48"),
    (["--lora-alpha", "3"], "belongs to --lora"),
    (["--train", "projector", "--lr-fuser", "1"], "the fuser isn't trained"),
    (["--stage", "1", "--train", "projector"], "belongs to --stage 2"),
    (["--fuser", "llava", "--train", "fuser"], "nothing is left to train"),
    (["--fuser", "sci"], "DenseConnector can't start from plain LLaVA"),
    (["--fuser", "llava", "--start", "kept"], "is for CCRA")])
def test_what_makes_no_sense(flags, tmp_path, more, words, capsys):
    flags = flags[2:] if "1" in more and "--stage" in more else flags
    flags = [*flags[:-8], "--steps", "1", "--workers", "0", "--batch", "7"]   # without rates
    with pytest.raises((UserError, SystemExit)) as e:
        train.main([*flags, "--out", str(tmp_path), *more])
    said = str(e.value) + capsys.readouterr().err
    assert words in said and not list(tmp_path.rglob("*.safetensors"))
