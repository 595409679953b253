"""A prepared folder: every sample's ids, labels and queries as arrays that are mapped, not read.

`python data.py prepare` writes it (training/prepare.py), `train.py --data` reads it. It holds
report.json (what was read, what was left out and why, lengths) and numpy arrays. Four are ragged:
rows of any length one after another in NAME.npy, and where each begins, and the last ends, in
NAME.offsets.npy:

    tokens   int32 (all, )      a row per sample: 2 * id, + 1 if the id is to be predicted (a label
                                is the id or none)
    turns    int32 (all, 3)     a row per sample, of its turns: the query's start and stop in
                                tokens, the answer's end
    names    uint8 (all, )      a row per sample, in UTF-8: the record's number in the json, its id
    paths    uint8 (all, )      a row per picture, in UTF-8, relative to the folder of pictures
    picture  int32 (samples, )  which of paths, -1 for none
    at       int32 (samples, )  where in the sample's ids the picture goes, -1 for none

A stage 1 caption's prompt isn't in its row; there it stands behind the row, which ends where the
last answer does. What is trained on is, item by item, what `data.load` gives.
"""
import fcntl
import hashlib
import json
import os
import sys
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import data
from clip import read_pixels
from core.common import UserError, read_json
from core.pictures import remarks
from core.tokenizer import IGNORE, IMAGE_TOKEN, Tokenizer
from data import Sample

FORMAT = 1                       # of the folder; goes up when an older one can't be read any more
# name -> shape and type of an entry
RAGGED = dict(tokens=((), np.int32), turns=((3,), np.int32), names=((), np.uint8),
              paths=((), np.uint8))
FLAT = ("picture", "at")


# --------------------------------------------------------------------------------------------------
# A sample as numbers, and back

def pack(sample: Sample) -> tuple[bytes, bytes, int]:
    """A sample's rows of tokens and of turns, and where its picture goes."""
    at = sample.ids.index(IMAGE_TOKEN) if IMAGE_TOKEN in sample.ids else -1
    ids, spans = sample.ids, sample.spans
    n = len(ids)
    if not spans:                                    # stage 1: the query is nowhere in ids
        (query,) = sample.turns
        ids = ids + query
        spans = [(n, n + len(query))]
    tokens = 2 * np.array(ids, dtype=np.int32)       # (n,), or (n + query,)
    tokens[:n] += np.array(sample.labels, dtype=np.int32) != IGNORE
    turns = [(*span, end) for span, end in zip(spans, sample.ends, strict=True)]
    return tokens.tobytes(), np.array(turns, dtype=np.int32).tobytes(), at


def unpack(tokens: np.ndarray, turns: np.ndarray) -> Sample:
    """pack's inverse: tokens (n,), turns (k, 3)."""
    ids = (tokens >> 1).tolist()                 # rounds down: -400 is -200, not to be predicted
    labels = np.where(tokens & 1, tokens >> 1, IGNORE).tolist()
    spans = [(start, stop) for start, stop, _ in turns.tolist()]
    queries = [ids[start:stop] for start, stop in spans]
    ends = turns[:, 2].tolist()
    n = ends[-1]
    return Sample(ids[:n], labels[:n], queries, [span for span in spans if span[0] < n], ends)


def tokenizer_id(tokenizer: Tokenizer) -> dict:
    """What makes a tokenizer this one: its file, and the ids that a row begins and ends with, which
    config.json may say."""
    with open(tokenizer.file, "rb") as f:
        sha256 = hashlib.file_digest(f, "sha256").hexdigest()
    return dict(file=tokenizer.file.name, sha256=sha256, bos=tokenizer.bos_id,
                eos=min(tokenizer.eos_ids))


# --------------------------------------------------------------------------------------------------
# The data set

class Prepared:
    """A prepared folder as a list of `data.item`s: those that `data.load` makes of the json.

    Opening reads report.json and maps the arrays: seconds at any size. images: where the pictures
    are now (default: where they were). pad: as in data.load. damaged: a file. With it, a picture
    that can't be read any more is noted there and said once on stderr, and the sample goes on with
    an empty picture and without labels: a batch has as many rows as it would have had, so all
    processes still do the same, and nothing is learnt from that row. Without it, it is a UserError;
    so are more such pictures than 1% (or 10): then it isn't the pictures that are broken. upright,
    say: as in data.load.
    """

    def __init__(self, folder: str | Path, images: str | Path | None, tokenizer: Tokenizer,
                 template: str, size: int = 336, pad: bool | None = None,
                 damaged: Path | None = None, upright: bool = False,
                 say: Callable = lambda line: None):
        self.folder = Path(folder)
        self.tokenizer, self.size, self.damaged = tokenizer, size, damaged
        self.upright = upright
        if not (self.folder / "report.json").is_file():
            raise UserError(f"{folder}: not a prepared folder; `python data.py prepare ... "
                            f"--out {folder}` makes it")
        self.report = read_json(self.folder / "report.json")
        inputs = self.report.get("inputs", {})
        if inputs.get("format") != FORMAT:
            raise UserError(f"{folder}: was prepared by another version of this code; "
                            "prepare it again")
        if inputs["template"] != template:
            raise UserError(f"{folder}: was prepared with --template {inputs['template']}, "
                            f"{template!r} is needed here")
        if inputs["tokenizer"] != tokenizer_id(tokenizer):
            raise UserError(f"{folder}: was prepared with another tokenizer than {tokenizer.file}; "
                            "prepare it again with --llm this model's folder")
        self._check_arrays()
        self.images = Path(images or inputs["images"] or "")
        if self.report["pictures"] and not self.images.is_dir():
            raise UserError(f"{self.images}: no such folder; say where the pictures of {folder} "
                            "are (--images DIR)")
        self.pad = template == "v1" if pad is None else pad
        odd = self.report.get("odd_pictures", {})
        for line in remarks({note: entry["count"] for note, entry in odd.items()}, upright):
            say(line)

    @cached_property
    def arrays(self) -> dict[str, np.ndarray]:
        """The mapped files by name: see this module's docstring."""
        names = [*FLAT, *RAGGED, *(f"{name}.offsets" for name in RAGGED)]
        try:
            return {name: np.asarray(np.load(self.folder / f"{name}.npy", mmap_mode="r"))
                    for name in names}
        except (OSError, ValueError, EOFError) as e:
            raise UserError(f"{self.folder}: an array is missing or damaged ({e}); "
                            "prepare it again") from e

    def __getstate__(self) -> dict:      # reading processes that aren't forked map the files again
        return {key: value for key, value in self.__dict__.items() if key != "arrays"}

    def _check_arrays(self) -> None:
        kept = self.report["kept"]
        rows = {name: kept for name in (*FLAT, *RAGGED)} | {"paths": self.report["pictures"]}
        for name, count in rows.items():
            values, offsets = self.arrays[name], self.arrays.get(f"{name}.offsets")
            if offsets is None:
                fine = len(values) == count
            else:
                fine = len(offsets) == count + 1 and len(values) == offsets[-1]
            if not fine:
                raise UserError(f"{self.folder}: {name}.npy isn't as long as report.json says; "
                                "prepare it again")

    def _row(self, name: str, i: int) -> np.ndarray:
        start, stop = self.arrays[f"{name}.offsets"][i:i + 2]
        return self.arrays[name][start:stop]

    def _text(self, name: str, i: int) -> str:
        return self._row(name, i).tobytes().decode(errors="surrogatepass")

    def __len__(self) -> int:
        return self.report["kept"]

    def record_id(self, i: int) -> str:
        """What to call sample i in a message: the record's place in the json, and its id."""
        return self._text("names", i)

    def sample(self, i: int) -> Sample:
        """The text alone."""
        return unpack(self._row("tokens", i), self._row("turns", i))

    def path(self, i: int) -> Path | None:
        """The file of sample i's picture."""
        picture = int(self.arrays["picture"][i])
        if picture < 0:
            return None
        return self.images / os.path.normpath(self._text("paths", picture))

    def pixels(self, i: int) -> Tensor:
        """Sample i's picture, (3, size, size); zeros for none. UserError if it can't be read."""
        path = self.path(i)
        if path is None:
            return torch.zeros(3, self.size, self.size)
        return read_pixels(path, self.size, self.pad, self.upright)

    def __getitem__(self, i: int) -> dict:
        sample = self.sample(i)
        try:
            return data.item(sample, self.pixels(i))
        except UserError as e:
            if self.damaged is None or not self.images.is_dir():
                raise
            self._note(self.path(i), f"{self.record_id(i)}: {e}")
        sample.labels = [IGNORE] * len(sample.ids)
        return data.item(sample, torch.zeros(3, self.size, self.size))

    def _note(self, path: Path, message: str) -> None:
        """Many processes may come upon the same picture; the file is what they all know."""
        with open(self.damaged, "a+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            known = {json.loads(line)["path"] for line in file}
            if str(path) in known:
                return
            file.write(json.dumps(dict(path=str(path), message=message)) + "\n")
        print(f"damaged picture, nothing is learnt from its samples: {message}", file=sys.stderr,
              flush=True)
        if len(known) + 1 > max(10, 0.01 * self.report["pictures"]):
            raise UserError(f"{len(known) + 1} pictures can't be read (see {self.damaged}): "
                            f"put {self.images} right")

    # Of all samples at once, for `order.order`

    def lengths(self, picture_rows: int, max_length: int) -> np.ndarray:
        """(samples,) how long every sample is for the language model: with its picture, which is
        picture_rows long in it, and after `data.cut`."""
        at = self.arrays["at"]
        # up to where the last answer ends
        words = self.arrays["turns"][self.arrays["turns.offsets"][1:] - 1, 2].astype(np.int64)
        # as many words as fit; the picture, one of them, whole or not at all
        room = np.where(max_length <= at, max_length,
                        np.maximum(at, max_length - picture_rows + 1))
        kept = np.minimum(words, np.where(at < 0, max_length, room))
        return kept + np.where((at >= 0) & (kept > at), picture_rows - 1, 0)

    def has_picture(self) -> np.ndarray:
        """(samples,) bool"""
        return self.arrays["picture"] >= 0
