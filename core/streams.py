"""stdin, stdout, stderr and Ctrl-C, as every program here has them.

A character that stdout's encoding lacks is written as an escape. Where nobody reads stdout any more
(`| head`, a pager that was left), a program whose work is kept in files goes on in silence, and any
other ends quietly. While a program is still being imported, which takes seconds, Ctrl-C is a line.
"""
import io
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

UNHEARD = 141                       # what a shell says of a program that SIGPIPE ended


class Stream:
    """stdout or stderr, apart from what happens when it can't be written."""

    def __init__(self, stream: io.TextIOBase, name: str, ends: bool):
        """name: of the stream, for people. ends: the program ends with it; else what is written
        later is dropped."""
        self.stream, self.name, self.ends = stream, name, ends
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")

    def __getattr__(self, name: str):
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        try:
            return self.stream.write(text)
        except OSError as e:
            self.lost(e)
            return len(text)

    def flush(self) -> None:
        try:
            self.stream.flush()
        except OSError as e:
            self.lost(e)

    def lost(self, error: OSError) -> None:
        """From here on all goes nowhere. SystemExit if the program ends with it."""
        pipe = isinstance(error, BrokenPipeError)
        try:                        # what is in the buffer shall not fail again when Python exits
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.stream.fileno())
            os.close(nowhere)
        except (OSError, ValueError):                # no file below it
            pass
        why = "nobody reads it any more" if pipe else error.strerror
        if not self.ends and self.name == "stdout":
            print(f"note: {self.name} can't be written ({why}); the work goes on without it",
                  file=sys.stderr)
        elif self.ends and not pipe:
            print(f"error: {self.name}: cannot write to it ({why})", file=sys.stderr)
        if self.ends:
            raise SystemExit(UNHEARD if pipe else 2)


@contextmanager
def guarded(goes_on: bool) -> Iterator[None]:
    """sys.stdout and sys.stderr as `Stream`s. What was closed before the program began is nowhere.

    goes_on: without anybody who reads stdout, too.
    """
    before = sys.stdin, sys.stdout, sys.stderr
    if sys.stdin is None:
        sys.stdin = open(os.devnull, encoding="utf-8")
    out, err = (stream or open(os.devnull, "w", encoding="utf-8") for stream in before[1:])
    sys.stderr = Stream(err, "stderr", ends=False)
    sys.stdout = Stream(out, "stdout", ends=not goes_on)
    try:
        yield
        sys.stdout.flush()
    except SystemExit:
        sys.stdout.flush()
        raise
    finally:
        sys.stderr.flush()
        sys.stdin, sys.stdout, sys.stderr = before


# --------------------------------------------------------------------------------------------------
# Ctrl-C before there is anything to lose

def started(root: Path) -> bool:
    """Whether Python was started for one of the programs under root. Not so where these are only
    imported: by a test, a notebook, a process that reads pictures."""
    file = getattr(sys.modules.get("__main__"), "__file__", None)
    return file is not None and root in Path(file).resolve().parents


def leave(*_) -> None:
    """For SIGINT: nothing has begun, so there is nothing to finish or to clear away."""
    try:
        os.write(2, b"interrupted before anything had begun\n")
    finally:
        os._exit(130)


def quiet_start(root: Path) -> None:
    """Until `loud`, Ctrl-C ends a program under root with a line, not a traceback through the
    imports."""
    main = threading.current_thread() is threading.main_thread()
    if main and started(root) and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, leave)


def loud() -> None:
    """Ctrl-C is a KeyboardInterrupt again."""
    if signal.getsignal(signal.SIGINT) is leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)
