"""SEED-Bench, version 1: multiple choice about pictures and videos.

The answer has to be the letter, and nothing else: "B." is wrong. Image questions are the published
number; videos are shown by their middle frames.
"""
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from benchmarks import others
from benchmarks.answers import (
    LETTER,
    Answer,
    Question,
    absent,
    expect,
    expect_rows,
    join,
    lettered,
    picture,
    read_official,
)
from benchmarks.statistics import by, margin, percent

FOLDER = "seed_bench"
ANNOTATIONS = "SEED-Bench.json"
PICTURES = "SEED-Bench-image/<data_id>"
SOURCE = ("https://huggingface.co/datasets/AILab-CVC/SEED-Bench (videos, if wanted: their middle "
          "frames, SEED-Bench-video-image/<type>_<question_id>.png)")
TEMPLATE = "{question}\n{options}\n" + LETTER
MAX_NEW_TOKENS = 128

WHAT = f"SEED-Bench's annotations ({ANNOTATIONS}, version 1)"
CHOICES = ("choice_a", "choice_b", "choice_c", "choice_d")


def questions(path: Path, folder: Path) -> Iterator[Question]:
    """Videos are asked if there is a folder of their frames; the published number is without."""
    rows = read_official(path, dict, WHAT).get("questions")
    expect(isinstance(rows, list), path, WHAT)
    expect_rows(rows, path, WHAT, question=str, question_id=(str, int), data_type=str,
                question_type_id=int, data_id=str, **dict.fromkeys(CHOICES, (str, int, float)))
    frames = folder / "SEED-Bench-video-image"
    for row in rows:
        id, kind = row["question_id"], row["question_type_id"]
        if row["data_type"] == "image":
            image = picture(folder / "SEED-Bench-image", row["data_id"], path)
        elif frames.is_dir():
            image = picture(frames, f"{kind}_{id}.png", path)
        else:
            continue
        options = lettered([row[choice] for choice in CHOICES])
        text = TEMPLATE.format(question=row["question"], options=options)
        yield Question(id, text, image, part=str(kind))


def score(path: Path, answers: list[Answer], limited: bool = False) -> tuple[float, dict]:
    """{"questions": [{"question_id", "answer", "data_type", ...}], "question_type": {name: id}}.

    One id stands twice in the file; its last answer counts for both.
    """
    rows, names = read_scored(path)
    ids = [str(row["question_id"]) for row in rows]
    joined = join(answers, Counter(ids))
    kept = set(absent(ids, joined, "wrong", limited))
    rows = [row for id, row in zip(ids, rows) if id in kept]
    right, lmms, kit = [], [], []
    for row in rows:
        id, gold = str(row["question_id"]), row["answer"]
        text = joined[id].text if id in joined else None
        choices = {x: str(row.get(choice)) for x, choice in zip("ABCD", CHOICES)}
        right.append(text == gold)
        lmms.append(text is not None and others.seed_lmms_eval(text, gold))
        kit.append(text is not None and others.can_infer(text, choices) == gold)
    kinds = [row["data_type"] for row in rows]
    expect("image" in kinds, path, "SEED-Bench with its image questions")
    parts = by(kinds, right)
    return parts["image"], dict(
        **parts,
        all=percent(right),
        margin=margin([ok for ok, kind in zip(right, kinds) if kind == "image"]),
        n_image=kinds.count("image"),
        n=len(rows),
        lmms_eval=by(kinds, lmms)["image"],
        vlmevalkit=by(kinds, kit)["image"],
        types=by([names[row["question_type_id"]] for row in rows], right))


def read_scored(path: Path) -> tuple[list[dict], dict[int, str]]:
    """The questions, and {type's number: its name}, which differ between copies of the file."""
    content = read_official(path, dict, WHAT)
    rows, types = content.get("questions"), content.get("question_type")
    expect(isinstance(rows, list) and rows and isinstance(types, dict), path, WHAT)
    expect(all(isinstance(number, int) for number in types.values()), path, WHAT)
    expect_rows(rows, path, WHAT, question_id=(str, int), answer=str, data_type=str,
                question_type_id=int)
    names = {number: name for name, number in types.items()}
    expect(all(row["question_type_id"] in names for row in rows), path,
           f"{WHAT}: a question of unknown type")
    return rows, names
