"""Answers, and models on disk."""
from dataclasses import replace

import pytest
import torch
from torch import nn

from ccra import VLM
from clip import CLIPVision
from core.common import UserError
from llama import Llama, pick
from tests.ccra.helpers import (
    CONTEXT,
    N_PATCHES,
    VOCAB,
    WIDTH,
    answer,
    prompt,
    prompts,
    tiny_batch,
    tiny_vlm,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def test_generate_equals_the_loop_without_cache():
    for seed in range(3):
        model, batch = tiny_vlm(tied=False, seed=seed), tiny_batch()
        for row in range(3):
            p = prompt(batch, row)
            got, ids = answer(model, **p, max_new_tokens=8), p["ids"]
            for _ in range(8):
                logits = model(p["pixels"], ids, p["query"], p["query_mask"])
                ids = torch.cat([ids, logits[:, -1].argmax(-1, keepdim=True)], 1)
            assert got == ids[:, -8:].tolist() and len(set(got[0])) > 1


def test_a_left_padded_batch_says_what_each_says_alone():
    model, batch = tiny_vlm(tied=False, seed=1), tiny_batch()
    together = answer(model, **prompts(batch), max_new_tokens=8)
    alone = [answer(model, **prompt(batch, row), max_new_tokens=8)[0] for row in range(3)]
    assert together == alone and len(set(map(tuple, alone))) == 3


def test_eos():
    model, batch = tiny_vlm(tied=False, seed=1), tiny_batch()
    alone = [answer(model, **prompt(batch, row), max_new_tokens=8)[0] for row in range(3)]
    eos = next(t for t in alone[0][1:] if t != alone[0][0])
    assert answer(model, **prompt(batch, 0), max_new_tokens=8,
                  eos_ids=[eos, 49])[0] == alone[0][:alone[0].index(eos)]
    assert list(model.generate(**prompt(batch, 0), eos_ids={alone[0][0]})) == []   # an empty answer
    got = answer(model, **prompts(batch), max_new_tokens=8, eos_ids=[eos])
    lengths = [row.index(eos) if eos in row else 8 for row in alone]
    assert len(set(lengths)) > 1
    steps = min(8, max(lengths))
    assert got == [(row[:n] + [eos] * 8)[:steps] for row, n in zip(alone, lengths)]


def test_the_end_of_the_context_ends_an_answer():
    model, batch = tiny_vlm(), tiny_batch()
    p = prompt(batch, 0)
    room = CONTEXT - (p["ids"].shape[1] - 1 + N_PATCHES)
    assert len(answer(model, **p, max_new_tokens=10 ** 6)[0]) == room
    assert list(model.generate(**p, max_new_tokens=0)) == []


def test_picture_and_prompt_are_read_once():
    model, batch, calls = tiny_vlm(), tiny_batch(), []
    model.vision.register_forward_hook(lambda *_: calls.append("vision"))
    model.fuser.register_forward_hook(lambda *_: calls.append("fuser"))
    model.llm.lm_head.register_forward_hook(
        lambda module, args, out: calls.append(tuple(out.shape)))
    answer(model, **prompt(batch, 0), max_new_tokens=4)
    assert calls == ["vision", "fuser"] + [(1, VOCAB)] * 4
    assert not any(token.requires_grad
                   for token in model.generate(**prompt(batch, 0), max_new_tokens=2))


def test_sampling():
    logits = torch.tensor([[0.2, 0.5, 0.3]]).log().repeat(4000, 1)
    g = torch.Generator().manual_seed(0)
    for top_p, expected in ((1.0, [0.2, 0.5, 0.3]), (0.79, [0, 0.625,
                                                            0.375]), (0.5, [0, 1,
                                                                            0]), (1e-6, [0, 1, 0])):
        shares = pick(logits, 1.0, top_p, g).bincount(minlength=3) / 4000
        assert (shares - torch.tensor(expected)).abs().max() < 0.03
    assert (pick(logits, 0.5, 1.0, g).bincount(minlength=3) / 4000 -
            torch.tensor([4, 25, 9]) / 38).abs().max() < 0.03
    model, p = tiny_vlm(), prompt(tiny_batch(), 0)
    draws = [
        answer(model, **p, max_new_tokens=12, temperature=2.0,
               generator=torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]
    assert answer(model, **p, max_new_tokens=6, temperature=1.0,
                  top_p=1e-9) == answer(model, **p, max_new_tokens=6)
    for bad in (dict(temperature=-1), dict(top_p=0), dict(top_p=1.5)):
        with pytest.raises(UserError, match="temperature"):
            next(model.generate(**p, **bad))


# --------------------------------------------------------------------------------------------------
# Saving and loading

@pytest.mark.parametrize("tied", (True, False))
def test_save_and_load_bit_for_bit(tmp_path, tied):
    model, batch = tiny_vlm(tied, norm="stack", order="decoupled", sigma=2), tiny_batch()
    model.image["pad"], model.query = False, "first"
    (tmp_path / "words.model").write_bytes(b"pieces")
    model.save_pretrained(tmp_path / "out", tokenizer_file=tmp_path / "words.model")
    again = VLM.from_pretrained(tmp_path / "out")
    assert again.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(p, again.state_dict()[name]) for name, p in model.state_dict().items())
    assert (again.llm.lm_head.weight is again.llm.embed_tokens.weight) == tied
    assert again.fuser.config == model.fuser.config and again.llm.config == model.llm.config
    assert again.image == {"size": 8, "pad": False} and again.query == "first"
    assert not again.fuser.lpwca.norm.weight.requires_grad
    assert again.fuser.lwca.q.weight.requires_grad
    # not bit for bit: the weights lie at other addresses, and alignment decides how products are
    # summed
    assert again(**batch).item() == pytest.approx(model(**batch).item(), rel=1e-12)
    assert (tmp_path / "out" / "words.model").read_bytes() == b"pieces"
    again.save_pretrained(tmp_path / "out",
                          tokenizer_file=tmp_path / "out" / "words.model")  # onto itself
    assert (tmp_path / "out" / "words.model").read_bytes() == b"pieces"
    assert VLM.from_pretrained(tmp_path / "out",
                               dtype=torch.float32).projector[0].weight.dtype == torch.float32
    # its towers can be read out of it
    vision = CLIPVision.from_pretrained(tmp_path / "out", dtype=torch.float64)
    llm = Llama.from_pretrained(tmp_path / "out", dtype=torch.float64)
    for tower, own in ((vision, model.vision), (llm, model.llm)):
        assert all(
            torch.equal(p, q) for p, q in zip(tower.parameters(), own.parameters(), strict=True))


@pytest.mark.parametrize("old, new, match", [
    ('"nanoccra"', '"llava"', "model_type"), ('"ccra"', '"other"', "fuser 'other'"),
    ('"sigma"', '"sgima"', "sgima"), ('"joint"', '"batch"', "norm"),
    ('"n_layers": 3', '"n_layers": 2', "n_layers"),
    ('"d_hidden": 8', '"d_hidden": 9', "misshapen"), ('"size": 8', '"size": 16', "image"),
    ('"query": "all"', '"query": "last"', "query"), ('"vision": {', '"eyes": {', "vision")])
def test_a_config_that_does_not_fit(tmp_path, old, new, match):
    tiny_vlm().save_pretrained(tmp_path)
    text = (tmp_path / "config.json").read_text()
    assert old in text
    (tmp_path / "config.json").write_text(text.replace(old, new))
    with pytest.raises(UserError, match=match):
        VLM.from_pretrained(tmp_path)


def test_build_wants_fitting_sizes():
    model = tiny_vlm()
    for name in ("text_dim", "vision_dim", "n_layers"):
        with pytest.raises(UserError, match=name):
            VLM.build(model.vision, model.llm, replace(model.fuser.config, **{name: 5}))
    assert [tuple(p.shape) for p in model.projector.parameters()] == [(WIDTH, 32), (WIDTH, ),
                                                                      (WIDTH, WIDTH), (WIDTH, )]
    assert isinstance(model.projector[1], nn.GELU) and model.projector[1].approximate == "none"
