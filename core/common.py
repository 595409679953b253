"""What every program here needs, with or without torch: the error for users, JSON, atomic writes,
locks."""
import errno
import json
import os
import re
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from core import streams

try:
    import fcntl
except ImportError:                 # Windows has no such locks: there two runs can meet in a folder
    fcntl = None

ROOT = Path(__file__).resolve().parent.parent        # of the repository
streams.quiet_start(ROOT)


class UserError(Exception):
    """Something the user can put right. One line that names the thing and says what to do; a second
    argument is a second line. It stays one line whatever a name in it holds."""
    said = False                        # whether another process of a torchrun says it

    def __str__(self) -> str:
        return "\n".join(one_line(str(line)) for line in self.args)


def one_line(text: str, most: int = 2000) -> str:
    """A text with its line breaks and other control characters escaped, its middle left out where
    it is longer than anybody reads."""
    text = re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]", lambda c: repr(c[0])[1:-1], text)
    return text if len(text) <= most else f"{text[:most // 2]} ... {text[-most // 2:]}"


def run(main: Callable[[], None], kept: str = "") -> None:
    """Run a program's main(). A UserError, or the loss of another process of the same run, becomes
    `error: ...` on stderr and exit status 2, Ctrl-C a line and 130; what becomes of stdout and
    stderr says core/streams.py.

    kept: for a program whose work is kept in files, what becomes of it when it is interrupted. Such
    a program goes on when nobody reads what it prints.
    """
    with streams.guarded(goes_on=bool(kept)):
        streams.loud()
        try:
            main()
        except UserError as e:
            wait_for_first()
            if not e.said:
                print(f"error: {visible(str(e))}", file=sys.stderr)
            sys.exit(2)
        except RuntimeError as e:
            if not left_alone(e):
                raise
            wait_for_first()
            print("error: another process of this run is gone (killed, out of memory?), so this "
                  f"one can't go on{kept and '; '}{kept}", file=sys.stderr)
            sys.exit(2)
        except KeyboardInterrupt:
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGINT, signal.SIG_DFL)      # a second one ends all, quietly
            if rank() == 0:
                print(f"\ninterrupted{kept and '; '}{kept}", file=sys.stderr)
            sys.exit(130)


def rank() -> int:
    """Which of torchrun's processes this is; 0 without it."""
    return int(os.environ.get("RANK", "0"))


def left_alone(error: RuntimeError) -> bool:
    """Whether this is what gloo or NCCL say when another process of the group has died."""
    lost = ("Connection reset by peer", "Connection closed by peer", "Broken pipe", "Timed out")
    by_gloo = "gloo" in str(error) and any(word in str(error) for word in lost)
    return by_gloo or type(error).__name__ == "DistBackendError"


def wait_for_first() -> None:
    """What all processes of a torchrun find wrong, the first one says: then torchrun ends the
    others, before they come out of here. What another one finds alone, that one says."""
    if rank() > 0:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(2 + min(rank(), 64) / 2)


def visible(text: str) -> str:
    """Control characters as their escapes: a terminal shall not obey them."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode()
                   for c in text)


def cores() -> int:
    """How many processor cores this process may use."""
    if hasattr(os, "sched_getaffinity"):             # not on a Mac
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def split(rows: list, size: int) -> list[list]:
    """Pieces of `size`, in order; the last may be shorter."""
    return [rows[i:i + size] for i in range(0, len(rows), size)]


# --------------------------------------------------------------------------------------------------
# JSON

DEPTH = 100              # of lists and objects within each other: more is no file of anybody's


def deep(content, most: int = DEPTH) -> bool:
    """Whether a JSON value is nested deeper than this."""
    level = [content] if isinstance(content, dict | list) else []
    while level and most:
        inner = (item.values() if isinstance(item, dict) else item for item in level)
        level = [item for items in inner for item in items if isinstance(item, dict | list)]
        most -= 1
    return bool(level)


def read_json(path: Path, kind: type = dict, what: str = "", unique: bool = True,
              most: int = 2 ** 32):
    """A file's JSON value, of this kind. A byte-order mark is taken.

    what: the file's name for people, for messages. unique: a key that is given twice is an error.
    most: bytes. UserError if the file is absent, unreadable, too large, not JSON, nested too deeply
    or of another kind.
    """
    def once(pairs):
        seen = dict(pairs)
        if len(seen) < len(pairs):                   # json would quietly keep the last one
            names = [key for key, _ in pairs]
            twice = next(key for key in names if names.count(key) > 1)
            raise UserError(f"{path}: {twice!r} is given twice")
        return seen

    try:
        if path.stat().st_size > most:
            raise UserError(f"{path}: has {path.stat().st_size:,} bytes, more than such a file can "
                            "have; is it another one?")
        content = json.loads(path.read_bytes(), object_pairs_hook=once if unique else None)
    except OSError as e:
        should = f"; it should be {what}" if what else ""
        raise UserError(f"{path}: cannot read it ({e.strerror}){should}") from e
    except (ValueError, RecursionError) as e:        # UnicodeDecodeError is a ValueError, too
        raise UserError(f"{path}: not valid JSON ({e})") from e
    if deep(content):
        raise UserError(f"{path}: lists and objects in more than {DEPTH} levels")
    if not isinstance(content, kind):
        should = what or f"a JSON {'object' if kind is dict else 'list'}"
        raise UserError(f"{path}: expected {should}, found {type(content).__name__}")
    return content


# --------------------------------------------------------------------------------------------------
# Writing

def write_beside(path: Path, write: Callable[[Path], None]) -> None:
    """Write NAME.tmp, then rename it to NAME: a reader finds the old file or the new one, whole,
    even after a crash or a power cut. UserError if it can't be written."""
    tmp = path.with_name(path.name + ".tmp")
    try:
        write(tmp)
        sync(tmp)
        os.replace(tmp, path)
        sync(path.parent)
    except OSError as e:
        raise UserError(f"{path}: cannot write it ({e.strerror or e})") from e
    finally:
        with suppress(OSError):                      # which would hide the cause
            tmp.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Until the disk itself has what was written to a file, or which names are in a folder.
    OSError if it can't."""
    if path.is_dir() and os.name == "nt":            # Windows opens no folders
        return
    file = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(file)
    except OSError as e:
        if e.errno not in (errno.EINVAL, errno.ENOTSUP):           # some file systems lack it
            raise
    finally:
        os.close(file)


def make_folder(path: str | Path, flag: str = "--out") -> Path:
    """A folder that can be written to, made if it isn't there. flag: of the command line, by which
    it was chosen. UserError if it can't be."""
    path, why = Path(path), ""
    try:
        path.mkdir(parents=True, exist_ok=True)
        if not os.access(path, os.W_OK | os.X_OK):
            why = "nothing can be written there: no permission, or a read-only disk"
    except FileExistsError:
        why = "is a link that leads nowhere" if path.is_symlink() else "is a file"
    except OSError as e:
        why = f"cannot make this folder ({e.strerror or e})"
    if why:
        raise UserError(f"{flag} {path}: {why}; choose a folder that can be written to".lstrip())
    return path


def discard(path: Path) -> None:
    """Remove a file, if it is there. UserError if it stays."""
    try:
        path.unlink(missing_ok=True)
    except OSError as e:
        raise UserError(f"{path}: cannot remove it ({e.strerror or e})") from e


def clear_tmp(folder: Path, *names: str) -> None:
    """Remove what a kill left of writing these files; names: as shell patterns. For who alone
    writes to the folder."""
    for name in names:
        with suppress(OSError):
            for path in folder.glob(f"{name}.tmp"):
                path.unlink()


def write_text(path: Path, text: str) -> None:
    """A text file in UTF-8, whole or not at all."""
    write_beside(path, lambda tmp: tmp.write_text(text, encoding="utf-8"))


def write_json(path: Path, content) -> None:
    """A JSON file, whole or not at all."""
    write_text(path, json.dumps(content, indent=1) + "\n")


def copy_into(dir: str | Path, file: str | Path | None) -> None:
    """A copy of a file in a folder, whole or not at all. None, or a file that is there: nothing."""
    target = Path(dir) / Path(file or "").name
    if file is not None and not (target.exists() and target.samefile(file)):
        write_beside(target, lambda tmp: shutil.copyfile(file, tmp))


# --------------------------------------------------------------------------------------------------
# Locks

class Lock:
    """A folder that is this process's alone, by its file .lock: until close(), or until the process
    ends, however it does. BlockingIOError if another process has it.

    A POSIX record lock. A forked process doesn't inherit it, so readers of pictures that outlive a
    killed trainer by a moment keep nobody waiting.
    """

    def __init__(self, folder: Path):
        self.file = open(folder / ".lock", "a")
        try:
            if fcntl is not None:
                fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:                         # some systems say EACCES instead of EAGAIN
            self.file.close()
            if e.errno in (errno.EACCES, errno.EAGAIN):
                raise BlockingIOError from e
            raise

    def close(self) -> None:
        self.file.close()

    def __enter__(self) -> "Lock":
        return self

    def __exit__(self, *_) -> None:
        self.close()


def lock(folder: Path, what: str = "training") -> Lock:
    """Make this the only program that writes to a folder. UserError if there is another, or if
    nothing can be written there."""
    try:
        return Lock(folder)
    except BlockingIOError:
        raise UserError(f"{folder}: another {what} writes there; wait for it, stop it, or choose "
                        "another --out") from None
    except OSError as e:
        raise UserError(f"{folder}: cannot write there ({e.strerror or e}); choose another "
                        "--out") from e


def wait_for(folder: Path) -> Lock:
    """`lock`, once nobody else has it. The folder is made if it isn't there."""
    make_folder(folder)
    while True:
        try:
            return Lock(folder)
        except BlockingIOError:
            time.sleep(0.2)
