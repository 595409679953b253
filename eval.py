"""Ask a model many questions and score its answers.

    python eval.py --task toy            4,000 held-out questions about the toy world, by kind
    python eval.py --task toy --grey     ... about grey pictures, too: what can be guessed blindly
    python eval.py --model DIR --task gqa,pope --data DIR       benchmarks (benchmarks/), or: all
    torchrun --nproc_per_node=8 eval.py --model DIR --task all --data DIR
    python eval.py --model DIR --task FILE.json --images DIR    one's own exam (benchmarks/exam.py)
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
say --threads where it matters.) An answer that was changed since it was written isn't taken over. A
benchmark that can't be asked doesn't keep others from being asked. A picture that turns out to be
damaged is answered by nothing, said and counted, and asked about again by the same command.
"""
from core.common import run  # first: from here on Ctrl-C is a line

# isort: split
import argparse
import hashlib
import json
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks import ASKED, TASKS, mmmu
from benchmarks import exam as own
from benchmarks import score as scoring
from benchmarks.answers import Question, read_answers
from core import flags
from core.common import UserError, clear_tmp, lock, make_folder, split, write_json
from core.flags import whole

if __name__ == "__main__" and any(word.startswith("--score") for word in sys.argv):
    sys.exit(run(scoring.main))        # a score needs nothing of what follows, which takes seconds

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

import fast
from benchmarks import ask, kept, table1, table2
from benchmarks.reply import reply
from benchmarks.reply import reply_ids as reply_ids
from ccra import VLM
from clip import preprocess, read_pixels
from core import distributed
from core.device import pick_device, pick_dtype
from core.pictures import remarks
from core.tokenizer import Tokenizer
from core.weights import stored_bytes, stored_files
from data import SYSTEM, item, make_batch, prompt
from toy import exam
from toy import world as toy
from training import adapters


def load_model(folder: str | Path, device: torch.device | str = "auto", dtype: str = "auto",
               vision: str | Path | None = None, int8: bool = False, pack: bool = False,
               adapter: str | Path | None = None) -> tuple[VLM, Tokenizer, torch.device]:
    """(model, tokenizer, device) to ask questions with, from a model's folder.

    vision: the CLIP folder for a model that has no vision tower. int8, pack: see fast.prepare.
    adapter: the folder of what was learnt beside this model (training/adapters.py).
    """
    device = pick_device(device) if isinstance(device, str) else device
    dtype = pick_dtype(dtype, device, stored_bytes(folder))
    model = adapters.load(folder, adapter, vision, dtype, device).eval()
    fast.prepare(model, pack=pack, int8=int8)
    return model, Tokenizer.from_pretrained(folder), device


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
    exam.show_wrong(items, texts, args.wrong)


# --------------------------------------------------------------------------------------------------
# The benchmarks, and an exam of one's own: answers

def see(image: Path | bytes | Image.Image | None, size: int, pad: bool,
        upright: bool = False) -> Tensor:
    """A question's picture as pixels (3, size, size); zeros where there is none."""
    if image is None:
        return torch.zeros(3, size, size)
    if isinstance(image, Image.Image):
        return preprocess(image, size, pad)
    return read_pixels(image, size, pad, upright)


def pixels_of(question: Question, how: dict) -> tuple[Tensor, str | None]:
    """A question's picture; zeros, and why, for one that can't be read. how: `see`'s arguments."""
    try:
        return see(question.image, **how), None
    except UserError as e:
        return see(None, **how), str(e)


def answer_all(model: VLM, tokenizer: Tokenizer, task: str, asked: list[Question], out: Path,
               key: str, args: argparse.Namespace, device: torch.device) -> dict[int, dict]:
    """All processes together answer what isn't answered yet; the first gets all rows (kept.read).

    Process r appends to TASK.r.jsonl, a line an answer. A batch of which an answer is missing is
    asked again, whole, as its other rows may change the last digits of an answer's logits. Of too
    many pictures that can't be read a process stops.
    """
    rank, size = distributed.where()
    rows = [prompt([*q.before, (q.text, None)], tokenizer, image=q.image is not None,
                   strip=q.strip, holder=q.holder) for q in asked]
    length = [len(row.ids) + model.picture_rows * (q.image is not None)
              for row, q in zip(rows, asked)]
    longest_first = sorted(range(len(asked)), key=lambda i: -length[i])    # it may not fit
    with distributed.together():                               # all have read before anybody writes
        done = kept.answered(kept.read(out, task, asked, key))
    batches = [those for those in split(longest_first, args.batch) if not done >= set(those)]
    mine, unread = batches[rank::size], set()
    how = dict(model.image, upright=args.upright)
    own = out / f"{task}.{rank}.jsonl"
    bar = tqdm(desc=task, total=sum(map(len, mine)), unit="answer", file=sys.stderr,
               disable=rank > 0)
    with kept.appending(own) as file, ThreadPoolExecutor(4) as pool, bar:
        for those in mine:
            seen = list(pool.map(lambda i: pixels_of(asked[i], how), those))
            texts = reply(model, tokenizer, [rows[i] for i in those], [x for x, _ in seen],
                          ASKED[task].MAX_NEW_TOKENS, device)
            for i, text, (_, why) in zip(those, texts, seen):
                unread |= {asked[i].image} if why else set()
                if i not in done:
                    file.write(kept.write(key, i, asked[i], text, why))
                    file.flush()
            bar.update(len(those))
            if kept.too_many(unread, asked):
                break
    distributed.wait()
    return kept.read(out, task, asked, key) if rank == 0 else {}


# --------------------------------------------------------------------------------------------------
# The benchmarks, and an exam of one's own: results

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
    learnt = {"adapter": hash_of(adapters.files(args.adapter))} if args.adapter else {}
    return dict(model=str(args.adapter or args.model), weights=hash_of(weights), **learnt,
                config=hash_of(beside), dtype=str(dtype).removeprefix("torch."),
                quant=args.quant, batch=args.batch, limit=args.limit, upright=args.upright,
                decoding="greedy", seed=mmmu.SEED,
                template=f"{SYSTEM} USER: <image>\\n{{prompt}} ASSISTANT:")


def finish(task: str, path: Path, rows: dict[int, dict], asked: list[Question], out: Path,
           results: dict, seconds: float) -> dict:
    """Write out/TASK.jsonl, score it, and set the score into out/results.json. Returns its entry
    there: with "error" if it has none, and isn't judged elsewhere."""
    entry, error = dict(score=None, interval=None, metrics={}), kept.too_few(rows, asked)
    if not error:
        merged = kept.merge(out, task, rows)
        submission = None if results["limit"] else out / f"{task}-submission"
        try:
            if task == own.NAME:
                entry = own.entry(asked, [rows[i]["text"] for i in range(len(asked))])
            else:
                entry = scoring.entry(task, path, read_answers(merged), submission)
        except UserError as e:   # answers that the official files can't hold: the other tasks go on
            error = str(e)
    if error:
        print(f"error: {task} has no score: {error}", file=sys.stderr)
        entry["error"] = error
    entry |= dict(questions=len(asked), pictures=len(kept.pictures(asked)), annotations=path.name,
                  prompt=ASKED[task].TEMPLATE, max_new_tokens=ASKED[task].MAX_NEW_TOKENS)
    if unread := len(rows) - len(kept.answered(rows)):
        entry["unread"] = unread
    seconds += results["seconds"].get(task, 0)                     # asked again, it was there
    for key, value in (("tasks", entry), ("seconds", round(seconds, 1))):
        values = results[key] | {task: value}
        results[key] = {name: values[name] for name in ASKED if name in values}
    write_json(out / "results.json", results)
    return entry


def find(args: argparse.Namespace, tasks: list[str]) -> dict[str, tuple[Path, list[Question]]]:
    """{task: (annotations, questions)} of the tasks that can be asked. The others don't keep these
    from it: each is a line on stderr. UserError if there is none."""
    rank, size = distributed.where()
    found, wrong, notes = {}, {}, Counter()
    for task in tasks:
        path = args.annotations or ask.annotations(task, args.data)
        try:
            how = dict(turns=args.turns) if task == own.NAME else {}
            asked = ask.questions(task, args.data, path, args.limit, **how)
            notes += ask.look(asked, path, slice(rank, None, size))
            if rank == 0 and task in TASKS:
                scoring.rehearse(task, path, asked, args.limit)
            found[task] = path, asked
        except UserError as e:
            wrong[task] = str(e)
    everybody = distributed.gather((wrong, notes))
    wrong = {task: why for theirs, _ in reversed(everybody) for task, why in theirs.items()}
    found = {task: found[task] for task in found if task not in wrong}
    if len(tasks) == 1 and wrong:
        raise UserError(*wrong.values())
    if rank == 0:
        notes = sum((noted for _, noted in everybody), Counter())
        for task, why in wrong.items():
            print(f"error: {task} can't be asked: {why}", file=sys.stderr)
        for line in remarks(notes, args.upright):
            print(line, file=sys.stderr)
    if not found:
        raise UserError("none of these benchmarks can be asked: see above")
    return found


def evaluate(args: argparse.Namespace, tasks: list[str]) -> None:
    """Answer and score benchmarks: out/TASK.jsonl, and out/results.json, written anew after every
    task. UserError in the end if a task has no score."""
    rank, _, device = distributed.join(args.device, args.threads)
    found, results = find(args, tasks), {}
    with distributed.together():
        out = make_folder(args.out or Path("out/eval", args.name))
        if rank == 0:
            held = lock(out, "evaluation")  # noqa: F841 (for as long as this runs)
            clear_tmp(out, "*.json", "*.jsonl")                       # what a kill left
    model, tokenizer, device = load_as_told(args, device)
    with distributed.together():
        if rank == 0:
            fresh = settings(args, model.projector[0].weight.dtype) | dict(tasks={}, seconds={})
            if own.NAME in found:
                fresh |= dict(file=hash_of([args.annotations]), turns=args.turns,
                              images=str(args.data.resolve()))
            results = kept.resume(out / "results.json", fresh)
            write_json(out / "results.json", results)   # from here on the answers are this model's
    results = distributed.gather(results)[0]
    unscored = [task for task in tasks if task not in found]
    for task, (path, asked) in found.items():
        began, key = time.monotonic(), kept.key_of(results, task)
        rows = answer_all(model, tokenizer, task, asked, out, key, args, device)
        if rank == 0:
            seconds = time.monotonic() - began
            entry = finish(task, path, rows, asked, out, results, seconds)
            unscored += [task] if "error" in entry else []
            if task in TASKS:
                print(f"{task}: {table1.figure(entry)}")
            elif "error" not in entry:
                own.show(entry["metrics"], args.json)
    distributed.leave()
    if unscored and rank == 0:
        raise UserError(f"without a score: {', '.join(unscored)}; see above")


def own_exam(args: argparse.Namespace) -> None:
    """--task FILE.json."""
    if args.annotations:
        raise UserError("--annotations is the official file of one benchmark; --task FILE.json "
                        "holds the right answers itself")
    if args.threads:
        torch.set_num_threads(args.threads)
    args.annotations = Path(args.task)
    if not args.annotations.is_file():
        raise UserError(f"{args.task}: no such file; --task FILE.json holds one's own records")
    args.data, args.turns = args.images or args.annotations.parent, args.turns or "last"
    args.out = args.out or Path("out/exam", args.name, args.annotations.stem)
    evaluate(args, [own.NAME])


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
        for line in remarks(ask.look(asked, path), args.upright):
            print(line, file=sys.stderr)
        images = [q.image for q in asked if q.image is not None]
        turns = [[(q.text, None)] for q in asked if q.image is not None]
    how, rows = dict(model.image, upright=args.upright), []
    for those in turns:
        last, _ = those[-1]
        rows.append(prompt(those[:-1] + [(last, None)], tokenizer, strip=task == "toy"))

    def batches():
        for those in tqdm(split(list(range(len(rows))), args.batch), desc="looking",
                          file=sys.stderr):
            items = [item(rows[i], see(images[i], **how)) for i in those]
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
                      int8=args.quant == "int8", adapter=args.adapter)


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    p = flags.Parser(description=__doc__)
    what = p.add_mutually_exclusive_group(required=True)
    what.add_argument("--task", help=f"toy; or one or several of {','.join(TASKS)}; or all, which "
                      "are these; or FILE.json, one's own records in LLaVA's format")
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
    own_options(p.add_argument_group("an exam of one's own (--task FILE.json)"))
    toy_options(p.add_argument_group("the toy world"))
    scoring.options(p)
    args = p.parse_args(argv)
    args.name = Path(args.adapter or args.model).resolve().name
    args.batch = args.batch or (100 if args.task == "toy" else 16)
    return args


def model_options(g) -> None:
    g.add_argument("--model", default=toy.MODEL, help="a model folder (default: the toy world's)")
    g.add_argument("--vision",
                   help="the CLIP folder for a model that has no vision tower (liuhaotian's LLaVA)")
    adapters.option(g)
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
    g.add_argument("--upright", action="store_true", help="turn pictures as their orientation tags "
                   "say, which LLaVA doesn't")
    g.add_argument("--out", type=Path, metavar="DIR",
                   help="for answers and results.json (default: out/eval/MODEL; of an exam of "
                   "one's own out/exam/MODEL/FILE)")


def own_options(g) -> None:
    g.add_argument("--images", type=Path, metavar="DIR", help="what the records' picture paths are "
                   "relative to (default: the file's folder)")
    g.add_argument("--turns", choices=own.TURNS, help="which human turns are asked: the last of "
                   "each record (default), or all, in both cases with the right answers of the "
                   "turns before as history")


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
    if args.task and own.is_file(args.task, {*TASKS, "toy", "all"}):
        return own_exam(args)
    if args.images or args.turns:
        raise UserError("--images and --turns belong to an exam of one's own: --task FILE.json")
    name = args.table2 if args.task is None else args.task
    tasks = list(TASKS if name == "all" else dict.fromkeys(name.split(",")))
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
