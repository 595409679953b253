"""training/adapters.py: what is saved comes back, beside transformers and peft; another base, and
whatever isn't whole or isn't plain LoRA, is refused in one line."""
import copy
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from ccra import VLM
from core.layouts import open_vlm
from tests.core.helpers import fails, public_llava, worded_llava
from tests.training.adapted import CCRA, learn, logits, near
from toy import world as toy
from training import adapters, digests, lora, setup
from training.adapters import ABOUT, BETWEEN, CONFIG, THIN
from training.export import export_llava

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
pytestmark = [pytest.mark.usefixtures("one_thread"),
              pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")]


@pytest.fixture(scope="module")
def worded(tmp_path_factory):
    return worded_llava(tmp_path_factory.mktemp("worded"))


@pytest.fixture(scope="module")
def base(worded):
    return worded / "hf"


@pytest.fixture(scope="module")
def kept(base, tmp_path_factory):
    """(folder of a LoRA adapter, of CCRA alone, of both; the models that they are of)."""
    folder = tmp_path_factory.mktemp("adapters")
    models = {"lora": learn(base, folder / "lora"), "ccra": learn(base, folder / "ccra", 0, True),
              "both": learn(base, folder / "both", 2, True, query="first")}
    return folder, models


@pytest.fixture
def spoil(kept, tmp_path):
    """A copy of an adapter, to be spoilt."""
    def copied(which="lora"):
        return shutil.copytree(kept[0] / which, tmp_path / "spoilt", dirs_exist_ok=True)
    return copied


def edit(file, **changes):
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


# --------------------------------------------------------------------------------------------------
# What is saved comes back

@pytest.mark.parametrize("which", ("lora", "ccra", "both"))
def test_the_base_with_its_adapter_is_what_was_trained(base, kept, which):
    folder, models = kept
    model = adapters.load(base, folder / which, dtype=torch.float64)
    assert near(model, models[which]) < 1e-9
    assert near(model, VLM.from_pretrained(base)) > 1e-2
    assert model.query == models[which].query and model.fuser.name == models[which].fuser.name
    assert not any(isinstance(layer, lora.LoRALinear) for layer in model.modules())


def test_put_leaves_the_file_alone(base, kept):
    """put() changes the model, whose memory is mapped, but not the file."""
    before = digests.sha256(base)
    model = adapters.put(VLM.from_pretrained(base), kept[0] / "both")
    assert near(model, kept[1]["both"]) < 1e-5
    assert digests.sha256(base) == before


def test_files(kept, base):
    folder, models = kept
    there = {which: {file.name for file in (folder / which).iterdir()} for which in models}
    assert there == {"lora": {ABOUT, CONFIG, THIN}, "ccra": {ABOUT, BETWEEN},
                     "both": {ABOUT, BETWEEN, CONFIG, THIN}}
    between = load_file(folder / "both" / BETWEEN)
    assert between.keys() == {name for name, _ in models["both"].named_parameters()
                              if name.startswith(("fuser.", "projector."))}
    assert all(t.dtype == torch.float32 for t in between.values())
    about = json.loads((folder / "both" / ABOUT).read_text())
    assert about["trained"] == ["fuser", "lora", "projector"] and about["query"] == "first"
    assert about["lora"] == {"r": 2, "alpha": 6} and about["base"]["path"] == str(base)
    assert about["fuser"]["name"] == "ccra" and about["fuser"]["norm"] == CCRA.norm
    assert {file.name for file in adapters.files(folder / "both")} == there["both"]


def test_fewer_files_replace_more(base, kept, tmp_path):
    """LoRA and CCRA, then into the same folder CCRA alone."""
    shutil.copytree(kept[0] / "both", tmp_path / "x")
    learn(base, tmp_path / "x", 0, True)
    assert {file.name for file in (tmp_path / "x").iterdir()} == {ABOUT, BETWEEN}


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_a_narrow_base_stays_narrow(kept, base, tmp_path, dtype):
    model = VLM.from_pretrained(base).to(dtype)
    export_llava(model, tmp_path / "base", toy.MODEL / "tokenizer.model")
    trained = learn(tmp_path / "base", tmp_path / "learnt", 4, True)
    merged = adapters.load(tmp_path / "base", tmp_path / "learnt")
    assert {p.dtype for p in merged.parameters()} == {dtype}
    want = {name: p for name, p in trained.named_parameters() if name.startswith("fuser.")}
    assert all(torch.equal(p, want[name].to(dtype)) for name, p in merged.named_parameters()
               if name in want)
    assert near(merged.float(), trained) < 0.1


def test_save_takes_all_of_it_and_nothing_else(kept, base, tmp_path):
    model, identity = kept[1]["lora"], adapters.identity(base)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    tensors = {name: p for name, p in model.named_parameters() if name in trained}
    assert set(adapters.held_names(model, trained, identity)) == set(trained)
    fewer, more = dict(list(tensors.items())[1:]), [*trained, "llm.norm.weight"]
    for wrong in ((fewer, trained), (tensors, more)):
        with pytest.raises(ValueError):
            adapters.save(model, tmp_path, identity, *wrong)
    assert not any(tmp_path.iterdir())
    other = kept[1]["both"]                            # its fuser isn't the base's
    assert "fuser.lpwca.q.weight" in adapters.held_names(other, trained, identity)


def test_a_kill_leaves_no_adapter(base, tmp_path, monkeypatch):
    """Each write in turn is the last one."""
    for stop_at in range(4):
        folder, left = tmp_path / str(stop_at), stop_at

        def counted(write):
            def once(*args):
                nonlocal left
                if left == 0:
                    raise KeyboardInterrupt
                left -= 1
                write(*args)
            return once

        learn(base, folder, 2, True)                     # another one is there already
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            for name in ("write_tensors", "write_json"):
                patch.setattr(adapters, name, counted(getattr(adapters, name)))
            learn(base, folder, 4, True)
        with fails(folder):
            adapters.read(folder)


# --------------------------------------------------------------------------------------------------
# transformers and peft

def theirs(folder):
    return transformers.LlavaForConditionalGeneration.from_pretrained(folder)


def oracle(model, vocab, size=12, patches=9):
    """`logits` of a LLaVA of transformers'."""
    g = torch.Generator().manual_seed(2)
    ids = torch.randint(3, vocab, (2, 12), generator=g)
    pixels = torch.randn(2, 3, size, size, generator=g)
    image = torch.full((2, patches), vocab)
    ids = torch.cat([ids[:, :3], image, ids[:, 4:]], 1)
    with torch.no_grad():
        return model(input_ids=ids, pixel_values=pixels).logits[..., :vocab].double()


def test_transformers_and_peft_take_our_lora(base, kept):
    folder, models = kept
    vocab = models["lora"].llm.config.vocab_size
    plain, want = theirs(base), logits(models["lora"])
    before = oracle(plain, vocab)
    model = peft.PeftModel.from_pretrained(plain, folder / "lora")
    assert (before - want).abs().max() > 0.01 * want.abs().max()
    assert (oracle(model, vocab) - want).abs().max() < 1e-5 * want.abs().max()
    merged = model.merge_and_unload()
    assert (oracle(merged, vocab) - want).abs().max() < 1e-5 * want.abs().max()


def written_by_peft(model, folder, **config):
    """An adapter of peft's beside one of transformers' models, B away from 0; the model with it
    merged."""
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=12, **config))
    torch.manual_seed(5)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.1)
    model.save_pretrained(folder)
    return model.merge_and_unload()


TARGETS = {"language model": dict(target_modules=r".*language_model.*\.(q_proj|up_proj)"),
           "both towers": dict(target_modules=["q_proj", "v_proj", "out_proj", "fc1"]),
           "all": dict(target_modules="all-linear", init_lora_weights="gaussian"),
           "one block": dict(target_modules=["q_proj"], layers_to_transform=[1])}


@pytest.mark.parametrize("targets", TARGETS)
def test_lora_of_pefts_own(base, tmp_path, capsys, targets):
    merged = written_by_peft(theirs(base), tmp_path, **TARGETS[targets])
    capsys.readouterr()
    model = adapters.load(base, tmp_path)
    said = capsys.readouterr().err
    assert said.startswith("note: ") and "can't be checked" in said and said.count("\n") == 1
    got, want = logits(model), oracle(merged, model.llm.config.vocab_size)
    assert (got - want).abs().max() < 1e-5 * want.abs().max()
    assert near(model, VLM.from_pretrained(base)) > 1e-3
    assert near(adapters.put(VLM.from_pretrained(base), tmp_path), model) == 0


SPELLINGS = {"before 4.52": ("model.language_model.", "language_model.model."),
             "a Llama's": ("model.language_model.", "model.")}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_lora_under_older_names(base, kept, tmp_path, spelling):
    """Those of transformers before 4.52, and those of LLaVA's own code."""
    new, old = SPELLINGS[spelling]
    folder, models = kept
    tensors = {name.replace(new, old): t for name, t in load_file(folder / "lora" / THIN).items()}
    assert all(name.startswith(f"base_model.model.{old}layers.") for name in tensors)
    save_file(tensors, tmp_path / THIN)
    shutil.copy(folder / "lora" / CONFIG, tmp_path)
    assert near(adapters.load(base, tmp_path, dtype=torch.float64), models["lora"]) < 1e-9


# --------------------------------------------------------------------------------------------------
# The base

def test_a_base_is_the_same_in_every_layout(worded, kept, tmp_path):
    """And its digests are those that a training keeps of it."""
    hf, original = (worded / "hf", None), (worded / "original", worded / "clip")
    VLM.from_pretrained(worded / "hf").save_pretrained(tmp_path, toy.MODEL / "tokenizer.model")
    ours = (tmp_path, None)
    for whole in (digests.fingerprint, digests.sha256):
        assert whole(*hf) == whole(*original) == whole(*ours)
    model = VLM.from_pretrained(worded / "hf")
    basis = setup.digests(list(model.named_parameters()))
    assert basis == {part: value for part, value in digests.sha256(*hf).items() if part in basis}
    assert adapters.identity(*hf) | {"path": ""} == adapters.identity(*hf, known=basis) | {
        "path": ""}
    for folder, vision in (hf, original, ours):
        model = adapters.load(folder, kept[0] / "both", vision, torch.float64)
        assert near(model, kept[1]["both"]) < 1e-9


def changed(base, folder, name, at=(0, 0)):
    """The base with one number of one tensor changed."""
    model = VLM.from_pretrained(base)
    p = dict(model.named_parameters())[name]
    with torch.no_grad():
        p[at] += 1
    export_llava(model, folder, toy.MODEL / "tokenizer.model")
    return folder


OTHERS = {"language model": "llm.layers.1.mlp.up_proj.weight",
          "picture tower": "vision.layers.0.mlp.fc1.weight", "projector": "projector.0.weight"}


@pytest.mark.parametrize("part", OTHERS)
def test_another_base_is_refused(base, kept, tmp_path, part):
    folder = kept[0]
    other = changed(base, tmp_path / "other", OTHERS[part])
    with fails(folder / "lora", "another base than", other, f"{part} differs", base):
        adapters.load(other, folder / "lora")
    if part == "projector":                              # which this adapter replaces
        return adapters.load(other, folder / "both")
    with fails(folder / "both", f"whose {part} differs", base):
        adapters.load(other, folder / "both")


def test_a_base_set_up_otherwise_is_refused(base, kept, tmp_path):
    shutil.copytree(base, tmp_path / "x")
    config = json.loads((base / "config.json").read_text())
    config["text_config"]["rms_norm_eps"] = 0.1
    (tmp_path / "x" / "config.json").write_text(json.dumps(config))
    with fails("configuration differs"):
        adapters.load(tmp_path / "x", kept[0] / "both")
    learn(base, tmp_path / "ccra", 0, True)
    model = adapters.load(base, tmp_path / "ccra")       # as a base of its own, its fuser is CCRA
    model.save_pretrained(tmp_path / "y", toy.MODEL / "tokenizer.model")
    with fails("kind of fuser and fuser and projector differ"):
        adapters.load(tmp_path / "y", kept[0] / "lora")


def test_a_fingerprint_reads_pieces_and_a_sha256_all(base, kept, tmp_path, monkeypatch):
    for name, value in (("PIECES", 2), ("PIECE", 64)):
        monkeypatch.setattr(digests, name, value)
    learn(base, tmp_path / "learnt")
    other = changed(base, tmp_path / "other", OTHERS["language model"], (64, 20))
    adapters.load(other, tmp_path / "learnt")
    with fails(tmp_path / "learnt", other, "language model differs", base):
        adapters.load(other, tmp_path / "learnt", whole=True)
    for n, seen in ((8, 8), (1024, 128), (1025, 128)):
        assert len(digests.some_bytes(torch.zeros(n, dtype=torch.uint8))) == min(seen, n)


# --------------------------------------------------------------------------------------------------
# What isn't one, isn't whole, or isn't implemented

def test_no_adapter(base, kept, tmp_path):
    with fails(tmp_path, "no adapter", CONFIG, ABOUT):
        adapters.read(tmp_path)
    with fails(tmp_path / "x", "no such folder"):
        adapters.read(tmp_path / "x")
    with fails(base, "a model's folder"):
        adapters.read(base)
    for which in ("lora", "ccra"):
        with fails(kept[0] / which, "adapter", "--adapter"):
            open_vlm(kept[0] / which, None)
    shutil.copy(kept[0] / "lora" / CONFIG, tmp_path)
    (tmp_path / "adapter_model.bin").touch()
    with fails(tmp_path, "pickled adapter", "safetensors"):
        adapters.read(tmp_path)
    (tmp_path / "non_lora_trainables.bin").touch()
    with fails(tmp_path, "projector lies apart", "merge_lora_weights.py"):
        adapters.read(tmp_path)


@pytest.mark.parametrize("which, name", [("both", name) for name in adapters.FILES]
                         + [("lora", THIN), ("lora", CONFIG), ("ccra", BETWEEN), ("ccra", ABOUT)])
def test_a_file_is_missing(spoil, which, name):
    folder = spoil(which)
    (folder / name).unlink()
    with fails(folder):
        adapters.read(folder)


def test_a_file_too_many(spoil, kept):
    for which, other, name in (("ccra", "lora", THIN), ("lora", "ccra", BETWEEN)):
        folder = spoil(which)
        shutil.copy(kept[0] / other / name, folder)
        with fails(folder / name, "doesn't belong"):
            adapters.read(folder)
        shutil.rmtree(folder)


SETTINGS = {"use_rslora": True, "use_dora": True, "bias": "all", "modules_to_save": ["lm_head"],
            "r": 0, "lora_alpha": 0, "lora_bias": True, "rank_pattern": {"q_proj": 8},
            "alpha_pattern": {"q_proj": 8}, "peft_type": "IA3", "target_modules": 7,
            "init_lora_weights": "pissa", "fan_in_fan_out": True, "layer_replication": [[0, 1]],
            "trainable_token_indices": [5], "use_of_tomorrow": True}


@pytest.mark.parametrize("key", SETTINGS)
def test_other_kinds_of_lora_are_refused(spoil, key):
    folder = spoil()
    edit(folder / CONFIG, **{key: SETTINGS[key]})
    with fails(folder / CONFIG, key):
        adapters.read(folder)


@pytest.mark.parametrize("key, value", [
    ("format", "x"), ("fuser", 5), ("query", "last"), ("image", {"size": 12}), ("base", {}),
    ("image", {"size": 0, "pad": True}), ("lora", [1])])
def test_a_damaged_nanoccra_json(spoil, key, value):
    folder = spoil("both")
    edit(folder / ABOUT, **{key: value})
    with fails(folder / ABOUT, key if key != "base" else "path"):
        adapters.read(folder)


def test_damaged_json_and_tensors(spoil):
    folder = spoil("both")
    for name in (CONFIG, ABOUT):
        text = (folder / name).read_text()
        (folder / name).write_text(text[:40])
        with fails(folder / name, "not valid JSON"):
            adapters.read(folder)
        (folder / name).write_text(text)
    edit(folder / CONFIG, r=3)
    with fails(folder / CONFIG, ABOUT):
        adapters.read(folder)
    for name in (THIN, BETWEEN):
        folder = spoil("both")
        (folder / name).write_bytes((folder / name).read_bytes()[:-9])
        with fails(folder / name, "not a complete safetensors file"):
            adapters.read(folder)


def test_the_fuser_has_to_fit(spoil, base):
    folder = spoil("both")
    fuser = json.loads((folder / ABOUT).read_text())["fuser"]
    for change, words in (({"name": "x"}, ["'x'"]), ({"vision_dim": 32}, ["vision_dim"]),
                          ({"d_hidden": 9}, [folder / BETWEEN, "misshapen", "lpwca"]),
                          ({"new": 1}, ["new"])):
        edit(folder / ABOUT, fuser={**fuser, **change})
        with fails(folder, *words):
            adapters.load(base, folder)
    folder = spoil("both")
    tensors = load_file(folder / BETWEEN)
    tensors["llm.norm.weight"] = tensors.pop("projector.0.bias")
    save_file(tensors, folder / BETWEEN)
    with fails(folder / BETWEEN, "1 missing (projector.0.bias)", "1 unknown (llm.norm.weight"):
        adapters.load(base, folder)
    folder = spoil("both")
    edit(folder / ABOUT, image={"size": 24, "pad": True})
    with fails(folder / ABOUT, "24 pixels", "12"):
        adapters.load(base, folder)


UP = "base_model.model.model.language_model.layers.1.mlp.up_proj.lora_A.weight"


def test_the_lora_has_to_fit(spoil, base):
    def wrong(change, *words):
        folder = spoil()
        tensors = load_file(folder / THIN)
        change(tensors)
        save_file(tensors, folder / THIN)
        with fails(folder / THIN, *words):
            adapters.load(base, folder)

    wrong(lambda t: t.pop(UP), "1 missing", "layers.1.mlp.up_proj")
    wrong(lambda t: [t.pop(UP), t.pop(UP.replace("_A", "_B"))], "1 missing",
          "llm.layers.1.mlp.up_proj.weight")
    wrong(lambda t: t.update({UP: t[UP][:3]}), "1 misshapen", "(3, 48)")
    wrong(lambda t: t.update({UP: t[UP].int()}), "int32")
    wrong(lambda t: t.update({UP + ".x": t[UP].clone()}), "1 unknown", UP + ".x")
    wrong(lambda t: t.update({UP.replace("lora_A", "lora_magnitude_vector"): t[UP].clone()}),
          "1 unknown", "magnitude")
    wrong(lambda t: t.update({name.replace("layers.1", "layers.7"): x.clone()
                              for name, x in list(t.items())}), "unknown", "llm.layers.7")
    wrong(lambda t: t.clear(), "no tensors")


def test_a_rank_larger_than_the_matrix(kept, base, tmp_path):
    edits = {name: torch.zeros(60, t.shape[1]) if "lora_A" in name else torch.zeros(len(t), 60)
             for name, t in load_file(kept[0] / "lora" / THIN).items()}
    save_file(edits, tmp_path / THIN)
    shutil.copy(kept[0] / "lora" / CONFIG, tmp_path)
    edit(tmp_path / CONFIG, r=60)
    with fails(tmp_path / CONFIG, "r = 60", "larger"):
        adapters.load(base, tmp_path)


def test_lora_beside_a_tied_head_is_refused(tmp_path):
    model = copy.deepcopy(public_llava(tied=True))
    model.save_pretrained(tmp_path / "base")
    shutil.copy(toy.MODEL / "tokenizer.model", tmp_path / "base")
    written_by_peft(model, tmp_path / "x", target_modules=["lm_head"])
    with fails(tmp_path / "x", "1 unknown", "lm_head.base_layer.weight"):
        adapters.read(tmp_path / "x")
    tensors = load_file(tmp_path / "x" / THIN)
    save_file({name: t for name, t in tensors.items() if "lora_" in name}, tmp_path / "x" / THIN)
    with fails("1 unknown", "llm.lm_head.weight"):
        adapters.load(tmp_path / "base", tmp_path / "x")
