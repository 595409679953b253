"""bench.py on a tiny random model: every figure is there and they agree with each other."""
import json
import subprocess
import sys

import pytest
import torch

from bench import speed as bench
from core.common import ROOT
from llama import Llama, LlamaConfig
from toy import world as toy

TINY = LlamaConfig(vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    Llama(TINY).save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


def run(*arguments):
    return subprocess.run([sys.executable, str(ROOT / "bench.py"), "--rounds", "1", *map(str, arguments)],
                          capture_output=True, text=True, cwd=ROOT)


def test_a_text_model_beside_transformers(folder, tmp_path):
    pytest.importorskip("transformers")
    done = run("--model", folder, "--peer", "--tokens", "6", "--prompt", "9", "--json", tmp_path / "r.json")
    assert done.returncode == 0, done.stderr
    r = json.loads((tmp_path / "r.json").read_text())
    for key in ("ours", "peer"):
        assert 0 < r[key]["load"] < r[key]["first"] and 0 < r[key]["anonymous"] < r[key]["peak"] and r[key]["rate"] > 0
        assert len(r["runs"][key]) == 1 and len(r["runs"][key][0]["ids"]) == 6
        assert r[key]["rate"] == r["runs"][key][0]["rate"]                            # the median of one
    assert r["same_tokens"] == 6 and "same tokens: yes" in done.stdout               # float32
    assert r["ratio"]["rate"] == pytest.approx(r["ours"]["rate"] / r["peer"]["rate"])
    body = 2 * (4 * 64 * 64 + 3 * 64 * 128)                                          # numbers in matrices, but the head
    assert r["ours"]["bytes"] == 4 * (body + 64 * 128) and r["ours"]["flops"] == 2 * 9 * body
    assert r["ours"]["cache"] == 4 * 2 * 2 * 64 * (9 + 3)                              # of half the answer
    for us in r["runs"]["ours"]:
        assert us["bandwidth_share"] == pytest.approx((us["bytes"] + us["cache"]) * us["rate"] / us["bandwidth"])
    assert all(rate > 1e8 for rate in (r["machine"]["float32"], r["machine"]["bfloat16"], r["ours"]["bandwidth"]))
    assert f"{r['ours']['rate']:.2f}" in done.stdout and f"{r['peer']['first']:.2f} s" in done.stdout


def test_a_vision_language_model_in_int8(tmp_path):
    done = run("--model", toy.MODEL, "--quant", "int8", "--tokens", "3", "--json", tmp_path / "r.json")
    assert done.returncode == 0, done.stderr
    r = json.loads((tmp_path / "r.json").read_text())
    assert r["dtype"] == "float32" and r["ours"]["rate"] > 0 and "peer" not in r and "int8" in done.stdout


def test_what_is_refused(folder, tmp_path):
    for arguments, words in ((["--model", tmp_path / "none"], "none"), ([], "--model"),
                             (["--model", folder, "--pack", "--quant", "int8"], "--pack"),
                             (["--model", toy.MODEL, "--peer"], "nanoccra"),
                             (["--model", folder, "--tokens", "1"], "2 or more"),
                             (["--model", folder, "--json", tmp_path / "none" / "x.json"], "--json")):
        done = run(*arguments)
        assert done.returncode == 2 and done.stderr.startswith("error: ") and words in done.stderr, done.stderr
        assert len(done.stderr.strip().splitlines()) == 1 and done.stdout == ""
    (folder / "model.safetensors").unlink()
    done = run("--model", folder)
    assert done.returncode == 2 and "no weights here" in done.stderr


def test_peer_without_transformers(monkeypatch):
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(bench.UserError, match="pip install"):
        bench.arguments(["--model", "x", "--peer"])
    with pytest.raises(bench.UserError, match="for CPUs"):
        bench.arguments(["--model", "x", "--pack", "--device", "cuda"])
