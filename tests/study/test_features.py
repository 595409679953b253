"""Kept features are the tower's, and come with the study's samples."""
import torch

from clip import preprocess
from core.device import autocast_dtype
from study import features
from study import world as studied
from toy import world as toy

CPU = torch.device("cpu")


def test_kept_features_are_the_towers(world, one_thread):
    scenes = features.Scenes(2, 60, world.tokenizer, world.tower, world.out, size=32)
    those = (3, 50, 7)
    batch = torch.stack([scenes[i]["pixels"] for i in those])                   # (B, L+1, 1+N, d)
    pixels = torch.stack([preprocess(toy.draw(scenes.scene(i)), 32, pad=True) for i in those])
    with torch.no_grad():
        hidden = world.tower.float()(pixels)                                    # (L+1, B, 1+N, d)
    for n in (2, 3):
        kept = features.Kept(world.tower)(batch, n)
        assert kept.shape == hidden[:n + 1].shape
        assert (kept - hidden[:n + 1]).norm() < 0.02 * hidden.norm()
    before = scenes.kept.clone()                                                # now from the file
    assert torch.equal(features.features(scenes, world.tower.float(), world.out), before)
    asked = [question for i in range(60) for question, _ in studied.conversation(scenes.scene(i))]
    assert any("number of the picture" in question for question in asked)
    assert scenes.sample(3) is scenes.sample(3)


def test_kept_features_come_in_what_the_model_is_trained_in(world):
    stored = torch.randn(2, 4, 5, 16).bfloat16()                                # (B, L+1, 1+N, d)
    kept = features.Kept(world.tower)(stored, 3)
    assert kept.dtype == autocast_dtype(CPU)
    assert torch.equal(kept.bfloat16(), stored.transpose(0, 1))
    assert kept.dtype != torch.bfloat16 or kept.data_ptr() == stored.data_ptr()          # no copy


def test_weights_and_a_text_are_told_apart():
    torch.manual_seed(0)
    one, two = torch.nn.Linear(2, 3), torch.nn.Linear(2, 3)
    digests = [features.digest(one), features.digest(two), features.digest(one, text="a"),
               features.digest(one, two)]
    assert len(set(digests)) == 4 and digests[0] == features.digest(one)
