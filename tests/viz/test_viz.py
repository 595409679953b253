"""look.py and viz.py: what is drawn is what was looked at; and the explorer in a real browser, where there is one
(Debian: apt-get install chromium). NANOCCRA_SCREENSHOT=assets/explorer.png makes that test write the README's picture.
"""
import base64
import json
import math
import os
import re
import shutil
import subprocess

import numpy as np
import pytest
import torch
from PIL import Image

import sample
from ccra import VLM, CCRAConfig
from clip import CLIPVision, expand_to_square, preprocess
from core import canvas
from core.common import ROOT, UserError
from core.tokenizer import Tokenizer
from data import collate, prompt, query_of
from fast.packed import Columns
from llama import Llama, LlamaConfig
from toy import world as toy
from viz import __main__ as program
from viz import explorer, pointing
from viz import figures as viz
from viz import maps as look

SCENE = ROOT / "assets" / "scene.png"
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_pretrained(toy.MODEL)


def build(towers, **changes):
    """A VLM of random weights, large enough that attention is far from even: 4 patches, 3 layers, 2 blocks."""
    torch.manual_seed(0)
    vision, llm = CLIPVision.from_pretrained(towers / "clip"), Llama.from_pretrained(towers / "llama")
    model = VLM.build(vision, llm, CCRAConfig(32, 16, 3, 8, **changes))
    for name, p in model.named_parameters():
        if p.ndim == 2 and "embed" not in name:
            torch.nn.init.normal_(p, std=1.5 * p.shape[1] ** -0.5)
    return model.eval()


def batch_of(model, tokenizer, question, image):
    row = prompt([(question, None)], tokenizer)
    b = collate([dict(ids=row.ids, labels=row.labels, query=query_of(row.turns, model.query),
                      pixels=preprocess(image, **model.image))])
    return {key: value for key, value in b.items() if key != "labels"}


def scene(i=0):
    return toy.draw(toy.make_scene(f"viz/{i}"))


def random_sight(A=5, L=24, grid=24, size=(336, 336), words=("Where", " is", " it", "?"), tokens=None, seed=0):
    """A Sight without a model; noise is what a JPEG stores worst."""
    rng, g = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    image = Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    draw = lambda *shape: torch.randn(*shape, generator=g)
    maps = dict(alpha=draw(len(words)).softmax(-1), W_lp=draw(L, grid ** 2), w_l=draw(L), w_hat=draw(L).softmax(-1),
                w_p=draw(grid ** 2), layer_map=draw(L, grid ** 2))
    image, box = look.visible(image, True)
    return look.Sight(image, box, grid, "".join(words), list(words), tokens or [" word"] * A,
                     draw(2, A, grid ** 2).softmax(-1), [2, 3], maps)


# ---------------------------------------------------------------------------------------------------------------------
# Looking

def eager(llm, embeds):
    """All attention weights (layers, H, T, T), by transformers' own written-out attention."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(**{k: v for k, v in llm.config.to_dict().items() if k != "rope_theta"},
                                      rope_theta=llm.config.rope_theta, attn_implementation="eager")
    oracle = transformers.LlamaForCausalLM(config).eval()
    names = {n if n == "lm_head.weight" else f"model.{n}": p for n, p in llm.named_parameters()}
    oracle.load_state_dict({**names, "lm_head.weight": llm.lm_head.weight})
    with torch.no_grad():
        return torch.stack(oracle(inputs_embeds=embeds, output_attentions=True).attentions)[:, 0]


@torch.no_grad()
def slow_rows(model, batch, tokens):
    """What `watch` should see: prompt and answer read once, as one row, and the rows from which the tokens are said."""
    visual = model.look(batch["pixels"], batch["query"], batch["query_mask"])[0]
    embeds = model.merge(visual, batch["ids"])[0]
    embeds = torch.cat([embeds, model.llm.embed(torch.tensor([tokens]))], 1)
    weights = eager(model.llm, embeds).mean(1)                                       # (layers, T, T)
    start = embeds.shape[1] - len(tokens) - 1
    return [[weights[l, start + i, :start + i + 1] for i in range(len(tokens))] for l in range(len(weights))]


def test_attention_equals_the_slow_path(towers, tokenizer):
    """Grouped heads, a cache, twelve tokens: each row against transformers; rows sum to 1; the picture's part."""
    model, question = build(towers), "Where is the cat?"
    batch = batch_of(model, tokenizer, question, scene())
    with look.watch(model, range(2)) as seen:
        tokens = [int(t) for t in model.generate(**batch, max_new_tokens=12)]
    expected = slow_rows(model, batch, tokens)
    assert len(tokens) == 12
    for l in range(2):
        for got, right in zip(seen.rows[l], expected[l], strict=True):
            torch.testing.assert_close(got, right, atol=1e-5, rtol=0)
            assert abs(got.sum().item() - 1) < 1e-5
    assert max(row.max().item() for row in seen.rows[1]) > 0.05                      # not an even map, which any is
    at = batch["ids"][0].tolist().index(-200)
    sight = look.ask(model, tokenizer, scene(), question, layers=[1], max_new_tokens=12)
    right = torch.stack([row[at:at + 4] for row in expected[1]])
    torch.testing.assert_close(sight.llm[0], right, atol=1e-5, rtol=0)
    torch.testing.assert_close(sight.looked(), right.mean(0), atol=1e-5, rtol=0)
    torch.testing.assert_close(sight.looked(3), right[3], atol=1e-5, rtol=0)
    assert sight.layers == [2] and "".join(sight.words).strip() == question


def test_attention_of_int8_models(towers, tokenizer):
    """Their q, k and v are one layer. int8 against transformers on the numbers that int8 stands for."""
    model, twin = build(towers), build(towers)
    model.llm.pack(int8=True)
    batch = batch_of(model, tokenizer, "Where is it? " * 6, scene())      # up to 16 rows int8's kernel rounds x
    with look.watch(model, range(2)) as seen:
        tokens = [int(t) for t in model.generate(**batch, max_new_tokens=3)]
    for block, packed in zip(twin.llm.layers, model.llm.layers):
        attn, mlp = block.self_attn, block.mlp
        for layers, new in (([attn.q_proj, attn.k_proj, attn.v_proj], packed.self_attn.qkv_proj),
                            ([attn.o_proj], packed.self_attn.o_proj), ([mlp.down_proj], packed.mlp.down_proj),
                            ([mlp.gate_proj, mlp.up_proj], packed.mlp.gate_up_proj)):
            parts = (new.weight * new.scale.float()[:, None]).split([len(layer.weight) for layer in layers])
            for layer, part in zip(layers, parts, strict=True):
                layer.weight.data.copy_(part)
    expected = slow_rows(twin, batch, tokens)
    for l in range(2):
        torch.testing.assert_close(seen.rows[l][0], expected[l][0], atol=1e-5, rtol=0)
        for got, right in zip(seen.rows[l], expected[l], strict=True):               # as it does from the second on
            torch.testing.assert_close(got, right, atol=2e-2, rtol=0)


def test_attention_of_models_laid_out_anew(towers, tokenizer, monkeypatch):
    """`Columns`, in whose widths (of 64) and on whatever CPU: the rows are those of the model as it was."""
    monkeypatch.setattr(Columns, "fit", staticmethod(lambda weights: True))
    torch.manual_seed(0)
    llm = Llama(LlamaConfig(vocab_size=896, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                            num_attention_heads=4)).requires_grad_(False)
    model = VLM.build(CLIPVision.from_pretrained(towers / "clip"), llm, CCRAConfig(64, 16, 3, 8)).bfloat16().eval()
    for block in llm.layers:
        block.self_attn.q_proj.weight.normal_(std=0.3)
        block.self_attn.k_proj.weight.normal_(std=0.3)
    rows = []
    for pack in (False, True):
        if pack:
            assert type(llm.pack().layers[0].self_attn.qkv_proj) is Columns
        sight = look.ask(model, tokenizer, scene(), "Is it red?", [0, 1], max_new_tokens=1)
        rows.append(sight.llm)
    torch.testing.assert_close(*rows, atol=1e-2, rtol=0)
    assert rows[0].max() > 2 * rows[0].mean()


@pytest.mark.parametrize("pack", [None, "int8"])
def test_watching_changes_no_answer_and_leaves_nothing(towers, tokenizer, pack):
    """Draws at temperature 1 are the same tokens; afterwards, also after an error, no hook is left anywhere."""
    model = build(towers)
    if pack:
        model.llm.pack(int8=True)
    batch = batch_of(model, tokenizer, "What color is the square?", scene())

    def draws():
        return [int(t) for t in model.generate(**batch, max_new_tokens=40, temperature=1.0,
                                               generator=torch.Generator().manual_seed(5))]
    before = draws()
    with look.watch(model, range(2)):
        watched = draws()
    with pytest.raises(KeyError), look.watch(model):
        raise KeyError
    assert before == watched == draws() and len(set(before)) > 5
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("changes", [dict(), dict(order="shuffled"), dict(order="decoupled"), dict(smooth=False),
                                     dict(norm="stack"), dict(lwca=False), dict(order="lwca_only"),
                                     dict(order="pwca_only")])
def test_the_layers_scores_come_apart_into_patches(towers, tokenizer, changes):
    """LWCA mapped back: the softmax of the patches' means is w_hat, in every arrangement."""
    sight = look.ask(build(towers, **changes), tokenizer, scene(1), "Is there a cat?", max_new_tokens=2)
    torch.testing.assert_close(sight.maps["layer_map"].mean(-1).softmax(-1), sight.maps["w_hat"], atol=1e-5, rtol=0)
    assert sight.maps["layer_map"].shape == (3, 4) and sight.maps["w_p"].shape == (4,)
    assert abs(sight.maps["alpha"].sum().item() - 1) < 1e-5 and abs(sight.maps["w_hat"].sum().item() - 1) < 1e-5
    assert viz.figure3(sight).size > (300, 300) and viz.figure4([sight, sight]).size > (300, 200)


def test_a_model_without_maps(towers, tokenizer):
    """Plain LLaVA weighs nothing: the picture and the language model's attention are left."""
    from fusers.llava import LLaVAConfig
    model = VLM.build(CLIPVision.from_pretrained(towers / "clip"), Llama.from_pretrained(towers / "llama"),
                      LLaVAConfig(16, 3)).eval()
    sight = look.ask(model, tokenizer, scene(), "Is there a cat?", max_new_tokens=2, name="LLaVA")
    assert viz.figure3(sight).width > 300 and viz.side_by_side([[sight, sight]]).width > 600
    assert '"layers": 0' in explorer.explorer(sight)
    with pytest.raises(UserError, match="doesn't weigh layers"):
        viz.figure4([sight])


def test_of_too_few_there_is_no_interval():
    assert pointing.mean95([0.0, 1.0]) == pytest.approx((0.5, 1.96 * 0.5 ** 0.5 / 2 ** 0.5))
    assert pointing.mean95([0.25])[0] == 0.25 and all(math.isnan(x) for x in (pointing.mean95([0.25])[1], *pointing.mean95([])))


def test_middle():
    assert [list(look.middle(n)) for n in (1, 2, 3, 4, 6)] == [[0], [0], [0, 1], [1], [1, 2, 3]]
    assert [layer + 1 for layer in look.middle(32)] == list(range(11, 22))            # n/3 = 10.7 to 2n/3 = 21.3


def test_pieces_put_together_are_the_text(tokenizer):
    text = "Where is the caf\u00e9 \U0001f600, <b>cat</b>?\nHere"
    ids = tokenizer.encode(text)
    found = look.pieces(tokenizer, ids)
    assert len(found) == len(ids) and "".join(found) == tokenizer.decode(ids) == text
    assert "\U0001f600" in found and look.pieces(tokenizer, []) == []


# ---------------------------------------------------------------------------------------------------------------------
# Colours and pictures

def oklab(rgb):
    """sRGB (..., 3) of 8 bits -> OKLab, by the published matrices the other way round."""
    c = rgb / 255
    c = np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)
    lms = np.cbrt(c @ np.array([[0.4122214708, 0.5363325363, 0.0514459929], [0.2119034982, 0.6806995451, 0.1073969566],
                                [0.0883024619, 0.2817188376, 0.6299787005]]).T)
    return lms @ np.array([[0.2104542553, 0.7936177850, -0.0040720468], [1.9779984951, -2.4285922050, 0.4505937099],
                           [0.0259040371, 0.7827717662, -0.8086757660]]).T


def test_the_colour_map_is_even():
    """Lightness rises by the same step everywhere (8 bits allow 0.004), from dark to light; equal steps look alike."""
    lab = oklab(canvas.COLOURS.astype(float))
    steps = np.diff(lab[::15, 0])                                                    # 17 steps
    assert lab[0, 0] < 0.25 and lab[-1, 0] > 0.9 and (np.diff(lab[::3, 0]) > 0).all()
    assert steps.max() - steps.min() < 0.008
    apart = np.linalg.norm(np.diff(lab[::15], axis=0), axis=1)
    assert apart.max() / apart.min() < 1.4
    assert len(np.unique(canvas.COLOURS, axis=0)) == 256
    assert np.abs(oklab(np.array(canvas.hues(6)).astype(float))[:, 0] - 0.55).max() < 0.02


@pytest.mark.parametrize("pad", [True, False])
@pytest.mark.parametrize("size", [(300, 300), (400, 150), (110, 330), (301, 200)])
def test_the_map_lies_on_the_picture(size, pad):
    """A red spot: the patches in which clip.preprocess puts it are the ones drawn where the picture has it."""
    grid, (w, h) = 24, size
    image = Image.new("RGB", size, (0, 0, 255))
    image.paste((255, 0, 0), (w // 2 - 40, h // 2 - 30, w // 2 + 17, h // 2 + 41))
    pixels = preprocess(image, grid * 14, pad)                                       # (3, 336, 336)
    red = (pixels[0] > pixels[2]).float().view(grid, 14, grid, 14).mean((1, 3))      # (grid, grid), share
    sight = look.Sight(*look.visible(image, pad), grid, "", [], [], torch.zeros(1, 1, grid ** 2), [1], {})
    drawn = viz.overlay(sight, (red > 0.5).float().flatten(), 0, 1, sight.image.size)
    hot, true = np.asarray(drawn)[..., 0] > 150, np.asarray(sight.image)[..., 0] > 128           # (h, w) both
    patch = (max if pad else min)(size) / grid
    for found, right in zip(np.nonzero(hot), np.nonzero(true)):                      # rows, columns
        assert abs(found.min() - right.min()) <= patch / 2 + 1 and abs(found.max() - right.max()) <= patch / 2 + 1


def test_overlay_pixel_by_pixel():
    """Against the padded square drawn whole, patch by patch, and cut to the picture."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 96, 3), dtype=np.uint8))
    values = torch.randn(64, generator=torch.Generator().manual_seed(0))
    sight = look.Sight(*look.visible(image, True), 8, "", [], [], torch.zeros(1, 1, 64), [1], {})
    lo, hi = values.min().item(), values.max().item()
    drawn = np.asarray(viz.overlay(sight, values, lo, hi, image.size))
    square = Image.new("RGB", (96, 96))
    for n, v in enumerate(values.tolist()):
        colour = tuple(canvas.COLOURS[round(255 * (v - lo) / (hi - lo))].tolist())
        square.paste(colour, (n % 8 * 12, n // 8 * 12, n % 8 * 12 + 12, n // 8 * 12 + 12))
    assert expand_to_square(image).size == square.size
    heat = np.asarray(square.crop((0, 18, 96, 78))).astype(float)
    grey = (80 + 0.4 * np.asarray(image.convert("L")).astype(float))[..., None]
    assert np.abs(drawn - (canvas.HEAT * heat + (1 - canvas.HEAT) * grey)).max() <= 2
    assert len(viz.inside(sight, values)) == 6 * 8                                   # rows 1.5 to 6.5 of 8


@pytest.mark.parametrize("size", [(336, 336), (500, 120), (90, 400)])
def test_nothing_is_cut_off(size):
    """Long questions and answers, narrow and wide pictures: a white margin remains on all sides of every sheet."""
    sight = random_sight(A=60, L=7, grid=8, size=size, words=["Where", " is", " x" * 9, "y" * 300, " \n"] * 4)
    sight.name = "a model with quite a long name " * 3
    sheets = [viz.figure3(sight, [1, 7]), viz.figure4([sight] * 3), viz.side_by_side([[sight] * 2])]
    for sheet in sheets:
        pixels = np.asarray(sheet)
        for edge in (pixels[:8], pixels[-8:], pixels[:, :8], pixels[:, -8:]):
            assert (edge == 255).all()
        assert sheet.width < 1400 and (pixels < 255).any()
    for layers in ([0], [8]):
        with pytest.raises(UserError, match="layers 1 to 7"):
            viz.figure3(sight, layers)


# ---------------------------------------------------------------------------------------------------------------------
# The command line

def test_sample_draws(tmp_path, capsys, monkeypatch):
    """stdout has the same answers with and without; without, nothing of viz.py is called."""
    ask = ["--image", str(SCENE), "--q", "What color is the square?"]
    with monkeypatch.context() as m:
        m.setattr(look, "watch", None)
        sample.main(ask)
    plain = capsys.readouterr().out
    files = {name: tmp_path / name for name in ("3.png", "4.png", "6.png", "x.html")}
    sample.main(ask + ["--heatmap", str(files["3.png"]), "--html", str(files["x.html"]), "--layers", "1,2"])
    assert capsys.readouterr().out == plain
    sample.main(ask + ask[2:] + ["--heatmap", str(files["4.png"])])
    assert capsys.readouterr().out == 2 * plain
    sample.main(ask + ["--beside", str(toy.MODEL), "--quant", "int8", "--heatmap", str(files["6.png"])])
    assert len(capsys.readouterr().out.splitlines()) == 2
    for name in ("3.png", "4.png", "6.png"):
        assert min(Image.open(files[name]).size) > 200
    assert files["x.html"].read_text().startswith("<!DOCTYPE html>")
    assert sorted(tmp_path.iterdir()) == sorted(files.values())


@pytest.mark.parametrize("arguments, names", [
    (["--heatmap", "no/such/x.png"], "no/such"), (["--heatmap", "x.jpg"], ".png"), (["--html", "x.txt"], ".html"),
    (["--layers", "3"], "--heatmap"), (["--heatmap", "x.png", "--layers", "a,b"], "a,b"),
    (["--heatmap", "x.png", "--layers", ""], "--layers"),
    (["--beside", "x"], "--heatmap"),
    (["--chat", "--heatmap", "x.png"], "--chat"), (["--q", "again?", "--html", "x.html"], "one --q"),
    (["--chat", "--q", "again?"], "one --q")])
def test_refusals(arguments, names):
    with pytest.raises(UserError, match=re.escape(names)) as e:
        sample.arguments(["--image", "x.png", "--q", "what?", *arguments])
    assert "\n" not in str(e.value)


# ---------------------------------------------------------------------------------------------------------------------
# Numbers

def test_cover_counts_pixels():
    box, side, grid = (13.5, 20.25, 40.0, 71.5), 96, 8
    covered, centre = pointing.cover(box, grid, side)
    at = (np.arange(96 * 8) + 0.5) / 8                                               # 8 samples a pixel and direction
    inside = ((at >= box[1]) & (at <= box[3]))[:, None] & ((at >= box[0]) & (at <= box[2]))
    assert np.abs(inside.reshape(8, 96, 8, 96).mean((1, 3)).ravel() - covered.numpy()).max() < 1e-9
    centres = [box[0] <= x <= box[2] and box[1] <= y <= box[3] for y in range(6, 96, 12) for x in range(6, 96, 12)]
    assert centre.tolist() == centres
    assert abs(covered.mean().item() - (40 - 13.5) * (71.5 - 20.25) / 96 ** 2) < 1e-9
    assert pointing.cover((-50, -50, 200, 200), 8, 96)[0].min() == 1 == pointing.cover((-50, -50, 200, 200), 8, 96)[0].max()


def test_pointing_tells_a_perfect_map_from_an_even_one(monkeypatch, tokenizer):
    """A model that looks at the asked thing alone gets all of the mass; one that looks evenly gets what chance has."""
    items = {}
    for item, asked, other in pointing.where_items(0, 20):
        assert toy.PLACES[asked[0].cell] == item.turns[-1].short and (other is None or other[0].cell != asked[0].cell)
        items[toy.draw(item.scene).tobytes()] = pointing.cover(toy.box(*asked[:4]), 8, 96)[0].float()
    assert len(items) == 20

    def ask(model, tokenizer, image, question, layers, max_new_tokens):
        best, even = items[image.tobytes()], torch.ones(64)
        best = best * (best == best.max())
        return look.Sight(image, (0, 0, 1, 1), 8, question, [], [""], torch.stack([best, even])[:, None], [1, 2],
                         dict(w_p=100 * best, W_lp=100 * torch.stack([best, best])))
    monkeypatch.setattr(look, "ask", ask)
    model = type("Model", (), dict(llm=type("Llm", (), dict(layers=[0, 1]))))
    scores = pointing.pointing(model, tokenizer, 20, 0)
    assert len(scores) == 5
    for name in ("PWCA", "LPWCA, mean of the layers", "language model, block 1"):
        assert pointing.mean95(scores[name]["hit"])[0] == 1 and pointing.mean95(scores[name]["mass"])[0] > 0.95
    for part in ("hit", "mass"):
        assert scores["language model, block 2"][part] == pytest.approx(scores["chance"][part])
    assert pointing.mean95(scores["PWCA"]["mass other"])[0] < 0.1 and pointing.mean95(scores["PWCA"]["hit other"])[0] < 0.2
    areas = [covered.mean().item() for covered in items.values()]
    assert scores["chance"]["mass"] == pytest.approx(areas)


def test_intervals_and_depth():
    values = [0.0, 1.0, 1.0, 0.0, 1.0]
    mean, half = pointing.mean95(values)
    assert mean == pytest.approx(0.6) and half == pytest.approx(1.96 * np.std(values, ddof=1) / 5 ** 0.5)
    assert pointing.depth(torch.tensor([0.0, 0.0, 1.0])) == 3 and pointing.depth(torch.full((8,), 1 / 8)) == pytest.approx(4.5)


def test_deeper_is_deeper(capsys):
    pointing.show_depths(dict.fromkeys(pointing.LOOKS, [1.0, 2.0]) | dict.fromkeys(pointing.THOUGHT, [3.0, 4.0]), 8)
    assert "count, left-of deeper than colour, word by 2.000 +-" in capsys.readouterr().out


def test_the_commands_print_tables(capsys):
    program.main(["--pointing", "--n", "3"])
    program.main(["--depth", "--n", "2"])
    out = capsys.readouterr().out
    assert "chance" in out and "PWCA" in out and "language model, block 1" in out and out.count("+-") > 12
    assert "count, left-of deeper than colour, word by" in out
    with pytest.raises(UserError, match="--n 1"):
        program.main(["--depth", "--n", "1"])


# ---------------------------------------------------------------------------------------------------------------------
# The explorer

EVIL = ["</script><img src=x onerror=\"document.title='hacked'\">", " <b>bold</b>", " &lt;i&gt;&amp;",
        " \u2028'\"`${1}\\"]


def embedded(page):
    return json.loads(page.split('id="data">')[1].split("</script>")[0])


def test_one_file_of_a_bearable_size():
    """336 px of noise, 24 layers, 576 patches, 128 tokens: under 1.5 MB, with nothing from elsewhere in it."""
    sight = random_sight(A=128, words=EVIL * 10)
    page = explorer.explorer(sight)
    assert len(page.encode()) <= 1.5e6
    code = explorer.TEMPLATE.read_text().replace("http://www.w3.org/2000/svg", "")         # SVG's name, nothing to fetch
    assert not re.search(r"\b(?:src|href) *=(?! data\.image)|//\w|fetch\(|\bimport\b|XMLHttp|innerHTML|url\(", code)
    assert page.count("</script>") == 2 and page.count("<img") == 0 and "default-src 'none'" in page
    data = embedded(page)
    assert data["words"] == EVIL * 10 and data["grid"] == 24
    numbers = np.frombuffer(base64.b64decode(data["llm"]), "<f4").reshape(128, 576)
    assert np.abs(numbers - sight.llm.mean(0).numpy()).max() == 0
    numbers = np.frombuffer(base64.b64decode(data["W_lp"]), "<f4").reshape(24, 576)
    assert np.abs(numbers - sight.maps["W_lp"].numpy()).max() == 0


class Browser:
    """Chromium without a window, spoken to in its own protocol (JSON and a 0 byte, by way of two pipes)."""

    def __init__(self, program, folder):
        theirs, self.send_to = os.pipe()
        self.read_from, out = os.pipe()
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run",
                 "--disable-sync", "--disable-dev-shm-usage", f"--user-data-dir={folder}", "--remote-debugging-pipe"]
        shell = ["bash", "-c", f'exec "$@" 3<&{theirs} 4>&{out}', "-"]
        self.process = subprocess.Popen([*shell, program, *flags, "about:blank"], pass_fds=(theirs, out),
                                        stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        os.close(theirs), os.close(out)
        self.heard, self.last, self.session, self.events = b"", 0, {}, []
        page = next(t for t in self("Target.getTargets")["targetInfos"] if t["type"] == "page")
        attached = self("Target.attachToTarget", targetId=page["targetId"], flatten=True)
        self.session = dict(sessionId=attached["sessionId"])
        for part in ("Page", "Runtime", "Log", "Network"):
            self(part + ".enable")

    def __call__(self, method, **params):
        self.last += 1
        asked = json.dumps(dict(id=self.last, method=method, params=params, **self.session))
        os.write(self.send_to, asked.encode() + b"\0")
        while True:
            while b"\0" not in self.heard:
                if not (more := os.read(self.read_from, 2 ** 20)):
                    raise EOFError(f"the browser ended during {method}")
                self.heard += more
            message, self.heard = self.heard.split(b"\0", 1)
            message = json.loads(message)
            if message.get("id") == self.last:
                assert "error" not in message, message
                return message["result"]
            self.events.append(message)

    def run(self, script):
        """A JavaScript expression's value; a promise is waited for."""
        result = self("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def key(self, name, code):
        for kind in ("keyDown", "keyUp"):
            self("Input.dispatchKeyEvent", type=kind, key=name, code=name, windowsVirtualKeyCode=code)

    def open(self, file):
        self("Page.navigate", url=file.as_uri())
        self.run("new Promise((done, fail) => { const wait = setInterval(() => { if (document.body?.dataset.ready) {"
                 " clearInterval(wait); done(); } }, 20); setTimeout(fail, 20000); })")

    def complaints(self):
        """What went to the console, exceptions, and requests for anything but the file itself and data in it."""
        found = [e for e in self.events if e["method"] in ("Runtime.exceptionThrown", "Log.entryAdded",
                                                           "Runtime.consoleAPICalled")]
        return found + [e for e in self.events if e["method"] == "Network.requestWillBeSent"
                        and not e["params"]["request"]["url"].startswith(("file:", "data:"))]


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    program = shutil.which("chromium") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("needs a browser: apt-get install chromium (or google-chrome) to test the explorer in it")
    browser = Browser(program, tmp_path_factory.mktemp("profile"))
    yield browser
    browser("Browser.close")
    browser.process.wait(20)


MAP = "document.getElementById('map').toDataURL()"


def test_the_explorer_in_a_browser(browser, tmp_path, tokenizer):
    """The embedded model's page: slider, curve, tokens, patches, keys do what they say; light and dark; no errors."""
    model = VLM.from_pretrained(toy.MODEL, dtype=torch.float32).eval()
    question = "What color is the square? Answer in a sentence."
    sight = look.ask(model, tokenizer, Image.open(SCENE).convert("RGB"), question)
    (tmp_path / "x.html").write_text(explorer.explorer(sight), encoding="utf-8")
    browser("Emulation.setDeviceMetricsOverride", width=1120, height=810, deviceScaleFactor=1, mobile=False)
    browser.open(tmp_path / "x.html")
    L, text = len(sight.maps["w_hat"]), "document.getElementById('{}').textContent".format

    def numbers():
        return browser.run("[...document.querySelectorAll('#values td:nth-child(2)')].map(x => Number(x.textContent))")

    def shown(patch, layer, token=None):
        maps = sight.maps
        row = maps["W_lp"][layer - 1], maps["layer_map"][layer - 1], maps["w_p"], sight.looked(token)
        return pytest.approx([values[patch].item() for values in row], rel=6e-3, abs=1e-9)       # 3 digits are shown

    middle = (sight.grid // 2) * (sight.grid + 1)
    assert browser.run(text("layer")) == f"{L} of {L}" and numbers() == shown(middle, L)
    pictures = {browser.run(MAP)}
    for layer in (1, 2):                                                             # the slider changes the map
        browser.run(f"(s => {{ s.value = {layer}; s.dispatchEvent(new Event('input')); }})"
                    "(document.getElementById('slider'))")
        pictures.add(browser.run(MAP))
        assert browser.run(text("layer")) == f"{layer} of {L}" and numbers() == shown(middle, layer)
    browser.run("document.getElementById('slider').focus()")                         # by keyboard
    browser.key("ArrowRight", 39)
    assert numbers() == shown(middle, 3)
    pictures.add(browser.run(MAP))
    browser.run("document.getElementById('curve').focus()")
    browser.key("End", 35)
    browser.key("ArrowLeft", 37)
    assert numbers() == shown(middle, L - 1)
    browser.run("document.getElementById('map').focus()")
    browser.key("ArrowUp", 38)
    browser.key("ArrowLeft", 37)
    assert numbers() == shown(middle - sight.grid - 1, L - 1)
    at = browser.run("(r => [r.left + r.width * 0.01, r.top + r.height * 0.99])"      # hover a patch
                     "(document.getElementById('map').getBoundingClientRect())")
    browser("Input.dispatchMouseEvent", type="mouseMoved", x=at[0], y=at[1])
    assert numbers() == shown(sight.grid * (sight.grid - 1), L - 1)
    at = browser.run("(r => [r.left + r.width * 56 / 480, r.top + 40])"               # hover, then click the curve
                     "(document.getElementById('curve').getBoundingClientRect())")
    browser("Input.dispatchMouseEvent", type="mouseMoved", x=at[0], y=at[1])
    assert browser.run(text("weights")).startswith("Layer 1:") and browser.run(text("layer")) == f"{L - 1} of {L}"
    for kind in ("mousePressed", "mouseReleased"):
        browser("Input.dispatchMouseEvent", type=kind, x=at[0], y=at[1], button="left", clickCount=1)
    assert browser.run(text("layer")) == f"1 of {L}"
    chosen = "document.querySelector('[name=kind]:checked').value"
    browser.run("document.querySelector('[value=w_p]').click()")
    pictures.add(browser.run(MAP))
    assert browser.run("document.querySelectorAll('#tokens button').length") == len(sight.tokens) + 1
    for token in range(2 if len(sight.tokens) > 1 else 1):
        browser.run(f"document.querySelectorAll('#tokens button')[{token + 1}].click()")
        assert numbers() == shown(sight.grid * (sight.grid - 1), 1, token)
        pictures.add(browser.run(MAP))
    assert len(pictures) >= 6 and browser.run(chosen) == "llm"
    browser.run("document.getElementById('slider').focus()")                         # layers are LPWCA's and LWCA's
    browser.key("ArrowRight", 39)
    assert browser.run(chosen) == "W_lp"
    assert browser.run("document.querySelectorAll('#words span').length") == len(sight.words)
    grounds = []
    for scheme in ("light", "dark"):
        browser("Emulation.setEmulatedMedia", features=[dict(name="prefers-color-scheme", value=scheme)])
        grounds.append(browser.run("getComputedStyle(document.body).backgroundColor"))
    assert grounds == ["rgb(255, 255, 255)", "rgb(23, 23, 26)"]
    assert browser.run("document.documentElement.scrollWidth <= innerWidth")         # nothing sticks out
    assert browser.complaints() == []
    browser("Emulation.setEmulatedMedia", features=[dict(name="prefers-color-scheme", value="light")])
    browser.open(tmp_path / "x.html")
    file = os.environ.get("NANOCCRA_SCREENSHOT", tmp_path / "explorer.png")
    with open(file, "wb") as f:
        f.write(base64.b64decode(browser("Page.captureScreenshot", format="png")["data"]))
    assert Image.open(file).size == (1120, 810) and os.path.getsize(file) < 300_000


def test_text_cannot_become_markup(browser, tmp_path):
    """A question and an answer that try: they are shown as they were typed, and nothing of them is an element."""
    page = explorer.explorer(random_sight(A=len(EVIL), L=3, grid=4, words=EVIL, tokens=EVIL))
    (tmp_path / "evil.html").write_text(page, encoding="utf-8")
    browser.events.clear()
    browser.open(tmp_path / "evil.html")
    assert browser.run("document.querySelectorAll('img, b, i').length") == 0
    assert browser.run("document.title").startswith("nanoCCRA")
    shown = browser.run("[...document.querySelectorAll('#words span')].map(x => x.firstChild.textContent)")
    assert shown == [word.strip() for word in EVIL]
    shown = browser.run("[...document.querySelectorAll('#tokens button')].slice(1).map(x => x.textContent)")
    assert shown == [word.strip() for word in EVIL]
    assert browser.complaints() == []
    browser("Emulation.setDeviceMetricsOverride", width=390, height=800, deviceScaleFactor=1, mobile=True)
    assert browser.run("document.documentElement.scrollWidth <= innerWidth")         # on a telephone, too
