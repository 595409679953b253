"""Running the ten benchmarks: tiny ones in the official layouts, asked in LLaVA's words, answered by any number of
processes, killed and resumed, scored by scores.py."""
import base64
import importlib.util
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
from PIL import Image

import eval as evaluation
from benchmarks import answers
from benchmarks import questions as benchmarks
from benchmarks import table1 as tables
from benchmarks.scores import MME_TASKS, SCORERS, score
from ccra import VLM, CCRAConfig
from clip import CLIPVision
from core.common import ROOT, UserError
from core.tokenizer import Tokenizer
from data import SYSTEM, prompt
from llama import Llama
from tests.benchmarks.test_scores import fails, write_json, write_lines
from toy import world as toy

PARQUET = importlib.util.find_spec("pyarrow") is not None
TASKS = [task for task in SCORERS if task != "mmmu" or PARQUET]
SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."


def picture(color, to=None, kind="PNG"):
    """A plain picture of 20 x 12, into a file or as bytes."""
    image, file = Image.new("RGB", (20, 12), color), io.BytesIO()
    image.save(file, kind)
    if to is None:
        return file.getvalue()
    to.parent.mkdir(parents=True, exist_ok=True)
    to.write_bytes(file.getvalue())


def make_gqa(at):
    rows = {f"n{i}": dict(question=q, answer="yes", isBalanced=True, imageId=f"p{i % 2}",
                          types=dict(structural="verify", semantic="obj", detailed="d"))
            for i, q in enumerate([" Is it red?", "Is it Blue?", "What {is} it?"])}
    write_json(at / "gqa/data/testdev_balanced_questions.json", rows)
    for i in range(2):
        picture("red", at / f"gqa/data/images/p{i}.jpg", "JPEG")
    return {"n0": " Is it red?" + SHORT, "n2": "What {is} it?" + SHORT}      # a blank in front stays


def make_scienceqa(at):
    rows = {"7": dict(question="Which?", choices=["dog", "cat"], answer=1, hint="Look.\nWell.", image="image.png"),
            "9": dict(question="Why?", choices=["a", "b", "c"], answer=0, hint="", image=None)}
    write_json(at / "scienceqa/problems.json", rows | {"1": dict(rows["9"], choices=["x", "y"])})
    write_json(at / "scienceqa/pid_splits.json", dict(train=["1"], test=["7", "9"]))
    picture("green", at / "scienceqa/images/test/7/image.png")
    return {"7": "Context: Look.\nWell.\nWhich?\nA. dog\nB. cat" + LETTER, "9": "Why?\nA. a\nB. b\nC. c" + LETTER}


def make_textvqa(at):
    data = [dict(image_id=id, question=q, answers=["x"] * 10) for id, q in (("u", "what is the BRAND?"), ("u", "Who?"),
                                                                            ("v", "where?"))]
    write_json(at / "textvqa/TextVQA_0.5.1_val.json", dict(dataset_version="0.5.1", data=data))
    write_json(at / "textvqa/TextVQA_Rosetta_OCR_v0.2_val.json", dict(data=[
        dict(image_id="u", ocr_tokens=["Cola", "10%"]), dict(image_id="v", ocr_tokens=[])]))
    for id in "uv":
        picture("blue", at / f"textvqa/train_images/{id}.jpg", "JPEG")
    return {"u": "What is the brand?\nReference OCR token: Cola, 10%" + SHORT,
            "v": "Where?\nReference OCR token: " + SHORT}


def make_vizwiz(at):
    human = [dict(answer="cup", answer_confidence="yes")] * 10
    rows = [dict(image=f"VizWiz_val_{i:08}.jpg", question=q, answers=human, answer_type="other", answerable=1)
            for i, q in enumerate(["what is  THIS? ", "Hm?"])]
    write_json(at / "vizwiz/val.json", rows)
    for row in rows:
        picture("grey", at / "vizwiz/val" / row["image"], "JPEG")
    test = [dict(image="VizWiz_test_00000000.jpg", question="Is it?")]
    write_json(at / "vizwiz/test.json", test)
    picture("grey", at / "vizwiz/test/VizWiz_test_00000000.jpg", "JPEG")
    return {0: "What is  this? \nWhen the provided information is insufficient, respond with 'Unanswerable'." + SHORT}


def make_mmbench(at):
    names = "index question hint A B C D answer category image source l2-category comment split".split()
    image = base64.b64encode(picture("white")).decode()
    rows = [(1, "Which one?", "nan", "dog", "None", "cow", "", "A", "c", image),        # the options end at the None
            (1000001, "Which one?", "nan", "", "dog", "", "", "B", "c", image),
            (2, '"Say ""it""\ntwice"', "A hint.", "red", "blue", "", "", "A", "c", image),
            (1000002, "Again", "none", "blue", "red", "", "", "B", "c", "2")]            # the picture of row 2
    table = ["\t".join(names)] + ["\t".join([*map(str, row), "s", "all", "", "dev"]) for row in rows]
    path = at / "mmbench/mmbench_dev_20230712.tsv"
    path.parent.mkdir(parents=True)
    path.write_text("\n".join(table) + "\n")
    return {1: "Which one?\nA. dog" + LETTER, 2: 'A hint.\nSay "it"\ntwice\nA. red\nB. blue' + LETTER,
            1000002: "Again\nA. blue\nB. red" + LETTER}


def make_mmvet(at):
    rows = {f"v1_{i}": dict(imagename=f"v1_{i}.png", question=f"What is {i}?", answer="x", capability=["rec"])
            for i in range(3)}
    write_json(at / "mm-vet/mm-vet.json", rows)
    for row in rows.values():
        picture("pink", at / "mm-vet/images" / row["imagename"])
    return {2: "What is 2?"}


def make_seed(at):
    rows = [dict(question_id=id, data_type=kind, answer="A", question_type_id=number, question=f"Q{id}?",
                 data_id=f"x{id}", **{f"choice_{x}": f"it is {x}" for x in "abcd"}) for id, kind, number in
            (("101", "image", 1), ("101", "image", 1), ("102", "image", 2), ("v3", "video", 10))]
    write_json(at / "seed_bench/SEED-Bench.json", dict(questions=rows, question_type={"S": 1, "T": 2, "Action": 10}))
    for id in ("101", "102"):
        picture("black", at / f"seed_bench/SEED-Bench-image/x{id}")
    return {"102": "Q102?\nA. it is a\nB. it is b\nC. it is c\nD. it is d" + LETTER}


def make_mmmu(at):
    rows = [dict(id="validation_Math_1", question_type="multiple-choice", options="['1', 'two']", answer="B",
                 question="What is <image 1>?", image_1=dict(bytes=picture("red"), path="a.png"), image_2=None),
            dict(id="validation_Art_1", question_type="open", options="[]", answer="3", question="How many?",
                 image_1=dict(bytes=picture("red"), path="b.png"), image_2=dict(bytes=picture("blue"), path="c.png"))]
    if PARQUET:
        import pyarrow.parquet
        for row in rows:
            file = at / "mmmu" / row["id"].split("_")[1] / "validation-00000-of-00001.parquet"
            file.parent.mkdir(parents=True)
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), file)
    return {"validation_Math_1": "What is <image 1>?\n(A) 1\n(B) two\n" + LETTER,
            "validation_Art_1": "How many?" + SHORT}


def make_mme(at):
    at = at / "MME/MME_Benchmark_release_version"
    for task in (task for tasks in MME_TASKS.values() for task in tasks):
        inner = task in ("artwork", "celebrity", "landmark", "posters", "scene")
        for i in range(1 + (task == "OCR")):
            gap = "  " if task == "color" else " "
            text = at / task / ("questions_answers_YN" if inner else "") / f"{i:04}.txt"
            text.parent.mkdir(parents=True, exist_ok=True)
            text.write_text(f"Is it{gap}Please answer yes or no.\tYes\nOr not? Please answer yes or no.\tNo\n")
            picture("brown", at / task / ("images" if inner else "") / f"{i:04}.{'png' if task == 'OCR' else 'jpg'}")
    return {"OCR/0001.png": "Or not?" + SHORT, "artwork/images/0000.jpg": "Or not?" + SHORT,
            "color/0000.jpg": "Is it" + SHORT}


def make_pope(at):
    (at / "pope/coco").mkdir(parents=True)
    for category in ("random", "adversarial", "popular"):
        rows = [dict(question_id=i, image=f"COCO_val2014_{i}.jpg", text=f"Is there a {category} {i}?", label=label)
                for i, label in enumerate(("yes", "no", "yes"), 1)]
        write_lines(at / f"pope/coco/coco_pope_{category}.json", rows)
    for i in range(1, 4):
        picture("purple", at / f"pope/val2014/COCO_val2014_{i}.jpg", "JPEG")
    return {1: "Is there a adversarial 1?" + SHORT, 10_000_002: "Is there a random 2?" + SHORT}


MAKE = {task: globals()["make_" + task] for task in SCORERS}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """(folder of the ten, {task: {id: its prompt}})."""
    at = tmp_path_factory.mktemp("eval")
    return at, {task: make(at) for task, make in MAKE.items()}


@pytest.fixture(scope="module")
def model(towers, tmp_path_factory):
    """A tiny model that says much nonsense."""
    at = tmp_path_factory.mktemp("model")
    torch.manual_seed(1)
    vision, llm = CLIPVision.from_pretrained(towers / "clip"), Llama.from_pretrained(towers / "llama")
    VLM.build(vision, llm, CCRAConfig(32, 16, 3, 8)).save_pretrained(at, toy.MODEL / "tokenizer.model")
    return at


def read(task, at, **more):
    return benchmarks.questions(task, at, benchmarks.annotations(task, at), **more)


# ---------------------------------------------------------------------------------------------------------------------
# Questions

@pytest.mark.parametrize("task", TASKS)
def test_prompts(task, data):
    asked, wanted = read(task, data[0]), data[1][task]
    assert set(wanted.items()) <= {(q.id, q.text) for q in asked}
    assert all(q.image is not None for q in asked if q.id != "9")
    assert benchmarks.MAX_NEW_TOKENS[task] == (1024 if task in ("scienceqa", "mmbench", "mmvet") else 128)


def test_pictures_and_ids(data):
    asked = {task: read(task, data[0]) for task in TASKS}
    assert [q.id for q in asked["mmbench"]] == [1, 1000001, 2, 1000002]
    assert asked["mmbench"][3].image == asked["mmbench"][2].image == picture("white")
    assert [q.prompt.startswith("<image>\n") for q in asked["scienceqa"]] == [True, False]
    assert [q.id for q in asked["seed"]] == ["101", "101", "102"]                   # no folder of video frames
    assert asked["seed"][2].image.name == "x102" and asked["gqa"][2].image.name == "p0.jpg"
    assert {q.id for q in asked["pope"]} == {first + i for first in (0, 10 ** 7, 2 * 10 ** 7) for i in (1, 2, 3)}
    test = benchmarks.questions("vizwiz", data[0], data[0] / "vizwiz/test.json")
    assert [q.image.parent.name for q in test] == ["test"]


def test_the_row_that_is_read(data):
    """LLaVA's template, with the blank that it keeps (that behind the picture's is sentencepiece's own)."""
    tokenizer = Tokenizer.from_pretrained(toy.MODEL)
    q = read("gqa", data[0])[0]
    row = prompt([(q.text, None)], tokenizer, strip=False)
    text = tokenizer.decode([id for id in row.ids if id >= 0])
    assert text == f"{SYSTEM} USER:  \n Is it red?\nAnswer the question using a single word or phrase. ASSISTANT:"
    assert row.ids.count(-200) == 1
    q = read("scienceqa", data[0])[1]
    row = prompt([(q.text, None)], tokenizer, image=False, strip=False)
    assert tokenizer.decode(row.ids) == f"{SYSTEM} USER: {q.text} ASSISTANT:"


def test_limit(data):
    def ids(task, limit):
        return [q.id for q in read(task, data[0], limit=limit)]
    assert ids("gqa", 2) == ["n0", "n1"] and ids("mmbench", 1) == [1, 1000001]
    assert ids("pope", 1) == [1, 10_000_001, 20_000_001]
    assert len(ids("mme", 1)) == 28 and ids("scienceqa", 1) == ["7", "9"] and ids("seed", 1) == ["101", "102"]


@pytest.mark.parametrize("task", TASKS)
def test_what_is_missing_is_said_before(task, data, tmp_path):
    """One line, that says where from: no annotations; another task's; a picture gone."""
    with fails("not there", "from http"):
        read(task, tmp_path)
    shutil.copytree(data[0], tmp_path, dirs_exist_ok=True)
    for other in TASKS:
        if other != task:
            with pytest.raises(UserError, match="^[^\n]*$"):
                benchmarks.questions(task, tmp_path, benchmarks.annotations(other, tmp_path))
    if task not in ("mmbench", "mmmu"):                           # which hold their pictures
        read(task, tmp_path)[-1 if task != "scienceqa" else 0].image.unlink()
        with fails("this picture", task, "from http"):
            read(task, tmp_path)


def test_pictures_in_a_table_are_looked_at(data, tmp_path):
    table = (data[0] / "mmbench/mmbench_dev_20230712.tsv").read_text()
    whole = base64.b64encode(picture("white")).decode()
    for bad, said in [("abc", "row 1 is not base64"), (base64.b64encode(b"no picture").decode(), "the picture of 1 "),
                      ("", "row 1 is incomplete")]:
        (tmp_path / "x.tsv").write_text(table.replace(whole, bad))
        with fails("x.tsv", said):
            benchmarks.questions("mmbench", data[0], tmp_path / "x.tsv")


def test_rehearsal(data, tmp_path, model):
    """Annotations that can be asked but not scored."""
    rows = json.loads((data[0] / "gqa/data/testdev_balanced_questions.json").read_text())
    for row in rows.values():
        del row["answer"]
    path = write_json(tmp_path / "q.json", rows)
    with fails("q.json", "answer"):
        evaluation.main(["--task", "gqa", "--data", str(data[0]), "--annotations", str(path), "--model", str(model),
                         "--out", str(tmp_path / "out")])


# ---------------------------------------------------------------------------------------------------------------------
# Answers

def command(data, model, out, *more, tasks=TASKS):
    return ["--task", ",".join(tasks), "--data", str(data[0]), "--model", str(model), "--out", str(out), "--batch", "3",
            "--threads", "1", "--device", "cpu", *more]


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
    assert list(content["tasks"]) == TASKS and content["decoding"] == "greedy" and content["weights"][:7] == "sha256:"
    assert sorted(f.name for f in whole.glob("*.jsonl")) == sorted(f"{task}.jsonl" for task in TASKS)
    for task in TASKS:
        asked, entry = read(task, data[0]), content["tasks"][task]
        rows = [json.loads(row) for row in (whole / f"{task}.jsonl").read_text().splitlines()]
        assert [(row["question_id"], row["prompt"]) for row in rows] == [(q.id, q.prompt) for q in asked]
        assert any(row["text"] for row in rows) and entry["questions"] == len(asked)
        assert entry["prompt"] == benchmarks.TEMPLATES[task]
        path = benchmarks.annotations(task, data[0])
        if "error" in entry:                     # nonsense with line breaks, which MME's files can't hold
            assert task == "mme" and "line break" in entry["error"]
            continue
        given = answers.read_answers(whole / f"{task}.jsonl")
        again = score(task, path, given, limited=task == "seed")
        assert (entry["score"], entry["metrics"]) == (again["primary"], again["metrics"])
        if task == "mmvet":
            assert entry["score"] is None and len(json.loads((whole / "mmvet-submission.json").read_text())) == 3
        else:
            low, high = entry["interval"]
            assert low <= entry["score"] <= high and high - low == pytest.approx(2 * again["metrics"]["margin"])


def start(arguments, size):
    """The processes that torchrun would start."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    env = {**os.environ, "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size), "MASTER_ADDR": "localhost",
           "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    return [subprocess.Popen([sys.executable, ROOT / "eval.py", *arguments], stdout=subprocess.DEVNULL,
                             stderr=subprocess.PIPE, text=True, env={**env, "RANK": str(rank), "LOCAL_RANK": str(rank)})
            for rank in range(size)]


def test_killed_and_resumed_by_others(data, model, whole, tmp_path):
    """Two processes are killed at work, four go on: results.json and all answers are those of one process."""
    tasks = ["pope", "mmvet"]
    arguments = command(data, model, tmp_path, tasks=tasks)
    alone = json.loads((whole / "results.json").read_text())
    running, began = start(arguments, 2), time.monotonic()
    while sum(len(f.read_bytes().splitlines()) for f in tmp_path.glob("pope.*.jsonl")) < 2:
        assert time.monotonic() - began < 300 and running[0].poll() is None, running[0].stderr.read()
        time.sleep(0.01)
    for process in running:
        process.send_signal(signal.SIGKILL)
        process.wait()
    torn = max(tmp_path.glob("pope.*.jsonl"))
    torn.write_bytes(torn.read_bytes() + b'{"question_id": 1, "prom')         # as a kill inside of a write leaves it
    assert json.loads((tmp_path / "results.json").read_text())["tasks"] == {}          # whose answers these are
    with fails("limit 0, not 1", "--out"):
        evaluation.main(arguments + ["--limit", "1"])
    for process in (running := start(arguments, 4)):
        assert process.wait(300) == 0, process.stderr.read()
    content = json.loads(results(tmp_path))
    assert content["tasks"] == {task: alone["tasks"][task] for task in SCORERS if task in tasks}
    for task in tasks:
        assert (tmp_path / f"{task}.jsonl").read_bytes() == (whole / f"{task}.jsonl").read_bytes()


def test_resumed_alone(data, model, whole, tmp_path, one_thread, capsys):
    """From any part of the answers, and nothing is asked twice; other settings don't mix."""
    rows = (whole / "pope.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "pope.1.jsonl").write_text("".join(rows[::2]) + rows[1][:-5])
    (tmp_path / "pope.0.jsonl").write_text(rows[3])
    evaluation.main(command(data, model, tmp_path, tasks=["pope"]))
    assert (tmp_path / "pope.jsonl").read_text() == "".join(rows) and not list(tmp_path.glob("pope.?.jsonl"))
    once = results(tmp_path)
    evaluation.main(command(data, model, tmp_path, tasks=["pope"]))
    assert results(tmp_path) == once and "0answer" in capsys.readouterr().err
    evaluation.main(command(data, model, tmp_path, tasks=["vizwiz"]))                # joins the others
    assert list(json.loads(results(tmp_path))["tasks"]) == ["vizwiz", "pope"]
    with fails("limit 0, not 1", "--out"):
        evaluation.main(command(data, model, tmp_path, "--limit", "1", tasks=["pope"]))
    with fails("weights", "--out"):
        evaluation.main(command(data, toy.MODEL, tmp_path, tasks=["pope"]))
    other = shutil.copytree(model, tmp_path / "other")                               # Table 4's ablation, for instance
    config = json.loads((other / "config.json").read_text())
    write_json(other / "config.json", config | dict(fuser=config["fuser"] | dict(lpwca=False)))
    with fails("config sha256", "--out"):
        evaluation.main(command(data, other, tmp_path, tasks=["pope"]))
    (tmp_path / "pope.jsonl").write_text("".join(rows[:-1]) + rows[0].replace("adversarial", "x"))
    with fails(f"pope.jsonl: line {len(rows)}", "--out"):
        evaluation.main(command(data, model, tmp_path, tasks=["pope"]))


def test_a_part_of_them(data, model, tmp_path, one_thread, capsys):
    """--limit is scored as if there were no others; a split without answers is handed in."""
    tasks = [task for task in TASKS if task != "mme"]
    evaluation.main(command(data, model, tmp_path / "a", "--limit", "1", tasks=tasks))
    content = json.loads((tmp_path / "a/results.json").read_text())["tasks"]
    assert content["gqa"]["metrics"]["n"] == 1 and content["vizwiz"]["metrics"]["n"] == 1
    assert content["mmbench"]["metrics"]["n_rows"] == 2 and content["scienceqa"]["metrics"]["n"] == 2
    assert "have no answer" not in capsys.readouterr().err and not list((tmp_path / "a").glob("*submission*"))
    test = ["--annotations", str(data[0] / "vizwiz/test.json")]
    evaluation.main(command(data, model, tmp_path / "b", *test, tasks=["vizwiz"]))
    upload = json.loads((tmp_path / "b/vizwiz-submission.json").read_text())
    assert [row["image"] for row in upload] == ["VizWiz_test_00000000.jpg"] and "eval.ai" in capsys.readouterr().err


def test_words(data, model, tmp_path):
    for words, said in [(["--task", "gqa,toy"], "toy alone"), (["--task", "nlvr"], "no such task"),
                        (["--task", "gqa,pope", "--annotations", "x"], "one at a time"),
                        (["--task", "gqa", "--batch", "0"], "--batch"), (["--table2", "gqa,pope"], "no such task"),
                        (["--task", ""], "no such task")]:
        with fails(said):
            evaluation.main(words)


# ---------------------------------------------------------------------------------------------------------------------
# Table 1

def test_table(whole, tmp_path, capsys):
    content = json.loads((whole / "results.json").read_text())
    content["tasks"]["gqa"] |= dict(score=61.944, interval=[61.0, 62.888])
    other = write_json(tmp_path / "results.json", content | dict(limit=7, tasks=dict(mme=dict(
        score=1500.24, interval=[1480.0, 1520.48]))))
    first = write_json(tmp_path / "first.json", content)
    evaluation.main(["--table", str(first), str(other)])
    out = capsys.readouterr().out.splitlines()
    start = [i for i, row in enumerate(out) if row == "measured"][0]
    assert out[0].split()[:3] == ["reported", "GQA", "SQA"] and "61.94 ±0.94" in out[start + 1]
    assert "(first 7)" in out[start + 2] and out[start + 2].split()[-3:] == ["1500.2", "±20.2", "-"]
    rows = {row[:20].strip(): row.split() for row in out[:start]}
    assert all(len(row.split()) == 10 for row in tables.REPORTED.values())
    assert rows["CCRA (c)"][-10:] == "64.2 71.3 63.1 54.6 67.9 37.5 69.6 37.6 1525.6 88.9".split()
    with fails("y.json", "not a results.json"):
        evaluation.main(["--table", str(write_json(tmp_path / "y.json", dict(tasks=1)))])
