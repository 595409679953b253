"""Records that aren't right, files, batches."""
import json
import shutil

import pytest
import torch
from PIL import Image

import data
from clip import open_image, preprocess
from core.common import UserError
from core.records import check, lacks
from data import IGNORE, IMAGE_TOKEN, LlavaJson, load, make_batch, prompt, render
from tests.data.helpers import of, record

# --------------------------------------------------------------------------------------------------
# Records that aren't right

BAD = [
    ("text", "conversations"),
    ([], "conversations"),
    ({"id": "r"}, "conversations"),
    ({"id": "r", "conversations": {}}, "conversations"),
    (record(), "says nothing"),
    ({"conversations": [{"from": "gpt", "value": "x"}]}, "says nothing"),
    ({"conversations": ["x"]}, "turn 0"),
    ({"conversations": [{"from": "system", "value": "x"}]}, "turn 0"),
    ({"conversations": [{"from": ["human"], "value": "x"}]}, "turn 0"),
    ({"conversations": [{"from": "human"}]}, "turn 0"),
    (record("a", None), "turn 1"),
    ({"conversations": [{"from": "human", "value": "a"}, {"from": "human",
                                                          "value": "b"}]}, "take turns"),
    (record("a", "b\ud800"), "Unicode"),
    (record("a", "b", image="x.png"), "no human turn says <image>"),
    (record("a", "<image>", image="x.png"), "no human turn says <image>"),
    (record("<image><image>", "b", image="x.png"), "more than one"),
    (record("<image>", "b", "<image>", "d", image="x.png"), "more than one"),
    (record("<image>", "<image>", image="x.png"), "more than one"),
    (record("<image>", "b", image=None), "path"),
    (record("<image>", "b", image=["x.png", "y.png"]), "path"),
    (record("<image>", "b", image=""), "path"),
    (record("<image>", "b", image="/etc/passwd"), "leads out"),
    (record("<image>", "b", image="../x.png"), "leads out"),
    (record("<image>", "b", image=".."), "leads out"),
    (record("<image>", "b", image="a/../../x.png"), "leads out"), ]


@pytest.mark.parametrize("bad, why", BAD)
def test_bad_records_are_named(bad, why, tmp_path):
    with pytest.raises(UserError, match=why) as e:
        check(bad, "file.json: record 7")
    assert str(e.value).startswith("file.json: record 7") and "\n" not in str(e.value)
    assert "(id 'r')" in str(e.value) or not (isinstance(bad, dict) and "id" in bad)
    (tmp_path / "x.json").write_text(json.dumps([record("a", "b"), bad]))
    with pytest.raises(UserError, match=f"x.json: record 1.*{why}"):
        load(tmp_path / "x.json", None, None)


def test_plain_wants_caption_pairs():
    assert check(record("<image>", "b", image="x.png"), template="plain") == ([("", "b")], 0)
    for bad in (record("a", "b"), record("<image>", "b", "c", "d",
                                         image="x.png"), record("<image>", image="x.png")):
        with pytest.raises(UserError, match="caption"):
            check(bad, template="plain")


def test_check_gives_the_turns():
    assert check(record("a <image> b", "c", "d", image="x", model="",
                        weight=[1])) == ([("a  b", "c"), ("d", None)], 0)
    assert check(record("a", "b", "<image>", "d", image="x")) == ([("a", "b"), ("", "d")], 1)
    assert check(record("a <image>", "c")) == ([("a <image>", "c")], None)
    dropped = [{"from": "gpt", "value": "-"}]
    assert check({"conversations": dropped + record("a", "b")["conversations"]}) == ([
        ("a", "b")], None)


EMPTY = [(record("a", ""), "an assistant turn is empty"),
         (record("a", " \n", "c", "d"), "an assistant turn is empty"),
         (record("a", "b", "c"), "the last question has no answer"),
         (record("", "b"), "a human turn is empty"),
         (record("<image>", "b", "", "d", image="x.png"), "a human turn is empty")]


@pytest.mark.parametrize("made, why", EMPTY)
def test_nothing_is_masked_in_silence(made, why, tokenizer):
    assert lacks(*check(made)) == why
    with pytest.raises(UserError, match=why):
        render(made, tokenizer, "v1", "file.json: record 7")


def test_no_problems(tokenizer):
    for fine in (record("a", "b"), record("<image>", "b", image="x.png")):
        assert lacks(*check(fine)) is None
    with pytest.raises(UserError, match="template"):
        render(record("a", "b"), tokenizer, "v2")


# --------------------------------------------------------------------------------------------------
# Files


def test_load(world, folders):
    tokenizer, said = of(folders, "tiny"), []
    rows = load(world / "x.json", world / "images", tokenizer, "v1", size=28, say=said.append)
    assert isinstance(rows, LlavaJson) and len(rows) == 4
    assert said == [f"left out 3 of 7 records of {world / 'x.json'}: "
                    "2 an assistant turn is empty (first: record 1 (id 'r')); "
                    "1 the last question has no answer (first: record 3 (id '4'))"]
    assert [rows.record_id(i)
            for i in range(3)] == ["record 0 (id 'r')", "record 4 (id 'r')", "record 5 (id 'r')"]
    records = json.loads((world / "x.json").read_text())
    for i, number in enumerate((0, 4, 5)):
        sample, row = render(records[number], tokenizer, "v1"), rows[i]
        assert (row["ids"], row["labels"], row["query"]) == (sample.ids, sample.labels,
                                                             sample.query)
    for i, path in enumerate(("a.png", "sub/b.jpg")):
        image = Image.open(world / "images" / path)
        assert torch.equal(rows[i]["pixels"], preprocess(image, 28, True))
        cropped = load(world / "x.json", world / "images", tokenizer, size=28, pad=False,
                       say=said.append)
        assert torch.equal(cropped[i]["pixels"], preprocess(image, 28, False))
    assert rows[2]["pixels"].shape == (3, 28, 28) and not rows[2]["pixels"].any()


def test_stage_1_crops(world, folders):
    (world / "p.json").write_text(json.dumps([record("<image>", "a cat", image="a.png")]))
    rows = load(world / "p.json", world / "images", of(folders, "tiny"), "plain", size=28)
    assert torch.equal(rows[0]["pixels"],
                       preprocess(Image.open(world / "images" / "a.png"), 28, False))
    assert rows[0]["ids"][:2] == [1, IMAGE_TOKEN]


def test_missing_pictures_are_counted_before_anything_else(world, folders):
    (world / "images" / "sub" / "b.jpg").unlink()
    with pytest.raises(UserError) as e:
        load(world / "x.json", world / "images", of(folders, "tiny"), say=lambda _: None)
    assert str(e.value) == (
        f"1 of 2 pictures named in {world / 'x.json'} are missing under {world / 'images'}; "
        "first: 'sub/../sub/b.jpg' of record 4 (id 'r')")
    with pytest.raises(UserError, match="2 of 2 pictures"):
        load(world / "x.json", world / "nowhere", of(folders, "tiny"), say=lambda _: None)


def test_pictures_are_looked_at_before_anything_else(world, folders):
    """What can't be read is a line that names picture and record; what is shown otherwise than it
    is stored is said; upright turns it."""
    images, exif = world / "images", Image.Exif()
    exif[0x0112] = 6
    names = ["turned.png", "clear.png", "a.png"]
    Image.effect_noise((40, 20), 99).save(images / "turned.png", exif=exif)
    Image.new("RGBA", (9, 9)).save(images / "clear.png")

    def read(*more, **how):
        records = [record("<image>", "b", image=name, id=name) for name in [*names, *more]]
        (world / "y.json").write_text(json.dumps(records))
        said = []
        return load(world / "y.json", images, of(folders, "tiny"), size=28, say=said.append,
                    **how), said

    for upright in (False, True):
        rows, said = read(upright=upright)
        assert len(said) == 2 and "1 wholly transparent" in said[0]
        assert "1 picture stored on the side" in said[1]
        assert ("--upright" in said[1]) == (not upright)
        seen = open_image(images / "turned.png", upright)
        assert seen.size == ((20, 40) if upright else (40, 20))
        assert torch.equal(rows[0]["pixels"], preprocess(seen, 28, True))
    whole = (images / "turned.png").read_bytes()
    (images / "cut.png").write_bytes(whole[:len(whole) // 2])
    Image.new("L", (1, 30000)).save(images / "narrow.png")
    for name, why in (("cut.png", "cut.png"), ("narrow.png", "too narrow"),
                      ("https://a.b/c.png", "download it")):
        with pytest.raises(UserError, match=f"1 of 4 pictures .*{name}.*") as e:
            read(name)
        assert why in str(e.value) and f"record 3 (id {name!r})" in str(e.value)


def test_without_an_image_folder(world, folders):
    rows = load(world / "x.json", None, of(folders, "tiny"), size=28, say=lambda _: None)
    assert len(rows.sample(0).ids) > 10 and not rows[2]["pixels"].any()
    with pytest.raises(UserError, match="record 0 .*in which folder"):
        rows[0]


def test_links_in_the_folder_are_followed_and_dots_are_not(world, folders):
    """A linked folder is its owner's wish. `link/..` means the image folder, not the parent of
    where the link leads."""
    (world / "elsewhere" / "deep").mkdir(parents=True)
    shutil.copy(world / "images" / "a.png", world / "elsewhere" / "deep" / "c.png")
    shutil.copy(world / "images" / "a.png", world / "elsewhere" / "secret.png")
    (world / "images" / "link").symlink_to(world / "elsewhere" / "deep")
    for path, fine in (("link/c.png", True), ("link/../a.png", True), ("link/../secret.png",
                                                                       False)):
        (world / "l.json").write_text(json.dumps([record("<image>", "b", image=path)]))
        if fine:
            assert load(world / "l.json", world / "images", of(folders, "tiny"),
                        size=28)[0]["pixels"].any()
        else:
            with pytest.raises(UserError, match="missing"):
                load(world / "l.json", world / "images", of(folders, "tiny"))


@pytest.mark.parametrize("content", [
    b"", b"{", b"[1, 2", b"{}", b"[]", b"3", b"null", b"\xff\xfe\xfa", b"[" * 100_000,
    b'{"conversations": []}\n{"conversations": []}', b"[null]", b'[{"conversations": [[]]}]'])
def test_not_llavas_json(content, tmp_path):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(UserError, match="x.json") as e:
        load(tmp_path / "x.json", None, None)
    assert "\n" not in str(e.value)


def test_no_json_or_nothing_in_it(tmp_path):
    for path in (tmp_path, tmp_path / "none.json"):
        with pytest.raises(UserError, match="can't read"):
            load(path, None, None)
    (tmp_path / "x.json").write_text(json.dumps([record("a", "")]))
    with pytest.raises(UserError, match="not one record"):
        load(tmp_path / "x.json", None, None, say=lambda _: None)


def test_make_batch():
    items = [
        dict(pixels=torch.full((3, 2, 2), 1.0), ids=[1, -200, 0, 5], labels=[-100, -100, -100, 5],
             query=[]),
        dict(pixels=torch.full((3, 2, 2), 2.0), ids=[1, 7], labels=[-100, 7], query=[8, 0, 9])]
    batch = make_batch(items)
    assert {key: (tuple(t.shape), t.dtype) for key, t in batch.items()} == {
        "pixels": ((2, 3, 2, 2), torch.float32), "ids": ((2, 4), torch.long), "labels": (
            (2, 4), torch.long), "mask": ((2, 4), torch.bool), "query": ((2, 3), torch.long),
        "query_mask": ((2, 3), torch.bool)}
    assert batch["ids"].tolist() == [[1, -200, 0, 5], [1, 7, 0, 0]]
    # the id 0 in the text is no padding
    assert batch["mask"].tolist() == [[True] * 4, [True, True, False, False]]
    assert batch["labels"].tolist() == [[-100, -100, -100, 5], [-100, 7, -100, -100]]
    assert batch["query"].tolist() == [[0, 0, 0], [8, 0, 9]]
    assert batch["query_mask"].tolist() == [[False] * 3, [True] * 3]
    assert make_batch(items, pad_id=3)["ids"].tolist()[1] == [1, 7, 3, 3]
    alone = make_batch(items[:1])
    assert alone["query"].shape == (1, 1) and alone["query_mask"].tolist() == [[False]]


def test_constants_are_llavas():
    assert (data.IMAGE_TOKEN, data.IGNORE) == (-200, -100)


def test_cut_counts_the_picture():
    """The merged row, its picture 10 long, is never longer than asked; a picture that doesn't fit
    is left out whole."""
    row = dict(ids=[1, 5, IMAGE_TOKEN, 6, 7, 8], labels=[IGNORE] * 4 + [7, 8])
    kept = {room: data.cut(row, room, 10)["ids"] for room in (99, 15, 14, 12, 11, 2, 1)}
    lengths = {99: 6, 15: 6, 14: 5, 12: 3, 11: 2, 2: 2, 1: 1}
    assert kept == {room: row["ids"][:length] for room, length in lengths.items()}
    assert data.cut(row, 14, 10)["labels"] == row["labels"][:5]
    assert data.cut(dict(ids=[1, 2, 3], labels=[IGNORE, 2, 3]), 2, 10)["labels"] == [IGNORE, 2]


def test_which_questions_read_the_picture(tokenizer):
    """--query: all and first are one row; sofar is a row for every turn, and together they learn
    what `all` learns."""
    turns = [("What is this?", "A cat."), ("Where?", "Here."), ("Sure?", "Yes.")]
    said = [{"from": who, "value": text} for q, a in turns
            for who, text in (("human", q), ("gpt", a))]
    said[0]["value"] = "<image>\n" + said[0]["value"]
    sample = render({"image": "x.png", "conversations": said}, tokenizer)
    row = data.item(sample, torch.zeros(3, 2, 2))
    assert data.by_query(row, "all") == [row] and row["query"] == sum(sample.turns, [])
    (first,) = data.by_query(row, "first")
    assert first["query"] == sample.turns[0] and first["ids"] == row["ids"]
    rows = data.by_query(row, "sofar")
    assert [r["query"] for r in rows] == [sum(sample.turns[:n], []) for n in (1, 2, 3)]
    for n, r in enumerate(rows, 1):   # the row is the inference prompt of that turn, and its answer
        asked = prompt([*turns[:n - 1], (turns[n - 1][0], None)], tokenizer)
        assert r["ids"][:len(asked.ids)] == asked.ids
        learnt = [label for label in r["labels"] if label != IGNORE]
        assert r["ids"][len(asked.ids):] == learnt and r["query"] == asked.query
    kept = [[label for label in r["labels"] if label != IGNORE] for r in (*rows, row)]
    assert sum(kept[:3], []) == kept[3]
    single = prompt([("Only?", None)], tokenizer)
    asked = data.item(single, torch.zeros(3, 2, 2))
    for which in data.QUERIES:                                     # a question to ask is one row
        batch = make_batch([asked], which)
        assert batch["query"].tolist() == [single.query] and "labels" not in batch
    two = data.item(prompt([("One?", "1"), ("Two?", None)], tokenizer), torch.zeros(3, 2, 2))
    assert make_batch([two], "sofar")["query"].tolist() == [two["query"]]
    assert make_batch([two], "first")["query"].tolist() == [two["turns"][0]]
