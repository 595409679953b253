"""Held-out records while training (--val): the loss of their supervised tokens, the share of their
answers that are right when asked, and the weights that were best at it (--keep-best).

All processes take part, and the numbers don't depend on how many there are. Micro-batches are fixed
in advance, of records of like length, and dealt out in turn; all make as many passes, the last ones
perhaps over records that don't count, since in a sliced model each waits for the others. Sums are
taken over micro-batches in their order, in float64.

A record is asked its last question, with the right answers before it as history; its answer is
right if it is the same text (benchmarks/judge.py). Nothing here draws random numbers or touches a
gradient: the training goes on to the same bits as without.
"""
import json
import math
import os
import random
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor

import data
from benchmarks.judge import is_exact
from benchmarks.reply import reply_ids, until_end
from ccra import VLM
from core.common import UserError, split, write_json
from core.distributed import gather, say, together, total, where
from core.records import check
from core.tokenizer import IGNORE, IMAGE_TOKEN, Tokenizer
from training import before, damage, sharding
from training.checkpoints import Checkpoints, size_of
from training.damage import Damaged
from training.digests import digest
from training.readers import Lenient, Notes

SPARE = 4                # tokens that an answer may have more than the right one, which end it: it
#                          isn't the same text then
NOTHING = SimpleNamespace(state={}, defaults={})         # the optimiser of weights alone


class Held:
    """The held-out records of a run. Made by all processes, before anything is written."""

    def __init__(self, args, model: VLM, tokenizer: Tokenizer, dataset):
        """args: train.py's, with val, val_images, val_every, val_n and keep_best. dataset: what is
        trained on. UserError unless the records can be learnt from and their pictures are there;
        what they share with the dataset is said."""
        self.args, self.tokenizer = args, tokenizer
        images = args.val_images or args.images or getattr(dataset, "image_root", None)
        self.dataset = data.load(args.val, images, tokenizer, "plain" if args.stage == 1 else "v1",
                                 model.vision.config.image_size, say=say, upright=args.upright)
        for i in range(len(self.dataset)):
            self.dataset.path(i)                             # UserError for pictures without a root
        self.max_length = before.row_length(args, model)
        self.rows = model.picture_rows
        with together():
            if where()[0] == 0:
                self.warn(dataset)
        # Stage 1 knows no questions
        room = model.llm.config.max_position_embeddings
        self.asked = self.choose(room, 0 if args.stage == 1 else args.val_n)
        longest_first = sorted(range(len(self.dataset)), key=lambda i: -self.length(i))
        self.groups = split(longest_first, args.micro)
        self.pictures = None                             # self.dataset's, once there is an --out
        self.best = None

    def warn(self, dataset) -> None:
        """Say what is cut off, and which records are in the training data, too."""
        lines = before.cut_short(self.dataset, self.max_length, self.rows)
        both = shared(self.dataset, dataset)
        if both:
            lines.append(f"{len(both)} of {len(self.dataset)} records of {self.args.val} are in "
                         "the training data, too (the same id and picture; first: "
                         f"{self.dataset.record_id(both[0])}): on these nothing is held out")
        for line in lines:
            print(f"warning: --val: {line}", file=sys.stderr, flush=True)

    # ----------------------------------------------------------------------------------------------
    # Which records, in which micro-batches

    def length(self, i: int) -> int:
        """Positions of record i's row, at most."""
        ids = self.dataset.sample(i).ids
        return min(self.max_length, len(ids) + self.rows * (IMAGE_TOKEN in ids))

    def choose(self, room: int, n: int) -> list[list[int]]:
        """What is asked, in micro-batches: the first n of all records that can be answered within
        the context (room), in an order that is the same in every run; then by length."""
        needs = {}                                       # record -> positions of question, answer
        for i in random.Random(0).sample(range(len(self.dataset)), len(self.dataset)):
            if len(needs) == n:
                break
            question, most = question_of(self.dataset.sample(i))
            length = len(question.ids) + self.rows * (IMAGE_TOKEN in question.ids)
            if length + most <= room:
                needs[i] = length, most
        groups = []
        for those in split(sorted(needs, key=lambda i: needs[i], reverse=True), self.args.micro):
            fit = sum(max(column) for column in zip(*(needs[i] for i in those))) <= room
            groups += [those] if fit else [[i] for i in those]
        return groups

    def dealt(self, groups: list[list[int]]) -> Iterator[tuple[int, list[int], bool]]:
        """(number, records, whether it counts) of this process's micro-batches, as many as others
        have."""
        rank, size = where()
        for first in range(0, len(groups), size):
            here = first + rank
            counts = here < len(groups)
            yield here, groups[here if counts else -1], counts

    def items(self, those: list[int]) -> list[dict]:
        with ThreadPoolExecutor(4) as pool:
            return list(pool.map(self.pictures.__getitem__, those))

    # ----------------------------------------------------------------------------------------------
    # Measuring

    def due(self, step: int, steps: int) -> bool:
        """Whether it is to be measured after this step of so many."""
        return step % self.args.val_every == 0 or step == steps

    def measure(self, run, step: int) -> dict:
        """dict(val_loss, val_right, val_asked) of a run (a train.Run) after `step` steps; {} if it
        isn't due. All processes call it. val_right is None if nothing is asked."""
        if not self.due(step, run.course["steps"]):
            return {}
        if self.pictures is None:
            self.pictures = Lenient(self.dataset, Notes(self.args.out / "damaged-val.jsonl"))
        training = run.model.training
        run.model.eval()
        with torch.no_grad():
            found = dict(val_loss=self.loss(run), val_right=self.right(run),
                         val_asked=sum(map(len, self.asked)))
        run.model.train(training)
        sharding.sliced_again(run.model)
        if self.args.keep_best:
            self.best_of(run).offer(step, run.trained, found)
        return found

    def loss(self, run) -> float:
        """The mean over the supervised tokens of all records; NaN if no picture could be read."""
        sums = []
        for number, those, counts in self.dealt(self.groups):
            batch = data.make_batch(self.items(those), run.vlm.query, self.max_length, self.rows,
                                    run.device)
            with sharding.products_in(run.dtype, run.device):
                loss = run.vlm(**batch, mode=run.args.mode).item()
            if counts:
                supervised = int((batch["labels"][:, 1:] != IGNORE).sum())
                sums.append((number, loss, supervised))
        sums = sorted(chain(*gather(sums)))
        tokens = sum(n for *_, n in sums)
        return math.fsum(loss for _, loss, _ in sums) / tokens if tokens else math.nan

    def right(self, run) -> float | None:
        """The share of right answers; one whose picture can't be read isn't."""
        right = 0
        for _, those, counts in self.dealt(self.asked):
            answers = self.answers(run, those)
            right += counts * sum(is_exact(said, self.answer(i)) for i, said in answers.items())
        right = total(float(right), device=run.device)
        return right / sum(map(len, self.asked)) if self.asked else None

    def answer(self, i: int) -> str:
        """Record i's last right answer."""
        return check(self.dataset.records[self.dataset.numbers[i]])[0][-1][1]

    def answers(self, run, those: list[int]) -> dict[int, str]:
        """{record: what the model says}."""
        rows, most = zip(*(question_of(self.dataset.sample(i)) for i in those))
        items = self.items(those)
        ask = reply_sliced if run.args.parallel == "fsdp" else reply_ids
        with sharding.products_in(run.dtype, run.device):
            ids = ask(run.vlm, self.tokenizer, rows, [item["pixels"] for item in items], max(most),
                      run.device)
        texts = [self.tokenizer.decode(row[:end]) for row, end in zip(ids, most)]
        seen = [set(item["labels"]) != {IGNORE} for item in items]            # see Lenient
        return {i: text for i, text, read in zip(those, texts, seen) if read}

    # ----------------------------------------------------------------------------------------------
    # The best

    def room(self, trained: dict[str, Tensor]) -> int:
        """Bytes that the best takes on the disk, at most: an old one and a new one."""
        return 2 * size_of(trained) // 3 if self.args.keep_best else 0

    def best_of(self, run) -> "Best":
        """What is kept in out/best."""
        if self.best is None:
            about = dict(course=run.course, file=self.dataset.sha256, n=self.args.val_n)
            self.best = Best(self.args.out / "best", digest(about))
        return self.best

    def put_best(self, run) -> int | None:
        """Put the best weights into the run, after its last step: which step they are of. All
        processes call it. None, and nothing is done, without --keep-best, or if nothing was
        measured."""
        return self.best_of(run).put(run.trained) if self.args.keep_best else None


class Best(Checkpoints):
    """The weights that were best at held-out records: a checkpoint without an optimiser, with its
    numbers in state.json and, for people, in best.json.

    Best is who has most answers right, of these who has the least loss, of these the first. A run
    that goes on from an earlier step comes to the same weights again, so what it finds here stays.
    """

    def __init__(self, folder: Path, of: str):
        """of: a digest of the run and what it is measured on. What is there of another isn't
        taken."""
        super().__init__(folder, keep=1)
        self.of = of
        with together():
            self.found = self._find() if where()[0] == 0 else None
        self.found = gather(self.found)[0]                  # (step, settings), or None

    def _find(self) -> tuple[int, dict] | None:
        for step in reversed(self.steps()):
            try:
                settings = damage.check_state(self.path(step), step)["settings"]
            except Damaged as e:
                print(f"note: {self.path(step)}: is damaged ({e}), so not taken for the best",
                      file=sys.stderr, flush=True)
                continue
            if settings.get("of") == self.of:
                return step, settings
            print(f"note: {self.path(step)}: is of another run or of another --val, so not taken "
                  "for the best", file=sys.stderr, flush=True)
        return None

    def _then(self) -> str:
        return "mend that, and the same command goes on from the last checkpoint"

    def offer(self, step: int, trained: dict[str, Tensor], found: dict) -> None:
        """Keep these weights if they are better than all before."""
        if not math.isfinite(found["val_loss"]):
            return
        if self.found and rank_of(found) <= rank_of(self.found[1]):
            return
        settings = dict(of=self.of, **found)
        self.save(step, trained, NOTHING, settings)
        self.found = step, settings
        with together():
            if where()[0] == 0:
                write_json(self.folder / "best.json", dict(step=step, **found))

    def put(self, trained: dict[str, Tensor]) -> int | None:
        """Put the best weights into parameters, and say which they are."""
        if self.found is None:
            say("no step was measured on held-out records, so the last one counts as the best")
            return None
        step, settings = self.found
        try:
            self._take(self.path(step), step, trained, NOTHING, settings)
        except Damaged as e:
            raise UserError(f"{self.path(step)}: is damaged ({e}); remove it, and the same command "
                            "writes the last step's model") from e
        say(f"step {step} was the best: {in_words(settings)}; the model is the one after it")
        return step


def rank_of(found: dict) -> tuple[float, float]:
    """What is larger for a better model."""
    return found["val_right"] or 0.0, -found["val_loss"]


def in_words(found: dict) -> str:
    """What `measure` found: "loss 0.1234, right 65.5% (200)"."""
    line = f"loss {found['val_loss']:.4f}"
    if found["val_right"] is None:
        return line
    return f"{line}, right {found['val_right']:.1%} ({found['val_asked']})"


# --------------------------------------------------------------------------------------------------
# Records

def question_of(sample: data.Sample) -> tuple[data.Sample, int]:
    """A training sample up to its last answer, as `data.prompt` writes it, and how many tokens an
    answer may have to be the right one."""
    begin = sample.ends[-2] if len(sample.ends) > 1 else 0
    start = next(t for t in range(begin, len(sample.ids)) if sample.labels[t] != IGNORE)
    question = replace(sample, ids=sample.ids[:start], labels=[], ends=sample.ends[:-1])
    return question, sample.ends[-1] - start + SPARE


def shared(held, trained) -> list[int]:
    """Which of the held-out records are in the training data: by id and picture, those without an
    id by text and picture. The toy world is drawn anew, so it shares none."""
    if not hasattr(trained, "path"):
        return []
    known = {}                                           # picture -> {what tells a record apart}
    for i in range(len(held)):
        known.setdefault(place(held, i), {}).setdefault(identity(held, i), []).append(i)
    both = set()
    for i in range(len(trained)):
        if there := known.get(place(trained, i)):
            both.update(there.get(identity(trained, i), ()))
    return sorted(both)


def place(dataset, i: int) -> str | None:
    """Where record i's picture lies."""
    path = dataset.path(i)
    return None if path is None else os.path.abspath(path)


def identity(dataset, i: int) -> str:
    """What tells record i from others about its picture: its id, or else its text."""
    _, _, id = dataset.record_id(i).partition(" (id ")
    return id or json.dumps(dataset.sample(i).ids)


# --------------------------------------------------------------------------------------------------
# Asking a sliced model

def reply_sliced(model: VLM, tokenizer: Tokenizer, rows: list[data.Sample], pixels: list[Tensor],
                 max_new_tokens: int, device: torch.device) -> list[list[int]]:
    """reply_ids's answers by forward passes of the whole model, without a cache: all processes make
    as many, each for its own rows."""
    said = [[] for _ in rows]
    while True:
        ends = [len(until_end(ids, tokenizer)) < len(ids) for ids in said]
        goes_on = not all(ends) and len(said[0]) < max_new_tokens
        if not total(float(goes_on), device=device):
            return [until_end(ids, tokenizer)[:max_new_tokens] for ids in said]
        grown = [replace(row, ids=row.ids + ids) for row, ids in zip(rows, said)]
        items = [data.item(row, picture) for row, picture in zip(grown, pixels)]
        logits = model(**data.make_batch(items, model.query, device=device))       # (B, T', V)
        for row, ids, line in zip(grown, said, logits):
            last = len(row.ids) - 1 + (model.picture_rows - 1) * (IMAGE_TOKEN in row.ids)
            ids.append(int(line[last].argmax()))
