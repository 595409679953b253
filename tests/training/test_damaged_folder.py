"""A prepared folder that was edited or damaged by hand: a line that names the file, and never a
path outside of the folder of pictures."""
import json
import os
import random
import shutil

import numpy as np
import pytest

from core.common import UserError
from core.tokenizer import Tokenizer
from tests.training.records import LLM, make, make_world
from training.prepared import Prepared


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    world = make_world(tmp_path_factory.mktemp("made"))
    make(world)
    return world


@pytest.fixture
def folder(made, tmp_path):
    return shutil.copytree(made / "out", tmp_path / "out")


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_pretrained(LLM)


def refused(folder, tokenizer, words):
    with pytest.raises(UserError, match=words) as e:
        Prepared(folder, None, tokenizer, "v1", 28)
    assert len(str(e.value).splitlines()) == 1


def unsigned(folder):
    """As an older version wrote it, without checksums."""
    edit(folder, lambda report: report.pop("arrays"))


def edit(folder, change):
    report = json.loads((folder / "report.json").read_text())
    change(report)
    (folder / "report.json").write_text(json.dumps(report))


OTHER = (None, True, -1, 10 ** 40, 0.5, float("nan"), "x", [], {}, [[]])


@pytest.mark.parametrize("path", ["kept", "pictures", "inputs", "inputs/template", "inputs/images",
                                  "inputs/json", "inputs/json/sha256", "inputs/tokenizer",
                                  "inputs/format", "arrays", "odd_pictures"])
def test_report_json(path, folder, tokenizer):
    """Any value of any type in any place: refused, or it makes no difference."""
    whole = (folder / "report.json").read_text()
    for value in OTHER:
        (folder / "report.json").write_text(whole)

        def put(report):
            *way, last = path.split("/")
            for key in way:
                report = report[key]
            report[last] = value

        edit(folder, put)
        try:
            assert len(Prepared(folder, None, tokenizer, "v1", 28)) > 200
            assert value in (None, {}) or value == 1 or path.endswith("sha256")
        except UserError as e:
            assert str(folder) in str(e) or path == "inputs/images"
    for text in ("", "{", "[]", "\x00", "[" * 5000, whole[:-5], '{"kept": 1, "kept": 2}'):
        (folder / "report.json").write_text(text)
        refused(folder, tokenizer, "report.json|another version")


def test_a_byte_that_changed(made, folder, tokenizer):
    rng = random.Random(1)
    for file in sorted(folder.glob("*.npy")):
        whole = file.read_bytes()
        for at in (*rng.sample(range(len(whole)), 2), len(whole) - 1):
            file.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << rng.randrange(8)])
                             + whole[at + 1:])
            refused(folder, tokenizer, f"{folder}.*npy.*prepare it again")
        file.write_bytes(whole)
    Prepared(folder, None, tokenizer, "v1", 28)
    tokens = np.load(folder / "tokens.npy")
    tokens[-1] ^= 2                                  # another token, which the tokenizer has
    np.save(folder / "tokens.npy", tokens)
    refused(folder, tokenizer, "tokens.npy: isn't what was prepared")
    with pytest.raises(UserError, match="tokens.npy: isn't what was prepared"):
        make(made, out=folder)                       # nor is it "already prepared"


def put(name, at, value):
    def change(folder):
        array = np.load(folder / f"{name}.npy")
        array[at] = value
        np.save(folder / f"{name}.npy", array)
    return change


ARRAYS = {
    "offsets go back": put("tokens.offsets", 3, 10 ** 6),
    "offsets begin later": put("names.offsets", 0, 5),
    "offsets below zero": put("paths.offsets", 1, -9),
    "no turn": lambda folder: put("turns.offsets", 1, 0)(folder),
    "a turn outside": put("turns", (5, 1), 10 ** 6),
    "a turn backwards": put("turns", (5, 0), 10 ** 6),
    "an end outside": put("turns", (0, 2), 10 ** 6),
    "no end": put("turns", (0, 2), 0),
    "another picture": put("picture", 0, 99),
    "a picture below": put("picture", 0, -7),
    "a place outside": put("at", 0, 10 ** 6),
    "no place": put("at", slice(None), -1),
    "no such token": put("tokens", 3, 2 * 10 ** 6),
    "a token below": put("tokens", 3, -50),
    "another type": lambda f: np.save(f / "at.npy", np.load(f / "at.npy").astype(np.int64)),
    "another shape": lambda f: np.save(f / "turns.npy", np.load(f / "turns.npy")[:, :2]),
    "objects": lambda f: np.save(f / "at.npy", np.array([{}], object), allow_pickle=True),
    "an archive": lambda f: (np.savez(f / "x.npz", a=1), os.replace(f / "x.npz", f / "at.npy")),
    "a scalar": lambda f: np.save(f / "at.npy", np.int32(3)),
    "not there": lambda f: (f / "at.npy").unlink(),
    "a folder": lambda f: ((f / "at.npy").unlink(), (f / "at.npy").mkdir()),
    "a pipe": lambda f: ((f / "at.npy").unlink(), os.mkfifo(f / "at.npy")),
    "a header of evil": lambda f: (f / "at.npy").write_bytes(
        b"\x93NUMPY\x01\x00v\x00{'descr': '<i4', 'shape': (" + b"9" * 60 + b",),"),
    "names": put("names", 2, 0xFF),
}


@pytest.mark.parametrize("damage", ARRAYS)
def test_an_array_without_checksums(damage, folder, tokenizer):
    unsigned(folder)
    Prepared(folder, None, tokenizer, "v1", 28)
    ARRAYS[damage](folder)
    refused(folder, tokenizer, f"{folder}.*prepare it again")


@pytest.mark.parametrize("path", ["/etc/hostname", "../../secret.png", "coco/../../secret.png",
                                  "..", "..\\secret.png", "coco\\..\\..\\secret.png", "\\secret",
                                  "C:\\secret.png", ".../secret.png", "coco/.... /x", "a\x00.png",
                                  "./.././x.png", "", "//server/x"])
def test_a_path_that_leads_out(path, folder, tokenizer):
    unsigned(folder)
    text = path.encode()
    rows = [text, *[b"c.jpg"] * (len(np.load(folder / "paths.offsets.npy")) - 2)]
    np.save(folder / "paths.npy", np.frombuffer(b"".join(rows), np.uint8))
    np.save(folder / "paths.offsets.npy", np.cumsum([0, *map(len, rows)]).astype(np.int64))
    refused(folder, tokenizer, "paths.npy: picture 0 is .* leads out of the folder of pictures")
    edit(folder, lambda report: report.update(arrays={path: "0"}))
    with pytest.raises(UserError, match="there is no array|leads out"):
        Prepared(folder, None, tokenizer, "v1", 28)
