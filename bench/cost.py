"""`python -m bench --cost`: what int8 costs on one model, beside float32, in logits, accuracy and
bytes."""
import argparse
from itertools import chain

import torch
from torch import Tensor

from ccra import VLM
from clip import preprocess
from core.tokenizer import IMAGE_TOKEN, Tokenizer
from data import item, make_batch, prompt
from eval import load_model, sit
from toy import world as toy
from toy.exam import exam, score

ASKED = 100          # questions whose logits are compared


@torch.no_grad()
def first_logits(model: VLM, tokenizer: Tokenizer, items: list) -> Tensor:
    """The logits of the answers' first tokens, (B, V). items: toy.exam's."""
    rows = []
    for one in items:
        sample = prompt([(one.turns[0].question, None)], tokenizer)
        rows.append(item(sample, preprocess(toy.draw(one.scene), **model.image)))
    batch = make_batch(rows, model.query)
    pictures = (batch["ids"] == IMAGE_TOKEN).sum(1)                                  # (B,)
    lengths = batch["mask"].sum(1) + pictures * (model.picture_rows - 1)             # (B,)
    return model(**batch)[torch.arange(len(rows)), lengths - 1]


def cost(args: argparse.Namespace) -> None:
    """Print the comparison, of --n questions of the toy world's exam."""
    torch.set_num_threads(args.threads)
    items, found = exam(0, args.n), {}
    for name in ("float32", "int8"):
        model, tokenizer, device = load_model(args.model or toy.MODEL, "cpu", "float32",
                                              int8=name == "int8")
        logits = first_logits(model, tokenizer, items[:ASKED])
        texts = sit(model, tokenizer, items, 100, device)
        size = sum(t.nbytes for t in chain(model.llm.parameters(), model.llm.buffers()))
        found[name] = logits, score(items, texts)["accuracy"], size
    exact = found["float32"][0]
    rounded = found["int8"][0]
    error = (rounded - exact).square().mean().sqrt() / exact.std()
    agree = (rounded.argmax(-1) == exact.argmax(-1)).float().mean()
    print(f"logits of {len(exact)} answers' first tokens: error {error:.4f} of their spread, same "
          f"likeliest token {agree:.0%}")
    for name, (_, accuracy, size) in found.items():
        print(f"{name:8} accuracy {accuracy:7.2%} of {args.n}, language model {size / 1e6:.1f} MB")
