"""What every program needs: errors for users, JSON, locks."""
import errno
import os
import signal
import subprocess
import sys

import pytest

from core import common
from core.common import ROOT, UserError
from core.folders import read_config
from tests.core.helpers import fails


def test_config_errors(tmp_path):
    with fails("nowhere", "no such folder"):
        read_config(tmp_path / "nowhere")
    with fails("no config.json"):
        read_config(tmp_path)
    for text, word in (("{", "not valid JSON"), ("[1]", "expected a JSON object")):
        (tmp_path / "config.json").write_text(text)
        with fails("config.json", word):
            read_config(tmp_path)


def test_run(capsys):
    def raises(error):
        raise error

    for error, code, said in ((UserError("no such cat"), 2, "error: no such cat\n"),
                              (KeyboardInterrupt(), 130, "\ninterrupted\n")):
        with pytest.raises(SystemExit) as end:
            common.run(lambda: raises(error))
        assert (end.value.code, capsys.readouterr().err) == (code, said)
    lost = "[gloo/transport/tcp/pair.cc:537] Read error [127.0.0.1]:13703: Connection reset by peer"
    with pytest.raises(SystemExit):
        common.run(lambda: raises(RuntimeError(lost)), "the same command goes on")
    assert capsys.readouterr().err == ("error: another process of this run is gone (killed, out of "
                                       "memory?), so this one can't go on; the same command goes "
                                       "on\n")
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with pytest.raises(RuntimeError, match="shapes"):
        common.run(lambda: raises(RuntimeError("shapes")))
    with pytest.raises(ZeroDivisionError):                       # a bug of ours keeps its traceback
        common.run(lambda: 1 / 0)
    common.run(lambda: None)


def holder(folder):
    """A process that has a folder to itself, until its stdin ends."""
    program = ("import sys, pathlib, core.common as common\n"
               "with common.Lock(pathlib.Path(sys.argv[1])):\n"
               "    print('mine', flush=True), sys.stdin.read()\n")
    process = subprocess.Popen([sys.executable, "-c", program, str(folder)], cwd=ROOT, text=True,
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout.readline() == "mine\n"
    return process


@pytest.mark.skipif(common.fcntl is None, reason="no such locks here")
@pytest.mark.parametrize("killed", (False, True))
def test_a_folder_is_one_programs_until_it_ends(tmp_path, killed):
    process = holder(tmp_path)
    with fails(tmp_path, "another training writes there", "another --out"):
        common.lock(tmp_path)
    if killed:
        process.kill()
    process.communicate()
    with common.lock(tmp_path):
        pass
    with common.wait_for(tmp_path):
        pass


def test_folders_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("nowhere")
    for path, why in (("file", "is a file"), ("file/a", "Not a directory"), ("x" * 300, "too long"),
                      ("link", "is a link that leads nowhere")):
        with pytest.raises(UserError, match=f"^--out {tmp_path / path}: .*{why}.*; choose a fold"):
            common.make_folder(tmp_path / path)
    assert common.make_folder(str(tmp_path / "a" / "b")).is_dir()
    common.make_folder(tmp_path / "a" / "b")


def test_a_failing_removal_hides_no_cause(tmp_path, monkeypatch):
    """Nor does a file system that can't sync keep anything from being written."""
    def fails(number):
        def call(*_, **__):
            raise OSError(number, os.strerror(number))
        return call

    monkeypatch.setattr(os, "fsync", fails(errno.EINVAL))
    common.write_text(tmp_path / "a", "1")
    monkeypatch.setattr(os, "fsync", fails(errno.ENOSPC))
    monkeypatch.setattr(os, "unlink", fails(errno.EROFS))
    with pytest.raises(UserError, match="a: cannot write it .No space left on device"):
        common.write_text(tmp_path / "a", "2")
    assert (tmp_path / "a").read_text() == "1"
    common.clear_tmp(tmp_path, "a")
    monkeypatch.undo()
    common.clear_tmp(tmp_path, "b", "a*")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
