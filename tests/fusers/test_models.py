"""The fusers in a model: saved and loaded, asked in batches, trained by both stages."""
import math

import pytest
import torch

import data
import train
from ccra import IMAGE_TOKEN, NAMED, VLM
from clip import CLIP, CLIPTextConfig
from core.common import UserError
from core.tokenizer import Tokenizer
from tests.fusers.helpers import TOWER, tiny_vlm
from toy import dataset
from training import options, plan
from training.export import export_llava

pytestmark = pytest.mark.usefixtures("one_thread")

# --------------------------------------------------------------------------------------------------
# In the model



@pytest.mark.parametrize("name", NAMED)
def test_save_and_load_bit_for_bit(tmp_path, name):
    model = tiny_vlm(name)
    model.save_pretrained(tmp_path)
    again = VLM.from_pretrained(tmp_path)
    assert again.fuser.config == model.fuser.config and type(again.fuser) is type(model.fuser)
    assert again.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(p, again.state_dict()[key]) for key, p in model.state_dict().items())
    assert [p.requires_grad for p in again.fuser.parameters()
            ] == [p.requires_grad for p in model.fuser.parameters()]


@pytest.mark.parametrize("name, old, new, match", [
    ("dci", '"kind": "dci"', '"kind": "sti"', "misshapen"),
    ("dci", '"kind": "dci"', '"kind": "tsi"', "kind = 'tsi'"),
    ("wide", '"copies"', '"copied"', "gives the fuser 'copied'"),
    ("igva", '"igva"', '"egva"', "fuser 'egva'"),
    ("mmfuser", '"points": 4', '"points": 3', "misshapen"),
    ("igva", '"text_dim": 24', '"text_dim": 25', "text_dim"),
    ("lwca", '"lwca_only"', '"lwca_alone"', "order")])
def test_a_config_that_does_not_fit(tmp_path, name, old, new, match):
    tiny_vlm(name).save_pretrained(tmp_path)
    text = (tmp_path / "config.json").read_text()
    assert old in text
    (tmp_path / "config.json").write_text(text.replace(old, new))
    with pytest.raises(UserError, match=match):
        VLM.from_pretrained(tmp_path)


def test_only_one_copy_is_plain_llava(tmp_path):
    with pytest.raises(UserError, match="only plain LLaVA"):
        export_llava(tiny_vlm("wide"), tmp_path)


def test_a_batch_of_unequal_rows_says_what_each_says_alone():
    """With sti, whose picture takes 16 + 2 + 2 places."""
    model = tiny_vlm("sti", seed=1)
    assert model.picture_rows == 20
    ids = torch.tensor([[1, 5, IMAGE_TOKEN, 6, 7], [0, 0, 1, 8, 9], [0, 1, IMAGE_TOKEN, 10, 11]])
    mask, pixels = ids != 0, torch.randn(3, 3, 32, 32).double()
    query, asked = torch.tensor([[6, 7], [8, 9], [10, 0]]), torch.tensor([[1, 1], [1, 1],
                                                                          [1, 0]]).bool()
    def say(rows):
        return torch.stack(
            list(
                model.generate(pixels[rows], ids[rows], query[rows], asked[rows], mask[rows],
                               max_new_tokens=8)), 1).tolist()
    alone = []
    for row in range(3):
        only = ids[row, mask[row]][None]
        alone += torch.stack(
            list(
                model.generate(pixels[row, None], only, query[row, None], asked[row, None],
                               max_new_tokens=8)), 1).tolist()
    assert say([0, 1, 2]) == alone and len(set(map(tuple, alone))) == 3
    embeds, real, _ = model.merge(model.look(pixels, query, asked)[0], ids, mask, left=True)
    assert real.sum(1).tolist() == [4 + 20, 3, 3 + 20] and embeds.shape[1] == 24


# --------------------------------------------------------------------------------------------------
# In training

@pytest.fixture(scope="module")
def stage_1(towers, tmp_path_factory):
    """train.py's command for stage 1, with a tower of 4 layers and 16 patches."""
    folder = tmp_path_factory.mktemp("eyes")
    torch.manual_seed(0)
    text = CLIPTextConfig(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
                          num_attention_heads=2, max_position_embeddings=16, eos_token_id=63)
    CLIP(TOWER, text, projection_dim=8).save_pretrained(folder)
    return [
        "--stage", "1", "--vision",
        str(folder), "--llm",
        str(towers / "llama"), "--steps", "2", "--batch", "2"]


@pytest.mark.parametrize("name", NAMED)
def test_both_stages_and_an_answer(stage_1, tmp_path, name):
    first, second = tmp_path / "1", tmp_path / "2"
    train.main([*stage_1, "--fuser", name, "--out", str(first)])
    train.main([
        "--stage", "2", "--model",
        str(first), "--steps", "3", "--batch", "2", "--out",
        str(second), "--dtype", "float32"])  # bfloat16 would change all by rounding it
    losses = [float(row.split(",")[1]) for out in (first, second)
              for row in (out / "log.csv").read_text().splitlines()[1:]]
    assert len(losses) == 5 and all(map(math.isfinite, losses))
    kind, settings = NAMED[name]
    models = [VLM.from_pretrained(out, dtype=torch.float32).eval() for out in (first, second)]
    assert all(type(model.fuser.config) is kind for model in models)
    assert all(getattr(models[1].fuser.config, key) == value for key, value in settings.items())
    pairs = list(zip(models[0].fuser.parameters(), models[1].fuser.parameters(), strict=True))
    assert any(not torch.equal(p, q) for p, q in pairs) == bool(pairs)
    scenes = dataset.ToyScenes("train2", 2, 2, Tokenizer.from_pretrained(second), 32)
    batch = data.make_batch([scenes[0], scenes[1]], "all", 2048, models[1].picture_rows)
    trained = train.freeze(models[1], 2)
    assert math.isfinite(train.train_step(models[1], [batch], torch.device("cpu"), torch.float32))
    # no grad, and DDP would wait
    assert all(p.grad.isfinite().all() and p.grad.any() for p in trained.values())
    ids = torch.tensor([[1, IMAGE_TOKEN, 7, 8]])
    said = list(models[1].generate(torch.randn(1, 3, 32, 32), ids, ids[:, 2:], ids[:, 2:] > 0,
                                   max_new_tokens=3))
    assert len(said) == 3 and plan.whole_step(models[1], torch.randn(1, 3, 32, 32),
                                              ids[:, 2:]).isfinite()


def test_stage_1_trains_what_does_not_ask(stage_1, tmp_path):
    """MMFuser is trained with the projector; IGVA's allocator waits for stage 2, unless it is asked
    for."""
    torch.manual_seed(42)
    for name, more, trained in (("mmfuser", [], True), ("igva", [], False),
                                ("igva", ["--stage1-ccra", "on"], True)):
        out = tmp_path / f"{name}{len(more)}"
        args = options.arguments([*stage_1, "--fuser", name, *more, "--out", str(out)])
        model, _ = train.build(args)
        names = train.freeze(model, 1, args.mode)
        assert any(key.startswith("fuser.")
                   for key in names) == trained and "projector.0.weight" in names


def test_what_does_not_go_together(stage_1, tmp_path):
    for flags in (["--norm", "stack"], ["--order", "shuffled"], ["--off", "lwca"]):
        with pytest.raises(UserError, match="belong to CCRA, not to --fuser dci"):
            train.main([*stage_1, "--fuser", "dci", *flags])
    with pytest.raises(UserError, match="doesn't read the question"):
        train.main([
            *stage_1, "--fuser", "mmfuser", "--stage1-ccra", "neutral", "--out",
            str(tmp_path / "no")])
    assert not (tmp_path / "no").exists()
    tiny_vlm("llava").save_pretrained(tmp_path / "llava")
    def stage_2(folder, *flags):
        return options.arguments([
            "--stage", "2", "--model", str(tmp_path / folder), *flags])
    for flags, match in ((["--norm", "stack"], "'llava'; --norm, --order and --off belong to CCRA"),
                         (["--fuser", "dci"], "DenseConnector can't start from plain LLaVA")):
        with pytest.raises(UserError, match=match):
            train.build(stage_2("llava", *flags))


def test_stage_2_may_choose_among_equal_shapes(towers, tmp_path):
    """As with --order: CCRA's halves have its tensors. The flags of stage 1 may be given again."""
    model = tiny_vlm("ccra")
    (tmp_path / "tokenizer.model").write_bytes((towers / "llama" / "tokenizer.model").read_bytes())
    model.save_pretrained(tmp_path)
    for name, order in (("ccra", "progressive"), ("pwca", "pwca_only"), ("lwca", "lwca_only")):
        args = options.arguments(["--stage", "2", "--model", str(tmp_path), "--fuser", name])
        fuser = train.build(args)[0].fuser
        assert fuser.config.order == order and fuser.config.d_hidden == 8
        assert all(
            torch.equal(p, q.float())
            for p, q in zip(fuser.parameters(), model.fuser.parameters(), strict=True))
