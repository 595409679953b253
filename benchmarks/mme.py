"""MME: yes or no, two questions a picture. The published number is perception.

Only the first four characters of an answer are read: "yes" in them is a yes, else "no" in them is a
no, so that "know" and "not sure" are noes and "there is no" is neither, which is wrong. A task's
score is its percentage of questions plus that of pictures with both right; perception is the sum
over ten tasks, cognition over four.
"""
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks import others
from benchmarks.answers import SHORT, Answer, Question, absent, expect, join, warn
from benchmarks.statistics import margin, percent
from core.common import UserError

FOLDER = "MME"
ANNOTATIONS = "MME_Benchmark_release_version"
PICTURES = "in the tasks' folders"
SOURCE = "https://github.com/BradyFU/Awesome-Multimodal-Large-Language-Models/tree/Evaluation"
TEMPLATE = "{question}\n" + SHORT
MAX_NEW_TOKENS = 128

PARTS = dict(
    perception=["existence", "count", "position", "color", "posters", "celebrity", "scene",
                "landmark", "artwork", "OCR"],
    cognition=["commonsense_reasoning", "numerical_calculation", "text_translation",
               "code_reasoning"])
SUBTASKS = PARTS["perception"] + PARTS["cognition"]
END = "Please answer yes or no."       # of every official question


def read_task(path: Path, task: str) -> dict[tuple[str, str], str]:
    """{(picture, question): "yes" or "no"}, of a <picture>.txt each of two lines
    "question<TAB>Yes" or "No"."""
    folder = path / task / "questions_answers_YN"
    folder = folder if folder.is_dir() else path / task
    files, truth = sorted(folder.glob("*.txt")), {}
    if not files:
        raise UserError(f"{folder}: no questions here; --annotations should lead to {ANNOTATIONS}")
    for file in files:
        try:
            text = file.read_text("utf-8-sig", "replace")
        except OSError as e:
            raise UserError(f"{file}: cannot read it ({e.strerror})") from None
        cells = [line.strip().split("\t") for line in text.split("\n") if line.strip()]
        good = len(cells) == 2 and all(len(c) == 2 and c[1].lower() in ("yes", "no") for c in cells)
        expect(good, file, "two lines of MME (question, tab, Yes or No)")
        truth |= {(file.stem, question): gold.lower() for question, gold in cells}
    return truth


def questions(path: Path, folder: Path) -> Iterator[Question]:
    """The request for yes or no at a question's end gives way to LLaVA's instruction."""
    for task in SUBTASKS:
        asked = read_task(path, task)
        inner = "images/" if (path / task / "questions_answers_YN").is_dir() else ""
        files = {file.stem: file for file in (path / task / inner).glob("*")
                 if file.suffix in (".jpg", ".png")}
        for picture, question in asked:
            file = files.get(picture, path / task / f"{inner}{picture}.jpg")
            text = TEMPLATE.format(question=question.removesuffix(END).rstrip())
            yield Question(f"{task}/{inner}{file.name}", text, file, part=task, unit=picture)


def score(path: Path, answers: list[Answer], limited: bool = False) -> tuple[float, dict]:
    """A folder a task. The official script pairs the lines as they come; here the two of a picture
    are paired wherever they stand."""
    truth = {(task, *key): gold for task in SUBTASKS for key, gold in read_task(path, task).items()}
    joined = join(answers, truth, lambda answer: key_of(answer, truth), strangers=False)
    absent(truth, joined, "left out, with their pictures", limited)
    broken = [answer for answer in answers if set(answer.text) & set("\t\n\r")]
    if broken:           # the official script would stop
        warn(f"{len(broken)} answers have a tab or line break, which the official files can't "
             f"hold: read as spaces (first: {broken[0].at})")
    pairs = by_picture(truth, joined)
    ours, shares = task_scores(pairs, said)
    lmms, _ = task_scores(pairs, lambda text: said(others.mme_lmms_eval(text)))
    kit, _ = task_scores(pairs, others.yes_or_no_vlmevalkit)
    totals = total(ours)
    return totals["perception"], dict(
        **totals,
        tasks={task: ours[task] for task in SUBTASKS},
        margin=margin(*(shares[task] for task in PARTS["perception"])),
        n=len(joined),
        lmms_eval=total(lmms),
        vlmevalkit=total(kit))


def key_of(answer: Answer, truth: dict) -> tuple[str, str, str]:
    """(task, picture, official question) that an answer is to."""
    task, picture = answer.id.split("/")[0], answer.id.split("/")[-1].split(".")[0]
    question = answer.asked()
    if SHORT in question:
        question = question.replace(SHORT, "").strip()
    if END not in question:               # seven questions of the release have two spaces before it
        spaced = [f"{question} {END}", f"{question}  {END}"]
        question = next((q for q in spaced if (task, picture, q) in truth), spaced[0])
    return task, picture, question


def by_picture(truth: dict, joined: dict) -> dict[str, list]:
    """{task: [the two (answer, right answer) of a picture]}."""
    pictures = defaultdict(list)
    for key in truth:
        if key in joined:
            task, picture, _ = key
            pictures[task, picture].append((joined[key].text, truth[key]))
    pairs = defaultdict(list)
    for (task, picture), pair in pictures.items():
        if len(pair) != 2:
            raise UserError(f"only one of the two questions about {task}/{picture} has an answer; "
                            "answer both")
        pairs[task].append(pair)
    for task in SUBTASKS:
        if task not in pairs:
            raise UserError(f"no answers for MME's {task}; perception and cognition are sums over "
                            "all 14 tasks")
    return pairs


def task_scores(pairs: dict[str, list], read: Callable[[str], str | None]) -> tuple[dict, dict]:
    """{task: score, 0..200} by a way of reading, and {task: [every picture's share of it]}."""
    scores, shares = {}, {}
    for task in SUBTASKS:
        right = [[read(text) == gold for text, gold in pair] for pair in pairs[task]]
        shares[task] = [sum(pair) / 2 + all(pair) for pair in right]
        scores[task] = (percent(ok for pair in right for ok in pair)
                        + percent(all(pair) for pair in right))
    return scores, shares


def total(scores: dict[str, float]) -> dict[str, float]:
    return {part: sum(scores[task] for task in tasks) for part, tasks in PARTS.items()}


def said(text: str) -> str | None:
    """Yes, no, or neither, by the official script."""
    start = text.lower()[:4]
    if "yes" in start:
        return "yes"
    return "no" if "no" in start else None
