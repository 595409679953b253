"""scores.py: each benchmark on a small annotation file of its own, expected values worked out by hand from the rules.

Every case is built so that plausible misreadings of the rule (VARIANTS) give another number than the right one.
"""
import json
import math
import os
import random
import re
import string
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import answers, scores, submit
from benchmarks.scores import score
from core.common import ROOT, UserError


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def write_json(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def line(id, text, prompt=None):
    return dict(question_id=id, text=text) | ({} if prompt is None else dict(prompt=prompt))


def fails(*words):
    """One line that holds all these words."""
    return pytest.raises(UserError, match="".join(f"(?=.*{re.escape(word)})" for word in words) + "^[^\n]*$")


# ---------------------------------------------------------------------------------------------------------------------
# The cases: make_TASK(folder) -> annotations, lines of the answers file; EXPECTED: what they score

def make_textvqa(folder):
    x = ["x"] * 10
    rows = [  # picture, question, ten humans, the answer                                      the humans that agree
        ("a", "What is it?", ["don't"] * 10, "Dont"),                      # a contraction: 10, so 1
        ("a", "Which ANIMAL?", ["the dog"] * 3 + x[3:], "dog"),            # an article: 3, so 0.9
        ("b", "How many?", ["2"] + x[1:], "Two."),                         # a number word: 1, so 0.3
        ("c", "How much?", ["3.5"] * 10, "3.5."),                          # the last period goes: 1
        ("d", "Colour?", ["blue-green"] * 2 + x[2:], "blue green"),        # a mark becomes a space: 2, so 0.6
        ("e", "Brand?", ["levi's"] * 3 + x[3:], "levis"),                  # "levi 's" isn't "levis": 0
        ("f", "Price?", ["1000"] * 10, "1,000"),                           # 1
        ("g", "Where?", ["joe's"] * 10, "joe 's"),                         # both become "joe 's": 1
    ]
    data = [dict(image_id=i, question=q, answers=humans, image_width=1) for i, q, humans, _ in rows]
    ocr = "{}\nReference OCR token: a, b\nAnswer the question using a single word or phrase."
    plain = "{}\nAnswer the question using a single word or phrase."
    older = ["Reference OCR token: \n{}\nShort.", "OCR tokens: a. Question: {} Short answer:"]
    prompts = [ocr, ocr, plain, *older, ocr, ocr, ocr]
    lines = [line(i, text, p.format(q.capitalize())) for (i, q, _, text), p in zip(rows, prompts)]
    return write_json(folder / "TextVQA.json", dict(dataset_version="0.5.1", data=data)), lines


def make_vizwiz(folder):
    rows = [  # humans, type, the answer                                               official       lmms-eval
        (["joe's"] * 10, "other", "Joe's"),                     # uploaded as "joe 's"         0              1
        (["two"] * 10, "number", "two"),                        # uploaded as "2"              0              1
        (["don't"] * 2 + ["no"] * 8, "other", "dont"),          # uploaded as "don't"          0.6            0.6
        (["unanswerable"] * 3 + list("bcdefgh"), "unanswerable", "Unanswerable."),           # 0.9            0.9
        (["The Cat"] * 10, "other", "the cat"),                 # humans aren't lowered        0              1
        (["1000"] * 10, "number", "1,000"),                                                  # 1              1
    ]
    data = [dict(image=f"VizWiz_val_{i:08}.jpg", question="What?", answer_type=kind, answerable=1,
                 answers=[dict(answer=human, answer_confidence="yes") for human in humans])
            for i, (humans, kind, _) in enumerate(rows)]
    return write_json(folder / "val.json", data), [line(i, text) for i, (_, _, text) in enumerate(rows)]


GQA = [  # right answer, structure, balanced, the answer                                   ours  lmms-eval  VLMEvalKit
    ("yes", "verify", True, "Yes."),                                                     # 1     1          0
    ("dog", "query", True, "dog.."),          # all periods at the end                     1     1          0
    ("dog", "query", True, "a dog"),          # articles stay                              0     0          0
    ("t-shirt", "query", True, "tshirt"),                                                # 0     1          0
    ("no", "logical", True, "no "),           # spaces stay                                0     0          1
    ("blue", "query", True, "Blue"),                                                     # 1     1          1
    ("cat", "choose", True, "cat"),           # whatever isn't a query is binary           1     1          1
    ("x", "query", False, "x"),               # not balanced: not counted
]


def make_gqa(folder):
    questions = {f"n{i}": dict(question="?", answer=gold, isBalanced=balanced, imageId="1",
                               types=dict(structural=kind, semantic="obj", detailed="d"))
                 for i, (gold, kind, balanced, _) in enumerate(GQA)}
    return (write_json(folder / "testdev_balanced_questions.json", questions),
            [line(f"n{i}", text) for i, (*_, text) in enumerate(GQA)])


SQA = [  # the answer, right index, choices, has a picture                            ours
    ("B", 1, 2, True),                                                              # 1
    ("A", 0, 2, True),                                                              # 1
    ("B. a dog", 1, 3, True),                                                       # 1
    ("B.", 1, 2, True),                      # too short for the second rule          0
    ("So, The answer is B.", 1, 2, True),                                           # 1
    ("Indeed. The answer is B.", 1, 2, True),                                       # 1
    ("The answer is C, so", 2, 3, True),                                            # 1
    ("The answer is A, A", 0, 2, True),      # the last character may be any          1
    ("The answer is B", 1, 2, True),         # but has to be there                    0
    ("(B)", 1, 2, True),                                                            # 0
    ("b", 1, 2, False),                                                             # 0
    ("The answer is B. The answer is B.", 1, 2, False),                             # 0
    ("A", 0, 5, False),                                                             # 1
    ("Answer: B", 1, 2, False),                                                     # 0
    (None, 0, 2, True),                      # no answer: wrong, but not in IMG       0
]


def make_scienceqa(folder, prompts=True):
    folder = folder / "scienceqa"
    problems = {str(i + 5): dict(choices=list("wxyzv"[:n]), answer=gold, image="image.png" if seen else None)
                for i, (_, gold, n, seen) in enumerate(SQA)}
    write_json(folder / "problems.json", problems | {"1": dict(choices=["w", "x"], answer=0, image=None)})
    write_json(folder / "pid_splits.json", dict(train=["1"], test=list(problems)))
    write_json(folder / "llava_test_CQM-A.json", [
        dict(id=pid, conversations=[]) | (dict(image=f"{pid}/image.png") if p["image"] else {})
        for pid, p in problems.items()])
    return folder, [line(str(i + 5), text, ("<image>\n" * seen + "w or x?") if prompts else None)
                    for i, (text, _, _, seen) in enumerate(SQA) if text is not None]


MMBENCH = [  # index, A, B, C, D, right, the answer                                                ours  bare letter
    (1, "dog", "cat", "cow", "", "B", "B"),                                                      # 1     1
    (1000001, "cow", "dog", "cat", "", "C", "(C) cat"),                                          # 1     0
    (2000001, "cat", "cow", "dog", "", "A", "A."),                                               # 1     0
    (2, "red", "blue", "", "", "A", "A"),                                                        # 1     1
    (1000002, "blue", "red", "", "", "B", "A"),                   # so 2 is wrong                  0     0
    (3, "cat asleep", "dog is on the left", "", "", "B", "A dog is on the left side"),           # 1     0    an article
    (1000003, "dog is on the left", "cat asleep", "", "", "A", "Now the answer is **A** of these two I think"),  # 1   0
    (4, "None", "dog", "", "", "B", "A"),                                                        # 0     0
    (5, "red", "blue", "pink", "", "C", "C"),                     # one row less than options      1     1
    (1000005, "pink", "red", "blue", "", "A", "Answer: A"),                                      # 1     0
]


def make_mmbench(folder):
    names = ["index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image", "source", "l2-category",
             "comment", "split"]
    table = ["\t".join(names)]
    for i, *options, gold, _ in MMBENCH:
        table.append("\t".join([str(i), '"What ""is""\nit?"', "", *options, gold, "odd" if i % 2 else "even",
                                "i" * 200_000, "s", "all", "c", "dev"]))
    path = folder / "mmbench_dev_20230712.tsv"
    path.write_text("\n".join(table) + "\n", encoding="utf-8")
    return path, [line(row[0], row[-1]) for row in MMBENCH]


SEED = [  # id, kind, right, the answer                                                    ours  lmms-eval
    ("101", "image", "A", "A"),                                                          # 1     1
    ("102", "image", "B", "B."),                                                         # 0     1
    ("103", "image", "B", "b"),                                                          # 0     1
    ("104", "image", "B", "Because"),                                                    # 0     1
    ("105", "image", "C", "C"),            # answered twice, this one first                0     0
    ("105", "image", "D", "D"),            # and the last one counts for both              1     1
    ("106", "image", "D", None),           # no answer                                     0     0
    ("v1", "video", "C", "C"),                                                           # 1
]


def make_seed(folder):
    choices = dict(choice_a="dog", choice_b="cat", choice_c="cow", choice_d="pig")
    questions = [dict(question_id=id, data_type=kind, answer=gold, question_type_id=1 if kind == "image" else 10,
                      question="?", **choices) for id, kind, gold, _ in SEED]
    content = dict(questions=questions, question_type={"Scene Understanding": 1, "Action Recognition": 10})
    return write_json(folder / "SEED-Bench.json", content), [
        line(int(id) if id.isdigit() else id, text) for id, _, _, text in SEED if text is not None]


MMMU = [  # subject, type, options, right, the answer; in the annotations' order             ours  without luck
    ("Physics_1", "multiple-choice", ["up", "down", "left"], "C", "(A) is wrong, so (C)."),      # 1     1    the last
    ("Physics_2", "multiple-choice", ["up", "down"], "B", "No idea"),   # fourth draw, of two: A     0     0
    ("Math_1", "multiple-choice", ["1", "2", "3", "4"], "A", "I can't say"),   # first, of four: A   1     0
    ("Math_2", "multiple-choice", ["1", "2", "3", "4"], "B", "b"),      # capitals only; second: A   0     0
    ("Math_3", "multiple-choice", ["one", "two cats"], "B", "what I see there is Two Cats"),     # 1     1    quoted
    ("Math_4", "multiple-choice", ["1", "2"], "B", "B.'"),              # "B." stays; third, of two: B  1     0
    ("Math_5", "open", [], "3.43", "so 24/7 = 3.429"),                                           # 1     1    rounded
    ("Math_6", "open", [], "['24/7', '3.429']", "It is 24/7."),                                  # 1     1    a list
    ("Art_1", "open", [], "C", "because"),                              # " c", "c " aren't in it    0     0
    ("Art_2", "open", [], "2000000", "The result is 2,000,000"),                                 # 1     1
    ("Art_3", "open", [], "cat", "the cat is a dog"),                   # only what follows "is"     0     0
]


def make_mmmu(folder):
    rows = [dict(id=f"validation_{id}", question_type=kind, options=str(options), answer=gold, question="?")
            for id, kind, options, gold, _ in MMMU]
    return write_lines(folder / "mmmu.jsonl", rows), [line(f"validation_{id}", text) for id, *_, text in reversed(MMMU)]


MME = dict(  # task: pictures, each of two (right, the answer)                       percent + both right
    existence=[(("Yes", "Yes, there is"), ("No", "No.")), (("No", "nope"), ("Yes", "There is, yes"))],    # 75 + 50
    count=[(("No", "know"), ("No", "now it is"))],                                                        # 100 + 100
    position=[(("Yes", "y"), ("No", "n"))],                                                               # 0 + 0
    OCR=[(("Yes", " yes"), ("No", "NO"))],                                                                # 100 + 100
    code_reasoning=[(("Yes", ""), ("No", "not sure"))])                                                   # 50 + 0


def make_mme(folder):
    folder, lines = folder / "MME_Benchmark_release_version", []
    for number, task in enumerate(task for tasks in scores.MME_TASKS.values() for task in tasks):
        nested = task in ("artwork", "celebrity", "landmark", "posters", "scene")
        for i, pair in enumerate(MME.get(task, [(("Yes", "Yes"), ("No", "No"))])):
            at = folder / task / ("questions_answers_YN" if nested else "") / f"{i:04}.txt"
            at.parent.mkdir(parents=True, exist_ok=True)
            gap = "  " if task == "color" else " "               # as in seven questions of the release
            at.write_text("".join(f"Is it {j}?{gap}Please answer yes or no.\t{gold}\n"
                                  for j, (gold, _) in enumerate(pair)))
            for j, (_, text) in enumerate(pair):
                lines.append(line(f"{task}/{'images/' * nested}{i:04}.jpg", text,
                                  f"Is it {j}?\nAnswer the question using a single word or phrase."))
    return folder, lines[::2] + lines[1::2]                      # a picture's questions don't stand together


POPE = [  # the answer, label                                   said   lmms-eval  VLMEvalKit
    ("Yes", "yes"),                                           # yes    yes        yes
    ("NO", "no"),                                             # yes    no         no        false positive
    ("There is not", "no"),                                   # no     other      none
    ("No, it is.", "yes"),                                    # no     other      no        false negative
    ("Yes. No way", "yes"),                                   # yes    other      none
    ("no\nwhat", "no"),                                       # yes    other      no        false positive
    ("", "yes"),                                              # yes    other      none
    ("Sure", "yes"),                                          # yes    other      none
]


def make_pope(folder):
    lines = []
    for category, first in dict(random=10_000_000, adversarial=0, popular=20_000_000).items():
        rows = POPE if category != "popular" else POPE[:1] + POPE[2:3]            # popular: all right
        write_lines(folder / f"coco_pope_{category}.json", [
            dict(question_id=i, image="x.jpg", text=f"Is there a {i}?", label=label)
            for i, (_, label) in enumerate(rows, 1)])
        lines += [line(first + i, text, f"Is there a {i}?\nAnswer.") for i, (text, _) in enumerate(rows, 1)]
    return folder, lines


MAKE = dict(textvqa=make_textvqa, vizwiz=make_vizwiz, gqa=make_gqa, scienceqa=make_scienceqa, mmbench=make_mmbench,
            seed=make_seed, mmmu=make_mmmu, mme=make_mme, pope=make_pope)

EXPECTED = dict(
    # in VLMEvalKit "3.5." keeps its period and "joe's" is one word
    textvqa=(580 / 8, dict(accuracy=580 / 8, vlmevalkit=380 / 8)),
    vizwiz=(41.67, dict(vizwiz_lmms=550 / 6, answer_type=dict(number=50.0, other=20.0, unanswerable=90.0))),
    gqa=(400 / 7, dict(binary=200 / 3, open=50.0, lmms_eval=500 / 7, vlmevalkit=300 / 7, structural=dict(
        choose=100.0, logical=0.0, query=50.0, verify=100.0), semantic=dict(obj=400 / 7))),
    # lmms-eval takes the letter or a letter and a period; VLMEvalKit takes all ten, "A, A" being one letter
    scienceqa=(70.0, dict(img=70.0, all=800 / 15, n_img=10, n=15, lmms_eval=40.0, vlmevalkit=100.0)),
    mmbench=(300 / 5, {"circular": 60.0, "plain_base": 80.0, "plain_all": 80.0, "category": {"even": 0.0, "odd": 100.0},
                       "l2-category": {"all": 60.0},
                       "bare_letters": dict(circular=0.0, plain_base=60.0, plain_all=30.0)}),
    seed=(200 / 7, dict(image=200 / 7, video=100.0, all=300 / 8, lmms_eval=500 / 7, types={
        "Action Recognition": 100.0, "Scene Understanding": 200 / 7})),
    # lmms-eval takes "y" for yes; VLMEvalKit looks for whole words, anywhere
    mme=(125 + 200 + 0 + 7 * 200, dict(
        perception=1725, cognition=3 * 200 + 50, tasks=dict(existence=125, count=200, position=0, OCR=200),
        lmms_eval=dict(perception=125 + 200 + 200 + 7 * 200, cognition=650),
        vlmevalkit=dict(perception=125 + 0 + 0 + 7 * 200, cognition=600))),
    # a and r: TP 4, FP 2, FN 1, TN 1: precision 4/6, recall 4/5, F1 8/11; popular: all right
    pope=(900 / 11, dict(f1=900 / 11, accuracy=(5 / 8 * 2 + 1) / 3 * 100, n=18, popular=dict(f1=100.0, yes_ratio=50.0),
                         random=dict(accuracy=62.5, precision=200 / 3, recall=80.0, f1=800 / 11, yes_ratio=75.0),
                         adversarial=dict(f1=800 / 11),
                         # TP 3, FP 0; lmms-eval counts no miss as a miss that isn't said "no"
                         lmms_eval=dict(accuracy=500 / 18, precision=100.0, recall=100.0, f1=100.0),
                         vlmevalkit=dict(accuracy=700 / 18, precision=100.0, recall=300 / 11, f1=300 / 7))),
    mmmu=(700 / 11, dict(overall=700 / 11, without_luck=500 / 11, n=11,
                         domain={"Art and Design": 100 / 3, "Science": 75.0},
                         subject=dict(Math=500 / 6, Art=100 / 3, Physics=50.0))))


def run(task, folder, lines=None):
    made = MAKE[task](folder)
    return score(task, made[0], answers.read_answers(write_lines(folder / "a.jsonl", lines or made[1])))


def subset(wanted, found):
    for name, value in wanted.items():
        if isinstance(value, dict):
            assert value.keys() <= found[name].keys()
            subset(value, found[name])
        else:
            assert found[name] == pytest.approx(value, abs=1e-9), name


@pytest.mark.parametrize("task", EXPECTED)
def test_numbers(task, tmp_path):
    result = run(task, tmp_path)
    primary, metrics = EXPECTED[task]
    assert result.keys() == {"task", "primary", "metrics"} and result["task"] == task
    assert result["primary"] == pytest.approx(primary, abs=1e-9)
    subset(metrics, result["metrics"])


def test_margins(tmp_path):
    """1.96 standard errors, by hand where it is a mean or a sum of means; F1's against resampled answers."""
    def off(*parts):
        variance = lambda x: sum((a - sum(x) / len(x)) ** 2 for a in x) / (len(x) - 1) / len(x)
        return pytest.approx(196 * math.sqrt(sum(map(variance, parts))))

    found = {}
    for task in MAKE:
        (tmp_path / task).mkdir()
        found[task] = run(task, tmp_path / task)["metrics"]["margin"]
    assert found["gqa"] == off([1, 1, 0, 0, 0, 1, 1]) and found["textvqa"] == off([1, 0.9, 0.3, 1, 0.6, 0, 1, 1])
    assert found["scienceqa"] == off([1] * 7 + [0] * 3) and found["vizwiz"] == off([0, 0, 0.6, 0.9, 0, 1])
    assert found["mmbench"] == off([1, 0, 1, 0, 1]) and found["seed"] == off([1, 0, 0, 0, 0, 1, 0])
    assert found["mmmu"] == off([1] * 7 + [0] * 4)
    assert found["mme"] == off([2, 0.5])                   # existence: of a picture 1 + 1, and 0.5 + 0
    said = [(scores.pope_says(text), label) for text, label in POPE]
    thirds = [[x / 3 for x in scores.f1_shares(pairs)] for pairs in (said, said, [said[0], said[2]])]
    assert found["pope"] == pytest.approx(scores.margin(*thirds))                       # of a mean of three
    luck, draws = random.Random(0), []
    made = {name: [("yes", "yes")] * a + [("yes", "no")] * b + [("no", "yes")] * c + [("no", "no")] * d
            for name, (a, b, c, d) in dict(random=(90, 30, 40, 40), popular=(50, 50, 20, 80)).items()}
    for pairs in made.values():
        shares = scores.f1_shares(pairs)
        assert sum(shares) / 2 == pytest.approx(scores.pope_metrics(pairs)["f1"])
    for _ in range(2000):
        draws.append(sum(scores.pope_metrics(luck.choices(pairs, k=200))["f1"] for pairs in made.values()))
    mean = sum(draws) / 2000
    spread = math.sqrt(sum((x - mean) ** 2 for x in draws) / 2000)
    assert 1.96 * spread == pytest.approx(scores.margin(*map(scores.f1_shares, made.values())), rel=0.06)


# ---------------------------------------------------------------------------------------------------------------------
# Misreadings of the rules, each of which these cases tell from the right one

def first_letter(text, *_):
    return next((x for x in text.upper() if x in "ABCDE"), None)


def by_words(text, *_):
    return "no" if "no" in re.findall("[a-z]+", text.lower()) else "yes"


def pope_rule(split, noes):
    return lambda text: "no" if noes & set(split(text)) else "yes"


def drawn_when_failed(text):
    return RIGHT_LETTER(text) or random.Random(0).choice("AB")


RIGHT_LETTER, RIGHT_CHOICE, RIGHT_OPEN, RIGHT_NORMAL = (
    scores.scienceqa_letter, scores.mmmu_choice, scores.mmmu_open, scores.mmmu_normal)
RIGHT_EVALAI, RIGHT_VQA, RIGHT_MME = scores.evalai, scores.vqa, scores.mme_read

NOES = {"No", "no", "not"}
VARIANTS = [      # task, name in scores.py, what is put there
    ("textvqa", "CONTRACTIONS", {}),
    ("textvqa", "ARTICLES", ()),
    ("textvqa", "NUMBERS", {}),
    ("textvqa", "vqa_accuracy", lambda a, humans: min(1, humans.count(a) / 3)),
    ("textvqa", "vqa_accuracy", lambda a, humans: float(a in humans)),
    ("textvqa", "strip_punctuation", lambda text, *_: text),
    ("textvqa", "strip_punctuation", lambda text, *_: text.translate(str.maketrans("", "", string.punctuation))),
    ("textvqa", "PUNCTUATION", scores.PUNCTUATION.replace("-", "")),
    ("textvqa", "evalai", lambda text: text.strip().lower()),
    ("textvqa", "evalai", lambda text: RIGHT_VQA(text, scores.CONTRACTIONS)),
    ("textvqa", "evalai", lambda text: RIGHT_EVALAI(text.replace("'", ""))),
    ("vizwiz", "evalai", lambda text: text),
    ("vizwiz", "evalai", lambda text: text.lower().rstrip(".")),
    ("vizwiz", "CONTRACTIONS", {}),
    ("vizwiz", "CONTRACTIONS", scores.CONTRACTIONS_VIZWIZ),
    ("vizwiz", "vqa_accuracy", lambda a, humans: min(1, humans.count(a) / 3)),
    ("vizwiz", "vqa_accuracy", lambda a, humans: min(1, sum(RIGHT_EVALAI(h) == a for h in humans) / 3)),
    ("scienceqa", "scienceqa_letter", first_letter),
    ("scienceqa", "scienceqa_letter", lambda text: first_letter(text[:1])),
    ("scienceqa", "scienceqa_letter", lambda text: RIGHT_LETTER(text.rstrip("."))),
    ("scienceqa", "scienceqa_letter", lambda text: RIGHT_LETTER(text + ".")),
    ("scienceqa", "scienceqa_letter", lambda text: (re.findall(r"The answer is ([A-E])\.", text) or [None])[0]),
    ("scienceqa", "scienceqa_letter", drawn_when_failed),
    ("mmbench", "can_infer", lambda text, options: text),
    ("mmbench", "can_infer", first_letter),
    ("mmbench", "can_infer", lambda text, options: next((x for x in options if x in re.findall(r"\w+", text)), None)),
    ("mmmu", "mmmu_choice", lambda text, options: RIGHT_CHOICE(text, options) or "A"),
    ("mmmu", "mmmu_choice", lambda text, options: RIGHT_CHOICE(text, options) or "none"),
    ("mmmu", "mmmu_choice", lambda text, options: RIGHT_CHOICE(text.upper(), options)),
    ("mmmu", "mmmu_choice", lambda text, options: first_letter(text) or RIGHT_CHOICE(text, options)),
    ("mmmu", "mmmu_choice", lambda text, options: RIGHT_CHOICE(text.strip(",.!?;:'"), options)),
    ("mmmu", "mmmu_choice", lambda text, options: RIGHT_CHOICE(text, ["\0"] * len(options))),
    ("mmmu", "mmmu_open", lambda text: {text.lower()}),
    ("mmmu", "mmmu_open", lambda text: {x for x in RIGHT_OPEN(text) if isinstance(x, str)}),
    ("mmmu", "mmmu_open", lambda text: RIGHT_OPEN(text) | {text.lower()}),
    ("mmmu", "mmmu_normal", lambda text: [text.strip().lower()]),
    ("mmmu", "mmmu_normal", lambda text: [x.strip() if isinstance(x, str) else x for x in RIGHT_NORMAL(text)]),
    ("mmmu", "mmmu_subject", lambda id: "Math"),                 # so the draws come in another order
    ("mme", "mme_read", lambda text: text.lower() if text.lower() in ("yes", "no") else None),
    ("mme", "mme_read", by_words),
    ("mme", "mme_read", lambda text: dict(y="yes", n="no").get(text) or RIGHT_MME(text)),
    ("mme", "mme_read", scores.yes_or_no_vlmevalkit),
    ("mme", "mme_read", lambda text: "no" if "no" in text.lower()[:4] else "yes"),
    ("pope", "pope_says", by_words),
    ("pope", "pope_says", lambda text: "yes" if "yes" in text.lower() else "no"),
    ("pope", "pope_says", pope_rule(lambda text: text.replace(",", "").split(" "), NOES)),             # all sentences
    ("pope", "pope_says", pope_rule(lambda text: text.lower().split(".")[0].replace(",", "").split(" "), NOES)),
    ("pope", "pope_says", pope_rule(lambda text: text.split(".")[0].replace(",", "").split(), NOES)),  # at line breaks
    ("pope", "pope_says", pope_rule(lambda text: text.split(".")[0].split(" "), NOES)),                # with commas
    ("pope", "pope_says", pope_rule(lambda text: text.split(".")[0].replace(",", "").split(" "), {"No", "no"})),
]


@pytest.mark.parametrize("number", range(len(VARIANTS)), ids=[f"{task}-{name}" for task, name, _ in VARIANTS])
def test_misreadings_give_another_number(number, tmp_path, monkeypatch):
    task, name, other = VARIANTS[number]
    monkeypatch.setattr(scores, name, other)
    assert run(task, tmp_path)["primary"] != pytest.approx(EXPECTED[task][0], abs=0.005)


def test_misreadings_of_what_is_averaged(tmp_path):
    """The rules that no function stands for: what they would give is worked out here."""
    def share(right):
        return 100 * sum(right) / len(right)

    gqa = [(text, gold) for gold, _, balanced, text in GQA if balanced]
    others = [lambda text: text.strip().lower(), lambda text: text.removesuffix(".").lower(), RIGHT_EVALAI,
              lambda text: text.rstrip("."), lambda text: text.rstrip(".").lower().strip()]
    unlike = lambda value, other: abs(value - other) > 0.005
    score = run("gqa", tmp_path)["primary"]
    assert all(unlike(score, share([f(text) == gold for text, gold in gqa])) for f in others)
    assert unlike(score, share([t.rstrip(".").lower() == gold for gold, _, _, t in GQA]))

    seed, image = run("seed", tmp_path)["primary"], [(text, gold) for _, kind, gold, text in SEED if kind == "image"]
    assert unlike(seed, share([text == gold for text, gold in image if text is not None]))    # the missing one left out
    assert unlike(seed, share([(text or "").rstrip(".") == gold for text, gold in image]))
    assert unlike(seed, share([text == gold for text, gold in image]))          # each of the two lines for its own row
    assert unlike(seed, share([text == gold for text, gold in image[:4] + image[5:]]))              # ids taken once

    right = {i: scores.can_infer(text, {x: o for x, o in zip("ABCD", options) if o and o != "None"}) == gold
             for i, *options, gold, text in MMBENCH}
    circle = run("mmbench", tmp_path)["primary"]
    assert circle != share(right.values()) and circle != share([right[i] for i in right if i < 10 ** 6])
    counted = {i % 10 ** 6: sum(1 for o in options if o) for i, *options, _, _ in MMBENCH}          # rows = options?
    assert circle != share([sum(right[j] for j in right if j % 10 ** 6 == i) == counted[i] for i in counted])

    sqa = run("scienceqa", tmp_path)["primary"]
    letters = [(scores.scienceqa_letter(text or "") == "ABCDE"[gold], seen, text) for text, gold, _, seen in SQA]
    assert sqa != share([ok for ok, _, text in letters]) and sqa != share([ok for ok, seen, _ in letters if seen])


# ---------------------------------------------------------------------------------------------------------------------
# The rules one by one

@pytest.mark.parametrize("text, normal", [
    ("The dogs", "dogs"), ("A", ""), ("", ""), ("None", "0"), ("ten", "10"), ("eleven", "eleven"), ("Yes!", "yes"),
    ("yes, sir?", "yes sir"), ("1,000.50", "1000.50"), ("3.", "3"), ("a.b", "ab"), ("x-ray", "x ray"),
    ("x -ray-z", "x rayz"),
    ("o'clock", "o'clock"), ("oclock", "o'clock"), ("its", "its"), ("couldnt've", "couldn't've"), ("I'dve", "i'dve"),
    ("levi's", "levi 's"), ("somebody'd", "somebodyd"), ("two\nof\tthe ten", "2 of 10"), ("50% & more", "50% & more"),
    ("Caf\u00e9\u00a0A", "caf\u00e9"), ("don\u2019t", "don\u2019t"), ("a" + "." * 40, "a" + "." * 8)])
def test_evalai(text, normal):
    assert scores.evalai(text) == normal


def test_the_tables_are_whole():
    """120 contractions, of which 45 have an apostrophe already; VizWiz's differ from them in all but eight values."""
    plain, curly = scores.CONTRACTIONS, scores.CONTRACTIONS_VIZWIZ
    assert len(plain) == len(curly) == 120 and sum("'" in key for key in plain) == 45
    assert sum("'" in value for value in curly.values()) == 8 and sum("'" in key for key in curly) == 2
    assert (curly["dont"], curly["couldn'tve"], curly["wheres"]) == ("don\u2019t", "couldn\u2019t\u2019ve", "where's")
    assert curly["somebody\u2019d"] == "somebodyd" and (plain["weve"], plain["twas"]) == ("we've", "'twas")
    assert len(scores.PUNCTUATION) == 21 and len(scores.NUMBERS) == 12


@pytest.mark.parametrize("same, accuracy", [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)])
def test_vqa_accuracy_leaves_one_out(same, accuracy):
    assert scores.vqa_accuracy("x", ["x"] * same + ["y"] * (10 - same)) == pytest.approx(accuracy)


@pytest.mark.parametrize("text, letter", [
    ("B", "B"), ("B.", "B"), ("(B) a cat", "B"), ("Answer: B", "B"), ("A or B", None), ("b", None), ("", None),
    ("A cat", "A"), ("A cat sits on the mat", "B"), ("the CAT", "B"), ("Z", "Z"), ("Cannot determine the answer", "Z"),
    ("A cat sits there", "A"), ("A cat sits there now", "B"),            # a letter five words from the end, or six
    ("a cat" + " " * 37, "B"), ("a cat" + " " * 38, None),               # twice as long as all options, and longer
    ("The answer is b", "B"), ("E", None), ("I see a cat, " + "no, " * 20, None),
    ("A. dog or B. cat, the answer is **B**", "B")])
def test_can_infer(text, letter):
    assert scores.can_infer(text, dict(A="dog", B="cat", C="cow on the road")) == letter


@pytest.mark.parametrize("text, gold, right", [
    ("3,429.004", "3429", True), ("3.429", "3.43", True), ("x = 5", "5", True), ("1e3", "1000", True),
    ("-.5", "-0.5", True), ("e", "E", True), ("the e", "e", True), ("eel", "e", False),
    ("", "x", False), ("It is so. Is it?", "so", False),
    ("the final answer is 7 cats", "7", True), ("inf", "inf", True), ("nan", "nan", False),
    ("So it is\nTampa", "tampa", False),
    ("It is\nthe result Tampa", "tampa", True), ("1 000", "1000", False), ("20,00", "20", False)])
def test_mmmu_open(text, gold, right):
    assert scores.mmmu_open_right(text, [gold]) == right


def test_scienceqa_without_prompts_goes_by_the_question_file(tmp_path):
    folder, lines = make_scienceqa(tmp_path, prompts=False)
    assert score("scienceqa", folder, answers.read_answers(write_lines(tmp_path / "a", lines)))["primary"] == 70.0
    (folder / "llava_test_CQM-A.json").unlink()
    with fails("llava_test_CQM-A.json", "prompts"):
        score("scienceqa", folder, answers.read_answers(tmp_path / "a"))


def test_mmmu_answer_key_takes_the_bare_letter(tmp_path):
    key = {f"validation_{id}": dict(question_type=kind.replace("open", "short-answer"), ground_truth=scores_list(gold))
           for id, kind, _, gold, _ in MMMU}
    lines = make_mmmu(tmp_path)[1] + [line("validation_Music_1", "B"), line("validation_Music_2", "B.")]
    key |= {f"validation_Music_{i}": dict(question_type="multiple-choice", ground_truth="B") for i in (1, 2)}
    path = write_json(tmp_path / "answer_dict_val.json", key)
    result = score("mmmu", path, answers.read_answers(write_lines(tmp_path / "a", lines)))
    assert result["primary"] == result["metrics"]["without_luck"] == pytest.approx(400 / 13)
    lines = [row | dict(text="") if row["question_id"] == "validation_Music_2" else row for row in lines]     # as wrong
    assert score("mmmu", path, answers.read_answers(write_lines(tmp_path / "a", lines)))["primary"] == result["primary"]


def scores_list(gold):
    return json.loads(gold.replace("'", '"')) if gold.startswith("[") else gold


def test_mme_pairs_by_picture_and_pope_by_id(tmp_path):
    """In whatever order the lines are: the official scripts pair them by place, and would be wrong."""
    for task in ("mme", "pope"):
        (tmp_path / task).mkdir()
        assert run(task, tmp_path / task) == run(task, tmp_path / task, MAKE[task](tmp_path / task)[1][::-1])


def test_pope_ids_may_count_from_zero(tmp_path):
    folder, lines = make_pope(tmp_path)
    lines = [row | dict(question_id=row["question_id"] - 1) for row in lines]
    assert run("pope", folder, lines)["primary"] == pytest.approx(EXPECTED["pope"][0])
    with fails("no such question", "20000000"):            # not all of them: a place can't be told from an id
        run("pope", folder, lines[:-1])


# ---------------------------------------------------------------------------------------------------------------------
# MM-Vet, and the files to hand in

def make_mmvet(folder):
    capabilities = [["ocr", "math"], ["rec"], ["math", "ocr"], ["ocr"]]
    return write_json(folder / "mm-vet.json", {f"v1_{i}": dict(question="?", answer="a<AND>b", capability=those)
                                               for i, those in enumerate(capabilities)})


def test_mmvet(tmp_path):
    path, grades = make_mmvet(tmp_path), [[1.0, 0.9], [0.0, 0.0], [0.5, 0.5], [0.2, 0.2]]
    given = write_json(tmp_path / "grades.json", {f"v1_{i}": dict(score=g) for i, g in enumerate(grades)})
    result = score("mmvet", path, [], given)
    # runs: 42.5 and 40; of ocr 56.67 and 53.33
    # questions: 0.95, 0, 0.5, 0.2
    off = 196 * math.sqrt(sum((x - 0.4125) ** 2 for x in (0.95, 0, 0.5, 0.2)) / 3 / 4)
    assert result["primary"] == 41.2 and result["metrics"] == dict(
        total=41.2, math=72.5, ocr=55.0, rec=0.0, margin=pytest.approx(off), n=4, runs=2,
        sets=dict(math_ocr=72.5, ocr=20.0, rec=0.0))
    for bad, words in [({"v1_9": dict(score=[1, 1])}, "v1_9"), ({"v1_0": dict(score=[1])}, "as many runs"),
                       ({"v1_0": dict(score=[1, 2])}, "grades"), ({"v1_0": 3}, "score")]:
        with fails("grades.json", words):
            score("mmvet", path, [], write_json(given, json.loads(given.read_text()) | bad))
        write_json(given, {f"v1_{i}": dict(score=g) for i, g in enumerate(grades)})
    with fails("1 of 4", "v1_3"):
        score("mmvet", path, [], write_json(given, {f"v1_{i}": dict(score=[1]) for i in range(3)}))


def command(*words):
    """eval.py --score WORDS in a process without torch: (exit status, stdout, stderr)."""
    done = subprocess.run([sys.executable, str(ROOT / "eval.py"), "--score", *map(str, words)], capture_output=True,
                          text=True, env=os.environ | dict(PYTHONPATH=str(Path(__file__).parent / "without_torch")))
    return done.returncode, done.stdout, done.stderr


def test_mmvet_without_grades_is_handed_in(tmp_path):
    lines = [line(i, f"text\n{i} \u00e9") for i in (2, 0, 1, 3)]
    path = write_lines(tmp_path / "a.jsonl", lines)
    status, out, err = command("mmvet", "--annotations", make_mmvet(tmp_path), "--predictions", path, "--json")
    assert (status, json.loads(out)) == (0, dict(task="mmvet", primary=None, metrics={})) and "--grades" in err
    written = (tmp_path / "a-submission.json").read_text()
    assert written == json.dumps({f"v1_{row['question_id']}": row["text"] for row in lines}, indent=2)


def test_vizwiz_test_is_handed_in(tmp_path):
    path, lines = make_vizwiz(tmp_path)
    hidden = [dict(image=row["image"], question="?") for row in json.loads(path.read_text())]
    hidden = write_json(tmp_path / "test.json", hidden)
    given, to = write_lines(tmp_path / "a.jsonl", lines[::-1]), tmp_path / "up.json"
    status, out, err = command("vizwiz", "--annotations", hidden, "--predictions", given, "--submission", to)
    assert status == 0 and "judged elsewhere" in out and "eval.ai" in err
    up = json.loads(to.read_text())
    assert [row["answer"] for row in up] == ["joe 's", "2", "don't", "unanswerable", "cat", "1000"]
    assert up[1] == dict(image="VizWiz_val_00000001.jpg", answer="2")
    with fails("1 of 6", "(first: 5)"):
        score("vizwiz", hidden, answers.read_answers(write_lines(given, lines[:-1])))


def test_mmbench_upload(tmp_path, monkeypatch):
    path, lines = make_mmbench(tmp_path)
    given = answers.read_answers(write_lines(tmp_path / "a.jsonl", lines[1:]))
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "openpyxl", None)
        with fails("openpyxl"):
            submit.submit_mmbench(path, given, tmp_path / "up.xlsx")
    openpyxl = pytest.importorskip("openpyxl")
    submit.submit_mmbench(path, given, tmp_path / "up.xlsx")
    table = list(openpyxl.load_workbook(tmp_path / "up.xlsx").active.values)
    assert table[0] == ("index", "question", "A", "B", "C", "D", "prediction", "answer", "split")
    assert table[1] == (1, 'What "is"\nit?', "dog", "cat", "cow", None, None, "B", "dev")
    assert [row[6] for row in table[2:]] == [row[-1] for row in MMBENCH[1:]] and len(table) == 11


def test_parquet(tmp_path, monkeypatch):
    path, lines = make_mmmu(tmp_path)
    given = answers.read_answers(write_lines(tmp_path / "a.jsonl", lines))
    (tmp_path / "Math").mkdir()
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "pyarrow", None)
        (tmp_path / "Math" / "validation-0.parquet").write_bytes(b"PAR1")
        with fails("pyarrow", ".jsonl"):
            score("mmmu", tmp_path / "Math" / "validation-0.parquet", given)
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet
    rows = [json.loads(row) for row in path.read_text().splitlines()]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows[:6]), tmp_path / "Math" / "validation-0.parquet")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows[6:]), tmp_path / "validation-1.parquet")
    assert score("mmmu", tmp_path, given)["primary"] == pytest.approx(EXPECTED["mmmu"][0])


# ---------------------------------------------------------------------------------------------------------------------
# What is wrong with files is said in one line

@pytest.mark.parametrize("task", MAKE)
def test_other_annotations(task, tmp_path):
    """Every other task's annotations, and none at all."""
    lines = answers.read_answers(write_lines(tmp_path / "a.jsonl", MAKE[task](tmp_path)[1]))
    for other in MAKE:
        (tmp_path / other).mkdir(exist_ok=True)
    for path in [*(MAKE[other](tmp_path / other)[0] for other in MAKE if other != task), make_mmvet(tmp_path),
                 tmp_path / "nothing", write_json(tmp_path / "x.json", [1]), write_json(tmp_path / "y.json", {"n": 1})]:
        with pytest.raises(UserError, match="^[^\n]*$"):
            score(task, path, lines)


@pytest.mark.parametrize("task", MAKE)
def test_unknown_missing_and_repeated(task, tmp_path, capsys):
    """As the official scorers take them: `stop` names those that stop, the others get a warning with the count."""
    lines, right = MAKE[task](tmp_path)[1], run(task, tmp_path)["primary"]
    capsys.readouterr()
    stranger = lines[0] | dict(question_id="existence/9.jpg" if task == "mme" else "999999999")
    if task in ("textvqa", "mme", "mmmu", "pope"):
        with fails("no such question", stranger["question_id"]):
            run(task, tmp_path, lines + [stranger])
    else:
        assert run(task, tmp_path, lines + [stranger])["primary"] == right
        assert "warning: 1 answers are ignored" in capsys.readouterr().err
    if task in ("gqa", "vizwiz", "mme"):
        with fails("answer"):
            run(task, tmp_path, lines[1:])
    else:
        less = run(task, tmp_path, lines[1:])["primary"]
        assert re.search(r"warning: \d+ of \d+ questions have no answer: (left out|wrong)", capsys.readouterr().err)
        assert less != right
    with fails("a.jsonl: line", "a second time"):
        run(task, tmp_path, lines + lines[:1])
    with fails("annotations", "another task or version"):
        run(task, tmp_path, [stranger])


def test_bad_lines(tmp_path, capsys):
    path, lines = make_gqa(tmp_path)
    file = tmp_path / "a.jsonl"
    for bad, words in [("{", "not a JSON object"), ("[1]", "not a JSON object"), ("", "not a JSON object"),
                       ('{"text": "x"}', "question_id"), ('{"question_id": 1.5, "text": "x"}', "question_id"),
                       ('{"question_id": 1}', '"text"'), ('{"question_id": 1, "text": null}', '"text"'),
                       ('{"question_id": 1, "text": "x", "prompt": 1}', '"prompt"')]:
        write_lines(file, lines)
        file.write_text(file.read_text() + bad + "\n")
        with fails(f"a.jsonl: line {len(lines) + 1}", words):
            answers.read_answers(file)
    file.write_text("")
    with fails("a.jsonl", "nothing in it"):
        answers.read_answers(file)
    file.write_bytes(b"\xff\n")
    with fails("a.jsonl", "UTF-8"):
        answers.read_answers(file)
    with fails("none.jsonl", "cannot read"):
        answers.read_answers(tmp_path / "none.jsonl")
    write_lines(file, [line(1, "x\u2028y")])                       # a line separator inside a text ends no line
    assert answers.read_answers(file)[0].text == "x\u2028y"
    path, lines = make_vizwiz(tmp_path)                             # LLaVA's script for VizWiz skips bad lines
    write_lines(file, lines)
    file.write_text(file.read_text() + "{\n")
    status, out, err = command("vizwiz", "--annotations", path, "--predictions", file, "--json")
    assert status == 0 and json.loads(out)["primary"] == 41.67 and "1 lines are not JSON" in err


def test_what_cannot_be_joined(tmp_path, capsys):
    with fails("line 1", "prompt"):
        run("textvqa", tmp_path, [line("a", "x")])
    with fails("line 1", "prompt"):
        run("textvqa", tmp_path, [line("a", "x", "What is it?")])
    folder, lines = make_mme(tmp_path)
    with fails("line 1", "tab or line break"):
        run("mme", tmp_path, [lines[0] | dict(text="Yes\nit is")] + lines[1:])
    with fails("one of the two questions"):
        run("mme", tmp_path, lines[:-1])
    with fails("no answers for MME's existence"):
        run("mme", tmp_path, [row for row in lines if not row["question_id"].startswith("existence")])
    folder, lines = make_pope(tmp_path)
    with fails("line 2", "another question", "version"):
        run("pope", tmp_path, lines[:1] + [lines[1] | dict(prompt="Is there a cat?")] + lines[2:])
    with fails("no answers to POPE's popular"):
        run("pope", tmp_path, lines[:-2])
    quiet = run("pope", tmp_path, [row | dict(text="no") for row in lines])
    assert quiet["primary"] == 0.0 and capsys.readouterr().err.count("divides by zero") == 3
    with fails("no prompt holds <image>"):
        run("scienceqa", tmp_path, [row | dict(prompt="w or x?") for row in make_scienceqa(tmp_path)[1]])
    run("scienceqa", tmp_path, [row | dict(prompt="<image>") for row in make_scienceqa(tmp_path)[1]])
    assert "4 prompts and problems.json disagree" in capsys.readouterr().err


def test_annotations_with_holes(tmp_path):
    """What the official files don't have, and others do: it's said, neither scored nor a traceback."""
    path, lines = make_mmbench(tmp_path)
    given = answers.read_answers(write_lines(tmp_path / "a.jsonl", lines))
    whole = path.read_text()

    def hide(golds):
        return re.sub(rf"\t[{golds}](?=\t(odd|even)\t)", "\t", whole)

    path.write_text(hide("C"))
    with fails("an answer in every row, or in none"):
        score("mmbench", path, given)
    path.write_text(hide("ABC"))
    assert score("mmbench", path, given)["primary"] is None                          # as if there were no such column
    path.write_text(whole.rstrip("\n") + "\tmore\n")
    with fails("not MMBench's table"):
        score("mmbench", path, given)
    path, lines = make_vizwiz(tmp_path)
    write_json(path, [row | dict(answers=[]) for row in json.loads(path.read_text())])
    with fails("without answers"):
        score("vizwiz", path, answers.read_answers(write_lines(tmp_path / "a.jsonl", lines)))
    path, lines = make_gqa(tmp_path)
    unbalanced = [row for row, (_, _, balanced, _) in zip(lines, GQA) if not balanced]
    with fails("balanced questions"):
        score("gqa", path, answers.read_answers(write_lines(tmp_path / "a.jsonl", unbalanced)), limited=True)
    folder, lines = make_scienceqa(tmp_path)
    problems = json.loads((folder / "problems.json").read_text())
    write_json(folder / "problems.json", problems | {"5": problems["5"] | dict(choices=list("uvwxyz"), answer=5)})
    with fails("beyond E"):
        score("scienceqa", folder, answers.read_answers(write_lines(tmp_path / "a.jsonl", lines)))
    with fails("mm-vet.json"):
        scores.mmvet_questions(write_json(tmp_path / "x.json", {"v1_a": dict(question="?", capability=["ocr"])}))


def test_the_command(tmp_path):
    path, lines = make_gqa(tmp_path)
    given = write_lines(tmp_path / "a.jsonl", lines)
    status, out, err = command("gqa", "--annotations", path, "--predictions", given, "--json")
    assert (status, err) == (0, "") and json.loads(out) == run("gqa", tmp_path) and out.count("\n") == 1
    status, out, err = command("gqa", "--annotations", path, "--predictions", given)
    assert (status, err) == (0, "") and out.startswith("gqa: 57.14\n") and re.search(r"\n  binary +66\.67\n", out)
    status, out, err = command("gqa")
    assert (status, out) == (2, "") and err.startswith("error: ") and "--annotations" in err and err.count("\n") == 1
    both = ["--annotations", str(path), "--predictions", str(given)]
    for words, said in [(both[:2], "--predictions"), (both + ["--grades", str(path)], "mmvet"),
                        (both + ["--submission", str(path)], "--submission")]:
        with fails(said):
            submit.main(["--score", "gqa", *words])
