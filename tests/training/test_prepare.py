"""`data.py prepare` against the plain way: `data.load` and `open_image`."""
import json
import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from PIL import Image

import data
from clip import open_image, read_pixels
from core.common import ROOT, UserError
from core.tokenizer import IGNORE, IMAGE_TOKEN, Tokenizer
from tests.training.records import LLM, make, make_world, noise, record, same_items
from training import reading
from training.prepare import prepare
from training.prepared import Prepared


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_pretrained(LLM)


@pytest.fixture
def world(tmp_path):
    return make_world(tmp_path)


def report_of(world, out="out"):
    return json.loads((world / out / "report.json").read_text())


# --------------------------------------------------------------------------------------------------
# What is kept

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
    assert prepared.sample(0).spans == []
    assert prepared[0]["query"] == tokenizer.encode("Say it.", continues=True)
    assert list(report_of(world)["sources"]) == ["numbered folders"]
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
    report = report_of(world)
    assert report["records"] == 28 and report["kept"] == 20
    assert {reason: entry["count"] for reason, entry in report["left_out"].items()} == {
        "an assistant turn is empty": 1, "the last question has no answer": 1,
        "its picture can't be read": 2, "its picture is missing": 1, "not LLaVA's format": 3}
    assert report["left_out"]["its picture is missing"]["examples"] == [
        "record 24 (id 'none.jpg'): no such image: 'none.jpg'"]
    assert "truncated" in report["left_out"]["its picture can't be read"]["examples"][1]
    assert report["left_out"]["not LLaVA's format"]["examples"][1:] == [
        "record 26 (id 'r'): \"image\" is '../x.json', which leads out of the image folder",
        'record 27: has no list "conversations"']
    assert {odd: entry["count"] for odd, entry in report["odd_pictures"].items()} == {
        "GIF called .jpg": 1, "called .gif instead of .jpg": 1}
    assert "3 not LLaVA's format (first: record 25 (id 'odd')" in said
    assert "1 GIF called .jpg" in said
    kept = [r for i, r in enumerate(records[:20]) if i not in (17, 18)]
    (world / "z.json").write_text(json.dumps(kept + [bad[0], {**bad[1], "image": "other.gif"}]))
    prepared = Prepared(world / "out", None, tokenizer, "v1", 28)
    loaded = data.load(world / "z.json", images, tokenizer, "v1", 28)
    assert len(prepared) == len(loaded) == 20
    for i in range(20):                                  # the records' numbers are other ones, now
        a, b = prepared[i], loaded[i]
        assert a["ids"] == b["ids"] and torch.equal(a["pixels"], b["pixels"])
    why = "8 of 28 .* more than --tolerate 0.2: .*1 its picture is missing"
    with pytest.raises(UserError, match=why) as e:
        make(world, "out2", "y.json", tolerate=0.2)
    assert "\n" not in str(e.value)
    assert not (world / "out2").exists() and not (world / "out2.tmp").exists()


def test_pictures_that_are_not_shown_as_stored_are_counted(world, tokenizer):
    """And said again when training begins; what can't be made square isn't taken."""
    images, exif = world / "images", Image.Exif()
    exif[0x0112] = 6
    for i in range(3):
        noise(images / f"{i}.jpg", exif=exif)
    Image.new("RGBA", (9, 9), (0, 0, 0, 99)).save(images / "clear.png")
    Image.new("I;16", (9, 9), 40_000).save(images / "deep.png")
    Image.new("L", (1, 30000)).save(images / "narrow.png")
    names = ["0.jpg", "1.jpg", "2.jpg", "clear.png", "deep.png", "narrow.png", "http://a.b/c.png"]
    (world / "n.json").write_text(json.dumps([record("<image>", "b", image=n) for n in names]))
    make(world, json_name="n.json", tolerate=0.5)
    report = report_of(world)
    assert {odd: entry["count"] for odd, entry in report["odd_pictures"].items()} == {
        "stored on its side (EXIF orientation 6)": 3, "transparent: shown on white": 1,
        "16-bit grey scaled to 8 bits": 1}
    unread, missing = (report["left_out"][f"its picture {why}"]["examples"]
                       for why in ("can't be read", "is missing"))
    assert "'narrow.png': a picture of 1 x 30000 is too narrow" in unread[0]
    assert "is a web address" in missing[0]
    for upright in (False, True):
        said = []
        opened = Prepared(world / "out", None, tokenizer, "v1", 28, upright=upright,
                          say=said.append)
        assert "16-bit grey" in said[0] and "3 pictures stored on the side" in said[1]
        assert torch.equal(opened.pixels(0), read_pixels(images / "0.jpg", 28, True, upright))


def test_the_report_counts(world, tokenizer):
    make(world)
    report = report_of(world)
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
    """`look` with decode against open_image, on files cut anywhere; without it cut files are found
    just the same."""
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
        found = reading.look(tmp_path, name, decode=True)
        assert (found.reason is None) == fine and found.path == name, (name, found)
        if "y." not in name:                  # damage in mid-file is what --decode is for
            assert (reading.look(tmp_path, name, decode=False).reason is None) == fine, name
    assert min(judged.values()) > 10
    for name in ("two.png", "two.gif"):       # which of the two?
        (tmp_path / name).write_bytes(b"")
    assert reading.look(tmp_path, "two.jpg", False).reason == "its picture is missing"


# --------------------------------------------------------------------------------------------------
# Once, and whole or not at all

def test_a_second_run_does_nothing(world):
    make(world)
    before = {file.name: file.stat().st_mtime_ns for file in (world / "out").iterdir()}
    assert len(before) == 11                                  # and no lock, for instance
    (said,) = make(world)
    assert said == f"{world / 'out'} is already prepared from these very inputs; nothing to do"
    assert {file.name: file.stat().st_mtime_ns for file in (world / "out").iterdir()} == before
    with pytest.raises(UserError, match="another template"):
        make(world, template="plain")
    with pytest.raises(UserError, match="another decode"):
        make(world, decode=True)
    text = (world / "x.json").read_text()
    (world / "x.json").write_text(text.replace("cat", "rat", 1))          # as long as before
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
    whole, calls = reading.digest, []

    def digest(job):
        calls.append(job)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return whole(job)

    monkeypatch.setattr(reading, "digest", digest)
    with pytest.raises(KeyboardInterrupt):
        make(world)
    assert not (world / "out").exists() and not (world / "out.tmp").exists()
    (world / "out.tmp").mkdir()                                           # of a run that was killed
    (world / "out.tmp" / "junk.npy").write_text("")
    make(world)
    assert not (world / "out" / "junk.npy").exists() and not (world / "out.tmp").exists()
    (world / "out2.tmp" / "photos").mkdir(parents=True)                   # somebody's own
    with pytest.raises(UserError, match="out2.tmp: would be emptied, but holds 'photos'"):
        make(world, "out2")
    (world / "out2.tmp" / "photos").rmdir()
    make(world, "out2")
    assert (world / "out2").exists()


SLOW = """
import sys, time
from training import reading
from training.prepare import prepare
read = reading.read
reading.read = lambda *record: (time.sleep(0.1), read(*record))[1]
reading.CHUNK = 1
prepare(*sys.argv[1:], workers=2)
"""


def open_files(pid):
    """Paths of what a process has open; none once it has ended."""
    found = []
    with suppress(OSError):
        for link in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(OSError):
                found.append(link.readlink())
    return found


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks into /proc")
def test_a_run_has_its_folder_until_it_is_killed_and_leaves_no_process(world):
    inputs = (world / "x.json", world / "images", world / "out", LLM)
    run = subprocess.Popen([sys.executable, "-c", SLOW, *map(str, inputs)], cwd=ROOT)
    children, tmp = [], world / "out.tmp"
    tic = time.perf_counter()
    while len(children) < 2:                            # until its two reading processes are there
        assert run.poll() is None and time.perf_counter() < tic + 60
        time.sleep(0.05)
        children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
    with pytest.raises(UserError, match="another process"):
        make(world)
    assert tmp.exists() and run.poll() is None and all(map(open_files, children))
    run.kill()
    run.wait()
    assert tmp.exists() and not (world / "out").exists()
    make(world)                                         # at once
    assert (world / "out").exists() and not tmp.exists()
    tic = time.perf_counter()
    while any(map(open_files, children)):               # a process that has ended has none
        time.sleep(0.05)
        assert time.perf_counter() < tic + 20


def test_inputs_that_are_not_there(world, tokenizer):
    with pytest.raises(UserError, match="none.json: no such file"):
        make(world, json_name="none.json")
    with pytest.raises(UserError, match="nowhere: no such folder"):
        prepare(world / "x.json", world / "nowhere", world / "out", LLM)
    with pytest.raises(UserError, match="--images"):
        prepare(world / "x.json", None, world / "out", LLM)
    (world / "t.json").write_text(json.dumps([record("a", "b")]))
    prepare(world / "t.json", None, world / "t", LLM, say=lambda _: None)
    alone = Prepared(world / "t", None, tokenizer, "v1", 28)
    assert len(alone) == 1 and not alone[0]["pixels"].any() and not alone.has_picture().any()
    (world / "t.json").write_text(json.dumps([record("a", "")]))
    with pytest.raises(UserError, match="not one record"):
        prepare(world / "t.json", None, world / "u", LLM)
    assert sorted(p.name for p in world.iterdir()) == ["images", "t", "t.json", "x.json"]


def test_only_a_few_jobs_wait():
    taken = []

    def todo():
        for i in range(200):
            taken.append(i)
            yield reading.Job(LLM, "v1", None, False, i, [record("a", "b")], [-1], [])

    with reading.readers(1) as pool:
        for n, (job, (rows, _)) in enumerate(reading.in_order(todo(), pool, 4)):
            assert job.first == n and rows[0].name == f"record {n} (id 'r')"
            assert len(taken) <= n + 6
    assert n == 199


def test_a_reader_that_is_killed_ends_the_run():
    with pytest.raises(UserError, match="a reading process was killed"):
        with reading.readers(1) as pool:
            pool.submit(os._exit, 1).result()


def test_command(world, monkeypatch, capsys):
    def call(*args):
        monkeypatch.setattr(sys, "argv", ["data.py", *map(str, args)])
        data.main()
        return capsys.readouterr().out

    command = ["prepare", "--json", world / "x.json", "--images", world / "images",
               "--out", world / "out", "--llm", LLM, "--workers", 0]
    why = "4 of 300 records would be left out, more than --tolerate 0.01"
    with pytest.raises(UserError, match=why):
        call(*command)
    assert "296 of 300" in call(*command, "--tolerate", 0.02)
    assert "nothing to do" in call(*command)
