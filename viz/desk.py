"""What a page asks: pictures that are kept, questions that wait, and answers with their maps.

The models work in one thread, the one that calls `work`, a question at a time: so there is no lock
to forget, and a model is as fast and as exact as in sample.py. Everything else may be called from
any thread.
"""
import hashlib
import io
import sys
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from queue import SimpleQueue
from typing import Annotated

from PIL import Image
from torch import Tensor

from ccra import CCRA, PARTS, USED, VLM
from core.common import UserError, one_line, visible
from core.fields import Range, check, table_of
from core.flags import MANY
from core.pictures import read
from core.records import Turns, encodable
from data import Sample
from toy import world as toy
from viz import explorer, maps
from viz.asking import Asker

KEPT = 32                 # pictures
WAITING = 8               # questions
TURNS = 1000              # of a conversation
BYTES = 20_000_000        # of a picture's file


class Refused(UserError):
    """What can't be done. status: HTTP's number for why."""

    def __init__(self, status: int, line: str):
        super().__init__(line)
        self.status = status


@dataclass
class Picture:
    """A picture as the models take it. Of those that are alike to two models there is one copy."""
    pixels: dict[tuple, Tensor]                      # {`how` of a model: (3, size, size)}
    shown: dict[bool, tuple[Image.Image, maps.Box]]  # {padded: maps.visible, but not larger than
                                                     # a page shows it}
    notes: list[list[str]]                           # of each model


@dataclass
class Asked:
    """What a page sends to ask."""
    picture: str                           # its ID
    turns: list[list[str]]                 # [[question, answer], ...] so far
    question: str
    temperature: Annotated[float, Range(0, 100)]
    max_new_tokens: Annotated[int, Range(1, MANY)]
    off: list[Annotated[str, PARTS]]       # parts of CCRA that are neutral for this answer
    model: Annotated[int, Range(0, 1000)]

    def __post_init__(self):
        check(vars(self), table_of(Asked), "this question")
        if 0 < self.temperature < 1e-6:
            raise UserError(f"temperature = {self.temperature:g} should be 0, or 1e-06 or more")
        if any(len(turn) != 2 for turn in self.turns) or len(self.turns) > TURNS:
            raise UserError(f"turns should be at most {TURNS} pairs of question and answer")
        if not all(encodable(answer) for _, answer in self.turns):
            raise UserError("an answer in turns isn't valid Unicode")

    def conversation(self) -> Turns:
        """As for data.prompt."""
        return [(question, answer or " ") for question, answer in self.turns] + [
            (self.question, None)]


@dataclass(eq=False)
class Question:
    """One that waits or is answered. lines: what the page is told, as it comes; the last one has
    "done" or "error"."""
    asker: Asker
    picture: Picture
    asked: Asked
    row: Sample
    lines: SimpleQueue
    before: int = 0                        # questions, as the page was told
    complete: bool = False                 # all lines are told
    stopped: bool = False                  # nobody waits for them any more


def how(model: VLM) -> tuple:
    """What decides which pixels a model gets of a picture."""
    return model.image["size"], model.image["pad"]


def parts(model: VLM) -> list[str]:
    """The parts of CCRA that a model uses."""
    if not isinstance(model.fuser, CCRA):
        return []
    config = model.fuser.config
    return [part for part in USED[config.order] if getattr(config, part)]


@contextmanager
def neutral(model: VLM, off: list[str]) -> Iterator[None]:
    """Some of these parts are neutral inside, as Table 4's ablations are."""
    off = [part for part in parts(model) if part in off]
    try:
        for part in off:
            setattr(model.fuser.config, part, False)
        yield
    finally:
        for part in off:
            setattr(model.fuser.config, part, True)


class Desk:
    """Models, the first one the main one, and what is asked of them."""

    def __init__(self, askers: list[Asker]):
        self.askers, self.pictures = askers, OrderedDict()
        self.line: deque[Question] = deque()
        self.busy = False
        self.changed = threading.Condition()         # line, busy and pictures are read under it
        self.decoding = threading.Lock()             # a large picture takes a gigabyte
        self.scenes = 0
        for asker in askers:
            asker.anew = "begin anew"

    def about(self) -> dict:
        """What the page has to know."""
        main, args = self.askers[0], self.askers[0].args
        return dict(models=[asker.name for asker in self.askers], toy=main.toy,
                    max_new_tokens=args.max_new_tokens, temperature=args.temperature,
                    parts=parts(main.model), limits=dict(bytes=BYTES))

    # Pictures

    def take(self, content: bytes) -> dict:
        """Keep a picture file's content. What the page is told of it. Refused if it is none."""
        try:
            with self.decoding:
                image, notes = read(content, upright=True)
                picture = self.prepared(image, notes)
        except (UserError, MemoryError) as e:
            raise Refused(415, str(e) or "this picture is too large") from None
        id = hashlib.sha256(content).hexdigest()
        with self.changed:
            self.pictures[id] = picture
            self.pictures.move_to_end(id)
            while len(self.pictures) > KEPT:
                self.pictures.popitem(last=False)
        shown, _ = picture.shown[self.askers[0].model.image["pad"]]
        return dict(picture=id, image=explorer.data_url(shown), size=shown.size,
                    notes=picture.notes[0])

    def prepared(self, image: Image.Image, notes: list[str]) -> Picture:
        """A picture for all models. notes: of reading it."""
        pixels, shown = {}, {}
        for asker in self.askers:
            model, pad = asker.model, asker.model.image["pad"]
            if how(model) not in pixels:
                pixels[how(model)] = asker.pixels(image)
            if pad not in shown:
                seen, box = maps.visible(image, pad)
                shown[pad] = explorer.small(seen), box
        return Picture(pixels, shown, [notes + asker.foreign(image) for asker in self.askers])

    def scene(self) -> dict:
        """A new picture of the toy world, kept like any other, and what is in it."""
        with self.changed:
            self.scenes += 1
            key = f"page/{time.time_ns()}/{self.scenes}"
        scene, file = toy.make_scene(key), io.BytesIO()
        toy.draw(scene).save(file, format="PNG")
        return {**self.take(file.getvalue()),
                "caption": ", ".join(thing.text() for thing in scene.things)}

    # Questions

    def ask(self, body: dict) -> Question:
        """Let a question wait for its answer. Refused if it can't be asked."""
        args = self.askers[0].args
        defaults = dict(turns=[], temperature=args.temperature, off=[], model=0,
                        max_new_tokens=args.max_new_tokens)
        try:
            asked = Asked(**{name: body.get(name, defaults.get(name)) for name in table_of(Asked)})
            if asked.model >= len(self.askers) or asked.max_new_tokens > args.max_new_tokens:
                raise UserError(f"here are models 0 to {len(self.askers) - 1}, which answer with "
                                f"at most {args.max_new_tokens} tokens")
            asker = self.askers[asked.model]
            row = asker.row(asked.conversation())
            if asker.room(row) < 1:
                raise UserError(f"the question is too long: {asker.context - asker.room(row)} "
                                f"positions with the picture, the language model has "
                                f"{asker.context}")
        except UserError as e:
            raise Refused(400, str(e)) from None
        with self.changed:
            picture = self.pictures.get(asked.picture)
            if picture is None:
                raise Refused(404, "choose the picture again: it isn't kept any more")
            if len(self.line) >= WAITING:
                raise Refused(429, f"{WAITING} questions are waiting already; ask again later")
            self.pictures.move_to_end(asked.picture)
            question = Question(asker, picture, asked, row, SimpleQueue())
            self.line.append(question)
            self.tell()
            self.changed.notify_all()
        return question

    def leave(self, question: Question) -> None:
        """Nobody waits for this answer any more, or it is complete."""
        question.stopped = True
        with self.changed:
            if question in self.line:
                self.line.remove(question)
                self.tell()

    def tell(self) -> None:
        """Tell those that wait how many are before them, where that is new."""
        for before, question in enumerate(self.line, self.busy):
            if question.before != before:
                question.before = before
                question.lines.put(dict(wait=before))

    # Answers

    def work(self) -> None:
        """Answer for ever, in the thread that calls."""
        while True:
            with self.changed:
                self.busy = False
                while not self.line:
                    self.changed.wait(0.5)           # Windows lets no Ctrl-C into a longer one
                question, self.busy = self.line.popleft(), True
                self.tell()
            self.answer(question)

    def answer(self, question: Question) -> None:
        """Its lines. An error is one, too, and the next question can be answered."""
        try:
            for line in answered(question):
                question.lines.put(line)
        except UserError as e:
            question.lines.put(dict(error=str(e)))
        except Exception as e:                       # as torch's, of memory
            line = one_line(f"{type(e).__name__}: {e}", 300)
            print(f"error: a question has no answer: {visible(line)}", file=sys.stderr)
            question.lines.put(dict(error=line))


def answered(question: Question) -> Iterator[dict]:
    """The answer's pieces as they come, and what was looked at. It ends with the token during which
    the question was left."""
    asker, asked, picture = question.asker, question.asked, question.picture
    batch = asker.batch(question.row, picture.pixels[how(asker.model)])
    tokens, times, answer = [], [], ""
    began = time.perf_counter()
    ids = asker.generate(batch, tokens, times, temperature=asked.temperature,
                         max_new_tokens=asked.max_new_tokens)
    with neutral(asker.model, asked.off), maps.watch(asker.model) as seen:
        for piece in asker.tokenizer.stream(until_left(ids, question)):
            answer += piece
            yield dict(text=piece)
    if question.stopped:
        return
    cut = None
    if tokens and len(tokens) >= min(asker.room(question.row), asked.max_new_tokens):
        cut = asker.cut(len(tokens), asked.max_new_tokens)
    sight, why = looked(question, seen, batch, tokens)
    first, last = (times[0], times[-1]) if times else (began, time.perf_counter())
    main = asked.model == 0                          # whose notes came with the picture
    yield dict(done=True, text=answer, cut=cut, seconds=round(last - began, 4),
               first=round(first - began, 4), sight=sight, why=why,
               notes=[] if main else picture.notes[asked.model])


def until_left(ids: Iterator[int], question: Question) -> Iterator[int]:
    for id in ids:
        if question.stopped:
            return
        yield id


def looked(question: Question, seen: maps.Seen, batch: dict[str, Tensor],
           tokens: list[int]) -> tuple[dict | None, str | None]:
    """(what the page draws, None), or (None, why there is nothing to draw). batch, tokens: as for
    Seen.sight."""
    asker = question.asker
    image, box = question.picture.shown[asker.model.image["pad"]]
    try:
        sight = seen.sight(asker.model, asker.tokenizer, image, question.asked.question, batch,
                           tokens, asker.name)
    except UserError as e:
        return None, str(e)
    return explorer.sight_data(replace(sight, image=image, box=box)), None
