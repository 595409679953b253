"""One's own exam: what is asked of a file of records, in whatever form it comes, with which
history; answers kept, taken over and judged; what can't be asked is a line before work starts."""
import json
import shutil

import pytest
import torch

import eval as evaluation
from benchmarks import exam, kept
from benchmarks.judge import judge
from core.common import UserError
from core.tokenizer import Tokenizer
from data import prompt, render
from tests.benchmarks.helpers import fails, write_json, write_lines
from toy import world as toy
from toy.dataset import ToyScenes

N = 4


def said(*turns):
    who = ["human", "gpt"] * len(turns)
    return [{"from": name, "value": text} for name, text in zip(who, turns)]


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """Scenes with conversations of several turns: a folder with own.json."""
    at = tmp_path_factory.mktemp("own")
    scenes = ToyScenes("own", N, 2, Tokenizer.from_pretrained(toy.MODEL))
    records = []
    for i in range(N):
        toy.draw(scenes.scene(i)).save(at / f"{i}.png")
        records.append({**scenes.record(i, f"{i}.png"), "id": f"r{i}", "kind": "ab"[i % 2]})
    write_json(at / "own.json", records)
    return at


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module", autouse=True)
def short():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exam, "MAX_NEW_TOKENS", 24)
        yield


def command(file, out, *more):
    return ["--task", str(file), "--out", str(out), "--batch", "4", "--threads", "1", "--device",
            "cpu", *more]


def rows_of(out):
    return [json.loads(line) for line in (out / "exam.jsonl").read_text().splitlines()]


# --------------------------------------------------------------------------------------------------
# What is asked

def test_questions_are_the_beginning_of_the_training_row(own):
    """Of every turn: the prompt is training's row up to the answer, its query the turns so far."""
    tokenizer = Tokenizer.from_pretrained(toy.MODEL)
    records = json.loads((own / "own.json").read_text())
    records[0]["conversations"] = said("Hello", "Hi", "\n<image> Where is it? ", "Left", "Why?",
                                       "So")
    file = write_json(own / "late.json", records)
    asked = list(exam.questions(file, own, "all"))
    assert len(asked) == sum(len(record["conversations"]) // 2 for record in records)
    assert [q.image is None for q in asked[:3]] == [True, False, False]
    for q in asked:
        record = records[q.unit]
        until = said(*(turn["value"] for turn in record["conversations"][:2 * q.more["turn"] + 2]))
        if q.image is None:
            record = {"id": "no picture yet"}
        row = render({**record, "conversations": until}, tokenizer)
        mine = prompt([*q.before, (q.text, None)], tokenizer, q.image is not None, q.strip,
                      q.holder)
        end = row.ends[-2] if q.before else 0
        start = next(i for i in range(end, len(row.ids)) if row.labels[i] >= 0)
        assert mine.ids == row.ids[:start] and mine.query == row.query
        assert q.more["right"] == until[-1]["value"]
    last = list(exam.questions(file, own))
    assert [q.id for q in last] == [f"r{i}" for i in range(N)]
    assert all(q in asked for q in last)


def test_kinds_and_ids(tmp_path):
    records = [{"kind": "k", "conversations": said("a", "b")}, {"id": 7, "conversations": said(
        "a", "b", "c", "d")}, {"id": None, "kind": "", "conversations": said("a", "b")}]
    records[1]["conversations"][2]["kind"] = "own"
    file = write_lines(tmp_path / "x.jsonl", records)
    file.write_text("\ufeff" + file.read_text().replace("\n", "\n\n"))
    asked = list(exam.questions(file, tmp_path, "all"))
    assert [(q.id, q.more["kind"]) for q in asked] == [(0, "k"), (7, ""), (7, "own"), (2, "")]


BAD = [
    ({"conversations": said("a")}, "record 1 (id 'x'): the last question has no answer", "1 of 2"),
    ({"conversations": said("a", "  ")}, "record 1 (id 'x'): an assistant turn is empty", "1 of 2"),
    ({"conversations": []}, "record 1 (id 'x'): the human says nothing"),
    ({"conversations": said("a", "b")[1:]}, "record 1 (id 'x'): the human says nothing"),
    ({}, "record 1 (id 'x'): has no list"),
    ({"image": "0.png", "conversations": said("<image>", "b")}, "record 1 (id 'x'): a human turn "
     "says nothing"),
    ({"image": "z.png", "conversations": said("<image>\na", "b")},
     "record 1 (id 'x'): its picture", "z.png is missing", "--images"),
    ({"image": "../0.png", "conversations": said("<image>\na", "b")}, "record 1 (id 'x')",
     "out of"),
    ({"kind": 3, "conversations": said("a", "b")}, "record 1 (id 'x'): the kind 3"),
]


@pytest.mark.parametrize("bad", BAD, ids=lambda bad: bad[1][17:50])
def test_records_that_cannot_be_asked(bad, own, tmp_path):
    """Before a model is loaded, and nothing is written."""
    record, *words = bad
    good = {"conversations": said("a", "b")}
    file = write_json(tmp_path / "x.json", [good, {"id": "x", **record}])
    shutil.copy(own / "0.png", tmp_path)
    with fails("x.json: ", *words):
        evaluation.main(command(file, tmp_path / "out", "--model", "nowhere"))
    assert not (tmp_path / "out").exists()


def test_files_and_flags_that_do_not_go(own, tmp_path):
    none = write_json(tmp_path / "none.json", [{"conversations": said("a")}] * 2)
    cut = tmp_path / "cut.json"
    shutil.copy(own / "0.png", tmp_path)
    cut_picture = write_json(tmp_path / "p.json", [
        {"image": "1.png", "conversations": said("<image>\na", "b")}])
    (tmp_path / "1.png").write_bytes((own / "0.png").read_bytes()[:99])
    cut.write_text("[{")
    for words, *wanted in [
            (["--task", str(none)], "not one of the 2 records", "right answers"),
            (["--task", str(cut)], "cut.json is not JSON"),
            (["--task", str(cut_picture)], "the picture of 0 can't be read"),
            (["--task", str(tmp_path / "gone.json")], "gone.json", "no such file"),
            (["--task", str(tmp_path)], "no such file"),
            (["--task", "nothing.csv"], "no such task"),
            (["--task", "gqa", "--images", "x"], "--images and --turns"),
            (["--task", "toy", "--turns", "all"], "--images and --turns"),
            (["--task", str(none), "--annotations", "x"], "--annotations")]:
        with fails(*wanted):
            evaluation.main([*words, "--model", "nowhere"])
    assert not exam.is_file("toy", {"toy"}) and not exam.is_file("", {"toy"})


# --------------------------------------------------------------------------------------------------
# Asked, kept, judged

@pytest.fixture(scope="module")
def whole(own, tmp_path_factory):
    """All turns, by the bundled model."""
    out, threads = tmp_path_factory.mktemp("whole"), torch.get_num_threads()
    evaluation.main(command(own / "own.json", out, "--turns", "all"))
    torch.set_num_threads(threads)
    return out


def test_end_to_end(own, whole, capsys):
    asked, rows = list(exam.questions(own / "own.json", own, "all")), rows_of(whole)
    assert [(row["question_id"], row["prompt"], row["right"], row["kind"]) for row in rows] == [
        (q.id, q.text, q.more["right"], q.more["kind"]) for q in asked]
    entry = json.loads((whole / "results.json").read_text())["tasks"]["exam"]
    wanted = judge([(row["text"], row["right"], row["kind"]) for row in rows])
    assert entry["metrics"] == wanted and entry["score"] == wanted["exact"] > 0.8
    evaluation.main(command(own / "own.json", whole, "--turns", "all", "--json"))
    printed = capsys.readouterr()
    assert json.loads(printed.out) == wanted and "0answer" in printed.err     # nothing asked again
    evaluation.main(command(own / "own.json", whole, "--turns", "all"))
    table = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in table[:4]] == ["kind", "a", "b", "all"]
    assert f"{wanted['exact']:.1%} [" in table[3]


def test_the_last_turns_and_a_part(own, whole, tmp_path, capsys):
    """History is the right answers, so the last turns' answers are those of all turns; json lines.
    """
    records = json.loads((own / "own.json").read_text())
    lines = write_lines(tmp_path / "own.jsonl", records)
    evaluation.main(command(lines, tmp_path / "out", "--images", str(own), "--limit", "3",
                            "--json"))
    found, last = rows_of(tmp_path / "out"), {row["question_id"]: row for row in rows_of(whole)}
    assert json.loads(capsys.readouterr().out)["n"] == len(found) == 3
    for row in found:
        assert row["text"] == last[row["question_id"]]["text"]


def test_goes_on_and_refuses(own, whole, tmp_path, capsys):
    """From half of the answers to the same bytes; not with another file, folder, turns or model;
    not beside benchmarks; not from edited answers."""
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    lines = (out / "exam.jsonl").read_text().splitlines(keepends=True)
    (out / "exam.jsonl").unlink()
    (out / "exam.3.jsonl").write_text("".join(lines[::2]) + lines[1][:-7])
    again = command(own / "own.json", out, "--turns", "all")
    evaluation.main(again)
    assert (out / "exam.jsonl").read_text() == "".join(lines)
    strip = {"seconds": None}
    one, other = (json.loads((at / "results.json").read_text()) | strip for at in (out, whole))
    assert one == other
    copy = shutil.copytree(own, tmp_path / "copy")
    with fails("turns all, not last", "--out"):
        evaluation.main(command(own / "own.json", out))
    with fails("images", "--out"):
        evaluation.main([*again, "--images", str(copy)])
    records = json.loads((copy / "own.json").read_text())
    write_json(copy / "own.json", records[1:])
    with fails("file sha256", "--out"):
        evaluation.main([*again, "--task", str(copy / "own.json"), "--images", str(own)])
    fresh = {key: value for key, value in one.items() if key not in ("file", "images", "turns")}
    with fails("with file sha256", "which this one doesn't have", "--out"):
        kept.resume(out / "results.json", fresh)
    (out / "exam.jsonl").write_text("".join(lines).replace('"right": "', '"right": "x', 1))
    with fails("exam.jsonl: line 1 was changed", "--out") as error:
        evaluation.main(again)
    assert "--score" not in str(error.value)


def test_a_picture_that_cannot_be_read(own, whole, tmp_path, monkeypatch, capsys):
    """The benchmarks' policy: a few count as answered by nothing, and are asked again."""
    out, again = tmp_path / "out", command(own / "own.json", tmp_path / "out")
    read = evaluation.read_pixels

    def bad(path, *more, **how):
        if path.name == "1.png":
            raise UserError(f"{path}: cut")
        return read(path, *more, **how)

    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "read_pixels", bad)
        evaluation.main(again)
    assert f"warning: 1 of {N} pictures can't be read" in capsys.readouterr().err
    texts = {row["question_id"]: row["text"] for row in rows_of(whole)}         # of the last turns
    for row in rows_of(out):
        assert ("damaged" in row) == (row["question_id"] == "r1")
        assert row["text"] == ("" if "damaged" in row else texts[row["question_id"]])
    evaluation.main(again)
    assert {row["question_id"]: row["text"] for row in rows_of(out)} == texts
