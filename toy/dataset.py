"""TODO toy/dataset.py"""
import random

import torch

from clip import preprocess
from data import item, render
from toy.questions import caption, conversation, record
from toy.world import SIZE, draw, make_scene


class ToyScenes(torch.utils.data.Dataset):
    """Scenes as train.py wants its samples. Item i is a pure function of (split, i); nothing lies
    on disk.

    stage 1: the picture and its caption ("plain"); stage 2: the picture and a conversation ("v1").
    Three scenes in eight are small: in these a question is easily answered, and what answers it
    carries over. "How many animals" is what is learnt last, so it's asked three times as often as
    it would be.
    """

    def __init__(self, split, n, stage, tokenizer, size=SIZE):
        self.split, self.n, self.stage, self.tokenizer, self.size = split, n, stage, tokenizer, size

    def __len__(self):
        return self.n

    def record_id(self, i):
        return f"{self.split}/{i}"

    def scene(self, i):
        key = self.record_id(i)
        return make_scene(key, limit=random.Random("limit/" + key).choice([2, 3, 4] + 5 * [8]))

    def sample(self, i):
        """The text alone."""
        scene = self.scene(i)
        turns = conversation(scene, also=["category", "category"]) if self.stage == 2 else []
        turns = turns or [("Describe the picture.", caption(scene))]
        return render(record(turns, image="toy"), self.tokenizer,
                      "plain" if self.stage == 1 else "v1")

    def length(self, i):
        """Tokens of sample i's text."""
        return len(self.sample(i).ids)

    def __getitem__(self, i):
        return item(self.sample(i), preprocess(draw(self.scene(i)), self.size, pad=True))
