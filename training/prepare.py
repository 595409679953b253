r"""LLaVA's json at its real size: everything checked and tokenised once, training from memory-mapped arrays.

`data.load` keeps a json in memory and tokenises a record whenever it is wanted. That is fine for thousands of records.
LLaVA's 665,298 are better read once, ahead, by all cores:

    python data.py prepare --json llava_v1_5_mix665k.json --images playground/data --llm vicuna-7b-v1.5 \
        --out data/mix665k
    python train.py --stage 2 --data data/mix665k

The folder holds report.json (what was read, what was left out and why, lengths) and numpy arrays. Four are ragged: rows
of any length one after another in NAME.npy, and where each begins, and the last ends, in NAME.offsets.npy:

    tokens   int32 (all, )      a row per sample: 2 * id, + 1 if the id is to be predicted (a label is the id or none)
    turns    int32 (all, 3)     a row per sample, of its turns: the query's start and stop in tokens, the answer's end
    names    uint8 (all, )      a row per sample, in UTF-8: the record's number in the json, and its id
    paths    uint8 (all, )      a row per picture, in UTF-8, relative to the folder of pictures
    picture  int32 (samples, )  which of paths, -1 for none
    at       int32 (samples, )  where in the sample's ids the picture goes, -1 for none

A stage 1 caption's prompt isn't in its row; there it stands behind the row, which ends where the last answer does.
What is trained on is, item by item, what `data.load` gives. And lengths are known, so samples of like length can be put
together (`data.order`); what that saves, `python data.py padding` measures.
"""
import fcntl
import hashlib
import json
import math
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
import weakref
from array import array
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, cached_property, partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

import data
from clip import open_image, preprocess
from data import GROUPS, IGNORE, IMAGE_TOKEN, TEMPLATES, Sample, order, split
from llama import Tokenizer
from core.weights import UserError, cores, read_json, write_beside

FORMAT = 1                       # of the folder; goes up when an older folder can't be read any more
RAGGED = dict(tokens=((), np.int32), turns=((3,), np.int32), names=((), np.uint8), paths=((), np.uint8))
FLAT = ("picture", "at")
OTHER_NAMES = (".jpg", ".jpeg", ".png", ".gif", ".webp")     # what a picture that isn't there may be called instead
BINS = (64, 128, 256, 512, 1024, 2048, 4096)                 # of the histogram of lengths


# ---------------------------------------------------------------------------------------------------------------------
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


class Column:
    """A ragged array on its way to disk."""

    def __init__(self, folder: Path, name: str):
        self.shape, self.dtype = RAGGED[name]
        self.folder, self.name, self.offsets = folder, name, array("q", [0])
        self.file = open(folder / f"{name}.npy", "wb")
        self._head()

    def _head(self) -> None:            # numpy leaves room in it for the number of rows to grow
        header = dict(shape=(self.offsets[-1], *self.shape), fortran_order=False,
                      descr=np.lib.format.dtype_to_descr(np.dtype(self.dtype)))
        np.lib.format.write_array_header_1_0(self.file, header)

    def add(self, row: bytes) -> None:
        self.file.write(row)
        self.offsets.append(self.offsets[-1] + len(row) // (np.dtype(self.dtype).itemsize * math.prod(self.shape)))

    def close(self) -> None:
        self.file.seek(0)
        self._head()
        self.file.close()
        np.save(self.folder / f"{self.name}.offsets.npy", np.array(self.offsets, dtype=np.int64))


# ---------------------------------------------------------------------------------------------------------------------
# What the reading processes do

@dataclass
class Job:
    """Some consecutive records, and the pictures that are named there for the first time."""
    llm: Path
    template: str
    images: Path | None
    decode: bool
    first: int                  # number of the first record
    records: list
    picture: list[int]          # for each record, the number of its picture, -1 for none
    paths: list[str]


@dataclass
class Row:
    """A record, tokenised; or the reason why it is left out, with a message."""
    name: str
    source: str
    reason: str | None = None
    message: str = ""
    packed: tuple | None = None
    learnt: int = 0             # supervised tokens


@dataclass
class Look:
    """A picture, looked at. path: where it was found. odd: a file that isn't what its name says, but can be read."""
    path: str
    odd: str | None = None
    reason: str | None = None
    message: str = ""


tokenizer_of = cache(Tokenizer.from_pretrained)       # one per process


def follow(parent: int) -> None:
    """Ctrl-C is the parent's affair. When it is gone, however it ended, this process goes: nobody else would end it."""
    born = os.getppid() if multiprocessing.get_start_method() == "forkserver" else parent      # else a server's child

    def watch() -> None:
        while os.getppid() == born:
            time.sleep(0.5)
        os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=watch, daemon=True).start()


def digest(job: Job) -> tuple[list[Row], list[Look]]:
    rows = [read(record, f"record {job.first + i}", job.template, tokenizer_of(job.llm))
            for i, record in enumerate(job.records)]
    return rows, [look(job.images, path, job.decode) for path in job.paths]


def read(record, where: str, template: str, tokenizer: Tokenizer) -> Row:
    row = Row(data.name(record, where), source(record))
    try:
        turns, picture = data.check(record, where, template)
        row.reason = data.lacks(turns, picture)
        if row.reason is None:
            sample = data.write(turns, picture, tokenizer, template)
            row.packed, row.learnt = pack(sample), len(sample.labels) - sample.labels.count(IGNORE)
    except UserError as e:
        row.reason, row.message = "not LLaVA's format", str(e).removeprefix(row.name + ": ")
    return row


def picture_of(record) -> str | None:
    """The path that a record gives, if it is one."""
    path = record.get("image") if isinstance(record, dict) else None
    return path if isinstance(path, str) and path and data.inside(path) else None


def source(record) -> str:
    """Where a record comes from, as far as its picture's path tells."""
    path = picture_of(record)
    if path is None:
        return "text only"
    folder, _, rest = os.path.normpath(path).partition("/")
    return "no folder" if not rest else "numbered folders" if folder.isdecimal() else folder


def look(root: Path, path: str, decode: bool) -> Look:
    """Whether a picture is there and can be read.

    Without `decode` that takes 0.1 to 0.2 ms for a JPEG of 640 x 480, and finds one that was cut, but not one that is
    wrong in the middle; with it 1.0 to 1.3 ms, as it is decoded to an eighth of its size, which takes all of its bytes
    (2.2 ms or more in full; tests/big.py, one core of an EPYC).
    Pillow goes by what is in a file, so a GIF called .jpg is no harm. One that is called .gif where the json says .jpg
    isn't found by that name: OCR-VQA's downloader saves some like this. Both are counted.
    """
    there = path
    if not os.path.isfile(root / os.path.normpath(path)):
        stem, last = os.path.splitext(os.path.normpath(path))
        others = [stem + e for e in OTHER_NAMES if e != last and os.path.isfile(root / (stem + e))]
        if len(others) != 1:
            return Look(path, reason="its picture is missing", message=f"no such image: {path!r}")
        there = others[0]
    file, odd = root / os.path.normpath(there), None
    try:
        with Image.open(file) as image:
            kind, named = image.format, Image.registered_extensions().get(file.suffix.lower())
            if image.format == "PNG" and not decode:
                image.verify()                          # reads it all, and compares its checksums
            elif image.format == "JPEG" and (decode or not ends_well(file)):
                image.draft("RGB", (1, 1))              # an eighth of the size is cheaper, but all of it is read
                image.load()
            elif image.format not in ("PNG", "JPEG") or decode:
                open_image(file)
        if there != path:
            odd = f"called {file.suffix} instead of {os.path.splitext(path)[1]}"
        elif kind != named:
            odd = f"{kind} called {file.suffix}"
    except Exception as e:            # as in open_image, Pillow's decoders raise whatever they like
        why = " ".join(str(e).removeprefix(f"{file}: ").split()) or type(e).__name__
        return Look(path, reason="its picture can't be read", message=f"{path!r}: {why}")
    return Look(there, odd)


def ends_well(file: Path) -> bool:
    """Whether a JPEG file ends with its end marker, which one that was cut doesn't. (Some whole ones don't either.)"""
    with open(file, "rb") as f:
        f.seek(-2, os.SEEK_END)
        return f.read() == b"\xff\xd9"


# ---------------------------------------------------------------------------------------------------------------------
# prepare

CHUNK = 256             # records in a job


def jobs(records: Iterator, known: dict[str, int], **same) -> Iterator[Job]:
    """known: path -> its number, in the order in which jobs hand them out."""
    n = 0
    while chunk := list(islice(records, CHUNK)):
        before, picture = len(known), []
        for record in chunk:
            path = picture_of(record)
            picture.append(-1 if path is None else known.setdefault(path, len(known)))
        if len(known) > before and same["images"] is None:
            raise UserError(f"records have pictures (first: {next(iter(known))!r}): say where they are (--images DIR)")
        yield Job(**same, first=n, records=chunk, picture=picture, paths=list(islice(known, before, None)))
        n += len(chunk)


def in_order(todo: Iterator[Job], workers: int) -> Iterator[tuple[Job, tuple]]:
    """Every job with its result, in order, from some processes (0: this one). Only a few jobs wait at any time: the
    pool's own map would take all of the json into memory."""
    if workers == 0:
        yield from ((job, digest(job)) for job in todo)
        return
    pool = ProcessPoolExecutor(workers, initializer=follow, initargs=(os.getpid(),))
    try:
        waiting = deque()
        for job in todo:
            waiting.append((job, pool.submit(digest, job)))
            if len(waiting) > 4 * workers:
                done, result = waiting.popleft()
                yield done, result.result()
        yield from ((job, result.result()) for job, result in waiting)
    except BrokenProcessPool:
        raise UserError("a reading process was killed (out of memory?); fewer --workers take less") from None
    finally:
        pool.shutdown(cancel_futures=True)


class Report:
    """What goes into report.json."""

    def __init__(self):
        self.records, self.sources, self.left_out, self.odd, self.lengths = 0, {}, {}, {}, {True: [], False: []}
        self.learnt = 0

    def count(self, row: Row, words: int | None, picture: bool) -> None:
        """words: ids of the row, its picture being one; None if it was left out."""
        self.records += 1
        of_source = self.sources.setdefault(row.source, dict(records=0, kept=0, ids=0, supervised=0))
        of_source["records"] += 1
        if words is None:
            self.example(self.left_out, row.reason, f"{row.name}: {row.message}" if row.message else row.name)
        else:
            for key, more in (("kept", 1), ("ids", words), ("supervised", row.learnt)):
                of_source[key] += more
            self.lengths[picture].append(words)

    @staticmethod
    def example(table: dict, reason: str, text: str) -> None:
        entry = table.setdefault(reason, dict(count=0, examples=[]))
        entry["count"] += 1
        entry["examples"] += [text] * (len(entry["examples"]) < 5)

    @property
    def kept(self) -> int:
        return sum(map(len, self.lengths.values()))

    def reasons(self) -> str:
        return "; ".join(f"{entry['count']} {reason} (first: {entry['examples'][0]})"
                         for reason, entry in self.left_out.items())

    def to_dict(self) -> dict:
        lengths = {}
        for picture, those in self.lengths.items():
            if those:
                counts, _ = np.histogram(those, bins=(0, *BINS, np.inf))
                lengths["with picture" if picture else "text only"] = dict(
                    samples=len(those), mean=round(float(np.mean(those)), 1), median=float(np.median(those)),
                    p95=float(np.percentile(those, 95)), longest=max(those),
                    histogram={f"below {top}": int(n) for top, n in zip((*BINS, "inf"), counts)})
        return dict(records=self.records, kept=self.kept, left_out=self.left_out, sources=self.sources,
                    lengths=dict(what="ids of a sample, its picture counted as one", **lengths), odd_pictures=self.odd)


def tokenizer_id(tokenizer: Tokenizer) -> dict:
    """What makes a tokenizer this one: its file, and the ids that a row begins and ends with (config.json may say)."""
    with open(tokenizer.file, "rb") as f:
        return dict(file=tokenizer.file.name, sha256=hashlib.file_digest(f, "sha256").hexdigest(),
                    bos=tokenizer.bos_id, eos=min(tokenizer.eos_ids))


def prepare(json_path, images, out, llm, template: str = "v1", decode: bool = False, workers: int = 0,
            tolerate: float = 0.01, say: Callable = print, bar: bool = False) -> None:
    """Write the folder `out`, which appears when it is complete.

    A record that can't be used is left out and reported; if those are more than the share `tolerate`, something is
    wrong with the inputs, and it is a UserError. So is an `out` made from other inputs; one made from these is left
    as it is. workers: processes besides this one, or 0.
    """
    file, out, images = Path(json_path), Path(out), None if images is None else Path(images)
    if images is not None and not images.is_dir():
        raise UserError(f"{images}: no such folder (the one that the json's picture paths start from)")
    if not file.is_file():
        raise UserError(f"can't read {file}: no such file")
    inputs = dict(format=FORMAT, template=template, json=dict(bytes=file.stat().st_size), decode=decode,
                  images=None if images is None else str(images.resolve()),
                  tokenizer=tokenizer_id(tokenizer_of(Path(llm))))
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        return already(out, file, inputs, say)
    began, report, sha = time.perf_counter(), Report(), hashlib.sha256()
    with workplace(out) as tmp, tqdm(total=file.stat().st_size, unit="B", unit_scale=True, disable=not bar) as progress:
        def tap(block: bytes) -> None:
            sha.update(block)
            progress.update(len(block))

        todo = partial(jobs, data.stream(file, tap), llm=Path(llm), template=template, images=images, decode=decode)
        pictures = fill(tmp, todo, workers, report, progress)
        if report.kept == 0:
            raise UserError(f"{file}: not one record can be learnt from: {report.reasons()}")
        if report.records - report.kept > tolerate * report.records:
            raise UserError(f"{file}: {report.records - report.kept} of {report.records} records would be left out, "
                            f"more than --tolerate {tolerate}: {report.reasons()}")
        inputs["json"]["sha256"] = sha.hexdigest()
        content = dict(inputs=inputs, file=str(file), seconds=round(time.perf_counter() - began, 1),
                       pictures=pictures, **report.to_dict())
        write_beside(tmp / "report.json", lambda path: path.write_text(json.dumps(content, indent=1) + "\n"))
        os.rename(tmp, out)
    say(f"{out}: {report.kept:,} of {report.records:,} records, {pictures:,} pictures, in {content['seconds']:,} s")
    for what, counts in report.sources.items():
        say(f"  {what:18} {counts['kept']:9,} of {counts['records']:9,}")
    if report.left_out:
        say(f"left out: {report.reasons()}")
    if report.odd:
        say("read all the same: " + ", ".join(f"{entry['count']} {odd}" for odd, entry in report.odd.items()))


def fill(folder: Path, todo: Callable, workers: int, report: Report, progress) -> int:
    """Write the arrays. Returns how many pictures were looked at."""
    columns, flat = {name: Column(folder, name) for name in RAGGED}, {name: array("i") for name in FLAT}
    known, looks = {}, []
    for job, (rows, looked) in in_order(todo(known), workers):
        for one in looked:
            looks.append((one.reason, one.message))
            columns["paths"].add(one.path.encode(errors="surrogatepass"))
            if one.odd:
                report.example(report.odd, one.odd, one.path)
        for row, picture in zip(rows, job.picture):
            if row.reason is None and picture >= 0:
                row.reason, row.message = looks[picture]
            if row.reason is not None:
                report.count(row, None, picture >= 0)
                continue
            tokens, turns, at = row.packed
            columns["tokens"].add(tokens)
            columns["turns"].add(turns)
            columns["names"].add(row.name.encode(errors="surrogatepass"))
            flat["picture"].append(picture)
            flat["at"].append(at)
            report.count(row, int.from_bytes(turns[-4:], sys.byteorder), picture >= 0)
        progress.set_postfix(records=report.records, left_out=report.records - report.kept, refresh=False)
    for column in columns.values():
        column.close()
    for name, values in flat.items():
        np.save(folder / f"{name}.npy", np.array(values, dtype=np.int32))
    return len(looks)


def already(out: Path, file: Path, inputs: dict, say: Callable) -> None:
    """There is something at `out`: fine if it was made from the same inputs."""
    if not (out / "report.json").is_file():
        raise UserError(f"{out}: is there and isn't a prepared folder; choose another --out")
    before = read_json(out / "report.json").get("inputs", {})
    with open(file, "rb") as f:
        inputs["json"]["sha256"] = hashlib.file_digest(f, "sha256").hexdigest()
    for key, value in inputs.items():
        if before.get(key) != value:
            raise UserError(f"{out}: was prepared from another {key} ({before.get(key)}, now {value}); choose another "
                            "--out, or remove that folder")
    say(f"{out} is already prepared from these very inputs; nothing to do")


class Lock:
    """A file or folder that is this process's alone (flock): until close(), or until the process ends, however it does.

    A process that is forked gets a copy of everything that is open, and would keep a killed one's lock for as long as
    it lives itself. So it closes its copy, first of all. BlockingIOError if somebody else has the lock.
    """
    held, fd = weakref.WeakSet(), None

    def __init__(self, path: Path):
        self.fd = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)         # NFS wants to write
        try:
            fcntl.flock(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.close()
            raise
        Lock.held.add(self)

    def close(self) -> None:
        if self.fd is not None:
            os.close(self.fd)
        self.fd = None

    __del__ = close


os.register_at_fork(after_in_child=lambda: [lock.close() for lock in list(Lock.held)])


@contextmanager
def workplace(out: Path) -> Iterator[Path]:
    """A folder beside `out` for this process alone. If it is still there in the end, it is removed."""
    tmp = out.with_name(out.name + ".tmp")
    tmp.mkdir(parents=True, exist_ok=True)
    try:
        lock = Lock(tmp)
        if not tmp.exists() or not os.path.samestat(os.fstat(lock.fd), os.stat(tmp)):      # it was renamed just now
            lock.close()
            raise BlockingIOError
    except BlockingIOError:
        raise UserError(f"{tmp}: another process is preparing this folder") from None
    if foreign := [p.name for p in tmp.iterdir() if p.suffix != ".npy" and not p.name.startswith("report.json")]:
        raise UserError(f"{tmp}: would be emptied, but holds {min(foreign)!r}, which isn't from here: move it away")
    try:
        for leftover in tmp.iterdir():                  # of a run that was killed
            leftover.unlink()
        yield tmp
    finally:
        shutil.rmtree(tmp, ignore_errors=True)
        lock.close()


# ---------------------------------------------------------------------------------------------------------------------
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


# ---------------------------------------------------------------------------------------------------------------------
# What grouping saves

# LLaVA's mix of 665,298: records by source, and what we take their turns and the ids of a question and of an answer to
# be like. The numbers of records are its authors'; the rest is assumed, only in order to have something to measure.
MIX = {     # folder, records, turns from-to, ids of a question, ids of an answer
    "LLaVA": ("coco/train2017", 157_712, (1, 5), 15, 60), "ShareGPT": (None, 40_688, (1, 6), 60, 300),
    "VQAv2": ("coco/train2017", 82_783, (1, 9), 8, 3), "GQA": ("gqa/images", 72_140, (1, 25), 10, 3),
    "OKVQA": ("coco/train2017", 8_998, (1, 1), 25, 3), "OCRVQA": ("ocr_vqa/images", 80_000, (3, 6), 12, 8),
    "A-OKVQA": ("coco/train2017", 66_160, (1, 2), 60, 3), "TextCaps": ("textvqa/train_images", 21_953, (1, 1), 60, 15),
    "RefCOCO": ("coco/train2017", 48_447, (1, 8), 30, 25), "VG": ("vg/VG_100K", 86_417, (5, 15), 30, 15)}
FRAME, PER_TURN = 35, 8         # ids of the system text; of USER:, ASSISTANT: and </s>


def mixture(seed: int = 0, scale: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """words (n,), pictures (n,) bool of a data set like MIX."""
    rng, words, pictures = np.random.default_rng(seed), [], []
    for folder, count, (low, high), question, answer in MIX.values():
        turns = rng.integers(low, high + 1, round(count * scale))
        said = rng.lognormal(0, 0.5, (len(turns), high)) * (question + answer) / math.exp(0.125) + PER_TURN
        words.append(FRAME + np.where(np.arange(high) < turns[:, None], said, 0).sum(1).astype(np.int64))
        pictures.append(np.full(len(turns), folder is not None))
    return np.concatenate(words), np.concatenate(pictures)


def padding(steps: Iterator[list], lengths: np.ndarray, ranks: int, micro: int) -> tuple[float, float]:
    """(padding, idle): the share of the computed positions that is padding; and the share of all processes' time, if
    it goes by positions, that is padding or waiting for the one with the widest micro-batch."""
    real = computed = waited = 0
    for rows in steps:
        of_step = lengths[rows]
        real += int(of_step.sum())
        shares = [[len(piece) * int(max(piece)) for piece in split(of_step[rank::ranks].tolist(), micro)]
                  for rank in range(ranks)]
        computed += sum(map(sum, shares))
        waited += ranks * sum(max(share[i] if i < len(share) else 0 for share in shares) for i in range(len(shares[0])))
    return 1 - real / computed, 1 - real / waited


def compare(args) -> None:
    """The table of `data.py padding`."""
    if args.lengths == "synthetic":
        words, pictures = mixture(args.seed)
        lengths = merged(words, np.where(pictures, FRAME, -1), args.picture_rows, args.max_length)
    else:
        folder = Path(args.lengths)
        if not (folder / "report.json").is_file():
            raise UserError(f"{folder}: not a prepared folder; give one, or `synthetic`")
        arrays = map_arrays(folder)
        words, pictures = words_of(arrays), arrays["at"] >= 0
        lengths = merged(words, arrays["at"], args.picture_rows, args.max_length)
    n, cut = len(lengths), int((lengths < words + np.where(pictures, args.picture_rows - 1, 0)).sum())
    print(f"{n:,} samples, {int((~pictures).sum()):,} without a picture; positions: mean {lengths.mean():.0f}, median "
          f"{np.median(lengths):.0f}, longest {lengths.max()}; {cut:,} cut to {args.max_length}")
    print(f"batches of {args.batch} on {args.ranks} processes, {args.micro} samples at a time:")
    for group in GROUPS:
        steps = order(n, math.ceil(n / args.batch), args.batch, args.seed, group, lengths, pictures)
        pad, idle = padding(steps, lengths, args.ranks, args.micro)
        print(f"  --group {group:16} padding {pad:6.1%}   padding or waiting {idle:6.1%}")


# ---------------------------------------------------------------------------------------------------------------------
# Commands

def add_commands(commands) -> None:
    """`prepare` and `padding` of data.py."""
    p = commands.add_parser("prepare", help="check and tokenise a json once, for train.py --data", description="Read a "
                            "json once: check its records and pictures, tokenise, and write a folder for train.py.")
    p.add_argument("--json", type=Path, metavar="FILE", required=True, help="records in LLaVA's format")
    p.add_argument("--images", type=Path, metavar="DIR", help="what the records' picture paths are relative to")
    p.add_argument("--out", type=Path, metavar="DIR", required=True, help="the folder to write")
    p.add_argument("--llm", type=Path, metavar="DIR", required=True, help="a language model's folder: its tokenizer")
    p.add_argument("--template", choices=TEMPLATES, default="v1", help="plain: stage 1; v1: stage 2, the default")
    p.add_argument("--decode", action="store_true", help="decode every picture to its end. Without it a picture is "
                   "opened, a PNG's checksums are compared, a JPEG is decoded only if it lacks its end, other formats "
                   "always. Cost: about 1.1 ms a JPEG of 640 x 480 and core instead of 0.15")
    p.add_argument("--workers", type=int, default=min(16, cores()),
                   help="processes that tokenise and look (default: one a core, 16 at most; 0: do it all in this one)")
    p.add_argument("--tolerate", type=float, default=0.01, metavar="SHARE",
                   help="of the records that may be left out (default: %(default)s)")
    p.set_defaults(run=lambda args: prepare(args.json, args.images, args.out, args.llm, args.template, args.decode,
                                            args.workers, args.tolerate, bar=sys.stderr.isatty()))
    p = commands.add_parser("padding", help="how much of a batch is padding, by --group", description="How much of "
                            "what a training computes is padding, for each --group of train.py.")
    p.add_argument("--lengths", metavar="DIR", default="synthetic", help="a prepared folder, or `synthetic`: as many "
                   "samples as LLaVA's mix has, of assumed lengths (the default)")
    for flag, default, text in (("batch", 128, "samples in a step"), ("ranks", 8, "processes"),
                                ("micro", 16, "samples of a process at a time"), ("seed", 42, "of the order"),
                                ("picture-rows", 576, "positions of a picture"), ("max-length", 2048, "positions")):
        p.add_argument(f"--{flag}", type=int, default=default, help=f"{text} (default: %(default)s)")
    p.set_defaults(run=compare)
