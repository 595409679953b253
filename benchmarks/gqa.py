"""GQA, testdev_balanced: short answers about scenes.

Periods at the end of an answer go and the text is lowered: that is all. "a dog", "dogs", "dog!" are
wrong where "dog" is right.
"""
from collections.abc import Iterator
from pathlib import Path

from benchmarks import others
from benchmarks.answers import (
    SHORT,
    Answer,
    Question,
    absent,
    expect,
    expect_rows,
    join,
    picture,
    read_official,
)
from benchmarks.statistics import by, margin, percent

FOLDER = "gqa/data"                                      # under --data, as all these
ANNOTATIONS = "testdev_balanced_questions.json"          # in the folder
PICTURES = "images/<imageId>.jpg"
SOURCE = ("https://cs.stanford.edu/people/dorarad/gqa/download.html "
          "(questions1.2.zip, images.zip)")
TEMPLATE = "{question}\n" + SHORT                        # the user's words behind the picture
MAX_NEW_TOKENS = 128

WHAT = f"GQA's questions ({ANNOTATIONS})"


def questions(path: Path, folder: Path) -> Iterator[Question]:
    """{id: {"question", "imageId", ...}}."""
    rows = read_official(path, dict, WHAT)
    expect_rows(rows.values(), path, WHAT, question=str, imageId=str)
    for id, row in rows.items():
        text = TEMPLATE.format(question=row["question"])
        yield Question(id, text, picture(folder / "images", f"{row['imageId']}.jpg", path))


def score(path: Path, answers: list[Answer], limited: bool = False) -> tuple[float, dict]:
    """{id: {"answer", "isBalanced", "types": {"structural", "semantic"}, ...}}.

    The mean over balanced questions; open are those whose structure is a query, all others are
    binary.
    """
    rows = read_official(path, dict, WHAT)
    expect_rows(rows.values(), path, WHAT, question=str, answer=str, isBalanced=bool, types=dict)
    expect_rows((row["types"] for row in rows.values()), path, WHAT, structural=str, semantic=str)
    balanced = [id for id, row in rows.items() if row["isBalanced"]]
    expect(balanced, path, "a GQA split with balanced questions")
    joined = join(answers, rows)
    balanced = absent(balanced, joined, None, limited)
    expect(balanced, path,
           "a GQA split with balanced questions among those answered (--limit more?)")
    pairs = [(joined[id].text, rows[id]["answer"]) for id in balanced]
    right = [text.rstrip(".").lower() == gold for text, gold in pairs]
    structural = [rows[id]["types"]["structural"] for id in balanced]
    semantic = [rows[id]["types"]["semantic"] for id in balanced]
    shape = ["open" if kind == "query" else "binary" for kind in structural]
    return percent(right), dict(
        accuracy=percent(right),
        **dict(binary=0.0, open=0.0) | by(shape, right),
        margin=margin(right),
        n=len(right),
        structural=by(structural, right),
        semantic=by(semantic, right),
        lmms_eval=percent(others.gqa_lmms_eval(*pair) for pair in pairs),
        vlmevalkit=percent(others.gqa_vlmevalkit(*pair) for pair in pairs))
