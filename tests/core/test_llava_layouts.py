"""LLaVA's two layouts: they load and equal transformers, others like them are refused, and what is
exported transformers takes."""
import json
import os

import pytest
import torch
from safetensors.torch import save_file

from ccra import IMAGE_TOKEN, VLM, CCRAConfig
from clip import CLIPVision, CLIPVisionConfig
from core import layouts
from fusers.llava import LLaVA, LLaVAConfig
from llama import LlamaConfig
from tests.core.helpers import (
    HF_CONFIG,
    ORIGINAL_CONFIG,
    SPELLINGS,
    TEXT,
    VISION,
    V,
    fails,
    llava_hf,
    made,
    original,
    original_names,
    public_llava,
    shards,
    spelt,
    write,
)
from training.export import export_llava

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("one_thread")


def agree(model, oracle, n_patches, size, tolerance):
    """A VLM of ours and a LlavaForConditionalGeneration: the same logits over picture and prompt,
    and the same 32 greedy tokens."""
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
        blind = model(torch.randn_like(pixels), ids, **query)      # does the picture matter at all?
        assert (got - blind)[:, -1].abs().max() > 1e-3 * want.abs().max()
        answer = oracle.generate(input_ids=theirs, pixel_values=pixels,
                                 attention_mask=torch.ones_like(theirs), max_new_tokens=32,
                                 do_sample=False, eos_token_id=None, pad_token_id=0)
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
        tensors = {layouts.tower_name(name): p for name, p in other.named_parameters()}
        save_file(tensors, tmp_path / "clip" / "model.safetensors", metadata={"format": "pt"})
    folder = write(tmp_path / "x", files, jsons)
    model = VLM.from_pretrained(folder, vision=tmp_path / "clip")
    assert model.image["pad"] and model.llm.config.vocab_size == V
    assert not any(p.is_meta for p in model.parameters())
    agree(model, oracle, 9, 12, 1e-5)
    with fails(folder, "no vision tower", "download openai/clip-vit-large-patch14-336",
               "--vision DIR"):
        VLM.from_pretrained(folder)
    with fails("tower of its own", tmp_path / "clip"):
        VLM.from_pretrained(write(tmp_path / "hf", *llava_hf()), vision=tmp_path / "clip")
    (folder / "config.json").write_text(json.dumps({**ORIGINAL_CONFIG, "mm_hidden_size": 24}))
    with fails(tmp_path / "clip", "16 wide", "mm_hidden_size 24"):
        VLM.from_pretrained(folder, vision=tmp_path / "clip")
    if own_tower:
        name = "model.vision_tower.vision_tower.vision_model.post_layernorm.bias"
        files["pytorch_model-00002-of-00002.bin"].pop(name)
        index["pytorch_model.bin.index.json"]["weight_map"].pop(name)
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
    # given all, it takes the same one
    assert torch.equal(model.fuser(hidden, None, None)[0], hidden[-2][:, 1:])


@pytest.mark.big
def test_llava_hf_at_real_widths(tmp_path):
    """LLaVA-1.5-7B and CLIP ViT-L/336, but for 4 layers each: float32 logits within 1e-3, the same
    32 greedy tokens. 10 GB of memory, some minutes."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 2)))
    vision = dict(image_size=336, patch_size=14, hidden_size=1024, intermediate_size=4096,
                  num_hidden_layers=4, num_attention_heads=16)
    text = dict(vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=4,
                num_attention_heads=32, rms_norm_eps=1e-5, max_position_embeddings=4096)
    oracle = public_llava(vision=vision, text=text, scale=0.03)
    partial = dict(num_hidden_layers=4, vocab_size=32064, rms_norm_eps=1e-5,
                   max_position_embeddings=4096)
    config = {**HF_CONFIG, "image_token_index": 32000, "vision_config": vision,
              "text_config": partial}
    folder, files = tmp_path / "x", spelt(oracle, "hub")
    folder.mkdir()
    save_file(files, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    error = agree(VLM.from_pretrained(folder), oracle, 576, 336, 1e-3)
    print(f"largest error {error:.1e} of the largest logit")


@pytest.mark.parametrize("change", [
    {"vision_feature_layer": -1}, {"vision_feature_layer": [-2, -5]},
    {"vision_feature_select_strategy": "full"}, {"projector_hidden_act": "relu"},
    {"multimodal_projector_bias": False}, {"quantization_config": {"bits": 4}},
    {"image_token_index": 5}, {"image_token_index": None}, {"image_token_index": 129},
    {"text_config": 3}, {"text_config": {**TEXT, "model_type": "qwen2"}},
    {"vision_config": {**VISION, "model_type": "siglip_vision_model"}},
    {"vision_config": {**VISION, "hidden_act": "gelu"}}, {"model_type": "llava_next"}])
def test_other_llava_hf_models_are_refused(tmp_path, change):
    files, jsons = llava_hf()
    folder = write(tmp_path / "x", files, {**jsons, "config.json": {**HF_CONFIG, **change}})
    key, value = next(iter(change.items()))
    if isinstance(value, dict) and key != "quantization_config":
        key = value.get("model_type", "hidden_act")
    with fails(key):
        VLM.from_pretrained(folder)


@pytest.mark.parametrize("key, value", [
    ("mm_projector_type", "linear"), ("mm_vision_select_layer", -1),
    ("mm_vision_select_feature", "cls_patch"), ("mm_use_im_start_end", True),
    ("mm_use_im_patch_token", True), ("mm_patch_merge_type", "spatial_unpad"),
    ("image_aspect_ratio", "anyres"), ("model_type", "llava_mistral")])
def test_other_liuhaotian_models_are_refused(tmp_path, key, value):
    files, jsons = original()
    folder = write(tmp_path / "x", files, {**jsons, "config.json": {**ORIGINAL_CONFIG, key: value}})
    with fails(key, value):
        VLM.from_pretrained(folder, vision=folder)


def test_what_llava_hf_leaves_out_is_as_in_transformers(tmp_path):
    """The config.json of llava-1.5-7b-hf, in substance: it doesn't give the language model's sizes.
    """
    text = {"max_position_embeddings": 4096, "model_type": "llama", "rms_norm_eps": 1e-5,
            "vocab_size": 32064}
    vision = {"hidden_size": 1024, "image_size": 336, "intermediate_size": 4096,
              "num_attention_heads": 16, "num_hidden_layers": 24, "patch_size": 14,
              "projection_dim": 768, "vocab_size": 32000}
    config = {"model_type": "llava", "image_token_index": 32000, "text_config": text,
              "vision_config": vision}
    parts, stored = layouts.llava_hf(config, "config.json")
    theirs = transformers.LlavaConfig(**config)
    ours = LlamaConfig.from_dict(parts["llm"])
    for key, value in vars(ours).items():
        if key not in ("vocab_size", "rope_theta", "rope_scaling"):
            assert value == getattr(theirs.text_config, key), key
    assert (ours.vocab_size, stored) == (32000, 32064)
    assert vars(CLIPVisionConfig.from_dict(parts["vision"])) == vars(CLIPVisionConfig())
    for change in ({}, {"vision_config": None}, {"vision_config": {}}, {"text_config": None}):
        parts, _ = layouts.llava_hf({**config, **change}, "config.json")
        theirs = transformers.LlavaConfig(**{**config, **change})
        for key, value in vars(CLIPVisionConfig.from_dict(parts["vision"])).items():
            assert value == getattr(theirs.vision_config, key), (change, key)
        assert LlamaConfig.from_dict(parts["llm"]).rms_norm_eps == theirs.text_config.rms_norm_eps


# --------------------------------------------------------------------------------------------------
# Writing

@pytest.mark.parametrize("tied", (False, True))
def test_export_for_transformers(tmp_path, tied):
    model = made(LLaVAConfig(16, 3), {**TEXT, "tie_word_embeddings": tied})
    (tmp_path / "tokenizer.model").write_bytes(b"pieces")
    export_llava(model, tmp_path / "x", tmp_path / "tokenizer.model", max_shard_bytes=6e4)
    assert len(list((tmp_path / "x").glob("*.safetensors"))) > 1
    assert (tmp_path / "x" / "tokenizer.model").read_bytes() == b"pieces"
    theirs, info = transformers.LlavaForConditionalGeneration.from_pretrained(
        tmp_path / "x", output_loading_info=True)
    assert not any(info.values()) and theirs.get_input_embeddings().weight.shape == (128, 48)
    agree(model, theirs.eval(), 9, 12, 1e-5)
    again = VLM.from_pretrained(tmp_path / "x")
    assert all(torch.equal(p, again.state_dict()[name]) for name, p in model.state_dict().items())
    assert again.fuser.config == model.fuser.config and again.llm.config == model.llm.config
    with torch.no_grad():          # the rows that are ours to choose can't win
        logits = theirs.lm_head(torch.randn(50, 48))
    assert logits.argmax(-1).max() < V
    with fails("'ccra'"):
        export_llava(VLM.build(model.vision, model.llm, CCRAConfig(48, 16, 3, 8)), tmp_path / "y")


@pytest.mark.parametrize("config", (LLaVAConfig(16, 3), CCRAConfig(48, 16, 3, 8)))
def test_save_and_load_in_bfloat16_and_shards(tmp_path, config):
    model = made(config).bfloat16()
    model.save_pretrained(tmp_path, max_shard_bytes=6e4)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    again = VLM.from_pretrained(tmp_path)
    assert again.fuser.config == config and again.state_dict().keys() == model.state_dict().keys()
    for name, p in model.state_dict().items():
        other = again.state_dict()[name]
        assert p.dtype == other.dtype == torch.bfloat16 and torch.equal(p, other)


def test_baseline_configs():
    for bad in (dict(vision_dim=0), dict(n_layers=1), dict(n_layers="3")):
        with fails(next(iter(bad))):
            LLaVAConfig(**bad)
