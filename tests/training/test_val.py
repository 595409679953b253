"""Held-out records while training: numbers that don't depend on processes and equal a plain twin's,
a training that they leave as it is to the bit, the best weights, and a run that goes on."""
import json
import random
import shutil

import pytest
import torch
from safetensors import safe_open
from torch.nn.functional import cross_entropy

import data
import train
from benchmarks.reply import reply_ids
from ccra import VLM
from core.common import UserError
from core.records import check
from core.tokenizer import Tokenizer
from tests.benchmarks.helpers import fails
from tests.training.helpers import log_of, same_parameters
from tests.training.test_sharding import torchrun
from toy import world as toy
from training import readers, val
from training.log import Log
from training.prepare import main as prepare
from training.prepared import Prepared

pytestmark = pytest.mark.usefixtures("one_thread")
STEPS = 8


def records(folder, name, n):
    """A json of records: half of the answers are "yes", most of the others longer; some have no
    picture, some two turns."""
    rows = []
    for i in range(n):
        said = [("Is it?", "yes"), ("How is it?", "yes " * (i % 5) + "no")][i % 2]
        turns = [("Hello " * (i % 4) + "you", "hi")] * (i % 3 == 1) + [said]
        row = {"id": f"{name}{i}", "conversations": [
            {"from": who, "value": text} for turn in turns for who, text in zip(("human", "gpt"),
                                                                               turn)]}
        if i % 4:
            toy.draw(toy.make_scene(f"{name}/{i}")).save(folder / f"{name}{i}.png")
            row["image"] = f"{name}{i}.png"
            row["conversations"][0]["value"] = "<image>\n" + row["conversations"][0]["value"]
        rows.append(row)
    return rows


def write(folder, name, rows):
    file = folder / f"{name}.json"
    file.write_text(json.dumps(rows))
    return str(file)


@pytest.fixture(scope="module")
def flags(stage1, tmp_path_factory):
    """Those of all runs here, but --out, and of their held-out records."""
    at = tmp_path_factory.mktemp("held")
    json_file = write(at, "train", records(at, "train", 16))
    run = ["--stage", "2", "--model", str(stage1), "--json", json_file, "--images", str(at),
           "--device", "cpu", "--dtype", "float32", "--threads", "1", "--workers", "0", "--batch",
           "4", "--micro", "2", "--steps", str(STEPS), "--lr", "2e-2", "--save-every", "3"]
    held = ["--val", write(at, "val", records(at, "val", 11)), "--val-every", "2", "--val-n", "9"]
    return run, held


@pytest.fixture(scope="module")
def one(flags, tmp_path_factory):
    """One process, undisturbed."""
    out, threads = tmp_path_factory.mktemp("one"), torch.get_num_threads()
    train.main([*flags[0], *flags[1], "--keep-best", "--out", str(out)])
    torch.set_num_threads(threads)
    return out


def columns(out):
    """{step: (val_loss, val_right)} of log.csv, as they stand there."""
    header, *rows = [line.split(",") for line in (out / "log.csv").read_text().splitlines()]
    assert header[-2:] == ["val_loss", "val_right"] and len(rows) == STEPS
    return {int(row[0]): tuple(row[-2:]) for row in rows if row[-2]}


def best(out):
    return json.loads((out / "best" / "best.json").read_text())


# --------------------------------------------------------------------------------------------------
# The numbers

@pytest.fixture(scope="module")
def learnt(flags, tmp_path_factory):
    """A model that gives some right answers."""
    out, threads = tmp_path_factory.mktemp("learnt"), torch.get_num_threads()
    train.main([*flags[0], "--steps", "40", "--batch", "8", "--micro", "8", "--save-every", "40",
                "--out", str(out)])
    torch.set_num_threads(threads)
    return out


@pytest.fixture(scope="module")
def still(flags, learnt):
    """Flags of a run that measures that model, after a step of next to nothing."""
    run = [*flags[0], "--model", str(learnt), "--steps", "1", "--lr", "1e-12", "--keep-best"]
    return [*run, *flags[1]]


@pytest.fixture(scope="module")
def pair(still, tmp_path_factory):
    """One, two in DDP and two with slices measure the same model."""
    out = tmp_path_factory.mktemp("pair")
    ways = {"ddp": ["--parallel", "ddp"], "fsdp": []}
    jobs = [[*still, "--out", str(out / name), *more] for name, more in ways.items()]
    (out / "jobs.json").write_text(json.dumps(jobs))
    torchrun(2, "-m", "tests.training.pair", out / "jobs.json")
    threads = torch.get_num_threads()
    train.main([*still, "--out", str(out / "one")])
    torch.set_num_threads(threads)
    return out


def test_the_numbers_are_those_of_one_process(pair):
    alone = best(pair / "one")
    assert alone["val_asked"] == 9 and 0 < alone["val_right"] < 1
    for name in ("ddp", "fsdp"):
        found = best(pair / name)
        assert found["val_right"] == alone["val_right"], name
        assert found["val_loss"] == pytest.approx(alone["val_loss"], rel=1e-12), name


def test_the_numbers_are_a_plain_twins(flags, pair, learnt):
    """Each record alone, its logits whole, in float64; answers token by token without a cache."""
    model = VLM.from_pretrained(learnt).double()
    tokenizer = Tokenizer.from_pretrained(learnt)
    file = flags[1][1]
    held = data.load(file, flags[0][flags[0].index("--images") + 1], tokenizer, size=32)
    sums, right = [], {}
    with torch.no_grad():
        for i in range(len(held)):
            batch = data.make_batch([held[i]])
            labels, batch["pixels"] = batch.pop("labels")[0], batch["pixels"].double()
            logits = model(**batch)[0]                                               # (T', V)
            last = logits[-len(labels) + 1:][:-1] if "image" in held.records[i] else logits[:-1]
            wanted = labels[2:] if "image" in held.records[i] else labels[1:]
            sums.append((cross_entropy(last, wanted, reduction="sum").item(),
                         int((wanted >= 0).sum())))
            turns, picture = check(held.records[i])
            row = data.prompt([*turns[:-1], (turns[-1][0], None)], tokenizer, picture is not None)
            said = []
            while len(said) < 12 and not set(said) & set(tokenizer.eos_ids):
                item = data.item(row, held[i]["pixels"].double())
                said.append(int(model(**data.make_batch([item]))[0, -1].argmax()))
                row.ids.append(said[-1])
            said = tokenizer.decode([t for t in said if t not in tokenizer.eos_ids])
            right[i] = said.strip() == turns[-1][1].strip()
    found = best(pair / "one")
    loss = sum(loss for loss, _ in sums) / sum(n for _, n in sums)
    assert found["val_loss"] == pytest.approx(loss, rel=1e-5)
    order = random.Random(0).sample(range(len(held)), len(held))[:9]
    assert found["val_right"] == sum(right[i] for i in order) / 9


def test_answers_without_a_cache(learnt, flags):
    """As a sliced model gives them: the same tokens, of prompts of many lengths."""
    model, tokenizer = VLM.from_pretrained(learnt), Tokenizer.from_pretrained(learnt)
    held = data.load(flags[1][1], flags[0][flags[0].index("--images") + 1], tokenizer, size=32)
    rows = [val.question_of(held.sample(i))[0] for i in range(len(held))]
    asked = rows, [held.pixels(i) for i in range(len(held))], 6, torch.device("cpu")
    with torch.no_grad():
        assert val.reply_sliced(model, tokenizer, *asked) == reply_ids(model, tokenizer, *asked)


def test_a_question_is_the_prompt_that_eval_asks(one, flags):
    """... and an answer has room for the right one."""
    tokenizer = Tokenizer.from_pretrained(one)
    held = data.load(flags[1][1], None, tokenizer)
    for i in range(len(held)):
        question, most = val.question_of(held.sample(i))
        turns, picture = check(held.records[i])
        wanted = data.prompt([*turns[:-1], (turns[-1][0], None)], tokenizer, picture is not None)
        assert (question.ids, question.query, question.labels) == (wanted.ids, wanted.query, [])
        assert most == len(held.sample(i).ids) - len(question.ids) + val.SPARE


# --------------------------------------------------------------------------------------------------
# The run around them

def test_the_training_is_as_without(flags, one, tmp_path, capsys):
    """To the bit; the picture of losses has the held-out ones."""
    train.main([*flags[0], "--out", str(tmp_path)])
    assert log_of(one) == log_of(tmp_path) and columns(tmp_path) == {}
    assert list(columns(one)) == [2, 4, 6, 8]
    last = "checkpoints/step-00000008/rank-0000.safetensors"
    assert (one / last).read_bytes() == (tmp_path / last).read_bytes()
    assert (one / "loss.png").read_bytes() != (tmp_path / "loss.png").read_bytes()
    assert not (tmp_path / "best").exists() and "val:" not in capsys.readouterr().out


def test_a_run_that_goes_on(flags, one, tmp_path):
    """The columns, the best and the model are those of an undisturbed run: stopped on the way, or
    killed so that its best is ahead of its checkpoints."""
    command = [*flags[0], *flags[1], "--keep-best", "--out", str(tmp_path / "parts")]
    train.main([*command, "--stop-after", "3"])
    ahead = shutil.copytree(one, tmp_path / "ahead")
    (ahead / "model.safetensors").unlink()
    shutil.rmtree(ahead / "checkpoints")
    shutil.copytree(tmp_path / "parts" / "checkpoints", ahead / "checkpoints")
    train.main([*command, "--stop-after", "5"])
    train.main(command)
    train.main([*command[:-1], str(ahead)])
    for out in (tmp_path / "parts", ahead):
        assert columns(out) == columns(one) and best(out) == best(one)
        assert same_parameters(out, one)


def test_the_best_is_the_model(flags, tmp_path, monkeypatch, capsys):
    """Most right answers, then the least loss, then the first; the same command again changes
    nothing; another --val begins anew."""
    shares = {2: (0.5, 1.0), 4: (0.9, 1.0), 6: (0.9, 1.0), 8: (0.1, 0.5)}
    at = iter([*shares.values(), (0.2, 1.0)])

    def found(self, run):
        self.share, loss = next(at)
        return loss

    monkeypatch.setattr(val.Held, "loss", found)
    monkeypatch.setattr(val.Held, "right", lambda self, run: self.share)
    command = [*flags[0], *flags[1], "--keep-best", "--out", str(tmp_path / "a")]
    train.main(command)
    said = capsys.readouterr().out
    assert "step 4 was the best: loss 1.0000, right 90.0% (9)" in said
    assert "val: loss 0.5000, right 10.0% (9)" in said
    assert best(tmp_path / "a")["step"] == 4
    assert [path.name for path in (tmp_path / "a" / "best").glob("step-*")] == ["step-00000004"]
    monkeypatch.undo()
    train.main([*flags[0], "--out", str(tmp_path / "b"), "--stop-after", "4"])
    four = safe_open(tmp_path / "b" / "checkpoints" / "step-00000004" /
                         "rank-0000.safetensors", "pt")
    model = VLM.from_pretrained(tmp_path / "a")
    assert all(torch.equal(p, four.get_tensor(f"weight.{name}"))
               for name, p in model.named_parameters() if f"weight.{name}" in four.keys())
    before = (tmp_path / "a" / "model.safetensors").read_bytes()
    train.main(command)
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == before
    train.main([*command, "--val-n", "3"])
    both = capsys.readouterr()
    assert "is of another run or of another --val" in both.err
    assert "no step was measured" in both.out
    assert (tmp_path / "a" / "model.safetensors").read_bytes() != before


def test_a_picture_that_went_bad(flags, one, tmp_path, monkeypatch, capsys):
    """Said; it isn't counted, and its answer isn't right. (Training's own are others.)"""
    read = data.read_pixels

    def bad(path, *more, **how):
        if path.name.startswith("val"):
            raise UserError(f"{path}: cut")
        return read(path, *more, **how)

    monkeypatch.setattr(data, "read_pixels", bad)
    monkeypatch.setattr(readers, "limit", lambda pictures: 99)
    command = [*flags[0], *flags[1], "--model", str(one), "--lr", "1e-12", "--steps", "1"]
    train.main([*command, "--out", str(tmp_path)])
    said = capsys.readouterr()
    assert "warning: damaged picture" in said.err and (tmp_path / "damaged-val.jsonl").exists()
    assert "val: loss " in said.out
    noted = (tmp_path / "damaged-val.jsonl").read_text().splitlines()
    assert len(noted) == 8                                       # of 11 records 8 have a picture


def test_stage_1_is_not_asked(towers, flags, tmp_path, capsys):
    folder = tmp_path / "captions"
    folder.mkdir()
    rows = [row for row in records(folder, "c", 12) if len(row["conversations"]) == 2
            and "image" in row]
    file = write(folder, "c", rows)
    train.main(["--stage", "1", "--vision", str(towers / "clip"), "--llm", str(towers / "llama"),
                "--out", str(tmp_path / "out"), "--steps", "2", "--batch", "2", "--val", file,
                "--val-images", str(folder), "--world", "toy", "--val-every", "1", "--keep-best"])
    assert "right" not in capsys.readouterr().out
    assert best(tmp_path / "out")["val_right"] is None


# --------------------------------------------------------------------------------------------------
# Before work starts

def test_records_that_are_shared(flags, tmp_path, capsys):
    """By id and picture, those without an id by text and picture; with prepared training data,
    too."""
    images = flags[0][flags[0].index("--images") + 1]
    known = json.loads((tmp_path.parent / flags[0][flags[0].index("--json") + 1]).read_text())
    other = [dict(known[2], id="other"), dict(known[5], image="train1.png")]
    held = [*known[1:4], *other]
    tokenizer = Tokenizer.from_pretrained(flags[0][3])

    def load(name, rows):
        return data.load(write(tmp_path, name, rows), images, tokenizer)

    assert val.shared(load("a", held), load("b", known)) == [0, 1, 2]
    nameless = [{key: x for key, x in row.items() if key != "id"} for row in held]
    without = [{key: x for key, x in row.items() if key != "id"} for row in known]
    assert val.shared(load("a", nameless), load("b", without)) == [0, 1, 2, 3]
    prepare(["--json", write(tmp_path, "b", known), "--images", images, "--llm", flags[0][3],
             "--out", str(tmp_path / "prepared"), "--workers", "0"])
    prepared = Prepared(tmp_path / "prepared", None, tokenizer, "v1", 32)
    assert val.shared(load("a", held), prepared) == [0, 1, 2]
    capsys.readouterr()
    train.main([*flags[0], "--val", write(tmp_path, "val", held), "--out", str(tmp_path / "out"),
                "--steps", "1"])
    said = capsys.readouterr().err
    assert "warning: --val: 3 of 5 records" in said and "first: record 0 (id 'train1')" in said


def test_files_that_cannot_be_measured(flags, tmp_path):
    """A line, before anything is written."""
    out, known = tmp_path / "out", json.loads(open(flags[1][1]).read())
    mute = [dict(row, conversations=row["conversations"][:-1]) for row in known]
    gone = [dict(known[1], image="nowhere.png")]
    for rows, *words in ((mute, "mute.json: not one record can be learnt from"),
                         (gone, "1 of 1 pictures named in", "nowhere.png"),
                         ([], "no record in it"), ([{}], "has no list")):
        with fails(*words):
            train.main([*flags[0], "--val", write(tmp_path, "mute", rows), "--out", str(out)])
    with fails("gone.json", "No such file"):
        train.main([*flags[0], "--val", str(tmp_path / "gone.json"), "--out", str(out)])
    toys = [word for word in flags[0] if word not in ("--json", "--images")]
    toys = [word for word in toys if not word.startswith("/") or word == flags[0][3]]
    with fails("has a picture: say in which folder"):
        train.main([*toys, "--world", "toy", "--val", flags[1][1], "--out", str(out)])
    with fails("--val-images and --keep-best belong to --val"):
        train.main([*flags[0], "--keep-best", "--out", str(out)])
    assert not out.exists()


def test_an_old_log_goes_on(tmp_path):
    """Its rows get the new columns, empty."""
    class Args:
        out, wandb = tmp_path, False

    old = "step,loss,lr,grad_norm,tokens_per_s,samples_per_s,mfu,data_wait,peak_gib"
    (tmp_path / "log.csv").write_text(f"{old}\n1,2,3,4,5,6,-,8,9\n2,2,3,4,5,6,-,8,9\n3,cut\n")
    log = Log(Args, 2, 4)
    log.row(3, 0.5, 1, 1, 1, 1, 1, 1, 1, torch.device("cpu"),
            dict(val_loss=0.25, val_right=None, val_asked=0))
    lines = (tmp_path / "log.csv").read_text().splitlines()
    assert lines[0] == f"{old},val_loss,val_right"
    assert lines[1:3] == ["1,2,3,4,5,6,-,8,9,,", "2,2,3,4,5,6,-,8,9,,"]
    assert lines[3].startswith("3,0.5") and lines[3].endswith(",0.250000,")
    log.draw()
