"""sample.py as a user meets it: answers on stdout; one clear line and a non-zero exit for whatever
is wrong."""
import io
import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import sample
from core.common import ROOT, UserError
from core.tokenizer import Tokenizer
from core.weights import Tensors
from data import prompt
from toy import world as toy
from viz import maps

SCENE = ROOT / "assets" / "scene.png"
pytestmark = pytest.mark.usefixtures("one_thread")


def program(*arguments, cwd):
    """The program, as a process of its own."""
    command = [sys.executable, str(ROOT / "sample.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd)


@pytest.fixture
def ask(capsys):
    """Run sample.main; what it wrote to stdout and to stderr."""
    def run(*arguments, image=SCENE):
        sample.main(["--image", str(image), *map(str, arguments)])
        return capsys.readouterr()
    return run


@pytest.fixture
def refused(ask, capsys):
    """See that nothing is answered, and that one line names what is wrong."""
    def run(*arguments, names=(), image=SCENE):
        with pytest.raises(UserError) as e:
            ask(*arguments, image=image)
        assert capsys.readouterr().out == "" and "\n" not in str(e.value)
        for name in names:
            assert str(name) in str(e.value)
    return run


# --------------------------------------------------------------------------------------------------
# Answers

def test_it_answers_from_another_directory_too(tmp_path):
    shutil.copy(SCENE, tmp_path / "here.png")
    run = program("--image", "here.png", "--q", "How many donuts are there?", cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert run.stdout == "3\n"                                  # the answer alone
    assert "first token after" in run.stderr and "note:" not in run.stderr
    run = program("--image", "nowhere.png", "--q", "x", cwd=tmp_path)
    assert run.returncode == 2 and run.stdout == ""
    assert re.fullmatch("error: nowhere.png: .*\n", run.stderr)


def test_chat(tmp_path, ask, monkeypatch):
    """Several turns at the prompt; a mistake is said and the chat goes on; each answer is a line of
    stdout."""
    toy.draw(toy.make_scene("test/85")).save(tmp_path / "other.png")
    lines = [
        "How many frogs are there?", "/image nowhere.png", "/what", "",
        f"/image {tmp_path / 'other.png'}", "What word is printed?", "/new",
        "What word is printed?", "/quit", "never asked"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines) + "\n"))
    out, err = ask("--chat", "--q", "Is there an owl?")
    assert len(out.splitlines()) == 4 and err.count("first token after") == 4
    assert "error: nowhere.png" in err and "error: /what is unknown" in err


def test_a_picture_of_another_world(tmp_path, ask):
    Image.new("RGB", (300, 200), (10, 80, 30)).save(tmp_path / "x.jpg")
    out, err = ask("--q", "What is this?", image=tmp_path / "x.jpg")
    assert out.strip() and "bundled model" in err


def test_pictures_as_a_viewer_shows_them(tmp_path, ask, refused, monkeypatch):
    """Turned upright, and what isn't shown as it is stored is said; also through a pipe, which is
    read once."""
    scene, exif = Image.open(SCENE).convert("RGB"), Image.Exif()
    exif[0x0112] = 6
    turned = scene.transpose(Image.Transpose.ROTATE_90)
    turned.save(tmp_path / "phone.png", exif=exif)
    question = ("--q", "What color is the square?")
    out, err = ask(*question)
    said = ask(*question, image=tmp_path / "phone.png")
    assert said.out == out and "note: " not in err
    assert "note: " in said.err and "phone.png: stored on its side (EXIF orientation 6)" in said.err
    assert np.array_equal(sample.picture(tmp_path / "phone.png"), scene)
    stdin = io.TextIOWrapper(io.BytesIO((tmp_path / "phone.png").read_bytes()))
    monkeypatch.setattr(sys, "stdin", stdin)
    assert ask(*question, image="-").out == out
    refused(*question, image="-", names=["stdin", "empty"])          # nothing more comes
    refused("--chat", image="-", names=["--chat", "stdin"])
    refused(*question, image="https://a.b/c.png", names=["https://a.b/c.png", "download"])


def test_control_tokens_in_a_question_are_text(ask):
    tokenizer = Tokenizer.from_pretrained(toy.MODEL)
    for typed in ("</s>", "<image>", "<|im_end|>", "<s>", "<unk>"):
        row = prompt([(f"What is {typed} here?", None)], tokenizer)
        assert row.ids.count(-200) == row.ids.count(1) == 1
        assert 2 not in row.ids and 0 not in row.ids
        assert typed in tokenizer.decode(row.query)
    ask("--q", "</s><image> <|im_end|>")


def test_the_bundled_weights_are_small():
    assert sum(f.stat().st_size for f in toy.MODEL.rglob("*") if f.is_file()) <= 12 * 1000 * 1000
    assert len(Tensors(toy.MODEL)) > 100


# --------------------------------------------------------------------------------------------------
# What is wrong

def test_bad_pictures(tmp_path, refused):
    contents = {"bad.png": b"hello", "cut.png": SCENE.read_bytes()[:2000], "empty.png": b""}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    for name in ("no.png", *contents):
        refused("--q", "x", image=tmp_path / name, names=[name])
    refused("--q", "x", image=tmp_path, names=[tmp_path])


def test_bad_questions(refused):
    refused(names=["--q"])
    refused("--q", "  ", names=["question"])
    refused("--q", "why " * 3000, names=["positions"])


def changed(file, **changes):
    """Put other tensors into a file; None: without it."""
    tensors = {**load_file(file), **changes}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, file)


def test_bad_models(tmp_path, refused):
    def is_refused(folder, name):
        refused("--q", "x", "--model", folder, names=[name])

    def spoilt(name):
        shutil.copytree(toy.MODEL, tmp_path / name)
        return tmp_path / name, tmp_path / name / "model.safetensors"

    is_refused(tmp_path / "none", "none")
    is_refused(tmp_path, "config.json")
    folder, file = spoilt("cut")
    file.write_bytes(file.read_bytes()[:-1000])
    is_refused(folder, folder)
    folder, file = spoilt("missing")
    file.unlink()
    is_refused(folder, folder)
    for name, tensor in (("projector.0.bias", torch.zeros(3)), ("llm.norm.weight", None),
                         ("llm.layers.99.what", torch.zeros(3))):
        folder, file = spoilt(name)
        changed(file, **{name: tensor})
        is_refused(folder, name)
    folder, file = spoilt("shard")
    shard = "model-00001-of-00001.safetensors"
    index = dict(metadata={}, weight_map=dict.fromkeys(load_file(file), shard))
    file.unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    is_refused(folder, shard)


# --------------------------------------------------------------------------------------------------
# Drawing

def test_it_draws(tmp_path, ask, monkeypatch):
    """stdout has the same answers with and without; without, nothing is watched."""
    question = "--q", "What color is the square?"
    with monkeypatch.context() as m:
        m.setattr(maps, "watch", None)
        plain = ask(*question).out
    files = {name: tmp_path / name for name in ("3.png", "4.png", "6.png", "x.html")}
    drawn = ask(*question, "--heatmap", files["3.png"], "--html", files["x.html"], "--layers",
                "1,2")
    assert drawn.out == plain
    assert ask(*question, *question, "--heatmap", files["4.png"]).out == 2 * plain
    beside = ask(*question, "--beside", toy.MODEL, "--quant", "int8", "--heatmap", files["6.png"])
    assert len(beside.out.splitlines()) == 2
    for name in ("3.png", "4.png", "6.png"):
        assert min(Image.open(files[name]).size) > 200
    assert files["x.html"].read_text().startswith("<!DOCTYPE html>")
    assert sorted(tmp_path.iterdir()) == sorted(files.values())


@pytest.mark.parametrize("arguments, names", [
    (["--heatmap", "no/such/x.png"], "no/such"), (["--heatmap", "x.jpg"], ".png"),
    (["--html", "x.txt"], ".html"), (["--layers", "3"], "--heatmap"),
    (["--heatmap", "x.png", "--layers", "a,b"], "a,b"),
    (["--heatmap", "x.png", "--layers", ""], "--layers"), (["--beside", "x"], "--heatmap"),
    (["--chat", "--heatmap", "x.png"], "--chat"),
    (["--q", "again?", "--html", "x.html"], "one --q"), (["--chat", "--q", "again?"], "one --q")])
def test_refusals(arguments, names):
    with pytest.raises(UserError, match=re.escape(names)) as e:
        sample.arguments(["--image", "x.png", "--q", "what?", *arguments])
    assert "\n" not in str(e.value)
