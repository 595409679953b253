"""TODO training/prepared.py"""
import fcntl
import hashlib
import json
import os
import sys
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import data
from clip import open_image, preprocess
from core.common import UserError, read_json
from core.tokenizer import Tokenizer
from data import IGNORE, IMAGE_TOKEN, Sample

FORMAT = 1                       # of the folder; goes up when an older folder can't be read any more
RAGGED = dict(tokens=((), np.int32), turns=((3,), np.int32), names=((), np.uint8), paths=((), np.uint8))
FLAT = ("picture", "at")


# --------------------------------------------------------------------------------------------------
# A sample as numbers, and back


def pack(sample: Sample) -> tuple[bytes, bytes, int]:
    """A sample's rows of tokens and of turns, and where its picture goes."""
    at = sample.ids.index(IMAGE_TOKEN) if IMAGE_TOKEN in sample.ids else -1
    ids, spans, n = sample.ids, sample.spans, len(sample.ids)
    if not spans:                                               # stage 1: the query is nowhere in ids
        (query,) = sample.turns
        ids, spans = ids + query, [(n, n + len(query))]
    tokens = 2 * np.array(ids, dtype=np.int32)                                       # (n,), or (n + query,)
    tokens[:n] += np.array(sample.labels, dtype=np.int32) != IGNORE
    turns = [(*span, end) for span, end in zip(spans, sample.ends, strict=True)]
    return tokens.tobytes(), np.array(turns, dtype=np.int32).tobytes(), at


def unpack(tokens: np.ndarray, turns: np.ndarray) -> Sample:
    """pack's inverse: tokens (n,), turns (k, 3)."""
    ids, ends = (tokens >> 1).tolist(), turns[:, 2].tolist()    # >> rounds down: -400 is -200, not to be predicted
    labels = np.where(tokens & 1, tokens >> 1, IGNORE).tolist()
    spans = [(start, stop) for start, stop, _ in turns.tolist()]
    queries, n = [ids[start:stop] for start, stop in spans], ends[-1]
    return Sample(ids[:n], labels[:n], queries, [span for span in spans if span[0] < n], ends)


def tokenizer_id(tokenizer: Tokenizer) -> dict:
    """What makes a tokenizer this one: its file, and the ids that a row begins and ends with (config.json may say)."""
    with open(tokenizer.file, "rb") as f:
        return dict(file=tokenizer.file.name, sha256=hashlib.file_digest(f, "sha256").hexdigest(),
                    bos=tokenizer.bos_id, eos=min(tokenizer.eos_ids))


# --------------------------------------------------------------------------------------------------
# The data set


def map_arrays(folder: Path) -> dict[str, np.ndarray]:
    names = [*FLAT, *RAGGED, *(f"{name}.offsets" for name in RAGGED)]
    try:
        return {name: np.asarray(np.load(folder / f"{name}.npy", mmap_mode="r")) for name in names}
    except (OSError, ValueError, EOFError) as e:
        raise UserError(f"{folder}: an array is missing or damaged ({e}); prepare it again") from e


def words_of(arrays: dict[str, np.ndarray]) -> np.ndarray:
    """(samples,) how many ids every sample has, its picture being one: up to where its last answer ends."""
    return arrays["turns"][arrays["turns.offsets"][1:] - 1, 2].astype(np.int64)


def merged(words: np.ndarray, at: np.ndarray, picture_rows: int, max_length: int) -> np.ndarray:
    """(samples,) how long every sample is for the language model: after data.cut, and with its picture in it."""
    room = np.where(max_length <= at, max_length, np.maximum(at, max_length - picture_rows + 1))
    kept = np.minimum(words, np.where(at < 0, max_length, room))
    return kept + np.where((at >= 0) & (kept > at), picture_rows - 1, 0)


class Prepared:
    """A prepared folder as a list of `data.item`s: those that `data.load` makes of the same records.

    Opening reads report.json and maps the arrays: seconds at any size. images: where the pictures are now (default:
    where they were). pad: as in data.load. damaged: a file. With it, a picture that can't be read any more is noted
    there and said once on stderr, and the sample goes on with an empty picture and without labels: a batch has as
    many rows as it would have had, so all processes still do the same, and nothing is learnt from that row. Without
    it, it is a UserError; so are more such pictures than 1% (or 10), since then it isn't the pictures that are broken.
    """

    def __init__(self, folder, images, tokenizer: Tokenizer, template: str, size: int = 336, pad: bool | None = None,
                 damaged: Path | None = None):
        self.folder, self.tokenizer, self.size, self.damaged = Path(folder), tokenizer, size, damaged
        if not (self.folder / "report.json").is_file():
            raise UserError(f"{folder}: not a prepared folder; `python data.py prepare ... --out {folder}` makes it")
        self.report = read_json(self.folder / "report.json")
        inputs = self.report.get("inputs", {})
        if inputs.get("format") != FORMAT:
            raise UserError(f"{folder}: was prepared by another version of this code; prepare it again")
        if inputs["template"] != template:
            raise UserError(f"{folder}: was prepared with --template {inputs['template']}, {template!r} is needed here")
        if inputs["tokenizer"] != tokenizer_id(tokenizer):
            raise UserError(f"{folder}: was prepared with another tokenizer than {tokenizer.file}; prepare it again "
                            "with --llm this model's folder")
        self._check_arrays()
        self.images = Path(images or inputs["images"] or "")
        if self.report["pictures"] and not self.images.is_dir():
            raise UserError(f"{self.images}: no such folder; say where the pictures of {folder} are (--images DIR)")
        self.pad = template == "v1" if pad is None else pad

    @cached_property
    def arrays(self) -> dict[str, np.ndarray]:
        return map_arrays(self.folder)

    def __getstate__(self) -> dict:      # for reading processes that are not forked: they map the files themselves
        return {key: value for key, value in self.__dict__.items() if key != "arrays"}

    def _check_arrays(self) -> None:
        arrays, n = self.arrays, self.report["kept"]
        rows = {name: n for name in (*FLAT, *RAGGED)} | {"paths": self.report["pictures"]}
        for name, count in rows.items():
            values, offsets = arrays[name], arrays.get(f"{name}.offsets")
            fine = len(values) == count if offsets is None else len(offsets) == count + 1 and len(values) == offsets[-1]
            if not fine:
                raise UserError(f"{self.folder}: {name}.npy isn't as long as report.json says; prepare it again")

    def _row(self, name: str, i: int) -> np.ndarray:
        start, stop = self.arrays[f"{name}.offsets"][i:i + 2]
        return self.arrays[name][start:stop]

    def __len__(self) -> int:
        return self.report["kept"]

    def record_id(self, i: int) -> str:
        """What to call sample i in a message: the record's place in the json, and its id."""
        return self._row("names", i).tobytes().decode(errors="surrogatepass")

    def sample(self, i: int) -> Sample:
        """The text alone."""
        return unpack(self._row("tokens", i), self._row("turns", i))

    def path(self, i: int) -> Path | None:
        """The file of sample i's picture."""
        picture = int(self.arrays["picture"][i])
        if picture < 0:
            return None
        return self.images / os.path.normpath(self._row("paths", picture).tobytes().decode(errors="surrogatepass"))

    def pixels(self, i: int) -> Tensor:
        path = self.path(i)
        if path is None:
            return torch.zeros(3, self.size, self.size)
        return preprocess(open_image(path), self.size, self.pad)                     # (3, size, size)

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
        print(f"damaged picture, nothing is learnt from its samples: {message}", file=sys.stderr, flush=True)
        if len(known) + 1 > max(10, 0.01 * self.report["pictures"]):
            raise UserError(f"{len(known) + 1} pictures can't be read (see {self.damaged}): put {self.images} right")

    def lengths(self, picture_rows: int, max_length: int) -> np.ndarray:
        """(samples,) for `order`; see `merged`."""
        return merged(words_of(self.arrays), self.arrays["at"], picture_rows, max_length)

    def has_picture(self) -> np.ndarray:
        """(samples,) bool"""
        return self.arrays["picture"] >= 0
