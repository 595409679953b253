"""The probes find what is there."""
import torch

from study import probes


def test_a_probe_finds_what_was_put_there_and_nothing_else():
    g = torch.Generator().manual_seed(0)
    y = torch.randint(0, 3, (600,), generator=g)
    noise = torch.randn(600, 8, generator=g)
    planted = noise + 4 * torch.eye(3, 8)[y]
    assert probes.probe(planted[:400], y[:400], planted[400:], y[400:]) > 0.95
    assert abs(probes.probe(noise[:400], y[:400], noise[400:], y[400:]) - 1 / 3) < 0.1
