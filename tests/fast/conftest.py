import pytest
import torch

from fast import linear


@pytest.fixture
def slow_half(monkeypatch):
    """As on a CPU without products in half precision, wherever the tests run."""
    monkeypatch.setattr(linear, "SLOW", {torch.bfloat16, torch.float16})
