"""`python -m toy`."""
import pytest
from PIL import Image

from core.common import UserError
from data import EXAMPLE
from toy import __main__ as program


def test_show(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    program.main(["show", "--n", "7", "--split", "test0"])
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("test0/0: ") and said[1].startswith("    ")
    assert Image.open("out/toy/scenes.png").size == (6 * 2 * 104, 2 * 2 * 104)
    with pytest.raises(UserError, match="--n 0: should be a whole number from 1"):
        program.main(["show", "--n", "0"])


def test_the_example_is_what_ship_writes(tmp_path):
    """The records that `python data.py show` shows, and their pictures, pixel for pixel."""
    program.write_example(tmp_path)
    names = sorted(file.name for file in EXAMPLE.iterdir())
    assert names == sorted(file.name for file in tmp_path.iterdir()) and len(names) == 26
    for name in names:
        new, old = tmp_path / name, EXAMPLE / name
        if name.endswith(".png"):
            assert Image.open(new).tobytes() == Image.open(old).tobytes()
        else:
            assert new.read_text() == old.read_text()
