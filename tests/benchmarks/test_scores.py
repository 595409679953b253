"""Each benchmark's score on small annotations of its own, against numbers worked out by hand
(cases.py)."""
import json
import math
import random
import sys

import pytest

from benchmarks import pope
from benchmarks.answers import read_answers
from benchmarks.score import score
from benchmarks.statistics import margin
from tests.benchmarks.cases import (
    EXPECTED,
    MAKE,
    MMMU,
    POPE,
    make_mmmu,
    make_pope,
    make_scienceqa,
    run,
)
from tests.benchmarks.helpers import fails, line, write_json, write_lines


def subset(wanted, found):
    for name, value in wanted.items():
        if isinstance(value, dict):
            assert value.keys() <= found[name].keys()
            subset(value, found[name])
        else:
            assert found[name] == pytest.approx(value, abs=1e-9), name


@pytest.mark.parametrize("task", EXPECTED)
def test_numbers(task, tmp_path):
    result = run(task, tmp_path)
    primary, metrics = EXPECTED[task]
    assert result.keys() == {"task", "primary", "metrics"} and result["task"] == task
    assert result["primary"] == pytest.approx(primary, abs=1e-9)
    subset(metrics, result["metrics"])


# --------------------------------------------------------------------------------------------------
# Margins

def off(*parts):
    """1.96 standard errors of a sum of means, in percent."""
    def variance(x):
        return sum((a - sum(x) / len(x)) ** 2 for a in x) / (len(x) - 1) / len(x)

    return pytest.approx(196 * math.sqrt(sum(map(variance, parts))))


def test_margins(tmp_path):
    """By hand where it is a mean or a sum of means."""
    found = {}
    for task in MAKE:
        (tmp_path / task).mkdir()
        found[task] = run(task, tmp_path / task)["metrics"]["margin"]
    assert found["gqa"] == off([1, 1, 0, 0, 0, 1, 1])
    assert found["textvqa"] == off([1, 0.9, 0.3, 1, 0.6, 0, 1, 1])
    assert found["scienceqa"] == off([1] * 7 + [0] * 3)
    assert found["vizwiz"] == off([0, 0, 0.6, 0.9, 0, 1])
    assert found["mmbench"] == off([1, 0, 1, 0, 1])
    assert found["seed"] == off([1, 0, 0, 0, 0, 1, 0])
    assert found["mmmu"] == off([1] * 7 + [0] * 4)
    assert found["mme"] == off([2, 0.5])                   # existence: of a picture 1 + 1, 0.5 + 0
    said = [(pope.said(text), label) for text, label in POPE]
    thirds = [[x / 3 for x in pope.f1_shares(pairs)] for pairs in (said, said, [said[0], said[2]])]
    assert found["pope"] == pytest.approx(margin(*thirds))                     # of a mean of three


def test_margin_of_F1_is_that_of_resampled_answers():
    luck, draws, made = random.Random(0), [], {}
    for name, counts in dict(random=(90, 30, 40, 40), popular=(50, 50, 20, 80)).items():
        kinds = [("yes", "yes"), ("yes", "no"), ("no", "yes"), ("no", "no")]
        made[name] = [kind for kind, n in zip(kinds, counts) for _ in range(n)]
    for pairs in made.values():
        assert sum(pope.f1_shares(pairs)) / 2 == pytest.approx(pope.measures(pairs)["f1"])
    for _ in range(2000):
        draws.append(sum(pope.measures(luck.choices(pairs, k=200))["f1"]
                         for pairs in made.values()))
    mean = sum(draws) / 2000
    spread = math.sqrt(sum((x - mean) ** 2 for x in draws) / 2000)
    assert 1.96 * spread == pytest.approx(margin(*map(pope.f1_shares, made.values())), rel=0.06)


# --------------------------------------------------------------------------------------------------
# Files and ids in their other forms

def test_scienceqa_without_prompts_goes_by_the_question_file(tmp_path):
    folder, lines = make_scienceqa(tmp_path, prompts=False)
    given = read_answers(write_lines(tmp_path / "a", lines))
    assert score("scienceqa", folder, given)["primary"] == 70.0
    (folder / "llava_test_CQM-A.json").unlink()
    with fails("llava_test_CQM-A.json", "prompts"):
        score("scienceqa", folder, given)


def test_mmmu_answer_key_takes_the_bare_letter(tmp_path):
    key = {f"validation_Music_{i}": dict(question_type="multiple-choice", ground_truth="B")
           for i in (1, 2)}
    for id, kind, _, gold, _ in MMMU:
        gold = json.loads(gold.replace("'", '"')) if gold.startswith("[") else gold
        key[f"validation_{id}"] = dict(question_type=kind.replace("open", "short-answer"),
                                       ground_truth=gold)
    path = write_json(tmp_path / "answer_dict_val.json", key)
    lines = make_mmmu(tmp_path)[1] + [line("validation_Music_1", "B")]
    for wrong in ("B.", ""):
        more = lines + [line("validation_Music_2", wrong)]
        result = score("mmmu", path, read_answers(write_lines(tmp_path / "a", more)))
        assert result["primary"] == pytest.approx(400 / 13)
        assert result["metrics"]["without_luck"] == result["primary"]


def test_mme_pairs_by_picture_and_pope_by_id(tmp_path):
    """In whatever order the lines are: the official scripts pair them by place, and would be
    wrong."""
    for task in ("mme", "pope"):
        folder = tmp_path / task
        folder.mkdir()
        assert run(task, folder) == run(task, folder, MAKE[task](folder)[1][::-1])


def test_pope_ids_may_count_from_zero(tmp_path):
    folder, lines = make_pope(tmp_path)
    lines = [row | dict(question_id=row["question_id"] - 1) for row in lines]
    assert run("pope", folder, lines)["primary"] == pytest.approx(EXPECTED["pope"][0])
    with fails("no such question", "20000000"):      # not all: a place can't be told from an id
        run("pope", folder, lines[:-1])


def test_parquet(tmp_path, monkeypatch):
    path, lines = make_mmmu(tmp_path)
    given = read_answers(write_lines(tmp_path / "a.jsonl", lines))
    part = tmp_path / "Math" / "validation-0.parquet"
    part.parent.mkdir()
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "pyarrow", None)
        part.write_bytes(b"PAR1")
        with fails("pyarrow", ".jsonl"):
            score("mmmu", part, given)
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet
    rows = [json.loads(row) for row in path.read_text().splitlines()]
    parquet.write_table(pyarrow.Table.from_pylist(rows[:6]), part)
    parquet.write_table(pyarrow.Table.from_pylist(rows[6:]), tmp_path / "validation-1.parquet")
    assert score("mmmu", tmp_path, given)["primary"] == pytest.approx(EXPECTED["mmmu"][0])
