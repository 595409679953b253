"""What an evaluation keeps and takes over: an answer or a result that was changed isn't believed,
and what the disk refuses is a line."""
import json
import resource
from pathlib import Path

import pytest

from benchmarks import kept, table1
from benchmarks.answers import Question, read_answers
from benchmarks.score import score
from tests.benchmarks.cases import make_gqa, make_mme
from tests.benchmarks.helpers import fails, line, write_json, write_lines

ASKED = [Question(i, f"Is it {i}?", Path(f"{i}.jpg")) for i in range(4)]
RESULTS = dict(model="m", weights="sha256:0123456789", limit=0, batch=16, seconds={"gqa": 1.5},
               tasks=dict(gqa=dict(score=61.9, interval=[61.0, 62.8], metrics={}),
                          mmvet=dict(score=None, interval=None, metrics={})))
KEY = kept.key_of(RESULTS, "pope")


def write(out, texts="abcd", **more):
    """pope.0.jsonl with these answers."""
    lines = [kept.write(KEY, i, ASKED[i], text, **more) for i, text in enumerate(texts)]
    (out / "pope.0.jsonl").write_text("".join(lines))
    return lines


def test_what_was_written_is_read(tmp_path):
    lines = write(tmp_path)
    (tmp_path / "pope.1.jsonl").write_text("\n" + lines[2] + lines[3][:-9])    # as a kill leaves it
    rows = kept.read(tmp_path, "pope", ASKED, KEY)
    assert [rows[i]["text"] for i in range(4)] == list("abcd")
    assert kept.merge(tmp_path, "pope", rows).read_text() == "".join(lines)
    assert [file.name for file in tmp_path.iterdir()] == ["pope.jsonl"]
    assert [answer.text for answer in read_answers(tmp_path / "pope.jsonl")] == list("abcd")
    other = kept.key_of(RESULTS | dict(model="moved", tasks={}), "pope")
    assert kept.read(tmp_path, "pope", ASKED, other) == rows


CHANGES = [dict(text="no"), dict(text=None), dict(text=["a"]), dict(place=2), dict(place=True),
           dict(place=1.0), dict(place=-3), dict(place="1"), dict(place=10 ** 30),
           dict(question_id=2), dict(question_id="1"), dict(question_id=True), dict(prompt="x"),
           dict(prompt=None), dict(check="0" * 16), dict(check=None), dict(check=5), dict(more=1),
           dict(damaged=None), dict(damaged="gone"), dict(damaged=3)]


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_a_changed_answer_is_refused(change, tmp_path):
    lines = write(tmp_path)
    lines[1] = json.dumps(json.loads(lines[1]) | change) + "\n"
    (tmp_path / "pope.0.jsonl").write_text("".join(lines))
    with fails("pope.0.jsonl: line 2", "choose another --out", "--score pope"):
        kept.read(tmp_path, "pope", ASKED, KEY)


def test_answers_of_others_are_refused(tmp_path):
    for other in (kept.key_of(RESULTS | dict(batch=8), "pope"), kept.key_of(RESULTS, "vizwiz")):
        write(tmp_path)
        with fails("line 1 was changed since it was written, or is of another model"):
            kept.read(tmp_path, "pope", ASKED, other)
    old = [dict(question_id=q.id, prompt=q.prompt, text="a", place=i) for i, q in enumerate(ASKED)]
    write_lines(tmp_path / "pope.0.jsonl", old)
    with fails("line 1 has no \"check\": an older version"):
        kept.read(tmp_path, "pope", ASKED, KEY)
    for junk in (b"\0" * 50, b"\xff\xfe", b"[1]", b"{", b'{"place": 0', b"9" * 5000,
                 b"[" * 99999):
        (tmp_path / "pope.0.jsonl").write_bytes(junk + b"\n")
        with fails("pope.0.jsonl: line 1"):
            kept.read(tmp_path, "pope", ASKED, KEY)


def test_pictures_that_were_not_read(tmp_path, capsys):
    """What is damaged is asked again; of a few there is a warning, of more no score."""
    lines = write(tmp_path)
    bad = kept.write(KEY, 1, ASKED[1], "what a grey picture gives", "1.jpg: cut")
    (tmp_path / "pope.0.jsonl").write_text(lines[0] + bad + lines[2] + lines[3])
    rows = kept.read(tmp_path, "pope", ASKED, KEY)
    assert kept.answered(rows) == {0, 2, 3} and rows[1]["text"] == ""
    assert kept.too_few(rows, ASKED) is None
    said = capsys.readouterr().err
    assert "1 of 4 pictures can't be read (first: 1.jpg: cut): 1 questions" in said
    (tmp_path / "pope.1.jsonl").write_text(lines[1])                     # asked again, and read
    assert kept.answered(kept.read(tmp_path, "pope", ASKED, KEY)) == {0, 1, 2, 3}
    write(tmp_path, "ab", damaged="cut")
    (tmp_path / "pope.1.jsonl").unlink()
    assert "2 of 4 pictures" in kept.too_few(kept.read(tmp_path, "pope", ASKED, KEY), ASKED)
    images = [Question(i, "", i) for i in range(1000)]
    assert kept.too_many(set(range(11)), images) and not kept.too_many(set(range(10)), images)
    assert kept.too_many({0}, images[:1]) and not kept.too_many(set(), images[:0])


def spoilt():
    """results.json with one value of another type or range."""
    for key, bad in [("tasks", []), ("tasks", {"x": {}}), ("tasks", {"gqa": 3}), ("model", 3),
                     ("tasks", {"gqa": {"score": 1}}), ("weights", None), ("limit", "0"),
                     ("limit", -1), ("limit", True), ("limit", 1.0), ("seconds", []),
                     ("seconds", {"gqa": "1"}), ("seconds", {"gqa": -1}), ("seconds", None)]:
        yield {**RESULTS, key: bad}
    for bad in ("1", True, [], float("nan"), float("inf"), 10 ** 400, None):
        yield {**RESULTS, "tasks": {"gqa": dict(score=bad, interval=[1, 2])}}
    for interval in (None, 3, [], [1], [1, 2, 3], ["1", 2], [None, 2], [float("nan"), 2], {}):
        yield {**RESULTS, "tasks": {"gqa": dict(score=1.5, interval=interval)}}


@pytest.mark.parametrize("content", list(spoilt()), ids=str)
def test_results_of_other_types(content, tmp_path):
    file = write_json(tmp_path / "results.json", content)
    with fails("results.json", "results.json of eval.py"):
        table1.show([file])
    with fails("results.json", "results.json of eval.py"):
        kept.resume(file, RESULTS)


def test_results_that_are_taken_over(tmp_path, capsys):
    file = write_json(tmp_path / "results.json", RESULTS | dict(model="a\nb\ud800" + "c" * 500))
    table1.show([file])
    assert max(map(len, capsys.readouterr().out.encode().decode().split("\n"))) < 250
    fresh = RESULTS | dict(tasks={}, seconds={})
    assert kept.resume(file, fresh)["tasks"] == RESULTS["tasks"]
    assert kept.resume(tmp_path / "none.json", fresh) is fresh
    with fails("batch 16, not 8", "--out"):
        kept.resume(file, fresh | dict(batch=8))
    with fails("says nothing of upright", "older version", "--out"):
        kept.resume(file, fresh | dict(upright=False))
    for bad in (b"", b"{", b"[" * 5000, b"\xff", b'{"tasks": ' * 200):
        file.write_bytes(bad)
        with fails("results.json"):
            kept.resume(file, fresh)


def test_what_the_disk_refuses(tmp_path):
    with fails("x/pope.0.jsonl: cannot write it (No such file"):
        with kept.appending(tmp_path / "x" / "pope.0.jsonl"):
            pass
    (tmp_path / "pope.7.jsonl").mkdir()
    with fails("pope.7.jsonl: cannot read it (Is a directory)"):
        kept.read(tmp_path, "pope", ASKED, KEY)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    own = tmp_path / "pope.0.jsonl"
    whole = kept.write(KEY, 0, ASKED[0], "a")
    own.write_text(whole + whole[:7])
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) + 20, hard))        # as a full disk
    try:
        with fails("pope.0.jsonl: cannot write it (File too large)"):
            with kept.appending(own) as file:
                file.write(kept.write(KEY, 1, ASKED[1], "b"))
                file.flush()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    with kept.appending(own):
        pass
    assert own.read_text() == whole                                      # what was kept is whole


# --------------------------------------------------------------------------------------------------
# Answers by others

def test_blank_lines_and_a_byte_order_mark(tmp_path):
    path, lines = make_gqa(tmp_path)
    file = write_lines(tmp_path / "a.jsonl", lines)
    content = file.read_bytes()
    want = score("gqa", path, read_answers(file))
    for other in (content + b"\n", b"\xef\xbb\xbf" + content, content.replace(b"\n", b"\r\n"),
                  b"\n \t\n" + content.replace(b"\n", b"\n\n"), content[:-1]):
        file.write_bytes(other)
        assert score("gqa", path, read_answers(file)) == want
    file.write_bytes(b"\n\n")
    with fails("a.jsonl: nothing in it"):
        read_answers(file)


def test_a_line_break_in_an_answer_of_mme(tmp_path, capsys):
    """It is what it is read as: the first four characters."""
    path, lines = make_mme(tmp_path)
    want = score("mme", path, read_answers(write_lines(tmp_path / "a.jsonl", lines)))
    changed = [row | dict(text=row["text"] + "\n\nThere\tis.") for row in lines[:3]] + lines[3:]
    given = read_answers(write_lines(tmp_path / "a.jsonl", changed))
    assert score("mme", path, given)["primary"] == want["primary"]
    said = capsys.readouterr().err
    assert "warning: 3 answers have a tab or line break" in said and "a.jsonl: line 1)" in said


def test_ids_are_shown_in_a_line(tmp_path):
    path, lines = make_gqa(tmp_path)
    given = write_lines(tmp_path / "a.jsonl", lines + [line("x\ny" * 99, "z")] + lines[:1])
    with fails("a.jsonl: line", "a second time"):
        score("gqa", path, read_answers(given))
    with fails("no such question", "xx"):
        score("gqa", path, read_answers(write_lines(given, [line("xx\ny" * 99, "z")])))
