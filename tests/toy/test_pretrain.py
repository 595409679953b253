"""How the toy world's towers are pretrained: Muon, and going on."""
from pathlib import Path

import pytest
import torch
from torch import nn

from toy.pretrain import Muon, pretrain


def test_muon_step_is_orthogonal():
    """With one gradient and no history, Muon moves a matrix by a multiple of U V^T (up to
    Newton-Schulz's accuracy)."""
    torch.manual_seed(0)
    p = nn.Parameter(torch.zeros(12, 20))
    p.grad = torch.randn(12, 20)
    Muon([p], lr=1.0).step()
    singular = torch.linalg.svdvals(p.detach() / (0.2 * 20 ** 0.5))
    assert singular.min() > 0.6 and singular.max() < 1.3
    u, _, v = torch.linalg.svd(p.grad, full_matrices=False)
    assert torch.cosine_similarity(-p.detach().flatten(), (u @ v).flatten(), dim=0) > 0.95


def train(out: Path, stop: int | None = None) -> torch.Tensor:
    """220 steps of a small model, or an error in step `stop`; its weights."""
    torch.manual_seed(0)
    model = nn.Module()
    model.layers = nn.ModuleList([nn.Linear(6, 4)])

    def loss_of_step(model, step):
        if step == stop:
            raise KeyboardInterrupt
        x = torch.randn(8, 6, generator=torch.Generator().manual_seed(step))
        return [((model.layers[0](x) - x[:, :4]).square().mean(), 0.5)]

    out.mkdir(exist_ok=True)
    pretrain("x", model, loss_of_step, 220, 1e-2, out)
    return model.layers[0].weight


def test_it_goes_on_where_it_stopped(tmp_path):
    """Stopped by an error in step 150 and started again: the weights of a run that wasn't, and one
    log row a step."""
    whole = train(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "parts", stop=150)
    assert torch.equal(whole, train(tmp_path / "parts"))
    logs = [(tmp_path / name / "x.csv").read_text() for name in ("whole", "parts")]
    assert logs[0] == logs[1] and len(logs[0].splitlines()) == 12
