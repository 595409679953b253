"""Tokenizers for the tests of data.py: a small sentencepiece model trained on the spot, a small
byte-level BPE (Llama 3's kind), and Llama 2's own where NANOCCRA_LLAMA2_TOKENIZER leads to it."""
import json
import os
import shutil

import pytest
from PIL import Image

from tests.data.helpers import of, record, tiny_byte_level, tiny_sentencepiece

REAL = os.environ.get("NANOCCRA_LLAMA2_TOKENIZER")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    base = tmp_path_factory.mktemp("tokenizers")
    there = {"tiny": tiny_sentencepiece(base / "tiny"), "bytes": tiny_byte_level(base / "bytes")}
    if REAL:
        (base / "llama2").mkdir()
        shutil.copyfile(REAL, base / "llama2" / "tokenizer.model")
        there["llama2"] = base / "llama2"
    return there


@pytest.fixture(params=["tiny", "bytes", "llama2"])
def tokenizer(request, folders):
    return of(folders, request.param)


@pytest.fixture(params=["tiny", "llama2"])
def sp(request, folders):
    """A sentencepiece tokenizer: the kind LLaVA's algorithm was written for."""
    return of(folders, request.param)


@pytest.fixture
def llama2(folders):
    return of(folders, "llama2")


@pytest.fixture
def world(tmp_path, folders):
    """A json of seven records (three of them useless) and a folder of two pictures."""
    (tmp_path / "images" / "sub").mkdir(parents=True)
    Image.new("RGB", (40, 20), (200, 10, 10)).save(tmp_path / "images" / "a.png")
    Image.effect_noise((30, 50), 90).convert("RGB").save(tmp_path / "images" / "sub" / "b.jpg")
    records = [
        record("<image>\nWhat?", "A cat.", image="a.png"),
        record("a", ""),
        record("b", ""),
        record("x", "y", "z", id=4),
        record("What?\n<image>", "2", "Sure?", "yes", image="sub/../sub/b.jpg"),
        record("hello", "you"),
        record("<image>", "Again.", image="sub/../sub/b.jpg", id="twice")]
    (tmp_path / "x.json").write_text(json.dumps(records))
    return tmp_path
