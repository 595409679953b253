"""TODO study/features.py"""
import hashlib
import math
import sys
from contextlib import closing
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

import data
from clip import CLIPVision
from core import common
from core.common import wait_for, write_beside
from study.probes import caption, conversation, states
from toy import dataset, questions
from toy import world as toy

# --------------------------------------------------------------------------------------------------
# The tower's features, once for all runs


class Kept(nn.Module):
    """In the place of a tower whose states were computed before: what a VLM takes for pixels are
    those states."""

    def __init__(self, tower: CLIPVision):
        super().__init__()
        self.config, self.grid, self.layers = tower.config, tower.grid, nn.ModuleList()

    def forward(self, kept: Tensor, n_layers: int) -> Tensor:
        """kept (B, L+1, 1+N, d) -> hidden (n_layers+1, B, 1+N, d), no copy."""
        return kept.transpose(0, 1)[:n_layers + 1]


class Scenes(dataset.ToyScenes):
    """toy.ToyScenes with the study's questions, and the tower's states for pixels."""

    def __init__(self, stage: int, n: int, tokenizer, tower: CLIPVision, out: Path, size=toy.SIZE):
        super().__init__(f"study{stage}", n, stage, tokenizer, size)
        self.kept, self.samples = features(self, tower, out), {}

    def sample(self, i):                       # each is made once: train.py wants all lengths first
        if i not in self.samples:
            self.samples[i] = self._made(i)
        return self.samples[i]

    def _made(self, i):
        turns = conversation(self.scene(i)) if self.stage == 2 else []
        record = questions.record(turns or [("Describe the picture.", caption(self.scene(i)))],
                                  image="toy")
        return data.render(record, self.tokenizer, "plain" if self.stage == 1 else "v1")

    def __getitem__(self, i):
        return data.item(self.sample(i), self.kept[i])


def features(scenes: Scenes, tower: CLIPVision, out: Path, batch=50) -> Tensor:
    """states of all of a data set's scenes, (n, L+1, 1+N, d), mapped from a file, which is written
    where it isn't."""
    path = out / f"{scenes.split}-{len(scenes)}-{digest(tower)}.bfloat16"
    shape = len(scenes), len(tower.layers) + 1, tower.grid ** 2 + 1, tower.config.hidden_size

    def write(tmp):
        with open(tmp, "wb") as file:
            for rows in tqdm(common.split(range(len(scenes)), batch), desc=str(path), unit="batch",
                             file=sys.stderr):
                part = states(tower, [scenes.scene(i) for i in rows])
                file.write(part.contiguous().view(torch.uint8).numpy().tobytes())

    with closing(wait_for(out)):               # another process may be writing it
        if not path.exists():
            write_beside(path, write)
    return torch.from_file(str(path), size=math.prod(shape), dtype=torch.bfloat16).view(shape)


def digest(*modules: nn.Module, text: str = "") -> str:
    """Eight letters that tell weights (and a text) from others."""
    weights = [
        p.detach().float().numpy().tobytes() for module in modules for p in module.parameters()]
    return hashlib.sha256(b"".join(weights) + text.encode()).hexdigest()[:8]
