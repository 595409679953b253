"""What the frozen tower makes of the study's scenes, computed once for all runs, and the data sets
that have it in the place of pixels."""
import hashlib
import math
import sys
from contextlib import closing
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

import data
from clip import CLIPVision, preprocess
from core.common import split, wait_for, write_beside
from core.device import autocast_dtype
from core.tokenizer import Tokenizer
from study import world
from toy import questions
from toy import world as toy
from toy.dataset import ToyScenes


@torch.no_grad()
def states(tower: CLIPVision, scenes: list[toy.Scene]) -> Tensor:
    """(B, L+1, 1+N, d) in bfloat16, of the tower in the number format and under the autocast that
    train.py has."""
    dtype = autocast_dtype(torch.device("cpu"))
    size = tower.config.image_size
    pixels = torch.stack([preprocess(toy.draw(s), size, pad=True) for s in scenes])  # (B, 3, H, W)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        hidden = tower.to(dtype)(pixels)                                         # (L+1, B, 1+N, d)
    return hidden.transpose(0, 1).bfloat16()


class Kept(nn.Module):
    """In the place of a tower whose states were computed before: what a VLM takes for pixels are
    those states."""

    def __init__(self, tower: CLIPVision):
        super().__init__()
        self.config = tower.config
        self.grid = tower.grid
        self.layers = nn.ModuleList()

    def forward(self, kept: Tensor, n_layers: int) -> Tensor:
        """kept (B, L+1, 1+N, d) in bfloat16 -> hidden (n_layers+1, B, 1+N, d), in what the model
        is trained in: no copy where that is bfloat16."""
        hidden = kept.transpose(0, 1)[:n_layers + 1]
        return hidden.to(autocast_dtype(torch.device("cpu")))


class Scenes(ToyScenes):
    """Toy's scenes with the study's captions and conversations, and the tower's states for
    pixels."""

    def __init__(self, stage: int, n: int, tokenizer: Tokenizer, tower: CLIPVision, out: Path,
                 size: int = toy.SIZE):
        """stage: 1 or 2; n: how many scenes; out: the folder that the states are kept in."""
        super().__init__(f"study{stage}", n, stage, tokenizer, size)
        self.kept = features(self, tower, out)
        self.samples = {}

    def sample(self, i: int) -> data.Sample:
        """The text alone. Each is made once: train.py wants all lengths first."""
        if i not in self.samples:
            self.samples[i] = self.make(self.scene(i))
        return self.samples[i]

    def make(self, scene: toy.Scene) -> data.Sample:
        """A scene's caption or conversation as a row."""
        turns = world.conversation(scene) if self.stage == 2 else []
        turns = turns or [("Describe the picture.", world.caption(scene))]
        template = "plain" if self.stage == 1 else "v1"
        return data.render(questions.record(turns, image="toy"), self.tokenizer, template)

    def __getitem__(self, i: int) -> dict:
        """data.item, with pixels (L+1, 1+N, d)."""
        return data.item(self.sample(i), self.kept[i])


def features(scenes: ToyScenes, tower: CLIPVision, out: Path, batch: int = 50) -> Tensor:
    """`states` of all of a data set's scenes, (n, L+1, 1+N, d), mapped from a file in out, which is
    written where it isn't."""
    path = out / f"{scenes.split}-{len(scenes)}-{digest(tower)}.bfloat16"
    shape = len(scenes), len(tower.layers) + 1, tower.grid ** 2 + 1, tower.config.hidden_size

    def write(tmp: Path) -> None:
        batches = tqdm(split(range(len(scenes)), batch), desc=str(path), unit="batch",
                       file=sys.stderr)
        with open(tmp, "wb") as file:
            for rows in batches:
                part = states(tower, [scenes.scene(i) for i in rows])
                file.write(part.contiguous().view(torch.uint8).numpy().tobytes())

    with closing(wait_for(out)):               # another process may be writing it
        if not path.exists():
            write_beside(path, write)
    kept = torch.from_file(str(path), size=math.prod(shape), dtype=torch.bfloat16)
    return kept.view(shape)


def digest(*modules: nn.Module, text: str = "") -> str:
    """Eight letters that tell weights (and a text) from others."""
    sha = hashlib.sha256()
    for module in modules:
        for p in module.parameters():
            sha.update(p.detach().float().numpy().tobytes())
    sha.update(text.encode())
    return sha.hexdigest()[:8]
