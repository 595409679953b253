"""stdout, stderr and Ctrl-C: any encoding, nobody who reads, a full disk, the first second; and
what other systems lack."""
import io
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from core import common, streams
from core.common import ROOT, UserError

LOST = "the work goes on without it"


@pytest.fixture
def run(monkeypatch, capsys):
    """Run a main by common.run with this stdout (or stderr): (exit status, what stderr got)."""
    def run(main, kept="", **streams):
        with monkeypatch.context() as m:
            for name, stream in streams.items():
                m.setattr(sys, name, stream)
            try:
                common.run(main, kept)
                status = 0
            except SystemExit as e:
                status = e.code
            assert sys.stdout is streams.get("stdout", sys.stdout)     # as before
        return status, capsys.readouterr().err
    return run


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "latin-1", "utf-8"])
def test_any_encoding(run, encoding):
    for name in ("stdout", "stderr"):
        below = io.BytesIO()
        stream = io.TextIOWrapper(below, encoding=encoding)
        text = "é 猫 \udc80"                           # the last: a byte of a file's name
        assert run(lambda: print(text, file=getattr(sys, name)), **{name: stream}) == (0, "")
        said = below.getvalue().decode(encoding).rstrip("\n")
        assert said == text.encode(encoding, "backslashreplace").decode(encoding)


def unheard():
    """A pipe that nobody reads."""
    reads, writes = os.pipe()
    os.close(reads)
    return os.fdopen(writes, "w", encoding="utf-8")


def test_nobody_reads(run):
    """A program that works for stdout ends quietly, whether it fails within or at the end; one
    whose work is kept goes on."""
    reached = []

    def main(lines=1):
        for _ in range(lines):
            print("x" * 1000)
        reached.append(lines)

    def long():
        main(200)

    assert run(main, stdout=unheard()) == (streams.UNHEARD, "")
    assert run(long, stdout=unheard()) == (streams.UNHEARD, "") and reached == [1]
    for work in (main, long):
        status, said = run(work, "all is kept", stdout=unheard())
        assert status == 0 and LOST in said and said.count("\n") == 1
    assert reached == [1, 1, 200]
    # what is said on the side is no reason to stop
    assert run(lambda: print("x" * 9999, file=sys.stderr), stderr=unheard()) == (0, "")
    assert run(lambda: sys.exit(3), "kept", stdout=unheard()) == (3, "")
    with pytest.raises(ZeroDivisionError):                          # a bug isn't hidden
        run(lambda: print(1 / 0), stdout=unheard())


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux's")
def test_a_full_disk(run):
    def main():
        print("x")

    status, said = run(main, stdout=open("/dev/full", "w"))
    assert status == 2 and said == "error: stdout: cannot write to it (No space left on device)\n"
    status, said = run(main, "kept", stdout=open("/dev/full", "w"))
    assert status == 0 and "No space left" in said and LOST in said


def test_no_streams_at_all(run):
    """`>&- 2>&- <&-`"""
    def main():
        print(input("?"))

    with pytest.raises(EOFError):
        run(main, stdin=None, stdout=None)
    assert run(lambda: sys.stderr.write("x"), stderr=None) == (0, "")
    assert run(lambda: sys.stdout.isatty(), stdout=None) == (0, "")


def raises(error):
    def main():
        raise error
    return main


def test_interrupted(run, monkeypatch):
    """A second Ctrl-C, while Python ends, ends it at once and says nothing more."""
    before = signal.getsignal(signal.SIGINT)
    assert run(raises(KeyboardInterrupt())) == (130, "\ninterrupted\n")
    assert run(raises(KeyboardInterrupt()), "x goes on") == (130, "\ninterrupted; x goes on\n")
    monkeypatch.setenv("RANK", "1")
    assert run(raises(KeyboardInterrupt()), "x goes on") == (130, "")
    assert signal.signal(signal.SIGINT, before) == signal.SIG_DFL


def test_processes_say_an_error_once(run, monkeypatch):
    """The others wait, for torchrun to end them; it sends SIGTERM."""
    waited = []
    monkeypatch.setattr(time, "sleep", waited.append)
    assert run(raises(UserError("no cat"))) == (2, "error: no cat\n") and waited == []
    monkeypatch.setenv("RANK", "3")
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    assert run(raises(UserError("no cat"))) == (2, "error: no cat\n") and waited == [3.5]
    assert signal.signal(signal.SIGTERM, before) == signal.SIG_DFL


def test_a_terminal_obeys_no_message(run):
    assert run(raises(UserError("\x1b[2J.png"))) == (2, "error: \\x1b[2J.png\n")


@pytest.mark.skipif(os.name == "nt", reason="no signals between processes")
@pytest.mark.parametrize("program", ["train.py", "eval.py", "sample.py", "data.py", "-m toy",
                                     "-m study", "-m viz"])
def test_the_first_second(tmp_path, program):
    """Ctrl-C while torch is imported: a line. (Here torch is what sends it.)"""
    (tmp_path / "torch.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n"
                                       "raise AssertionError('not interrupted')\n")
    run = subprocess.run([sys.executable, *program.split()], cwd=ROOT, capture_output=True,
                         text=True, env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert (run.returncode, run.stderr) == (130, "interrupted before anything had begun\n")


def test_who_only_imports_keeps_its_signals():
    assert not streams.started(ROOT)                        # this is pytest
    assert signal.getsignal(signal.SIGINT) is not streams.leave


ELSEWHERE = """
import builtins, os, signal, sys
GONE = {"fcntl", "resource", "readline", "termios", "pwd", "grp"}

import torch, torch.distributed, torch.utils.data
for name in GONE:
    sys.modules.pop(name, None)
real = builtins.__import__

def without(name, globals=None, *rest, **more):
    if name in GONE and (globals or {}).get("__file__", "").startswith(os.getcwd() + os.sep):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    return real(name, globals, *rest, **more)

builtins.__import__ = without
for module, names in ((os, "sched_getaffinity mkfifo O_NONBLOCK sysconf fchmod"),
                      (signal, "sigwaitinfo pthread_sigmask SIGHUP SIGKILL SIGPIPE")):
    for name in names.split():
        delattr(module, name)
torch.set_num_threads(1)
import core.common, data, eval, sample, train
import bench.__main__, study.__main__, toy.__main__, viz.__main__
assert core.common.fcntl is None

out, images = sys.argv[1], "assets/example"
sample.main(["--image", "assets/scene.png", "--q", "How many donuts are there?"])
sys.argv = ["data.py", "show", "--n", "1"]
data.main()
prepare = ["prepare", "--json", images + "/stage2.json", "--images", images, "--out",
           out + "/prepared", "--llm", "assets/toy", "--workers", "0"]
sys.argv = ["data.py", *prepare]
data.main()
train.main(["--stage", "2", "--model", "assets/toy", "--data", out + "/prepared", "--images",
            images, "--out", out + "/model", "--batch", "2", "--steps", "2", "--workers", "0"])
"""


def test_elsewhere(tmp_path):
    """What Windows lacks, taken away: asking, showing, preparing and training work."""
    run = subprocess.run([sys.executable, "-c", ELSEWHERE, str(tmp_path)], cwd=ROOT, text=True,
                         capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("3\n") and "model written to" in run.stdout
    assert " peak - GiB" in run.stdout
    assert (tmp_path / "model" / "model.safetensors").exists()


def test_nothing_needs_docstrings():
    """python -OO: __doc__ is None, which argparse takes; nobody else may need it."""
    for file in [*ROOT.glob("*.py"), *ROOT.glob("[a-z]*/*.py")]:       # not those of a .venv here
        if file.parent.name not in ("tests", "out"):
            source = file.read_text(encoding="utf-8")
            assert not re.search(r"__doc__\s*[.\[%+]", source), file
