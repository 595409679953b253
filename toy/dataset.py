"""The toy world as a data set for train.py, drawn on the fly."""
import random

import torch

from clip import preprocess
from core.tokenizer import Tokenizer
from data import Sample, item, render
from toy.questions import caption, conversation, record
from toy.world import SIZE, Scene, draw, make_scene


class ToyScenes(torch.utils.data.Dataset):
    """Scenes as train.py wants its samples: what data.py's data sets of a json give. Sample i is a
    pure function of (split, i); nothing lies on disk.

    Stage 1: the picture and its caption ("plain"). Stage 2: the picture and a conversation ("v1").
    Three scenes in eight are small: in these a question is easily answered, and what answers it
    carries over. "How many animals?" is what is learnt last, so it's asked three times as often as
    it would be.
    """

    def __init__(self, split: str, n: int, stage: int, tokenizer: Tokenizer, size: int = SIZE):
        """split: what the scenes' keys begin with; n: how many; stage: 1 or 2; size: the pictures'
        side for the vision tower, in pixels."""
        self.split = split
        self.n = n
        self.stage = stage
        self.tokenizer = tokenizer
        self.size = size

    def __len__(self) -> int:
        return self.n

    def record_id(self, i: int) -> str:
        """What messages call sample i: its scene's key."""
        return f"{self.split}/{i}"

    def scene(self, i: int) -> Scene:
        """Sample i's scene."""
        key = self.record_id(i)
        return make_scene(key, limit=random.Random("limit/" + key).choice([2, 3, 4] + 5 * [8]))

    def record(self, i: int, image: str = "toy") -> dict:
        """Sample i as a LLaVA record; image: the name that it has for the picture."""
        scene = self.scene(i)
        turns = conversation(scene, also=["category", "category"]) if self.stage == 2 else []
        return record(turns or [("Describe the picture.", caption(scene))], image)

    def sample(self, i: int) -> Sample:
        """The text alone."""
        return render(self.record(i), self.tokenizer, "plain" if self.stage == 1 else "v1")

    def length(self, i: int) -> int:
        """Tokens of sample i's text."""
        return len(self.sample(i).ids)

    def __getitem__(self, i: int) -> dict:
        """data.item's dict; its pixels are (3, size, size)."""
        return item(self.sample(i), preprocess(draw(self.scene(i)), self.size, pad=True))
