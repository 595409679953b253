"""What the ten benchmarks ask, in LLaVA's words, from tiny ones in the official layouts."""
import base64
import json
import shutil

import pytest

from benchmarks import TASKS, ask
from core.common import UserError
from core.tokenizer import Tokenizer
from data import SYSTEM, prompt
from tests.benchmarks.helpers import fails
from tests.benchmarks.layouts import READABLE, make_all, picture
from toy import world as toy


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """(folder of the ten, {task: {id: its prompt}})."""
    at = tmp_path_factory.mktemp("eval")
    return at, make_all(at)


def read(task, at, **more):
    return ask.questions(task, at, ask.annotations(task, at), **more)


@pytest.mark.parametrize("task", READABLE)
def test_prompts(task, data):
    asked, wanted = read(task, data[0]), data[1][task]
    assert set(wanted.items()) <= {(q.id, q.text) for q in asked}
    assert all(q.image is not None for q in asked if q.id != "9")
    long = task in ("scienceqa", "mmbench", "mmvet")
    assert TASKS[task].MAX_NEW_TOKENS == (1024 if long else 128)


def test_pictures_and_ids(data):
    asked = {task: read(task, data[0]) for task in READABLE}
    assert [q.id for q in asked["mmbench"]] == [1, 1000001, 2, 1000002]
    assert asked["mmbench"][3].image == asked["mmbench"][2].image == picture("white")
    assert [q.prompt.startswith("<image>\n") for q in asked["scienceqa"]] == [True, False]
    assert [q.id for q in asked["seed"]] == ["101", "101", "102"]       # no folder of video frames
    assert asked["seed"][2].image.name == "x102" and asked["gqa"][2].image.name == "p0.jpg"
    firsts = (0, 10 ** 7, 2 * 10 ** 7)
    assert {q.id for q in asked["pope"]} == {first + i for first in firsts for i in (1, 2, 3)}
    test = ask.questions("vizwiz", data[0], data[0] / "vizwiz/test.json")
    assert [q.image.parent.name for q in test] == ["test"]


def test_the_row_that_is_read(data):
    """LLaVA's template, with the blank that it keeps (that behind the picture's is
    sentencepiece's own)."""
    tokenizer = Tokenizer.from_pretrained(toy.MODEL)
    q = read("gqa", data[0])[0]
    row = prompt([(q.text, None)], tokenizer, strip=False)
    text = tokenizer.decode([id for id in row.ids if id >= 0])
    assert text == (f"{SYSTEM} USER:  \n Is it red?\nAnswer the question using a single word or "
                    "phrase. ASSISTANT:")
    assert row.ids.count(-200) == 1
    q = read("scienceqa", data[0])[1]
    row = prompt([(q.text, None)], tokenizer, image=False, strip=False)
    assert tokenizer.decode(row.ids) == f"{SYSTEM} USER: {q.text} ASSISTANT:"


def test_limit(data):
    def ids(task, limit):
        return [q.id for q in read(task, data[0], limit=limit)]

    assert ids("gqa", 2) == ["n0", "n1"] and ids("mmbench", 1) == [1, 1000001]
    assert ids("pope", 1) == [1, 10_000_001, 20_000_001]
    assert len(ids("mme", 1)) == 28
    assert ids("scienceqa", 1) == ["7", "9"] and ids("seed", 1) == ["101", "102"]


@pytest.mark.parametrize("task", READABLE)
def test_what_is_missing_is_said_before(task, data, tmp_path):
    """One line, that says where from: no annotations; another task's; a picture gone."""
    with fails("not there", "from http"):
        read(task, tmp_path)
    shutil.copytree(data[0], tmp_path, dirs_exist_ok=True)
    for other in READABLE:
        if other != task:
            with pytest.raises(UserError, match="^[^\n]*$"):
                ask.questions(task, tmp_path, ask.annotations(other, tmp_path))
    if task not in ("mmbench", "mmmu"):                           # which hold their pictures
        read(task, tmp_path)[-1 if task != "scienceqa" else 0].image.unlink()
        with fails("this picture", task, "from http"):
            read(task, tmp_path)


def test_pictures_in_a_table_are_looked_at(data, tmp_path):
    table = (data[0] / "mmbench/mmbench_dev_20230712.tsv").read_text()
    whole = base64.b64encode(picture("white")).decode()
    none = base64.b64encode(b"no picture").decode()
    path = tmp_path / "x.tsv"
    for bad, said in [("abc", "row 1 is not base64"), (none, "the picture of 1 "),
                      ("", "row 1 is incomplete")]:
        path.write_text(table.replace(whole, bad))
        with fails("x.tsv", said):
            ask.look(ask.questions("mmbench", data[0], path), path)


def test_pictures_that_were_cut_are_found(data, tmp_path):
    shutil.copytree(data[0], tmp_path, dirs_exist_ok=True)
    path = ask.annotations("pope", tmp_path)
    asked = ask.questions("pope", tmp_path, path)
    assert not ask.look(asked, path)
    first, last = asked[0].image, asked[-1].image
    last.write_bytes(last.read_bytes()[:-30])
    with fails("coco: the picture of 3 can't be read", last.name, "get it again"):
        ask.look(asked, path)
    first.write_bytes(b"")
    with fails("the picture of 1 can't be read", "empty", "nor can 1 others of 3"):
        ask.look(asked, path)
    assert not ask.look(asked, path, slice(1, None, 3))               # that of another process


# what a name in the annotations can be, and isn't the name of a picture in the folder
OUT = ["../x.jpg", "/etc/hostname", "a/../../x.jpg", "..\\x.jpg", "C:\\x.jpg", "c:/x.jpg",
       "\\\\host\\x.jpg", "a\0.jpg", "a\n.jpg", "...", "/", ""]
NAMED = dict(gqa=("gqa/data/testdev_balanced_questions.json", "p0"),
             scienceqa=("scienceqa/problems.json", "image.png"),
             textvqa=("textvqa/TextVQA_0.5.1_val.json", "u"),
             vizwiz=("vizwiz/val.json", "VizWiz_val_00000000.jpg"),
             mmvet=("mm-vet/mm-vet.json", "v1_0.png"), seed=("seed_bench/SEED-Bench.json", "x101"),
             pope=("pope/coco/coco_pope_random.json", "COCO_val2014_1.jpg"))


@pytest.mark.parametrize("task", NAMED)
def test_no_picture_leads_out_of_the_folder(task, data, tmp_path):
    """It is said before anything is looked for, so also where there is such a file."""
    shutil.copytree(data[0], tmp_path, dirs_exist_ok=True)
    file, name = tmp_path / NAMED[task][0], NAMED[task][1]
    whole = file.read_text()
    texts = tmp_path / "textvqa/TextVQA_Rosetta_OCR_v0.2_val.json"
    for bad in OUT:
        if task in ("gqa", "textvqa") and bad in ("", "...") or task == "scienceqa" and not bad:
            continue                             # which ".jpg" makes a name, or which is no picture
        changed = whole.replace(json.dumps(name), json.dumps(bad))
        assert changed != whole
        file.write_text(changed)
        if task == "textvqa":
            texts.write_text(json.dumps(dict(data=[dict(image_id=id, ocr_tokens=[])
                                                   for id in (bad, "u", "v")])))
        with fails(file.parent.name if task == "pope" else file.name, "isn't the name of a file"):
            read(task, tmp_path)


@pytest.mark.parametrize("task", READABLE)
def test_annotations_with_a_byte_order_mark_and_blank_lines(task, data, tmp_path):
    """As Windows' editors save them: the same questions."""
    shutil.copytree(data[0], tmp_path, dirs_exist_ok=True)
    texts = [file for file in tmp_path.rglob("*") if file.suffix in (".json", ".tsv", ".txt")]
    for file in texts:
        file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes().rstrip(b"\n") + b"\n\n")
    was = [(q.id, q.prompt) for q in read(task, data[0])]
    assert [(q.id, q.prompt) for q in read(task, tmp_path)] == was
