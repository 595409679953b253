"""TextVQA, val v0.5.1: short answers that are read in the picture.

Both sides are normalised by `evalai`; the score is `vqa_accuracy`, averaged over the answers given.
The prompt has a line of the picture's OCR tokens. Without that line, as in other harnesses,
LLaVA-1.5-7B is reported at 46 instead of 58.2.
"""
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from benchmarks import others
from benchmarks.answers import (
    SHORT,
    Answer,
    Question,
    absent,
    are_texts,
    expect,
    expect_rows,
    join,
    picture,
    read_official,
)
from benchmarks.normalise import evalai, vqa_accuracy
from benchmarks.statistics import margin, percent
from core.common import UserError

FOLDER = "textvqa"
ANNOTATIONS = "TextVQA_0.5.1_val.json"
OCR = "TextVQA_Rosetta_OCR_v0.2_val.json"                # beside the annotations
PICTURES = "train_images/<image_id>.jpg"
SOURCE = f"https://textvqa.org/dataset (with {OCR}; train_val_images.zip)"
TEMPLATE = "{question}\nReference OCR token: {tokens}\n" + SHORT
MAX_NEW_TOKENS = 128

WHAT = f"TextVQA's annotations ({ANNOTATIONS})"


def read(path: Path, what: str) -> list:
    """The rows of one of TextVQA's files, {"data": [...]}."""
    data = read_official(path, dict, what).get("data")
    expect(isinstance(data, list) and data, path, what)
    return data


def questions(path: Path, folder: Path) -> Iterator[Question]:
    """The ids are those of pictures, which have several questions."""
    data = read(path, WHAT)
    expect_rows(data, path, WHAT, question=str, image_id=str)
    ocr, what = path.with_name(OCR), f"TextVQA's OCR tokens ({OCR})"
    seen = read(ocr, what)
    expect_rows(seen, ocr, what, image_id=str, ocr_tokens=list)
    tokens = {row["image_id"]: row["ocr_tokens"] for row in seen}
    expect(all(map(are_texts, tokens.values())), ocr, what)
    for row in data:
        id = row["image_id"]
        expect(id in tokens, ocr, f"the OCR tokens of {path.name}: it lacks picture {id}")
        text = TEMPLATE.format(question=row["question"].capitalize(), tokens=", ".join(tokens[id]))
        yield Question(id, text, picture(folder / "train_images", f"{id}.jpg", path))


def score(path: Path, answers: list[Answer], limited: bool = False) -> tuple[float, dict]:
    """{"data": [{"image_id", "question", "answers" of ten humans, ...}]}. The prompt tells which
    of a picture's questions is answered."""
    data = read(path, WHAT)
    expect_rows(data, path, WHAT, image_id=(str, int), question=str, answers=list)
    for row in data:
        good = len(row["answers"]) == 10 and are_texts(row["answers"])
        expect(good, path, "a split with ten human answers a question")
    keys = [(str(row["image_id"]), row["question"].lower()) for row in data]
    humans = {key: row["answers"] for key, row in zip(keys, data)}
    known = Counter(keys)
    joined = join(answers, known, lambda answer: (answer.id, asked_question(answer)),
                  strangers=False)
    absent(known, joined, "left out of the mean", limited)
    ours, kit = [], []
    for key, answer in joined.items():
        ours.append(vqa_accuracy(evalai(answer.text), [evalai(human) for human in humans[key]]))
        kit.append(others.textvqa_vlmevalkit(answer.text, humans[key]))
    return percent(ours), dict(accuracy=percent(ours), margin=margin(ours), vlmevalkit=percent(kit),
                               n=len(joined))


def asked_question(answer: Answer) -> str:
    """The question in LLaVA's prompts: three lines with the OCR tokens, two without, or the older
    single line."""
    prompt = answer.asked()
    lines = prompt.split("\n")
    if prompt.startswith("OCR tokens: "):
        if found := re.search(r"Question: (.*?) Short answer:", prompt, re.DOTALL):
            return found[1].lower()
    elif "Reference OCR token: " in prompt and len(lines) == 3:
        return lines[prompt.startswith("Reference OCR token:")].lower()
    elif len(lines) == 2:
        return lines[0].lower()
    raise UserError(f"{answer.at}: can't find the question in the prompt (question, OCR line if "
                    "any, instruction)")
