"""The desk behind the page's server, asked through it: pictures, answers, stopping, waiting."""
import base64
import io
import json
import re
import threading
import time

import numpy as np
import pytest
from PIL import Image

import sample
from core.common import UserError
from tests.viz.helpers import noise, scene
from tests.viz.served import SCENE
from toy import world as toy
from viz import desk, maps

COLOR = "What color is the square?"


def encoded(image, kind="PNG", **how):
    file = io.BytesIO()
    image.save(file, format=kind, **how)
    return file.getvalue()


def seen(told):
    """The picture in a data URL."""
    return Image.open(io.BytesIO(base64.b64decode(told["image"].partition(",")[2])))


def texts(lines):
    return [line["text"] for line in lines if "text" in line and "done" not in line]


# --------------------------------------------------------------------------------------------------
# Pictures

def test_pictures(live):
    """In several formats, upright, what isn't shown as it is stored being said."""
    plain = scene()
    for kind in ("PNG", "WEBP", "GIF", "BMP", "TIFF"):
        how = dict(lossless=True) if kind == "WEBP" else {}
        status, told = live.request("POST", "/picture", encoded(plain, kind, **how))
        assert status == 200 and told["size"] == [96, 96] and re.fullmatch("[0-9a-f]{64}",
                                                                           told["picture"])
        if kind != "GIF":                                          # of 256 colours
            assert told["notes"] == [] and np.array_equal(seen(told), plain)
    exif = Image.Exif()
    exif[0x0112] = 6
    status, told = live.request("POST", "/picture", encoded(noise(60, 40), "JPEG", exif=exif))
    assert told["size"] == [40, 60] == list(seen(told).size)
    assert "EXIF orientation 6" in told["notes"][0] and told["notes"][1] == toy.KNOWS
    grey = Image.fromarray(np.arange(0, 65_536, 16, dtype=np.uint16).reshape(64, 64))
    status, told = live.request("POST", "/picture", encoded(grey))
    assert status == 200 and "16-bit grey" in told["notes"][0]
    status, told = live.request("POST", "/picture", encoded(noise(1000, 500)))
    assert told["size"] == [672, 336] and told["image"].startswith("data:image/jpeg")


def test_no_pictures(live):
    bomb = encoded(Image.new("1", (20_000, 20_000)))
    assert len(bomb) < 100_000
    for content, why in ((b"", "empty"), (b"hello\nthere", "no known kind"), (bomb, ""),
                         (b"<html>", "a web page"), (SCENE.read_bytes()[:2000], ""),
                         (encoded(Image.new("L", (9000, 1))), "too narrow")):
        status, told = live.request("POST", "/picture", content)
        assert status == 415 and why in told["error"] and "\n" not in told["error"]


def test_scenes(live):
    told = [live.request("POST", "/scene", b"")[1] for _ in range(2)]
    assert told[0]["picture"] != told[1]["picture"]
    assert all(toy.knows(seen(one).convert("RGB")) and one["notes"] == [] for one in told)
    assert re.fullmatch(r"[\w ]+(, [\w ]+)*", told[0]["caption"])
    assert live.ask("How many things are there?", picture=told[0]["picture"])["done"]


def test_old_pictures_are_forgotten(live):
    first = live.scene()
    for i in range(desk.KEPT - 1):
        live.show(encoded(noise(12, 12, i)))
    assert live.ask(COLOR, picture=first)["done"]                  # so it isn't the oldest any more
    live.show(encoded(noise(12, 12, 99)))
    assert live.ask(COLOR, picture=first)["done"]
    for i in range(desk.KEPT):
        live.show(encoded(noise(12, 12, i)))
    body = json.dumps(dict(picture=first, question=COLOR))
    status, told = live.request("POST", "/ask", body)
    assert status == 404 and "choose the picture again" in told["error"]
    assert len(live.desk.pictures) == desk.KEPT


# --------------------------------------------------------------------------------------------------
# Answers

def test_answers_are_those_of_sample(live, capsys):
    for question in (COLOR, "What color is the square? Answer in a sentence."):
        sample.main(["--image", str(SCENE), "--q", question, "--device", "cpu"])
        lines = list(live.lines(picture=live.scene(), question=question))
        done = lines[-1]
        assert done["text"] == "".join(texts(lines)) == capsys.readouterr().out[:-1]
        assert done["done"] and done["cut"] is None and done["why"] is None and not done["notes"]
        assert 0 < done["first"] <= done["seconds"] < 60
        sight = done["sight"]
        assert sight["question"] == question and sight["layers"] == 8
        assert "".join(sight["tokens"]) == done["text"]
    assert len(texts(lines)) > 3


def test_pieces_come_one_by_one(live, monkeypatch):
    """A piece is there before the next token is thought of."""
    steps, go = [], threading.Semaphore(0)
    generate = desk.Asker.generate

    def slowly(*given, **settings):
        for token in generate(*given, **settings):
            steps.append(token)
            assert go.acquire(timeout=30)
            yield token

    monkeypatch.setattr(desk.Asker, "generate", slowly)
    lines = live.lines(picture=live.scene(), question="Where is the square? Use a sentence.")
    for step in range(1, 4):
        go.release()
        assert "done" not in next(lines)
        deadline = time.monotonic() + 10
        while len(steps) < step + 1 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert len(steps) == step + 1
    go.release(200)
    assert list(lines)[-1]["done"]


def test_maps_are_those_of_maps_ask(live):
    asker = live.desk.askers[0]
    sight = maps.ask(asker.model, asker.tokenizer, Image.open(SCENE).convert("RGB"), COLOR)
    told = live.ask(COLOR)["sight"]
    for name, values in (("W_lp", sight.maps["W_lp"]), ("llm", sight.llm.mean(0))):
        numbers = np.frombuffer(base64.b64decode(told[name]), "<f4").reshape(values.shape)
        assert np.abs(numbers - values.numpy()).max() < 1e-6
    assert told["box"] == list(sight.box)


def test_a_large_picture_lies_where_it_lay(live):
    """What is kept of it is small, but the box is that of the whole."""
    image = noise(1001, 499)
    told = live.ask("What is it?", picture=live.show(encoded(image)))["sight"]
    assert told["size"] == [672, 335] and told["box"] == list(maps.visible(image, True)[1])


def test_a_conversation(live):
    """The turns so far are read: as in a chat of sample.py."""
    asker = live.desk.askers[0]
    turns = [["Is there an owl?", "no"], ["What word is printed?", ""]]
    row = asker.row([("Is there an owl?", "no"), ("What word is printed?", " "), (COLOR, None)])
    pixels = asker.pixels(Image.open(SCENE).convert("RGB"))
    ids = asker.model.generate(**asker.batch(row, pixels), eos_ids=asker.tokenizer.eos_ids)
    right = asker.tokenizer.decode([int(id[0]) for id in ids])
    assert live.ask(COLOR, turns=turns)["text"] == right


def test_parts_are_neutral_for_one_answer(live):
    config = live.desk.askers[0].model.fuser.config
    plain = live.ask(COLOR)["sight"]
    bare = live.ask(COLOR, off=["lpwca", "lwca", "pwca"])["sight"]
    assert len(set(base64.b64decode(bare["W_lp"]))) == 1           # all zero
    assert bare["w_hat"] == pytest.approx([1 / 8] * 8)
    one = live.ask(COLOR, off=["lwca"])["sight"]
    assert one["W_lp"] == plain["W_lp"] and one["w_hat"] == pytest.approx([1 / 8] * 8)
    assert config.lpwca and config.lwca and config.pwca
    assert live.ask(COLOR)["sight"] == plain


def test_the_model_beside(live):
    """It answers when it is asked, and says what it can't know."""
    picture = live.scene()
    own, other = (live.ask(COLOR, picture=picture, model=i) for i in (0, 1))
    assert own["sight"]["layers"] == 8 and other["sight"]["layers"] == 3
    assert own["text"] != other["text"]
    foreign = live.ask(COLOR, picture=live.show(encoded(noise(30, 20))), model=1)
    assert foreign["notes"] == []                                  # that one isn't the toy world's


def test_a_fuser_without_a_row_for_each_patch(live, monkeypatch):
    def unlike(*_):
        raise UserError("its fuser doesn't give one row for each patch")

    monkeypatch.setattr(maps.Seen, "sight", unlike)
    done = live.ask(COLOR)
    assert done["text"] == "black" and done["sight"] is None and "one row" in done["why"]


def test_cut_and_drawn(live):
    done = live.ask("What color is the square? Answer in a sentence.", max_new_tokens=2)
    assert done["cut"] == "cut off after 2 tokens: --max-new-tokens"
    assert len(done["sight"]["tokens"]) == 2
    done = live.ask(COLOR, temperature=3.0, max_new_tokens=20)
    assert done["done"]


def test_any_writing_stays_whole(live, monkeypatch):
    """Non-Latin text there and back, pieces as the tokenizer gives them."""
    question = "\u041a\u0430\u043a\u043e\u0439? \u4ec0\u4e48\u989c\u8272 \U0001f98a \u0627\u0644"
    said = live.desk.askers[0].tokenizer.encode("\u042f \u732b \U0001f98a e\u0301")

    def generate(self, batch, tokens, times, **settings):
        for id in said:
            tokens.append(id)
            times.append(time.perf_counter())
            yield id

    monkeypatch.setattr(desk.Asker, "generate", generate)
    monkeypatch.setattr(desk, "looked", lambda *_: (None, "not now"))
    lines = list(live.lines(picture=live.scene(), question=question))
    assert lines[-1]["text"] == "".join(texts(lines)) == "\u042f \u732b \U0001f98a e\u0301"
    monkeypatch.undo()
    assert live.ask(question)["sight"]["question"] == question


# --------------------------------------------------------------------------------------------------
# Stopping and waiting

@pytest.fixture
def endless(live, monkeypatch):
    """A model that doesn't come to an end by itself; the tokens it has said."""
    said = []

    def generate(self, batch, tokens, times, **settings):
        for _ in range(10_000):
            time.sleep(0.002)
            said.append(5)
            times.append(time.perf_counter())
            yield self.tokenizer.encode("a")[-1]

    monkeypatch.setattr(desk.Asker, "generate", generate)
    yield said
    deadline = time.monotonic() + 10
    while live.desk.busy and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not live.desk.busy and not live.desk.line


def test_stop(live, endless):
    lines = live.lines(picture=live.scene(), question=COLOR)
    for _ in range(5):
        next(lines)
    lines.close()                                                  # the connection, too
    time.sleep(0.3)
    after = len(endless)
    time.sleep(0.3)
    assert len(endless) == after < 10_000 and not live.desk.busy


def test_waiting(live, endless):
    """Each is told how many are before it, again when that changes; too many are refused."""
    picture = live.scene()
    first = live.lines(picture=picture, question=COLOR)
    next(first)
    others = [live.lines(picture=picture, question=COLOR) for _ in range(desk.WAITING)]
    for i, lines in enumerate(others, 1):
        assert next(lines) == {"wait": i}
    body = json.dumps(dict(picture=picture, question=COLOR))
    status, told = live.request("POST", "/ask", body)
    assert status == 429 and "8 questions are waiting" in told["error"]
    others[3].close()                                              # gives its place up
    assert next(others[4]) == {"wait": 4} and next(others[7]) == {"wait": 7}
    others[0].close()
    assert next(others[1]) == {"wait": 1} and next(others[7]) == {"wait": 6}
    first.close()
    assert "text" in next(others[1])                               # its turn
    assert [next(others[2]), next(others[2])] == [{"wait": 2}, {"wait": 1}]
    for lines in others[1:]:
        lines.close()


def test_a_mistake_of_ours_ends_one_answer(live, monkeypatch, capsys):
    def broken(*given, **settings):
        raise RuntimeError("out of memory\nin two lines")

    with monkeypatch.context() as m:
        m.setattr(desk.Asker, "generate", broken)
        told = live.ask(COLOR)
        assert told == {"error": r"RuntimeError: out of memory\nin two lines"}
        m.setattr(desk.Desk, "take", broken)
        status, told = live.request("POST", "/picture", SCENE.read_bytes())
        assert status == 500 and "RuntimeError" in told["error"]
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 2 and "Traceback" not in err
    assert live.ask(COLOR)["text"] == "black"
