"""Ask a model many questions and score its answers.

    python eval.py --task toy            4,000 held-out questions about the toy world, by kind
    python eval.py --task toy --grey     ... about grey pictures, too: what can be guessed blindly
    python eval.py --model DIR --task gqa,pope --data DIR       benchmarks (benchmarks/), or: all
    torchrun --nproc_per_node=8 eval.py --model DIR --task all --data DIR
    python eval.py --table out/eval/*/results.json              results beside the paper's Table 1
    python eval.py --table2 [TASK]       the paper's Table 2 of a model (benchmarks/table2.py)
    python eval.py --score pope --annotations coco --predictions answers.jsonl
                                         a benchmark's score of any model's answers, without a model

Answers are greedy. Those to the toy world's questions are right if they are the same text; beside
each kind's accuracy stands its majority rate: that of always giving the commonest answer. A
follow-up's first question is answered by the model as well.

A benchmark's answers go to --out as they come, TASK.jsonl in the end, and what stands there isn't
asked again: a run that was killed goes on when the same command is given again, on any number of
processes. Questions of like length share a batch, and the batches don't depend on who answers them,
so neither do the answers. (They would depend on the number of CPU threads, which change rounding:
say --threads where it matters.)
"""
from core.common import run  # first: from here on Ctrl-C is a line

# isort: split
import argparse
import hashlib
import io
import json
import os
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stderr
from pathlib import Path

from benchmarks import TASKS, mmmu
from benchmarks import score as scoring
from benchmarks.answers import Answer, Question, read_answers
from core import flags
from core.common import UserError, lock, read_json, split, write_json, write_text
from core.flags import whole

if __name__ == "__main__" and any(word.startswith("--score") for word in sys.argv):
    sys.exit(run(scoring.main))        # a score needs nothing of what follows, which takes seconds

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

import fast
from benchmarks import ask, table1, table2
from ccra import VLM
from clip import open_image, preprocess
from core import distributed
from core.device import pick_device, pick_dtype
from core.tokenizer import Tokenizer
from core.weights import stored_bytes, stored_files
from data import SYSTEM, Sample, item, make_batch, prompt
from toy import exam
from toy import world as toy
from toy.questions import caption


def load_model(folder: str | Path, device: torch.device | str = "auto", dtype: str = "auto",
               vision: str | Path | None = None, int8: bool = False,
               pack: bool = False) -> tuple[VLM, Tokenizer, torch.device]:
    """(model, tokenizer, device) to ask questions with, from a model's folder.

    vision: the CLIP folder for a model that has no vision tower. int8, pack: see fast.prepare.
    """
    device = pick_device(device) if isinstance(device, str) else device
    dtype = pick_dtype(dtype, device, stored_bytes(folder))
    model = VLM.from_pretrained(folder, dtype=dtype, device=device, vision=vision).eval()
    fast.prepare(model, pack=pack, int8=int8)
    return model, Tokenizer.from_pretrained(folder), device


def reply(model: VLM, tokenizer: Tokenizer, rows: list[Sample], pixels: list[Tensor],
          max_new_tokens: int, device: torch.device | str) -> list[str]:
    """Greedy answers to a batch of `prompt`s, each with its picture (3, size, size)."""
    items = [item(row, picture) for row, picture in zip(rows, pixels)]
    batch = make_batch(items, model.query, device=device)
    steps = list(model.generate(**batch, max_new_tokens=max_new_tokens,
                                eos_ids=tokenizer.eos_ids))                # T' x (B)
    texts = []
    for ids in torch.stack(steps, 1).tolist() if steps else [[]] * len(rows):
        end = next((t for t, token in enumerate(ids) if token in tokenizer.eos_ids), len(ids))
        texts.append(tokenizer.decode(ids[:end]).strip())
    return texts


# --------------------------------------------------------------------------------------------------
# The toy world

def answers(model: VLM, tokenizer: Tokenizer, asked: list[tuple], batch: int, max_new_tokens: int,
            device: torch.device | str) -> list[str]:
    """Greedy answers, in order, to [(PIL image, turns as for data.prompt)]; prompts of like length
    share a batch."""
    rows = [prompt(turns, tokenizer) for _, turns in asked]
    by_length = sorted(range(len(rows)), key=lambda i: len(rows[i].ids))
    texts = [""] * len(rows)
    for those in tqdm(split(by_length, batch), desc="answering", unit="batch", file=sys.stderr):
        pixels = [preprocess(asked[i][0], **model.image) for i in those]
        said = reply(model, tokenizer, [rows[i] for i in those], pixels, max_new_tokens, device)
        for i, text in zip(those, said):
            texts[i] = text
    return texts


def sit(model: VLM, tokenizer: Tokenizer, items: list[exam.Item], batch: int,
        device: torch.device | str, grey: bool = False) -> list[str]:
    """A model's answers to the last questions of an exam's items, those before being answered by
    itself. grey: about grey pictures."""
    blank = Image.new("RGB", (toy.SIZE, toy.SIZE), (128, 128, 128))
    images = [blank if grey else toy.draw(question.scene) for question in items]
    past = [[] for _ in items]
    longer = [i for i, question in enumerate(items) if len(question.turns) > 1]
    if longer:
        first = [(images[i], [(items[i].turns[0].question, None)]) for i in longer]
        texts = answers(model, tokenizer, first, batch, 24, device)
        for i, text in zip(longer, texts):
            past[i] = [(items[i].turns[0].question, text or " ")]
    asked = [(image, turns + [(question.turns[-1].question, None)])
             for image, turns, question in zip(images, past, items)]
    return answers(model, tokenizer, asked, batch, 24, device)


def toy_exam(args: argparse.Namespace) -> None:
    """--task toy."""
    model, tokenizer, device = load_as_told(args)
    items = exam.exam(args.seed, args.n or 4000)
    texts = sit(model, tokenizer, items, args.batch, device)
    result, grey = exam.score(items, texts), None
    if args.grey:
        grey = exam.score(items, sit(model, tokenizer, items, args.batch, device, grey=True))
    if args.json:
        for kind in result["kinds"] if grey else ():
            result["kinds"][kind]["grey"] = grey["kinds"][kind]["accuracy"]
        return print(json.dumps(result))
    exam.show_scores(result, grey)
    wrong = [(text, question) for text, question in zip(texts, items)
             if text != question.turns[-1].answer]
    for text, question in wrong[:args.wrong]:
        asked = " / ".join(turn.question for turn in question.turns)
        print(f"{question.scene.key} {question.kind}: {asked} said {text!r}, right "
              f"{question.turns[-1].answer!r} [{caption(question.scene)}]")


# --------------------------------------------------------------------------------------------------
# The benchmarks: answers

def see(image: Path | bytes | Image.Image | None, how: dict) -> Tensor:
    """A question's picture as pixels (3, size, size); zeros where there is none."""
    if image is None:
        return torch.zeros(3, how["size"], how["size"])
    if not isinstance(image, Image.Image):
        image = open_image(io.BytesIO(image) if isinstance(image, bytes) else image)
    return preprocess(image, **how)


def pixels_of(question: Question, how: dict) -> Tensor:
    try:
        return see(question.image, how)
    except UserError as e:
        raise UserError(f"question {question.id}: its picture can't be read ({e})") from None


def recorded(out: Path, task: str, asked: list[Question]) -> dict[int, str]:
    """{place of a question: the line that answers it}, of what any number of processes wrote."""
    lines = {}
    for file in sorted(out.glob(f"{task}.*jsonl")):               # TASK.0.jsonl, ..., TASK.jsonl
        content = file.read_bytes()
        whole = content[:content.rfind(b"\n") + 1]                # a kill may cut the last line
        for number, line in enumerate(whole.decode("utf-8", "replace").split("\n")[:-1], 1):
            place = place_of(line, asked)
            if place is None:
                raise UserError(f"{file}: line {number} doesn't answer these questions; choose "
                                "another --out, or remove it")
            lines[place] = line + "\n"
    return lines


def place_of(line: str, asked: list[Question]) -> int | None:
    """Which of the questions a line answers; None if it answers none."""
    try:
        row = json.loads(line)
        question = asked[row["place"]]
        same = (row["question_id"], row["prompt"]) == (question.id, question.prompt)
        return row["place"] if same else None
    except (ValueError, TypeError, LookupError):
        return None


def answer_all(model: VLM, tokenizer: Tokenizer, task: str, asked: list[Question], out: Path,
               batch: int, device: torch.device) -> list[str]:
    """All processes together answer what isn't answered yet; the first gets the lines of
    out/TASK.jsonl.

    Process r appends to TASK.r.jsonl, a line an answer. A batch of which an answer is missing is
    asked again, whole, as its other rows may change the last digits of an answer's logits.
    """
    rank, size = distributed.where()
    rows = [prompt([(q.text, None)], tokenizer, image=q.image is not None, strip=False)
            for q in asked]
    length = [len(row.ids) + model.picture_rows * (q.image is not None)
              for row, q in zip(rows, asked)]
    longest_first = sorted(range(len(asked)), key=lambda i: -length[i])    # it may not fit
    done = recorded(out, task, asked)
    distributed.wait()                                         # all have read before anybody writes
    batches = [those for those in split(longest_first, batch) if not done.keys() >= set(those)]
    mine = batches[rank::size]
    own = out / f"{task}.{rank}.jsonl"
    if own.exists():
        os.truncate(own, own.read_bytes().rfind(b"\n") + 1)
    bar = tqdm(desc=task, total=sum(map(len, mine)), unit="answer", file=sys.stderr,
               disable=rank > 0)
    with open(own, "a", encoding="utf-8") as file, ThreadPoolExecutor(4) as pool, bar:
        for those in mine:
            pixels = list(pool.map(lambda i: pixels_of(asked[i], model.image), those))
            texts = reply(model, tokenizer, [rows[i] for i in those], pixels,
                          TASKS[task].MAX_NEW_TOKENS, device)
            for i, text in zip(those, texts):
                if i not in done:
                    line = dict(question_id=asked[i].id, prompt=asked[i].prompt, text=text, place=i)
                    file.write(json.dumps(line) + "\n")
                    file.flush()
            bar.update(len(those))
    distributed.wait()
    if rank > 0:
        return []
    done = recorded(out, task, asked)
    return [done[i] for i in range(len(asked))]


# --------------------------------------------------------------------------------------------------
# The benchmarks: results

CONFIGS = "config.json", "params.json", "tokenizer.model", "tokenizer.json", "tokenizer_config.json"


def hash_of(files: list[Path]) -> str:
    sha = hashlib.sha256()
    for file in files:
        with open(file, "rb") as content:
            while block := content.read(1 << 22):
                sha.update(block)
    return "sha256:" + sha.hexdigest()


def settings(args: argparse.Namespace, dtype: torch.dtype) -> dict:
    """What the answers depend on: a folder of answers is of one of these."""
    folders = [Path(folder) for folder in (args.model, args.vision) if folder]
    beside = [folder / name for folder in folders for name in CONFIGS if (folder / name).exists()]
    weights = [file for folder in folders for file in stored_files(folder)]
    return dict(model=str(args.model), weights=hash_of(weights), config=hash_of(beside),
                dtype=str(dtype).removeprefix("torch."), quant=args.quant, batch=args.batch,
                limit=args.limit, decoding="greedy", seed=mmmu.SEED,
                template=f"{SYSTEM} USER: <image>\\n{{prompt}} ASSISTANT:")


def resume(file: Path, fresh: dict) -> dict:
    """The results.json there is, or else a fresh one. UserError if it is of other settings; the
    model's folder may move."""
    if not file.exists():
        return fresh
    before = read_json(file, dict, "results.json of an evaluation")
    for key in fresh:
        if key not in ("model", "tasks", "seconds") and before.get(key) != fresh[key]:
            raise UserError(f"{file} is of an evaluation with {key} {before.get(key)}, not "
                            f"{fresh[key]}; choose another --out")
    return before


def judge(task: str, path: Path, given: list[Answer], submission: Path | None) -> dict:
    """The score of all answers there are, with its 95% interval. submission: where to, if it is
    judged elsewhere."""
    result = scoring.score(task, path, given, limited=True)
    score, metrics = result["primary"], result["metrics"]
    if score is not None:
        interval = [score - metrics["margin"], score + metrics["margin"]]
        return dict(score=score, interval=interval, metrics=metrics)
    if submission is not None:
        to = submission.with_suffix(TASKS[task].SUBMISSION)
        print(f"{to}: {TASKS[task].submit(path, given, to)}", file=sys.stderr)
    return dict(score=None, interval=None, metrics=metrics)


def rehearse(task: str, path: Path, asked: list[Question], limit: int) -> None:
    """Score answers that say nothing: what a scorer can't read shall not show hours later."""
    blank = [Answer(str(q.id), "", q.prompt, f"{path}: question {q.id}") for q in asked]
    with tempfile.TemporaryDirectory() as folder, redirect_stderr(io.StringIO()):
        judge(task, path, blank, None if limit else Path(folder, task + "-submission"))


def finish(task: str, path: Path, lines: list[str], asked: list[Question], out: Path,
           results: dict, seconds: float) -> None:
    """Write out/TASK.jsonl, score it, and set the score into out/results.json."""
    merged = out / f"{task}.jsonl"
    write_text(merged, "".join(lines))
    for part in out.glob(f"{task}.[0-9]*.jsonl"):
        part.unlink()
    submission = None if results["limit"] else out / f"{task}-submission"
    try:
        entry = judge(task, path, read_answers(merged), submission)
    except UserError as e:       # answers that the official files can't hold: the other tasks go on
        print(f"error: {task} has no score: {e}", file=sys.stderr)
        entry = dict(score=None, interval=None, metrics={}, error=str(e))
    entry |= dict(questions=len(asked), pictures=len({q.image for q in asked} - {None}),
                  annotations=path.name, prompt=TASKS[task].TEMPLATE,
                  max_new_tokens=TASKS[task].MAX_NEW_TOKENS)
    seconds += results["seconds"].get(task, 0)                     # asked again, it was there
    for key, value in (("tasks", entry), ("seconds", round(seconds, 1))):
        values = results[key] | {task: value}
        results[key] = {name: values[name] for name in TASKS if name in values}
    write_json(out / "results.json", results)
    print(f"{task}: {table1.figure(entry)}")


def evaluate(args: argparse.Namespace, tasks: list[str]) -> None:
    """Answer and score benchmarks: out/TASK.jsonl, and out/results.json, written anew after every
    task."""
    rank, _, device = distributed.join(args.device, args.threads)
    places = {task: args.annotations or ask.annotations(task, args.data) for task in tasks}
    asked = {task: ask.questions(task, args.data, places[task], args.limit) for task in tasks}
    out = args.out or Path("out/eval") / Path(args.model).resolve().name
    out.mkdir(parents=True, exist_ok=True)
    results = {}
    if rank == 0:
        held = lock(out, "evaluation")  # noqa: F841 (for as long as this runs)
        for task in tasks:
            rehearse(task, places[task], asked[task], args.limit)
    model, tokenizer, device = load_as_told(args, device)
    if rank == 0:
        fresh = settings(args, model.projector[0].weight.dtype) | dict(tasks={}, seconds={})
        results = resume(out / "results.json", fresh)
        write_json(out / "results.json", results)    # from here on the answers are this model's
    for task in tasks:
        began = time.monotonic()
        lines = answer_all(model, tokenizer, task, asked[task], out, args.batch, device)
        if rank == 0:
            seconds = time.monotonic() - began
            finish(task, places[task], lines, asked[task], out, results, seconds)
    distributed.leave()


# --------------------------------------------------------------------------------------------------
# Table 2

def show_table2(args: argparse.Namespace, task: str) -> None:
    """Print Table 2's metrics on the questions of a task; those before the last one have their
    right answers."""
    model, tokenizer, device = load_as_told(args)
    if task == "toy":
        items = exam.exam(args.seed, args.n or 500)
        turns = [[(turn.question, turn.answer) for turn in question.turns] for question in items]
        images = [toy.draw(question.scene) for question in items]
    else:
        path = args.annotations or ask.annotations(task, args.data)
        asked = ask.questions(task, args.data, path, args.limit)
        images = [q.image for q in asked if q.image is not None]
        turns = [[(q.text, None)] for q in asked if q.image is not None]
    rows = []
    for those in turns:
        last, _ = those[-1]
        rows.append(prompt(those[:-1] + [(last, None)], tokenizer, strip=task == "toy"))

    def batches():
        for those in tqdm(split(list(range(len(rows))), args.batch), desc="looking",
                          file=sys.stderr):
            items = [item(rows[i], see(images[i], model.image)) for i in those]
            batch = make_batch(items, model.query, device=device)
            yield batch["pixels"], batch["query"], batch["query_mask"]

    result = table2.measure(model, batches())
    if args.json:
        return print(json.dumps(result))
    table2.show(result, len(rows), model)


# --------------------------------------------------------------------------------------------------
# The program

def load_as_told(args: argparse.Namespace,
                 device: torch.device | None = None) -> tuple[VLM, Tokenizer, torch.device]:
    return load_model(args.model, device or args.device, args.dtype, args.vision,
                      int8=args.quant == "int8")


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    p = flags.Parser(description=__doc__)
    what = p.add_mutually_exclusive_group(required=True)
    what.add_argument("--task", help=f"toy; or one or several of {','.join(TASKS)}; or all, which "
                      "are these")
    what.add_argument("--score", choices=TASKS, metavar="TASK",
                      help="score answers: " + ", ".join(TASKS))
    what.add_argument("--table", nargs="+", type=Path, metavar="results.json",
                      help="show them beside Table 1")
    what.add_argument("--table2", nargs="?", const="toy", metavar="TASK",
                      help="Table 2's metrics on the questions of a task (default: 500 of the toy "
                      "world)")
    p.add_argument("--batch", type=flags.batch,
                   help="questions answered at a time (default: 16; toy: 100)")
    p.add_argument("--threads", type=flags.threads, default=0,
                   help="CPU threads of a process (default: torch's choice)")
    p.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    model_options(p.add_argument_group("the model"))
    benchmark_options(p.add_argument_group("benchmarks"))
    toy_options(p.add_argument_group("the toy world"))
    scoring.options(p)
    args = p.parse_args(argv)
    args.batch = args.batch or (100 if args.task == "toy" else 16)
    return args


def model_options(g) -> None:
    g.add_argument("--model", default=toy.MODEL, help="a model folder (default: the toy world's)")
    g.add_argument("--vision",
                   help="the CLIP folder for a model that has no vision tower (liuhaotian's LLaVA)")
    g.add_argument("--dtype", default="auto",
                   help="float32, bfloat16, float16; auto: as in sample.py")
    g.add_argument("--device", default="auto")
    g.add_argument("--quant", choices=["int8"], help="keep the language model in 8 bits (CPU)")


def benchmark_options(g) -> None:
    g.add_argument("--data", type=Path, default=Path("data/eval"), metavar="DIR", help="the folder "
                   "that holds them, as LLaVA's playground/data/eval (default: %(default)s)")
    g.add_argument("--limit", type=whole(0, flags.MANY), default=0, metavar="N", help="ask only "
                   "the first N questions of each part: of POPE's categories, MME's tasks, SEED's "
                   "types, MMMU's subjects")
    g.add_argument("--out", type=Path, metavar="DIR",
                   help="for answers and results.json (default: out/eval/MODEL)")


def toy_options(g) -> None:
    g.add_argument("--seed", type=flags.seed, default=0, help="which held-out questions")
    g.add_argument("--n", type=whole(1, 1_000_000),
                   help="how many (default: 4000; of Table 2: 500)")
    g.add_argument("--grey", action="store_true", help="answer about grey pictures, too")
    g.add_argument("--wrong", type=whole(0, flags.MANY), default=0, metavar="K",
                   help="also print the first K wrong answers")


def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    if args.score:
        return scoring.command(args)
    if args.table:
        return table1.show(args.table)
    name = args.table2 if args.task is None else args.task
    tasks = list(TASKS) if name == "all" else name.split(",")
    if not set(tasks) <= {*TASKS, "toy"} or ("toy" in tasks or args.table2) and len(tasks) > 1:
        raise UserError(f"no such task: {name!r} (choose toy alone, "
                        f"{'' if args.table2 else 'all, or some '}of {', '.join(TASKS)})")
    if args.annotations and (len(tasks) > 1 or name == "toy"):
        raise UserError("--annotations is the official file of one benchmark: ask one at a time")
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.table2:
        return show_table2(args, name)
    return toy_exam(args) if name == "toy" else evaluate(args, tasks)


if __name__ == "__main__":
    run(main, "answers to benchmarks are kept in --out, and the same command goes on from there")
