"""Every public layout, written tiny: it loads and equals transformers; what is broken is named, tensor and file."""
import io
import json
import math
import os
import re
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import sample
import train
from bench import make_llava
from ccra import IMAGE_TOKEN, VLM, CCRAConfig
from clip import CLIP, CLIPVision, CLIPVisionConfig
from core import device, weights
from core import layouts as formats
from core.common import ROOT, UserError
from core.layouts import Folder
from core.tokenizer import Tokenizer
from core.weights import Tensors
from fusers.llava import LLaVA, LLaVAConfig
from llama import Llama, LlamaConfig
from toy import world as toy

transformers = pytest.importorskip("transformers")
V = 90                                             # of the language model; with <image>, <pad> and padding: 128
VISION = dict(image_size=12, patch_size=4, hidden_size=16, intermediate_size=24, num_hidden_layers=3,
              num_attention_heads=2)
TEXT = dict(vocab_size=V, hidden_size=48, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
            rms_norm_eps=1e-5, max_position_embeddings=4096)
LLAMA31 = dict(rope_type="llama3", rope_theta=5e5, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
               original_max_position_embeddings=8192)
pytestmark = pytest.mark.usefixtures("one_thread")


def fails(*words):
    """One line that holds all these words."""
    return pytest.raises(UserError, match="".join(f"(?=.*{re.escape(str(word))})" for word in words) + "^[^\n]*$")


def shaken(model, scale=0.2):
    """Weights large enough for every part to matter."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(std=scale if p.ndim > 1 else 0.1)
            if "norm" in name and name.endswith("weight"):
                p.add_(1)
    return model.eval().requires_grad_(False)


# ---------------------------------------------------------------------------------------------------------------------
# The folders. A layout is (files {name: its tensors}, json files {name: content}), in a dictionary to be spoilt

def write(dir, files, jsons, old_pickle=False):
    dir.mkdir(exist_ok=True)
    for name, content in jsons.items():
        (dir / name).write_text(json.dumps(content))
    for name, content in files.items():
        content = {key: t.clone().contiguous() for key, t in content.items()}
        if name.endswith(".safetensors"):
            save_file(content, dir / name, metadata={"format": "pt"})
        else:
            torch.save(content, dir / name, _use_new_zipfile_serialization=not old_pickle)
    return dir


def shards(tensors, n, stem, ext):
    """(files, index): the tensors dealt out to n files."""
    names = [f"{stem}-{i + 1:05d}-of-{n:05d}.{ext}" for i in range(n)]
    table = {key: names[i * n // len(tensors)] for i, key in enumerate(sorted(tensors))}
    files = {name: {key: tensors[key] for key in table if table[key] == name} for name in names}
    single = {"safetensors": "model.safetensors", "bin": "pytorch_model.bin"}[ext]
    return files, {f"{single}.index.json": {"metadata": {}, "weight_map": table}}


def once(make):
    """Making these takes most of the time here, and nobody changes them."""
    made = {}

    def make_once(*given, **named):
        key = json.dumps([given, named], sort_keys=True)
        if key not in made:
            made[key] = make(*given, **named)
        return made[key]

    return make_once


@once
def public_llama(tied=False, **more):
    return shaken(transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**TEXT, **more}, tie_word_embeddings=tied)))


@once
def public_llava(tied=False, vision=VISION, text=TEXT, scale=0.2):
    """LlavaForConditionalGeneration; rows added to its vocabulary are the mean of the others, nearly as on the hub."""
    V = text["vocab_size"]
    stored = (V + 2 + 63) // 64 * 64
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**vision), tie_word_embeddings=tied,
        text_config=transformers.LlamaConfig(**{**text, "vocab_size": stored, "tie_word_embeddings": tied}),
        image_token_index=V, image_seq_length=(vision["image_size"] // vision["patch_size"]) ** 2)
    model = shaken(transformers.LlavaForConditionalGeneration(config), scale)
    for table in (model.get_input_embeddings().weight, model.lm_head.weight):
        table[V:] = table[:V].mean(0)
    return model


SPELLINGS = {"hub": ("vision_tower.vision_model.", "language_model.model.", "language_model.lm_head.", ""),
             "4.52": ("model.vision_tower.vision_model.", "model.language_model.", "lm_head.", "model."),
             "5": ("model.vision_tower.", "model.language_model.", "lm_head.", "model."),
             "saved by 5": ("vision_tower.", "language_model.model.", "language_model.lm_head.", "")}


def spelt(model, spelling):
    """A public LLaVA's tensors under the names of some version of transformers."""
    vision, llm, head, projector = SPELLINGS[spelling]
    tensors = {}
    for name, t in model.state_dict().items():
        for old, new in (("model.vision_tower.", vision), ("model.language_model.", llm), ("lm_head.", head),
                         ("model.multi_modal_projector.", projector + "multi_modal_projector.")):
            if name.startswith(old):
                tensors[new + name.removeprefix(old)] = t
    assert len(tensors) == len(model.state_dict())
    return tensors


HF_CONFIG = {"model_type": "llava", "image_token_index": V, "pad_token_id": V + 1, "projector_hidden_act": "gelu",
             "vision_feature_layer": -2, "vision_feature_select_strategy": "default",
             "text_config": {**TEXT, "vocab_size": 128}, "vision_config": {**VISION, "model_type": "clip_vision_model"}}


def llava_hf(spelling="hub", n=3):
    files, index = shards(spelt(public_llava(), spelling), n, "model", "safetensors")
    return files, {"config.json": HF_CONFIG, **index}


ORIGINAL_CONFIG = {
    **TEXT, "model_type": "llava", "architectures": ["LlavaLlamaForCausalLM"], "hidden_act": "silu",
    "mm_hidden_size": 16, "mm_projector_type": "mlp2x_gelu", "mm_vision_select_layer": -2,
    "mm_vision_select_feature": "patch",
    "image_aspect_ratio": "pad", "mm_use_im_start_end": False, "mm_use_im_patch_token": False, "rope_scaling": None,
    "mm_vision_tower": "openai/clip-vit-large-patch14-336", "pretraining_tp": 1, "tie_word_embeddings": False}


def original_names(model, tower=False):
    """liuhaotian's names."""
    renamed = {}
    for name, t in spelt(model, "hub").items():
        for old, new in (("language_model.model.", "model."), ("language_model.lm_head.", "lm_head."),
                         ("multi_modal_projector.linear_1.", "model.mm_projector.0."),
                         ("multi_modal_projector.linear_2.", "model.mm_projector.2."),
                         ("vision_tower.", "model.vision_tower.vision_tower." if tower else None)):
            if name.startswith(old) and new:
                renamed[new + name.removeprefix(old)] = t[:V] if t.shape[0] == 128 and "mlp" not in name else t
    return renamed | {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(6) for i in range(2)}


def original():
    files, index = shards(original_names(public_llava()), 2, "pytorch_model", "bin")
    return files, {"config.json": ORIGINAL_CONFIG, **index}


def vicuna():
    tensors = public_llama().state_dict()
    tensors |= {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(6) for i in range(2)}
    files, index = shards(tensors, 2, "pytorch_model", "bin")
    return files, {"config.json": {"model_type": "llama", "rope_scaling": None, "pad_token_id": 0, **TEXT}, **index}


def smollm2():
    tensors = public_llama(tied=True, num_key_value_heads=2).state_dict()
    del tensors["lm_head.weight"]
    return {"model.safetensors": tensors}, {"config.json": {
        "model_type": "llama", **TEXT, "num_key_value_heads": 2, "tie_word_embeddings": True, "is_llama_config": True}}


def llama31():
    files, index = shards(public_llama(num_key_value_heads=2, rope_parameters=LLAMA31).state_dict(), 3, "model",
                          "safetensors")
    scaling = {key: value for key, value in LLAMA31.items() if key != "rope_theta"}
    return files, {"config.json": {"model_type": "llama", **TEXT, "num_key_value_heads": 2, "rope_theta": 5e5,
                                   "rope_scaling": scaling}, **index}


@once
def public_clip():
    return shaken(transformers.CLIPModel(transformers.CLIPConfig(
        vision_config=VISION, text_config=dict(vocab_size=60, hidden_size=20, intermediate_size=24, num_hidden_layers=1,
                                               num_attention_heads=2, max_position_embeddings=9, eos_token_id=59),
        projection_dim=10)))


def openai_clip():
    theirs = public_clip()
    tensors = {**theirs.state_dict(), "vision_model.embeddings.position_ids": torch.arange(10)[None],
               "text_model.embeddings.position_ids": torch.arange(9)[None]}
    return {"pytorch_model.bin": tensors}, {"config.json": theirs.config.to_dict()}


def meta_order(weight, heads):
    """Hugging Face's rows of a q or k matrix -> Meta's, row by row: its neighbours 2j, 2j + 1 are j, j + hd/2 there."""
    hd = len(weight) // heads
    return torch.stack([weight[head * hd + (row // 2 if row % 2 == 0 else hd // 2 + row // 2)]
                        for head in range(heads) for row in range(hd)])


def meta(n, version):
    """Meta's files, n of them, from the same weights as the public model of that version (2, 3.1 or 3.2)."""
    kv = 4 if version == 2 else 2
    model = public_llama(num_key_value_heads=kv, tied=version == 3.2)
    inner = {"input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm",
             "self_attn.q_proj": "attention.wq", "self_attn.k_proj": "attention.wk",
             "self_attn.v_proj": "attention.wv", "self_attn.o_proj": "attention.wo",
             "mlp.gate_proj": "feed_forward.w1", "mlp.down_proj": "feed_forward.w2", "mlp.up_proj": "feed_forward.w3",
             "model.embed_tokens": "tok_embeddings", "lm_head": "output", "model.": ""}
    files = {f"consolidated.{i:02d}.pth": {"rope.freqs": torch.ones(6)} for i in range(n)}
    for name, t in model.state_dict().items():
        for theirs, metas in inner.items():
            name = name.replace(theirs, metas)
        t = meta_order(t, 4) if "wq" in name else meta_order(t, kv) if "wk" in name else t
        columns = "wo" in name or "w2" in name or ("tok_emb" in name and version == 2)
        pieces = [t] * n if t.ndim == 1 else t.chunk(n, 1 if columns else 0)
        for file, piece in zip(files.values(), pieces, strict=True):
            file[name] = piece
    params = {"dim": 48, "n_layers": 2, "n_heads": 4, "multiple_of": 64, "norm_eps": 1e-5}       # 128 wide MLPs
    if version == 2:
        return files, {"params.json": {**params, "vocab_size": -1}}
    return files, {"params.json": {**params, "vocab_size": V, "n_kv_heads": 2, "rope_theta": 500000.0,
                                   "use_scaled_rope": True, "ffn_dim_multiplier": 1.0}}


LLMS = {"vicuna": (vicuna, {}), "smollm2": (smollm2, dict(tied=True, num_key_value_heads=2)),
        "llama 3.1": (llama31, dict(num_key_value_heads=2, rope_parameters=LLAMA31)),
        "meta 2": (lambda: meta(1, 2), {}), "meta 2 in two": (lambda: meta(2, 2), {}),
        "meta 3.1 in two": (lambda: meta(2, 3.1), dict(num_key_value_heads=2, rope_parameters=LLAMA31)),
        "meta 3.2": (lambda: meta(1, 3.2), dict(tied=True, num_key_value_heads=2,
                                                rope_parameters={**LLAMA31, "factor": 32.0}))}


# ---------------------------------------------------------------------------------------------------------------------
# What is fine loads, and is what transformers makes of it

@pytest.mark.parametrize("layout", LLMS)
def test_language_models(tmp_path, layout):
    make, settings = LLMS[layout]
    net, ids = Llama.from_pretrained(write(tmp_path / "x", *make())), torch.randint(V, (1, 300))
    oracle = public_llama(**settings)
    with torch.no_grad():
        torch.testing.assert_close(net(ids), oracle(ids).logits, atol=1e-4, rtol=1e-4)
        if "3" in layout:          # or else this test couldn't tell the factors from each other
            other = public_llama(**{**settings, "rope_parameters": dict(rope_theta=5e5, rope_type="default")})
            assert (other(ids).logits - oracle(ids).logits).abs().max() > 1e-2
    tied = net.lm_head.weight is net.embed_tokens.weight
    assert net.config.tie_word_embeddings == tied == settings.get("tied", False)


def test_llama_out_of_llava_folders(tmp_path):
    want = public_llava()
    folders = [write(tmp_path / "hf", *llava_hf()), write(tmp_path / "original", *original())]
    for folder in folders:
        net = Llama.from_pretrained(folder)
        assert torch.equal(net.embed_tokens.weight, want.get_input_embeddings().weight[:V])
        assert torch.equal(net.lm_head.weight, want.lm_head.weight[:V]) and net.config.vocab_size == V


def test_clip_out_of_every_folder(tmp_path):
    clip_dir, hf_dir = write(tmp_path / "clip", *openai_clip()), write(tmp_path / "hf", *llava_hf())
    pixels, theirs = torch.randn(2, 3, 12, 12), public_clip()
    ids = torch.tensor([[4, 5, 59, 0], [7, 59, 0, 0]])
    with torch.no_grad():
        for folder, tower in ((clip_dir, theirs.vision_model), (hf_dir, public_llava().model.vision_tower)):
            want = tower(pixel_values=pixels, output_hidden_states=True).hidden_states
            got = CLIPVision.from_pretrained(folder)(pixels)
            torch.testing.assert_close(got, torch.stack(want), atol=1e-4, rtol=1e-4)
        whole = CLIP.from_pretrained(clip_dir)
        torch.testing.assert_close(whole(pixels, ids), theirs(input_ids=ids, pixel_values=pixels).logits_per_image,
                                   atol=1e-4, rtol=1e-4)
    with fails("config.json", "no 'vision'"):
        CLIPVision.from_pretrained(write(tmp_path / "vicuna", *vicuna()))
    with fails("config.json", "no 'llm'"):
        Llama.from_pretrained(clip_dir)


def agree(model, oracle, n_patches, size, tolerance):
    """A VLM of ours and a LlavaForConditionalGeneration: logits over picture and prompt, and 32 greedy tokens."""
    vocab = model.llm.config.vocab_size
    pixels, words = torch.randn(1, 3, size, size), torch.randint(vocab, (1, 30))
    ids = torch.cat([words[:, :20], torch.tensor([[IMAGE_TOKEN]]), words[:, 20:]], 1)
    theirs = torch.cat([words[:, :20], torch.full((1, n_patches), vocab), words[:, 20:]], 1)
    query = dict(query=words[:, 20:], query_mask=torch.ones(1, 10, dtype=torch.bool))
    with torch.no_grad():
        want = oracle(input_ids=theirs, pixel_values=pixels).logits[..., :vocab]
        got = model(pixels, ids, **query)
        assert want.std() > 0.1 and got.shape == want.shape
        error = ((got - want).abs().max() / want.abs().max()).item()
        assert error < tolerance, error
        blind = model(torch.randn_like(pixels), ids, **query)                        # does the picture matter at all?
        assert (got - blind)[:, -1].abs().max() > 1e-3 * want.abs().max()
        answer = oracle.generate(input_ids=theirs, pixel_values=pixels, attention_mask=torch.ones_like(theirs),
                                 max_new_tokens=32, do_sample=False, eos_token_id=None, pad_token_id=0)
        tokens = torch.stack(list(model.generate(pixels, ids, **query, max_new_tokens=32)), 1)
    assert tokens.tolist() == answer[:, theirs.shape[1]:].tolist()
    return error


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_llava_hf(tmp_path, spelling):
    model = VLM.from_pretrained(write(tmp_path / "x", *llava_hf(spelling)))
    assert isinstance(model.fuser, LLaVA) and model.image == {"size": 12, "pad": True}
    agree(model, public_llava(), 9, 12, 1e-5)


def test_llava_hf_as_transformers_writes_it(tmp_path):
    for tied in (False, True):
        oracle = public_llava(tied)
        oracle.save_pretrained(tmp_path / str(tied))
        model = VLM.from_pretrained(tmp_path / str(tied))
        agree(model, oracle, 9, 12, 1e-5)
        assert model.llm.config.tie_word_embeddings == tied


@pytest.mark.parametrize("own_tower", (False, True))
def test_liuhaotian(tmp_path, own_tower):
    """CLIP comes from elsewhere; a fine-tune that saved a tower of its own keeps that one."""
    oracle = public_llava()
    oracle.model.vision_tower.save_pretrained(tmp_path / "clip")
    files, jsons = original()
    if own_tower:
        files, index = shards(original_names(oracle, tower=True), 2, "pytorch_model", "bin")
        jsons |= index
        other = CLIPVision(CLIPVisionConfig(**VISION))
        tensors = {formats.tower_name(name): p for name, p in other.named_parameters()}
        save_file(tensors, tmp_path / "clip" / "model.safetensors", metadata={"format": "pt"})
    folder = write(tmp_path / "x", files, jsons)
    model = VLM.from_pretrained(folder, vision=tmp_path / "clip")
    assert model.image["pad"] and model.llm.config.vocab_size == V and not any(p.is_meta for p in model.parameters())
    agree(model, oracle, 9, 12, 1e-5)
    with fails(folder, "no vision tower", "download openai/clip-vit-large-patch14-336", "--vision DIR"):
        VLM.from_pretrained(folder)
    with fails("tower of its own", tmp_path / "clip"):
        VLM.from_pretrained(write(tmp_path / "hf", *llava_hf()), vision=tmp_path / "clip")
    (folder / "config.json").write_text(json.dumps({**ORIGINAL_CONFIG, "mm_hidden_size": 24}))
    with fails(tmp_path / "clip", "16 wide", "mm_hidden_size 24"):
        VLM.from_pretrained(folder, vision=tmp_path / "clip")
    if own_tower:
        files["pytorch_model-00002-of-00002.bin"].pop(
            "model.vision_tower.vision_tower.vision_model.post_layernorm.bias")
        index["pytorch_model.bin.index.json"]["weight_map"].pop(
            "model.vision_tower.vision_tower.vision_model.post_layernorm.bias")
        with fails("1 missing", "vision.post_layernorm.bias"):
            VLM.from_pretrained(write(folder, files, jsons), vision=tmp_path / "clip")


def test_the_last_block_is_not_run(tmp_path):
    model = VLM.from_pretrained(write(tmp_path / "x", *llava_hf()))
    run = []
    for i, block in enumerate(model.vision.layers):
        block.register_forward_hook(lambda *_, i=i: run.append(i))
    ids = torch.tensor([[1, IMAGE_TOKEN, 5]])
    model(torch.randn(1, 3, 12, 12), ids, ids[:, 2:], torch.ones(1, 1, dtype=torch.bool))
    assert run == [0, 1]
    hidden = model.vision(torch.randn(1, 3, 12, 12))
    assert torch.equal(model.fuser(hidden, None, None)[0], hidden[-2][:, 1:])        # given all, it takes the same one


@pytest.mark.skipif(not os.environ.get("NANOCCRA_BIG"), reason="NANOCCRA_BIG is not set (takes 10 GB and some minutes)")
def test_llava_hf_at_real_widths(tmp_path):
    """LLaVA-1.5-7B and CLIP ViT-L/336, but for 4 layers each: float32 logits within 1e-3, the same 32 greedy tokens."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 2)))
    vision = dict(image_size=336, patch_size=14, hidden_size=1024, intermediate_size=4096, num_hidden_layers=4,
                  num_attention_heads=16)
    text = dict(vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=4,
                num_attention_heads=32, rms_norm_eps=1e-5, max_position_embeddings=4096)
    oracle = public_llava(vision=vision, text=text, scale=0.03)
    partial = dict(num_hidden_layers=4, vocab_size=32064, rms_norm_eps=1e-5, max_position_embeddings=4096)
    config = {**HF_CONFIG, "image_token_index": 32000, "vision_config": vision, "text_config": partial}
    folder, files = tmp_path / "x", spelt(oracle, "hub")
    folder.mkdir()
    save_file(files, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    print(f"largest error {agree(VLM.from_pretrained(folder), oracle, 576, 336, 1e-3):.1e} of the largest logit")


# ---------------------------------------------------------------------------------------------------------------------
# What is broken is named

READERS = {"clip": (openai_clip, CLIPVision, "vision_model.encoder.layers.1.mlp.fc1.weight"),
           "whole clip": (openai_clip, CLIP, "text_model.encoder.layers.0.mlp.fc1.weight"),
           "llava-hf": (llava_hf, VLM, "multi_modal_projector.linear_1.weight"),
           "liuhaotian": (original, VLM, "model.mm_projector.0.weight"),
           "liuhaotian's llm": (original, Llama, "model.layers.1.mlp.up_proj.weight"),
           **{name: (make, Llama, "layers.1.feed_forward.w1.weight" if "meta" in name else
                     "model.layers.1.mlp.up_proj.weight") for name, (make, _) in LLMS.items()}}


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
        after and after(folder / holder)
        with fails(*(holder if word == "FILE" else word for word in words)):
            cls.from_pretrained(folder, **extra)

    shared = len(make()[0]) > 1 and "meta" in layout             # every file has every name
    own = ("mlp.gate_proj.weight" if "meta" in layout else victim.split(".", 1)[1].removeprefix("encoder.")
           if cls is not VLM else "projector.0.weight")
    refused(*(["FILE", victim] if shared else [tmp_path / "x", own, "1 missing"]), change=lambda t: t.pop(victim))
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
    folder, file = write(tmp_path / "x", files, jsons, old_pickle=old), tmp_path / "x" / "pytorch_model.bin"
    CLIPVision.from_pretrained(folder)                                     # an old one is fine, too
    spoilt = {"evil": Evil(tmp_path / "touched"), **files["pytorch_model.bin"]}
    torch.save(spoilt, file, _use_new_zipfile_serialization=not old)
    with fails(file, "not a complete file of plain tensors"):
        CLIPVision.from_pretrained(folder)
    assert not (tmp_path / "touched").exists()
    torch.load(file, weights_only=False)                                   # it would have
    assert (tmp_path / "touched").exists()
    sparse = torch.eye(3).to_sparse()
    for content, word in (([torch.ones(2)], "list"), ({"model": {"a": torch.ones(2)}}, "'model'"), ({"n": 1}, "'n'"),
                          ({3: torch.ones(2)}, "3 is"), ({"s": sparse}, "'s'"),
                          ({"m": torch.ones(2, device="meta")}, "'m'")):
        torch.save(content, file, _use_new_zipfile_serialization=not old)
        with fails(file, word):
            CLIPVision.from_pretrained(folder)
    whole = write(folder, files, jsons, old_pickle=True) and file.read_bytes()
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
    """As old programs saved tied models. Tied, it is one tensor; not tied, training one mustn't train the other."""
    files, jsons = vicuna()
    tensors = {key: t.clone() for content in files.values() for key, t in content.items()}
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    for tied in (True, False):
        (tmp_path / "config.json").write_text(json.dumps({**jsons["config.json"], "tie_word_embeddings": tied}))
        torch.save(tensors, tmp_path / "pytorch_model.bin")
        net = Llama.from_pretrained(tmp_path)
        assert torch.equal(net.lm_head.weight, net.embed_tokens.weight)
        assert (net.lm_head.weight.data_ptr() == net.embed_tokens.weight.data_ptr()) == tied
    tensors["lm_head.weight"] = tensors["lm_head.weight"] + 1
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text(json.dumps({**jsons["config.json"], "tie_word_embeddings": True}))
    with fails("pytorch_model.bin", "lm_head.weight differs"):
        Llama.from_pretrained(tmp_path)


@pytest.mark.parametrize("change", [
    {"vision_feature_layer": -1}, {"vision_feature_layer": [-2, -5]}, {"vision_feature_select_strategy": "full"},
    {"projector_hidden_act": "relu"}, {"multimodal_projector_bias": False}, {"quantization_config": {"bits": 4}},
    {"image_token_index": 5}, {"image_token_index": None}, {"image_token_index": 129}, {"text_config": 3},
    {"text_config": {**TEXT, "model_type": "qwen2"}},
    {"vision_config": {**VISION, "model_type": "siglip_vision_model"}},
    {"vision_config": {**VISION, "hidden_act": "gelu"}}, {"model_type": "llava_next"}])
def test_other_llava_hf_models_are_refused(tmp_path, change):
    files, jsons = llava_hf()
    folder = write(tmp_path / "x", files, {**jsons, "config.json": {**HF_CONFIG, **change}})
    key, value = next(iter(change.items()))
    word = value.get("model_type", "hidden_act") if isinstance(value, dict) and key != "quantization_config" else key
    with fails(word):
        VLM.from_pretrained(folder)


@pytest.mark.parametrize("key, value", [
    ("mm_projector_type", "linear"), ("mm_vision_select_layer", -1), ("mm_vision_select_feature", "cls_patch"),
    ("mm_use_im_start_end", True), ("mm_use_im_patch_token", True), ("mm_patch_merge_type", "spatial_unpad"),
    ("image_aspect_ratio", "anyres"), ("model_type", "llava_mistral")])
def test_other_liuhaotian_models_are_refused(tmp_path, key, value):
    files, jsons = original()
    folder = write(tmp_path / "x", files, {**jsons, "config.json": {**ORIGINAL_CONFIG, key: value}})
    with fails(key, value):
        VLM.from_pretrained(folder, vision=folder)


def test_other_metas_are_refused(tmp_path):
    for change, word in (({"rope_theta": 1e6}, "rope_theta"), ({"dim": None}, "dim"), ({"norm_eps": 0}, "norm_eps"),
                         ({"use_scaled_rope": True}, "rope_theta"), ({"n_kv_heads": 2}, "k_proj")):
        files, jsons = meta(1, 2)
        with fails("wk" if word == "k_proj" else "params.json", "misshapen" if word == "k_proj" else word):
            Llama.from_pretrained(write(tmp_path, files, {"params.json": {**jsons["params.json"], **change}}))
    files, jsons = meta(2, 3.1)
    folder = write(tmp_path, files, jsons)
    (folder / "consolidated.00.pth").unlink()
    with fails("consolidated.00.pth", "missing"):
        Llama.from_pretrained(folder)


def test_what_llava_hf_leaves_out_is_as_in_transformers(tmp_path):
    """The config.json of llava-1.5-7b-hf, in substance: sizes of the language model aren't in it."""
    config = {"model_type": "llava", "image_token_index": 32000, "text_config": {
        "max_position_embeddings": 4096, "model_type": "llama", "rms_norm_eps": 1e-5, "vocab_size": 32064},
        "vision_config": {"hidden_size": 1024, "image_size": 336, "intermediate_size": 4096, "num_attention_heads": 16,
                          "num_hidden_layers": 24, "patch_size": 14, "projection_dim": 768, "vocab_size": 32000}}
    parts, stored = formats.llava_hf(config, "config.json")
    theirs = transformers.LlavaConfig(**config)
    ours = LlamaConfig.from_dict(parts["llm"])
    for key, value in vars(ours).items():
        if key not in ("vocab_size", "rope_theta", "rope_scaling"):
            assert value == getattr(theirs.text_config, key), key
    assert (ours.vocab_size, stored) == (32000, 32064)
    assert vars(CLIPVisionConfig.from_dict(parts["vision"])) == vars(CLIPVisionConfig())
    for change in ({}, {"vision_config": None}, {"vision_config": {}}, {"text_config": None}):
        parts, _ = formats.llava_hf({**config, **change}, "config.json")
        theirs = transformers.LlavaConfig(**{**config, **change})
        for key, value in vars(CLIPVisionConfig.from_dict(parts["vision"])).items():
            assert value == getattr(theirs.vision_config, key), (change, key)
        assert LlamaConfig.from_dict(parts["llm"]).rms_norm_eps == theirs.text_config.rms_norm_eps


# ---------------------------------------------------------------------------------------------------------------------
# Memory

def mapped(file):
    """{start: (end, resident KiB)} of the places where a file is mapped into this process."""
    places, here = {}, None
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            here = [int(x, 16) for x in line.split()[0].split("-")] if line.endswith(str(file)) else None
        elif here and line.startswith("Rss:"):
            places[here[0]] = (here[1], int(line.split()[1]))
    return places


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks into /proc")
@pytest.mark.parametrize("name", ("model.safetensors", "pytorch_model.bin"))
def test_loading_copies_nothing_and_converting_leaves_nothing_behind(tmp_path, name):
    tensors = {"weight": torch.randn(1024, 2048).half()}                             # 4 MiB
    file = write(tmp_path, {name: tensors}, {}) / name
    before = file.read_bytes()

    def load(dtype):
        with weights.skeleton():
            net = nn.Linear(2048, 1024, bias=False)
        return weights.load(net, Tensors(tmp_path), lambda name: name, dtype=dtype)

    net = load(None)
    address = net.weight.data_ptr()
    assert any(start <= address < end for start, (end, _) in mapped(file).items())
    with torch.no_grad():
        net.weight.add_(1)                                                           # stays in this process
    assert torch.equal(net.weight, tensors["weight"] + 1) and file.read_bytes() == before
    del net
    store = Tensors(tmp_path)
    with weights.skeleton():
        net = nn.Linear(2048, 1024, bias=False)
    assert store["weight"].float().sum().isfinite() and sum(rss for _, rss in mapped(file).values()) >= 4000
    weights.load(net, store, lambda name: name, dtype=torch.float32)
    assert torch.equal(net.weight, tensors["weight"].float())
    assert sum(rss for _, rss in mapped(file).values()) < 200
    assert torch.equal(store["weight"], tensors["weight"])                           # read again from the file


def test_a_bar_for_large_models_where_somebody_watches(tmp_path, monkeypatch):
    write(tmp_path, {"model.safetensors": {"weight": torch.ones(3, 2)}}, {})
    for terminal, big, shown in ((True, 24, True), (True, 25, False), (False, 24, False)):
        screen = io.StringIO()
        screen.isatty = lambda: terminal
        monkeypatch.setattr(sys, "stderr", screen)
        monkeypatch.setattr(device, "BIG", big)
        with weights.skeleton():
            net = nn.Linear(2, 3, bias=False)
        weights.load(net, Tensors(tmp_path), lambda name: name)
        assert ("loading" in screen.getvalue()) == shown


def test_number_formats():
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert device.pick_dtype("auto", cpu, 5e8) == torch.float32 and device.pick_dtype("auto", cpu, 2e9) is None
    assert device.pick_dtype("auto", gpu, 5e8) is None and device.pick_dtype("float16", cpu, 9) == torch.float16
    with fails("int3"):
        device.pick_dtype("int3", cpu, 9)


def test_the_real_sizes():
    """What the hub's index files say: tensors and bytes of llava-hf/llava-1.5-7b-hf and of liuhaotian/llava-v1.5-7b."""
    sizes = make_llava.shapes(32)
    assert (len(sizes), 2 * sum(map(math.prod, sizes.values()))) == (686, 14_126_854_144)
    llm = {name: math.prod(shape) for name, shape in sizes.items() if not name.startswith("vision_tower")}
    extra = 2 * 64 * 4096                          # rows of the vocabulary; and 32 inv_freq of 64 float32
    assert 2 * (sum(llm.values()) - extra) + 32 * 64 * 4 == 13_518_798_848


def test_the_random_llava_has_the_layout(tmp_path, monkeypatch):
    """tests/make_llava.py, of which only the sizes are cut."""
    sizes = {name: tuple(min(n, 8) for n in shape) for name, shape in make_llava.shapes(2).items()}
    monkeypatch.setattr(make_llava, "shapes", lambda layers: sizes)
    monkeypatch.setattr(sys, "argv", ["make_llava.py", "--out", str(tmp_path), "--layers", "2"])
    make_llava.main()
    folder = Folder(tmp_path)
    assert {name: folder.tensors.shape(name) for name in folder.tensors} == sizes and len(folder.tensors.handles) == 3
    assert all(t.dtype == torch.bfloat16 and t.isfinite().all() for t in folder.tensors.values())
    assert (folder.parts["llm"]["num_hidden_layers"], folder.parts["llm"]["vocab_size"]) == (2, 32000)
    table = folder.tensors["vision_tower.vision_model.embeddings.position_embedding.weight"]
    assert 0.005 < table.float().std() < 0.04 and folder.tensors["language_model.model.norm.weight"].eq(1).all()


# ---------------------------------------------------------------------------------------------------------------------
# Writing, and the programs

@pytest.mark.parametrize("tied", (False, True))
def test_export_for_transformers(tmp_path, tied):
    torch.manual_seed(0)
    vision, llm = CLIPVision(CLIPVisionConfig(**VISION)), Llama(LlamaConfig(**TEXT, tie_word_embeddings=tied))
    model = shaken(VLM.build(vision, llm, LLaVAConfig(16, 3)))
    (tmp_path / "tokenizer.model").write_bytes(b"pieces")
    model.export_llava(tmp_path / "x", tmp_path / "tokenizer.model", max_shard_bytes=6e4)
    assert len(list((tmp_path / "x").glob("*.safetensors"))) > 1
    assert (tmp_path / "x" / "tokenizer.model").read_bytes() == b"pieces"
    theirs, info = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path / "x", output_loading_info=True)
    assert not any(info.values()) and theirs.get_input_embeddings().weight.shape == (128, 48)
    agree(model, theirs.eval(), 9, 12, 1e-5)
    again = VLM.from_pretrained(tmp_path / "x")
    assert all(torch.equal(p, again.state_dict()[name]) for name, p in model.state_dict().items())
    assert again.fuser.config == model.fuser.config and again.llm.config == model.llm.config
    with torch.no_grad():          # the rows that are ours to choose can't win
        logits = theirs.lm_head(torch.randn(50, 48))
    assert logits.argmax(-1).max() < V
    with fails("'ccra'"):
        VLM.build(vision, llm, CCRAConfig(48, 16, 3, 8)).export_llava(tmp_path / "y")


@pytest.mark.parametrize("config", (LLaVAConfig(16, 3), CCRAConfig(48, 16, 3, 8)))
def test_save_and_load_in_bfloat16_and_shards(tmp_path, config):
    model = shaken(VLM.build(CLIPVision(CLIPVisionConfig(**VISION)), Llama(LlamaConfig(**TEXT)), config)).bfloat16()
    model.save_pretrained(tmp_path, max_shard_bytes=6e4)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    again = VLM.from_pretrained(tmp_path)
    assert again.fuser.config == config and again.state_dict().keys() == model.state_dict().keys()
    for name, p in model.state_dict().items():
        assert p.dtype == again.state_dict()[name].dtype == torch.bfloat16 and torch.equal(p, again.state_dict()[name])


def test_baseline_configs():
    for bad in (dict(vision_dim=0), dict(n_layers=1), dict(n_layers="3")):
        with fails(next(iter(bad))):
            LLaVAConfig(**bad)


@pytest.fixture(scope="module")
def worded(tmp_path_factory):
    """A llava-hf and a liuhaotian folder with the embedded world's tokenizer, and the CLIP and Vicuna of the same."""
    base, vocab = tmp_path_factory.mktemp("worded"), Tokenizer.from_pretrained(toy.MODEL).vocab_size
    torch.manual_seed(0)
    llm = Llama(LlamaConfig(**{**TEXT, "vocab_size": vocab}))
    model = shaken(VLM.build(CLIPVision(CLIPVisionConfig(**VISION)), llm, LLaVAConfig(16, 3)))
    words = toy.MODEL / "tokenizer.model"
    model.export_llava(base / "hf", words)
    state = model.llm.state_dict()
    public = {key if key.startswith("lm_head") else f"model.{key}": t for key, t in state.items()}
    write(base / "vicuna", *shards(public, 2, "pytorch_model", "bin"))
    (base / "vicuna" / "config.json").write_text(json.dumps({"model_type": "llama", **TEXT, "vocab_size": vocab}))
    public |= {f"model.mm_{key}": p for key, p in model.named_parameters() if key.startswith("projector.")}
    write(base / "original", *shards(public, 2, "pytorch_model", "bin"))
    (base / "original" / "config.json").write_text(json.dumps({**ORIGINAL_CONFIG, "vocab_size": vocab}))
    eyes = {formats.tower_name(name): p for name, p in model.vision.named_parameters()}
    write(base / "clip", {"pytorch_model.bin": eyes}, {"config.json": {"model_type": "clip_vision_model", **VISION}})
    for name in ("vicuna", "original"):
        (base / name / "tokenizer.model").write_bytes(words.read_bytes())
    return base


def test_sample_asks_llava(worded, capsys):
    ask = ["--image", str(ROOT / "assets" / "scene.png"), "--q", "What is this?", "--max-new-tokens", "6", "--device",
           "cpu"]
    answers = []
    for folder in (["hf"], ["original", "--vision", str(worded / "clip")]):
        sample.main([*ask, "--model", str(worded / folder[0]), *folder[1:]])
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1] and answers[0].strip()
    sample.main([*ask, "--model", str(worded / "hf"), "--dtype", "bfloat16"])
    with fails("no vision tower", "--vision DIR"):
        sample.main([*ask, "--model", str(worded / "original")])
    with fails("not a vision-language model"):
        sample.main([*ask, "--model", str(worded / "vicuna")])


@pytest.mark.parametrize("vision, llm", [("clip", "vicuna"), ("hf", "original"), ("hf", "hf")])
def test_training_starts_from_every_layout(worded, tmp_path, vision, llm):
    train.main(["--stage", "1", "--vision", str(worded / vision), "--llm", str(worded / llm), "--out", str(tmp_path),
                "--steps", "1", "--batch", "2", "--device", "cpu"])
    model, before = VLM.from_pretrained(tmp_path), VLM.from_pretrained(worded / "hf")
    assert model.fuser.name == "ccra" and model.projector[0].in_features == 32
    for part in ("vision", "llm"):
        state = getattr(before, part).state_dict()
        assert all(torch.equal(t, state[name]) for name, t in getattr(model, part).state_dict().items())
    assert Folder(tmp_path).layout == "nanoccra"


def test_plain_llava_trains_too(worded, tmp_path):
    """Stage 2 of LLaVA itself; the tower's last block, which nobody reads, is frozen even if the tower is trained."""
    model = VLM.from_pretrained(worded / "hf")
    trained = train.freeze(model, 2, train_vision=True)
    assert "vision.layers.1.mlp.fc1.weight" in trained
    assert not any(name.startswith("vision.layers.2.") for name in trained)
    arguments = ["--stage", "2", "--model", str(worded / "hf"), "--steps", "1", "--batch", "2", "--device", "cpu"]
    train.main([*arguments, "--out", str(tmp_path)])
    assert VLM.from_pretrained(tmp_path).fuser.name == "llava"
    with fails("'llava'", "--norm"):
        train.main([*arguments, "--out", str(tmp_path / "y"), "--norm", "token"])
