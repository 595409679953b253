"""docs/your_data.md: its scripts, run as a reader would, on a small easy-VQA and on spreadsheets as
people have them; its commands, as far as their flags go."""
import json
import re
import runpy
import shlex
import sys

import pytest

import data
import eval as evaluation
import sample
from core.common import ROOT
from core.tokenizer import Tokenizer
from toy import world as toy
from training import options

PAGE = (ROOT / "docs" / "your_data.md").read_text(encoding="utf-8")
FENCED = re.findall(r"^```(\w*)\n(.*?)^```$", PAGE, re.M | re.S)
# a script's first line is a comment with the file that it is to be saved as
SCRIPTS = {re.match(r"# \S+/(\w+)\.py", text)[1]: text
           for language, text in FENCED if language == "python"}
SHEET = "image,question,answer,kind\na.png,what is it?,a cat,shape\nb.png,is it?,yes,presence\n"


@pytest.fixture
def place(tmp_path):
    """A folder with the page's scripts, and two pictures."""
    for name, text in SCRIPTS.items():
        (tmp_path / f"{name}.py").write_text(text, encoding="utf-8")
    for name in "a.png", "b.png":
        (tmp_path / name).write_bytes((ROOT / "assets" / "scene.png").read_bytes())
    return tmp_path


@pytest.fixture
def start(monkeypatch, capsys):
    """Run a script of the page: (what it printed, the error that ended it)."""
    def run(script, *words):
        monkeypatch.setattr(sys, "argv", [str(script), *map(str, words)])
        try:
            runpy.run_path(str(script), run_name="__main__")
        except SystemExit as end:
            return capsys.readouterr().out, end.code
        return capsys.readouterr().out, None
    return run


@pytest.fixture
def convert(place, start):
    """What the page's script makes of a spreadsheet: (records or None, its error)."""
    def records(content, encoding="utf-8"):
        (place / "my.csv").write_bytes(content.encode(encoding))
        said, error = start(place / "convert.py", place / "my.csv", place, place / "my.json")
        assert (error is None) == (place / "my.json").exists() == (said != "")
        if error:
            return None, error.replace(f"{place}/", "")
        written = (place / "my.json").read_text("utf-8")
        (place / "my.json").unlink()
        return json.loads(written), None
    return records


# --------------------------------------------------------------------------------------------------
# easy-VQA

def easy_vqa(package, pictures):
    """A package laid out as easy-vqa 1.0 is: [question, answer, picture], and pictures by number.
    """
    for part, count in pictures.items():
        (package / "data" / part / "images").mkdir(parents=True)
        for i in range(count):
            image = (ROOT / "assets" / "scene.png").read_bytes()
            (package / "data" / part / "images" / f"{i}.png").write_bytes(image)
        asked = [[question, answer, i] for i in range(count) for question, answer in (
            ("what color is the shape?", "teal"), ("what shape is present?", "circle"),
            ("is there a circle?", "yes"), ("does the image not contain a circle?", "no"))]
        (package / "data" / part / "questions.json").write_text(json.dumps(asked))
    (package / "__init__.py").write_text("")


def test_easy_vqa(place, start, monkeypatch):
    """Every question is a record of one turn, with its kind; 200 pictures of the training part are
    held out."""
    easy_vqa(place / "site" / "easy_vqa", dict(train=203, test=2))
    monkeypatch.syspath_prepend(place / "site")
    monkeypatch.delitem(sys.modules, "easy_vqa", raising=False)
    assert start(place / "sheets.py") == ("", None)
    assert sys.modules.pop("easy_vqa").__file__.startswith(str(place))
    tokenizer, pictures = Tokenizer.from_pretrained(toy.MODEL), {}
    for name, count in (("train", 3), ("val", 200), ("test", 2)):
        out = place / f"{name}.json"
        said = start(place / "convert.py", place / f"{name}.csv", place, out)
        assert said == (f"{out}: {4 * count} records\n", None)
        records = json.loads(out.read_text())
        assert [record["kind"] for record in records[:4]] == ["color", "shape", "presence",
                                                              "negation"]
        assert [len(record["conversations"]) for record in records] == [2] * 4 * count
        pictures[name] = {record["image"] for record in records}
        assert len(pictures[name]) == count
        assert len(data.load(out, place, tokenizer)) == len(records)
    assert not pictures["train"] & pictures["val"]
    assert pictures["test"] == {"test/0.png", "test/1.png"}


# --------------------------------------------------------------------------------------------------
# A spreadsheet of one's own

def test_a_record(convert):
    records, _ = convert(SHEET)
    assert records[0] == {
        "id": "my-2", "image": "a.png", "kind": "shape", "conversations": [
            {"from": "human", "value": "<image>\nwhat is it?"}, {"from": "gpt", "value": "a cat"}]}


@pytest.mark.parametrize("content, encoding", [
    (SHEET, "utf-8-sig"),                                             # as Excel writes it
    (SHEET.replace("\n", "\r\n"), "utf-8"),
    (SHEET.replace(",", ";"), "utf-8-sig"),                           # as Excel does in Europe
    (SHEET.replace(",", "\t"), "utf-8"),
    (SHEET.replace("image,question", " Image , QUESTION"), "utf-8"),
    (SHEET.replace("a cat", '" a cat "'), "utf-8"),
])
def test_sheets_as_people_have_them(convert, content, encoding):
    records, error = convert(content, encoding)
    assert (records, error) == convert(SHEET)


def test_blank_rows_and_columns_that_nobody_reads(convert):
    """The numbers are those of the spreadsheet's rows, blank ones counted."""
    records, _ = convert("answer,note,image,question\n\n,,,\nyes,?,a.png,is it?\n \n"
                         "no,,b.png,\"is it, \"\"or\"\" not\nthen?\"\n")
    assert [record["id"] for record in records] == ["my-4", "my-6"]
    assert records[1]["conversations"][0]["value"] == '<image>\nis it, "or" not\nthen?'
    assert "kind" not in records[0]


@pytest.mark.parametrize("content, error", [
    (SHEET + "c.png,is it?,no,\n", "my.csv: row 4: no picture c.png"),
    (SHEET + "\n,is it?,no,\n", "my.csv: row 5 has no image"),
    (SHEET + "a.png,is it?\n", "my.csv: row 4 has no answer"),
    (SHEET + "a.png,is it, or not?,no,\n",
     "my.csv: row 4 has 5 cells, the first row 4: text with a ',' in it needs quotes"),
    (SHEET + "a.png,\"is it?,no,\n", "my.csv: line 4: unexpected end of data"),
    ("picture,question\na.png,is it?\n", "my.csv: the first row names no column image, answer"),
    ("image,question,answer\n\n", "my.csv: no row but the first"),
    ("", "my.csv: the first row names no column image, question, answer"),
])
def test_what_is_wrong_is_a_line_and_nothing_is_written(convert, content, error):
    assert convert(content) == (None, f"error: {error}")


def test_a_file_that_is_no_csv(place, start, convert):
    assert convert(SHEET.replace("cat", "caf\xe9"), "latin-1") == (
        None, "error: my.csv: save it as CSV UTF-8")
    _, error = start(place / "convert.py", place / "no.csv", place, place / "no.json")
    assert error.endswith("no.csv: No such file or directory")


# --------------------------------------------------------------------------------------------------
# The page

def commands(start):
    """The words behind `start` in the page's commands that begin so."""
    lines = "".join(text for language, text in FENCED if not language).replace("\\\n", " ")
    return [shlex.split(line.removeprefix(start)) for line in lines.splitlines()
            if line.startswith(f"{start} ")]


def test_the_scripts_are_those_two():
    assert sorted(SCRIPTS) == ["convert", "sheets"]
    assert all(len(line) <= 100 for text in SCRIPTS.values() for line in text.splitlines())


def test_its_commands_have_flags_that_there_are(monkeypatch):
    trainings = commands("python train.py")
    assert len(trainings) == 3 and all(options.arguments(words).lora or "projector" in words
                                       for words in trainings)
    [exam, adapted] = map(evaluation.arguments, commands("python eval.py"))
    assert exam.task.endswith(".json") and exam.images and adapted.adapter
    assert all(sample.arguments(words).q for words in commands("python sample.py"))
    assert len(commands("python data.py show")) == len(commands("python -m training.merge")) == 1
    monkeypatch.setenv("WORLD_SIZE", "2")
    [words] = commands("torchrun --nproc_per_node=2 train.py")
    assert options.arguments(words).keep_best


def test_it_is_a_page():
    assert len(PAGE.split()) < 1500
