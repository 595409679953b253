"""The vision-language model against slow twins."""

import pytest
import torch
from torch import nn

import ccra
import llama
from ccra import VLM
from core.common import UserError
from llama import IGNORE, IMAGE_TOKEN
from tests.ccra.helpers import (
    CONTEXT,
    N_PATCHES,
    VOCAB,
    WIDTH,
    answer,
    prompt,
    tiny_batch,
    tiny_vlm,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def test_merged_layout_by_hand():
    model = tiny_vlm()
    visual = torch.arange(2 * 2 * WIDTH, dtype=torch.float64).view(2, 2, WIDTH)  # N' = 2
    ids = torch.tensor([[1, IMAGE_TOKEN, 6, 30], [1, 8, 32, 0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]], dtype=torch.bool)
    labels = torch.tensor([[IGNORE, IGNORE, IGNORE, 30], [IGNORE, IGNORE, 32, IGNORE]])
    word, zero = model.llm.embed_tokens.weight, torch.zeros(WIDTH, dtype=torch.float64)
    rows = [[word[1], visual[0, 0], visual[0, 1], word[6], word[30]], [word[1], word[8], word[32]]]

    embeds, real, merged = model.merge(visual, ids, mask, labels)
    assert torch.equal(embeds,
                       torch.stack([torch.stack(rows[0]),
                                    torch.stack(rows[1] + [zero] * 2)]))
    assert real.tolist() == [[True] * 5, [True] * 3 + [False] * 2]
    assert merged.tolist() == [[IGNORE, IGNORE, IGNORE, IGNORE, 30],
                               [IGNORE, IGNORE, 32, IGNORE, IGNORE]]

    embeds, real, none = model.merge(visual, ids, mask, left=True)
    assert torch.equal(embeds,
                       torch.stack([torch.stack(rows[0]),
                                    torch.stack([zero] * 2 + rows[1])]))
    assert real.tolist() == [[True] * 5, [False] * 2 + [True] * 3] and none is None
    # prompts may come padded on the left as well, with anything as padding
    other = torch.tensor([[1, IMAGE_TOKEN, 6, 30], [IMAGE_TOKEN, 1, 8, 32]])
    again = model.merge(visual, other, mask.flip(1), left=True)
    assert torch.equal(again[0], embeds) and torch.equal(again[1], real)

    # in the middle of the picture
    cut, real, merged = model.merge(visual, ids, mask, labels, max_length=2)
    assert torch.equal(cut[0], torch.stack(rows[0][:2])) and merged.eq(IGNORE).all() and real.all()
    assert torch.equal(model.merge(None, ids[1:], mask[1:])[0][0], torch.stack(rows[1]))


def test_loss_is_cross_entropy_of_the_full_logits():
    model, batch = tiny_vlm(), tiny_batch()
    loss = model(**batch)
    logits = model(**{**batch, "labels": None})
    assert logits.shape == (3, 7 + N_PATCHES - 1, VOCAB)
    visual = model.look(batch["pixels"], batch["query"], batch["query_mask"])[0]
    labels = model.merge(visual, batch["ids"], batch["mask"], batch["labels"])[2]
    expected = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(),
                                           ignore_index=IGNORE, reduction="sum")
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12) and (labels
                                                                         != IGNORE).sum() == 6
    parts = sum(model(**{k: v[i:i + 1] for k, v in batch.items()}) for i in range(3))
    assert loss.item() == pytest.approx(parts.item(), rel=1e-12)
    assert tiny_vlm().float()(**{**batch, "pixels": batch["pixels"].float()}).dtype == torch.float32
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters()
               if p.requires_grad)
    assert all(p.grad is None for p in model.vision.parameters())


def test_a_loss_in_pieces_is_the_loss(monkeypatch):
    """Many supervised positions go piece by piece, and their logits are computed again in the
    backward."""
    found = []
    for rows in (4096, 4):                                         # 6 positions: one piece; 4 and 2
        monkeypatch.setattr(llama, "LOSS_ROWS", rows)
        model = tiny_vlm()
        loss = model(**tiny_batch())
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    assert len(found[0]) > 20 and all(
        torch.allclose(a, b, rtol=1e-10, atol=1e-12) for a, b in zip(*found, strict=True))


def test_nothing_supervised_is_a_loss_of_zero():
    model, batch = tiny_vlm(), tiny_batch()
    loss = model(**{**batch, "labels": torch.full_like(batch["labels"], IGNORE)})
    loss.backward()
    assert loss.item() == 0 and all(p.grad.eq(0).all() for p in model.fuser.parameters())


def test_training_cuts_and_inference_refuses():
    model, batch = tiny_vlm(), tiny_batch()
    # cut before the last word of row 0: one label less
    full, short = model(**batch), model(**batch, max_length=9)
    logits = model(**{**batch, "labels": None})
    assert (full - short).item() == pytest.approx(-logits[0, 8].log_softmax(-1)[31].item(),
                                                  rel=1e-9)
    long = torch.randint(3, VOCAB, (1, CONTEXT + 5))
    one = {k: batch[k][:1] for k in ("pixels", "query", "query_mask")}
    assert model(**one, ids=long, labels=long).isfinite()                    # the context cuts, too
    with pytest.raises(UserError, match="language model has 64"):
        model(**one, ids=long)
    with pytest.raises(UserError, match="no room"):
        list(model.generate(**one, ids=long))
    with pytest.raises(UserError, match="no room"):
        list(model.generate(**one, ids=long[:, :CONTEXT]))


def test_a_text_only_batch_keeps_the_vision_path_in_the_graph():
    model, batch = tiny_vlm(), {k: v[1:2] for k, v in tiny_batch().items()}
    loss = model(**batch)
    loss.backward()
    for part in (model.projector, model.fuser):
        assert all(p.grad is not None and p.grad.eq(0).all() for p in part.parameters())
    assert loss.item() == pytest.approx(model(**{**batch, "pixels": None}).item(), rel=1e-12)


def test_no_answer_reaches_the_visual_features():
    model, batch = tiny_vlm(tied=False), tiny_batch()
    visual, maps = model.look(batch["pixels"], batch["query"], batch["query_mask"])
    grad, = torch.autograd.grad(visual.square().sum(), model.llm.embed_tokens.weight)
    touched = set(grad.abs().sum(1).nonzero()[:, 0].tolist())
    assert touched == {6, 7, 12, 8, 9}                       # the questions' words, and no answer's
    # and through the whole model: other answers, the same rows where the picture stands
    def picture_rows(batch):
        seen = {}
        hook = model.projector.register_forward_hook(lambda module, args, out: seen.update(out=out))
        model(**batch)
        hook.remove()
        return seen["out"]
    other = {**batch, "ids": batch["ids"].clone(), "labels": batch["labels"].clone()}
    for name in ("ids", "labels"):
        other[name][batch["labels"] != IGNORE] = 40
    assert torch.equal(picture_rows(batch), picture_rows(other))
    assert not torch.equal(picture_rows(batch), picture_rows({**batch, "query": batch["query"] + 1
                                                              }))  # it can fail


def test_the_vision_tower_learns_only_when_asked():
    model, batch = tiny_vlm(), tiny_batch()
    states = []
    model.vision.register_forward_hook(lambda module, args, out: states.append(out))
    model(**batch)
    model.vision.requires_grad_(True)
    model(**batch).backward()
    assert [hidden.requires_grad for hidden in states] == [False, True]
    unused = {"post_layernorm.weight", "post_layernorm.bias"}
    for name, p in model.vision.named_parameters():
        assert (p.grad is None) == (name in unused), name
        assert p.grad is None or (p.grad.isfinite().all() and p.grad.any()), name


def test_modes_reach_ccra():
    model, batch = tiny_vlm(), tiny_batch()
    losses = {mode: model(**batch, mode=mode).item() for mode in ccra.MODES}
    assert len(set(losses.values())) == 3 and model(**batch).item() == losses["on"]
    other = {**batch, "query": batch["query"] + 1}
    for mode in ("off", "neutral"):
        assert model(**other, mode=mode).item() == losses[mode]
    said = [answer(model, **prompt(batch, 0), max_new_tokens=12, mode=mode) for mode in ccra.MODES]
    assert said[0] != said[2]


def test_another_fuser_in_the_slot():
    class Last(nn.Module):
        n_blocks = 3

        def forward(self, hidden, F_t, mask, mode):
            assert hidden.shape == (4, 3, 1 + N_PATCHES,
                                    16) and F_t.shape == (3, 3, WIDTH) and mask.dtype == torch.bool
            return hidden[-2][:, 1:], {}
    model, batch = tiny_vlm(), tiny_batch()
    other = VLM(model.vision, model.llm, Last(), nn.Linear(16, WIDTH).double())
    assert other(**batch).isfinite()


@pytest.mark.parametrize("ids, pixels, match", [
    ([[1, IMAGE_TOKEN, IMAGE_TOKEN]], True, "more than one"),
    ([[1, IMAGE_TOKEN, 3]], False, "no pixels"),
    ([[1, -100, 3]], True, "outside of the vocabulary"),
    ([[1, VOCAB, 3]], True, "outside of the vocabulary")])
def test_bad_ids(ids, pixels, match):
    model, batch = tiny_vlm(), {k: v[:1] for k, v in tiny_batch().items()}
    ids, pixels = torch.tensor(ids), batch["pixels"] if pixels else None
    with pytest.raises(UserError, match=match):
        model(pixels, ids, batch["query"], batch["query_mask"])
    with pytest.raises(UserError, match=match):
        next(model.generate(pixels, ids, batch["query"], batch["query_mask"]))
    for id in (IMAGE_TOKEN, VOCAB):
        with pytest.raises(UserError, match="query"):
            model(batch["pixels"], batch["ids"], torch.full_like(batch["query"], id),
                  batch["query_mask"])


def test_padding_of_any_value_never_reaches_the_table():
    model, batch = tiny_vlm(), tiny_batch()
    other = {**batch, "ids": batch["ids"].masked_fill(~batch["mask"], IMAGE_TOKEN),
             "query": batch["query"].masked_fill(~batch["query_mask"], IMAGE_TOKEN)}
    assert model(**batch).item() == model(**other).item()
