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
together (`order.order`); what that saves, `python data.py padding` measures.
"""
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
from array import array
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

import data
from clip import open_image
from core.common import Lock, UserError, cores, read_json, write_beside
from core.tokenizer import Tokenizer
from data import IGNORE, TEMPLATES
from training.padding import compare
from training.prepared import FLAT, FORMAT, RAGGED, pack, tokenizer_id

OTHER_NAMES = (".jpg", ".jpeg", ".png", ".gif", ".webp")     # what a picture that isn't there may be called instead
BINS = (64, 128, 256, 512, 1024, 2048, 4096)                 # of the histogram of lengths


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


# --------------------------------------------------------------------------------------------------
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


# --------------------------------------------------------------------------------------------------
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
        (tmp / ".lock").unlink()
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


@contextmanager
def workplace(out: Path) -> Iterator[Path]:
    """A folder beside `out` for this process alone. If it is still there in the end, it is removed."""
    tmp = out.with_name(out.name + ".tmp")
    tmp.mkdir(parents=True, exist_ok=True)
    try:
        lock = Lock(tmp)
    except (BlockingIOError, FileNotFoundError):        # the latter: it was renamed just now
        raise UserError(f"{tmp}: another process is preparing this folder") from None
    if foreign := [p.name for p in tmp.iterdir()
                   if p.suffix != ".npy" and not p.name.startswith(("report.json", ".lock"))]:
        raise UserError(f"{tmp}: would be emptied, but holds {min(foreign)!r}, which isn't from here: move it away")
    try:
        for leftover in tmp.iterdir():                  # of a run that was killed
            if leftover.name != ".lock":
                leftover.unlink()
        yield tmp
    finally:
        shutil.rmtree(tmp, ignore_errors=True)
        lock.close()


# --------------------------------------------------------------------------------------------------
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
