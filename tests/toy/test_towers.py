"""How the toy world's towers are pretrained: what CLIP's parts are, and its near twins."""
import torch

from toy import questions, towers
from toy import world as toy


def test_regions_cover_boxes():
    """A thing's weights are, patch by patch, its box's share of pixels: counted one by one here, in
    quarters."""
    scenes = [toy.make_scene(f"regions/{i}") for i in range(4)]
    weights, phrases = towers.regions(scenes)
    rows = [(i, row) for i, scene in enumerate(scenes) for row in toy.layout(scene)]
    grid = toy.SIZE // toy.PATCH
    assert len(weights) == len(phrases) == len(rows)
    at = (torch.arange(toy.SIZE * 4) + 0.5) / 4                 # quarters of pixels, their middles
    weights = weights.view(-1, len(scenes), grid, grid)
    for weight, phrase, (i, (thing, x, y, side, _)) in zip(weights, phrases, rows):
        assert phrase in questions.caption(scenes[i]).split(", ")
        left, top, right, bottom = toy.box(thing, x, y, side)
        inside = torch.outer((top <= at) & (at < bottom), (left <= at) & (at < right))
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
