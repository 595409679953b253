"""Ask a model many questions and score its answers.

    python eval.py --task toy                    4,000 held-out questions about the embedded world, by kind
    python eval.py --task toy --grey             and the same about grey pictures: what can be guessed without looking
    python eval.py --model DIR --task gqa,pope --data DIR             benchmarks (see benchmarks.py), or: all
    torchrun --nproc_per_node=8 eval.py --model DIR --task all --data DIR
    python eval.py --table out/eval/*/results.json                    results beside the paper's Table 1
    python eval.py --table2 [TASK]                                    the paper's Table 2 of a model (see metrics.py)
    python eval.py --score pope --annotations coco --predictions answers.jsonl     a benchmark's score, without a model

Answers are greedy. Those to the embedded world's questions are right if they are the same text;
beside each kind's accuracy stands its majority rate: that of always giving the commonest answer. A
follow-up's first question is answered by the model as well.

A benchmark's answers go to --out as they come, TASK.jsonl in the end, and what stands there isn't
asked again: a run that was killed goes on when the same command is given again, on any number of
processes. Questions of like length share a batch, and the batches don't depend on who answers them,
so neither do the answers. (They would depend on the number of CPU threads, which change rounding:
say --threads where it matters.)
"""
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

import torch
from PIL import Image
from tqdm import tqdm

from benchmarks import questions as benchmarks
from benchmarks import submit
from benchmarks import table1 as tables
from benchmarks import table2 as metrics
from benchmarks.answers import Answer, read_answers, read_json
from benchmarks.scores import MMMU_SEED, SCORERS, score
from ccra import VLM
from clip import open_image, preprocess
from core import common, distributed
from core.common import UserError, run, split, write_beside
from core.device import pick_device, pick_dtype
from core.tokenizer import Tokenizer
from core.weights import stored_bytes, stored_files
from data import SYSTEM, collate, prompt, query_of
from toy import exam, questions
from toy import world as toy


def reply(model: VLM, tokenizer: Tokenizer, rows: list, pixels: list, max_new_tokens: int,
          device) -> list[str]:
    """Greedy answers to a batch of prompts (data.Sample), each with its picture (3, size, size)."""
    b = collate([
        dict(ids=row.ids, labels=row.labels, query=query_of(row.turns, model.query), pixels=picture)
        for row, picture in zip(rows, pixels)])
    b = {k: v.to(device) for k, v in b.items() if k != "labels"}
    steps = list(model.generate(**b, max_new_tokens=max_new_tokens, eos_ids=tokenizer.eos_ids))
    texts = []
    for row in torch.stack(steps, 1).tolist() if steps else [[]] * len(rows):
        end = next((t for t, token in enumerate(row) if token in tokenizer.eos_ids), len(row))
        texts.append(tokenizer.decode(row[:end]).strip())
    return texts


# --------------------------------------------------------------------------------------------------
# The embedded world


def answers(model: VLM, tokenizer: Tokenizer, asked, batch: int, max_new_tokens: int, device):
    """Greedy answers, in order, to [(PIL image, turns as for data.prompt)]; prompts of like length
    share a batch."""
    rows = [prompt(turns, tokenizer) for _, turns in asked]
    by_length = sorted(range(len(rows)), key=lambda i: len(rows[i].ids))
    texts = [""] * len(rows)
    for at in tqdm(range(0, len(rows), batch), desc="answering", unit="batch", file=sys.stderr):
        chosen = by_length[at:at + batch]
        pixels = [preprocess(asked[i][0], **model.image) for i in chosen]
        for i, text in zip(
                chosen,
                reply(model, tokenizer, [rows[i] for i in chosen], pixels, max_new_tokens, device)):
            texts[i] = text
    return texts


def sit(model, tokenizer, items, batch, device, grey=False):
    """A model's answers to the last questions of exam.exam's Items, those before being answered by
    itself."""
    image = Image.new("RGB", (toy.SIZE, toy.SIZE), (128, 128, 128))
    images, past = [image if grey else toy.draw(item.scene) for item in items], [[] for _ in items]
    longer = [i for i, item in enumerate(items) if len(item.turns) > 1]
    first = answers(model, tokenizer, [(images[i], [(items[i].turns[0].question, None)])
                                       for i in longer], batch, 24, device) if longer else []
    for i, text in zip(longer, first):
        past[i] = [(items[i].turns[0].question, text or " ")]
    asked = [(image, turns + [(item.turns[-1].question, None)])
             for image, turns, item in zip(images, past, items)]
    return answers(model, tokenizer, asked, batch, 24, device)


def toy_exam(args):
    model, tokenizer, device = load(args)
    items = exam.exam(args.seed, args.n or 4000)
    texts = sit(model, tokenizer, items, args.batch, device)
    result = exam.score(items, texts)
    grey = exam.score(items, sit(model, tokenizer, items, args.batch, device,
                                grey=True)) if args.grey else None
    if args.json:
        for kind in result["kinds"] if grey else ():
            result["kinds"][kind]["grey"] = grey["kinds"][kind]["accuracy"]
        return print(json.dumps(result))
    exam.show_scores(result, grey)
    for text, item in [
        (t, i) for t, i in zip(texts, items) if t != i.turns[-1].answer][:args.wrong]:
        asked = " / ".join(turn.question for turn in item.turns)
        print(
            f"{item.scene.key} {item.kind}: {asked} said {text!r}, right {item.turns[-1].answer!r} "
            f"[{questions.caption(item.scene)}]")


# --------------------------------------------------------------------------------------------------
# The benchmarks


def look(image: Path | bytes | Image.Image | None, how: dict):
    """A question's picture as pixels (3, size, size); zeros where there is none."""
    if image is None:
        return torch.zeros(3, how["size"], how["size"])
    if not isinstance(image, Image.Image):
        image = open_image(io.BytesIO(image) if isinstance(image, bytes) else image)
    return preprocess(image, **how)


def pixels_of(question: benchmarks.Question, how: dict):
    try:
        return look(question.image, how)
    except UserError as e:
        raise UserError(f"question {question.id}: its picture can't be read ({e})") from None


def recorded(file: Path, asked: list) -> dict[int, str]:
    """{place of a question: the line} of the answers in a file. A last line that a kill cut short
    is cut off."""
    lines = {}
    if not file.exists():
        return lines
    content = file.read_bytes()
    whole = content.rfind(b"\n") + 1
    for number, line in enumerate(content[:whole].decode("utf-8", "replace").split("\n")[:-1], 1):
        try:
            row = json.loads(line)
            place = row["place"]
            same = (row["question_id"], row["prompt"]) == (asked[place].id, asked[place].prompt)
        except (ValueError, TypeError, LookupError):
            same = False
        if not same:
            raise UserError(
                f"{file}: line {number} doesn't answer these questions; choose another --out, or remove it"
            )
        lines[place] = line + "\n"
    return lines


def answer_all(model, tokenizer, asked: list, out: Path, task: str, batch: int,
               device) -> list[str]:
    """All processes together answer what isn't answered yet; the first gets the lines of
    out/TASK.jsonl.

    Process r appends to TASK.r.jsonl, a line an answer. A batch of which an answer is missing is
    asked again, whole, as its other rows may change the last digits of an answer's logits.
    """
    rank, size = distributed.where()
    rows = [
        prompt([(q.text, None)], tokenizer, image=q.image is not None, strip=False) for q in asked]
    length = [
        len(row.ids) + model.picture_rows * (q.image is not None) for row, q in zip(rows, asked)]
    # the longest first: it may not fit
    batches = split(sorted(range(len(asked)), key=lambda i: -length[i]), batch)
    done = {}
    for file in sorted(out.glob(f"{task}.*jsonl")):     # of any number of processes, and TASK.jsonl
        done |= recorded(file, asked)
    distributed.wait()                                         # all have read before anybody writes
    mine = [those for those in batches if not done.keys() >= set(those)][rank::size]
    own = out / f"{task}.{rank}.jsonl"
    if own.exists():
        os.truncate(own, own.read_bytes().rfind(b"\n") + 1)
    with open(own, "a", encoding="utf-8") as file, ThreadPoolExecutor(4) as pool, tqdm(
            desc=task, total=sum(map(len, mine)), unit="answer", file=sys.stderr, disable=rank
            > 0) as bar:
        for those in mine:
            pixels = list(pool.map(lambda i: pixels_of(asked[i], model.image), those))
            texts = reply(model, tokenizer, [rows[i] for i in those], pixels,
                          benchmarks.MAX_NEW_TOKENS[task], device)
            for i, text in zip(those, texts):
                if i not in done:
                    line = dict(question_id=asked[i].id, prompt=asked[i].prompt, text=text, place=i)
                    file.write(json.dumps(line) + "\n")
                    file.flush()
            bar.update(len(those))
    distributed.wait()
    for file in sorted(out.glob(f"{task}.[0-9]*.jsonl")) if rank == 0 else ():
        done |= recorded(file, asked)
    return [done[i] for i in range(len(asked))] if rank == 0 else []


def judge(task: str, path: Path, given: list[Answer], submission: Path | None) -> dict:
    """The score of all answers there are, with its 95% interval. submission: where to, if it is
    judged elsewhere."""
    result = score(task, path, given, limited=True)
    if result["primary"] is None and submission is not None:
        to = submission.with_suffix(submit.SUBMISSIONS[task][1])
        print(f"{to}: {submit.SUBMISSIONS[task][0](path, given, to)}", file=sys.stderr)
    value, off = result["primary"], result["metrics"].get("margin")
    return dict(score=value, interval=None if value is None else [value - off, value + off],
                metrics=result["metrics"])


def rehearse(task: str, path: Path, asked: list, limit: int) -> None:
    """Score answers that say nothing: what a scorer can't read shall not show hours later."""
    blank = [Answer(str(q.id), "", q.prompt, f"{path}: question {q.id}") for q in asked]
    with tempfile.TemporaryDirectory() as folder, redirect_stderr(io.StringIO()):
        judge(task, path, blank, None if limit else Path(folder, task + "-submission"))


CONFIGS = "config.json", "params.json", "tokenizer.model", "tokenizer.json", "tokenizer_config.json"


def hash_of(files: list[Path]) -> str:
    sha = hashlib.sha256()
    for file in files:
        with open(file, "rb") as content:
            while block := content.read(1 << 22):
                sha.update(block)
    return "sha256:" + sha.hexdigest()


def settings(args, dtype) -> dict:
    """What the answers depend on: a folder of answers is of one of these."""
    folders = [Path(folder) for folder in (args.model, args.vision) if folder]
    beside = [folder / name for folder in folders for name in CONFIGS if (folder / name).exists()]
    return dict(model=str(args.model),
                weights=hash_of([file for folder in folders for file in stored_files(folder)]),
                config=hash_of(beside), dtype=str(dtype).removeprefix("torch."), quant=args.quant,
                batch=args.batch, limit=args.limit, decoding="greedy", seed=MMMU_SEED,
                template=f"{SYSTEM} USER: <image>\\n{{prompt}} ASSISTANT:")


def evaluate(args, tasks: list[str]) -> None:
    """Answer and score benchmarks: out/TASK.jsonl, and out/results.json, written anew after every
    task."""
    rank, _, device = distributed.join(args.device, args.threads)
    places = {task: args.annotations or benchmarks.annotations(task, args.data) for task in tasks}
    asked = {task: benchmarks.questions(task, args.data, places[task], args.limit) for task in tasks}
    out = args.out or Path("out/eval") / Path(args.model).resolve().name
    out.mkdir(parents=True, exist_ok=True)
    results, file = {}, out / "results.json"
    if rank == 0:
        held = common.lock(out, "evaluation")  # noqa: F841 (for as long as this runs)
        for task in tasks:
            rehearse(task, places[task], asked[task], args.limit)
    model, tokenizer, device = load(args, device)
    if rank == 0:
        results = settings(args, model.projector[0].weight.dtype) | dict(tasks={}, seconds={})
        before = read_json(file, dict,
                           "results.json of an evaluation") if file.exists() else results
        for key in [key for key in results
                    if key not in ("model", "tasks", "seconds")]:  # a folder may move
            if before.get(key) != results[key]:
                raise UserError(
                    f"{file} is of an evaluation with {key} {before.get(key)}, not {results[key]}; choose "
                    "another --out")
        results = before
        save(out, results)       # from here on the folder's answers are this model's
    for task in tasks:
        began = time.monotonic()
        lines = answer_all(model, tokenizer, asked[task], out, task, args.batch, device)
        if rank == 0:
            finish(task, places[task], lines, asked[task], out, results, args.limit,
                   time.monotonic() - began)
    distributed.leave()


def save(out: Path, results: dict) -> None:
    write_beside(out / "results.json",
                 lambda tmp: tmp.write_text(json.dumps(results, indent=1) + "\n"))


def finish(task, path, lines, asked, out: Path, results: dict, limit: int, seconds: float) -> None:
    """Write out/TASK.jsonl, score it, and set the score into out/results.json."""
    merged = out / f"{task}.jsonl"
    write_beside(merged, lambda tmp: tmp.write_text("".join(lines), encoding="utf-8"))
    for part in out.glob(f"{task}.[0-9]*.jsonl"):
        part.unlink()
    try:
        entry = judge(task, path, read_answers(merged),
                      None if limit else out / f"{task}-submission")
    except UserError as e:       # answers that the official files can't hold: the other tasks go on
        print(f"error: {task} has no score: {e}", file=sys.stderr)
        entry = dict(score=None, interval=None, metrics={}, error=str(e))
    entry |= dict(questions=len(asked), pictures=len({q.image for q in asked} - {None}),
                  annotations=path.name, prompt=benchmarks.TEMPLATES[task],
                  max_new_tokens=benchmarks.MAX_NEW_TOKENS[task])
    seconds += results["seconds"].get(task, 0)                           # asked again, it was there
    tasks, times = results["tasks"] | {task: entry}, results["seconds"] | {task: round(seconds, 1)}
    results["tasks"], results["seconds"] = ({t: x[t] for t in SCORERS if t in x}
                                            for x in (tasks, times))
    save(out, results)
    print(f"{task}: {tables.figure(entry)}")


# --------------------------------------------------------------------------------------------------
# Table 2


def table2(args, task: str) -> None:
    """Print metrics.py's table for the questions of a task; those before the last one have their
    right answers."""
    model, tokenizer, device = load(args)
    if task == "toy":
        items = exam.exam(args.seed, args.n or 500)
        turns = [[(turn.question, turn.answer) for turn in item.turns] for item in items]
        images = [toy.draw(item.scene) for item in items]
    else:
        path = args.annotations or benchmarks.annotations(task, args.data)
        asked = benchmarks.questions(task, args.data, path, args.limit)
        images = [q.image for q in asked if q.image is not None]
        turns = [[(q.text, None)] for q in asked if q.image is not None]
    rows = [
        prompt(those[:-1] + [(those[-1][0], None)], tokenizer, strip=task == "toy")
        for those in turns]

    def batches():
        for those in tqdm(split(list(range(len(rows))), args.batch), desc="looking",
                          file=sys.stderr):
            b = collate([
                dict(ids=rows[i].ids, labels=rows[i].labels,
                     query=query_of(rows[i].turns,
                                    model.query), pixels=look(images[i], model.image))
                for i in those])
            yield [b[name].to(device) for name in ("pixels", "query", "query_mask")]

    result = metrics.measure(model, batches())
    print(json.dumps(result)) if args.json else metrics.show(result, len(rows), model)


# --------------------------------------------------------------------------------------------------
# The program


def load(args, device=None):
    """(model, tokenizer, device), as the options say."""
    device = device or pick_device(args.device)
    dtype = pick_dtype(args.dtype, device, stored_bytes(args.model))
    model = VLM.from_pretrained(args.model, dtype=dtype, device=device, vision=args.vision).eval()
    if args.quant:
        model.llm.pack(int8=True)
    return model, Tokenizer.from_pretrained(args.model), device


def arguments(argv=None):
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    what = p.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--task", help=f"toy; or one or several of {','.join(SCORERS)}; or all, which are these")
    what.add_argument("--score", choices=SCORERS, metavar="TASK",
                      help="score answers: " + ", ".join(SCORERS))
    what.add_argument("--table", nargs="+", type=Path, metavar="results.json",
                      help="show them beside Table 1")
    what.add_argument(
        "--table2", nargs="?", const="toy", metavar="TASK",
        help="Table 2's metrics on the questions of "
        "a task (default: 500 of the embedded world)")
    p.add_argument("--model", default=toy.MODEL, help="a model folder (default: the embedded one)")
    p.add_argument("--vision",
                   help="the CLIP folder for a model that has no vision tower (liuhaotian's LLaVA)")
    p.add_argument("--batch", type=int, help="questions answered at a time (default: 16; toy: 100)")
    p.add_argument("--dtype", default="auto",
                   help="float32, bfloat16, float16; auto: as in sample.py")
    p.add_argument("--device", default="auto")
    p.add_argument("--threads", type=int, default=0,
                   help="CPU threads of a process (default: torch's choice)")
    p.add_argument("--quant", choices=["int8"], help="keep the language model in 8 bits (CPU)")
    p.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    g = p.add_argument_group("benchmarks")
    g.add_argument(
        "--data", type=Path, default=Path("data/eval"), metavar="DIR",
        help="the folder that holds them, as "
        "LLaVA's playground/data/eval (default: %(default)s)")
    g.add_argument(
        "--limit", type=int, default=0, metavar="N",
        help="ask only the first N questions of each part: of "
        "POPE's categories, MME's tasks, SEED's types, MMMU's subjects")
    g.add_argument("--out", type=Path, metavar="DIR",
                   help="for answers and results.json (default: out/eval/MODEL)")
    g = p.add_argument_group("the embedded world")
    g.add_argument("--seed", type=int, default=0, help="which held-out questions")
    g.add_argument("--n", type=int, help="how many (default: 4000; of Table 2: 500)")
    g.add_argument("--grey", action="store_true", help="answer about grey pictures, too")
    g.add_argument("--wrong", type=int, default=0, metavar="K",
                   help="also print the first K wrong answers")
    submit.options(p)
    args = p.parse_args(argv)
    if min(x for x in (args.batch, args.n, args.limit + 1, args.threads + 1) if x is not None) < 1:
        raise UserError("--batch and --n should be at least 1, --limit and --threads at least 0")
    args.batch = args.batch or (100 if args.task == "toy" else 16)
    return args


def main(argv=None):
    args = arguments(argv)
    if args.score:
        return submit.command(args)
    if args.table:
        return tables.show(args.table)
    name = args.table2 if args.task is None else args.task
    tasks = list(SCORERS) if name == "all" else name.split(",")
    if not set(tasks) <= {*SCORERS, "toy"} or ("toy" in tasks or args.table2) and len(tasks) > 1:
        raise UserError(
            f"no such task: {name!r} (choose toy alone, {'' if args.table2 else 'all, or some '}"
            f"of {', '.join(SCORERS)})")
    if args.annotations and (len(tasks) > 1 or name == "toy"):
        raise UserError("--annotations is the official file of one benchmark: ask one at a time")
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.table2:
        return table2(args, name)
    return toy_exam(args) if name == "toy" else evaluate(args, tasks)


if __name__ == "__main__":
    run(main)
