"""What is wrong with annotations or answers is said in one line."""
import json
import re

import pytest

from benchmarks import mmvet
from benchmarks.answers import read_answers
from benchmarks.score import score
from core.common import UserError
from tests.benchmarks.cases import (
    GQA,
    MAKE,
    make_gqa,
    make_mmbench,
    make_mme,
    make_mmmu,
    make_mmvet,
    make_pope,
    make_scienceqa,
    make_vizwiz,
    run,
)
from tests.benchmarks.helpers import fails, line, write_json, write_lines


@pytest.mark.parametrize("task", MAKE)
def test_other_annotations(task, tmp_path):
    """Every other task's annotations, and none at all."""
    lines = read_answers(write_lines(tmp_path / "a.jsonl", MAKE[task](tmp_path)[1]))
    paths = [make_mmvet(tmp_path), tmp_path / "nothing", write_json(tmp_path / "x.json", [1]),
             write_json(tmp_path / "y.json", {"n": 1})]
    for other in MAKE:
        (tmp_path / other).mkdir(exist_ok=True)
        if other != task:
            paths.append(MAKE[other](tmp_path / other)[0])
    for path in paths:
        with pytest.raises(UserError, match="^[^\n]*$"):
            score(task, path, lines)


@pytest.mark.parametrize("task", MAKE)
def test_unknown_missing_and_repeated(task, tmp_path, capsys):
    """As the official scorers take them: some stop, the others get a warning with the count."""
    lines, right = MAKE[task](tmp_path)[1], run(task, tmp_path)["primary"]
    capsys.readouterr()
    stranger = lines[0] | dict(question_id="existence/9.jpg" if task == "mme" else "999999999")
    if task in ("textvqa", "mme", "mmmu", "pope"):
        with fails("no such question", stranger["question_id"]):
            run(task, tmp_path, lines + [stranger])
    else:
        assert run(task, tmp_path, lines + [stranger])["primary"] == right
        assert "warning: 1 answers are ignored" in capsys.readouterr().err
    if task in ("gqa", "vizwiz", "mme"):
        with fails("answer"):
            run(task, tmp_path, lines[1:])
    else:
        less = run(task, tmp_path, lines[1:])["primary"]
        assert re.search(r"warning: \d+ of \d+ questions have no answer: (left out|wrong)",
                         capsys.readouterr().err)
        assert less != right
    with fails("a.jsonl: line", "a second time"):
        run(task, tmp_path, lines + lines[:1])
    with fails("annotations", "another task or version"):
        run(task, tmp_path, [stranger])


def test_bad_lines(tmp_path):
    path, lines = make_gqa(tmp_path)
    file = tmp_path / "a.jsonl"
    for bad, words in [("{", "not a JSON object"), ("[1]", "not a JSON object"),
                       ("[" * 999 + "]" * 999, "not a JSON object"),
                       ('{"text": "x"}', "question_id"),
                       ('{"question_id": true, "text": "x"}', "question_id"),
                       ('{"question_id": 1.5, "text": "x"}', "question_id"),
                       ('{"question_id": 1}', '"text"'),
                       ('{"question_id": 1, "text": null}', '"text"'),
                       ('{"question_id": 1, "text": "x", "prompt": 1}', '"prompt"')]:
        write_lines(file, lines)
        file.write_text(file.read_text() + bad + "\n")
        with fails(f"a.jsonl: line {len(lines) + 1}", words):
            read_answers(file)
    file.write_text("")
    with fails("a.jsonl", "nothing in it"):
        read_answers(file)
    file.write_bytes(b"\xff\n")
    with fails("a.jsonl", "UTF-8"):
        read_answers(file)
    with fails("none.jsonl", "cannot read"):
        read_answers(tmp_path / "none.jsonl")
    write_lines(file, [line(1, "x\u2028y")])         # a line separator inside a text ends no line
    assert read_answers(file)[0].text == "x\u2028y"


def test_what_cannot_be_joined(tmp_path, capsys):
    with fails("line 1", "prompt"):
        run("textvqa", tmp_path, [line("a", "x")])
    with fails("line 1", "prompt"):
        run("textvqa", tmp_path, [line("a", "x", "What is it?")])
    _, lines = make_mme(tmp_path)
    with fails("one of the two questions"):
        run("mme", tmp_path, lines[:-1])
    with fails("no answers for MME's existence"):
        run("mme", tmp_path, [row for row in lines
                              if not row["question_id"].startswith("existence")])
    _, lines = make_pope(tmp_path)
    with fails("line 2", "another question", "version"):
        other = lines[1] | dict(prompt="Is there a cat?")
        run("pope", tmp_path, lines[:1] + [other] + lines[2:])
    with fails("no answers to POPE's popular"):
        run("pope", tmp_path, lines[:-2])
    quiet = run("pope", tmp_path, [row | dict(text="no") for row in lines])
    assert quiet["primary"] == 0.0 and capsys.readouterr().err.count("divides by zero") == 3
    _, lines = make_scienceqa(tmp_path)
    with fails("no prompt holds <image>"):
        run("scienceqa", tmp_path, [row | dict(prompt="w or x?") for row in lines])
    run("scienceqa", tmp_path, [row | dict(prompt="<image>") for row in lines])
    assert "4 prompts and problems.json disagree" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------
# Annotations with holes: what the official files don't have, and others do, is said, neither scored
# nor a traceback

def read_back(folder, lines):
    return read_answers(write_lines(folder / "a.jsonl", lines))


def test_a_table_with_holes(tmp_path):
    path, lines = make_mmbench(tmp_path)
    given, whole = read_back(tmp_path, lines), path.read_text()

    def hide(golds):
        return re.sub(rf"\t[{golds}](?=\t(odd|even)\t)", "\t", whole)

    path.write_text(hide("C"))
    with fails("an answer in every row, or in none"):
        score("mmbench", path, given)
    path.write_text(hide("ABC"))
    assert score("mmbench", path, given)["primary"] is None           # as without such a column
    path.write_text(whole.rstrip("\n") + "\tmore\n")
    with fails("not MMBench's table"):
        score("mmbench", path, given)


def test_annotations_with_holes(tmp_path):
    path, lines = make_vizwiz(tmp_path)
    write_json(path, [row | dict(answers=[]) for row in json.loads(path.read_text())])
    with fails("without answers"):
        score("vizwiz", path, read_back(tmp_path, lines))
    path, lines = make_gqa(tmp_path)
    unbalanced = [row for row, (_, _, balanced, _) in zip(lines, GQA) if not balanced]
    with fails("balanced questions"):
        score("gqa", path, read_back(tmp_path, unbalanced), limited=True)
    folder, lines = make_scienceqa(tmp_path)
    problems = json.loads((folder / "problems.json").read_text())
    sixth = problems["5"] | dict(choices=list("uvwxyz"), answer=5)
    write_json(folder / "problems.json", problems | {"5": sixth})
    with fails("beyond E"):
        score("scienceqa", folder, read_back(tmp_path, lines))
    path, lines = make_mmmu(tmp_path)
    rows = [json.loads(row) for row in path.read_text().splitlines()]
    with fails("mmmu.jsonl", "options"):
        score("mmmu", write_lines(path, [row | dict(options="[]") for row in rows]),
              read_back(tmp_path, lines))
    with fails("mm-vet.json"):
        rows = {"v1_a": dict(question="?", capability=["ocr"])}
        mmvet.read(write_json(tmp_path / "x.json", rows))
