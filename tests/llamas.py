"""Tiny random Llamas, and the slow twin of decoding: for the tests of llama.py and fast/."""
from dataclasses import replace

import torch
from torch import Tensor

from llama import Llama, LlamaConfig

TINY = LlamaConfig(vocab_size=97, hidden_size=48, intermediate_size=80, num_hidden_layers=3,
                   num_attention_heads=4, rms_norm_eps=1e-5)
SHAPES = {"llama2": TINY,
          "tied+gqa": replace(TINY, num_key_value_heads=2, tie_word_embeddings=True,
                              rope_theta=5e5),
          "one kv head, wide heads": replace(TINY, num_key_value_heads=1, head_dim=16)}


def random_llama(config: LlamaConfig = TINY, std: float = 0.3, seed: int = 0) -> Llama:
    """With weights large enough for every part to matter (at std 0.02 the blocks would hardly
    show)."""
    torch.manual_seed(seed)
    llm = Llama(config).eval().requires_grad_(False)
    for p in llm.parameters():
        p.copy_(torch.randn_like(p) * std + (p.ndim == 1))
    return llm


def left_padded(lengths: list[int], vocab: int = 97) -> tuple[Tensor, Tensor]:
    """ids (B, T) and their mask (B, T)."""
    torch.manual_seed(1)
    T = max(lengths)
    mask = torch.arange(T) >= T - torch.tensor(lengths)[:, None]           # (B, T)
    return torch.randint(vocab, mask.shape), mask


def longer(ids: Tensor, mask: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
    """ids, mask (B, T) and one more real position, new (B, 1)."""
    return torch.cat((ids, new), 1), torch.cat((mask, torch.ones_like(new, dtype=torch.bool)), 1)


def greedy_without_cache(llm: Llama, ids: Tensor, mask: Tensor, n: int) -> Tensor:
    """The slow twin of decoding: everything again for each new token. ids (B, T) -> (B, n)."""
    for _ in range(n):
        new = llm(ids, mask=mask)[:, -1].argmax(-1, keepdim=True)
        ids, mask = longer(ids, mask, new)
    return ids[:, -n:]
