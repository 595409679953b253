"""prepare.py against the plain way: `data.load` and `open_image`; and data.py's order of samples."""
import fcntl
import json
import math
import os
import pickle
import random
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import data
import train
from ccra import VLM, CCRAConfig
from clip import CLIPVision, CLIPVisionConfig, open_image
from core.common import ROOT, UserError
from core.tokenizer import Tokenizer
from data import IGNORE, IMAGE_TOKEN
from llama import Llama, LlamaConfig
from toy import world as toy
from training import order, padding, prepare
from training.prepared import Prepared

LLM = toy.MODEL


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_pretrained(LLM)


def record(*texts, **more):
    said = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]
    return {"id": "r", **more, "conversations": said}


def random_text(rng):
    words = ["a", "cat", "red", "12", "\n", "é", "日本", "🙂", "</s>", "?"]
    return " ".join(rng.choices(words, k=rng.randint(1, 12)))


def random_record(rng, i, pictures):
    """Conversations with a picture first, later or not at all."""
    texts = [random_text(rng) + "." for _ in range(2 * rng.randint(1, 4))]
    if rng.random() < 0.2:
        return record(*texts, id=f"{i}é")
    at = 2 * rng.randrange(len(texts) // 2)
    texts[at] = "<image>\n" + texts[at]
    return record(*texts, id=i, image=rng.choice(pictures))


def noise(path, size=(60, 40), **how):
    Image.effect_noise(size, 90).convert("RGB").save(path, **how)


@pytest.fixture
def world(tmp_path):
    """300 records (prepare.CHUNK and some), four of which can't be learnt from, about five pictures."""
    rng, images = random.Random(5), tmp_path / "images"
    (images / "coco").mkdir(parents=True)
    names = ["coco/a.jpg", "coco/b.png", "c.jpg", "coco/../c.jpg", "coco/d.gif"]
    for name in {os.path.normpath(name) for name in names}:
        noise(images / name)
    records = [random_record(rng, i, names) for i in range(300)]
    records[17] = record("a", "")
    records[18] = record("<image>", "b", "c", image=names[0])
    records[290] = record("", "b")
    records[299] = record("<image>", " ", image=names[1])
    (tmp_path / "x.json").write_text(json.dumps(records, ensure_ascii=False))
    return tmp_path


def make(world, out="out", json_name="x.json", **more):
    said = []
    prepare.prepare(world / json_name, world / "images", world / out, LLM, say=said.append, **{"tolerate": 0.5, **more})
    return said


def same_items(one, other):
    assert len(one) == len(other)
    for i in range(len(one)):
        assert one.record_id(i) == other.record_id(i) and one.sample(i) == other.sample(i)
        a, b = one[i], other[i]
        assert a.keys() == b.keys() and torch.equal(a["pixels"], b["pixels"])
        assert all(a[key] == b[key] for key in a if key != "pixels")


# ---------------------------------------------------------------------------------------------------------------------
# Reading a json in pieces

def random_value(rng, depth=0):
    kind = rng.randrange(8 if depth < 3 else 5)
    if kind < 2:
        pieces = ["a", '"', "\\", "é", "🙂", "\n", "]", "}", ",", "\ud83d", "\u2028"]
        return "".join(rng.choices(pieces, k=rng.randrange(9)))
    if kind < 5:
        return rng.choice([0, -12, 3.5e-7, 123456, True, False, None])
    if kind < 7:
        return [random_value(rng, depth + 1) for _ in range(rng.randrange(4))]
    keys = [str(random_value(rng, 3)).replace("\ud83d", "") for _ in range(rng.randrange(4))]
    return {key: random_value(rng, depth + 1) for key in keys}


def test_stream_is_json_loads(tmp_path, monkeypatch):
    rng, file = random.Random(0), tmp_path / "x.json"
    for trial in range(120):
        values = [random_value(rng) for _ in range(rng.randint(1, 6))]
        text = json.dumps(values, indent=rng.choice([None, 1]))
        if trial % 2 and "\\ud83d" not in text:
            text = json.dumps(values, ensure_ascii=False, separators=rng.choice([(",", ":"), (" ,\r\n", "\t: ")]))
        file.write_bytes(b"\xef\xbb\xbf" * (trial % 3 == 0) + text.encode() + b" \n" * (trial % 5))
        monkeypatch.setattr(data.Text, "BLOCK", rng.randint(1, 9))
        seen = []
        assert list(data.stream(file, seen.append)) == values and b"".join(seen) == file.read_bytes()


def test_stream_finds_every_cut_and_every_slip(tmp_path, monkeypatch):
    monkeypatch.setattr(data.Text, "BLOCK", 5)
    whole, file = '[{"a": "é\\u00e9"}, [12, null], 345]', tmp_path / "x.json"
    wrong = [whole.encode()[:n] for n in range(len(whole.encode()))]
    slips = [whole[:-1] + ",]", whole + "]", whole + " 3", whole + whole, "[,1]", "[1 2]", "[1,,2]", "[1x]"]
    wrong += [text.encode() for text in slips]
    for content in wrong:
        file.write_bytes(content)
        with pytest.raises(ValueError):
            json.loads(content)
        with pytest.raises(UserError, match="x.json"):
            list(data.stream(file))


def test_stream_does_not_hold_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(data.Text, "BLOCK", 100)
    (tmp_path / "x.json").write_text("[" + "[1],\n" * 1000 + "[1]]")
    read, n = [], 0
    for n, _ in enumerate(data.stream(tmp_path / "x.json", read.append)):
        assert abs(sum(map(len, read)) - 5 * n) <= 200
    assert n == 1000
    monkeypatch.setattr(data.Text, "LONGEST", 1000)             # a slip at the front is found before the end
    (tmp_path / "x.json").write_text("[{x" + " " * 50_000 + "]")
    read.clear()
    with pytest.raises(UserError, match="record 0"):
        list(data.stream(tmp_path / "x.json", read.append))
    assert sum(map(len, read)) < 5000


# ---------------------------------------------------------------------------------------------------------------------
# prepare: what is kept

@pytest.mark.parametrize("workers", [0, 2])
def test_the_items_are_those_of_load(world, tokenizer, workers):
    said = make(world, workers=workers)
    loaded = data.load(world / "x.json", world / "images", tokenizer, "v1", 28, say=lambda _: None)
    assert len(loaded) == 296 and "296 of 300 records, 5 pictures" in said[0]
    same_items(Prepared(world / "out", None, tokenizer, "v1", 28), loaded)
    assert not (world / "out.tmp").exists()


def test_stage_1_has_its_prompt_as_query(world, tokenizer):
    records = [record("Say it.\n<image>", f"a cat {i}", image="00453/x.png") for i in range(3)]
    (world / "images" / "00453").mkdir()
    noise(world / "images" / "00453" / "x.png")
    (world / "p.json").write_text(json.dumps(records))
    make(world, json_name="p.json", template="plain")
    prepared = Prepared(world / "out", world / "images", tokenizer, "plain", 28)
    same_items(prepared, data.load(world / "p.json", world / "images", tokenizer, "plain", 28))
    assert prepared.sample(0).spans == [] and prepared[0]["query"] == tokenizer.encode("Say it.", continues=True)
    assert list(json.loads((world / "out" / "report.json").read_text())["sources"]) == ["numbered folders"]
    with pytest.raises(UserError, match="--template plain"):
        Prepared(world / "out", None, tokenizer, "v1")


def test_what_is_left_out_is_said(world, tokenizer):
    images, records = world / "images", json.loads((world / "x.json").read_text())
    noise(images / "gif.jpg", format="GIF")                                  # read all the same
    noise(images / "other.gif")
    whole = (images / "coco" / "a.jpg").read_bytes()
    (images / "cut.jpg").write_bytes(whole[:len(whole) // 2])
    names = ("gif.jpg", "other.jpg", "cut.jpg", "cut.jpg", "none.jpg")
    bad = [record("<image>", "b", image=name, id=name) for name in names]
    bad += [{"id": "odd", "conversations": 3}, record("<image>", "b", image="../x.json"), None]
    (world / "y.json").write_text(json.dumps(records[:20] + bad))
    said = "\n".join(make(world, json_name="y.json"))
    report = json.loads((world / "out" / "report.json").read_text())
    assert report["records"] == 28 and report["kept"] == 20
    assert {reason: entry["count"] for reason, entry in report["left_out"].items()} == {
        "an assistant turn is empty": 1, "the last question has no answer": 1, "its picture can't be read": 2,
        "its picture is missing": 1, "not LLaVA's format": 3}
    assert report["left_out"]["its picture is missing"]["examples"] == [
        "record 24 (id 'none.jpg'): no such image: 'none.jpg'"]
    assert "truncated" in report["left_out"]["its picture can't be read"]["examples"][1]
    assert report["left_out"]["not LLaVA's format"]["examples"][1:] == [
        "record 26 (id 'r'): \"image\" is '../x.json', which leads out of the image folder",
        'record 27: has no list "conversations"']
    assert {odd: entry["count"] for odd, entry in report["odd_pictures"].items()} == {
        "GIF called .jpg": 1, "called .gif instead of .jpg": 1}
    assert "3 not LLaVA's format (first: record 25 (id 'odd')" in said and "1 GIF called .jpg" in said
    kept = [r for i, r in enumerate(records[:20]) if i not in (17, 18)]
    (world / "z.json").write_text(json.dumps(kept + [bad[0], {**bad[1], "image": "other.gif"}]))
    prepared = Prepared(world / "out", None, tokenizer, "v1", 28)
    loaded = data.load(world / "z.json", images, tokenizer, "v1", 28)
    assert len(prepared) == len(loaded) == 20
    for i in range(20):                                  # the records' numbers are other ones, now
        a, b = prepared[i], loaded[i]
        assert a["ids"] == b["ids"] and torch.equal(a["pixels"], b["pixels"])
    with pytest.raises(UserError, match="8 of 28 .* more than --tolerate 0.2: .*1 its picture is missing") as e:
        make(world, "out2", "y.json", tolerate=0.2)
    assert "\n" not in str(e.value) and not (world / "out2").exists() and not (world / "out2.tmp").exists()


def test_the_report_counts(world, tokenizer):
    make(world)
    report = json.loads((world / "out" / "report.json").read_text())
    loaded = data.load(world / "x.json", None, tokenizer, say=lambda _: None)
    samples = [loaded.sample(i) for i in range(len(loaded))]
    assert sum(s["ids"] for s in report["sources"].values()) == sum(len(s.ids) for s in samples)
    learnt = sum(label != IGNORE for sample in samples for label in sample.labels)
    assert sum(s["supervised"] for s in report["sources"].values()) == learnt
    assert sum(s["records"] for s in report["sources"].values()) == 300
    assert set(report["sources"]) == {"coco", "no folder", "text only"}
    for picture, what in ((True, "with picture"), (False, "text only")):
        those = [len(s.ids) for s in samples if (IMAGE_TOKEN in s.ids) == picture]
        table = report["lengths"][what]
        assert (table["samples"], table["longest"]) == (len(those), max(those))
        assert table["histogram"]["below 128"] == sum(64 <= n < 128 for n in those)
        assert sum(table["histogram"].values()) == len(those)


def test_pictures_are_judged_as_by_opening_them(tmp_path):
    """`look` with decode against open_image, on files cut anywhere; without it cut files are found just the same."""
    contents = {}
    for kind, suffix in (("JPEG", "jpg"), ("PNG", "png"), ("GIF", "gif"), ("WEBP", "webp")):
        noise(tmp_path / f"whole.{suffix}", format=kind)
        whole = (tmp_path / f"whole.{suffix}").read_bytes()
        for share in (1, 0, 0.01, 0.1, 0.5, 0.9, 0.99):
            contents[f"{kind}{share}.{suffix}"] = whole[:round(share * len(whole))]
        contents[f"{kind}x.{suffix}"] = whole + b"trailing"
        contents[f"{kind}y.{suffix}"] = whole[:40] + bytes(30) + whole[70:]
    noise(tmp_path / "gray.jpg", (64, 64), quality=5)
    Image.new("CMYK", (40, 30)).save(tmp_path / "cmyk.jpg")
    Image.new("L", (1, 1)).save(tmp_path / "one.jpg", progressive=True)
    contents |= {"text.jpg": b"<html>not found</html>"}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    judged = {True: 0, False: 0}
    for name in sorted(os.listdir(tmp_path)):
        try:
            open_image(tmp_path / name)
            fine = True
        except UserError:
            fine = False
        judged[fine] += 1
        found = prepare.look(tmp_path, name, decode=True)
        assert (found.reason is None) == fine and found.path == name, (name, found)
        if "y." not in name:                  # damage in mid-file is what --decode is for
            assert (prepare.look(tmp_path, name, decode=False).reason is None) == fine, name
    assert min(judged.values()) > 10
    (tmp_path / "two.png").write_bytes(b""), (tmp_path / "two.gif").write_bytes(b"")
    assert prepare.look(tmp_path, "two.jpg", False).reason == "its picture is missing"      # which of the two?


# ---------------------------------------------------------------------------------------------------------------------
# prepare: once, and whole or not at all

def test_a_second_run_does_nothing(world):
    make(world)
    before = {file.name: file.stat().st_mtime_ns for file in (world / "out").iterdir()}
    assert make(world) == [f"{world / 'out'} is already prepared from these very inputs; nothing to do"]
    assert {file.name: file.stat().st_mtime_ns for file in (world / "out").iterdir()} == before
    with pytest.raises(UserError, match="another template"):
        make(world, template="plain")
    with pytest.raises(UserError, match="another decode"):
        make(world, decode=True)
    text = (world / "x.json").read_text()
    (world / "x.json").write_text(text.replace("cat", "rat", 1))            # as long as before
    with pytest.raises(UserError, match="another json"):
        make(world)
    (world / "mine").mkdir()
    (world / "mine" / "thesis.txt").write_text("")
    with pytest.raises(UserError, match="isn't a prepared folder"):
        make(world, "mine")
    (world / "empty").mkdir()
    make(world, "empty")
    assert (world / "empty" / "report.json").exists()


def test_an_interrupted_run_leaves_nothing(world, monkeypatch):
    whole, calls = prepare.digest, []

    def digest(job):
        calls.append(job)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return whole(job)

    monkeypatch.setattr(prepare, "digest", digest)
    with pytest.raises(KeyboardInterrupt):
        make(world)
    assert not (world / "out").exists() and not (world / "out.tmp").exists()
    (world / "out.tmp").mkdir()                                             # of a run that was killed
    (world / "out.tmp" / "junk.npy").write_text("")
    make(world)
    assert not (world / "out" / "junk.npy").exists() and not (world / "out.tmp").exists()
    (world / "out2.tmp" / "photos").mkdir(parents=True)                     # somebody's own
    with pytest.raises(UserError, match="out2.tmp: would be emptied, but holds 'photos'"):
        make(world, "out2")
    (world / "out2.tmp" / "photos").rmdir()
    holder = os.open(world / "out2.tmp", os.O_RDONLY)                       # of a run that is running
    fcntl.flock(holder, fcntl.LOCK_EX)
    with pytest.raises(UserError, match="another process"):
        make(world, "out2")
    os.close(holder)
    assert (world / "out2.tmp").exists() and not (world / "out2").exists()


SLOW = """
import sys, time
sys.path.insert(0, {root!r})
import data
from training import prepare
stream = data.stream
data.stream = lambda *args: (time.sleep(0.1) or record for record in stream(*args))
prepare.CHUNK = 1
prepare.prepare({json!r}, {images!r}, {out!r}, {llm!r}, workers=2)
"""


def open_files(pid):
    """Paths of what a process has open; none once it has ended."""
    found = []
    with suppress(OSError):
        for link in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(OSError):
                found.append(link.readlink())
    return found


def test_a_run_that_was_killed_leaves_no_process_and_no_lock(world):
    program = SLOW.format(root=str(ROOT), json=str(world / "x.json"), images=str(world / "images"),
                          out=str(world / "out"), llm=str(LLM))
    run = subprocess.Popen([sys.executable, "-c", program])
    reading, tmp, tic = [], world / "out.tmp", time.perf_counter()
    while len(reading) < 2 or any(tmp in open_files(pid) for pid in reading):
        assert run.poll() is None and time.perf_counter() < tic + 60
        time.sleep(0.05)                                # until its two reading processes are there, without the lock
        reading = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
    assert tmp in open_files(run.pid)
    run.kill()
    run.wait()
    assert tmp.exists() and not (world / "out").exists()
    make(world)                                         # at once
    assert (world / "out").exists() and not tmp.exists()
    tic = time.perf_counter()
    while any(open_files(pid) for pid in reading):      # a process that has ended has none
        time.sleep(0.05)
        assert time.perf_counter() < tic + 20


def test_inputs_that_are_not_there(world):
    with pytest.raises(UserError, match="none.json: no such file"):
        make(world, json_name="none.json")
    with pytest.raises(UserError, match="nowhere: no such folder"):
        prepare.prepare(world / "x.json", world / "nowhere", world / "out", LLM)
    with pytest.raises(UserError, match="--images"):
        prepare.prepare(world / "x.json", None, world / "out", LLM)
    (world / "t.json").write_text(json.dumps([record("a", "b")]))
    prepare.prepare(world / "t.json", None, world / "t", LLM, say=lambda _: None)
    alone = Prepared(world / "t", None, Tokenizer.from_pretrained(LLM), "v1", 28)
    assert len(alone) == 1 and not alone[0]["pixels"].any() and not alone.has_picture().any()
    (world / "t.json").write_text(json.dumps([record("a", "")]))
    with pytest.raises(UserError, match="not one record"):
        prepare.prepare(world / "t.json", None, world / "u", LLM)
    assert sorted(p.name for p in world.iterdir()) == ["images", "t", "t.json", "x.json"]


def test_only_a_few_records_wait(tmp_path):
    taken = []

    def todo():
        for i in range(200):
            taken.append(i)
            yield prepare.Job(LLM, "v1", None, False, i, [record("a", "b")], [-1], [])

    for n, (job, (rows, _)) in enumerate(prepare.in_order(todo(), 1)):
        assert job.first == n and rows[0].name == f"record {n} (id 'r')" and len(taken) <= n + 6
    assert n == 199


def test_command(world, monkeypatch, capsys):
    def call(*args):
        monkeypatch.setattr(sys, "argv", ["data.py", *map(str, args)])
        data.main()
        return capsys.readouterr().out

    command = ["prepare", "--json", world / "x.json", "--images", world / "images", "--out", world / "out",
               "--llm", LLM, "--workers", 0]
    with pytest.raises(UserError, match="4 of 300 records would be left out, more than --tolerate 0.01"):
        call(*command)
    assert "296 of 300" in call(*command, "--tolerate", 0.02) and "nothing to do" in call(*command)
    out = call("padding", "--lengths", world / "out", "--batch", 16, "--ranks", 2, "--micro", 4, "--picture-rows", 36)
    shares = {line.split()[1]: float(line.split()[3].rstrip("%")) for line in out.splitlines() if "--group" in line}
    assert shares["length"] < shares["none"] and "296 samples" in out
    with pytest.raises(UserError, match="not a prepared folder"):
        call("padding", "--lengths", world / "images")


# ---------------------------------------------------------------------------------------------------------------------
# The data set

def test_what_does_not_fit_is_refused(world, tokenizer, tmp_path_factory):
    make(world)
    other = tmp_path_factory.mktemp("other")
    (other / "tokenizer.model").write_bytes((LLM / "tokenizer.model").read_bytes() + b"\n")
    with pytest.raises(UserError, match="not a prepared folder"):
        Prepared(world / "images", None, tokenizer, "v1")
    with pytest.raises(UserError, match="gone: no such folder"):
        Prepared(world / "out", world / "gone", tokenizer, "v1")
    foreign = Tokenizer.from_pretrained(LLM)
    foreign.file = other / "tokenizer.model"
    with pytest.raises(UserError, match="another tokenizer"):
        Prepared(world / "out", None, foreign, "v1")
    foreign = Tokenizer.from_pretrained(LLM)
    foreign.eos_ids = {7}
    with pytest.raises(UserError, match="another tokenizer"):
        Prepared(world / "out", None, foreign, "v1")
    file, whole = world / "out" / "tokens.npy", (world / "out" / "tokens.npy").read_bytes()
    for damage in (whole[:-4], whole[:50], b""):
        file.write_bytes(damage)
        with pytest.raises(UserError, match="out: an array is missing or damaged"):
            Prepared(world / "out", None, tokenizer, "v1")
    np.save(file, np.zeros(5, np.int32))
    with pytest.raises(UserError, match="tokens.npy isn't as long"):
        Prepared(world / "out", None, tokenizer, "v1")


def test_lengths_are_exact(world, tokenizer):
    make(world)
    prepared = Prepared(world / "out", None, tokenizer, "v1", 28)
    samples = [vars(prepared.sample(i)) for i in range(len(prepared))]
    for max_length in (1, 2, 40, 60, 75, 100, 2048):
        slow = []
        for sample in samples:
            ids = data.cut(sample, max_length, 36)["ids"]
            slow.append(len(ids) + (35 if IMAGE_TOKEN in ids else 0))
        assert prepared.lengths(36, max_length).tolist() == slow
        assert max(slow) <= max_length
    assert prepared.has_picture().tolist() == [IMAGE_TOKEN in sample["ids"] for sample in samples]


def test_other_processes_map_the_files_themselves(world, tokenizer):
    make(world)
    prepared = Prepared(world / "out", None, tokenizer, "v1", 28)
    state = prepared.__getstate__()
    assert "arrays" in vars(prepared) and "arrays" not in state
    assert len(pickle.dumps(state)) < 5000
    same_items(pickle.loads(pickle.dumps(prepared)), prepared)


def test_a_picture_damaged_later(world, tokenizer, capfd, tmp_path):
    make(world)
    note = tmp_path / "damaged.jsonl"
    prepared = Prepared(world / "out", None, tokenizer, "v1", 28, damaged=note)
    before = [prepared[i] for i in range(len(prepared))]
    (world / "images" / "c.jpg").write_bytes(b"")
    hit = [i for i in range(len(prepared)) if prepared.path(i) == world / "images" / "c.jpg"]
    assert len(hit) > 20                 # under two names, one of them dotted
    twice = 2 * [*range(40), *hit]
    rows = torch.utils.data.DataLoader(prepared, batch_size=None, num_workers=2, sampler=twice)
    for i, after in zip(twice, rows, strict=True):
        for key in ("ids", "query", "turns", "ends"):
            assert after[key] == before[i][key]
        assert torch.equal(after["pixels"], torch.zeros(3, 28, 28) if i in hit else before[i]["pixels"])
        assert after["labels"] == ([IGNORE] * len(after["ids"]) if i in hit else before[i]["labels"])
    lines = [json.loads(line) for line in note.read_text().splitlines()]
    assert [line["path"] for line in lines] == [str(world / "images" / "c.jpg")]
    assert any(prepared.record_id(i) in lines[0]["message"] for i in hit)             # whichever reader came first
    assert capfd.readouterr().err.count("damaged picture") == 1
    strict = Prepared(world / "out", None, tokenizer, "v1", 28)
    with pytest.raises(UserError, match="c.jpg: cannot be read"):
        strict[hit[0]]
    note.write_text("".join(json.dumps(dict(path=str(i))) + "\n" for i in range(10)))       # the eleventh
    with pytest.raises(UserError, match="11 pictures can't be read"):
        prepared[hit[0]]
    os.rename(world / "images", world / "elsewhere")                        # then nothing is said about pictures
    with pytest.raises(UserError, match="no such image"):
        prepared[hit[0]]


# ---------------------------------------------------------------------------------------------------------------------
# The order

def some(n=203, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(10, 900, n), rng.random(n) < 0.7


def test_plain_order_is_the_permutation_it_always_was():
    g, slow = torch.Generator().manual_seed(3), []
    for _ in range(3):
        shuffled = torch.randperm(10, generator=g).tolist()
        slow += [shuffled[at:at + 4] for at in (0, 4, 8)]
    assert list(order.order(10, 9, 4, 3)) == slow and list(order.order(10, 7, 4, 3)) == slow[:7]


@pytest.mark.parametrize("group", order.GROUPS)
def test_every_sample_once_an_epoch(group):
    lengths, pictures = some()
    per_epoch = math.ceil(203 / 16)
    steps = list(order.order(203, 2 * per_epoch, 16, 1, group, lengths, pictures))
    for epoch in (steps[:per_epoch], steps[per_epoch:]):
        assert sorted(sum(epoch, [])) == list(range(203))
        assert [len(rows) for rows in epoch] == [16] * (per_epoch - 1) + [203 % 16]
    assert steps[:per_epoch] != steps[per_epoch:]
    assert steps == list(order.order(203, 2 * per_epoch, 16, 1, group, lengths, pictures))
    assert steps != list(order.order(203, 2 * per_epoch, 16, 2, group, lengths, pictures))


def test_groups_hold_what_they_say():
    lengths, pictures = some(2048)
    pictures[:5] = True, True, False, False, False
    spread = {}
    for group in order.GROUPS:
        steps = list(order.order(2048, 2048 // 16, 16, 1, group, lengths, pictures))
        spread[group] = np.mean([np.ptp(lengths[rows]) for rows in steps])
        if group != "none":
            assert all(lengths[rows].tolist() == sorted(lengths[rows], reverse=True) for rows in steps)
        mixed = [step for step, rows in enumerate(steps) if len(set(pictures[rows])) > 1]
        assert mixed == [len(steps) - 1] if group == "modality-length" else len(mixed) > 10
        kinds = [pictures[rows[0]] for rows in steps]
        assert len(set(kinds[:20])) == 2                                    # not one kind after the other
    assert spread["length"] < 0.1 * spread["none"]


@pytest.mark.parametrize("group", ["length", "modality-length"])
def test_shares_are_balanced_and_the_batch_is_everybodys(group):
    lengths, pictures = some(1024)
    for rows in order.order(1024, 64, 16, 0, group, lengths, pictures):
        for size in (1, 2, 4, 8):
            cut = [train.pieces(rows, rank, size, 3) for rank in range(size)]
            assert len({len(batches) for batches, _ in cut}) == 1          # nobody waits for a micro-batch in vain
            shares = [sum(batches[:counting], []) for batches, counting in cut]
            assert sorted(sum(shares, [])) == sorted(rows)
            sums = [lengths[share].sum() for share in shares]
            assert max(sums) - min(sums) <= np.ptp(lengths[rows])


def test_padding_is_counted_as_collate_pads():
    lengths, pictures = some(120)
    steps = list(order.order(120, 8, 15, 0, "modality-length", lengths, pictures))
    for ranks, micro in ((1, 15), (2, 3), (4, 2)):
        computed = real = waited = 0
        for rows in steps:
            widths = []
            for rank in range(ranks):
                mine, counting = train.pieces(rows, rank, ranks, micro)
                batches = [data.collate([dict(ids=[1] * lengths[i], labels=[1] * lengths[i], query=[],
                                              pixels=torch.zeros(3, 1, 1)) for i in piece])
                           for piece in mine[:counting]]
                widths.append([batch["ids"].numel() for batch in batches])
                computed += sum(widths[-1])
                real += sum(int(batch["mask"].sum()) for batch in batches)
            together = [[share[i] for share in widths if i < len(share)] for i in range(max(map(len, widths)))]
            waited += ranks * sum(map(max, together))
        assert padding.padding(iter(steps), lengths, ranks, micro) == (1 - real / computed, 1 - real / waited)
        assert real == lengths.sum() < computed <= waited


def test_the_mixture_is_llavas():
    words, pictures = padding.mixture(scale=0.01)
    assert len(words) == pytest.approx(6653, abs=10) and (~pictures).sum() == 407
    assert sum(count for _, count, *_ in padding.MIX.values()) == 665_298      # as its authors list them
    assert np.array_equal(words, padding.mixture(scale=0.01)[0]) and words.min() > padding.FRAME


# ---------------------------------------------------------------------------------------------------------------------
# train.py --data

@pytest.fixture(scope="module")
def model(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    vision = CLIPVision(CLIPVisionConfig(image_size=32, patch_size=16, hidden_size=16, intermediate_size=32,
                                         num_hidden_layers=2, num_attention_heads=2))
    llm = Llama(LlamaConfig(vocab_size=tokenizer.vocab_size, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
                            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
                            tie_word_embeddings=True, bos_token_id=1, eos_token_id=2))
    llm.init_weights()
    config = CCRAConfig(text_dim=32, vision_dim=16, n_layers=2, d_hidden=8)
    VLM.build(vision, llm, config).save_pretrained(folder, tokenizer_file=tokenizer.file)
    return folder


@pytest.fixture
def trainable(tmp_path):
    """22 records that mix text and pictures, with answers of very different lengths."""
    (tmp_path / "images").mkdir()
    records = []
    for i in range(22):
        noise(tmp_path / "images" / f"{i}.png")
        records.append(record("<image>\nHow?" if i % 3 else "How?", "yes " * (1 + 3 * (i % 7)), id=i,
                              **({"image": f"{i}.png"} if i % 3 else {})))
    (tmp_path / "x.json").write_text(json.dumps(records))
    make(tmp_path)
    return tmp_path


def flags(model, world, out, *more):
    return ["--stage", "2", "--model", str(model), "--out", str(world / out), "--steps", "5", "--batch", "7", "--lr",
            "1e-2", "--device", "cpu", "--workers", "0", "--dtype", "float32", *more]


def weights_of(world, out):
    return load_file(world / out / "model.safetensors")


def log_of(world, out):
    return [row.split(",")[:4] for row in (world / out / "log.csv").read_text().splitlines()[1:]]


def test_training_is_that_on_the_json(model, trainable):
    train.main(flags(model, trainable, "a", "--json", str(trainable / "x.json"), "--images", str(trainable / "images")))
    train.main(flags(model, trainable, "b", "--data", str(trainable / "out"), "--group", "none"))
    assert log_of(trainable, "a") == log_of(trainable, "b")
    one, two = weights_of(trainable, "a"), weights_of(trainable, "b")
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_the_plan_counts_what_was_prepared(model, trainable, capsys):
    train.main(["--stage", "2", "--plan", "--model", str(model), "--data", str(trainable / "out"), "--gpus", "1",
                "--parallel", "ddp", "--max-length", "99", "--batch", "2"])
    n = json.loads((trainable / "out" / "report.json").read_text())["kept"]
    assert f"{n} samples in {-(-n // 2)} steps of 2" in capsys.readouterr().out


def test_a_grouped_run_goes_on_in_mid_epoch(model, trainable):
    grouped = ["--data", str(trainable / "out"), "--micro", "3"]
    train.main(flags(model, trainable, "whole", *grouped))
    train.main(flags(model, trainable, "parts", *grouped, "--stop-after", "2"))      # of 4 in an epoch
    with pytest.raises(UserError, match="group modality-length, not length"):
        train.main(flags(model, trainable, "parts", *grouped, "--group", "length"))
    train.main(flags(model, trainable, "parts", *grouped))
    assert log_of(trainable, "whole") == log_of(trainable, "parts") and len(log_of(trainable, "whole")) == 5
    one, two = weights_of(trainable, "whole"), weights_of(trainable, "parts")
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_a_resume_is_of_the_same_json(model, trainable):
    """As many records of the same lengths, but another answer: not the run that was begun."""
    train.main(flags(model, trainable, "a", "--data", str(trainable / "out"), "--stop-after", "1"))
    text = (trainable / "x.json").read_text()
    (trainable / "x.json").write_text(text.replace("yes yes", "yes no", 1))
    make(trainable, "out2")
    with pytest.raises(UserError, match="is of a run with sha256_of_json [0-9a-f]{64}, not [0-9a-f]{64}; remove it"):
        train.main(flags(model, trainable, "a", "--data", str(trainable / "out2")))
    os.rename(trainable / "out", trainable / "moved")                       # the same folder in another place is fine
    train.main(flags(model, trainable, "a", "--data", str(trainable / "moved")))
    assert len(log_of(trainable, "a")) == 5


def test_processes_stay_in_step_over_damaged_pictures(model, trainable):
    """Two processes and one, a share of whose pictures went bad after prepare: one loss curve, and it is said once."""
    for i in (1, 2, 4, 5):
        (trainable / "images" / f"{i}.png").write_bytes(b"gone")
    both = ["--data", str(trainable / "out"), "--micro", "2", "--threads", "1"]
    train.main(flags(model, trainable, "one", *both))
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, str(ROOT / "train.py"), *flags(model, trainable, "two", *both)]
    torchrun = {**os.environ, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "localhost",
                "MASTER_PORT": port}
    runs = [subprocess.Popen(command, env={**torchrun, "RANK": rank, "LOCAL_RANK": rank}, text=True,
                             stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) for rank in "01"]
    said = [run.communicate(timeout=300)[1] for run in runs]
    assert [run.returncode for run in runs] == [0, 0], said
    for a, b in zip(log_of(trainable, "one"), log_of(trainable, "two"), strict=True):
        assert [float(x) for x in a] == pytest.approx([float(x) for x in b], rel=1e-3, abs=1e-4)
    assert "".join(said).count("damaged picture") == 4
    assert len((trainable / "two" / "damaged.jsonl").read_text().splitlines()) == 4


def test_flags_that_need_each_other(model, trainable):
    for more, why in ((["--data", "x", "--json", "y"], "two ways"), (["--group", "length"], "needs lengths"),
                      (["--data", str(trainable / "images")], "not a prepared folder")):
        with pytest.raises(UserError, match=why):
            train.main(flags(model, trainable, "x", *more))
