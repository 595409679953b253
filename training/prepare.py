"""LLaVA's json at its real size: all of it checked and tokenised once, training from mapped arrays.

`data.load` keeps a json in memory and tokenises a record whenever it is wanted. That is fine for
thousands of records. LLaVA's 665,298 are better read once, ahead, by all cores:

    python data.py prepare --json llava_v1_5_mix665k.json --images playground/data \
        --llm vicuna-7b-v1.5 --out data/mix665k
    python train.py --stage 2 --data data/mix665k

What the folder holds: training/prepared.py. Lengths are known then, so samples of like length can
be put together: training/order.py.
"""
import math
import os
import shutil
import sys
import time
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from tqdm import tqdm

from core import flags
from core.common import (
    Lock,
    UserError,
    cores,
    discard,
    make_folder,
    sync,
    write_json,
)
from core.records import read_records
from data import TEMPLATES
from training.before import USUAL, Cut
from training.prepared import (
    FLAT,
    FORMAT,
    RAGGED,
    check_bytes,
    read_report,
    sha256_of,
    tokenizer_id,
)
from training.reading import Job, Row, in_order, jobs, readers, tokenizer_of

BINS = (64, 128, 256, 512, 1024, 2048, 4096)             # of the histogram of lengths


class Column:
    """A ragged array on its way to disk."""

    def __init__(self, folder: Path, name: str):
        self.shape, self.dtype = RAGGED[name]
        self.folder, self.name = folder, name
        self.offsets = array("q", [0])
        self.row_bytes = np.dtype(self.dtype).itemsize * math.prod(self.shape)
        self.file = open(folder / f"{name}.npy", "wb")
        self._head()

    def _head(self) -> None:            # numpy leaves room in it for the number of rows to grow
        header = dict(shape=(self.offsets[-1], *self.shape), fortran_order=False,
                      descr=np.lib.format.dtype_to_descr(np.dtype(self.dtype)))
        np.lib.format.write_array_header_1_0(self.file, header)

    def add(self, rows: bytes) -> None:
        """A sample's rows."""
        self.file.write(rows)
        self.offsets.append(self.offsets[-1] + len(rows) // self.row_bytes)

    def close(self) -> None:
        self.file.seek(0)
        self._head()
        self.file.close()
        np.save(self.folder / f"{self.name}.offsets.npy", np.array(self.offsets, dtype=np.int64))


class Report:
    """What goes into report.json: counts, by source and by reason for leaving a record out."""

    def __init__(self):
        self.records = self.pictures = 0
        self.sources, self.left_out, self.odd = {}, {}, {}
        self.cut = Cut()
        self.lengths = {True: [], False: []}             # of samples with a picture, and without

    def count(self, row: Row, words: int | None, picture: bool) -> None:
        """words: ids of the row, its picture being one; None if it was left out."""
        self.records += 1
        new = dict(records=0, kept=0, ids=0, supervised=0)
        of_source = self.sources.setdefault(row.source, new)
        of_source["records"] += 1
        if words is None:
            text = f"{row.name}: {row.message}" if row.message else row.name
            self.example(self.left_out, row.reason, text)
        else:
            of_source["kept"] += 1
            of_source["ids"] += words
            of_source["supervised"] += row.learnt
            self.cut.count(row.learnt, row.left)
            self.lengths[picture].append(words)

    @staticmethod
    def example(table: dict, reason: str, text: str) -> None:
        entry = table.setdefault(reason, dict(count=0, examples=[]))
        entry["count"] += 1
        if len(entry["examples"]) < 5:
            entry["examples"].append(text)

    @property
    def kept(self) -> int:
        return sum(map(len, self.lengths.values()))

    def reasons(self) -> str:
        return "; ".join(f"{entry['count']} {reason} (first: {entry['examples'][0]})"
                         for reason, entry in self.left_out.items())

    def to_dict(self) -> dict:
        lengths = {"what": "ids of a sample, its picture counted as one"}
        for picture, those in self.lengths.items():
            if those:
                counts, _ = np.histogram(those, bins=(0, *BINS, np.inf))
                lengths["with picture" if picture else "text only"] = dict(
                    samples=len(those), mean=round(float(np.mean(those)), 1),
                    median=float(np.median(those)), p95=float(np.percentile(those, 95)),
                    longest=max(those),
                    histogram={f"below {top}": int(n) for top, n in zip((*BINS, "inf"), counts)})
        return dict(pictures=self.pictures, records=self.records, kept=self.kept,
                    left_out=self.left_out, sources=self.sources, lengths=lengths,
                    odd_pictures=self.odd, cut=self.cut.to_dict())

    def say(self, say: Callable) -> None:
        for what, counts in self.sources.items():
            say(f"  {what:18} {counts['kept']:9,} of {counts['records']:9,}")
        if self.left_out:
            say(f"left out: {self.reasons()}")
        if line := self.cut.line(*USUAL):
            say(f"warning: {line}")
        if self.odd:
            say("read all the same: " + ", ".join(f"{entry['count']} {odd}"
                                                  for odd, entry in self.odd.items()))


# --------------------------------------------------------------------------------------------------
# The folder, whole or not at all

def prepare(json_path: str | Path, images: str | Path | None, out: str | Path, llm: str | Path,
            template: str = "v1", decode: bool = False, workers: int = 0, tolerate: float = 0.01,
            say: Callable = print) -> None:
    """Write the folder `out`, which appears when it is complete.

    A record that can't be used is left out and reported; if those are more than the share
    `tolerate`, something is wrong with the inputs, and it is a UserError. So is an `out` made from
    other inputs; one made from these is left as it is. workers: processes besides this one, or 0.
    """
    file, out = Path(json_path), Path(out)
    images = None if images is None else Path(images)
    if images is not None and not images.is_dir():
        raise UserError(f"{images}: no such folder (the one that the json's picture paths start "
                        "from)")
    if not file.is_file():
        raise UserError(f"can't read {file}: no such file")
    inputs = dict(format=FORMAT, template=template, json=dict(bytes=file.stat().st_size),
                  decode=decode, images=None if images is None else str(images.resolve()),
                  tokenizer=tokenizer_id(tokenizer_of(Path(llm))))
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        return already(out, file, inputs, say)
    began = time.perf_counter()
    with workplace(out) as tmp:
        # disable=None: no bar where nobody watches, that is, if stderr isn't a terminal
        with (readers(workers) as pool,
              tqdm(desc=f"reading {file.name}", unit=" records", disable=None) as bar):
            records, inputs["json"]["sha256"] = read_records(file, images)
            bar.reset(total=len(records))
            todo = jobs(records, Path(llm), template, images, decode)
            report = fill(tmp, in_order(todo, pool, 4 * workers), bar)
        if report.kept == 0:
            raise UserError(f"{file}: not one record can be learnt from: {report.reasons()}")
        if report.records - report.kept > tolerate * report.records:
            raise UserError(f"{file}: {report.records - report.kept} of {report.records} records "
                            f"would be left out, more than --tolerate {tolerate}: "
                            f"{report.reasons()}")
        seconds = round(time.perf_counter() - began, 1)
        arrays = {path.name: sha256_of(path) for path in sorted(tmp.glob("*.npy"))}
        write_json(tmp / "report.json", dict(inputs=inputs, file=str(file), seconds=seconds,
                                             **report.to_dict(), arrays=arrays))
    say(f"{out}: {report.kept:,} of {report.records:,} records, {report.pictures:,} pictures, "
        f"in {seconds:,} s")
    report.say(say)


def fill(folder: Path, results: Iterator[tuple[Job, tuple]], bar: tqdm) -> Report:
    """Write the arrays, of jobs with what `reading.digest` made of them."""
    report = Report()
    columns = {name: Column(folder, name) for name in RAGGED}
    flat = {name: array("i") for name in FLAT}
    faults = []                                          # of every picture: (reason, message)
    for job, (rows, looks) in results:
        for look in looks:
            faults.append((look.reason, look.message))
            columns["paths"].add(look.path.encode(errors="surrogatepass"))
            for odd in look.odd:
                report.example(report.odd, odd, look.path)
        for row, picture in zip(rows, job.picture):
            if row.reason is None and picture >= 0:
                row.reason, row.message = faults[picture]
            if row.reason is not None:
                report.count(row, None, picture >= 0)
                continue
            tokens, turns, at = row.packed
            columns["tokens"].add(tokens)
            columns["turns"].add(turns)
            columns["names"].add(row.name.encode(errors="surrogatepass"))
            flat["picture"].append(picture)
            flat["at"].append(at)
            words = int.from_bytes(turns[-4:], sys.byteorder)        # where the last answer ends
            report.count(row, words, picture >= 0)
        bar.set_postfix(left_out=report.records - report.kept, refresh=False)
        bar.update(len(rows))
    for column in columns.values():
        column.close()
    for name, values in flat.items():
        np.save(folder / f"{name}.npy", np.array(values, dtype=np.int32))
    report.pictures = len(faults)
    return report


def already(out: Path, file: Path, inputs: dict, say: Callable) -> None:
    """There is something at `out`: fine if it was made from the same inputs."""
    if not (out / "report.json").is_file():
        raise UserError(f"{out}: is there and isn't a prepared folder; choose another --out")
    report = read_report(out)
    before = report["inputs"]
    inputs["json"]["sha256"] = sha256_of(file)
    for key, value in inputs.items():
        if before.get(key) != value:
            raise UserError(f"{out}: was prepared from another {key} ({before.get(key)}, now "
                            f"{value}); choose another --out, or remove that folder")
    check_bytes(out, report)
    say(f"{out} is already prepared from these very inputs; nothing to do")


@contextmanager
def workplace(out: Path) -> Iterator[Path]:
    """A folder beside `out`, for this process alone, that becomes `out` in the end. After an error
    it is removed."""
    tmp = out.with_name(out.name + ".tmp")
    make_folder(tmp)
    try:
        lock = Lock(tmp)
    except (BlockingIOError, FileNotFoundError):         # the latter: it was renamed just now
        raise UserError(f"{tmp}: another process is preparing this folder") from None
    except OSError as e:
        raise UserError(f"{tmp}: cannot write there ({e.strerror}); choose another --out") from e
    with lock:
        foreign = [path.name for path in tmp.iterdir() if path.suffix != ".npy"
                   and not path.name.startswith(("report.json", ".lock"))]
        if foreign:
            raise UserError(f"{tmp}: would be emptied, but holds {min(foreign)!r}, which isn't "
                            "from here: move it away")
        try:
            for leftover in tmp.iterdir():               # of a run that was killed
                if leftover.name != ".lock":
                    leftover.unlink()
            yield tmp
            for path in (*tmp.iterdir(), tmp):
                sync(path)
            os.rename(tmp, out)
            sync(out.parent)
        except OSError as e:
            shutil.rmtree(tmp, ignore_errors=True)
            raise UserError(f"{e.filename or tmp}: cannot go on ({e.strerror or e}); mend that, or "
                            "choose another --out") from e
        except BaseException:
            shutil.rmtree(tmp, ignore_errors=True)
            raise
        discard(out / ".lock")


def main(argv: list[str]) -> None:
    """`python data.py prepare ...`"""
    p = flags.Parser(
        prog="data.py prepare", description="Read a json once: check its records and pictures, "
        "tokenise, and write a folder for train.py --data.")
    p.add_argument("--json", type=Path, metavar="FILE", required=True,
                   help="records in LLaVA's format")
    p.add_argument("--images", type=Path, metavar="DIR",
                   help="what the records' picture paths are relative to")
    p.add_argument("--out", type=Path, metavar="DIR", required=True, help="the folder to write")
    p.add_argument("--llm", type=Path, metavar="DIR", required=True,
                   help="a language model's folder: its tokenizer")
    p.add_argument("--template", choices=TEMPLATES, default="v1",
                   help="plain: stage 1; v1: stage 2, the default")
    p.add_argument("--decode", action="store_true", help="decode every picture to its end. Without "
                   "it a picture is opened, a PNG's checksums are compared, a JPEG is decoded only "
                   "if it lacks its end, other formats always. Cost: about 1.1 ms a JPEG of "
                   "640 x 480 and core instead of 0.15")
    p.add_argument("--workers", type=flags.workers, default=min(16, cores()),
                   help="processes that tokenise and look (default: one a core, 16 at most; 0: do "
                   "it all in this one)")
    p.add_argument("--tolerate", type=flags.share, default=0.01, metavar="SHARE",
                   help="of the records that may be left out (default: %(default)s)")
    args = p.parse_args(argv)
    prepare(args.json, args.images, args.out, args.llm, args.template, args.decode, args.workers,
            args.tolerate)
