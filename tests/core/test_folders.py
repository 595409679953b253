"""Folders that people have in hand, and files that are none; and a short attack on all of them."""
import base64
import json
import os
import random

import pytest
import torch
from safetensors.torch import save_file

from core.folders import present, read_config
from core.layouts import Folder
from core.tokenizer import Tokenizer
from core.weights import Tensors, load, skeleton
from llama import Llama, LlamaConfig
from tests.attack import folders
from tests.core.helpers import TEXT, fails, write
from toy.world import MODEL

pytestmark = pytest.mark.usefixtures("one_thread")


def a_llama(folder):
    """A tiny one."""
    Llama(LlamaConfig(**TEXT)).save_pretrained(folder)
    return folder


def test_what_is_no_model_says_what_it_is(tmp_path):
    model = a_llama(tmp_path / "models--a--b")
    snapshots = model / "snapshots"
    for name in ("old", "new"):
        (snapshots / name).mkdir(parents=True)
        (snapshots / name / "config.json").write_text("{}")
    (model / "config.json").unlink()
    (model / "model.safetensors").unlink()
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text("old\n")
    for folder in (model, tmp_path):
        with fails(folder, "the hub's cache", snapshots / "old"):
            Folder(folder)
    (model / "refs" / "main").unlink()
    with fails(snapshots / "new"):
        Llama.from_pretrained(model)
    with fails(snapshots, "other folders", snapshots / "new"):
        read_config(snapshots)
    lora = a_llama(tmp_path / "lora")
    (lora / "model.safetensors").rename(lora / "adapter_model.safetensors")
    (lora / "adapter_config.json").write_text("{}")
    with fails(lora, "LoRA", "merge"):
        Llama.from_pretrained(lora)
    (lora / "config.json").unlink()
    with fails(lora, "LoRA", "merge"):
        Llama.from_pretrained(lora)
    with fails(lora / "adapter_config.json", "a file", "folder"):
        Llama.from_pretrained(lora / "adapter_config.json")


@pytest.mark.parametrize("name", ("config.json", "model.safetensors", "tokenizer.model"))
def test_files_that_are_none(tmp_path, name):
    folder = a_llama(tmp_path / "x")
    path = folder / name
    path.unlink(missing_ok=True)
    kinds = {"a folder": path.mkdir, "a pipe": lambda: os.mkfifo(path),
             "a link to nowhere": lambda: path.symlink_to("nowhere"),
             f"a link to {name}": lambda: path.symlink_to(name),
             "LFS pointer": lambda: path.write_bytes(folders.POINTER)}
    for word, make in kinds.items():
        make()
        with fails(path, word):
            Llama.from_pretrained(folder)
            Tokenizer.from_pretrained(folder)
        path.rmdir() if word == "a folder" else path.unlink()


def test_present(tmp_path, monkeypatch):
    assert not present(tmp_path / "x") and not present(tmp_path / "x" / "y")
    for name in ("a\0b", "x" * 300):
        with fails("cannot read it"):
            present(tmp_path / name)
    (tmp_path / "x").write_text("12345")
    (tmp_path / "y").symlink_to("x")
    assert present(tmp_path / "y") and not present(tmp_path / "x" / "y")
    with fails("5 bytes"):
        present(tmp_path / "x", most=4)

    def denied(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "lstat", denied)
    with fails(tmp_path / "x", "Permission denied"):
        present(tmp_path / "x")


@pytest.mark.parametrize("dtype", (torch.int64, torch.bool, torch.float8_e4m3fn, torch.complex64))
def test_numbers_of_another_format(tmp_path, dtype):
    save_file({"weight": torch.ones(2, 2).to(dtype)}, tmp_path / "model.safetensors")
    with skeleton():
        layer = torch.nn.Linear(2, 2, bias=False)
    with fails("weight in model.safetensors", "number format", dtype):
        load(layer, Tensors(tmp_path), lambda name: name)


def test_an_index_of_other_types(tmp_path):
    for table in (3, [], {"x": 3}, {"x": ".."}, {"x": ""}, {"x": "a\0b"}, {"a\nb": "../x"}):
        index = tmp_path / "model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": table}))
        with fails(tmp_path):
            Tensors(tmp_path)


# --------------------------------------------------------------------------------------------------
# Tokenizers

def beside(tmp_path, **files):
    """The toy world's tokenizer (896 tokens) with json files beside it."""
    write(tmp_path, {}, {f"{name}.json": content for name, content in files.items()})
    (tmp_path / "tokenizer.model").write_bytes((MODEL / "tokenizer.model").read_bytes())
    return Tokenizer.from_pretrained(tmp_path)


def test_special_tokens_added_are_controls(tmp_path):
    """As llava-hf's <image> and <pad>: no text becomes them, and they are no text."""
    plain = Tokenizer.from_pretrained(MODEL)
    tok = beside(tmp_path, added_tokens={"[PAD]": 897, "<image>": 896, "</s>": 2},
                 special_tokens_map={"pad_token": "[PAD]"},
                 tokenizer_config={"added_tokens_decoder": {
                     "2": {"content": "</s>", "special": True},
                     "896": {"content": "<image>", "special": True}}})
    text = "a <image> [PAD] </s>"
    assert tok.encode(text) == plain.encode(text) and tok.decode(tok.encode(text)) == text
    assert tok.vocab_size == 898 and tok.decode([896, 897]) == "" and tok.eos_ids == {2}


@pytest.mark.parametrize("words, files", [
    (("<box>", "not special"), {"added_tokens": {"<box>": 896}}),
    (("a\\nb", "not special"), {"added_tokens": {"a\nb": 896}}),
    (("<box>", "not special"), {"tokenizer_config": {"added_tokens_decoder": {
        "896": {"content": "<box>", "special": False}}}}),
    (("10000000000",), {"added_tokens": {"<box>": 10 ** 10}}),
    (("True",), {"added_tokens": {"a": True}}),
    (("'</s>'", "elsewhere"), {"added_tokens": {"</s>": 896}}),
    (("[PAD]", "another"), {"added_tokens": {"[PAD]": 600},
                            "special_tokens_map": {"pad_token": "[PAD]"}}),
    (("added_tokens_decoder",), {"tokenizer_config": {"added_tokens_decoder": [1]}}),
    (("content",), {"tokenizer_config": {"added_tokens_decoder": {"896": {"content": 3}}}}),
    (("eos_token_id",), {"config": {"eos_token_id": -1}}),
    (("eos_token_id",), {"config": {"eos_token_id": [2, 1e3]}}),
    (("5000", "896"), {"config": {"eos_token_id": 5000}}),
    (("language model",), {"config": {"llm": [1]}})])
def test_what_stands_beside_a_tokenizer_and_is_wrong(tmp_path, words, files):
    with fails(tmp_path, *words):
        beside(tmp_path, **files)


def test_tokenizers_cut_anywhere(tmp_path):
    content = (MODEL / "tokenizer.model").read_bytes()
    rng = random.Random(0)
    for cut in [0, 1, len(content) - 1, *rng.sample(range(len(content)), 150)]:
        (tmp_path / "tokenizer.model").write_bytes(content[:cut])
        with fails(tmp_path / "tokenizer.model"):
            Tokenizer.from_pretrained(tmp_path)
    tokens = [bytes([b]) for b in range(256)] + [b"he", b"hel"]
    lines = [base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens)]
    (tmp_path / "tokenizer.model").write_bytes(b"".join(lines))
    (tmp_path / "config.json").write_text('{"vocab_size": 514}')
    assert Tokenizer.from_pretrained(tmp_path).vocab_size == 514
    (tmp_path / "tokenizer.model").write_bytes(b"".join(lines[:-1]))       # between two lines
    with fails(tmp_path / "tokenizer.model", "514"):
        Tokenizer.from_pretrained(tmp_path)


# --------------------------------------------------------------------------------------------------

def test_a_short_attack(tmp_path):
    """See tests/attack/folders.py: success, or an error of one line, whatever is damaged."""
    said = [folders.attack(random.Random(seed), tmp_path, ("ccra", "mlvf"), limit=False)
            for seed in range(25)]
    assert 2 < sum(line.endswith(": 0 read it") for line in said) < 23, said
