"""LLaVA's json in; ids, labels, query and pixels out.

One record of that json is a conversation, mostly about one picture:

    {"id": "17", "image": "coco/train2017/000000000017.jpg", "conversations": [
        {"from": "human", "value": "<image>\\nWhat is this?"}, {"from": "gpt", "value": "A cat."}]}

A language model reads one row of token ids. Three things must be known about that row, and all
three are decided here, while it is written: where the picture goes (an id of its own, -200, once),
which tokens are to be predicted (`labels`: the answers and the end after each; everything else is
-100), and which tokens are the user's words (`query`: what CCRA looks for in the picture). The row
grows piece by piece from left to right, so nothing is found again by counting.

    plain   stage 1   <s> PICTURE caption \\n                 what the human said is thrown away
    v1      stage 2   <s> system text USER: PICTURE \\n q ASSISTANT: a</s>USER: q2 ASSISTANT: a2</s>

Both are LLaVA-1.5's, token for token. Look at what a model would be trained on before training it:

    python data.py show                                 some records of the toy world
    python data.py show --json llava_v1_5_mix665k.json --images playground/data \\
        --tokenizer vicuna-7b-v1.5

Top to bottom: a record (checked by core/records.py) is written down as tokens, by `render`, or a
question is, by `prompt`; data sets yield `item`s; `make_batch` turns items into tensors, for
training and for asking. This file keeps a json in memory and tokenises records when they are
wanted. For hundreds of thousands `python data.py prepare` tokenises all of them once.
"""
from core.common import run  # first: from here on Ctrl-C is a line

# isort: split
import argparse
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor

from clip import read_pixels
from core import flags
from core.common import ROOT, UserError, split, visible
from core.pictures import is_address, remarks, survey
from core.records import SLOT, Turns, check, encodable, lacks, name, read_records
from core.tokenizer import IGNORE, IMAGE_TOKEN, Tokenizer

SYSTEM = ("A chat between a curious user and an artificial intelligence assistant. "
          "The assistant gives helpful, detailed, and polite answers to the user's questions.")
TEMPLATES = ("plain", "v1")
QUERIES = ("all", "sofar", "first")
EXAMPLE = ROOT / "assets" / "example"        # records of the toy world, with their pictures
LOOK = 10                                    # seconds that `load` looks into pictures


# --------------------------------------------------------------------------------------------------
# A conversation, written down as tokens

@dataclass
class Sample:
    """One row for the language model, and what is known about its tokens."""
    ids: list[int] = field(default_factory=list)            # IMAGE_TOKEN where the picture goes
    labels: list[int] = field(default_factory=list)         # as many: the id itself, or IGNORE
    turns: list[list[int]] = field(default_factory=list)    # the query, a list for each human turn
    # turns[i] is ids[start:stop]. Empty in stage 1, where the query isn't in the row.
    spans: list[tuple[int, int]] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)           # ids[:ends[i]] goes up to answer i

    @property
    def query(self) -> list[int]:
        """The text of all human turns: no picture slot, no role tags, no system text, and no
        answers, which would leak the label into the picture's features."""
        return [token for turn in self.turns for token in turn]

    def write(self, ids: list[int], learn: bool = False) -> None:
        self.ids += ids
        self.labels += ids if learn else [IGNORE] * len(ids)

    def ask(self, ids: list[int]) -> None:
        self.spans.append((len(self.ids), len(self.ids) + len(ids)))
        self.turns.append(ids)
        self.write(ids)


def render(record: dict, tokenizer: Tokenizer, template: str = "v1",
           where: str = "record") -> Sample:
    """A record as "plain" (stage 1) or "v1" (stage 2) row, whole: `make_batch` cuts it.

    UserError if it isn't LLaVA's format or can't be learnt from: nothing is masked away in silence.
    """
    if template not in TEMPLATES:
        raise UserError(f"no such template: {template!r} (choose {' or '.join(TEMPLATES)})")
    turns, picture = check(record, where, template)
    if reason := lacks(turns, picture):
        raise UserError(f"{name(record, where)}: {reason}")
    return write(turns, picture, tokenizer, template)


def write(turns: Turns, picture: int | None, tokenizer: Tokenizer, template: str) -> Sample:
    """What `check` returned, in a template."""
    if template == "plain":
        return plain(*turns[0], tokenizer)
    return v1(turns, picture, tokenizer)


def prompt(turns: Turns, tokenizer: Tokenizer, image: bool = True, strip: bool = True,
           holder: int = 0) -> Sample:
    """[(question, answer), ..., (question, None)] as a v1 row that ends with " ASSISTANT:", for the
    model to go on. It has no labels.

    The row is the beginning of the training sample with the same turns, since the same code writes
    both. Questions are text whatever is typed: "<image>" in them is no picture, "</s>" ends
    nothing. An empty question is a UserError. image: the picture stands before the question of turn
    `holder`. strip: blanks around that one go, as in training; LLaVA's evaluation keeps them.
    """
    answered = [answer is not None for _, answer in turns]
    if not turns or answered != [True] * (len(turns) - 1) + [False]:
        raise ValueError("turns should be answered questions, then one with None for an answer")
    for question, _ in turns:
        if not question.strip():
            raise UserError("the question is empty: ask something")
        if not encodable(question):
            raise UserError(f"the question {question!r} isn't valid Unicode")
    sample = v1(turns, holder if image else None, tokenizer, strip)
    sample.labels = []
    return sample


def plain(question: str, caption: str, tokenizer: Tokenizer) -> Sample:
    """<s> PICTURE caption \\n (LLaVA). No </s>: stage 1 only teaches the projector the language of
    the embeddings.

    The question isn't in the row. It is kept as the query for those who run CCRA in stage 1, with
    the tokens it would have after a picture in v1.
    """
    sample = Sample(turns=[tokenizer.encode(question.strip(), continues=True)])
    sample.write(start(tokenizer) + [IMAGE_TOKEN])
    sample.write(tokenizer.encode(caption + "\n"), learn=True)
    sample.ends.append(len(sample.ids))
    return sample


def v1(turns: Turns, picture: int | None, tokenizer: Tokenizer, strip: bool = True) -> Sample:
    """Vicuna's template, tokenised and masked as by LLaVA-1.5 (the repository's last state:
    tokenizers >= 0.14).

    Tokens may begin with a space but have none further in, so a text cut before its spaces has the
    tokens of the whole, and the row can be put together from pieces. A sentencepiece model adds a
    space in front of what it is given. LLaVA gave it the text before the picture and the text after
    it, so there is such a space after <s> and one after the picture; every other piece `continues`
    what stands before it.
    """
    sample = Sample()

    def text(piece: str, continues: bool = True) -> list[int]:
        return tokenizer.encode(piece, continues=continues)

    sample.write(start(tokenizer) + text(SYSTEM + " USER:", continues=False))
    for i, (question, answer) in enumerate(turns):
        if i > 0:
            sample.write(text("USER:"))                  # right after </s>, without a space
        if i == picture:                                 # wherever its slot was, it comes first now
            question = question.strip() if strip else question
            sample.write(text(" ") + [IMAGE_TOKEN])
            sample.write(text("\n", continues=False) if question else [])
            sample.ask(text(question))
            sample.write(text(" ASSISTANT:", continues=question != ""))
        else:
            sample.ask(text(" " + question))
            sample.write(text(" ASSISTANT:"))
        if answer is not None:
            # The space is in the answer's first token ("▁A"), or is one (before a digit), for the
            # model to predict. Of several ends the lowest: Llama 3's <|end_of_text|>.
            said = text(" " + answer) if answer else []
            sample.write(said + [min(tokenizer.eos_ids)], learn=True)
            sample.ends.append(len(sample.ids))
    return sample


def start(tokenizer: Tokenizer) -> list[int]:
    """<s>, for the tokenizers that have one."""
    return [] if tokenizer.bos_id is None else [tokenizer.bos_id]


# --------------------------------------------------------------------------------------------------
# A data set

def item(sample: Sample, pixels: Tensor) -> dict:
    """What a data set yields, and `make_batch` takes: a row and its picture, (3, size, size)."""
    return dict(pixels=pixels, ids=sample.ids, labels=sample.labels, query=sample.query,
                turns=sample.turns, ends=sample.ends)


@dataclass(eq=False, repr=False)      # neither should walk through 665,298 records
class LlavaJson:
    """A LLaVA json and its pictures as a list of `item`s. `load` makes it.

    pixels are zeros for a record without a picture, so that all samples take the same way through
    the model. pad: make a picture square by padding (True) or by cropping its long side (False).
    """

    records: list               # all of the file's
    numbers: list[int]          # which of them are items
    file: Path
    image_root: Path | None
    tokenizer: Tokenizer
    template: str
    size: int
    pad: bool
    sha256: str                 # of the file
    upright: bool = False       # turn pictures as their orientation tags say

    def __len__(self) -> int:
        return len(self.numbers)

    def record_id(self, i: int) -> str:
        """What to call sample i in a message: the record's place in the file, and its id."""
        return name(self.records[self.numbers[i]], f"record {self.numbers[i]}")

    def sample(self, i: int) -> Sample:
        """The text alone."""
        where = f"{self.file}: record {self.numbers[i]}"
        return render(self.records[self.numbers[i]], self.tokenizer, self.template, where)

    def path(self, i: int) -> Path | None:
        """The file of sample i's picture."""
        path = self.records[self.numbers[i]].get("image")
        if path is not None and self.image_root is None:
            raise UserError(f"{self.file}: {self.record_id(i)} has a picture: say in which folder "
                            "the pictures are")
        return None if path is None else self.image_root / os.path.normpath(path)

    def picture_count(self) -> int:
        """How many pictures the samples have."""
        return len({self.path(i) for i in range(len(self))} - {None})

    def pixels(self, i: int) -> Tensor:
        path = self.path(i)
        if path is None:
            return torch.zeros(3, self.size, self.size)
        return read_pixels(path, self.size, self.pad, self.upright)                # (3, size, size)

    def __getitem__(self, i: int) -> dict:
        return item(self.sample(i), self.pixels(i))


def load(json_path: str | Path, image_root: str | Path | None, tokenizer: Tokenizer,
         template: str = "v1", size: int = 336, pad: bool | None = None,
         say: Callable = print, upright: bool = False) -> LlavaJson:
    """Read a LLaVA json and check all of it at once: a bad record or a missing picture shall not
    end a run hours later.

    Records that can't be learnt from are left out, counted by reason, in one line given to `say`.
    UserError for anything that isn't LLaVA's format, for picture paths that lead out of image_root,
    for pictures that aren't there. image_root None: don't look for pictures (an item that has one
    is a UserError then). pad None: as in LLaVA, "plain" crops and "v1" pads. upright: turn pictures
    as their orientation tags say; what isn't shown as it is stored is counted, and said.
    """
    file = Path(json_path)
    image_root = None if image_root is None else Path(image_root)
    records, sha256 = read_records(file, image_root)
    numbers, left_out = [], {}                           # left_out: reason -> records
    for i, record in enumerate(records):
        if reason := lacks(*check(record, f"{file}: record {i}", template)):
            left_out.setdefault(reason, []).append(i)
        else:
            numbers.append(i)
    if left_out:
        reasons = [f"{len(those)} {reason} (first: {name(records[those[0]], f'record {those[0]}')})"
                   for reason, those in left_out.items()]
        say(f"left out {len(records) - len(numbers)} of {len(records)} records of {file}: "
            + "; ".join(reasons))
    if not numbers:
        raise UserError(f"{file}: not one record can be learnt from")
    if image_root is not None:
        _look_for_pictures({i: records[i]["image"] for i in numbers if "image" in records[i]},
                           image_root, records, file, say, upright)
    pad = template == "v1" if pad is None else pad
    return LlavaJson(records, numbers, file, image_root, tokenizer, template, size, pad, sha256,
                     upright)


def _look_for_pictures(named: dict[int, str], image_root: Path, records: list, file: Path,
                       say: Callable, upright: bool) -> None:
    """UserError if one of the pictures, {record's number: path}, isn't there, or can't be read as
    far as that shows without decoding all of them."""
    first = {path: i for i, path in reversed(named.items())}       # path -> first record
    missing = [path for path in dict.fromkeys(named.values())
               if not os.path.isfile(os.path.join(image_root, os.path.normpath(path)))]
    if missing:
        i = first[missing[0]]
        whose = name(records[i], f"record {i}")
        way_on = " (a web address: download it first)" if is_address(missing[0]) else ""
        raise UserError(f"{len(missing)} of {len(first)} pictures named in {file} are missing "
                        f"under {image_root}; first: {missing[0]!r} of {whose}{way_on}")
    files = {image_root / os.path.normpath(path): i for path, i in first.items()}
    notes, faults, seen = _survey(list(files))
    if faults:
        bad, why = next(iter(faults.items()))
        whose = name(records[files[bad]], f"record {files[bad]}")
        raise UserError(f"{file}: {len(faults)} of {seen} pictures named there can't be read; put "
                        f"them right, or leave their records out; first: {why}, of {whose}")
    for line in remarks(notes, upright):
        say(line)
    if seen < len(files):
        say(f"note: looked at {seen:,} of {len(files):,} pictures of {file}, which took {LOOK} s")


def _survey(files: list[Path]) -> tuple[Counter, dict, int]:
    """`survey` of as many files as can be looked at in LOOK seconds, and how many these are."""
    notes, faults, seen, began = Counter(), {}, 0, time.monotonic()
    with ThreadPoolExecutor(8) as pool:
        for piece in split(files, 256):
            if time.monotonic() > began + LOOK:
                break
            for some, bad in pool.map(survey, split(piece, 32)):
                notes.update(some)
                faults |= bad
            seen += len(piece)
    return notes, faults, seen


# --------------------------------------------------------------------------------------------------
# A batch

def make_batch(items: list[dict], query: str = "all", max_length: int | None = None,
               picture_rows: int = 0, device: torch.device | str = "cpu",
               pad_id: int = 0) -> dict[str, Tensor]:
    """Items as one batch, padded on the right, as VLM.forward and VLM.generate take it.

    query: the questions that the picture is read with, see `by_query`. max_length: cut rows to it,
    a picture being picture_rows long in them. Returns pixels (B, 3, H, W); ids (B, T) and query
    (B, Q) long; mask (B, T) and query_mask (B, Q) bool, which ids are real (LLaVA asks for ids != 0
    and so loses every <unk>); labels (B, T) long, unless none of the items has any: `prompt`s.
    Q is at least 1, so a batch without any query has a mask of False rather than an empty tensor.
    """
    rows = [row for one in items for row in by_query(one, query)]
    if max_length is not None:
        rows = [cut(row, max_length, picture_rows) for row in rows]

    def pad(key: str, fill: int) -> tuple[Tensor, Tensor]:
        lengths = torch.tensor([len(row[key]) for row in rows])                    # (B,)
        width = max(1, int(lengths.max()))
        padded = [row[key] + [fill] * (width - len(row[key])) for row in rows]
        return torch.tensor(padded), torch.arange(width)[None] < lengths[:, None]  # (B, width) both

    batch = {"pixels": torch.stack([row["pixels"] for row in rows])}               # (B, 3, H, W)
    batch["ids"], batch["mask"] = pad("ids", pad_id)
    batch["query"], batch["query_mask"] = pad("query", pad_id)
    if any(row["labels"] for row in rows):
        batch["labels"], _ = pad("labels", IGNORE)
    return {key: tensor.to(device) for key, tensor in batch.items()}


def by_query(item: dict, which: str) -> list[dict]:
    """The rows of an item when the picture is to be read with `which` questions.

    all: those of the whole conversation, later ones too, as one row (at inference there are only
    those so far: a mismatch). first: the first one, one row. sofar: what inference does; the
    picture's features then change from turn to turn, so every turn becomes a row of its own, which
    learns its answer and has the earlier turns as its past. A conversation of one turn gives the
    same row in all three, and a `prompt`, which ends with a question, is one row.
    """
    if which == "first":
        return [{**item, "query": item["turns"][0]}]
    if which == "all" or len(item["ends"]) < len(item["turns"]):
        return [item]
    rows, begin = [], 0
    for i, end in enumerate(item["ends"]):
        labels = [IGNORE] * begin + item["labels"][begin:end]
        query = [token for turn in item["turns"][:i + 1] for token in turn]
        rows.append({**item, "ids": item["ids"][:end], "labels": labels, "query": query})
        begin = end
    return rows


def cut(row: dict, max_length: int, picture_rows: int) -> dict:
    """The row with ids and labels cut so that, its picture being picture_rows long, it fits
    max_length. Done here, not in the model, so that the labels that are left can be counted."""
    ids = row["ids"]
    at = ids.index(IMAGE_TOKEN) if IMAGE_TOKEN in ids else len(ids)
    keep = max_length
    if max_length > at:                                  # the picture whole, or not at all
        keep = max(at, max_length - picture_rows + 1)
    return {**row, "ids": ids[:keep], "labels": row["labels"][:keep]}


# --------------------------------------------------------------------------------------------------
# Looking at it

COLOURS = dict(answer=("\033[32m", "\033[0m"), query=("\033[4;36m", "\033[0m"),
               picture=("\033[7m", "\033[0m"))
BRACKETS = dict(answer=("«", "»"), query=("‹", "›"), picture=("[", "]"))     # without colours


def paint(sample: Sample, tokenizer: Tokenizer, color: bool) -> str:
    """The row as text, with the answers, the queries and the picture's slot marked."""
    marks = COLOURS if color else BRACKETS
    special = {token: "</s>" for token in tokenizer.eos_ids}
    special |= {tokenizer.bos_id: "<s>", IMAGE_TOKEN: SLOT}
    kinds = ["other" if label == IGNORE else "answer" for label in sample.labels]
    for begin, stop in sample.spans:
        kinds[begin:stop] = ["query"] * (stop - begin)
    runs = groupby(zip(sample.ids, kinds),
                   key=lambda pair: (pair[0] if pair[0] in special else None, pair[1]))
    out, line = [], []                                   # line: the ids since the last special one
    for (token, kind), pairs in runs:
        ids = [id for id, _ in pairs]
        if token is None:        # decoded after what stands before: alone it would lose its space
            before = tokenizer.decode(line)
            line = line + ids
            text = tokenizer.decode(line)[len(before):]
        else:
            text = special[token] * len(ids)
            line = []
        left, right = marks.get("picture" if token == IMAGE_TOKEN else kind, ("", ""))
        out.append(left + visible(text) + right)
    return "".join(out)


def show(samples: list[Sample], tokenizer: Tokenizer, color: bool, names: list[str]) -> None:
    """Print samples as the model meets them, and how much of them it is made to predict."""
    marks = COLOURS if color else BRACKETS
    (a, b), (c, d) = marks["answer"], marks["query"]
    print(f"{a}predicted: the loss counts these tokens{b} "
          f"{c}the query: what CCRA looks for in the picture{d}")
    for sample, title in zip(samples, names, strict=True):
        learnt = sum(label != IGNORE for label in sample.labels)
        print(f"\n--- {title}: {len(sample.ids)} ids, pictures {sample.ids.count(IMAGE_TOKEN)}, "
              f"supervised {learnt} ({learnt / len(sample.ids):.1%}), query {len(sample.query)}")
        print(paint(sample, tokenizer, color))
        if not sample.spans:
            print(f"not in the text: {c}{tokenizer.decode(sample.query)}{d}")


def arguments() -> argparse.Namespace:
    p = flags.Parser(
        prog="data.py show", description="Check a json and its pictures, then print some records "
        "as the model would be trained on them: what it has to predict in green, the query "
        "underlined; in «» and ‹› where it isn't printed to a terminal.")
    p.add_argument("--json", type=Path, metavar="FILE",
                   help="records in LLaVA's format (default: some of the toy world)")
    p.add_argument("--images", type=Path, metavar="DIR", help="what the records' picture paths are "
                   "relative to (without it nobody looks whether the pictures are there)")
    p.add_argument("--tokenizer", type=Path, metavar="DIR",
                   help="a language model's folder, for its tokenizer")
    p.add_argument("--template", choices=TEMPLATES, default="v1",
                   help="plain: stage 1; v1: stage 2, the default")
    p.add_argument("--n", type=flags.whole(1, flags.MANY), default=3,
                   help="how many records (default: %(default)s)")
    p.add_argument("--seed", type=flags.seed,
                   help="draw them at random (default: the first n)")
    args = p.parse_args(sys.argv[2:])
    if args.json is None and args.images is not None:
        raise UserError("--images says where the pictures of a --json FILE are, and there is none")
    if args.json is not None and args.tokenizer is None:
        raise UserError("data.py show --json needs --tokenizer DIR")
    if args.json is None:
        args.json = EXAMPLE / ("stage1.json" if args.template == "plain" else "stage2.json")
        args.tokenizer = args.tokenizer or ROOT / "assets" / "toy"
    return args


def main() -> None:
    command = sys.argv[1] if len(sys.argv) > 1 else None
    if command == "prepare":
        # The one import of something further right: what it makes is data, so one looks for it here
        from training.prepare import main as prepare
        return prepare(sys.argv[2:])
    if command != "show":
        print(__doc__ or "data.py show, data.py prepare: each has -h")       # python -OO has none
        if command not in ("-h", "--help", None):
            raise UserError(f"data.py has no command {command!r}: choose show or prepare")
        return
    args = arguments()
    data = load(args.json, args.images, Tokenizer.from_pretrained(args.tokenizer), args.template)
    picks = range(min(args.n, len(data)))
    if args.seed is not None:
        picks = random.Random(args.seed).sample(range(len(data)), len(picks))
    show([data.sample(i) for i in picks], data.tokenizer, sys.stdout.isatty(),
         [data.record_id(i) for i in picks])


if __name__ == "__main__":
    preparing = sys.argv[1:2] == ["prepare"]
    run(main, "nothing is prepared; the same command begins anew" if preparing else "")
