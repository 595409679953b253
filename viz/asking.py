"""A loaded model, and how it is asked about pictures: for sample.py and for the page's server."""
import argparse
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from clip import preprocess
from core.common import UserError
from core.folders import read_config
from core.records import Turns
from core.tokenizer import IMAGE_TOKEN
from data import Sample, item, make_batch, prompt
from eval import load_model
from toy import world as toy


class Asker:
    """A model to ask, and the settings of its answers.

    args: the command line's; of it vision, device, dtype, quant and pack, seed, temperature, top_p
    and max_new_tokens are used.
    """
    anew = "/new begins anew"              # how, where a chat is full

    def __init__(self, args: argparse.Namespace, folder: str | Path, adapter: str | None = None):
        """folder: the model's; adapter: of what was learnt beside it."""
        vision = args.vision if folder == args.model else None
        self.model, self.tokenizer, self.device = load_model(
            folder, args.device, args.dtype, vision, args.quant == "int8", args.pack, adapter)
        self.generator = torch.Generator(self.device).manual_seed(args.seed)
        self.args, self.name = args, Path(adapter or folder).name
        self.toy = read_config(folder).get("world") == "toy"

    def foreign(self, image: Image.Image) -> list[str]:
        """A note, if the model can't know what is in a picture."""
        return [toy.KNOWS] if self.toy and not toy.knows(image) else []

    def pixels(self, image: Image.Image) -> Tensor:
        """A picture as the model takes it, (3, size, size)."""
        return preprocess(image, **self.model.image)

    def row(self, turns: Turns) -> Sample:
        """A question's `prompt`; turns as there. UserError for an empty question, or one for whose
        answer a chat has no room."""
        row = prompt(turns, self.tokenizer)
        if self.room(row) < 1 and len(turns) > 1:
            raise UserError("no room for another answer: this chat fills the language model's "
                            f"{self.context} positions; {self.anew}")
        return row

    def batch(self, row: Sample, pixels: Tensor) -> dict[str, Tensor]:
        """What model.generate takes. pixels (3, size, size)."""
        return make_batch([item(row, pixels)], self.model.query, device=self.device)

    @property
    def context(self) -> int:
        """How many positions the language model has."""
        return self.model.llm.config.max_position_embeddings

    def room(self, row: Sample) -> int:
        """How many tokens an answer can have after a `prompt`."""
        picture = self.model.picture_rows - 1 if IMAGE_TOKEN in row.ids else 0
        return self.context - len(row.ids) - picture

    def cut(self, tokens: int, most: int | None = None) -> str:
        """Why an answer ended after so many tokens, without its end. most: that it could have
        (default: --max-new-tokens)."""
        after = f"cut off after {tokens} token{'s' * (tokens > 1)}"
        if tokens == (most or self.args.max_new_tokens):
            return f"{after}: --max-new-tokens"
        return f"{after}: the language model's {self.context} positions are full"

    def generate(self, batch: dict[str, Tensor], tokens: list[int], times: list[float],
                 **changes) -> Iterator[int]:
        """The answer's ids as they come. tokens, times: lists that these, and when each of them
        came, are added to. changes: temperature, max_new_tokens, if they aren't args'."""
        args = self.args
        settings = dict(max_new_tokens=args.max_new_tokens, temperature=args.temperature,
                        top_p=args.top_p) | changes
        for token in self.model.generate(**batch, **settings, eos_ids=self.tokenizer.eos_ids,
                                         generator=self.generator):
            times.append(time.perf_counter())
            tokens.append(int(token[0]))
            yield tokens[-1]
