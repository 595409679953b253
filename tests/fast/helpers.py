"""Random tensors and models, and how near a result has to be."""
import pytest
import torch
from torch import Tensor

from fast import cache
from llama import Llama, LlamaConfig
from tests.llamas import random_llama

HALF = [torch.bfloat16, torch.float16]
# half a unit in the last place
EPS = {torch.bfloat16: 2 ** -8, torch.float16: 2 ** -11, torch.float32: 2 ** -20}
CONFIG = LlamaConfig(vocab_size=128, hidden_size=64, intermediate_size=192, num_hidden_layers=3,
                     num_attention_heads=4, num_key_value_heads=4, rms_norm_eps=1e-5)

needs_fbgemm = pytest.mark.skipif(not cache.SUMS, reason="FBGEMM is x86's")


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Normal random numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def close(quick: Tensor, slow: Tensor, dtype: torch.dtype, factor: float = 1.01) -> None:
    """quick is slow (float64), rounded once to dtype."""
    assert quick.dtype == dtype and quick.shape == slow.shape
    assert ((quick.double() - slow).abs() <= factor * EPS[dtype] * slow.abs() + 1e-4).all()


def net(config: LlamaConfig = CONFIG, dtype: torch.dtype = torch.bfloat16) -> Llama:
    """A random Llama."""
    return random_llama(config, std=0.15).to(dtype)


def decode(model: Llama, ids: Tensor, n: int = 8) -> Tensor:
    """Greedy answers to ids (B, T) -> (B, n)."""
    return torch.stack(list(model.generate(model.embed(ids), max_new_tokens=n)), 1)
