"""A row of tokens against LLaVA's published algorithm, written out again here, and against known
rows of the Llama-2 tokenizer."""
import random
import re

import pytest

from core.common import UserError
from data import IGNORE, IMAGE_TOKEN, prompt, render
from tests.data.helpers import Llava, of, random_record, record, supervised, turns_of, words

SYSTEM_IDS = [
    1, 319, 13563, 1546, 263, 12758, 1404, 322, 385, 23116, 21082, 20255, 29889, 450, 20255, 4076,
    8444, 29892, 13173, 29892, 322, 1248, 568, 6089, 304, 278, 1404, 29915, 29879, 5155, 29889]


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
            assert asked.labels == []


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
