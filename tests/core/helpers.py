"""Tiny folders in every public layout, and transformers' models of the same random weights."""
import json
import re
from functools import partial

import pytest
import torch
from safetensors.torch import save_file

from ccra import VLM
from clip import CLIPVision, CLIPVisionConfig
from core import layouts
from core.common import UserError
from core.tokenizer import Tokenizer
from fusers.llava import LLaVAConfig
from llama import Llama, LlamaConfig
from toy import world as toy
from training.export import export_llava

transformers = pytest.importorskip("transformers")

V = 90                                 # of the language model; with <image>, <pad> and padding: 128
VISION = dict(image_size=12, patch_size=4, hidden_size=16, intermediate_size=24,
              num_hidden_layers=3, num_attention_heads=2)
TEXT = dict(vocab_size=V, hidden_size=48, intermediate_size=128, num_hidden_layers=2,
            num_attention_heads=4, rms_norm_eps=1e-5, max_position_embeddings=4096)
LLAMA31 = dict(rope_type="llama3", rope_theta=5e5, factor=8.0, low_freq_factor=1.0,
               high_freq_factor=4.0, original_max_position_embeddings=8192)


def fails(*words):
    """A UserError of one line that holds all these words."""
    ahead = "".join(f"(?=.*{re.escape(str(word))})" for word in words)
    return pytest.raises(UserError, match=ahead + "^[^\n]*$")


def shaken(model, scale=0.2):
    """Weights large enough for every part to matter."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(std=scale if p.ndim > 1 else 0.1)
            if "norm" in name and name.endswith("weight"):
                p.add_(1)
    return model.eval().requires_grad_(False)


def made(config, text=TEXT):
    """A VLM of ours, tiny, with this fuser."""
    torch.manual_seed(0)
    vision, llm = CLIPVision(CLIPVisionConfig(**VISION)), Llama(LlamaConfig(**text))
    return shaken(VLM.build(vision, llm, config))


# --------------------------------------------------------------------------------------------------
# The folders. A layout is (files {name: its tensors}, json files {name: content}), to be spoilt

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
    config = transformers.LlamaConfig(**{**TEXT, **more}, tie_word_embeddings=tied)
    return shaken(transformers.LlamaForCausalLM(config))


@once
def public_llava(tied=False, vision=VISION, text=TEXT, scale=0.2):
    """LlavaForConditionalGeneration; rows added to its vocabulary are the mean of the others,
    nearly as on the hub."""
    rows = text["vocab_size"]
    text = {**text, "vocab_size": (rows + 2 + 63) // 64 * 64, "tie_word_embeddings": tied}
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**vision), tie_word_embeddings=tied,
        text_config=transformers.LlamaConfig(**text), image_token_index=rows,
        image_seq_length=(vision["image_size"] // vision["patch_size"]) ** 2)
    model = shaken(transformers.LlavaForConditionalGeneration(config), scale)
    for table in (model.get_input_embeddings().weight, model.lm_head.weight):
        table[rows:] = table[:rows].mean(0)
    return model


SPELLINGS = {                  # prefixes: of the tower, the language model, its head, the projector
    "hub": ("vision_tower.vision_model.", "language_model.model.", "language_model.lm_head.", ""),
    "4.52": ("model.vision_tower.vision_model.", "model.language_model.", "lm_head.", "model."),
    "5": ("model.vision_tower.", "model.language_model.", "lm_head.", "model."),
    "saved by 5": ("vision_tower.", "language_model.model.", "language_model.lm_head.", "")}


def spelt(model, spelling):
    """A public LLaVA's tensors under the names of some version of transformers."""
    vision, llm, head, projector = SPELLINGS[spelling]
    renamed = {"model.vision_tower.": vision, "model.language_model.": llm, "lm_head.": head,
               "model.multi_modal_projector.": projector + "multi_modal_projector."}
    tensors = {}
    for name, t in model.state_dict().items():
        for old, new in renamed.items():
            if name.startswith(old):
                tensors[new + name.removeprefix(old)] = t
    assert len(tensors) == len(model.state_dict())
    return tensors


HF_CONFIG = {
    "model_type": "llava", "image_token_index": V, "pad_token_id": V + 1,
    "projector_hidden_act": "gelu", "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default", "text_config": {**TEXT, "vocab_size": 128},
    "vision_config": {**VISION, "model_type": "clip_vision_model"}}


def llava_hf(spelling="hub", n=3):
    files, index = shards(spelt(public_llava(), spelling), n, "model", "safetensors")
    return files, {"config.json": HF_CONFIG, **index}


ORIGINAL_CONFIG = {
    **TEXT, "model_type": "llava", "architectures": ["LlavaLlamaForCausalLM"], "hidden_act": "silu",
    "mm_hidden_size": 16, "mm_projector_type": "mlp2x_gelu", "mm_vision_select_layer": -2,
    "mm_vision_select_feature": "patch", "image_aspect_ratio": "pad", "mm_use_im_start_end": False,
    "mm_use_im_patch_token": False, "rope_scaling": None,
    "mm_vision_tower": "openai/clip-vit-large-patch14-336", "pretraining_tp": 1,
    "tie_word_embeddings": False}


def original_names(model, tower=False):
    """A public LLaVA's tensors under liuhaotian's names, without rows added to the vocabulary."""
    renamed = {"language_model.model.": "model.", "language_model.lm_head.": "lm_head.",
               "multi_modal_projector.linear_1.": "model.mm_projector.0.",
               "multi_modal_projector.linear_2.": "model.mm_projector.2."}
    if tower:
        renamed["vision_tower."] = "model.vision_tower.vision_tower."
    tensors = inv_freq()
    for name, t in spelt(model, "hub").items():
        for old, new in renamed.items():
            if name.startswith(old):
                vocabulary = t.shape[0] == 128 and "mlp" not in name
                tensors[new + name.removeprefix(old)] = t[:V] if vocabulary else t
    return tensors


def inv_freq():
    """What old files hold and nobody needs."""
    return {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(6) for i in range(2)}


def original():
    files, index = shards(original_names(public_llava()), 2, "pytorch_model", "bin")
    return files, {"config.json": ORIGINAL_CONFIG, **index}


def vicuna():
    files, index = shards(public_llama().state_dict() | inv_freq(), 2, "pytorch_model", "bin")
    config = {"model_type": "llama", "rope_scaling": None, "pad_token_id": 0, **TEXT}
    return files, {"config.json": config, **index}


def smollm2():
    tensors = public_llama(tied=True, num_key_value_heads=2).state_dict()
    del tensors["lm_head.weight"]
    config = {"model_type": "llama", **TEXT, "num_key_value_heads": 2, "tie_word_embeddings": True,
              "is_llama_config": True}
    return {"model.safetensors": tensors}, {"config.json": config}


def llama31():
    tensors = public_llama(num_key_value_heads=2, rope_parameters=LLAMA31).state_dict()
    files, index = shards(tensors, 3, "model", "safetensors")
    scaling = {key: value for key, value in LLAMA31.items() if key != "rope_theta"}
    config = {"model_type": "llama", **TEXT, "num_key_value_heads": 2, "rope_theta": 5e5,
              "rope_scaling": scaling}
    return files, {"config.json": config, **index}


@once
def public_clip():
    text = dict(vocab_size=60, hidden_size=20, intermediate_size=24, num_hidden_layers=1,
                num_attention_heads=2, max_position_embeddings=9, eos_token_id=59)
    config = transformers.CLIPConfig(vision_config=VISION, text_config=text, projection_dim=10)
    return shaken(transformers.CLIPModel(config))


def openai_clip():
    theirs = public_clip()
    tensors = {**theirs.state_dict(),
               "vision_model.embeddings.position_ids": torch.arange(10)[None],
               "text_model.embeddings.position_ids": torch.arange(9)[None]}
    return {"pytorch_model.bin": tensors}, {"config.json": theirs.config.to_dict()}


def meta_order(weight, heads):
    """Hugging Face's rows of a q or k matrix -> Meta's, row by row: its neighbours 2j, 2j + 1 are
    j, j + hd/2 there."""
    hd = len(weight) // heads
    return torch.stack([weight[head * hd + (row // 2 if row % 2 == 0 else hd // 2 + row // 2)]
                        for head in range(heads) for row in range(hd)])


def meta(n, version):
    """Meta's files, n of them, from the same weights as the public model of that version (2, 3.1 or
    3.2)."""
    kv = 4 if version == 2 else 2
    model = public_llama(num_key_value_heads=kv, tied=version == 3.2)
    inner = {"input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm",
             "self_attn.q_proj": "attention.wq", "self_attn.k_proj": "attention.wk",
             "self_attn.v_proj": "attention.wv", "self_attn.o_proj": "attention.wo",
             "mlp.gate_proj": "feed_forward.w1", "mlp.down_proj": "feed_forward.w2",
             "mlp.up_proj": "feed_forward.w3", "model.embed_tokens": "tok_embeddings",
             "lm_head": "output", "model.": ""}
    files = {f"consolidated.{i:02d}.pth": {"rope.freqs": torch.ones(6)} for i in range(n)}
    for name, t in model.state_dict().items():
        for theirs, metas in inner.items():
            name = name.replace(theirs, metas)
        t = meta_order(t, 4) if "wq" in name else meta_order(t, kv) if "wk" in name else t
        columns = "wo" in name or "w2" in name or ("tok_emb" in name and version == 2)
        pieces = [t] * n if t.ndim == 1 else t.chunk(n, 1 if columns else 0)
        for file, piece in zip(files.values(), pieces, strict=True):
            file[name] = piece
    params = {"dim": 48, "n_layers": 2, "n_heads": 4, "norm_eps": 1e-5, "vocab_size": -1,
              "multiple_of": 64}                         # MLPs 128 wide
    if version > 2:
        params |= {"vocab_size": V, "n_kv_heads": 2, "rope_theta": 500000.0,
                   "use_scaled_rope": True, "ffn_dim_multiplier": 1.0}
    return files, {"params.json": params}


LLMS = {                       # name -> (folder, settings of public_llama)
    "vicuna": (vicuna, {}),
    "smollm2": (smollm2, dict(tied=True, num_key_value_heads=2)),
    "llama 3.1": (llama31, dict(num_key_value_heads=2, rope_parameters=LLAMA31)),
    "meta 2": (partial(meta, 1, 2), {}),
    "meta 2 in two": (partial(meta, 2, 2), {}),
    "meta 3.1 in two": (partial(meta, 2, 3.1),
                        dict(num_key_value_heads=2, rope_parameters=LLAMA31)),
    "meta 3.2": (partial(meta, 1, 3.2),
                 dict(tied=True, num_key_value_heads=2,
                      rope_parameters={**LLAMA31, "factor": 32.0}))}


def worded_llava(base):
    """A llava-hf and a liuhaotian folder with the toy world's tokenizer, and the CLIP and Vicuna of
    the same."""
    words = toy.MODEL / "tokenizer.model"
    text = {**TEXT, "vocab_size": Tokenizer.from_pretrained(toy.MODEL).vocab_size}
    model = made(LLaVAConfig(16, 3), text)
    export_llava(model, base / "hf", words)
    state = model.llm.state_dict()
    public = {key if key.startswith("lm_head") else f"model.{key}": t for key, t in state.items()}
    files, index = shards(public, 2, "pytorch_model", "bin")
    write(base / "vicuna", files, {"config.json": {"model_type": "llama", **text}, **index})
    public |= {f"model.mm_{key}": p for key, p in model.named_parameters()
               if key.startswith("projector.")}
    files, index = shards(public, 2, "pytorch_model", "bin")
    write(base / "original", files, {"config.json": {**ORIGINAL_CONFIG, **text}, **index})
    eyes = {layouts.tower_name(name): p for name, p in model.vision.named_parameters()}
    write(base / "clip", {"pytorch_model.bin": eyes},
          {"config.json": {"model_type": "clip_vision_model", **VISION}})
    for name in ("vicuna", "original"):
        (base / name / "tokenizer.model").write_bytes(words.read_bytes())
    return base
