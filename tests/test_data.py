"""data.py against LLaVA's published algorithm, written out again here, and against known rows of
the Llama-2 tokenizer.

Everything runs on a small sentencepiece model trained on the spot and on a small byte-level BPE
(Llama 3's kind). Set NANOCCRA_LLAMA2_TOKENIZER to a Llama-2 or Vicuna tokenizer.model to run it on
the real one, too.
"""
import json
import os
import random
import re
import shutil
import subprocess
import sys

import pytest
import sentencepiece
import torch
from PIL import Image

import data
from clip import preprocess
from core import tokenizer
from core.common import UserError
from core.tokenizer import Tokenizer
from data import (
    IGNORE,
    IMAGE_TOKEN,
    SYSTEM,
    LlavaJson,
    check,
    collate,
    load,
    problems,
    prompt,
    render,
)

REAL = os.environ.get("NANOCCRA_LLAMA2_TOKENIZER")
SYSTEM_IDS = [
    1, 319, 13563, 1546, 263, 12758, 1404, 322, 385, 23116, 21082, 20255, 29889, 450, 20255, 4076,
    8444, 29892, 13173, 29892, 322, 1248, 568, 6089, 304, 278, 1404, 29915, 29879, 5155, 29889]


# --------------------------------------------------------------------------------------------------
# Tokenizers

def tiny_sentencepiece(folder):
    """Made like Llama 2's: BPE, byte fallback, a space in front, nothing normalised."""
    words = "the a cat dog what is this how many are there in picture of and on it see you hello question red".split(
    )
    rng = random.Random(0)
    sentences = [
        f"USER: {' '.join(rng.choices(words, k=6))}? ASSISTANT: the {rng.choice(words)} {rng.randrange(99)}."
        for _ in range(300)] + [SYSTEM] * 20
    folder.mkdir()
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(sentences),
                                             model_prefix=str(folder / "tokenizer"),
                                             model_type="bpe", vocab_size=420, byte_fallback=True,
                                             normalization_rule_name="identity",
                                             remove_extra_whitespaces=False, minloglevel=2,
                                             unk_id=0, bos_id=1, eos_id=2, pad_id=-1, num_threads=1)
    return folder


def tiny_byte_level(folder):
    """Made like Llama 3's: no space in front, and tokens of several spaces and of a full stop with
    a line break."""
    letters = list(tokenizer._byte_alphabet())
    merges = [
        "Ġ A", "Ġ t", "t h", "Ġt h", "Ġth e", "U S", "S T", "A S", "Ġ Ġ", "Ċ Ċ", "Ġ Ċ", ". Ċ",
        "? Ċ", "c a", "ca t", "Ġ c", "Ġc at"]
    vocab = {
        token: i for i, token in enumerate(letters + [merge.replace(" ", "") for merge in merges])}
    control = [{"content": "<|bos|>", "id": len(vocab), "special": True},
               {"content": "<|eot|>", "id": len(vocab) + 1, "special": True}]
    split = {
        "type": "Split", "pattern": {"Regex": tokenizer.LLAMA3}, "behavior": "Isolated",
        "invert": False}
    level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
    folder.mkdir()
    (folder / "tokenizer.json").write_text(json.dumps(
        {"normalizer": None, "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, level]},
         "added_tokens": control, "model": {"type": "BPE", "vocab": vocab, "merges": merges}}))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": "<|bos|>", "eos_token": "<|eot|>"}))
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    base = tmp_path_factory.mktemp("tokenizers")
    there = {"tiny": tiny_sentencepiece(base / "tiny"), "bytes": tiny_byte_level(base / "bytes")}
    if REAL:
        (base / "llama2").mkdir()
        shutil.copyfile(REAL, base / "llama2" / "tokenizer.model")
        there["llama2"] = base / "llama2"
    return there


def of(folders, kind):
    if kind not in folders:
        pytest.skip("NANOCCRA_LLAMA2_TOKENIZER is not set to the path of a Llama-2 tokenizer.model")
    return Tokenizer.from_pretrained(folders[kind])


@pytest.fixture(params=["tiny", "bytes", "llama2"])
def tokenizer(request, folders):
    return of(folders, request.param)


@pytest.fixture(params=["tiny", "llama2"])
def sp(request, folders):
    """A sentencepiece tokenizer: the kind LLaVA's algorithm was written for."""
    return of(folders, request.param)


@pytest.fixture
def llama2(folders):
    return of(folders, "llama2")


# --------------------------------------------------------------------------------------------------
# Records

def record(*texts, **more):
    """Texts of human and gpt by turns."""
    said = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]
    return {"id": "r", **more, "conversations": said}


PIECES = [
    "a", "cat", "the", " the", " ", "  ", "\n", "\n\n", "\t", "2", "17", "0.5", ".", "?", ".\n",
    "?\n", "'s", "A", "<", "USER", "USER:", "ASSISTANT", "ASSISTANT:", "é", "日本", "🙂", "👩‍👩‍👧",
    "\u3000", "\u2581", "\xa0", ">", "</", "image", "\\n", "answer it"]


def words(rng, n=8):
    while True:
        text = "".join(rng.choice(PIECES) for _ in range(rng.randint(1, n)))
        if text.strip():
            return text


def random_record(rng):
    texts = [words(rng) for _ in range(2 * rng.randint(1, 4))]
    made = record(*texts)
    if rng.random() < 0.7:
        turn = made["conversations"][2 * rng.randrange(len(texts) // 2)]
        text = turn["value"] if rng.random() < 0.9 else ""       # sometimes nothing but the picture
        at = rng.choice([0, len(text), rng.randint(0, len(text))])
        turn["value"] = text[:at] + "<image>" + rng.choice(["", "\n", " "]) + text[at:]
        made["image"] = "x.png"
    if rng.random() < 0.1:
        made["conversations"].insert(0, {"from": "gpt", "value": "dropped"})
    # A turn that holds the role tag is one which LLaVA can't take apart again, and masks away (we
    # don't: see below).
    rounds = Llava.text(made).split("</s>")[:-1]
    return made if all(part.count(" ASSISTANT:") == 1 for part in rounds) else random_record(rng)


def turns_of(made):
    said = [t for t in made["conversations"] if t["value"] != "dropped"]
    return [t["value"] for t in said[::2]], [t["value"] for t in said[1::2]]


# --------------------------------------------------------------------------------------------------
# LLaVA's way: the whole text first, its labels by tokenising parts of it again and subtracting ones
# and twos

class Llava:
    def __init__(self, tokenizer):
        self.sp = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer.file))

    def inside(self, text):
        """Without the space in front: after a byte that merges with nothing."""
        return self.sp.encode("\x02" + text)[2:]

    def tok(self, text):
        """What its tokenizer (not "legacy") makes of a text: only its very beginning gets a space.
        """
        ids = [1]
        for i, part in enumerate(re.split("(</s>)", text)):
            ids += [2] if part == "</s>" else self.sp.encode(part) if i == 0 else self.inside(part)
        return ids

    def image_tok(self, text):
        """Parts around <image> each on their own, all but the first <s> dropped."""
        first, *others = [self.tok(part) for part in text.split("<image>")]
        for other in others:
            first = first + [IMAGE_TOKEN] + other[1:]
        return first

    @staticmethod
    def text(made):
        questions, answers = turns_of(made)
        out = SYSTEM + " "
        for q, a in zip(questions, answers):
            if "image" in made and "<image>" in q:
                q = ("<image>\n" + q.replace("<image>", "").strip()).strip()
            out += f"USER: {q} ASSISTANT: {a}</s>"
        return out

    def v1(self, made):
        tok = self.image_tok if "image" in made else self.tok
        text = self.text(made)
        ids = tok(text)
        labels, cur = [IGNORE] + ids[1:], 1
        # By how much a round tokenised by itself is longer than in its place after </s>. LLaVA
        # hard-codes Llama's 1.
        longer = len(self.sp.encode("USER:")) - len(self.inside("USER:"))
        for i, part in enumerate(text.split("</s>")):
            if part == "":
                break
            before, _ = part.split(" ASSISTANT: ")
            size, instruction = len(tok(part)), len(tok(before + " ASSISTANT: ")) - 2
            size, instruction = (size - longer, instruction - longer) if i else (size, instruction)
            labels[cur:cur + instruction] = [IGNORE] * instruction
            cur += size
        assert cur == len(ids), "LLaVA would have masked this sample as a whole"
        return ids, labels

    def plain(self, made):
        ids = self.image_tok("<image>" + made["conversations"][1]["value"] + "\n")
        return ids, [IGNORE, IGNORE] + ids[2:]


def test_the_oracle_has_llamas_lengths(llama2):
    llava = Llava(llama2)
    assert llava.tok("USER: x")[1:4] == [3148, 1001, 29901] and llava.tok("a</s>USER:")[-2:] == [
        11889, 29901]
    assert len(llava.sp.encode("USER:")) - len(llava.inside("USER:")) == 1


def test_v1_is_llavas(sp):
    llava, rng = Llava(sp), random.Random(1)
    for _ in range(600):
        made = random_record(rng)
        sample = render(made, sp, "v1")
        assert (sample.ids, sample.labels) == llava.v1(made), made


def test_plain_is_llavas(sp):
    llava, rng = Llava(sp), random.Random(2)
    for _ in range(200):
        question = rng.choice(["<image>\nDescribe it.", "Describe it.\n<image>", "<image>"])
        made = record(question, words(rng), image="x.png")
        sample = render(made, sp, "plain")
        assert (sample.ids, sample.labels) == llava.plain(made), made


def test_pieces_are_the_whole_for_byte_level(folders):
    """Without a space in front LLaVA's arithmetic is wrong, but its ids are: the whole text's, cut
    at control ids."""
    tokenizer, rng = of(folders, "bytes"), random.Random(3)
    (eos,) = tokenizer.eos_ids
    for _ in range(600):
        made = random_record(rng)
        ids = [tokenizer.bos_id]
        for part in re.split("(</s>|<image>)" if "image" in made else "(</s>)", Llava.text(made)):
            ids += {"</s>": [eos], "<image>": [IMAGE_TOKEN]}.get(part) or tokenizer.encode(part)
        assert render(made, tokenizer, "v1").ids == ids, made
    caption = render(record("<image>", "a cat.", image="x.png"), tokenizer, "plain")
    assert caption.ids[2:] == tokenizer.encode(
        "a cat.\n") != tokenizer.encode("a cat.") + tokenizer.encode("\n")


# --------------------------------------------------------------------------------------------------
# Known rows

def supervised(sample):
    return [label for label in sample.labels if label != IGNORE]


ASK, A_CAT = [319, 1799, 9047, 13566, 29901], [319, 6635, 29889, 2]


def test_golden_picture(llama2):
    row = SYSTEM_IDS + [3148, 1001, 29901, 29871, -200, 29871, 13, 5618, 338, 445, 29973] + ASK
    for text in ("<image>\nWhat is this?", "What is this?\n<image>", "<image>What is this? "):
        sample = render(record(text, "A cat.", image="x.png"), llama2, "v1")
        assert sample.ids == row + A_CAT and len(sample.ids) == 51
        assert sample.labels == [IGNORE] * 47 + A_CAT
        assert sample.query == [5618, 338, 445, 29973]
    asked = prompt([("What is this?", None)], llama2, image=True)
    assert asked.ids == row and len(row) == 47 and asked.query == [5618, 338, 445, 29973]


def test_golden_text_only(llama2):
    sample = render(record("Hello there", "Hi!", "Bye", "See you."), llama2, "v1")
    assert sample.ids == (SYSTEM_IDS + [3148, 1001, 29901, 15043, 727] + ASK + [6324, 29991, 2] +
                          [11889, 29901, 2648, 29872] + ASK + [2823, 366, 29889, 2]) and len(
                              sample.ids) == 57
    assert supervised(sample) == [6324, 29991, 2, 2823, 366, 29889, 2]
    assert sample.turns == [[15043, 727], [2648, 29872]] and sample.query == [
        15043, 727, 2648, 29872]


def test_golden_digit_and_caption(llama2):
    assert supervised(render(record("How many?", "2"), llama2, "v1")) == [29871, 29906, 2]
    sample = render(record("Describe it.\n<image>", "a dog runs", image="x.png"), llama2, "plain")
    assert (sample.ids, sample.labels) == ([1, -200, 263, 11203, 6057,
                                            13], [-100, -100, 263, 11203, 6057, 13])


# --------------------------------------------------------------------------------------------------
# What a row promises

def test_supervised_is_the_answers_and_their_ends(tokenizer):
    rng, (eos,) = random.Random(4), tokenizer.eos_ids
    # sentencepiece's decode drops the first one
    space = "" if tokenizer.file.name == "tokenizer.model" else " "
    for _ in range(200):
        made = random_record(rng)
        sample = render(made, tokenizer, "v1")
        told = [[]]
        for label in supervised(sample):
            told[-1].append(label) if label != eos else told.append([])
        answers = turns_of(made)[1] if space else [
            a.replace("\u2581", " ") for a in turns_of(made)[1]]
        assert [tokenizer.decode(ids) for ids in told] == [space + answer
                                                           for answer in answers] + [""]
        assert len(sample.labels) == len(sample.ids)
        assert all(label in (IGNORE, id) for id, label in zip(sample.ids, sample.labels))


def test_query_is_the_questions_as_they_stand(tokenizer):
    rng = random.Random(5)
    for _ in range(200):
        made = random_record(rng)
        sample = render(made, tokenizer, "v1")
        assert [sample.ids[a:b]
                for a, b in sample.spans] == sample.turns and sum(sample.turns, []) == sample.query
        assert all(sample.labels[i] == IGNORE for a, b in sample.spans for i in range(a, b))
        for (a, b), question in zip(sample.spans, turns_of(made)[0]):
            with_picture = "image" in made and "<image>" in question
            text = question.replace("<image>", "").strip() if with_picture else " " + question
            assert sample.ids[a:b] == tokenizer.encode(text, continues=True)
            if with_picture and a != b:
                before = [IMAGE_TOKEN] + tokenizer.encode("\n")
            else:                                                       # the last token of "USER:"
                before = [IMAGE_TOKEN] if with_picture else tokenizer.encode(
                    " USER:", continues=True)[-1:]
            assert sample.ids[a - len(before):a] == before
            after = tokenizer.encode(" ASSISTANT:", continues=a != b)
            assert sample.ids[b:b + len(after)] == after


def test_other_answers_leave_the_query_alone(tokenizer):
    one = render(record("<image>\nWhat is this?", "a cat", "Sure?", "yes", image="x.png"),
                 tokenizer)
    two = render(record("<image>\nWhat is this?", "a 17", "Sure?", "no no no", image="x.png"),
                 tokenizer)
    assert one.query == two.query != [] and one.ids != two.ids


def test_plain_query_is_the_unused_question(tokenizer):
    sample = render(record("<image>\nDescribe it.", "a cat", image="x.png"), tokenizer, "plain")
    assert sample.query == tokenizer.encode("Describe it.", continues=True) and sample.spans == []


def test_prompt_is_the_beginning_of_the_training_row(tokenizer):
    rng = random.Random(6)
    for _ in range(100):
        turns = [(words(rng), words(rng)) for _ in range(rng.randint(1, 3))]
        for image in (True, False):
            texts = [t for turn in turns for t in turn]
            made = record("<image>\n" +
                          texts[0], *texts[1:], image="x.png") if image else record(*texts)
            whole = render(made, tokenizer, "v1")
            asked = prompt(turns[:-1] + [(turns[-1][0], None)], tokenizer, image=image)
            assert whole.ids[:len(asked.ids)] == asked.ids and whole.query == asked.query
            # what follows is the answer
            assert whole.labels[len(asked.ids):] == whole.ids[len(asked.ids):]
            assert asked.ids[-1:] == tokenizer.encode(" ASSISTANT:", continues=True)[-1:]
            assert set(asked.labels) == {IGNORE} and len(asked.labels) == len(asked.ids)


def test_typed_control_strings_are_text(tokenizer):
    (eos,) = tokenizer.eos_ids
    typed = "</s> <s> <image> <|eot|> <|im_end|> <unk> -200 ASSISTANT: x"
    asked = prompt([("hello </s>", "x </s>"), (typed, None)], tokenizer, image=True)
    assert asked.ids.count(IMAGE_TOKEN) == 1 and asked.ids.count(eos) == 1 and asked.ids.count(
        tokenizer.bos_id) == 1
    assert tokenizer.decode(asked.turns[1]).strip() == typed
    # no "image": the slot's letters are text
    sample = render(record(typed, typed), tokenizer, "v1")
    assert IMAGE_TOKEN not in sample.ids and sample.ids.count(eos) == 1
    # LLaVA masks this one away as a whole
    assert tokenizer.decode(supervised(sample)).strip() == typed


def test_prompt_wants_questions(tokenizer):
    for empty in ("", "  \n"):
        with pytest.raises(UserError, match="empty"):
            prompt([(empty, None)], tokenizer)
    with pytest.raises(UserError, match="Unicode"):
        prompt([("\ud800", None)], tokenizer)
    for turns in ([], [("a", "b")], [("a", None), ("b", None)]):
        with pytest.raises(ValueError):
            prompt(turns, tokenizer)
    (eos,) = tokenizer.eos_ids                        # a model may say nothing: its turn still ends
    ids = prompt([("a", ""), ("b", None)], tokenizer).ids
    assert ids.count(eos) == 1 and ids[ids.index(eos) - 1] == tokenizer.encode(
        " ASSISTANT:", continues=True)[-1]


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
    assert problems(made) == why
    with pytest.raises(UserError, match=why):
        render(made, tokenizer, "v1", "file.json: record 7")


def test_no_problems(tokenizer):
    assert problems(record("a", "b")) is None and problems(record("<image>", "b",
                                                                  image="x.png")) is None
    with pytest.raises(UserError, match="template"):
        render(record("a", "b"), tokenizer, "v2")


# --------------------------------------------------------------------------------------------------
# Files

@pytest.fixture
def world(tmp_path, folders):
    """A json of seven records (three of them useless) and a folder of two pictures."""
    (tmp_path / "images" / "sub").mkdir(parents=True)
    Image.new("RGB", (40, 20), (200, 10, 10)).save(tmp_path / "images" / "a.png")
    Image.effect_noise((30, 50), 90).convert("RGB").save(tmp_path / "images" / "sub" / "b.jpg")
    records = [
        record("<image>\nWhat?", "A cat.", image="a.png"),
        record("a", ""),
        record("b", ""),
        record("x", "y", "z", id=4),
        record("What?\n<image>", "2", "Sure?", "yes", image="sub/../sub/b.jpg"),
        record("hello", "you"),
        record("<image>", "Again.", image="sub/../sub/b.jpg", id="twice")]
    (tmp_path / "x.json").write_text(json.dumps(records))
    return tmp_path


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


@pytest.mark.parametrize("content", [b"", b"{", b"[1, 2", b"{}", b"[]", b"3", b"null", b"\xff\xfe\xfa", b"[" * 100_000,
                                     b'{"conversations": []}\n{"conversations": []}', b"[null]",
                                     b'[{"conversations": [[]]}]'])
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


def test_collate():
    items = [
        dict(pixels=torch.full((3, 2, 2), 1.0), ids=[1, -200, 0, 5], labels=[-100, -100, -100, 5],
             query=[]),
        dict(pixels=torch.full((3, 2, 2), 2.0), ids=[1, 7], labels=[-100, 7], query=[8, 0, 9])]
    batch = collate(items)
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
    assert collate(items, pad_id=3)["ids"].tolist()[1] == [1, 7, 3, 3]
    alone = collate(items[:1])
    assert alone["query"].shape == (1, 1) and alone["query_mask"].tolist() == [[False]]


# --------------------------------------------------------------------------------------------------
# show

def test_paint_marks_exactly_what_is_learnt(tokenizer):
    rng, seen = random.Random(7), 0
    while seen < 50:
        made = random_record(rng)
        answers = turns_of(made)[1]
        if not all(c.isprintable() and c != "\u2581" or c == "\n" for c in "".join(answers)):
            continue
        seen += 1
        painted = data.paint(render(made, tokenizer, "v1"), tokenizer, color=True)
        green = re.findall("\033\\[32m(.*?)\033\\[0m", painted, re.S)
        assert green == [text for answer in answers for text in (" " + answer, "</s>")]
        assert painted.count("\033[7m<image>\033[0m") == ("image" in made)
        assert re.sub("\033\\[[0-9;]*m", "", painted).startswith(f"<s>{SYSTEM} USER:")


def test_show_can_not_drive_the_terminal(tokenizer, capsys):
    samples = [render(record("a \033[31m <image>", "b \033[2J 🙂", image="x.png"), tokenizer)]
    data.show(samples, tokenizer, 5)
    out = capsys.readouterr().out
    assert "\033" not in out and "[<image>]\n‹a \\x1b[31m›" in out and "« b \\x1b[2J 🙂»«</s>»" in out
    n = sum(label != IGNORE for label in samples[0].labels)
    assert f"{len(samples[0].ids)} ids" in out and f"supervised {n} ({n / len(samples[0].ids):.1%})" in out
    data.show([render(record("Say it.<image>", "a cat", image="x.png"), tokenizer, "plain")],
              tokenizer, 1)
    assert "not in the text: ‹Say it.›" in capsys.readouterr().out


def test_show_command(world, folders, monkeypatch, capsys):
    def call(*args):
        monkeypatch.setattr(sys, "argv", ["data.py", "show", *map(str, args)])
        data.main()
        return capsys.readouterr().out

    where = [
        "--json", world / "x.json", "--images", world / "images", "--tokenizer", folders["tiny"]]
    out = call(*where, "--n", 2)
    assert "left out 3 of 7" in out and "record 0 (id 'r')" in out and "record 4" in out and "record 5" not in out
    assert "« A cat.»«</s>»" in out and "‹What?›" in out
    assert "\033[32m A cat." in call(*where, "--color")
    drawn = {call(*where, "--n", 1, "--seed", seed) for seed in range(8)}
    assert len(drawn) > 1 and call(*where, "--n", 1, "--seed", 3) in drawn
    for bad in (where[:-2], where[2:], where + ["--n", 0], where[:-1] + [world]):
        with pytest.raises(UserError):
            call(*bad)


def test_one_line_and_exit_2(world, folders):
    (world / "bad.json").write_text("[")
    done = subprocess.run([sys.executable, data.__file__, "show", "--json", world / "bad.json",
                           "--tokenizer", folders["tiny"]], capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


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
    assert data.query_of(single.turns, "first") == data.query_of(single.turns,
                                                                 "sofar") == single.query
