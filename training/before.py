"""What can be known before the first step: whether anything will be learnt. Samples that are cut
until nothing is left of their answers, pictures that are gone, steps that are too few."""
import sys

import data
from core.common import UserError
from core.distributed import together, where
from core.tokenizer import IGNORE
from training.readers import limit

USUAL = (2048, 576)      # --max-length, and positions of a picture: LLaVA-1.5's
MAX_RENDERED = 20_000    # records of a --json, about 5 s; beyond that nobody counts
FEW = 10                 # steps, after which a model is hardly another


def check(args, dataset, model) -> None:
    """Say what is lost of this data set, a warning a line. UserError, in all processes, if nothing
    is left, or if too many of a prepared folder's pictures are gone."""
    length = row_length(args, model)
    with together():
        if where()[0] == 0:
            lines = [*cut_short(dataset, length, model.picture_rows), *gone(dataset),
                     *few_steps(args, len(dataset))]
            for line in lines:
                print(f"warning: {line}", file=sys.stderr, flush=True)


def row_length(args, model) -> int:
    """Positions that a row may have. UserError if a picture fills them all."""
    length = min(args.max_length, model.llm.config.max_position_embeddings)
    if length <= model.picture_rows:
        raise UserError(f"{length} positions (--max-length, or the language model's context) "
                        f"leave no room beside the picture's {model.picture_rows}")
    return length


# --------------------------------------------------------------------------------------------------
# Supervised tokens

def learnt(sample: data.Sample, max_length: int, picture_rows: int) -> tuple[int, int]:
    """Supervised tokens of a sample, whole and after `data.cut`."""
    after = data.cut(vars(sample), max_length, picture_rows)["labels"]
    whole = len(sample.labels) - sample.labels.count(IGNORE)
    return whole, len(after) - after.count(IGNORE)


class Cut:
    """How many samples lose some of their supervised tokens to a length, and how many all."""

    def __init__(self):
        self.samples = self.some = self.all = 0

    def count(self, whole: int, left: int) -> None:
        self.samples += 1
        self.some += 0 < left < whole
        self.all += left == 0

    def to_dict(self) -> dict:
        """For report.json."""
        return {"what": "samples that lose supervised tokens beyond {} positions, {} of them a "
                        "picture's".format(*USUAL), "some": self.some, "all": self.all}

    def line(self, max_length: int, picture_rows: int) -> str:
        """What is lost, in words; empty for nothing."""
        if not self.some and not self.all:
            return ""
        return (f"of {self.samples} samples {self.some} lose a part of their answers beyond "
                f"{max_length} positions (--max-length, or the model's context), {picture_rows} of "
                f"them a picture's, and {self.all} lose all: nothing is learnt from these")


def cut_short(dataset, max_length: int, picture_rows: int) -> list[str]:
    """What rows of max_length lose, as lines to be said. UserError if nothing is left to learn."""
    if not hasattr(dataset, "picture_count"):            # the toy world's rows are short
        return []
    if hasattr(dataset, "cut"):
        cut = dataset.cut(max_length, picture_rows)
    elif len(dataset) > MAX_RENDERED:
        return [f"what --max-length {max_length} cuts off was not counted: that takes too long for "
                f"more than {MAX_RENDERED:,} records (`python data.py prepare` counts it)"]
    else:
        cut = Cut()
        for i in range(len(dataset)):
            cut.count(*learnt(dataset.sample(i), max_length, picture_rows))
    line = cut.line(max_length, picture_rows)
    if cut.all == cut.samples:
        raise UserError(f"{line}, and nothing is left; give a larger --max-length, or shorter "
                        "questions")
    return [line] if line else []


# --------------------------------------------------------------------------------------------------
# Pictures, steps

def gone(dataset) -> list[str]:
    """Pictures of a prepared folder that aren't there any more, as a line. (data.load has looked at
    those of a json.) UserError for too many."""
    if not hasattr(dataset, "first_gone"):
        return []
    count, first = dataset.first_gone()
    if count > limit(dataset.picture_count()):
        raise UserError(f"{count} of {dataset.picture_count()} pictures are missing under "
                        f"{dataset.image_root}; first: {first}; say where they are (--images DIR)")
    if count:
        return [f"{count} pictures are missing under {dataset.image_root}; first: {first}; nothing "
                "is learnt from their samples"]
    return []


def few_steps(args, samples: int) -> list[str]:
    """What to give for a small set of one's own, as a line: one epoch of it in LLaVA's batches is a
    step or two."""
    steps = -(-samples // args.batch)
    if args.steps is not None or steps > FEW or args.world == "toy":
        return []
    batch = min(args.batch, max(1, samples // 5))
    return [f"{samples} samples make {steps} {'step' if steps == 1 else 'steps'} of at most "
            f"{args.batch}: the model comes out nearly as it went in; for more give a smaller "
            f"--batch and more --steps, e.g. --batch {batch} --steps {10 * -(-samples // batch)} "
            "for ten epochs"]
