"""clip.py against transformers' CLIP, its image processor and LLaVA's padding. Attention by a loop
over rows, with every kind of mask: tests/fast/test_attention.py."""
import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import clip
from clip import (
    CLIP,
    CLIPTextConfig,
    CLIPVision,
    CLIPVisionConfig,
    attention,
    open_image,
    preprocess,
    read_pixels,
)
from core.common import UserError
from core.layouts import Folder

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

VISION = dict(image_size=30, patch_size=7, hidden_size=48, intermediate_size=80,
              num_hidden_layers=3, num_attention_heads=4)
TEXT = dict(vocab_size=99, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=2, max_position_embeddings=9, eos_token_id=98)
IDS = torch.tensor([[5, 7, 98, 0, 0], [98, 98, 3, 4, 98], [1, 2, 3, 4, 98]])


def relative(ours, theirs):
    assert ours.shape == theirs.shape
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def shake(model):
    """Random norms and biases too: a twin that ignores a bias of zero would pass."""
    torch.manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn_like(p)
    return model.eval()


def public_clip(**text):
    config = transformers.CLIPConfig(vision_config=VISION, text_config=TEXT | text,
                                     projection_dim=24)
    return shake(transformers.CLIPModel(config))


# --------------------------------------------------------------------------------------------------
# Attention

def test_an_empty_row_is_zero_whatever_the_kernel_makes_of_it(monkeypatch):
    """torch's CPU kernel happens to give zeros for 0/0; this one gives NaN, as some GPU kernels
    did."""
    def naive(q, k, v, attn_mask):
        return (q @ k.mT).masked_fill(~attn_mask, -math.inf).softmax(-1) @ v

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", naive)
    q, mask = torch.randn(1, 1, 3, 2), torch.tensor([[1, 0, 0], [0, 0, 0], [1, 1, 1]]).bool()
    out = attention(q, q, q, mask)
    assert out.isfinite().all() and (out[0, 0, 1] == 0).all()
    assert torch.equal(out[0, 0, 0], q[0, 0, 0])


# --------------------------------------------------------------------------------------------------
# The towers against transformers

def test_hidden_states_equal_transformers_and_numbering():
    theirs = shake(transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**VISION)))
    ours = CLIPVision(CLIPVisionConfig.from_dict(VISION))
    assert ours.grid == 4                                   # 30 // 7, as the convolution sees it
    names = clip._from_public(ours)
    stored = theirs.state_dict().items()
    ours.load_state_dict({names[k]: v for k, v in stored if "position_ids" not in k})
    pixels = torch.randn(2, 3, 30, 30)
    with torch.no_grad():
        want, got = theirs(pixels, output_hidden_states=True), ours(pixels)
        assert got.shape == (4, 2, 17, 48)
        for layer in range(4):
            assert relative(got[layer], want.hidden_states[layer]) < 1e-5
        assert relative(ours.pooled(got), want.pooler_output) < 1e-5
        assert torch.equal(ours(pixels, n_layers=2), got[:3])
        assert torch.equal(ours(pixels, 0), got[:1])


def test_hidden_states_at_vit_l_14_336():
    """The real shape: width 1024, 16 heads, 577 positions, all 24 layers; random weights, one
    picture."""
    with torch.device("meta"):
        ours = CLIPVision(CLIPVisionConfig())
        theirs = transformers.CLIPVisionModel(
            transformers.CLIPVisionConfig(image_size=336, patch_size=14, hidden_size=1024,
                                          intermediate_size=4096, num_hidden_layers=24,
                                          num_attention_heads=16))
    assert sum(p.numel() for p in ours.parameters()) == 303_507_456
    assert len(list(ours.parameters())) == 391
    torch.manual_seed(0)
    shared = {}
    for name, p in ours.named_parameters():
        scale = "norm" in name and name.endswith("weight")
        shared[name] = torch.empty(p.shape).normal_(std=0.03) + scale
    ours.load_state_dict(shared, assign=True)  # both models on the same memory: 1.2 GB, not 2.4
    theirs.load_state_dict({clip.tower_name(k): p for k, p in shared.items()}, assign=True)
    theirs.embeddings.position_ids = torch.arange(577)[None]
    assert not any(p.is_meta for p in theirs.parameters())
    with torch.no_grad():
        pixels = torch.randn(1, 3, 336, 336)
        want, got = theirs.eval()(pixels, output_hidden_states=True).hidden_states, ours(pixels)
    assert got.shape == (25, 1, 577, 1024)
    assert max(relative(g, w) for g, w in zip(got, want, strict=True)) < 1e-5


def test_a_public_clip_loads_and_agrees(tmp_path):
    theirs = public_clip()
    theirs.save_pretrained(tmp_path)
    ours, pixels = CLIP.from_pretrained(tmp_path), torch.randn(2, 3, 30, 30)
    with torch.no_grad():
        want = theirs(input_ids=IDS, pixel_values=pixels)
        assert relative(ours(pixels, IDS), want.logits_per_image) < 1e-5
        assert relative(ours.encode_text(IDS), theirs.get_text_features(IDS).pooler_output) < 1e-5
        assert relative(ours.encode_image(pixels),
                        theirs.get_image_features(pixels).pooler_output) < 1e-5
        tower = CLIPVision.from_pretrained(tmp_path)  # the tower alone, out of the same folder
        assert torch.equal(tower(pixels), ours.vision(pixels))
    half = CLIPVision.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert all(p.dtype == torch.bfloat16 for p in half.parameters())
    assert half(pixels).dtype == torch.bfloat16


def test_transformers_reads_what_we_save(tmp_path):
    ours = shake(CLIP(CLIPVisionConfig(**VISION), CLIPTextConfig(**TEXT), projection_dim=24))
    ours.save_pretrained(tmp_path)
    theirs, info = transformers.CLIPModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    pixels = torch.randn(2, 3, 30, 30)
    with torch.no_grad():
        want = theirs.eval()(input_ids=IDS, pixel_values=pixels)
        assert relative(ours(pixels, IDS), want.logits_per_image) < 1e-5
    again = CLIP.from_pretrained(tmp_path)
    pairs = zip(ours.parameters(), again.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    vision = transformers.CLIPVisionModel.from_pretrained(tmp_path)
    assert relative(ours.vision(pixels)[-1], vision(pixels).last_hidden_state) < 1e-5


@pytest.mark.parametrize("layout", ["flat", "prefixed", "position_ids", "vlm"])
def test_image_tower_from_every_layout(tmp_path, layout):
    theirs = shake(transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**VISION)))
    theirs.save_pretrained(tmp_path)
    flat = load_file(tmp_path / "model.safetensors")
    assert "embeddings.class_embedding" in flat       # what transformers 5 writes
    if layout == "vlm":
        names = clip._from_public(CLIPVision(CLIPVisionConfig(**VISION)))
        tensors = {f"vision.{names[k]}": v for k, v in flat.items()}
        others = ("llm.norm.weight", "fuser.lwca.q.weight", "projector.0.bias")
        tensors |= {name: torch.ones(1) for name in others}
        config = {"model_type": "nanoccra", "vision": VISION, "llm": {}}
        (tmp_path / "config.json").write_text(json.dumps(config))
    else:
        tensors = {("" if layout == "flat" else "vision_model.") + k: v for k, v in flat.items()}
    if layout == "position_ids":                      # older files store this buffer
        tensors["vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    pixels = torch.randn(1, 3, 30, 30)
    with torch.no_grad():
        want = theirs(pixels, output_hidden_states=True).hidden_states
        got = CLIPVision.from_pretrained(tmp_path)(pixels)
    assert max(relative(g, w) for g, w in zip(got, want, strict=True)) < 1e-5


def test_the_legacy_end_of_text_rule(tmp_path):
    """eos_token_id = 2, as in OpenAI's own files: the text ends at its highest id, wherever 2
    stands."""
    theirs = public_clip(eos_token_id=2)
    theirs.save_pretrained(tmp_path)
    ids = torch.tensor([[2, 5, 98, 2, 2], [3, 97, 4, 2, 1]])
    with torch.no_grad():
        got, want = CLIP.from_pretrained(tmp_path).encode_text(ids), theirs.get_text_features(ids)
    assert relative(got, want.pooler_output) < 1e-5


def test_text_after_the_end_changes_nothing():
    model = shake(CLIP(CLIPVisionConfig(**VISION), CLIPTextConfig(**TEXT)))
    a, b = torch.tensor([[5, 98, 0, 0]]), torch.tensor([[5, 98, 98, 7]])
    torch.testing.assert_close(model.encode_text(a), model.encode_text(b))


def test_it_trains_from_scratch():
    """Both towers from their first weights: a few steps bring eight pairs together."""
    torch.manual_seed(0)
    model = CLIP(CLIPVisionConfig(**VISION), CLIPTextConfig(**TEXT))
    assert math.isclose(model.logit_scale.exp().item(), 1 / 0.07, rel_tol=1e-4)
    pixels, losses, own = torch.randn(8, 3, 30, 30), [], torch.arange(8)
    ids = torch.stack([own + 1, torch.full((8,), 98)], dim=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(10):
        logits = model(pixels, ids)
        both = [torch.nn.functional.cross_entropy(x, own) for x in (logits, logits.T)]
        losses.append(sum(both) / 2)
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert all(p.grad is not None for p in model.parameters())
    assert losses[-1] < 0.2 * losses[0]


# --------------------------------------------------------------------------------------------------
# Pictures

def noise(width, height, mode="RGB"):
    rng = np.random.default_rng(width * 1000 + height)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).convert(mode)


# width, height: landscape, portrait, already square, one off, tiny, slivers, odd
SIZES = [(640, 480), (480, 640), (336, 336), (337, 336), (335, 336), (28, 28), (1, 1), (1, 17),
         (17, 1), (3, 50), (2, 3), (101, 99), (255, 256), (500, 333), (333, 500), (7, 300),
         (1023, 767), (96, 96), (671, 337)]


def processor(size):
    return transformers.CLIPImageProcessorPil(size={"shortest_edge": size},
                                              crop_size={"height": size, "width": size})


def llava_square(image):
    """What LLaVA's padding comes to, written with arrays."""
    array = np.array(image)
    height, width = array.shape[:2]
    side = max(height, width)
    square = np.empty((side, side, 3), dtype=np.uint8)
    square[:] = [int(x * 255) for x in (0.48145466, 0.4578275, 0.40821073)]
    top, left = (side - height) // 2, (side - width) // 2
    square[top:top + height, left:left + width] = array
    return Image.fromarray(square)


@pytest.mark.parametrize("size", [336, 97])
def test_pixels_equal_the_public_processor(size):
    theirs = processor(size)
    for width, height in SIZES:
        image = noise(width, height)
        got = preprocess(image, size, pad=False)
        want = theirs(image, return_tensors="pt")["pixel_values"][0]
        assert got.dtype == torch.float32 and got.shape == (3, size, size)
        assert (got - want).abs().max() <= 1e-6, (width, height)
        got = preprocess(image, size, pad=True)
        want = theirs(llava_square(image), return_tensors="pt")["pixel_values"][0]
        assert (got - want).abs().max() <= 1e-6, (width, height, "padded")


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1"])
def test_other_modes_become_rgb(mode):
    image = noise(40, 30, mode)
    want = processor(28)(image.convert("RGB"), return_tensors="pt")["pixel_values"][0]
    assert (preprocess(image, 28, pad=False) - want).abs().max() <= 1e-6


def test_padding_is_clips_mean_colour_not_zero():
    pixels = preprocess(noise(300, 100), 336, pad=True)
    expected = torch.tensor([-0.01125, -0.01120, -0.00133])
    torch.testing.assert_close(pixels[:, 5, 5], expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(pixels[:, 330, 330], expected, atol=1e-5, rtol=0)


def test_slivers_are_refused_before_they_fill_the_memory():
    with pytest.raises(UserError, match="1 x 60000"):
        preprocess(Image.new("RGB", (1, 60000)), 336, pad=True)
    with pytest.raises(UserError, match="60000 x 1"):
        preprocess(Image.new("RGB", (60000, 1)), 336, pad=False)
    with pytest.raises(UserError, match="no pixels"):
        preprocess(Image.new("RGB", (0, 5)), 336, pad=False)


def test_read_pixels_is_open_image_and_preprocess(tmp_path):
    image, exif = noise(20, 10), Image.Exif()
    exif[274] = 6                                           # "turn me by 90 degrees": LLaVA doesn't
    image.save(tmp_path / "a.png", exif=exif)
    for upright, seen in ((False, image), (True, image.rotate(-90, expand=True))):
        assert torch.equal(read_pixels(tmp_path / "a.png", 28, True, upright),
                           preprocess(seen, 28, True))
    assert open_image(str(tmp_path / "a.png")).size == (20, 10)


# --------------------------------------------------------------------------------------------------
# What is wrong is named

@pytest.mark.parametrize("key, value", [
    ("hidden_act", "gelu"), ("num_channels", 1), ("attention_dropout", 0.1), ("hidden_size", "48"),
    ("num_hidden_layers", 0), ("num_attention_heads", 5), ("image_size", [30, 30]),
    ("layer_norm_eps", None)])
def test_a_config_we_do_not_implement_is_named(key, value):
    with pytest.raises(UserError, match=f"{key}.*{'' if key == 'num_attention_heads' else '=.*'}"):
        CLIPVisionConfig.from_dict(VISION | {key: value})


def test_defaults_of_partial_configs_are_clips_own(tmp_path):
    for ours in (CLIPVisionConfig, CLIPTextConfig):
        got, want = vars(ours.from_dict({})), getattr(transformers, ours.__name__)()
        assert got == {key: getattr(want, key) for key in got}
    assert CLIPTextConfig.from_dict({"eos_token_id": 0}).eos_token_id == 0
    old = {"vision_config": {"hidden_size": 1}, "vision_config_dict": {"hidden_size": 2}}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip"} | old))
    save_file({"x": torch.ones(1)}, tmp_path / "model.safetensors")
    assert Folder(tmp_path).parts == {"vision": {"hidden_size": 2}, "text": {}}


def test_wrong_folders_and_inputs_are_named(tmp_path):
    public_clip().save_pretrained(tmp_path)
    good = load_file(tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())

    def broken(tensors, config, reader, match):
        save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(UserError, match=match):
            reader.from_pretrained(tmp_path)

    for reader in (CLIPVision, CLIP):
        broken(good | {"vision_model.extra": torch.ones(1)}, config, reader, "vision_model.extra")
        rest = {k: v for k, v in good.items() if k != "vision_model.post_layernorm.bias"}
        broken(rest, config, reader, "post_layernorm.bias")
        broken(good | {"vision_model.embeddings.class_embedding": torch.ones(5)}, config, reader,
               "class_embedding")
        broken(good, config | {"model_type": "siglip"}, reader, "siglip")
        broken(good, config | {"vision_config": config["vision_config"] | {"hidden_act": "gelu"}},
               reader, "hidden_act")
        broken(good, config | {"vision_config": 3}, reader, "vision")
    broken(good, config | {"projection_dim": 25}, CLIP, "projection.weight")
    broken(good, config | {"text_config": config["text_config"] | {"num_channels": 1}}, CLIP,
           "num_channels")

    tower = CLIPVision(CLIPVisionConfig(**VISION))
    for shape in [(1, 3, 28, 28), (3, 30, 30), (1, 1, 30, 30), (1, 3, 30, 31)]:
        with pytest.raises(UserError, match=r"30, 30"):
            tower(torch.zeros(shape))
    with pytest.raises(UserError, match="4 layers"):
        tower(torch.zeros(1, 3, 30, 30), n_layers=4)
    text = clip.CLIPText(CLIPTextConfig(**TEXT))
    with pytest.raises(UserError, match="10 tokens.*9 positions"):
        text(torch.zeros(1, 10, dtype=torch.long))
    with pytest.raises(UserError, match="98"):     # transformers would take the first token's state
        text.pooled(torch.zeros(2, 2, 32), torch.tensor([[1, 98], [1, 2]]))
