"""A disk that fails, or a process that dies, at one moment of a program's work with its files.

    python -m tests.attack.faults                 every fault at every event of a small training,
                                                  begun and gone on with: what is left behind?
    python -m tests.attack.faults --minutes 5     some of them, for so long
    FAULT=DIR:7:EIO python -m tests.attack.faults train.py --stage 2 --out DIR ...
                                                  one program of the root under one fault

Events are openings, writes, renames, removals, new folders, fsyncs and questions about names and
room, of files below one folder. safetensors writes its files in one event.
"""
import argparse
import builtins
import contextlib
import errno
import io
import os
import random
import runpy
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch
from PIL import Image

import train
from ccra import VLM, CCRAConfig
from clip import CLIPVision, CLIPVisionConfig
from core import common, weights
from core.tokenizer import Tokenizer
from llama import Llama, LlamaConfig
from toy.world import MODEL
from training import curve

# what can happen at an event; "+": from then on
CHANGES = ("ENOSPC", "EIO", "EACCES", "EROFS", "+ENOSPC", "+EIO", "+EROFS", "kill")
REMOVALS = ("EIO", "EACCES", "EROFS", "+EIO", "kill")
BYTES = ("ENOSPC", "EIO", "+ENOSPC", "kill")
HOWS = dict(open=CHANGES, mkdir=CHANGES, replace=CHANGES, rename=CHANGES, unlink=REMOVALS,
            remove=REMOVALS, rmdir=REMOVALS, write=BYTES, save_file=BYTES, fsync=BYTES,
            read=("EIO", "EACCES", "+EIO"), stat=("EIO", "EACCES"), disk_usage=("EIO", "+EIO"))


class Killed(BaseException):
    """In place of the end of the process: nothing catches it, and the disk no longer obeys."""


class Opened:
    """A file open for writing, whose every write is an event."""

    def __init__(self, file, faults: "Faults", path: str):
        self.file, self.faults, self.path = file, faults, path

    def __getattr__(self, name: str):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()

    def write(self, data):
        def half():
            self.file.write(data[:len(data) // 2])
            self.file.flush()

        self.faults.event("write", self.path, half)
        return self.file.write(data)


class Faults:
    """`with Faults(folder, at, how) as faults:` the at-th event below folder goes wrong.

    how: an errno's name, for that event; "+ENOSPC": and for all later ones; "kill": SIGKILL;
    "dead": Killed, for a test in its own process. at 0: none does. faults.events: what there was.
    """

    def __init__(self, folder: Path, at: int = 0, how: str = "EIO"):
        self.folder = str(Path(folder).absolute())
        self.at, self.how = at, how
        self.events: list[tuple[str, str]] = []
        self.inside = 0                                  # of rmtree, whose names are relative
        self.before = []

    # ----------------------------------------------------------------------------------------------
    # What happens at an event

    def below(self, path) -> bool:
        try:
            path = os.path.abspath(os.fspath(path))
        except TypeError:                                # a number of a file
            return False
        return path == self.folder or path.startswith(self.folder + os.sep)

    def event(self, name: str, path, half=None) -> None:
        """half: what has reached the disk of it when it fails."""
        self.events.append((name, str(path)))
        n, stays = len(self.events), self.how[:1] == "+" or self.how == "dead"
        if not self.at or n < self.at or n > self.at and not stays:
            return
        if half and n == self.at:
            half()
        if self.how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.how == "dead":
            raise Killed
        number = getattr(errno, self.how.lstrip("+"))
        raise OSError(number, os.strerror(number), str(path))

    # ----------------------------------------------------------------------------------------------
    # What stands in the place of the calls

    def wrap(self, owner, name: str) -> None:
        """A call that names a path first is an event."""
        real = getattr(owner, name)

        def call(path, *args, **more):
            if self.below(path) or self.inside and more.get("dir_fd") is not None:
                self.event(name, path)
            return real(path, *args, **more)

        self.put(owner, name, call)

    def put(self, owner, name: str, new) -> None:
        self.before.append((owner, name, getattr(owner, name)))
        setattr(owner, name, new)

    def __enter__(self) -> "Faults":
        for name in ("replace", "rename", "mkdir", "unlink", "remove", "rmdir", "stat"):
            self.wrap(os, name)
        self.wrap(shutil, "disk_usage")
        real_open, real_sync, real_tree = io.open, os.fsync, shutil.rmtree
        real_save = weights.save_file

        def opens(path, mode="r", *args, **more):
            writes = any(letter in mode for letter in "wax+")
            if not self.below(path):
                return real_open(path, mode, *args, **more)
            self.event("open" if writes else "read", path)
            file = real_open(path, mode, *args, **more)
            return Opened(file, self, str(path)) if writes else file

        def sync(file):
            number = file if isinstance(file, int) else file.fileno()
            path = os.readlink(f"/proc/self/fd/{number}")
            if self.below(path):
                self.event("fsync", path)
            real_sync(number)

        def tree(path, *args, **more):
            self.inside += self.below(path)
            try:
                real_tree(path, *args, **more)
            finally:
                self.inside = 0

        def save(tensors, path, *args, **more):
            def half():
                real_save(tensors, path, *args, **more)
                os.truncate(path, os.path.getsize(path) // 2)

            if self.below(path):
                self.event("save_file", path, half)
            real_save(tensors, path, *args, **more)

        for owner, name, new in ((io, "open", opens), (builtins, "open", opens),
                                 (os, "fsync", sync), (shutil, "rmtree", tree),
                                 (weights, "save_file", save)):
            self.put(owner, name, new)
        return self

    def __exit__(self, *_) -> None:
        for owner, name, real in reversed(self.before):
            setattr(owner, name, real)


# --------------------------------------------------------------------------------------------------
# A small training, and what has to be true of what it leaves

def tiny_model(folder: Path) -> Path:
    """A model that stage 2 can begin with."""
    torch.manual_seed(0)
    tokenizer = Tokenizer.from_pretrained(MODEL)
    vision = CLIPVisionConfig(image_size=32, patch_size=16, hidden_size=16, intermediate_size=32,
                              num_hidden_layers=2, num_attention_heads=2)
    llm = LlamaConfig(vocab_size=tokenizer.vocab_size, hidden_size=16, intermediate_size=16,
                      num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
                      max_position_embeddings=256, tie_word_embeddings=True, bos_token_id=1,
                      eos_token_id=2)
    fuser = CCRAConfig(text_dim=16, vision_dim=16, n_layers=2, d_hidden=8)
    tower, llama = CLIPVision(vision), Llama(llm)
    llama.init_weights()
    for p in tower.parameters():
        torch.nn.init.normal_(p, std=0.1)
    VLM.build(tower, llama, fuser).save_pretrained(folder, tokenizer_file=tokenizer.file)
    return folder


def flags(model: Path, out: Path, *more: str) -> list[str]:
    """Three steps, with a checkpoint after each."""
    return ["--stage", "2", "--model", str(model), "--out", str(out), "--batch", "2", "--steps",
            "3", "--save-every", "1", "--keep", "2", "--workers", "0", "--threads", "1",
            "--device", "cpu", "--dtype", "float32", *more]


def traces(out: Path) -> dict[str, bytes]:
    """What two trainings with the same end have to have in common: the model, the numbers in the
    log, the checkpoints; and nothing half-written."""
    found = {}
    for path in sorted(out.rglob("*")):
        name = str(path.relative_to(out))
        if path.is_dir() or name in (".lock", "loss.png"):        # loss.png holds the folder's name
            continue
        found[name] = path.read_bytes()
        if name == "log.csv":
            rows = found[name].decode().splitlines()
            found[name] = "\n".join(",".join(row.split(",")[:4]) for row in rows).encode()
    return found


def differences(out: Path, whole: dict[str, bytes]) -> list[str]:
    """The files by which a folder differs from what it should be."""
    left = traces(out)
    return sorted(name for name in left.keys() | whole.keys()
                  if left.get(name) != whole.get(name))


# --------------------------------------------------------------------------------------------------
# Each fault in a process of its own

def child(words: list[str], folder: Path, at: int, how: str, said: Path) -> tuple[int, list[str]]:
    """(exit status, names of events) of a training under a fault; minus the signal that ended it.
    What it says is in a file. A forked process: to import torch takes longer than to train."""
    listing = said.with_suffix(".events")
    process = os.fork()
    if not process:
        status = 70
        try:
            file = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(file, 1)
            os.dup2(file, 2)
            with Faults(folder, at, how) as faults:
                try:
                    common.run(lambda: train.main(words))
                    status = 0
                except SystemExit as e:
                    status = e.code
            listing.write_text("\n".join(name for name, _ in faults.events))
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            os._exit(status)
    _, status = os.waitpid(process, 0)
    events = listing.read_text().splitlines() if listing.exists() else []
    return os.waitstatus_to_exitcode(status), events


def complaints(status: int, how: str, said: str) -> list[str]:
    """What a training under a fault may not do: anything but end well, say one line, or be
    killed."""
    found = [word for word in ("Traceback", "Exception ignored") if word in said]
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    if status == 2 and len(errors) != 1 or status == 0 and errors:
        found.append(f"{len(errors)} lines of errors, status {status}")
    if status not in (0, 2) and not (how == "kill" and status == -signal.SIGKILL):
        found.append(f"status {status}")
    return found


def attempt(place: Path, model: Path, whole: dict[str, bytes], first: bool, at: int,
            how: str) -> list[str]:
    """One fault, in a training that begins (first) or goes on after step 2; then the same command
    without a fault. What went wrong."""
    out, said = place / "out", place / "said"
    shutil.rmtree(out, ignore_errors=True)
    if not first:
        shutil.copytree(place / "after-2", out)
    status, _ = child(flags(model, out), out, at, how, said)
    text = said.read_text(errors="replace")
    found = complaints(status, how, text)
    if status == 0 and (wrong := differences(out, whole)):
        explained = "warning: " in text and all(".tmp" in n or "step-" in n for n in wrong)
        found += [] if explained else [f"said to be well, but differs: {wrong[:3]}"]
    status, _ = child(flags(model, out), out, 0, how, said)
    if status or (wrong := differences(out, whole)):
        again = said.read_text(errors="replace").strip().splitlines()[-1:]
        found.append(f"afterwards: status {status}, {again if status else wrong[:3]}")
    if found:
        (place / f"failed-{'first' if first else 'second'}-{at}-{how}.txt").write_text(text)
    return found


def prepare(place: Path) -> tuple[Path, dict[str, bytes], list[tuple[bool, int, str]]]:
    """The model, what an undisturbed training leaves, and all faults that there can be: (whether in
    the training that begins, number of the event, how)."""
    curve.plot = no_plot
    model = tiny_model(place / "model")
    for name, more in (("whole", ()), ("after-2", ("--stop-after", "2"))):
        status, events = child(flags(model, place / name, *more), place / name, 0, "",
                               place / "said")
        assert status == 0, (place / "said").read_text()
        if name == "whole":
            first = events
    shutil.copytree(place / "after-2", place / "out")
    _, second = child(flags(model, place / "out"), place / "out", 0, "", place / "said")
    faults = [(begins, i, how) for begins, names in ((True, first), (False, second))
              for i, name in enumerate(names, 1) for how in HOWS[name]]
    return model, traces(place / "whole"), faults


def no_plot(*_) -> Image.Image:
    """In place of the picture of the losses, which takes half of so small a training's time."""
    return Image.new("RGB", (8, 8))


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--minutes", type=float, default=0, help="default: until all were tried")
    p.add_argument("--seed", type=int, default=0, help="of their order")
    p.add_argument("--keep", type=Path, help="a folder for what failed")
    args = p.parse_args()
    torch.set_num_threads(1)
    place = args.keep or Path(tempfile.mkdtemp())
    place.mkdir(parents=True, exist_ok=True)
    model, whole, todo = prepare(place)
    if args.minutes:
        random.Random(args.seed).shuffle(todo)
    ends, tried, wrong = time.monotonic() + 60 * args.minutes, Counter(), 0
    for first, at, how in todo:
        if args.minutes and time.monotonic() > ends:
            break
        tried[how.lstrip("+")] += 1
        if found := attempt(place, model, whole, first, at, how):
            wrong += 1
            print(f"{'begun' if first else 'gone on'}, event {at}, {how}: {'; '.join(found)}",
                  flush=True)
    print(f"{tried.total()} of {len(todo)} faults tried "
          f"({', '.join(f'{n} {how}' for how, n in tried.items())}); {wrong} ended badly")
    if args.keep is None:
        shutil.rmtree(place)
    sys.exit(1 if wrong else 0)


def one_program(fault: str, program: str, words: list[str]) -> None:
    """A program of the root under one fault: FAULT=FOLDER:AT:HOW."""
    folder, at, how = fault.rsplit(":", 2)
    sys.argv = [program, *words]
    with Faults(Path(folder), int(at), how), contextlib.suppress(Killed):
        runpy.run_path(str(common.ROOT / program), run_name="__main__")


if __name__ == "__main__":
    if "FAULT" in os.environ:
        one_program(os.environ["FAULT"], sys.argv[1], sys.argv[2:])
    else:
        main()
