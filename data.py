"""LLaVA's json in; ids, labels, query and pixels out.

One record of that json is a conversation, mostly about one picture:

    {"id": "17", "image": "coco/train2017/000000000017.jpg",
     "conversations": [{"from": "human", "value": "<image>\\nWhat is this?"}, {"from": "gpt", "value": "A cat."}]}

A language model reads one row of token ids. Three things must be known about that row, and all
three are decided here, while it is written: where the picture goes (an id of its own, -200, once),
which tokens are to be predicted (`labels`: the answers and the end after each; everything else is
-100), and which tokens are the user's words (`query`: what CCRA looks for in the picture). The row
grows piece by piece from left to right, so nothing is found again by counting.

    plain   stage 1   <s> PICTURE caption \\n                       what the human said is thrown away
    v1      stage 2   <s> system text USER: PICTURE \\n q ASSISTANT: a</s>USER: q2 ASSISTANT: a2</s>

Both are LLaVA-1.5's, token for token. Look at what a model would be trained on before training it:

    python data.py show --json llava_v1_5_mix665k.json --images playground/data --tokenizer vicuna-7b-v1.5 --n 3

This file keeps a json in memory and tokenises records when they are wanted; prepare.py is for
hundreds of thousands.
"""
import argparse
import codecs
import hashlib
import json
import os
import random
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor

from clip import open_image, preprocess
from core.common import ROOT, UserError, run
from core.tokenizer import IGNORE, IMAGE_TOKEN, Tokenizer

# how a record's text says where the picture goes; what a user types is never read this way
SLOT = "<image>"
SYSTEM = ("A chat between a curious user and an artificial intelligence assistant. "
          "The assistant gives helpful, detailed, and polite answers to the user's questions.")
TEMPLATES = ("plain", "v1")
EXAMPLE = ROOT / "assets" / "example"        # records of the toy world, with their pictures


# --------------------------------------------------------------------------------------------------
# A record, checked


def check(record, where: str = "record",
          template: str = "v1") -> tuple[list[tuple[str, str | None]], int | None]:
    """The turns of a record, [(question, answer)], and which of them holds the picture (None: text
    only).

    The slot is already gone from that turn's question; the last answer is None if the record ends
    with a question. As in LLaVA a leading turn of the assistant is dropped, unknown keys are
    tolerated, and without an "image" key "<image>" is text like any other. Whatever else isn't
    LLaVA's format is a UserError naming `where` and the record's id: two slots, for instance, or
    none, on which LLaVA would silently train without the picture.
    """
    where = name(record, where)

    # formatted only when it is needed: there are a million turns to check
    def need(fine, otherwise, *things):
        if not fine:
            raise UserError(f"{where}: {otherwise.format(*things)}")

    need(
        isinstance(record, dict) and isinstance(record.get("conversations"), list),
        'has no list "conversations"')
    for i, turn in enumerate(record["conversations"]):
        need(
            isinstance(turn, dict) and turn.get("from") in ("human", "gpt"),
            "turn {} isn't from human or gpt", i)
        need(isinstance(turn.get("value"), str), "the value of turn {} isn't text", i)
        need(encodable(turn["value"]), "the value of turn {} isn't valid Unicode", i)
    said = record["conversations"]
    said = said[1:] if said and said[0]["from"] == "gpt" else said
    need(said, "the human says nothing")
    need(all(turn["from"] == ("human", "gpt")[i % 2] for i, turn in enumerate(said)),
         "human and gpt don't take turns")
    questions, answers = ([turn["value"] for turn in said[start::2]] for start in (0, 1))
    picture = None
    if "image" in record:
        path = record["image"]
        need(isinstance(path, str) and path, '"image" isn\'t the path of one picture')
        need(inside(path), '"image" is {!r}, which leads out of the image folder', path)
        holders = [i for i, question in enumerate(questions) if SLOT in question]
        need(holders, "it names a picture, but no human turn says " + SLOT)
        need(sum(text.count(SLOT) for text in questions + answers) == 1, "more than one " + SLOT)
        picture = holders[0]
        questions[picture] = questions[picture].replace(SLOT, "")
    if template == "plain":
        need(picture == 0 and len(said) == 2,
             'the plain template takes an "image", one human turn and one caption')
    return list(zip(questions, answers + [None] * (len(questions) - len(answers)))), picture


def name(record, where: str) -> str:
    """`where`, and the id which the record gives itself."""
    return f"{where} (id {str(record['id'])[:60]!r})" if isinstance(
        record, dict) and "id" in record else where


def encodable(text: str) -> bool:
    """json can spell half of a surrogate pair, which no tokenizer can read."""
    return text.isascii() or re.search("[\ud800-\udfff]", text) is None


def inside(path: str) -> bool:
    """Whether a path stays in the folder it is relative to. Links in that folder may lead out: its
    owner made them."""
    return not os.path.isabs(path) and os.path.normpath(path).split(os.sep)[0] != os.pardir


def problems(record, where: str = "record", template: str = "v1") -> str | None:
    """Why a well-formed record can't be learnt from, or None. `load` leaves such records out, and
    says so."""
    return lacks(*check(record, where, template))


def lacks(turns: list[tuple[str, str | None]], picture: int | None) -> str | None:
    if turns[-1][1] is None:
        return "the last question has no answer"
    if not all(answer.strip() for _, answer in turns):
        return "an assistant turn is empty"
    if not all(question.strip() or i == picture for i, (question, _) in enumerate(turns)):
        return "a human turn is empty"
    return None


# --------------------------------------------------------------------------------------------------
# A conversation, written down as tokens


@dataclass
class Sample:
    """One row for the language model. `spans` says where in ids the turns' queries stand (nowhere,
    in stage 1), `ends` where their answers end."""
    ids: list[int] = field(default_factory=list)  # IMAGE_TOKEN once where the picture goes
    labels: list[int] = field(default_factory=list)             # as many: the id itself, or IGNORE
    turns: list[list[int]] = field(default_factory=list)  # the query, one list for each human turn
    spans: list[tuple[int, int]] = field(default_factory=list)  # turns[i] == ids[start:stop]
    # ids[:ends[i]] is the conversation up to answer i
    ends: list[int] = field(default_factory=list)

    @property
    def query(self) -> list[int]:
        """The text of all human turns: no picture slot, no role tags, no system text, no answers (a
        leak)."""
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
    """A record as "plain" (stage 1) or "v1" (stage 2) row, whole: cutting it to a maximal length is
    the model's affair.

    UserError if it isn't LLaVA's format or can't be learnt from (`problems`): nothing is masked
    away in silence.
    """
    if template not in TEMPLATES:
        raise UserError(f"no such template: {template!r} (choose {' or '.join(TEMPLATES)})")
    turns, picture = check(record, where, template)
    if reason := lacks(turns, picture):
        raise UserError(f"{name(record, where)}: {reason}")
    return write(turns, picture, tokenizer, template)


def write(turns: list[tuple[str, str | None]], picture: int | None, tokenizer: Tokenizer,
          template: str) -> Sample:
    """What `check` returned, in a template."""
    return plain(*turns[0], tokenizer) if template == "plain" else v1(turns, picture, tokenizer)


def prompt(turns: list[tuple[str, str | None]], tokenizer: Tokenizer, image: bool = True,
           strip: bool = True) -> Sample:
    """[(question, answer), ..., (question, None)] as a v1 row that ends with " ASSISTANT:", for the
    model to go on.

    With `image` the picture stands before the first question. The code that writes training samples
    writes this, too: the row is the beginning of the training sample with the same turns. Questions
    are text whatever is typed: "<image>" in them is no picture, "</s>" ends nothing. No labels (all
    IGNORE). An empty question is a UserError. strip: blanks around the first question go, as they
    do in training; LLaVA's evaluation keeps them.
    """
    if not turns or [answer is None for _, answer in turns] != [False] * (len(turns) - 1) + [True]:
        raise ValueError(
            "turns should be answered questions, then one question with None for an answer")
    for question, _ in turns:
        if not question.strip():
            raise UserError("the question is empty: ask something")
        if not encodable(question):
            raise UserError(f"the question {question!r} isn't valid Unicode")
    sample = v1(turns, 0 if image else None, tokenizer, strip)
    sample.labels = [IGNORE] * len(sample.ids)
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


def v1(turns: list[tuple[str, str | None]], picture: int | None, tokenizer: Tokenizer,
       strip: bool = True) -> Sample:
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
            sample.write(
                text(" ") + [IMAGE_TOKEN] + (text("\n", continues=False) if question else []))
            sample.ask(text(question))
            sample.write(text(" ASSISTANT:", continues=question != ""))
        else:
            sample.ask(text(" " + question))
            sample.write(text(" ASSISTANT:"))
        if answer is not None:
            # The space is in the answer's first token ("▁A"), or is one (before a digit), for the
            # model to predict. Of several ends the lowest: Llama 3's <|end_of_text|>.
            sample.write((text(" " + answer) if answer else []) + [min(tokenizer.eos_ids)],
                         learn=True)
            sample.ends.append(len(sample.ids))
    return sample


def start(tokenizer: Tokenizer) -> list[int]:
    """<s>, for the tokenizers that have one."""
    return [] if tokenizer.bos_id is None else [tokenizer.bos_id]


# --------------------------------------------------------------------------------------------------
# A data set


@dataclass(eq=False, repr=False)      # neither should walk through 665,298 records
class LlavaJson:
    """A LLaVA json and its pictures as a list of `item`s. `load` makes it.

    pixels (3, size, size) float32: zeros for a record without a picture, so that all samples take
    the same way through the model. `pad`: make a picture square by padding (True) or by cropping
    its long side (False).
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

    def __len__(self) -> int:
        return len(self.numbers)

    def record_id(self, i: int) -> str:
        """What to call sample i in a message: the record's place in the file, and its id."""
        return name(self.records[self.numbers[i]], f"record {self.numbers[i]}")

    def sample(self, i: int) -> Sample:
        """The text alone."""
        number = self.numbers[i]
        return render(self.records[number], self.tokenizer, self.template,
                      f"{self.file}: record {number}")

    def pixels(self, i: int) -> Tensor:
        path = self.records[self.numbers[i]].get("image")
        if path is None:
            return torch.zeros(3, self.size, self.size)
        if self.image_root is None:
            raise UserError(
                f"{self.file}: {self.record_id(i)} has a picture: say in which folder the pictures are"
            )
        image = open_image(self.image_root / os.path.normpath(path))
        return preprocess(image, self.size, self.pad)                              # (3, size, size)

    def __getitem__(self, i: int) -> dict:
        return item(self.sample(i), self.pixels(i))


def load(json_path, image_root, tokenizer: Tokenizer, template: str = "v1", size: int = 336,
         pad: bool | None = None, say=print) -> LlavaJson:
    """Read a LLaVA json and check all of it at once: a bad record or a missing picture shall not
    end a run hours later.

    Records that can't be learnt from are left out, counted by reason, in one line given to `say`.
    UserError for anything that isn't LLaVA's format, for picture paths that lead out of image_root,
    for pictures that aren't there. image_root None: don't look for pictures (an item that has one
    is a UserError then). pad None: as in LLaVA, "plain" crops and "v1" pads.
    """
    file, image_root = Path(json_path), None if image_root is None else Path(image_root)
    sha = hashlib.sha256()
    records = list(stream(file, sha.update))
    # left_out: reason -> records; pictures: path -> first record
    numbers, left_out, pictures = [], {}, {}
    for i, record in enumerate(records):
        if reason := problems(record, f"{file}: record {i}", template):
            left_out.setdefault(reason, []).append(i)
            continue
        numbers.append(i)
        if "image" in record:
            pictures.setdefault(record["image"], i)
    if left_out:
        reasons = "; ".join(
            f"{len(those)} {reason} (first: {name(records[those[0]], f'record {those[0]}')})"
            for reason, those in left_out.items())
        say(f"left out {len(records) - len(numbers)} of {len(records)} records of {file}: {reasons}"
            )
    if not numbers:
        raise UserError(f"{file}: not one record can be learnt from")
    if image_root is not None and pictures:
        missing = [
            p for p in pictures
            if not os.path.isfile(os.path.join(image_root, os.path.normpath(p)))]
        if missing:
            i = pictures[missing[0]]
            raise UserError(
                f"{len(missing)} of {len(pictures)} pictures named in {file} are missing under "
                f"{image_root}; first: {missing[0]!r} of {name(records[i], f'record {i}')}")
    pad = template == "v1" if pad is None else pad
    return LlavaJson(records, numbers, file, image_root, tokenizer, template, size, pad,
                     sha.hexdigest())


def stream(file: Path, tap: Callable[[bytes], None] = lambda block: None) -> Iterator:
    """The records of a json file one by one, with no more than a block of it and one record in
    memory.

    tap is given the file's bytes as they are read, for whoever counts or hashes them. UserError if
    the file isn't a list of records: when that shows, which may be at its end.
    """
    n = 0
    try:
        with open(file, "rb") as f:
            text = Text(f, tap)
            if text.sign() != "[":
                raise UserError(f"{file} is not LLaVA's format: it should be a list of records")
            sign = text.sign() if text.peek() == "]" else ","
            while sign == ",":
                yield text.value()
                n, sign = n + 1, text.sign()
            if sign != "]" or text.peek():
                raise ValueError("neither a comma nor the end")
    except OSError as e:
        raise UserError(f"can't read {file}: {e.strerror}") from None
    except (ValueError, RecursionError) as e:     # UnicodeDecodeError is a ValueError, too
        raise UserError(f"{file} is not JSON: record {n}: {getattr(e, 'msg', e)}") from None
    if n == 0:
        raise UserError(f"{file} is not LLaVA's format: there is no record in it")


class Text:
    """A file of JSON, read in blocks, of which the values are taken from the front."""
    # bytes read at a time; characters of a value before it is called broken
    BLOCK, LONGEST = 1 << 20, 1 << 26

    def __init__(self, file, tap: Callable[[bytes], None]):
        self.file, self.tap, self.text, self.at, self.ended = file, tap, "", 0, False
        self.decoder, self.scan = codecs.getincrementaldecoder(
            "utf-8-sig")(), json.JSONDecoder().raw_decode

    def read(self) -> None:
        left = self.text[self.at:]
        # twice as much, while a value doesn't come to its end
        block = self.file.read(max(self.BLOCK, len(left)))
        self.tap(block)
        self.text, self.at, self.ended = left + self.decoder.decode(block,
                                                                    final=not block), 0, not block

    def peek(self) -> str:
        """The next character that isn't blank; "" at the end."""
        while True:
            self.at = re.compile(r"[ \t\n\r]*").match(self.text, self.at).end()
            if self.at < len(self.text) or self.ended:
                return self.text[self.at:self.at + 1]
            self.read()

    def sign(self) -> str:
        sign = self.peek()
        self.at += len(sign)
        return sign

    def value(self):
        while True:
            self.peek()
            last = self.ended or len(self.text) - self.at > self.LONGEST
            try:
                value, stop = self.scan(self.text, self.at)
            except (ValueError, RecursionError):            # not JSON, or cut in two
                if last:
                    raise
            else:
                # else it may be half a number
                if last or self.text[stop:stop + 1] in tuple(", \t\n\r]"):
                    self.at = stop
                    return value
            self.read()


QUERIES = ("all", "sofar", "first")


def item(sample: Sample, pixels: Tensor) -> dict:
    """What a data set yields: dict(pixels, ids, labels, query, turns, ends), `query` being that of
    all turns."""
    return dict(pixels=pixels, ids=sample.ids, labels=sample.labels, query=sample.query,
                turns=sample.turns, ends=sample.ends)


def query_of(turns: list[list[int]], which: str) -> list[int]:
    """The query of a conversation so far, which is all there is of it: its first turn, or all of
    them."""
    return turns[0] if which == "first" else [token for turn in turns for token in turn]


def by_query(sample: dict, which: str) -> list[dict]:
    """The rows to train on when the picture is to be read with `which` questions.

    all: those of the whole conversation, later ones too, as one row (at inference there are only
    those so far: a mismatch). first: the first one, one row. sofar: what inference does; the
    picture's features then change from turn to turn, so every turn becomes a row of its own, which
    learns its answer and has the earlier turns as its past. A conversation of one turn gives the
    same row in all three.
    """
    if which == "all":
        return [sample]
    if which == "first":
        return [{**sample, "query": query_of(sample["turns"], which)}]
    rows, begin = [], 0
    for i, end in enumerate(sample["ends"]):
        labels = [IGNORE] * begin + sample["labels"][begin:end]
        rows.append({
            **sample, "ids": sample["ids"][:end], "labels": labels,
            "query": sum(sample["turns"][:i + 1], [])})
        begin = end
    return rows


def cut(sample: dict, max_length: int, picture_rows: int) -> dict:
    """The sample with ids and labels cut so that the merged row, its picture being picture_rows
    long, fits max_length.

    Done before the batch, not in the model, so that the supervised tokens that are left can be
    counted.
    """
    ids = sample["ids"]
    at = ids.index(IMAGE_TOKEN) if IMAGE_TOKEN in ids else len(ids)
    # the picture whole or not
    keep = max_length if max_length <= at else max(at, max_length - picture_rows + 1)
    return {**sample, "ids": ids[:keep], "labels": sample["labels"][:keep]}


def collate(samples: list[dict], pad_id: int = 0) -> dict[str, Tensor]:
    """Items as one batch, padded on the right: pixels (B, 3, H, W); ids, labels (B, T) and query
    (B, Q) long.

    mask (B, T), query_mask (B, Q) bool: which ids are real. (LLaVA asks for ids != 0, and so loses
    every <unk>.) Q is at least 1, so a batch without any query has a mask of False rather than an
    empty tensor.
    """
    def pad(key: str, fill: int) -> tuple[Tensor, Tensor]:
        lengths = torch.tensor([len(s[key]) for s in samples])                     # (B,)
        width = max(1, int(lengths.max()))
        rows = torch.tensor([s[key] + [fill] * (width - len(s[key])) for s in samples],
                            dtype=torch.long)
        return rows, torch.arange(width)[None] < lengths[:, None]                  # (B, width) both

    (ids, mask), (labels, _), (query, query_mask) = pad("ids",
                                                        pad_id), pad("labels",
                                                                     IGNORE), pad("query", pad_id)
    pixels = torch.stack([s["pixels"] for s in samples])                           # (B, 3, H, W)
    return dict(pixels=pixels, ids=ids, labels=labels, mask=mask, query=query,
                query_mask=query_mask)


# --------------------------------------------------------------------------------------------------
# Looking at it

COLOURS = dict(answer=("\033[32m", "\033[0m"), query=("\033[4;36m", "\033[0m"),
               picture=("\033[7m", "\033[0m"))
# where there are no colours
BRACKETS = dict(answer=("«", "»"), query=("‹", "›"), picture=("[", "]"))


def paint(sample: Sample, tokenizer: Tokenizer, color: bool) -> str:
    """The row as text, with the answers, the queries and the picture's slot marked."""
    marks = COLOURS if color else BRACKETS
    special = {**{t: "</s>" for t in tokenizer.eos_ids}, tokenizer.bos_id: "<s>", IMAGE_TOKEN: SLOT}
    kinds = ["other" if label == IGNORE else "answer" for label in sample.labels]
    for start, stop in sample.spans:
        kinds[start:stop] = ["query"] * (stop - start)
    out, line = [], []     # line: the ids since the last special one
    runs = groupby(zip(sample.ids, kinds), key=lambda pair:
                   (pair[0] if pair[0] in special else None, pair[1]))
    for (token, kind), pairs in runs:
        # decoded after what stands before: alone, they would lose their first space
        if token is None:
            before, line = tokenizer.decode(line), line + [t for t, _ in pairs]
            text = tokenizer.decode(line)[len(before):]
        else:
            text, line = "".join(special[t] for t, _ in pairs), []
        text = "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode()
                       for c in text)
        left, right = marks.get("picture" if token == IMAGE_TOKEN else kind, ("", ""))
        out.append(left + text + right)
    return "".join(out)


def show(samples: list[Sample], tokenizer: Tokenizer, n: int, color: bool = False,
         names: list | None = None) -> None:
    """Print the first n samples as the model meets them, and how much of them it is made to
    predict."""
    (a, b), (c, d) = ((COLOURS if color else BRACKETS)[kind] for kind in ("answer", "query"))
    print(
        f"{a}predicted: the loss counts these tokens{b} {c}the query: what CCRA looks for in the picture{d}"
    )
    for i, sample in enumerate(samples[:n]):
        learnt = sum(label != IGNORE for label in sample.labels)
        print(
            f"\n--- {names[i] if names else i}: {len(sample.ids)} ids, pictures {sample.ids.count(IMAGE_TOKEN)}, "
            f"supervised {learnt} ({learnt / len(sample.ids):.1%}), query {len(sample.query)}")
        print(paint(sample, tokenizer, color))
        if not sample.spans:
            print(f"not in the text: {c}{tokenizer.decode(sample.query)}{d}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    p = commands.add_parser(
        "show", help="print records as the model would be trained on them", description=
        "Check a json and its pictures, then print some records as the model would be trained on them: "
        "what it has to predict in green (or «»), the query underlined (or ‹›).")
    p.add_argument("--json", type=Path, metavar="FILE",
                   help="records in LLaVA's format (default: the embedded world)")
    p.add_argument(
        "--images", type=Path, metavar="DIR",
        help="what the records' picture paths are relative to "
        "(without it nobody looks whether the pictures are there)")
    p.add_argument("--tokenizer", type=Path, metavar="DIR",
                   help="a language model's folder, for its tokenizer")
    p.add_argument("--template", choices=TEMPLATES, default="v1",
                   help="plain: stage 1; v1: stage 2, the default")
    p.add_argument("--n", type=int, default=3, help="how many records (default: %(default)s)")
    p.add_argument("--seed", type=int,
                   help="draw them at random with this seed (default: the first n)")
    p.add_argument("--color", action=argparse.BooleanOptionalAction, default=sys.stdout.isatty(),
                   help="colours or brackets (default: colours on a terminal)")
    from training import prepare  # the one import from the right: for its command alone
    prepare.add_commands(commands)
    args = parser.parse_args()
    if args.command != "show":
        return args.run(args)
    if args.n < 1:
        raise UserError("--n should be at least 1")
    if args.json is None and args.images is not None:
        raise UserError("--images says where the pictures of a --json FILE are, and there is none")
    if args.json is None:
        file = EXAMPLE / ("stage1.json" if args.template == "plain" else "stage2.json")
        tokenizer = Tokenizer.from_pretrained(args.tokenizer or ROOT / "assets" / "toy")
        data = load(file, EXAMPLE, tokenizer, args.template)
    elif args.tokenizer is None:
        raise UserError("data.py show --json needs --tokenizer DIR")
    else:
        data = load(args.json, args.images, Tokenizer.from_pretrained(args.tokenizer),
                    args.template)
    n = min(args.n, len(data))
    picks = range(n) if args.seed is None else random.Random(args.seed).sample(range(len(data)), n)
    show([data.sample(i) for i in picks], data.tokenizer, n, args.color,
         [data.record_id(i) for i in picks])


if __name__ == "__main__":
    run(main)
