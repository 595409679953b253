"""How the embedded world's towers are pretrained: what CLIP's parts are, its near twins, Muon, going on."""
import pytest
import torch

from toy import questions, towers
from toy import world as toy


def test_regions_cover_boxes():
    """A thing's weights are, patch by patch, its box's share of pixels: counted one by one here, in quarters."""
    scenes = [toy.make_scene(f"regions/{i}") for i in range(4)]
    weights, phrases = towers.regions(scenes)
    rows = [(i, row) for i, scene in enumerate(scenes) for row in toy.layout(scene)]
    grid = toy.SIZE // toy.PATCH
    assert len(weights) == len(phrases) == len(rows)
    for weight, phrase, (i, (thing, x, y, side, _)) in zip(weights.view(-1, len(scenes), grid, grid), phrases, rows):
        assert phrase in questions.caption(scenes[i]).split(", ")
        left, top, right, bottom = toy.box(thing, x, y, side)
        quarters = (torch.arange(toy.SIZE * 4) + 0.5) / 4                         # of pixels, their middles
        inside = torch.outer((top <= quarters) & (quarters < bottom), (left <= quarters) & (quarters < right))
        counted = inside.view(grid, 4 * toy.PATCH, grid, 4 * toy.PATCH).float().sum((1, 3))
        torch.testing.assert_close(weight[i], counted / counted.sum(), atol=0.02, rtol=0)
        assert abs(weight.sum() - 1) < 1e-5 and weight.sum() - weight[i].sum() < 1e-6


def test_siblings_differ_in_one_thing():
    for i in range(300):
        scene = toy.make_scene(f"s/{i}", limit=1 + i % 8)
        other = towers.sibling(scene)
        differ = [(a, b) for a, b in zip(scene.things, other.things) if a != b]
        moved = [a for a, b in differ if a.cell != b.cell]
        assert 1 <= len(differ) <= 2 and len(moved) in (0, len(differ))
        assert len({t.cell for t in other.things}) == len(other.things)
        assert questions.caption(scene) != questions.caption(other)


def test_muon_step_is_orthogonal():
    """With one gradient and no history, Muon moves a matrix by a multiple of U V^T (up to Newton-Schulz's accuracy)."""
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.zeros(12, 20))
    p.grad = torch.randn(12, 20)
    towers.Muon([p], lr=1.0).step()
    singular = torch.linalg.svdvals(p.detach() / (0.2 * 20 ** 0.5))
    assert singular.min() > 0.6 and singular.max() < 1.3
    u, _, v = torch.linalg.svd(p.grad, full_matrices=False)
    assert torch.nn.functional.cosine_similarity(-p.detach().flatten(), (u @ v).flatten(), dim=0) > 0.95


def test_pretraining_goes_on_where_it_stopped(tmp_path):
    """Stopped by an error in step 150 and started again: the weights of a run that wasn't, and one log row a step."""
    def run(out, stop=None):
        torch.manual_seed(0)
        model = torch.nn.Module()
        model.layers = torch.nn.ModuleList([torch.nn.Linear(6, 4)])

        def loss_of_step(model, step):
            if step == stop:
                raise KeyboardInterrupt
            x = torch.randn(8, 6, generator=torch.Generator().manual_seed(step))
            return [((model.layers[0](x) - x[:, :4]).square().mean(), 0.5)]
        out.mkdir(exist_ok=True)
        towers.pretrain("x", model, loss_of_step, 220, 1e-2, out)
        return model.layers[0].weight
    whole = run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "parts", stop=150)
    assert torch.equal(whole, run(tmp_path / "parts"))
    logs = [(tmp_path / name / "x.csv").read_text() for name in ("whole", "parts")]
    assert logs[0] == logs[1] and len(logs[0].splitlines()) == 12
