"""Pictures in rows of tokens: where they stand, how they are put in, how rows are padded."""
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from core.common import UserError
from core.tokenizer import IGNORE, IMAGE_TOKEN


def pad(rows: list[Tensor], side: str, value: float) -> Tensor:
    """Rows (t, ...) of several lengths t as one tensor (B, longest, ...). side: left or right."""
    return pad_sequence(rows, batch_first=True, padding_value=value, padding_side=side)


def check_text(ids: Tensor, mask: Tensor, vocab_size: int) -> None:
    """UserError for ids (B, Q) of a query that aren't text. mask (B, Q) bool: real ones."""
    if (((ids < 0) | (ids >= vocab_size)) & mask).any():
        raise UserError("the query holds an id outside of the vocabulary; it takes text only, "
                        "without the picture's place")


def places(ids: Tensor, mask: Tensor, vocab_size: int) -> list[tuple[int, int, int]]:
    """(start, stop, at) of every row: its real ids are ids[start:stop], IMAGE_TOKEN is ids[at], and
    at is -1 where there is none.

    ids (B, T), mask (B, T) bool: real ones, without gaps. UserError for more than one IMAGE_TOKEN
    in a row, and for ids that would crash a GPU without a message. It waits once for the device.
    """
    picture = (ids == IMAGE_TOKEN) & mask                                          # (B, T)
    foreign = ((ids < 0) | (ids >= vocab_size)) & mask & ~picture                  # (B, T)
    start = mask.int().argmax(1)                                                   # (B)
    at = torch.where(picture.any(1), picture.int().argmax(1), -1)                  # (B)
    columns = start, start + mask.sum(1), at, foreign.sum(1), picture.sum(1)
    rows = torch.stack(columns, 1).tolist()
    if any(n_foreign for *_, n_foreign, _ in rows):
        raise UserError(f"an id is outside of the vocabulary of {vocab_size} (and not IMAGE_TOKEN)")
    if any(n_pictures > 1 for *_, n_pictures in rows):
        raise UserError("a row has more than one IMAGE_TOKEN; this model takes one picture")
    return [(start, stop, at) for start, stop, at, *_ in rows]


def splice(text: Tensor, visual: Tensor | None, spans: list[tuple[int, int, int]],
           labels: Tensor | None = None, side: str = "right",
           max_length: int | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Every row's embeddings with its picture's rows in the place of IMAGE_TOKEN.

    text (B, T, D); visual (B, N', D), or None: no pictures; spans: of `places`; labels (B, T).
    Returns embeds (B, T', D), real (B, T') bool and labels (B, T') or None, IGNORE on the picture
    and on padding; rows cut at max_length, padded on one side.
    """
    if visual is None and any(at >= 0 for _, _, at in spans):
        raise UserError("a row has an IMAGE_TOKEN, but there are no pixels")
    rows, targets = [], []
    for i, (start, stop, at) in enumerate(spans):
        if at < 0:
            before, after = slice(start, stop), slice(stop, stop)
            n = 0
        else:
            before, after = slice(start, at), slice(at + 1, stop)
            n = visual.shape[1]                                                    # N'
        row = [text[i, before], text[i, after]]
        if visual is not None:
            # Nothing of it is shown in a row without a picture, but the graph keeps it: in sharded
            # training a rank that leaves out the vision tower would keep the others waiting.
            row.insert(1, visual[i, :n].to(text.dtype))                            # (n, D)
        rows.append(torch.cat(row)[:max_length])
        if labels is not None:
            ignored = labels.new_full((n,), IGNORE)
            target = torch.cat([labels[i, before], ignored, labels[i, after]])
            targets.append(target[:max_length])
    real = [torch.ones_like(row[:, 0], dtype=torch.bool) for row in rows]
    labels = pad(targets, side, IGNORE) if targets else None
    return pad(rows, side, 0), pad(real, side, False), labels
