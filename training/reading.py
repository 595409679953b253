"""What the processes of `data.py prepare` do: records become rows, and pictures are looked at.

`jobs` cuts the json into pieces, `in_order` has them done by `readers` and hands the results out in
the order of the records.
"""
import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from PIL import Image

import data
from core.common import UserError
from core.pictures import inspect, is_address, label
from core.records import check, inside, lacks, name
from core.tokenizer import Tokenizer
from training.before import USUAL, learnt
from training.prepared import pack

CHUNK = 256                # records in a job
# what a picture that isn't there may be called instead
OTHER_NAMES = (".jpg", ".jpeg", ".png", ".gif", ".webp")

tokenizer_of = cache(Tokenizer.from_pretrained)          # one per process


@dataclass
class Job:
    """Some consecutive records, and the pictures that are named there for the first time."""
    llm: Path
    template: str
    images: Path | None
    decode: bool
    first: int             # number of the first record
    records: list
    picture: list[int]     # for each record, the number of its picture, -1 for none
    paths: list[str]


@dataclass
class Row:
    """A record, tokenised; or the reason why it is left out, with a message."""
    name: str
    source: str
    reason: str | None = None
    message: str = ""
    packed: tuple | None = None
    learnt: int = 0        # supervised tokens
    left: int = 0          # those within before.USUAL


@dataclass
class Look:
    """A picture, looked at: where it was found, and what is odd about a file that can be read: it
    isn't what its name says, or isn't shown as it is stored (core/pictures.py); or the reason why
    it is of no use, with a message."""
    path: str
    odd: list[str] = field(default_factory=list)
    reason: str | None = None
    message: str = ""


def jobs(records: list, llm: Path, template: str, images: Path | None,
         decode: bool) -> Iterator[Job]:
    """The json in pieces. Pictures get their numbers here, in the order of the records."""
    numbers = {}                                         # path -> number
    for first in range(0, len(records), CHUNK):
        piece = records[first:first + CHUNK]
        picture, paths = [], []
        for record in piece:
            path = picture_of(record)
            if path is not None and path not in numbers:
                numbers[path] = len(numbers)
                paths.append(path)
            picture.append(numbers.get(path, -1))
        if paths and images is None:
            raise UserError(f"records have pictures (first: {paths[0]!r}): say where they are "
                            "(--images DIR)")
        yield Job(llm, template, images, decode, first, piece, picture, paths)


@contextmanager
def readers(workers: int) -> Iterator[ProcessPoolExecutor | None]:
    """Processes for `in_order`; None for no workers. To be started before the json is read: a
    process forked from one that holds it would soon hold a gigabyte of it, too, since each garbage
    collection writes to all objects."""
    if workers == 0:
        yield None
        return
    pool = ProcessPoolExecutor(workers, initializer=follow, initargs=(os.getpid(),))
    try:
        pool.submit(os.getpid)                           # forks are all made at the first job
        yield pool
    except BrokenProcessPool:
        raise UserError("a reading process was killed (out of memory?); fewer --workers take "
                        "less") from None
    finally:
        pool.shutdown(cancel_futures=True)


def in_order(todo: Iterator[Job], pool: ProcessPoolExecutor | None,
             ahead: int) -> Iterator[tuple[Job, tuple]]:
    """Every job with what `digest` makes of it, in order, from the pool's processes (None: this
    one). Only `ahead` jobs are under way at any time, so results don't pile up."""
    if pool is None:
        yield from ((job, digest(job)) for job in todo)
        return
    waiting = deque()
    for job in todo:
        waiting.append((job, pool.submit(digest, job)))
        if len(waiting) > ahead:
            done, result = waiting.popleft()
            yield done, result.result()
    yield from ((job, result.result()) for job, result in waiting)


def follow(parent: int) -> None:
    """Ctrl-C is the parent's affair. When it is gone, however it ended, this process goes: nobody
    else would end it."""
    if multiprocessing.get_start_method() == "forkserver":       # then it is a server's child
        parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=watch, daemon=True).start()


def digest(job: Job) -> tuple[list[Row], list[Look]]:
    """A job done: a row for each of its records, a look at each of its pictures."""
    tokenizer = tokenizer_of(job.llm)
    rows = [read(record, f"record {job.first + i}", job.template, tokenizer)
            for i, record in enumerate(job.records)]
    return rows, [look(job.images, path, job.decode) for path in job.paths]


# --------------------------------------------------------------------------------------------------
# A record

def read(record: dict, where: str, template: str, tokenizer: Tokenizer) -> Row:
    """The record, checked and tokenised as by `data.load`; its picture isn't looked at."""
    row = Row(name(record, where), source(record))
    try:
        turns, picture = check(record, where, template)
        row.reason = lacks(turns, picture)
        if row.reason is None:
            sample = data.write(turns, picture, tokenizer, template)
            row.packed = pack(sample)
            row.learnt, row.left = learnt(sample, *USUAL)
    except UserError as e:
        row.reason = "not LLaVA's format"
        row.message = str(e).removeprefix(row.name + ": ")
    return row


def picture_of(record: dict) -> str | None:
    """The path that a record gives, if it is one."""
    path = record.get("image") if isinstance(record, dict) else None
    return path if isinstance(path, str) and path and inside(path) else None


def source(record: dict) -> str:
    """Where a record comes from, as far as its picture's path tells."""
    path = picture_of(record)
    if path is None:
        return "text only"
    folder, _, rest = os.path.normpath(path).partition("/")
    if not rest:
        return "no folder"
    return "numbered folders" if folder.isdecimal() else folder


# --------------------------------------------------------------------------------------------------
# A picture

def look(root: Path, path: str, decode: bool) -> Look:
    """Whether a picture is there and can be read.

    Without `decode` that takes 0.1 to 0.2 ms for a JPEG of 640 x 480, and finds one that was cut,
    but not one that is wrong in the middle; with it 1.0 to 1.3 ms (2.2 ms or more to decode it in
    full; bench/big.py, one core of an EPYC).
    Pillow goes by what is in a file, so a GIF called .jpg is no harm. One that is called .gif where
    the json says .jpg isn't found by that name: OCR-VQA's downloader saves some like this. Both are
    counted.
    """
    there = find(root, path)
    if there is None:
        why = "is a web address; download it first" if is_address(path) else "no such image"
        return Look(path, reason="its picture is missing", message=f"{why}: {path!r}")
    file = root / os.path.normpath(there)
    try:
        kind, odd = inspect(file, decode)
    except UserError as e:
        why = str(e).removeprefix(f"{label(file)}: ").removeprefix("cannot be read as an image ")
        return Look(path, reason="its picture can't be read", message=f"{path!r}: {why}")
    if there != path:
        odd.append(f"called {file.suffix} instead of {os.path.splitext(path)[1]}")
    elif kind != Image.registered_extensions().get(file.suffix.lower()):
        odd.append(f"{kind} called {file.suffix}")
    return Look(there, odd)


def find(root: Path, path: str) -> str | None:
    """The path, or the same with another ending, if there is just one such file."""
    stem, last = os.path.splitext(os.path.normpath(path))
    if os.path.isfile(root / (stem + last)):
        return path
    others = [stem + ending for ending in OTHER_NAMES
              if ending != last and os.path.isfile(root / (stem + ending))]
    return others[0] if len(others) == 1 else None
