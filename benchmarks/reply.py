"""A model's greedy answers to a batch of prompts: how questions by the thousand are asked, and
held-out records while training."""
import torch
from torch import Tensor

from ccra import VLM
from core.tokenizer import Tokenizer
from data import Sample, item, make_batch


def reply(model: VLM, tokenizer: Tokenizer, rows: list[Sample], pixels: list[Tensor],
          max_new_tokens: int, device: torch.device | str) -> list[str]:
    """Greedy answers to a batch of `prompt`s, each with its picture (3, size, size)."""
    answers = reply_ids(model, tokenizer, rows, pixels, max_new_tokens, device)
    return [tokenizer.decode(ids).strip() for ids in answers]


def reply_ids(model: VLM, tokenizer: Tokenizer, rows: list[Sample], pixels: list[Tensor],
              max_new_tokens: int, device: torch.device | str) -> list[list[int]]:
    """`reply`'s answers as ids, without their ends."""
    items = [item(row, picture) for row, picture in zip(rows, pixels)]
    batch = make_batch(items, model.query, device=device)
    steps = list(model.generate(**batch, max_new_tokens=max_new_tokens,
                                eos_ids=tokenizer.eos_ids))                # T' x (B)
    answers = torch.stack(steps, 1).tolist() if steps else [[]] * len(rows)
    return [until_end(ids, tokenizer) for ids in answers]


def until_end(ids: list[int], tokenizer: Tokenizer) -> list[int]:
    """What comes before the first end."""
    end = next((t for t, token in enumerate(ids) if token in tokenizer.eos_ids), len(ids))
    return ids[:end]
