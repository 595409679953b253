"""TODO training/padding.py"""
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from core.common import UserError, split
from training.order import GROUPS, order
from training.prepared import map_arrays, merged, words_of

# --------------------------------------------------------------------------------------------------
# What grouping saves

# LLaVA's mix of 665,298: records by source, and what we take their turns and the ids of a question and of an answer to
# be like. The numbers of records are its authors'; the rest is assumed, only in order to have something to measure.
MIX = {     # folder, records, turns from-to, ids of a question, ids of an answer
    "LLaVA": ("coco/train2017", 157_712, (1, 5), 15, 60), "ShareGPT": (None, 40_688, (1, 6), 60, 300),
    "VQAv2": ("coco/train2017", 82_783, (1, 9), 8, 3), "GQA": ("gqa/images", 72_140, (1, 25), 10, 3),
    "OKVQA": ("coco/train2017", 8_998, (1, 1), 25, 3), "OCRVQA": ("ocr_vqa/images", 80_000, (3, 6), 12, 8),
    "A-OKVQA": ("coco/train2017", 66_160, (1, 2), 60, 3), "TextCaps": ("textvqa/train_images", 21_953, (1, 1), 60, 15),
    "RefCOCO": ("coco/train2017", 48_447, (1, 8), 30, 25), "VG": ("vg/VG_100K", 86_417, (5, 15), 30, 15)}
FRAME, PER_TURN = 35, 8         # ids of the system text; of USER:, ASSISTANT: and </s>


def mixture(seed: int = 0, scale: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """words (n,), pictures (n,) bool of a data set like MIX."""
    rng, words, pictures = np.random.default_rng(seed), [], []
    for folder, count, (low, high), question, answer in MIX.values():
        turns = rng.integers(low, high + 1, round(count * scale))
        said = rng.lognormal(0, 0.5, (len(turns), high)) * (question + answer) / math.exp(0.125) + PER_TURN
        words.append(FRAME + np.where(np.arange(high) < turns[:, None], said, 0).sum(1).astype(np.int64))
        pictures.append(np.full(len(turns), folder is not None))
    return np.concatenate(words), np.concatenate(pictures)


def padding(steps: Iterator[list], lengths: np.ndarray, ranks: int, micro: int) -> tuple[float, float]:
    """(padding, idle): the share of the computed positions that is padding; and the share of all processes' time, if
    it goes by positions, that is padding or waiting for the one with the widest micro-batch."""
    real = computed = waited = 0
    for rows in steps:
        of_step = lengths[rows]
        real += int(of_step.sum())
        shares = [[len(piece) * int(max(piece)) for piece in split(of_step[rank::ranks].tolist(), micro)]
                  for rank in range(ranks)]
        computed += sum(map(sum, shares))
        waited += ranks * sum(max(share[i] if i < len(share) else 0 for share in shares) for i in range(len(shares[0])))
    return 1 - real / computed, 1 - real / waited


def compare(args) -> None:
    """The table of `data.py padding`."""
    if args.lengths == "synthetic":
        words, pictures = mixture(args.seed)
        lengths = merged(words, np.where(pictures, FRAME, -1), args.picture_rows, args.max_length)
    else:
        folder = Path(args.lengths)
        if not (folder / "report.json").is_file():
            raise UserError(f"{folder}: not a prepared folder; give one, or `synthetic`")
        arrays = map_arrays(folder)
        words, pictures = words_of(arrays), arrays["at"] >= 0
        lengths = merged(words, arrays["at"], args.picture_rows, args.max_length)
    n, cut = len(lengths), int((lengths < words + np.where(pictures, args.picture_rows - 1, 0)).sum())
    print(f"{n:,} samples, {int((~pictures).sum()):,} without a picture; positions: mean {lengths.mean():.0f}, median "
          f"{np.median(lengths):.0f}, longest {lengths.max()}; {cut:,} cut to {args.max_length}")
    print(f"batches of {args.batch} on {args.ranks} processes, {args.micro} samples at a time:")
    for group in GROUPS:
        steps = order(n, math.ceil(n / args.batch), args.batch, args.seed, group, lengths, pictures)
        pad, idle = padding(steps, lengths, args.ranks, args.micro)
        print(f"  --group {group:16} padding {pad:6.1%}   padding or waiting {idle:6.1%}")
