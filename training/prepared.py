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
import hashlib
import os
import time
from collections.abc import Callable, Iterator
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from torch import Tensor

import data
from clip import read_pixels
from core import fields
from core.common import UserError, read_json
from core.pictures import remarks
from core.records import inside
from core.tokenizer import IGNORE, IMAGE_TOKEN, Tokenizer
from data import Sample
from training.before import Cut

FORMAT = 1                       # of the folder; goes up when an older one can't be read any more
# name -> shape and type of an entry
RAGGED = dict(tokens=((), np.int32), turns=((3,), np.int32), names=((), np.uint8),
              paths=((), np.uint8))
FLAT = ("picture", "at")
# What report.json has to hold for others to use, and its "inputs": see core/fields.py
REPORT = dict(
    inputs=dict,                                             # INPUTS
    kept=Annotated[int, fields.Range(1, 2 ** 31 - 1)],       # samples
    pictures=Annotated[int, fields.Range(0, 2 ** 31 - 1)],   # rows of paths
    arrays=dict[str, str] | None,                            # file -> sha256; older folders: none
    odd_pictures=dict[str, dict] | None)                     # note -> count, examples
INPUTS = dict(template=str, images=str | None, json=dict, tokenizer=dict)
LOOK = 10                        # seconds that pictures are looked for when a training begins


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
# The folder, checked

def read_report(folder: str | Path) -> dict:
    """A prepared folder's report.json. UserError if it isn't one, or was changed beyond use."""
    file = Path(folder) / "report.json"
    if not file.is_file():
        raise UserError(f"{folder}: not a prepared folder; `python data.py prepare ... "
                        f"--out {folder}` makes it")
    report = read_json(file)
    inputs = report.get("inputs")
    if not isinstance(inputs, dict) or inputs.get("format") != FORMAT:
        raise UserError(f"{folder}: was prepared by another version of this code; "
                        "prepare it again")
    try:
        fields.check(report, REPORT, str(file))
        fields.check(inputs, INPUTS, f"{file}: inputs")
        fields.check(inputs["json"], dict(sha256=str), f"{file}: inputs: json")
        for entry in (report.get("odd_pictures") or {}).values():
            fields.check(entry, dict(count=int), f"{file}: odd_pictures")
    except UserError as e:
        raise UserError(f"{e}; prepare it again") from None
    return report


def sha256_of(file: Path) -> str:
    with open(file, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def check_bytes(folder: Path, report: dict) -> None:
    """UserError unless the arrays are those that report.json was written about."""
    known = {f"{name}.npy" for name in (*FLAT, *RAGGED, *(f"{name}.offsets" for name in RAGGED))}
    for name, sha256 in (report.get("arrays") or {}).items():
        if name not in known:                        # it could lead anywhere
            raise UserError(f"{folder}/report.json: there is no array {name!r}")
        if not (folder / name).is_file() or sha256_of(folder / name) != sha256:
            raise UserError(f"{folder / name}: isn't what was prepared (other bytes); remove "
                            f"{folder}, and prepare it again")


def read_array(file: Path, dtype: type, tail: tuple) -> np.ndarray:
    """A .npy file, mapped: of this type, of rows of this shape."""
    try:
        if not file.is_file():                       # a pipe would be waited for
            raise OSError("no such file")
        array = np.load(file, mmap_mode="r")
        if not isinstance(array, np.ndarray) or array.dtype != dtype or array.shape[1:] != tail \
                or array.ndim == 0:
            raise ValueError("holds something else")
        return np.asarray(array)
    except Exception as e:                           # numpy says many things of foreign bytes
        why = " ".join(str(e).split())[:200] or type(e).__name__
        raise UserError(f"{file.parent}: an array is missing or damaged ({file.name}: {why}); "
                        "prepare it again") from e


def whole(offsets: np.ndarray, values: np.ndarray, rows: int) -> bool:
    """Whether a ragged array is so many rows, of all values, one after another."""
    return (len(offsets) == rows + 1 and offsets[0] == 0 and offsets[-1] == len(values)
            and bool((np.diff(offsets) >= 0).all()))


def faults(a: dict[str, np.ndarray], pictures: int, vocabulary: int) -> Iterator[tuple[str, str]]:
    """What is wrong in arrays of the right lengths: (name, how)."""
    ids, k = np.diff(a["tokens.offsets"]), np.diff(a["turns.offsets"])         # (samples,) both
    if (k < 1).any():
        yield "turns.offsets", "a sample has no turn"
        return
    row = np.repeat(np.arange(len(k)), k)                                       # (turns,)
    start, stop, end = a["turns"].astype(np.int64).T                            # (turns,) each
    within = (0 <= start) & (start <= stop) & (stop <= ids[row]) & (0 < end) & (end <= ids[row])
    if not within.all() or ((np.diff(end) <= 0) & (np.diff(row) == 0)).any():
        yield "turns", "a turn lies outside of its sample"
        return
    words = end[a["turns.offsets"][1:] - 1]                                     # (samples,)
    picture, at = a["picture"], a["at"]
    if (picture < -1).any() or (picture >= pictures).any():
        yield "picture", "there is no such row in paths.npy"
    has = at >= 0
    if (at < -1).any() or (at >= words).any() or (has != (picture >= 0)).any():
        yield "at", "a picture's place lies outside of its sample, or is of none"
        return
    slots = a["tokens"][a["tokens.offsets"][:-1][has] + at[has]]
    low = high = negative = 0
    for i in range(0, len(a["tokens"]), 2 ** 24):
        piece = a["tokens"][i:i + 2 ** 24]
        low, high = min(low, int(piece.min())), max(high, int(piece.max()))
        negative += int((piece < 0).sum())
    if (slots != 2 * IMAGE_TOKEN).any() or negative != len(slots) or high >> 1 >= vocabulary:
        yield "tokens", "there is a token that the tokenizer doesn't have"


# --------------------------------------------------------------------------------------------------
# The data set

class Prepared:
    """A prepared folder as a list of `data.item`s: those that `data.load` makes of the json.

    Opening reads report.json, maps the arrays and checks that they are as they were written:
    seconds at any size. UserError for another folder, for one that was damaged, or edited so that
    it leads out of the folder of pictures. images: where the pictures are now (default: where they
    were). pad, upright, say: as in data.load.
    """

    def __init__(self, folder: str | Path, images: str | Path | None, tokenizer: Tokenizer,
                 template: str, size: int = 336, pad: bool | None = None, upright: bool = False,
                 say: Callable = lambda line: None):
        self.folder = Path(folder)
        self.tokenizer, self.size, self.upright = tokenizer, size, upright
        self.report = read_report(folder)
        inputs = self.report["inputs"]
        if inputs["template"] != template:
            raise UserError(f"{folder}: was prepared with --template {inputs['template']}, "
                            f"{template!r} is needed here")
        if inputs["tokenizer"] != tokenizer_id(tokenizer):
            raise UserError(f"{folder}: was prepared with another tokenizer than {tokenizer.file}; "
                            "prepare it again with --llm this model's folder")
        self._check_arrays()
        self.image_root = Path(images or inputs.get("images") or "")
        if self.report["pictures"] and not self.image_root.is_dir():
            raise UserError(f"{self.image_root}: no such folder; say where the pictures of "
                            f"{folder} are (--images DIR)")
        self.pad = template == "v1" if pad is None else pad
        odd = self.report.get("odd_pictures") or {}
        for line in remarks({note: entry["count"] for note, entry in odd.items()}, upright):
            say(line)

    @cached_property
    def arrays(self) -> dict[str, np.ndarray]:
        """The mapped files by name: see this module's docstring."""
        kinds = {name: ((), np.int32) for name in FLAT} | RAGGED
        kinds |= {f"{name}.offsets": ((), np.int64) for name in RAGGED}
        return {name: read_array(self.folder / f"{name}.npy", dtype, tail)
                for name, (tail, dtype) in kinds.items()}

    def __getstate__(self) -> dict:      # reading processes that aren't forked map the files again
        return {key: value for key, value in self.__dict__.items() if key != "arrays"}

    def _check_arrays(self) -> None:
        kept = self.report["kept"]
        rows = {name: kept for name in (*FLAT, *RAGGED)} | {"paths": self.report["pictures"]}
        for name, count in rows.items():
            values, offsets = self.arrays[name], self.arrays.get(f"{name}.offsets")
            fine = len(values) == count if offsets is None else whole(offsets, values, count)
            if not fine:
                raise UserError(f"{self.folder}: {name}.npy isn't as long as report.json says; "
                                "prepare it again")
        for name, how in faults(self.arrays, self.report["pictures"], self.tokenizer.vocab_size):
            raise UserError(f"{self.folder / name}.npy: {how}; it was changed: prepare it again")
        for name in ("names", "paths"):
            for i, text in enumerate(self._texts(name)):
                if name == "paths" and (not text or not inside(text)):
                    raise UserError(f"{self.folder}/paths.npy: picture {i} is {text!r}, which "
                                    "leads out of the folder of pictures; prepare it again")
        check_bytes(self.folder, self.report)

    def _texts(self, name: str) -> Iterator[str]:
        """All rows of a ragged array of UTF-8."""
        blob = self.arrays[name].tobytes()
        for start, stop in pairwise(self.arrays[f"{name}.offsets"].tolist()):
            try:
                yield blob[start:stop].decode(errors="surrogatepass")
            except UnicodeDecodeError:
                raise UserError(f"{self.folder}/{name}.npy: isn't UTF-8; it was changed: prepare "
                                "it again") from None

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
        return self.image_root / os.path.normpath(self._text("paths", picture))

    def pixels(self, i: int) -> Tensor:
        """Sample i's picture, (3, size, size); zeros for none. UserError if it can't be read."""
        path = self.path(i)
        if path is None:
            return torch.zeros(3, self.size, self.size)
        return read_pixels(path, self.size, self.pad, self.upright)

    def __getitem__(self, i: int) -> dict:
        return data.item(self.sample(i), self.pixels(i))

    # Of all samples at once, for `order.order` and training/before.py

    def picture_count(self) -> int:
        """How many pictures the samples have."""
        picture = self.arrays["picture"]
        return len(np.unique(picture[picture >= 0]))

    def first_gone(self) -> tuple[int, str]:
        """How many of these aren't there any more, and the first of them with its record. Looks for
        LOOK seconds at most."""
        count, first, began = 0, "", time.monotonic()
        picture = self.arrays["picture"]
        used = set(picture.tolist())
        for number, path in enumerate(self._texts("paths")):
            if time.monotonic() > began + LOOK:
                break
            if number not in used or os.path.isfile(
                    self.image_root / os.path.normpath(path)):
                continue
            if count == 0:
                first = f"{path!r} of {self.record_id(int((picture == number).argmax()))}"
            count += 1
        return count, first

    def cut(self, max_length: int, picture_rows: int) -> Cut:
        """What samples lose of their supervised tokens by `data.cut`."""
        words, kept = self._cut(picture_rows, max_length)
        cut = Cut()
        cut.samples = len(words)
        for i in np.flatnonzero(kept < words).tolist():
            learn = self._row("tokens", i)[:words[i]] & 1                          # (words,)
            cut.samples -= 1
            cut.count(int(learn.sum()), int(learn[:kept[i]].sum()))
        return cut

    def lengths(self, picture_rows: int, max_length: int) -> np.ndarray:
        """(samples,) how long every sample is for the language model: with its picture, which is
        picture_rows long in it, and after `data.cut`."""
        at = self.arrays["at"]
        _, kept = self._cut(picture_rows, max_length)
        return kept + np.where((at >= 0) & (kept > at), picture_rows - 1, 0)

    def _cut(self, picture_rows: int, max_length: int) -> tuple[np.ndarray, np.ndarray]:
        """Two (samples,): ids of every sample, its picture being one of them, and what `data.cut`
        keeps."""
        at = self.arrays["at"]
        # up to where the last answer ends
        words = self.arrays["turns"][self.arrays["turns.offsets"][1:] - 1, 2].astype(np.int64)
        # as many words as fit; the picture, one of them, whole or not at all
        room = np.where(max_length <= at, max_length,
                        np.maximum(at, max_length - picture_rows + 1))
        return words, np.minimum(words, np.where(at < 0, max_length, room))

    def has_picture(self) -> np.ndarray:
        """(samples,) bool"""
        return self.arrays["picture"] >= 0
