"""eval.py: the bundled model's exam about the toy world; tiny benchmarks, answered by any number of
processes, killed and resumed, scored, shown beside Table 1."""
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch

import eval as evaluation
from benchmarks import TASKS, ask, table1
from benchmarks.answers import read_answers
from benchmarks.score import score
from ccra import VLM, CCRAConfig
from clip import CLIPVision, read_pixels
from core.common import ROOT, UserError
from core.tokenizer import Tokenizer
from llama import Llama
from tests.benchmarks.helpers import fails, write_json
from tests.benchmarks.layouts import READABLE, make_all
from toy import exam, questions
from toy import world as toy

# --------------------------------------------------------------------------------------------------
# The toy world

def test_held_out_accuracy():
    """320 questions, as `python eval.py --task toy` asks 4,000 for the README; these 320 give
    97.8%."""
    model = VLM.from_pretrained(toy.MODEL, dtype=torch.float32).eval()
    tokenizer = Tokenizer.from_pretrained(toy.MODEL)
    items, cpu = exam.exam(7, 320), torch.device("cpu")
    seen = exam.score(items, evaluation.sit(model, tokenizer, items, 80, cpu))
    grey = exam.score(items, evaluation.sit(model, tokenizer, items, 80, cpu, grey=True))
    assert seen["accuracy"] >= 0.96 and seen["n"] == 320
    assert set(seen["kinds"]) == set(questions.QUESTIONS)
    assert grey["accuracy"] <= 0.45


def test_batched_answers_are_the_single_ones():
    """Follow-ups included: their prompts hold what the model itself answered before."""
    model = VLM.from_pretrained(toy.MODEL, dtype=torch.float32).eval()
    tokenizer = Tokenizer.from_pretrained(toy.MODEL)
    items, cpu = exam.exam(3, 24), torch.device("cpu")
    at_once = evaluation.sit(model, tokenizer, items, 24, cpu)
    assert at_once == evaluation.sit(model, tokenizer, items, 1, cpu)


# --------------------------------------------------------------------------------------------------
# The benchmarks


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder of the ten."""
    at = tmp_path_factory.mktemp("eval")
    make_all(at)
    return at


@pytest.fixture(scope="module")
def model(towers, tmp_path_factory):
    """A tiny model that says much nonsense."""
    at = tmp_path_factory.mktemp("model")
    torch.manual_seed(1)
    vision = CLIPVision.from_pretrained(towers / "clip")
    vlm = VLM.build(vision, Llama.from_pretrained(towers / "llama"), CCRAConfig(32, 16, 3, 8))
    vlm.save_pretrained(at, toy.MODEL / "tokenizer.model")
    return at


@pytest.fixture(scope="module", autouse=True)
def short():
    """Answers of 16 tokens, but to the tasks that other processes answer, too."""
    with pytest.MonkeyPatch.context() as patch:
        for task in TASKS.keys() - {"pope", "vizwiz"}:
            patch.setattr(TASKS[task], "MAX_NEW_TOKENS", 16)
        yield


def command(data, model, out, *more, tasks=READABLE):
    return ["--task", ",".join(tasks), "--data", str(data), "--model", str(model), "--out",
            str(out), "--batch", "3", "--threads", "1", "--device", "cpu", *more]


def results(out):
    """results.json without the times, as text."""
    content = json.loads((out / "results.json").read_text())
    assert content.pop("seconds").keys() == content["tasks"].keys()
    return json.dumps(content)


@pytest.fixture(scope="module")
def whole(data, model, tmp_path_factory):
    """One process, undisturbed."""
    out, threads = tmp_path_factory.mktemp("whole"), torch.get_num_threads()
    evaluation.main(command(data, model, out))
    torch.set_num_threads(threads)
    return out


def test_every_task_end_to_end(data, model, whole):
    content = json.loads((whole / "results.json").read_text())
    assert list(content["tasks"]) == READABLE and content["decoding"] == "greedy"
    assert content["weights"][:7] == "sha256:"
    files = sorted(f.name for f in whole.glob("*.jsonl"))
    assert files == sorted(f"{task}.jsonl" for task in READABLE)
    for task in READABLE:
        path, entry = ask.annotations(task, data), content["tasks"][task]
        asked = ask.questions(task, data, path)
        rows = [json.loads(row) for row in (whole / f"{task}.jsonl").read_text().splitlines()]
        assert [(row["question_id"], row["prompt"]) for row in rows] == [
            (q.id, q.prompt) for q in asked]
        assert any(row["text"] for row in rows) and entry["questions"] == len(asked)
        assert entry["prompt"] == TASKS[task].TEMPLATE
        assert entry["max_new_tokens"] == TASKS[task].MAX_NEW_TOKENS
        assert "error" not in entry and "unread" not in entry
        given = read_answers(whole / f"{task}.jsonl")
        again = score(task, path, given, limited=task == "seed")
        assert (entry["score"], entry["metrics"]) == (again["primary"], again["metrics"])
        if task == "mmvet":
            assert entry["score"] is None
            assert len(json.loads((whole / "mmvet-submission.json").read_text())) == 3
        else:
            low, high = entry["interval"]
            assert low <= entry["score"] <= high
            assert high - low == pytest.approx(2 * again["metrics"]["margin"])


def test_rehearsal(data, tmp_path, model):
    """Annotations that can be asked but not scored."""
    rows = json.loads((data / "gqa/data/testdev_balanced_questions.json").read_text())
    for row in rows.values():
        del row["answer"]
    path = write_json(tmp_path / "q.json", rows)
    with fails("q.json", "answer"):
        evaluation.main(["--task", "gqa", "--data", str(data), "--annotations", str(path),
                         "--model", str(model), "--out", str(tmp_path / "out")])


def start(arguments, size):
    """The processes that torchrun would start."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    env = {**os.environ, "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size),
           "MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    running = []
    for rank in range(size):
        who = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        running.append(subprocess.Popen([sys.executable, ROOT / "eval.py", *arguments],
                                        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                                        text=True, env=env | who))
    return running


def test_killed_and_resumed_by_others(data, model, whole, tmp_path):
    """Two processes are killed at work, three go on: results.json and all answers are those of one
    process."""
    tasks = ["pope", "vizwiz"]
    arguments = command(data, model, tmp_path, tasks=tasks)
    alone = json.loads((whole / "results.json").read_text())
    running, began = start(arguments, 2), time.monotonic()
    while sum(len(f.read_bytes().splitlines()) for f in tmp_path.glob("pope.*.jsonl")) < 2:
        assert running[0].poll() is None, running[0].stderr.read()
        assert time.monotonic() - began < 300
        time.sleep(0.01)
    for process in running:
        process.send_signal(signal.SIGKILL)
        process.wait()
    torn = max(tmp_path.glob("pope.*.jsonl"))
    # as a kill inside of a write leaves it
    torn.write_bytes(torn.read_bytes() + b'{"question_id": 1, "prom')
    held = json.loads((tmp_path / "results.json").read_text())
    assert held["tasks"] == {}                                 # but it says whose answers these are
    with fails("limit 0, not 1", "--out"):
        evaluation.main(arguments + ["--limit", "1"])
    for process in (running := start(arguments, 3)):
        assert process.wait(300) == 0, process.stderr.read()
    content = json.loads(results(tmp_path))
    assert content["tasks"] == {task: alone["tasks"][task] for task in TASKS if task in tasks}
    for task in tasks:
        assert (tmp_path / f"{task}.jsonl").read_bytes() == (whole / f"{task}.jsonl").read_bytes()


def test_resumed_alone(data, model, whole, tmp_path, one_thread, capsys):
    """From any part of the answers, and nothing is asked twice; other settings don't mix."""
    rows = (whole / "pope.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "pope.1.jsonl").write_text("".join(rows[::2]) + rows[1][:-5])
    (tmp_path / "pope.0.jsonl").write_text(rows[3])
    again = command(data, model, tmp_path, tasks=["pope"])
    evaluation.main(again)
    assert (tmp_path / "pope.jsonl").read_text() == "".join(rows)
    assert not list(tmp_path.glob("pope.?.jsonl"))
    once = results(tmp_path)
    evaluation.main(again)
    assert results(tmp_path) == once and "0answer" in capsys.readouterr().err
    evaluation.main(command(data, model, tmp_path, tasks=["vizwiz"]))          # joins the others
    assert list(json.loads(results(tmp_path))["tasks"]) == ["vizwiz", "pope"]
    with fails("limit 0, not 1", "--out"):
        evaluation.main(again + ["--limit", "1"])
    with fails("weights", "--out"):
        evaluation.main(command(data, toy.MODEL, tmp_path, tasks=["pope"]))
    other = shutil.copytree(model, tmp_path / "other")           # Table 4's ablation, for instance
    config = json.loads((other / "config.json").read_text())
    config["fuser"]["lpwca"] = False
    write_json(other / "config.json", config)
    with fails("config sha256", "--out"):
        evaluation.main(command(data, other, tmp_path, tasks=["pope"]))
    stranger = rows[0].replace("adversarial", "x")
    (tmp_path / "pope.jsonl").write_text("".join(rows[:-1]) + stranger)
    with fails(f"pope.jsonl: line {len(rows)}", "--out"):
        evaluation.main(again)


def test_a_part_of_them(data, model, tmp_path, one_thread, capsys):
    """--limit is scored as if there were no others; a split without answers is handed in."""
    tasks = [task for task in READABLE if task != "mme"]
    evaluation.main(command(data, model, tmp_path / "a", "--limit", "1", tasks=tasks))
    found = json.loads((tmp_path / "a/results.json").read_text())["tasks"]
    metrics = {task: entry["metrics"] for task, entry in found.items()}
    assert metrics["gqa"]["n"] == 1 and metrics["vizwiz"]["n"] == 1
    assert metrics["mmbench"]["n_rows"] == 2 and metrics["scienceqa"]["n"] == 2
    assert "have no answer" not in capsys.readouterr().err
    assert not list((tmp_path / "a").glob("*submission*"))
    test = ["--annotations", str(data / "vizwiz/test.json")]
    evaluation.main(command(data, model, tmp_path / "b", *test, tasks=["vizwiz"]))
    upload = json.loads((tmp_path / "b/vizwiz-submission.json").read_text())
    assert [row["image"] for row in upload] == ["VizWiz_test_00000000.jpg"]
    assert "eval.ai" in capsys.readouterr().err


def test_what_cannot_be_asked_keeps_nobody_waiting(data, model, whole, tmp_path, capsys,
                                                    one_thread):
    """The others are asked and scored as before; in the end it is an error."""
    broken = shutil.copytree(data, tmp_path / "data")
    shutil.rmtree(broken / "vizwiz")
    (broken / "gqa/data/images/p1.jpg").write_bytes(b"")
    rows = json.loads((broken / "mm-vet/mm-vet.json").read_text())
    rows["v1_1"]["imagename"] = "../../vizwiz/val.json"
    write_json(broken / "mm-vet/mm-vet.json", rows)
    tasks = ["gqa", "vizwiz", "mmvet", "seed"]
    with fails("without a score: gqa, vizwiz, mmvet"):
        evaluation.main(command(broken, model, tmp_path / "out", tasks=tasks))
    found = json.loads((tmp_path / "out/results.json").read_text())["tasks"]
    assert found == {"seed": json.loads((whole / "results.json").read_text())["tasks"]["seed"]}
    said = capsys.readouterr().err
    for task, why in (("gqa", "p1.jpg: "), ("vizwiz", "not there; vizwiz has its anno"),
                      ("mmvet", "isn't the name of a file in")):
        assert re.search(rf"error: {task} can't be asked: .*{re.escape(why)}", said), said
    with fails("none of these"):
        evaluation.main(command(broken, model, tmp_path / "none", tasks=tasks[:2]))
    assert not (tmp_path / "none").exists()


def test_pictures_that_show_only_later_that_they_cannot_be_read(data, model, whole, tmp_path,
                                                                monkeypatch, one_thread, capsys):
    """Of a few the questions count as answered by nothing, and the other answers stay the same;
    asked again, all is well. Of more there is no score."""
    def bad(*names):
        def read(path, *more, **how):
            if getattr(path, "name", "") in names:
                raise UserError(f"{path}: cut")
            return read_pixels(path, *more, **how)

        monkeypatch.setattr(evaluation, "read_pixels", read)

    again = command(data, model, tmp_path, tasks=["mmvet"])
    wanted = (whole / "mmvet.jsonl").read_text().splitlines()
    bad("v1_0.png", "v1_1.png")
    with fails("without a score: mmvet"):
        evaluation.main(again)
    assert "error: mmvet has no score: 2 of 3 pictures" in capsys.readouterr().err
    bad("v1_1.png")
    evaluation.main(again)
    rows = (tmp_path / "mmvet.jsonl").read_text().splitlines()
    assert [row == want for row, want in zip(rows, wanted)] == [True, False, True]
    assert json.loads(rows[1])["text"] == "" and json.loads(rows[1])["damaged"].endswith("cut")
    assert "warning: 1 of 3 pictures can't be read (first: " in capsys.readouterr().err
    assert json.loads((tmp_path / "results.json").read_text())["tasks"]["mmvet"]["unread"] == 1
    bad()
    evaluation.main(again)
    assert (tmp_path / "mmvet.jsonl").read_text().splitlines() == wanted
    assert json.loads(results(tmp_path))["tasks"]["mmvet"] == json.loads(results(whole))["tasks"][
        "mmvet"]


def test_answers_and_places_that_are_no_good(data, model, whole, tmp_path, one_thread):
    """An answer that was edited, a file where a folder should be."""
    out = shutil.copytree(whole, tmp_path / "out")
    file = out / "pope.jsonl"
    rows = file.read_text().splitlines(keepends=True)
    file.write_text(rows[0].replace('"text": "', '"text": "No, ') + "".join(rows[1:]))
    with fails("pope.jsonl: line 1 was changed", "--out", "--score pope"):
        evaluation.main(command(data, model, out, tasks=["pope"]))
    for place in (file, file / "in"):
        with fails(str(place), "choose a folder"):
            evaluation.main(command(data, model, place, tasks=["pope"]))


def test_words():
    for words, said in [(["--task", "gqa,toy"], "toy alone"), (["--task", "nlvr"], "no such task"),
                        (["--task", "gqa,pope", "--annotations", "x"], "one at a time"),
                        (["--task", "gqa", "--batch", "0"], "--batch"),
                        (["--table2", "gqa,pope"], "no such task"),
                        (["--task", ""], "no such task")]:
        with fails(said):
            evaluation.main(words)


def test_table(whole, tmp_path, capsys):
    content = json.loads((whole / "results.json").read_text())
    content["tasks"]["gqa"] |= dict(score=61.944, interval=[61.0, 62.888])
    mme = dict(score=1500.24, interval=[1480.0, 1520.48])
    limited = content | dict(limit=7, tasks=dict(mme=mme))
    first = write_json(tmp_path / "first.json", content)
    other = write_json(tmp_path / "results.json", limited)
    evaluation.main(["--table", str(first), str(other)])
    out = capsys.readouterr().out.splitlines()
    start = [i for i, row in enumerate(out) if row == "measured"][0]
    assert out[0].split()[:3] == ["reported", "GQA", "SQA"] and "61.94 ±0.94" in out[start + 1]
    assert "(first 7)" in out[start + 2]
    assert out[start + 2].split()[-3:] == ["1500.2", "±20.2", "-"]
    rows = {row[:20].strip(): row.split() for row in out[:start]}
    assert all(len(row.split()) == 10 for row in table1.REPORTED.values())
    wanted = "64.2 71.3 63.1 54.6 67.9 37.5 69.6 37.6 1525.6 88.9"
    assert rows["CCRA (c)"][-10:] == wanted.split()
    with fails("y.json", "not a results.json"):
        evaluation.main(["--table", str(write_json(tmp_path / "y.json", dict(tasks=1)))])
