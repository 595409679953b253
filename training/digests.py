"""What a model is known by again: a sha256 of each of its parts, and a fingerprint that doesn't
have to read it all.

Both go by our own names of tensors, so the same weights count as the same in whatever layout they
lie on the disk.
"""
import hashlib
import json
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from ccra import VLM, outline
from core.common import cores
from core.distributed import note
from core.layouts import open_vlm
from core.tokenizer import Tokenizer

PARTS = {"vision": "picture tower", "fuser": "fuser", "projector": "projector",
         "llm": "language model"}
PIECES, PIECE = 8, 4096       # of a tensor that a fingerprint reads: how many, of how many bytes
# Text that tokenizers of different vocabularies cut differently
PROBE = ("USER: What's in the picture, 12345 of them? ASSISTANT: Two\n\tzebras; naïve façades at "
         "18:30 — 東京, Ελλάδα, привет 🙂 </s>")


def digest(content) -> str:
    """The sha256 of something that JSON can hold."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def all_bytes(p: Tensor) -> Tensor:
    """A tensor's bytes."""
    return p.detach().contiguous().reshape(-1).view(torch.uint8)


def some_bytes(p: Tensor) -> Tensor:
    """A few pieces of them, evenly spaced from the first to the last."""
    raw = all_bytes(p)
    if len(raw) <= PIECES * PIECE:
        return raw
    starts = torch.linspace(0, len(raw) - PIECE, PIECES, dtype=torch.float64).long().tolist()
    return torch.cat([raw[at:at + PIECE] for at in starts])


def by_part(tensors: Iterable[tuple[str, Tensor]],
            read: Callable[[Tensor], Tensor]) -> dict[str, str]:
    """A sha256 for each part of a model: of its tensors' names, types, shapes, and of what `read`
    takes of their bytes."""
    def one(named: tuple[str, Tensor]) -> list:
        name, p = named
        return [name, str(p.dtype), list(p.shape), hashlib.sha256(read(p).numpy()).hexdigest()]

    with ThreadPoolExecutor(cores()) as pool:
        rows = list(pool.map(one, tensors))
    parts = {}
    for row in rows:
        parts.setdefault(PARTS[row[0].partition(".")[0]], []).append(row)
    return {part: digest(sorted(rows)) for part, rows in parts.items()}


def digests(tensors: list[tuple[str, Tensor]],
            why: str = "that this run begins with, to know them again") -> dict[str, str]:
    """`by_part`, of all bytes: 0.4 to 2 GB a second and core. why: what is said of large models,
    which take their time."""
    size = sum(p.nbytes for _, p in tensors)
    if size > 4e9:
        note(f"reading the {size / 1e9:.0f} GB {why}")
    return by_part(tensors, all_bytes)


# --------------------------------------------------------------------------------------------------
# A folder's

def stored(dir: str | Path, vision: str | Path | None = None) -> list[tuple[str, Tensor]]:
    """(own name, tensor as it is stored, mapped) of a vision-language model's folder; vision: its
    picture tower's, if that lies elsewhere. UserError for what isn't one."""
    folder, tower = open_vlm(dir, vision)
    found = [(own, folder.tensors[public]) for own, public in folder.needed().items()]
    if tower is not None and not folder.holds("vision"):
        found += [(own, tower.tensors[public]) for own, public in tower.needed().items()
                  if own.startswith("vision.")]
    return found


def of_fuser(model: VLM) -> str:
    """Which fuser a model has, and how it is set up."""
    return digest([model.fuser.name, asdict(model.fuser.config)])


def beside(dir: str | Path, vision: str | Path | None = None) -> dict[str, str]:
    """What isn't weights: how the towers and the fuser are set up, and how the tokenizer cuts text
    (one vocabulary lies in files of several kinds)."""
    model = outline(*open_vlm(dir, vision))
    tokenizer = Tokenizer.from_pretrained(dir)
    llm = model.llm.config.to_dict()
    for ends in ("bos_token_id", "eos_token_id"):    # the tokenizer's; some files leave them out
        llm.pop(ends)
    cut = [tokenizer.encode(PROBE), tokenizer.vocab_size, tokenizer.bos_id,
           sorted(tokenizer.eos_ids)]
    return {"configuration": digest([asdict(model.vision.config), llm]),
            "tokenizer": digest(cut), "kind of fuser": of_fuser(model)}


def fingerprint(dir: str | Path, vision: str | Path | None = None) -> dict[str, str]:
    """A folder's parts, by a few pieces of each tensor: megabytes are read, whatever its size. It
    tells other models apart, not a number that was changed by hand."""
    return {**by_part(stored(dir, vision), some_bytes), **beside(dir, vision)}


def sha256(dir: str | Path, vision: str | Path | None = None,
           known: dict[str, str] | None = None) -> dict[str, str]:
    """A folder's parts, by all of their bytes. known: of parts that needn't be read again."""
    known = known or {}
    unread = [(name, p) for name, p in stored(dir, vision)
              if PARTS[name.partition(".")[0]] not in known]
    return {**known, **digests(unread, f"of {dir}, to know them again"), **beside(dir, vision)}
