"""`python -m bench` on a tiny random model: every figure is there, and they agree with each other.
"""
import importlib.util
import json
import os
import subprocess
import sys

import pytest
import torch

from bench.__main__ import arguments
from bench.cost import cost
from bench.make_llava import shapes, shared_out
from core.common import ROOT, UserError
from llama import Llama, LlamaConfig
from toy import world as toy

TINY = LlamaConfig(vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                   num_attention_heads=4)


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    Llama(TINY).save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


def run(*arguments, cwd=ROOT):
    return subprocess.run([sys.executable, "-m", "bench", "--rounds", "1", *map(str, arguments)],
                          capture_output=True, text=True, cwd=cwd,
                          env={**os.environ, "PYTHONPATH": str(ROOT)})


def test_a_text_model_beside_transformers(folder, tmp_path):
    pytest.importorskip("transformers")
    done = run("--model", folder, "--peer", "--tokens", "6", "--prompt", "9", "--json",
               tmp_path / "r.json")
    assert done.returncode == 0, done.stderr
    r = json.loads((tmp_path / "r.json").read_text())
    for key in ("ours", "peer"):
        assert 0 < r[key]["load"] < r[key]["first"]
        assert 0 < r[key]["anonymous"] < r[key]["peak"] and r[key]["rate"] > 0
        assert len(r["runs"][key]) == 1 and len(r["runs"][key][0]["ids"]) == 6
        assert r[key]["rate"] == r["runs"][key][0]["rate"]                   # the median of one
    assert r["same_tokens"] == 6 and "same tokens: yes" in done.stdout      # float32
    assert r["ratio"]["rate"] == pytest.approx(r["ours"]["rate"] / r["peer"]["rate"])
    body = 2 * (4 * 64 * 64 + 3 * 64 * 128)               # numbers in matrices, but the head
    assert r["ours"]["bytes"] == 4 * (body + 64 * 128) and r["ours"]["flops"] == 2 * 9 * body
    assert r["ours"]["cache"] == 4 * 2 * 2 * 64 * (9 + 3)                    # of half the answer
    for us in r["runs"]["ours"]:
        read = (us["bytes"] + us["cache"]) * us["rate"]
        assert us["bandwidth_share"] == pytest.approx(read / us["bandwidth"])
    rates = r["machine"]["float32"], r["machine"]["bfloat16"], r["ours"]["bandwidth"]
    assert all(rate > 1e8 for rate in rates)
    assert f"{r['ours']['rate']:.2f}" in done.stdout
    assert f"{r['peer']['first']:.2f} s" in done.stdout


def test_a_vision_language_model_in_int8_from_another_folder(tmp_path):
    model = os.path.relpath(toy.MODEL, tmp_path)
    done = run("--model", model, "--quant", "int8", "--tokens", "3", "--json", "r.json",
               cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    r = json.loads((tmp_path / "r.json").read_text())
    assert r["dtype"] == "float32" and r["ours"]["rate"] > 0 and "peer" not in r
    assert "int8" in done.stdout


def test_what_int8_costs(capsys):
    cost(arguments(["--cost", "--n", "8", "--threads", "2"]))
    logits, exact, rounded = capsys.readouterr().out.strip().splitlines()
    assert "logits of 8 answers' first tokens" in logits and "of 8" in exact
    assert 0 < float(logits.partition("error ")[2].split()[0]) < 0.05
    sizes = [float(line.split()[-2]) for line in (exact, rounded)]           # MB
    assert sizes[1] < 0.4 * sizes[0]


def test_what_is_refused(folder, tmp_path):
    for given, words in ((["--model", tmp_path / "none"], "none"), ([], "--model"),
                         (["--model", folder, "--pack", "--quant", "int8"], "--pack"),
                         (["--model", toy.MODEL, "--peer"], "nanoccra"),
                         (["--model", folder, "--tokens", "1"], "from 2 to"),
                         (["--model", folder, "--json", tmp_path / "none" / "x.json"], "--json")):
        done = run(*given)
        assert done.returncode == 2 and done.stderr.startswith("error: "), done.stderr
        assert words in done.stderr, done.stderr
        assert len(done.stderr.strip().splitlines()) == 1 and done.stdout == ""
    (folder / "model.safetensors").unlink()
    done = run("--model", folder)
    assert done.returncode == 2 and "no weights here" in done.stderr


def test_peer_without_transformers(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install"):
        arguments(["--model", "x", "--peer"])
    with pytest.raises(UserError, match="for CPUs"):
        arguments(["--model", "x", "--pack", "--device", "cuda"])


def test_an_invented_llava_is_cut_into_even_files():
    sizes = shapes(layers=2)
    files = shared_out(sizes, 3)
    assert [name for file in files for name in file] == list(sizes)     # all of them, in order
    assert all(files) and "language_model.model.layers.1.mlp.up_proj.weight" in sizes
