"""Tiny benchmarks in the official layouts, with pictures: make_TASK(folder) -> {id: its prompt}, of
some questions."""
import base64
import importlib.util
import io

from PIL import Image

from benchmarks import TASKS, mme
from tests.benchmarks.helpers import write_json, write_lines

PARQUET = importlib.util.find_spec("pyarrow") is not None
READABLE = [task for task in TASKS if task != "mmmu" or PARQUET]
SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."


def picture(color, to=None, kind="PNG"):
    """A plain picture of 20 x 12, into a file or as bytes."""
    image, file = Image.new("RGB", (20, 12), color), io.BytesIO()
    image.save(file, kind)
    if to is None:
        return file.getvalue()
    to.parent.mkdir(parents=True, exist_ok=True)
    to.write_bytes(file.getvalue())


def make_gqa(at):
    rows = {}
    for i, question in enumerate([" Is it red?", "Is it Blue?", "What {is} it?"]):
        types = dict(structural="verify", semantic="obj", detailed="d")
        rows[f"n{i}"] = dict(question=question, answer="yes", isBalanced=True,
                             imageId=f"p{i % 2}", types=types)
    write_json(at / "gqa/data/testdev_balanced_questions.json", rows)
    for i in range(2):
        picture("red", at / f"gqa/data/images/p{i}.jpg", "JPEG")
    return {"n0": " Is it red?" + SHORT, "n2": "What {is} it?" + SHORT}    # a blank in front stays


def make_scienceqa(at):
    rows = {
        "7": dict(question="Which?", choices=["dog", "cat"], answer=1, hint="Look.\nWell.",
                  image="image.png"),
        "9": dict(question="Why?", choices=["a", "b", "c"], answer=0, hint="", image=None)}
    of_training = {"1": dict(rows["9"], choices=["x", "y"])}
    write_json(at / "scienceqa/problems.json", rows | of_training)
    write_json(at / "scienceqa/pid_splits.json", dict(train=["1"], test=["7", "9"]))
    picture("green", at / "scienceqa/images/test/7/image.png")
    return {"7": "Context: Look.\nWell.\nWhich?\nA. dog\nB. cat" + LETTER,
            "9": "Why?\nA. a\nB. b\nC. c" + LETTER}


def make_textvqa(at):
    asked = [("u", "what is the BRAND?"), ("u", "Who?"), ("v", "where?")]
    data = [dict(image_id=id, question=question, answers=["x"] * 10) for id, question in asked]
    seen = [dict(image_id="u", ocr_tokens=["Cola", "10%"]), dict(image_id="v", ocr_tokens=[])]
    write_json(at / "textvqa/TextVQA_0.5.1_val.json", dict(dataset_version="0.5.1", data=data))
    write_json(at / "textvqa/TextVQA_Rosetta_OCR_v0.2_val.json", dict(data=seen))
    for id in "uv":
        picture("blue", at / f"textvqa/train_images/{id}.jpg", "JPEG")
    return {"u": "What is the brand?\nReference OCR token: Cola, 10%" + SHORT,
            "v": "Where?\nReference OCR token: " + SHORT}


def make_vizwiz(at):
    human = [dict(answer="cup", answer_confidence="yes")] * 10
    rows = [dict(image=f"VizWiz_val_{i:08}.jpg", question=question, answers=human,
                 answer_type="other", answerable=1)
            for i, question in enumerate(["what is  THIS? ", "Hm?"])]
    write_json(at / "vizwiz/val.json", rows)
    for row in rows:
        picture("grey", at / "vizwiz/val" / row["image"], "JPEG")
    test = [dict(image="VizWiz_test_00000000.jpg", question="Is it?")]
    write_json(at / "vizwiz/test.json", test)
    picture("grey", at / "vizwiz/test/VizWiz_test_00000000.jpg", "JPEG")
    return {0: "What is  this? \nWhen the provided information is insufficient, respond with "
               "'Unanswerable'." + SHORT}


def make_mmbench(at):
    names = ["index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image",
             "source", "l2-category", "comment", "split"]
    image = base64.b64encode(picture("white")).decode()
    rows = [
        (1, "Which one?", "nan", "dog", "None", "cow", "", "A", "c", image),   # ends at the None
        (1000001, "Which one?", "nan", "", "dog", "", "", "B", "c", image),
        (2, '"Say ""it""\ntwice"', "A hint.", "red", "blue", "", "", "A", "c", image),
        (1000002, "Again", "none", "blue", "red", "", "", "B", "c", "2")]      # row 2's picture
    table = ["\t".join(names)]
    for row in rows:
        table.append("\t".join([*map(str, row), "s", "all", "", "dev"]))
    path = at / "mmbench/mmbench_dev_20230712.tsv"
    path.parent.mkdir(parents=True)
    path.write_text("\n".join(table) + "\n")
    return {1: "Which one?\nA. dog" + LETTER,
            2: 'A hint.\nSay "it"\ntwice\nA. red\nB. blue' + LETTER,
            1000002: "Again\nA. blue\nB. red" + LETTER}


def make_mmvet(at):
    rows = {f"v1_{i}": dict(imagename=f"v1_{i}.png", question=f"What is {i}?", answer="x",
                            capability=["rec"]) for i in range(3)}
    write_json(at / "mm-vet/mm-vet.json", rows)
    for row in rows.values():
        picture("pink", at / "mm-vet/images" / row["imagename"])
    return {2: "What is 2?"}


def make_seed(at):
    choices = {f"choice_{x}": f"it is {x}" for x in "abcd"}
    asked = [("101", "image", 1), ("101", "image", 1), ("102", "image", 2), ("v3", "video", 10)]
    rows = [dict(question_id=id, data_type=kind, answer="A", question_type_id=number,
                 question=f"Q{id}?", data_id=f"x{id}", **choices) for id, kind, number in asked]
    types = {"S": 1, "T": 2, "Action": 10}
    write_json(at / "seed_bench/SEED-Bench.json", dict(questions=rows, question_type=types))
    for id in ("101", "102"):
        picture("black", at / f"seed_bench/SEED-Bench-image/x{id}")
    return {"102": "Q102?\nA. it is a\nB. it is b\nC. it is c\nD. it is d" + LETTER}


def make_mmmu(at):
    red, blue = dict(bytes=picture("red"), path="a.png"), dict(bytes=picture("blue"), path="b.png")
    rows = [
        dict(id="validation_Math_1", question_type="multiple-choice", options="['1', 'two']",
             answer="B", question="What is <image 1>?", image_1=red, image_2=None),
        dict(id="validation_Art_1", question_type="open", options="[]", answer="3",
             question="How many?", image_1=red, image_2=blue)]
    if PARQUET:
        import pyarrow.parquet
        for row in rows:
            subject = row["id"].split("_")[1]
            file = at / "mmmu" / subject / "validation-00000-of-00001.parquet"
            file.parent.mkdir(parents=True)
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), file)
    return {"validation_Math_1": "What is <image 1>?\n(A) 1\n(B) two\n" + LETTER,
            "validation_Art_1": "How many?" + SHORT}


def make_mme(at):
    at = at / "MME/MME_Benchmark_release_version"
    for task in mme.SUBTASKS:
        inner = task in ("artwork", "celebrity", "landmark", "posters", "scene")
        for i in range(1 + (task == "OCR")):
            gap = "  " if task == "color" else " "
            text = at / task / ("questions_answers_YN" if inner else "") / f"{i:04}.txt"
            text.parent.mkdir(parents=True, exist_ok=True)
            text.write_text(f"Is it{gap}Please answer yes or no.\tYes\n"
                            "Or not? Please answer yes or no.\tNo\n")
            file = f"{i:04}.{'png' if task == 'OCR' else 'jpg'}"
            picture("brown", at / task / ("images" if inner else "") / file)
    return {"OCR/0001.png": "Or not?" + SHORT, "artwork/images/0000.jpg": "Or not?" + SHORT,
            "color/0000.jpg": "Is it" + SHORT}


def make_pope(at):
    (at / "pope/coco").mkdir(parents=True)
    for category in ("random", "adversarial", "popular"):
        rows = [dict(question_id=i, image=f"COCO_val2014_{i}.jpg",
                     text=f"Is there a {category} {i}?", label=label)
                for i, label in enumerate(("yes", "no", "yes"), 1)]
        write_lines(at / f"pope/coco/coco_pope_{category}.json", rows)
    for i in range(1, 4):
        picture("purple", at / f"pope/val2014/COCO_val2014_{i}.jpg", "JPEG")
    return {1: "Is there a adversarial 1?" + SHORT, 10_000_002: "Is there a random 2?" + SHORT}


MAKE = dict(gqa=make_gqa, scienceqa=make_scienceqa, textvqa=make_textvqa, vizwiz=make_vizwiz,
            mmbench=make_mmbench, mmvet=make_mmvet, seed=make_seed, mmmu=make_mmmu, mme=make_mme,
            pope=make_pope)


def make_all(at):
    """All ten, as under --data: {task: {id: its prompt}}."""
    assert MAKE.keys() == TASKS.keys()
    return {task: make(at) for task, make in MAKE.items()}
