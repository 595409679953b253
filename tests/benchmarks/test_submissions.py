"""What is judged elsewhere: the files to hand in, MM-Vet's grades; and the command, which runs
without torch."""
import json
import math
import os
import re
import subprocess
import sys

import pytest

from benchmarks import mmbench
from benchmarks import score as scoring
from benchmarks.answers import read_answers
from benchmarks.score import score
from core.common import ROOT
from tests.benchmarks.cases import MMBENCH, make_gqa, make_mmbench, make_mmvet, make_vizwiz, run
from tests.benchmarks.helpers import fails, line, write_json, write_lines


def test_mmvet(tmp_path):
    path = make_mmvet(tmp_path)
    grades = {f"v1_{i}": dict(score=runs)
              for i, runs in enumerate([[1.0, 0.9], [0.0, 0.0], [0.5, 0.5], [0.2, 0.2]])}
    given = write_json(tmp_path / "grades.json", grades)
    result = score("mmvet", path, [], given)
    # runs: 42.5 and 40; of ocr 56.67 and 53.33
    # questions: 0.95, 0, 0.5, 0.2
    off = 196 * math.sqrt(sum((x - 0.4125) ** 2 for x in (0.95, 0, 0.5, 0.2)) / 3 / 4)
    assert result["primary"] == 41.2 and result["metrics"] == dict(
        total=41.2, math=72.5, ocr=55.0, rec=0.0, margin=pytest.approx(off), n=4, runs=2,
        sets=dict(math_ocr=72.5, ocr=20.0, rec=0.0))
    for bad, words in [({"v1_9": dict(score=[1, 1])}, "v1_9"),
                       ({"v1_0": dict(score=[1])}, "as many runs"),
                       ({"v1_0": dict(score=[1, 2])}, "grades"), ({"v1_0": 3}, "score")]:
        with fails("grades.json", words):
            score("mmvet", path, [], write_json(given, grades | bad))
    less = {f"v1_{i}": dict(score=[1]) for i in range(3)}
    with fails("1 of 4", "v1_3"):
        score("mmvet", path, [], write_json(given, less))


def test_mmbench_upload(tmp_path, monkeypatch):
    path, lines = make_mmbench(tmp_path)
    given = read_answers(write_lines(tmp_path / "a.jsonl", lines[1:]))
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "openpyxl", None)
        with fails("openpyxl"):
            mmbench.submit(path, given, tmp_path / "up.xlsx")
    openpyxl = pytest.importorskip("openpyxl")
    mmbench.submit(path, given, tmp_path / "up.xlsx")
    table = list(openpyxl.load_workbook(tmp_path / "up.xlsx").active.values)
    assert table[0] == ("index", "question", "A", "B", "C", "D", "prediction", "answer", "split")
    assert table[1] == (1, 'What "is"\nit?', "dog", "cat", "cow", None, None, "B", "dev")
    assert [row[6] for row in table[2:]] == [row[-1] for row in MMBENCH[1:]] and len(table) == 11


# --------------------------------------------------------------------------------------------------
# The command

def command(*words):
    """eval.py --score WORDS in a process without torch: (exit status, stdout, stderr)."""
    env = os.environ | dict(PYTHONPATH=str(ROOT / "tests" / "without_torch"))
    done = subprocess.run([sys.executable, str(ROOT / "eval.py"), "--score", *map(str, words)],
                          capture_output=True, text=True, env=env)
    return done.returncode, done.stdout, done.stderr


def test_the_command(tmp_path):
    path, lines = make_gqa(tmp_path)
    given = write_lines(tmp_path / "a.jsonl", lines)
    both = ["--annotations", str(path), "--predictions", str(given)]
    status, out, err = command("gqa", *both, "--json")
    assert (status, err) == (0, "") and out.count("\n") == 1
    assert json.loads(out) == run("gqa", tmp_path)
    status, out, err = command("gqa", *both)
    assert (status, err) == (0, "") and out.startswith("gqa: 57.14\n")
    assert re.search(r"\n  binary +66\.67\n", out)
    status, out, err = command("gqa")
    assert (status, out) == (2, "") and err.count("\n") == 1
    assert err.startswith("error: ") and "--annotations" in err
    for words, said in [(both[:2], "--predictions"), (both + ["--grades", str(path)], "mmvet"),
                        (both + ["--submission", str(path)], "--submission")]:
        with fails(said):
            scoring.main(["--score", "gqa", *words])


def test_mmvet_without_grades_is_handed_in(tmp_path):
    lines = [line(i, f"text\n{i} \u00e9") for i in (2, 0, 1, 3)]
    path = write_lines(tmp_path / "a.jsonl", lines)
    status, out, err = command("mmvet", "--annotations", make_mmvet(tmp_path), "--predictions",
                               path, "--json")
    assert (status, json.loads(out)) == (0, dict(task="mmvet", primary=None, metrics={}))
    assert "--grades" in err
    written = (tmp_path / "a-submission.json").read_text()
    wanted = {f"v1_{row['question_id']}": row["text"] for row in lines}
    assert written == json.dumps(wanted, indent=2)


def test_vizwiz_test_is_handed_in(tmp_path):
    path, lines = make_vizwiz(tmp_path)
    hidden = [dict(image=row["image"], question="?") for row in json.loads(path.read_text())]
    hidden = write_json(tmp_path / "test.json", hidden)
    given, to = write_lines(tmp_path / "a.jsonl", lines[::-1]), tmp_path / "up.json"
    status, out, err = command("vizwiz", "--annotations", hidden, "--predictions", given,
                               "--submission", to)
    assert status == 0 and "judged elsewhere" in out and "eval.ai" in err
    up = json.loads(to.read_text())
    assert [row["answer"] for row in up] == ["joe 's", "2", "don't", "unanswerable", "cat", "1000"]
    assert up[1] == dict(image="VizWiz_val_00000001.jpg", answer="2")
    with fails("1 of 6", "(first: 5)"):
        score("vizwiz", hidden, read_answers(write_lines(given, lines[:-1])))


def test_vizwiz_skips_bad_lines(tmp_path):
    """As LLaVA's script for it does."""
    path, lines = make_vizwiz(tmp_path)
    file = write_lines(tmp_path / "a.jsonl", lines)
    file.write_text(file.read_text() + "{\n")
    status, out, err = command("vizwiz", "--annotations", path, "--predictions", file, "--json")
    assert status == 0 and json.loads(out)["primary"] == 41.67 and "1 lines are not JSON" in err
