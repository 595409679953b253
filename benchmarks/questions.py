"""What the ten benchmarks ask: their official files in, questions in the words of LLaVA-1.5's
prompts out.

A benchmark lies where LLaVA's evaluation has it (`PLACES`; playground/data/eval there, --data
here), as its authors publish it. The prompts are built from the official files by the rules behind
LLaVA's own question files: a question, sometimes more, and an instruction (`TEMPLATES`). Words move
scores as rules do: without its line of OCR tokens LLaVA loses 12 points of TextVQA.

Everything is read and every picture looked for before a model is loaded; what is missing is said
with its source.
"""
import base64
import binascii
import io
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from benchmarks.answers import (
    are_texts,
    expect,
    expect_rows,
    listed_in,
    mmbench_rows,
    mme_task,
    read_json,
    read_lines,
    read_parquet,
)
from benchmarks.scores import MME_END, MME_TASKS, POPE_FIRST_ID, mmmu_subject, mmvet_questions
from core.common import UserError

SHORT = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."
TEMPLATES = dict(  # the user's words behind the picture
    gqa="{question}\n" + SHORT,
    scienceqa="{context}{question}\n{options}\n" + LETTER,  # context: "Context: ...\n", or nothing
    textvqa="{question}\nReference OCR token: {tokens}\n" + SHORT,
    vizwiz=
    "{question}\nWhen the provided information is insufficient, respond with 'Unanswerable'.\n" +
    SHORT,
    mmbench="{hint}{question}\n{options}\n" + LETTER,  # hint: a line, or nothing
    mmvet="{question}",
    seed="{question}\n{options}\n" + LETTER,
    mmmu="{question}\n{options}\n\n" + LETTER,  # MMMU's own, for LLaVA: (A) instead of A.
    mme="{question}\n" + SHORT,
    pope="{question}\n" + SHORT)
MMMU_OPEN = "{question}\n" + SHORT

MAX_NEW_TOKENS = dict.fromkeys(TEMPLATES, 128) | dict.fromkeys(["scienceqa", "mmbench", "mmvet"],
                                                               1024)

HUB = "https://huggingface.co/datasets/"
PLACES = dict(  # folder under --data, the annotations in it, the pictures, where both come from
    gqa=("gqa/data", "testdev_balanced_questions.json", "images/<imageId>.jpg",
         "https://cs.stanford.edu/people/dorarad/gqa/download.html (questions1.2.zip, images.zip)"),
    scienceqa=("scienceqa", "", "images/test/<pid>/image.png",
               "https://github.com/lupantech/ScienceQA "
               "(data/scienceqa/problems.json, pid_splits.json, test.zip)"),
    textvqa=(
        "textvqa", "TextVQA_0.5.1_val.json", "train_images/<image_id>.jpg",
        "https://textvqa.org/dataset (with TextVQA_Rosetta_OCR_v0.2_val.json; train_val_images.zip)"
    ), vizwiz=("vizwiz", "val.json", "val/<image>",
               "https://vizwiz.org/tasks-and-datasets/vqa (Annotations.zip, val.zip, "
               "test.zip)"),
    mmbench=(
        "mmbench", "mmbench_dev_20230712.tsv", "in the table",
        "https://download.openmmlab.com/mmclassification/datasets/mmbench/mmbench_dev_20230712.tsv"
    ), mmvet=("mm-vet", "mm-vet.json", "images/<imagename>",
              "https://github.com/yuweihao/MM-Vet (mm-vet.zip)"),
    seed=("seed_bench", "SEED-Bench.json", "SEED-Bench-image/<data_id>",
          HUB + "AILab-CVC/SEED-Bench (videos, if "
          "wanted: their middle frames, SEED-Bench-video-image/<type>_<question_id>.png)"),
    mmmu=("mmmu", "", "in the rows",
          HUB + "MMMU/MMMU (the subjects' folders with validation-*.parquet)"),
    mme=("MME", "MME_Benchmark_release_version", "in the tasks' folders",
         "https://github.com/BradyFU/Awesome-Multimodal-Large-Language-Models/tree/Evaluation"),
    pope=("pope", "coco", "val2014/<image>",
          "https://github.com/RUCAIBox/POPE, commit e3e3926 (output/coco), and "
          "http://images.cocodataset.org/zips/val2014.zip"))


@dataclass
class Question:
    """id, prompt: as they stand in an answers file. text: the user's words. image: a file, its
    bytes, or None.

    part, unit: --limit takes as many units of each part; what is scored together (the two questions
    about a picture of MME, the rotations of one of MMBench) is one unit.
    """
    id: str | int
    text: str
    image: Path | bytes | None
    part: str = ""
    unit: str | int | None = None
    slot: str = ""             # what an answers file has in front of the text

    @property
    def prompt(self) -> str:
        return self.slot + self.text


def options(texts: list, style: str = "{}. {}") -> str:
    return "\n".join(
        style.format(letter, text) for letter, text in zip("ABCDEFGHIJKLMNOPQRSTUVWXYZ", texts))


# --------------------------------------------------------------------------------------------------
# One reader a benchmark: (annotations, folder under --data) -> its questions, in the annotations'
# order

def gqa(path: Path, folder: Path):
    questions = read_json(path, dict, what := "GQA's questions (testdev_balanced_questions.json)")
    expect_rows(questions.values(), path, what, question=str, imageId=str)
    for id, row in questions.items():
        yield Question(id, TEMPLATES["gqa"].format(question=row["question"]),
                       folder / "images" / f"{row['imageId']}.jpg")


def scienceqa(path: Path, folder: Path):
    """All of the test split; what has no picture is asked without one. The scorer tells by <image>
    which had one."""
    problems = read_json(path / "problems.json", dict, what := "ScienceQA's problems.json")
    test = read_json(path / "pid_splits.json", dict, "ScienceQA's pid_splits.json").get("test")
    expect(isinstance(test, list) and are_texts(test) and all(pid in problems for pid in test),
           path / "pid_splits.json", "the splits of this problems.json")
    expect_rows((problems[pid] for pid in test), path / "problems.json", what, question=str,
                choices=list, hint=str, image=(str, type(None)))
    for pid in test:
        row = problems[pid]
        context = f"Context: {row['hint']}\n" if row["hint"] else ""
        image = folder / "images" / "test" / pid / row["image"] if row["image"] else None
        text = TEMPLATES["scienceqa"].format(context=context, question=row["question"],
                                             options=options(row["choices"]))
        yield Question(pid, text, image, slot="<image>\n" if image else "",
                       part="with" if image else "without")


def textvqa(path: Path, folder: Path):
    data = read_json(path, dict, what :=
                     "TextVQA's annotations (TextVQA_0.5.1_val.json)").get("data")
    expect(isinstance(data, list), path, what)
    expect_rows(data, path, what, question=str, image_id=str)
    ocr = path.with_name("TextVQA_Rosetta_OCR_v0.2_val.json")
    seen = read_json(ocr, dict, what :=
                     "TextVQA's OCR tokens (TextVQA_Rosetta_OCR_v0.2_val.json)").get("data")
    expect(isinstance(seen, list), ocr, what)
    expect_rows(seen, ocr, what, image_id=str, ocr_tokens=list)
    tokens = {row["image_id"]: row["ocr_tokens"] for row in seen}
    expect(all(map(are_texts, tokens.values())), ocr, what)
    for row in data:
        id = row["image_id"]
        expect(id in tokens, ocr, f"the OCR tokens of {path.name}: it lacks picture {id}")
        text = TEMPLATES["textvqa"].format(question=row["question"].capitalize(),
                                           tokens=", ".join(tokens[id]))
        yield Question(id, text, folder / "train_images" / f"{id}.jpg")


def vizwiz(path: Path, folder: Path):
    """val.json; with --annotations .../test.json the test split, whose pictures lie in test/."""
    rows = read_json(path, list, what := "VizWiz's annotations (val.json or test.json)")
    expect_rows(rows, path, what, image=str, question=str)
    for i, row in enumerate(rows):
        yield Question(i, TEMPLATES["vizwiz"].format(question=row["question"].capitalize()),
                       folder / path.stem / row["image"])


def mmbench(path: Path, folder: Path):
    """Every row is asked, so a question with each of its rotations. (Newer tables hold a picture
    once, and the row's index where it comes again.)"""
    def there(cell):
        return cell is not None and cell.lower() not in ("nan", "none")

    rows = mmbench_rows(path, pictures=True)
    pictures = {row["index"]: row.get("image") for row in rows}
    for row in rows:
        image, texts = pictures[row["index"]], [row[letter] for letter in "ABCD"]
        image = pictures.get(image, image)
        expect(
            there(image) and there(row["question"]), path,
            f"MMBench's table: row {row['index']} is incomplete")
        try:
            image = base64.b64decode(image)
        except (binascii.Error, ValueError):
            raise UserError(f"{path}: the picture of row {row['index']} is not base64") from None
        texts = texts[:next((i for i, text in enumerate(texts) if not there(text)), 4)]
        hint = row["hint"] + "\n" if there(row.get("hint")) else ""
        text = TEMPLATES["mmbench"].format(hint=hint, question=row["question"],
                                           options=options(texts))
        yield Question(int(row["index"]), text, image, unit=int(row["index"]) % 10 ** 6)


def mmvet(path: Path, folder: Path):
    questions = mmvet_questions(path)
    expect_rows(questions.values(), path, "MM-Vet's questions (mm-vet.json)", question=str,
                imagename=str)
    for id, row in questions.items():
        yield Question(int(id.removeprefix("v1_")),
                       TEMPLATES["mmvet"].format(question=row["question"]),
                       folder / "images" / row["imagename"])


def seed(path: Path, folder: Path):
    """Videos are asked, by their middle frames, if there is a folder of these; the published number
    is without them."""
    rows = read_json(path, dict, what :=
                     "SEED-Bench's annotations (SEED-Bench.json, version 1)").get("questions")
    expect(isinstance(rows, list), path, what)
    choices = {f"choice_{x}": (str, int, float) for x in "abcd"}
    expect_rows(rows, path, what, question=str, question_id=(str, int), data_type=str,
                question_type_id=int, data_id=str, **choices)
    frames = folder / "SEED-Bench-video-image"
    for row in rows:
        id, kind = row["question_id"], row["question_type_id"]
        if row["data_type"] == "image":
            image = folder / "SEED-Bench-image" / row["data_id"]
        elif frames.is_dir():
            image = frames / f"{kind}_{id}.png"
        else:
            continue
        text = TEMPLATES["seed"].format(question=row["question"],
                                        options=options([row[x] for x in choices]))
        yield Question(id, text, image, part=str(kind))


def mmmu(path: Path, folder: Path):
    """The rows from Hugging Face; of several pictures the first is shown, as by MMMU's own script
    for LLaVA."""
    columns = ["id", "question_type", "options", "question", "image_1"]
    rows = read_parquet(path, what := "MMMU's rows with their pictures (.parquet)", columns)
    expect_rows(rows, path, what, id=str, question_type=str, options=(str, list), question=str,
                image_1=dict)
    for row in rows:
        those, image = listed_in(row["options"]), row["image_1"].get("bytes")
        expect(isinstance(those, list) and image, path, f"{what}: {row['id']} is incomplete")
        template = TEMPLATES["mmmu"] if row["question_type"] == "multiple-choice" else MMMU_OPEN
        yield Question(row["id"],
                       template.format(question=row["question"], options=options(those, "({}) {}")),
                       image, part=mmmu_subject(row["id"]))


def mme(path: Path, folder: Path):
    """The request for yes or no at a question's end gives way to LLaVA's instruction."""
    for task in (task for tasks in MME_TASKS.values() for task in tasks):
        asked = mme_task(path, task)
        inner = "images/" if (path / task / "questions_answers_YN").is_dir() else ""
        files = {
            file.stem: file for file in (path / task / inner).glob("*")
            if file.suffix in (".jpg", ".png")}
        for picture, question in asked:
            file = files.get(picture, path / task / f"{inner}{picture}.jpg")
            text = TEMPLATES["mme"].format(question=question.removesuffix(MME_END).rstrip())
            yield Question(f"{task}/{inner}{file.name}", text, file, part=task, unit=picture)


def pope(path: Path, folder: Path):
    for category, first in POPE_FIRST_ID.items():
        file = path / f"coco_pope_{category}.json"
        rows = [row for _, row in read_lines(file, "a file of POPE")]
        expect_rows(rows, file, "a file of POPE", question_id=int, image=str, text=str)
        for row in rows:
            yield Question(first + row["question_id"],
                           TEMPLATES["pope"].format(question=row["text"]),
                           folder / "val2014" / row["image"], part=category)


READERS = dict(gqa=gqa, scienceqa=scienceqa, textvqa=textvqa, vizwiz=vizwiz, mmbench=mmbench,
               mmvet=mmvet, seed=seed, mmmu=mmmu, mme=mme, pope=pope)


# --------------------------------------------------------------------------------------------------

def annotations(task: str, data: Path) -> Path:
    """The official file or folder, as `--score` takes it."""
    return data / PLACES[task][0] / PLACES[task][1]


def questions(task: str, data: Path, path: Path, limit: int = 0) -> list[Question]:
    """All questions, or `limit` units of each part. UserError if the annotations or a picture are
    missing or wrong.

    path: the annotations. data: the folder that holds the benchmarks, for the pictures.
    """
    folder, _, pictures, source = PLACES[task]
    folder = data / folder
    if not path.exists():
        raise UserError(
            f"{path}: not there; {task} has its annotations here, and its pictures: {folder}/{pictures}; "
            f"from {source}")
    asked = list(READERS[task](path, folder))
    if not asked:
        raise UserError(f"{path}: holds no questions of {task}")
    if limit:
        asked = first_units(asked, limit)
    gone = [q.image for q in asked if isinstance(q.image, Path) and not q.image.is_file()]
    for q in asked:
        if isinstance(q.image, bytes):
            try:
                Image.open(io.BytesIO(q.image)).close()  # its header
            except Exception:  # on bad bytes Pillow raises all sorts of things
                raise UserError(f"{path}: the picture of {q.id} can't be read") from None
    if gone:
        raise UserError(
            f"{gone[0]}: this picture of {task} is missing, with {len(gone) - 1} others of "
            f"{sum(q.image is not None for q in asked)}; from {source}")
    return asked


def first_units(asked: list[Question], limit: int) -> list[Question]:
    keys = [(q.part, i if q.unit is None else q.unit) for i, q in enumerate(asked)]
    kept, taken = set(), Counter()
    for part, unit in keys:
        if (part, unit) not in kept and taken[part] < limit:
            taken[part] += 1
            kept.add((part, unit))
    return [q for q, key in zip(asked, keys) if key in kept]
