"""The nine benchmarks that a rule scores, each as small annotations with answers, and their scores,
worked out by hand from the rules.

Every case is built so that plausible misreadings of the rule
(tests/benchmarks/test_misreadings.py) give another number than the right one.
"""
from benchmarks import mme
from benchmarks.answers import read_answers
from benchmarks.score import score
from tests.benchmarks.helpers import line, write_json, write_lines

# --------------------------------------------------------------------------------------------------
# make_TASK(folder) -> annotations, lines of the answers file

X = ["x"] * 10
TEXTVQA = [  # picture, question, ten humans, the answer                     the humans that agree
    ("a", "What is it?", ["don't"] * 10, "Dont"),                     # a contraction: 10, so 1
    ("a", "Which ANIMAL?", ["the dog"] * 3 + X[3:], "dog"),           # an article: 3, so 0.9
    ("b", "How many?", ["2"] + X[1:], "Two."),                        # a number word: 1, so 0.3
    ("c", "How much?", ["3.5"] * 10, "3.5."),                         # the last period goes: 1
    ("d", "Colour?", ["blue-green"] * 2 + X[2:], "blue green"),       # a mark, a space: 2, so 0.6
    ("e", "Brand?", ["levi's"] * 3 + X[3:], "levis"),                 # "levi 's" isn't "levis": 0
    ("f", "Price?", ["1000"] * 10, "1,000"),                          # 1
    ("g", "Where?", ["joe's"] * 10, "joe 's"),                        # both become "joe 's": 1
]


def make_textvqa(folder):
    data = [dict(image_id=i, question=q, answers=humans, image_width=1)
            for i, q, humans, _ in TEXTVQA]
    ocr = ("{}\nReference OCR token: a, b\n"
           "Answer the question using a single word or phrase.")
    plain = "{}\nAnswer the question using a single word or phrase."
    older = ["Reference OCR token: \n{}\nShort.", "OCR tokens: a. Question: {} Short answer:"]
    prompts = [ocr, ocr, plain, *older, ocr, ocr, ocr]
    lines = [line(i, text, prompt.format(q.capitalize()))
             for (i, q, _, text), prompt in zip(TEXTVQA, prompts)]
    return write_json(folder / "TextVQA.json", dict(dataset_version="0.5.1", data=data)), lines


UNSURE = ["unanswerable"] * 3 + list("bcdefgh")
VIZWIZ = [  # humans, type, the answer                                          official  lmms-eval
    (["joe's"] * 10, "other", "Joe's"),             # uploaded as "joe 's"       0         1
    (["two"] * 10, "number", "two"),                # uploaded as "2"            0         1
    (["don't"] * 2 + ["no"] * 8, "other", "dont"),  # uploaded as "don't"        0.6       0.6
    (UNSURE, "unanswerable", "Unanswerable."),                                 # 0.9       0.9
    (["The Cat"] * 10, "other", "the cat"),         # humans aren't lowered      0         1
    (["1000"] * 10, "number", "1,000"),                                        # 1         1
]


def make_vizwiz(folder):
    data = [dict(image=f"VizWiz_val_{i:08}.jpg", question="What?", answer_type=kind, answerable=1,
                 answers=[dict(answer=human, answer_confidence="yes") for human in humans])
            for i, (humans, kind, _) in enumerate(VIZWIZ)]
    lines = [line(i, text) for i, (_, _, text) in enumerate(VIZWIZ)]
    return write_json(folder / "val.json", data), lines


GQA = [  # right answer, structure, balanced, the answer                 ours  lmms-eval  VLMEvalKit
    ("yes", "verify", True, "Yes."),                                   # 1     1          0
    ("dog", "query", True, "dog.."),      # all periods at the end       1     1          0
    ("dog", "query", True, "a dog"),      # articles stay                0     0          0
    ("t-shirt", "query", True, "tshirt"),                              # 0     1          0
    ("no", "logical", True, "no "),       # spaces stay                  0     0          1
    ("blue", "query", True, "Blue"),                                   # 1     1          1
    ("cat", "choose", True, "cat"),       # no query, so binary          1     1          1
    ("x", "query", False, "x"),           # not balanced: not counted
]


def make_gqa(folder):
    questions = {f"n{i}": dict(question="?", answer=gold, isBalanced=balanced, imageId="1",
                               types=dict(structural=kind, semantic="obj", detailed="d"))
                 for i, (gold, kind, balanced, _) in enumerate(GQA)}
    lines = [line(f"n{i}", text) for i, (*_, text) in enumerate(GQA)]
    return write_json(folder / "testdev_balanced_questions.json", questions), lines


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
    problems = {
        str(i): dict(choices=list("wxyzv"[:n]), answer=gold, image="image.png" if seen else None)
        for i, (_, gold, n, seen) in enumerate(SQA, 5)}
    of_training = {"1": dict(choices=["w", "x"], answer=0, image=None)}
    write_json(folder / "problems.json", problems | of_training)
    write_json(folder / "pid_splits.json", dict(train=["1"], test=list(problems)))
    write_json(folder / "llava_test_CQM-A.json", [
        dict(id=pid, conversations=[]) | (dict(image=f"{pid}/image.png") if row["image"] else {})
        for pid, row in problems.items()])
    lines = [line(str(i), text, ("<image>\n" * seen + "w or x?") if prompts else None)
             for i, (text, _, _, seen) in enumerate(SQA, 5) if text is not None]
    return folder, lines


REST = "Now the answer is **A** of these two I think"
MMBENCH = [  # index, A, B, C, D, right, the answer                                ours  bare letter
    (1, "dog", "cat", "cow", "", "B", "B"),                                      # 1     1
    (1000001, "cow", "dog", "cat", "", "C", "(C) cat"),                          # 1     0
    (2000001, "cat", "cow", "dog", "", "A", "A."),                               # 1     0
    (2, "red", "blue", "", "", "A", "A"),                                        # 1     1
    (1000002, "blue", "red", "", "", "B", "A"),             # so 2 is wrong        0     0
    (3, "cat asleep", "dog is on the left", "", "", "B",    # its A is an article
     "A dog is on the left side"),                                               # 1     0
    (1000003, "dog is on the left", "cat asleep", "", "", "A", REST),            # 1     0
    (4, "None", "dog", "", "", "B", "A"),                                        # 0     0
    (5, "red", "blue", "pink", "", "C", "C"),         # a row less than options    1     1
    (1000005, "pink", "red", "blue", "", "A", "Answer: A"),                      # 1     0
]


def make_mmbench(folder):
    names = ["index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image",
             "source", "l2-category", "comment", "split"]
    table = ["\t".join(names)]
    for i, *options, gold, _ in MMBENCH:
        cells = [str(i), '"What ""is""\nit?"', "", *options, gold, "odd" if i % 2 else "even",
                 "i" * 200_000, "s", "all", "c", "dev"]
        table.append("\t".join(cells))
    path = folder / "mmbench_dev_20230712.tsv"
    path.write_text("\n".join(table) + "\n", encoding="utf-8")
    return path, [line(row[0], row[-1]) for row in MMBENCH]


SEED = [  # id, kind, right, the answer                                        ours  lmms-eval
    ("101", "image", "A", "A"),                                              # 1     1
    ("102", "image", "B", "B."),                                             # 0     1
    ("103", "image", "B", "b"),                                              # 0     1
    ("104", "image", "B", "Because"),                                        # 0     1
    ("105", "image", "C", "C"),        # answered twice, this one first        0     0
    ("105", "image", "D", "D"),        # and the last one counts for both      1     1
    ("106", "image", "D", None),       # no answer                             0     0
    ("v1", "video", "C", "C"),                                               # 1
]


def make_seed(folder):
    choices = dict(choice_a="dog", choice_b="cat", choice_c="cow", choice_d="pig")
    questions = [
        dict(question_id=id, data_type=kind, answer=gold,
             question_type_id=1 if kind == "image" else 10, question="?", **choices)
        for id, kind, gold, _ in SEED]
    types = {"Scene Understanding": 1, "Action Recognition": 10}
    content = dict(questions=questions, question_type=types)
    lines = [line(int(id) if id.isdigit() else id, text)
             for id, _, _, text in SEED if text is not None]
    return write_json(folder / "SEED-Bench.json", content), lines


CHOICE = "multiple-choice"
MMMU = [  # subject, type, options, right, the answer; in the annotations' order
    # ours, and without luck
    ("Physics_1", CHOICE, ["up", "down", "left"], "C", "(A) is wrong, so (C)."),  # 1 1   the last
    ("Physics_2", CHOICE, ["up", "down"], "B", "No idea"),   # 0 0   the fourth draw, of two, is A
    ("Math_1", CHOICE, ["1", "2", "3", "4"], "A", "I can't say"),  # 1 0   the first, of four, is A
    ("Math_2", CHOICE, ["1", "2", "3", "4"], "B", "b"),      # 0 0   capitals only; the second is A
    ("Math_3", CHOICE, ["one", "two cats"], "B", "what I see there is Two Cats"),  # 1 1   quoted
    ("Math_4", CHOICE, ["1", "2"], "B", "B.'"),     # 1 0   "B." stays; the third, of two, is B
    ("Math_5", "open", [], "3.43", "so 24/7 = 3.429"),                  # 1 1   rounded
    ("Math_6", "open", [], "['24/7', '3.429']", "It is 24/7."),         # 1 1   a list
    ("Art_1", "open", [], "C", "because"),                   # 0 0   " c", "c " aren't in it
    ("Art_2", "open", [], "2000000", "The result is 2,000,000"),        # 1 1
    ("Art_3", "open", [], "cat", "the cat is a dog"),        # 0 0   only what follows "is"
]


def make_mmmu(folder):
    rows = [dict(id=f"validation_{id}", question_type=kind, options=str(options), answer=gold,
                 question="?") for id, kind, options, gold, _ in MMMU]
    lines = [line(f"validation_{id}", text) for id, *_, text in reversed(MMMU)]
    return write_lines(folder / "mmmu.jsonl", rows), lines


MME = dict(  # task: pictures, each of two (right, the answer)             percent + both right
    existence=[(("Yes", "Yes, there is"), ("No", "No.")),
               (("No", "nope"), ("Yes", "There is, yes"))],              # 75 + 50
    count=[(("No", "know"), ("No", "now it is"))],                       # 100 + 100
    position=[(("Yes", "y"), ("No", "n"))],                              # 0 + 0
    OCR=[(("Yes", " yes"), ("No", "NO"))],                               # 100 + 100
    code_reasoning=[(("Yes", ""), ("No", "not sure"))])                  # 50 + 0


def make_mme(folder):
    folder, lines = folder / "MME_Benchmark_release_version", []
    for task in mme.SUBTASKS:
        nested = task in ("artwork", "celebrity", "landmark", "posters", "scene")
        for i, pair in enumerate(MME.get(task, [(("Yes", "Yes"), ("No", "No"))])):
            at = folder / task / ("questions_answers_YN" if nested else "") / f"{i:04}.txt"
            at.parent.mkdir(parents=True, exist_ok=True)
            gap = "  " if task == "color" else " "            # as in seven questions of the release
            at.write_text("".join(f"Is it {j}?{gap}Please answer yes or no.\t{gold}\n"
                                  for j, (gold, _) in enumerate(pair)))
            for j, (_, text) in enumerate(pair):
                prompt = f"Is it {j}?\nAnswer the question using a single word or phrase."
                lines.append(line(f"{task}/{'images/' * nested}{i:04}.jpg", text, prompt))
    return folder, lines[::2] + lines[1::2]                   # a picture's two don't stand together


POPE = [  # the answer, label                       said   lmms-eval  VLMEvalKit
    ("Yes", "yes"),                               # yes    yes        yes
    ("NO", "no"),                                 # yes    no         no        false positive
    ("There is not", "no"),                       # no     other      none
    ("No, it is.", "yes"),                        # no     other      no        false negative
    ("Yes. No way", "yes"),                       # yes    other      none
    ("no\nwhat", "no"),                           # yes    other      no        false positive
    ("", "yes"),                                  # yes    other      none
    ("Sure", "yes"),                              # yes    other      none
]


def make_pope(folder):
    lines = []
    for category, first in dict(random=10_000_000, adversarial=0, popular=20_000_000).items():
        rows = POPE if category != "popular" else POPE[:1] + POPE[2:3]       # popular: all right
        write_lines(folder / f"coco_pope_{category}.json", [
            dict(question_id=i, image="x.jpg", text=f"Is there a {i}?", label=label)
            for i, (_, label) in enumerate(rows, 1)])
        lines += [line(first + i, text, f"Is there a {i}?\nAnswer.")
                  for i, (text, _) in enumerate(rows, 1)]
    return folder, lines


def make_mmvet(folder):                  # which is graded, not scored by a rule
    capabilities = [["ocr", "math"], ["rec"], ["math", "ocr"], ["ocr"]]
    rows = {f"v1_{i}": dict(question="?", answer="a<AND>b", capability=those)
            for i, those in enumerate(capabilities)}
    return write_json(folder / "mm-vet.json", rows)


MAKE = dict(textvqa=make_textvqa, vizwiz=make_vizwiz, gqa=make_gqa, scienceqa=make_scienceqa,
            mmbench=make_mmbench, seed=make_seed, mmmu=make_mmmu, mme=make_mme, pope=make_pope)


def run(task, folder, lines=None):
    """A case's score, of its own answers or of other lines."""
    path, own = MAKE[task](folder)
    return score(task, path, read_answers(write_lines(folder / "a.jsonl", lines or own)))


# --------------------------------------------------------------------------------------------------
# (the published number, some of the others)

EXPECTED = dict(
    # in VLMEvalKit "3.5." keeps its period and "joe's" is one word
    textvqa=(580 / 8, dict(accuracy=580 / 8, vlmevalkit=380 / 8)),
    vizwiz=(41.67, dict(vizwiz_lmms=550 / 6,
                        answer_type=dict(number=50.0, other=20.0, unanswerable=90.0))),
    gqa=(400 / 7, dict(binary=200 / 3, open=50.0, lmms_eval=500 / 7, vlmevalkit=300 / 7,
                       structural=dict(choose=100.0, logical=0.0, query=50.0, verify=100.0),
                       semantic=dict(obj=400 / 7))),
    # lmms-eval takes the letter or a letter and a period; VLMEvalKit takes all ten, "A, A" being
    # one letter
    scienceqa=(70.0, dict(img=70.0, all=800 / 15, n_img=10, n=15, lmms_eval=40.0,
                          vlmevalkit=100.0)),
    mmbench=(300 / 5, {
        "circular": 60.0, "plain_base": 80.0, "plain_all": 80.0,
        "category": {"even": 0.0, "odd": 100.0}, "l2-category": {"all": 60.0},
        "bare_letters": dict(circular=0.0, plain_base=60.0, plain_all=30.0)}),
    seed=(200 / 7, dict(image=200 / 7, video=100.0, all=300 / 8, lmms_eval=500 / 7, types={
        "Action Recognition": 100.0, "Scene Understanding": 200 / 7})),
    # lmms-eval takes "y" for yes; VLMEvalKit looks for whole words, anywhere
    mme=(125 + 200 + 0 + 7 * 200, dict(
        perception=1725, cognition=3 * 200 + 50,
        tasks=dict(existence=125, count=200, position=0, OCR=200),
        lmms_eval=dict(perception=125 + 200 + 200 + 7 * 200, cognition=650),
        vlmevalkit=dict(perception=125 + 0 + 0 + 7 * 200, cognition=600))),
    # adversarial, random: TP 4, FP 2, FN 1, TN 1: precision 4/6, recall 4/5, F1 8/11; popular: all
    # right
    pope=(900 / 11, dict(
        f1=900 / 11, accuracy=(5 / 8 * 2 + 1) / 3 * 100, n=18,
        popular=dict(f1=100.0, yes_ratio=50.0),
        random=dict(accuracy=62.5, precision=200 / 3, recall=80.0, f1=800 / 11, yes_ratio=75.0),
        adversarial=dict(f1=800 / 11),
        # TP 3, FP 0; lmms-eval counts no miss as a miss that isn't said "no"
        lmms_eval=dict(accuracy=500 / 18, precision=100.0, recall=100.0, f1=100.0),
        vlmevalkit=dict(accuracy=700 / 18, precision=100.0, recall=300 / 11, f1=300 / 7))),
    mmmu=(700 / 11, dict(
        overall=700 / 11, without_luck=500 / 11, n=11,
        domain={"Art and Design": 100 / 3, "Science": 75.0},
        subject=dict(Math=500 / 6, Art=100 / 3, Physics=50.0))))
