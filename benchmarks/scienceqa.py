"""ScienceQA, test: multiple choice, with a picture or without.

A letter counts if it is all of the answer, or begins it as in "B. a dog", or if "The answer is B"
with something behind it occurs once. "B.", "(B)", "b" and "Answer: B" are wrong, and nothing is
guessed instead. IMG, the published number, is of the questions with a picture.
"""
import re
from collections.abc import Iterator
from pathlib import Path

from benchmarks import others
from benchmarks.answers import (
    LETTER,
    Answer,
    Question,
    absent,
    are_texts,
    expect,
    expect_rows,
    join,
    lettered,
    picture,
    read_official,
    warn,
)
from benchmarks.statistics import margin, percent
from core.common import UserError

FOLDER = "scienceqa"
ANNOTATIONS = ""                                         # the folder itself
PICTURES = "images/test/<pid>/image.png"
SOURCE = ("https://github.com/lupantech/ScienceQA "
          "(data/scienceqa/problems.json, pid_splits.json, test.zip)")
TEMPLATE = "{context}{question}\n{options}\n" + LETTER   # context: "Context: ...\n", or nothing
MAX_NEW_TOKENS = 1024


def read(path: Path) -> tuple[dict[str, dict], list[str]]:
    """problems.json ({pid: {...}}) and the test split's pids, of pid_splits.json."""
    problems = read_official(path / "problems.json", dict, "ScienceQA's problems.json")
    splits = path / "pid_splits.json"
    test = read_official(splits, dict, "ScienceQA's pid_splits.json").get("test")
    good = isinstance(test, list) and test and are_texts(test)
    expect(good and all(pid in problems for pid in test), splits,
           "the splits of this problems.json")
    return problems, test


def questions(path: Path, folder: Path) -> Iterator[Question]:
    """All of the test split; what has no picture is asked without one. The scorer tells by <image>
    which had one."""
    problems, test = read(path)
    expect_rows((problems[pid] for pid in test), path / "problems.json",
                "ScienceQA's problems.json", question=str, choices=list, hint=str,
                image=(str, type(None)))
    for pid in test:
        row = problems[pid]
        context = f"Context: {row['hint']}\n" if row["hint"] else ""
        text = TEMPLATE.format(context=context, question=row["question"],
                               options=lettered(row["choices"]))
        if row.get("image"):
            own = picture(folder / "images" / "test", pid, path / "problems.json")
            image = picture(own, row["image"], path / "problems.json")
            yield Question(pid, text, image, slot="<image>\n", part="with")
        else:
            yield Question(pid, text, None, part="without")


def score(path: Path, answers: list[Answer], limited: bool = False) -> tuple[float, dict]:
    """A folder with problems.json ({pid: {"choices", "answer": index, ...}}) and pid_splits.json
    ({"test": [pids]})."""
    problems, test = read_scored(path)
    joined = join(answers, test)
    test = absent(test, joined, "wrong, and not counted as IMG", limited)
    img = with_picture(path, problems, test, joined)
    right, lmms, kit = [], [], []
    for pid in test:
        text = joined[pid].text if pid in joined else "FAILED"
        letter = "ABCDE"[problems[pid]["answer"]]
        choices = dict(zip("ABCDE", problems[pid]["choices"]))
        right.append(said_letter(text) == letter)
        lmms.append(others.scienceqa_lmms_eval(text, letter))
        kit.append(pid in joined and others.can_infer(text, choices) == letter)

    def of_img(those: list[bool]) -> list[bool]:
        return [ok for ok, seen in zip(those, img) if seen]

    return percent(of_img(right)), dict(
        img=percent(of_img(right)),
        all=percent(right),
        margin=margin(of_img(right)),
        n_img=sum(img),
        n=len(test),
        lmms_eval=percent(of_img(lmms)),
        vlmevalkit=percent(of_img(kit)))


def read_scored(path: Path) -> tuple[dict[str, dict], list[str]]:
    """`read`, with right answers that the rules can tell."""
    problems, test = read(path)
    rows, file = [problems[pid] for pid in test], path / "problems.json"
    expect_rows(rows, file, "ScienceQA", choices=list, answer=int)
    for row in rows:
        good = are_texts(row["choices"]) and row["answer"] in range(min(len(row["choices"]), 5))
        expect(good, file, "ScienceQA: an answer that is none of the choices, or beyond E")
    return problems, test


def with_picture(path: Path, problems: dict, test: list[str],
                 joined: dict[str, Answer]) -> list[bool]:
    """Which of these questions count as IMG: those whose prompt holds <image>. Where no prompts
    were written down, those that have a picture in LLaVA's llava_test_CQM-A.json."""
    if any(answer.prompt is None for answer in joined.values()):
        asked = read_official(path / "llava_test_CQM-A.json", list,
                              "LLaVA's question file (or write down the prompts)")
        pictured = {str(row.get("id")) for row in asked if isinstance(row, dict) and "image" in row}
    img, disagree = [], 0
    for pid in test:
        if pid not in joined:
            img.append(False)
            continue
        prompt = joined[pid].prompt
        img.append(pid in pictured if prompt is None else "<image>" in prompt)
        if "image" in problems[pid]:
            disagree += (problems[pid]["image"] is not None) != img[-1]
    if not any(img):
        raise UserError(f"none of the {len(joined)} answers is to a question with a picture: no "
                        "prompt holds <image>")
    if disagree:
        warn(f"{disagree} prompts and problems.json disagree about whether there is a picture: IMG "
             "goes by the prompts")
    return img


def said_letter(text: str) -> str | None:
    """The letter that LLaVA's script reads from an answer."""
    if text in tuple("ABCDE"):
        return text
    if text[:1] in tuple("ABCDE") and text[1:3] == ". ":
        return text[0]
    said = re.findall(r"The answer is ([A-Z]).", text)
    return said[0] if len(said) == 1 else None
