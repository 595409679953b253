"""sample.py as a user meets it: answers on stdout; one clear line and a non-zero exit for whatever
is wrong."""
import io
import json
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

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


def test_a_chat_has_a_way_on(ask, monkeypatch):
    """A key that can't be edited with, bytes that are no text, a full context."""
    lines = b"Is there \x1b[Dan owl?\n\xff?\n/image \xff.png\nIs there an owl?\nAnd a dog?\n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines), encoding="utf-8"))
    monkeypatch.setattr(sample.Asker, "context", 80)    # the first takes 76 and one, both 84
    out, err = ask("--chat")
    assert len(out.splitlines()) == 1
    said = [line for line in err.replace("> ", "").splitlines() if line.startswith("error")]
    for line, words in zip(said, ["type it again", "isn't valid Unicode", "no such image",
                                  "no room for another answer"], strict=True):
        assert words in line
    assert "80 positions; /new begins anew" in said[-1]


def test_an_answer_that_is_cut_says_so(ask):
    question = "--q", "What word is printed?", "--max-new-tokens"
    assert "[cut off after 1 token: --max-new-tokens]" in ask(*question, 1).err
    assert "cut off" not in ask(*question, 64).err
    asker = sample.Asker.__new__(sample.Asker)
    asker.args, asker.model = sample.arguments(["--image", "x", "--q", "x"]), SimpleNamespace(
        llm=SimpleNamespace(config=SimpleNamespace(max_position_embeddings=512)))
    assert asker.cut(2) == "cut off after 2 tokens: the language model's 512 positions are full"


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
# A file of questions

def write_lines(file, *rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def answered(text):
    return [json.loads(line) for line in text.splitlines()]


def test_a_file_of_questions(tmp_path, ask, capsys):
    """In order and in batches the answers are those to single questions; what can't be read is
    said, and the rest goes on."""
    words = ["How many donuts are there?", "What color is the square?", "What word is printed?"]
    shutil.copy(SCENE, tmp_path / "a.png")
    (tmp_path / "bad.png").write_text("no picture")
    alone = ask(*(word for q in words for word in ("--q", q))).out.splitlines()
    file = write_lines(
        tmp_path / "q.jsonl", dict(image="a.png", question=words[0], question_id="x"),
        dict(image=["a.png"], prompt=words[1]), dict(image="bad.png", text="Why?", question_id=7),
        dict(image="./a.png", text=words[2]), dict(image="gone.png", question="Why?"),
        dict(image=None, question="Why?"))
    command = ["--questions", str(file), "--batch", "2"]
    with pytest.raises(UserError, match="2 of 6 questions have no answer.*bad.png"):
        sample.main(command)
    out, err = capsys.readouterr()
    rows = answered(out)
    assert [row["question_id"] for row in rows] == ["x", 2, 7, 4, 5, 6]
    assert [row["prompt"] for row in rows] == [words[0], words[1], "Why?", words[2], "Why?", "Why?"]
    assert [rows[i]["text"] for i in (0, 1, 3)] == alone and "text" in rows[5]
    assert "bad.png" in rows[2]["error"] and "gone.png: no such image" in rows[4]["error"]
    assert [line.partition(":")[0] for line in err.splitlines()] == ["error", "error"]
    (tmp_path / "bad.png").write_bytes(SCENE.read_bytes())
    shutil.copy(SCENE, tmp_path / "gone.png")
    to = tmp_path / "answers.jsonl"
    sample.main([*command, "--answers", str(to), "--max-new-tokens", "1"])
    assert "of 6 questions: cut off after 1 token" in capsys.readouterr().err
    rows = answered(to.read_text())
    assert all("error" not in row for row in rows) and "cut" in rows[3]
    assert sorted(path.name for path in tmp_path.glob("answers*")) == ["answers.jsonl"]


def test_an_interrupted_file_keeps_its_answers(tmp_path, monkeypatch, capsys):
    shutil.copy(SCENE, tmp_path / "a.png")
    file = write_lines(tmp_path / "q.jsonl", *[dict(image="a.png", question="Is it?")] * 3)
    reply, calls = sample.reply_ids, []

    def once(*given):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return reply(*given)

    monkeypatch.setattr(sample, "reply_ids", once)
    with pytest.raises(KeyboardInterrupt):
        sample.main(["--questions", str(file), "--batch", "1", "--answers", str(tmp_path / "o")])
    assert f"what was answered is in {tmp_path / 'o.part'}" in capsys.readouterr().err
    assert len(answered((tmp_path / "o.part").read_text())) == 1 and not (tmp_path / "o").exists()


@pytest.mark.parametrize("row, names", [
    (dict(image="a.png"), "question"), (dict(image="a.png", question=" "), "question"),
    (dict(question="x"), 'no "image"'), (dict(image=["a.png"] * 2, question="x"), "2 pictures"),
    (dict(image=3, question="x"), "path"), (dict(image="a\0.png", question="x"), "path"),
    (dict(image="../a.png", question="x"), "--images"), (dict(image="/a.png", question="x"), "out"),
    (dict(image="a.png", question="x", question_id=[1]), "question_id"), ([1], "JSON object"),
    (dict(image="a.png", question="\ud800"), "question")])
def test_bad_lines(tmp_path, row, names):
    shutil.copy(SCENE, tmp_path / "a.png")
    file = write_lines(tmp_path / "q.jsonl", dict(image="a.png", question="x"), row)
    with pytest.raises(UserError, match=f"q.jsonl: line 2.*{names}"):
        sample.main(["--questions", str(file)])


def test_bad_files_of_questions(tmp_path):
    shutil.copy(SCENE, tmp_path / "a.png")
    file = write_lines(tmp_path / "q.jsonl", dict(image="a.png", question="why " * 3000))
    for words, said in [([], "line 1: the question is too long"),
                        (["--images", str(tmp_path / "no")], "none of its pictures is there"),
                        (["--answers", str(file)], "give another"),
                        (["--answers", str(tmp_path)], "should be a file"),
                        (["--answers", str(tmp_path / "no" / "x")], "should be a file"),
                        (["--temperature", "1"], "greedy"), (["--chat"], "--chat")]:
        with pytest.raises(UserError, match=said):
            sample.main(["--questions", str(file), *words])


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
    (["--q", "again?", "--html", "x.html"], "one --q"), (["--chat", "--q", "again?"], "one --q"),
    (["--image", "y.png"], "one picture"), (["--images", "x"], "--images is for --questions"),
    (["--answers", "x"], "--questions"), (["--questions", "x"], "--image doesn't go with")])
def test_refusals(arguments, names):
    with pytest.raises(UserError, match=re.escape(names)) as e:
        sample.arguments(["--image", "x.png", "--q", "what?", *arguments])
    assert "\n" not in str(e.value)
