"""The prepared folder as a data set."""
import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

import data
from core.common import UserError
from core.tokenizer import IGNORE, IMAGE_TOKEN, Tokenizer
from tests.training.records import LLM, make, make_world, same_items
from training.prepared import Prepared
from training.readers import Lenient, Notes


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_pretrained(LLM)


@pytest.fixture
def world(tmp_path):
    make_world(tmp_path)
    make(tmp_path)
    return tmp_path


def test_what_does_not_fit_is_refused(world, tokenizer, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    (other / "tokenizer.model").write_bytes((LLM / "tokenizer.model").read_bytes() + b"\n")
    with pytest.raises(UserError, match="not a prepared folder"):
        Prepared(world / "images", None, tokenizer, "v1")
    with pytest.raises(UserError, match="gone: no such folder"):
        Prepared(world / "out", world / "gone", tokenizer, "v1")
    foreign = Tokenizer.from_pretrained(LLM)
    foreign.file = other / "tokenizer.model"
    with pytest.raises(UserError, match="another tokenizer"):
        Prepared(world / "out", None, foreign, "v1")
    foreign = Tokenizer.from_pretrained(LLM)
    foreign.eos_ids = {7}
    with pytest.raises(UserError, match="another tokenizer"):
        Prepared(world / "out", None, foreign, "v1")
    file, whole = world / "out" / "tokens.npy", (world / "out" / "tokens.npy").read_bytes()
    for damage in (whole[:-4], whole[:50], b""):
        file.write_bytes(damage)
        with pytest.raises(UserError, match="out: an array is missing or damaged"):
            Prepared(world / "out", None, tokenizer, "v1")
    np.save(file, np.zeros(5, np.int32))
    with pytest.raises(UserError, match="tokens.npy isn't as long"):
        Prepared(world / "out", None, tokenizer, "v1")


def test_lengths_are_exact(world, tokenizer):
    prepared = Prepared(world / "out", None, tokenizer, "v1", 28)
    samples = [vars(prepared.sample(i)) for i in range(len(prepared))]
    for max_length in (1, 2, 40, 60, 75, 100, 2048):
        slow = []
        for sample in samples:
            ids = data.cut(sample, max_length, 36)["ids"]
            slow.append(len(ids) + (35 if IMAGE_TOKEN in ids else 0))
        assert prepared.lengths(36, max_length).tolist() == slow
        assert max(slow) <= max_length
    assert prepared.has_picture().tolist() == [IMAGE_TOKEN in sample["ids"] for sample in samples]


def test_other_processes_map_the_files_themselves(world, tokenizer):
    prepared = Prepared(world / "out", None, tokenizer, "v1", 28)
    state = prepared.__getstate__()
    assert "arrays" in vars(prepared) and "arrays" not in state
    assert len(pickle.dumps(state)) < 5000
    same_items(pickle.loads(pickle.dumps(prepared)), prepared)


def test_a_picture_damaged_later(world, tokenizer, capfd, tmp_path):
    note = tmp_path / "damaged.jsonl"
    prepared = Prepared(world / "out", None, tokenizer, "v1", 28)
    lenient = Lenient(prepared, Notes(note))
    before = [prepared[i] for i in range(len(prepared))]
    (world / "images" / "c.jpg").write_bytes(b"")
    hit = [i for i in range(len(prepared)) if prepared.path(i) == world / "images" / "c.jpg"]
    assert len(hit) > 20                 # under two names, one of them dotted
    twice = 2 * [*range(40), *hit]
    rows = torch.utils.data.DataLoader(lenient, batch_size=None, num_workers=2, sampler=twice)
    for i, after in zip(twice, rows, strict=True):
        for key in ("ids", "query", "turns", "ends"):
            assert after[key] == before[i][key]
        pixels, labels = before[i]["pixels"], before[i]["labels"]
        if i in hit:
            pixels, labels = torch.zeros(3, 28, 28), [IGNORE] * len(after["ids"])
        assert torch.equal(after["pixels"], pixels) and after["labels"] == labels
    lines = [json.loads(line) for line in note.read_text().splitlines()]
    assert [line["path"] for line in lines] == [str(world / "images" / "c.jpg")]
    # whichever reader came first
    assert any(prepared.record_id(i) in lines[0]["message"] for i in hit)
    assert capfd.readouterr().err.count("damaged picture") == 1
    with pytest.raises(UserError, match="c.jpg: cannot be read"):
        prepared[hit[0]]
    lenient.notes.add(Path("x"), "another")          # of this start; of five pictures two may be
    why = "3 of 5 pictures can't be read.*record .*c.jpg: cannot be read"
    with pytest.raises(UserError, match=why):
        lenient.notes.file.write_text(note.read_text().replace("c.jpg", "d.jpg"))
        lenient[hit[0]]
    os.rename(world / "images", world / "elsewhere")           # then nothing is said about pictures
    with pytest.raises(UserError, match="no such image .the whole folder of pictures is gone"):
        lenient[hit[0]]
