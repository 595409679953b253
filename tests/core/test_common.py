"""What every program needs: errors for users, JSON, locks."""
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
