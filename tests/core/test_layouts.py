"""Public layouts, written tiny: they load and equal transformers; what is broken is named, tensor
and file."""
import json
from pathlib import Path

import pytest
import torch

from ccra import VLM
from clip import CLIP, CLIPVision
from core.weights import Tensors
from llama import Llama
from tests.core.helpers import (
    LLMS,
    V,
    fails,
    llava_hf,
    openai_clip,
    original,
    public_clip,
    public_llama,
    public_llava,
    smollm2,
    vicuna,
    write,
)

pytestmark = pytest.mark.usefixtures("one_thread")


# --------------------------------------------------------------------------------------------------
# What is fine loads, and is what transformers makes of it

@pytest.mark.parametrize("layout", LLMS)
def test_language_models(tmp_path, layout):
    make, settings = LLMS[layout]
    net, ids = Llama.from_pretrained(write(tmp_path / "x", *make())), torch.randint(V, (1, 300))
    oracle = public_llama(**settings)
    with torch.no_grad():
        torch.testing.assert_close(net(ids), oracle(ids).logits, atol=1e-4, rtol=1e-4)
        if "3" in layout:          # or else this test couldn't tell the factors from each other
            plain = {"rope_parameters": dict(rope_theta=5e5, rope_type="default")}
            other = public_llama(**{**settings, **plain})
            assert (other(ids).logits - oracle(ids).logits).abs().max() > 1e-2
    tied = net.lm_head.weight is net.embed_tokens.weight
    assert net.config.tie_word_embeddings == tied == settings.get("tied", False)


def test_llama_out_of_llava_folders(tmp_path):
    want = public_llava()
    folders = [write(tmp_path / "hf", *llava_hf()), write(tmp_path / "original", *original())]
    for folder in folders:
        net = Llama.from_pretrained(folder)
        assert torch.equal(net.embed_tokens.weight, want.get_input_embeddings().weight[:V])
        assert torch.equal(net.lm_head.weight, want.lm_head.weight[:V])
        assert net.config.vocab_size == V


def test_clip_out_of_every_folder(tmp_path):
    clip_dir, hf_dir = write(tmp_path / "clip", *openai_clip()), write(tmp_path / "hf", *llava_hf())
    pixels, theirs = torch.randn(2, 3, 12, 12), public_clip()
    ids = torch.tensor([[4, 5, 59, 0], [7, 59, 0, 0]])
    towers = ((clip_dir, theirs.vision_model), (hf_dir, public_llava().model.vision_tower))
    with torch.no_grad():
        for folder, tower in towers:
            want = tower(pixel_values=pixels, output_hidden_states=True).hidden_states
            got = CLIPVision.from_pretrained(folder)(pixels)
            torch.testing.assert_close(got, torch.stack(want), atol=1e-4, rtol=1e-4)
        whole = CLIP.from_pretrained(clip_dir)
        torch.testing.assert_close(whole(pixels, ids),
                                   theirs(input_ids=ids, pixel_values=pixels).logits_per_image,
                                   atol=1e-4, rtol=1e-4)
    with fails("config.json", "no 'vision'"):
        CLIPVision.from_pretrained(write(tmp_path / "vicuna", *vicuna()))
    with fails("config.json", "no 'llm'"):
        Llama.from_pretrained(clip_dir)


# --------------------------------------------------------------------------------------------------
# What is broken is named

READERS = {"clip": (openai_clip, CLIPVision, "vision_model.encoder.layers.1.mlp.fc1.weight"),
           "whole clip": (openai_clip, CLIP, "text_model.encoder.layers.0.mlp.fc1.weight"),
           "llava-hf": (llava_hf, VLM, "multi_modal_projector.linear_1.weight"),
           "liuhaotian": (original, VLM, "model.mm_projector.0.weight"),
           "liuhaotian's llm": (original, Llama, "model.layers.1.mlp.up_proj.weight"),
           **{name: (make, Llama, "layers.1.feed_forward.w1.weight" if "meta" in name
                     else "model.layers.1.mlp.up_proj.weight") for name, (make, _) in LLMS.items()}}


@pytest.mark.parametrize("layout", READERS)
def test_broken_folders(tmp_path, layout):
    make, cls, victim = READERS[layout]
    write(tmp_path / "eyes", *openai_clip())
    extra = {"vision": tmp_path / "eyes"} if layout == "liuhaotian" else {}

    def refused(*words, change=None, index=True, after=None):
        files, jsons = make()
        holder = next(name for name in reversed(sorted(files)) if victim in files[name])
        table = next((content for name, content in jsons.items() if "index" in name), None)
        if change:
            change(files[holder])
        if table and index:        # the index says the same
            table["weight_map"] = {key: name for name, content in files.items() for key in content}
        folder = write(tmp_path / "x", files, jsons)
        if after:
            after(folder / holder)
        with fails(*(holder if word == "FILE" else word for word in words)):
            cls.from_pretrained(folder, **extra)

    shared = len(make()[0]) > 1 and "meta" in layout             # every file has every name
    own = victim.split(".", 1)[1].removeprefix("encoder.")       # what it is called in our module
    if cls is VLM:
        own = "projector.0.weight"
    elif "meta" in layout:
        own = "mlp.gate_proj.weight"
    refused(*(["FILE", victim] if shared else [tmp_path / "x", own, "1 missing"]),
            change=lambda t: t.pop(victim))
    refused("FILE", "what.weight", change=lambda t: t.update({"what.weight": torch.ones(2)}))
    refused("FILE" if not shared else "consolidated.0", victim,
            change=lambda t: t.update({victim: t[victim].T.contiguous()}))
    refused("FILE", after=lambda path: path.write_bytes(path.read_bytes()[:-100]))
    refused("FILE", after=lambda path: path.write_bytes(path.read_bytes()[:200]))
    refused("FILE", after=lambda path: path.write_bytes(b""))
    if len(make()[0]) > 1 or "meta" in layout:
        refused("FILE", "missing", after=lambda path: path.unlink())
    if any("index" in name for name in make()[1]):
        refused("FILE", victim, "index.json", change=lambda t: t.pop(victim), index=False)
        refused("FILE", "what.weight", "index.json", index=False,
                change=lambda t: t.update({"what.weight": torch.ones(2)}))


class Evil:
    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


@pytest.mark.parametrize("old", (False, True))
def test_a_pickle_runs_nothing(tmp_path, old):
    files, jsons = openai_clip()
    folder = write(tmp_path / "x", files, jsons, old_pickle=old)
    file = folder / "pytorch_model.bin"
    CLIPVision.from_pretrained(folder)                                     # an old one is fine, too
    spoilt = {"evil": Evil(tmp_path / "touched"), **files["pytorch_model.bin"]}
    torch.save(spoilt, file, _use_new_zipfile_serialization=not old)
    with fails(file, "not a complete file of plain tensors"):
        CLIPVision.from_pretrained(folder)
    assert not (tmp_path / "touched").exists()
    torch.load(file, weights_only=False)                                   # it would have
    assert (tmp_path / "touched").exists()
    sparse = torch.eye(3).to_sparse()
    for content, word in (([torch.ones(2)], "list"), ({"model": {"a": torch.ones(2)}}, "'model'"),
                          ({"n": 1}, "'n'"), ({3: torch.ones(2)}, "3 is"), ({"s": sparse}, "'s'"),
                          ({"m": torch.ones(2, device="meta")}, "'m'")):
        torch.save(content, file, _use_new_zipfile_serialization=not old)
        with fails(file, word):
            CLIPVision.from_pretrained(folder)
    write(folder, files, jsons, old_pickle=True)
    whole = file.read_bytes()
    for cut in (len(whole) - 1, len(whole) // 2, 30, 0):
        file.write_bytes(whole[:cut])
        with fails(file, "not a complete file"):
            CLIPVision.from_pretrained(folder)


def test_safetensors_win_over_pickles(tmp_path):
    files, jsons = smollm2()
    folder = write(tmp_path, files | {"pytorch_model.bin": {"other": torch.ones(1)}}, jsons)
    assert len(Tensors(folder)) == len(files["model.safetensors"]) and Llama.from_pretrained(folder)
    (folder / "pytorch_model.bin.index.json").write_text("{}")
    (folder / "model.safetensors").unlink()
    with fails("pytorch_model.bin", "both"):
        Tensors(folder)


def test_two_names_for_one_memory(tmp_path):
    """As old programs saved tied models. Tied, it is one tensor; not tied, training one mustn't
    train the other."""
    files, jsons = vicuna()
    tensors = {key: t.clone() for content in files.values() for key, t in content.items()}
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    for tied in (True, False):
        config = {**jsons["config.json"], "tie_word_embeddings": tied}
        (tmp_path / "config.json").write_text(json.dumps(config))
        torch.save(tensors, tmp_path / "pytorch_model.bin")
        net = Llama.from_pretrained(tmp_path)
        assert torch.equal(net.lm_head.weight, net.embed_tokens.weight)
        assert (net.lm_head.weight.data_ptr() == net.embed_tokens.weight.data_ptr()) == tied
    tensors["lm_head.weight"] = tensors["lm_head.weight"] + 1
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    config = {**jsons["config.json"], "tie_word_embeddings": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with fails("pytorch_model.bin", "lm_head.weight differs"):
        Llama.from_pretrained(tmp_path)
