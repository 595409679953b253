"""LLaVA's json, read: as json does, or an error that names the file."""
import hashlib
import json
import random

import pytest

from core.common import UserError
from core.records import check, read_records, tidy


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


def test_records_are_what_json_reads(tmp_path):
    rng, file = random.Random(0), tmp_path / "x.json"
    for trial in range(120):
        values = [random_value(rng) for _ in range(rng.randint(1, 6))]
        text = json.dumps(values, indent=rng.choice([None, 1]))
        if trial % 2 and "\\ud83d" not in text:
            separators = rng.choice([(",", ":"), (" ,\r\n", "\t: ")])
            text = json.dumps(values, ensure_ascii=False, separators=separators)
        mark = b"\xef\xbb\xbf" if trial % 3 == 0 else b""
        file.write_bytes(mark + text.encode() + b" \n" * (trial % 5))
        assert read_records(file) == (values, hashlib.sha256(file.read_bytes()).hexdigest())


def test_every_cut_and_every_slip_is_found(tmp_path):
    whole, file = '[{"a": "é\\u00e9"}, [12, null], 345]', tmp_path / "x.json"
    wrong = [whole.encode()[:n] for n in range(len(whole.encode()))]
    slips = [whole[:-1] + ",]", whole + "]", whole + " 3", whole + whole, "[,1]", "[1 2]", "[1,,2]",
             "[1x]", "[" * 100_000]
    wrong += [text.encode() for text in slips]
    for content in wrong:
        file.write_bytes(content)
        with pytest.raises(UserError, match="x.json is not JSON"):
            read_records(file)


@pytest.mark.parametrize("content, why", [
    ('{"a": 1}', "should be a list of records"), ("3", "should be a list of records"),
    ("[]", "there is no record in it")])
def test_other_json_is_refused(tmp_path, content, why):
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(UserError, match=why):
        read_records(tmp_path / "x.json")
    with pytest.raises(UserError, match="can't read"):
        read_records(tmp_path)


SAID = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "3"}]
SEEN = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "3"}]


@pytest.mark.parametrize("image", [None, "", []])
def test_no_picture_in_other_words_is_no_picture(image):
    record = tidy({"id": 1, "image": image, "conversations": SAID})
    assert record == {"id": 1, "conversations": SAID} and check(record) == ([("What?", "3")], None)
    with pytest.raises(UserError, match="isn't the path of one picture"):    # but it is spoken of
        check(tidy({"image": image, "conversations": SEEN}))


def test_one_picture_in_other_words(tmp_path):
    for image in ("a/b.png", ["a/b.png"], str(tmp_path / "a" / "b.png"), [f"{tmp_path}//a/b.png"]):
        record = tidy({"image": image, "conversations": SEEN}, tmp_path)
        assert record["image"] == "a/b.png" and check(record) == ([("\nWhat?", "3")], 0)
    for image in (["a.png", "b.png"], 3, {"path": "a.png"}, [None]):
        with pytest.raises(UserError, match="isn't the path of one picture"):
            check(tidy({"image": image, "conversations": SEEN}, tmp_path))
    for image in ("/etc/a.png", str(tmp_path) + "2/a.png", f"{tmp_path}/../a.png"):
        with pytest.raises(UserError, match="leads out of the image folder"):
            check(tidy({"image": image, "conversations": SEEN}, tmp_path))


def test_json_lines(tmp_path):
    records = [{"id": i, "conversations": SAID} for i in range(3)]
    for n, text in ((3, "\n".join(map(json.dumps, records))), (1, json.dumps(records[0]) + "\n"),
                    (3, "\ufeff" + "\r\n\n".join(map(json.dumps, records)) + "\n\n")):
        (tmp_path / "x.jsonl").write_text(text)
        assert read_records(tmp_path / "x.jsonl")[0] == records[:n]
    (tmp_path / "x.jsonl").write_text(json.dumps(records[0]) + "\n{\n" + json.dumps(records[1]))
    with pytest.raises(UserError, match="x.jsonl is not JSON: line 2"):
        read_records(tmp_path / "x.jsonl")
    (tmp_path / "x.jsonl").write_text(json.dumps({"data": records}, indent=1))
    with pytest.raises(UserError, match="should be a list of records"):
        read_records(tmp_path / "x.jsonl")
