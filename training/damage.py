"""Whether a checkpoint is as it was written: every field of its state.json, every file's sha256,
every tensor's name, type and rows.

Checkpoints of before there were checksums are checked for the rest.
"""
import errno
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from core.common import UserError, read_json
from core.distributed import where

MOMENTS = ("exp_avg", "exp_avg_sq")                 # AdamW's, of every parameter that was updated
# what a disk says of files that aren't as they were; anything else is about this user or machine
BROKEN = {errno.EIO, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.EBADMSG,
          errno.ENODATA}
NUMBERS = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


NO_RNG = "is no state of torch's random numbers"


class Damaged(UserError):
    """What is wrong with a checkpoint: an older one may be whole."""

    @staticmethod
    @contextmanager
    def instead() -> Iterator[None]:
        """Damaged instead of what safetensors, torch and the disk say of damaged files. What only
        isn't readable for this user, or too much for this machine, is another UserError."""
        try:
            yield
        except OSError as e:
            if e.errno not in BROKEN:
                raise UserError(f"{e.filename}: cannot read it ({e.strerror})") from e
            raise Damaged(f"{Path(e.filename or '').name}: {e.strerror}") from e
        except SafetensorError as e:
            raise Damaged(str(e).splitlines()[0]) from e


def rank_file(rank: int) -> str:
    """The name of a process's file."""
    return f"rank-{rank:04d}.safetensors"


def sha256_of(path: Path) -> str:
    """Of a file's bytes. UserError if it can't be read."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as e:
        raise UserError(f"{path}: cannot read it ({e.strerror or e})") from e


def signed(state: dict) -> dict:
    """The content of a state.json with its own sha256 in it."""
    content = {key: value for key, value in state.items() if key != "sha256"}
    text = json.dumps(content, sort_keys=True)
    return {**content, "sha256": hashlib.sha256(text.encode()).hexdigest()}


def whole(value, least: int) -> bool:
    """Whether a value of a JSON file is a whole number, and not less."""
    return type(value) is int and value >= least


def is_shapes(value) -> bool:
    return isinstance(value, dict) and all(
        isinstance(shape, list) and all(whole(n, 0) for n in shape) for shape in value.values())


# Of state.json: what each field has to be. The last two are missing in old ones.
FIELDS = {
    "step": lambda value: whole(value, 1),
    "updates": lambda value: whole(value, 0),
    "processes": lambda value: whole(value, 1),
    "settings": lambda value: isinstance(value, dict),
    "shapes": is_shapes,
    "files": lambda value: isinstance(value, dict),
    "sha256": lambda value: isinstance(value, str),
}
ADDED = ("files", "sha256")


def check_state(folder: Path, step: int) -> dict:
    """A checkpoint's state.json. Damaged if a field, or which files there are, isn't as it was
    written."""
    path = folder / "state.json"
    if not path.is_file():
        raise Damaged("it has no state.json")
    with Damaged.instead():
        path.open("rb").close()
    try:
        state = read_json(path)
    except UserError as e:
        raise Damaged(str(e).removeprefix(f"{folder}/")) from e
    wanted = [key for key in FIELDS if key not in ADDED or any(new in state for new in ADDED)]
    for key in wanted:
        if key not in state or not FIELDS[key](state[key]):
            said = repr(state[key])[:40] if key in state else "missing"
            raise Damaged(f"state.json: {key} is {said}")
    if "sha256" in state and state != signed(state):
        raise Damaged("state.json was changed after it was written")
    if state["step"] != step or state["updates"] > step:
        raise Damaged(f"state.json is of step {state['step']} with {state['updates']} updates")
    there = {file.name for file in folder.glob("rank-*") if file.is_file()}
    if len(there) != state["processes"]:
        raise Damaged(f"{len(there)} files of ranks, written by {state['processes']} processes")
    names = {rank_file(i) for i in range(len(there))}
    for found in (there, set(state.get("files", names))):
        if found != names:
            raise Damaged(f"{min(found ^ names)} is missing, or should not be there")
    return state


def check_files(folder: Path, state: dict) -> None:
    """Damaged if bytes of a rank's file were changed. The processes share the files out."""
    rank, size = where()
    for name, sha256 in sorted(state.get("files", {}).items())[rank::size]:
        with Damaged.instead():
            with open(folder / name, "rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != sha256:
            raise Damaged(f"{name} was changed after it was written")


def first_rows(file, rank: int, state: dict) -> dict[str, int]:
    """What a rank's file says of its tensors: the number of the first row of each."""
    metadata = file.metadata() or {}
    old = "checkpoint" not in metadata
    text = metadata.get("first_rows", "") if old else metadata["checkpoint"]
    try:
        said = {"step": state["step"], "first_rows": json.loads(text)} if old else json.loads(text)
        step, said = said["step"], said["first_rows"]
        fine = all(whole(first, 0) for first in said.values())
    except (LookupError, TypeError, AttributeError, ValueError, RecursionError):
        fine = False
    if not fine:
        raise Damaged(f"{rank_file(rank)}: its metadata isn't a checkpoint's")
    if step != state["step"]:
        raise Damaged(f"{rank_file(rank)} is of step {repr(step)[:20]}")
    if not old and "files" not in state:
        raise Damaged("state.json lacks its checksums")
    if set(said) | {f"rng.{rank}"} != set(file.keys()):
        raise Damaged(f"{rank_file(rank)}: its tensors aren't those that its metadata names")
    return said


def pieces_of(files: list, state: dict, trained: dict[str, Tensor]) -> dict[str, list]:
    """Where a checkpoint's tensors are: name -> [(first row, file)]. Damaged unless each is there
    whole and once, and of the right type."""
    pieces: dict[str, list] = {}
    for rank, file in enumerate(files):
        for name, first in first_rows(file, rank, state).items():
            pieces.setdefault(name, []).append((first, file))
        rng = file.get_slice(f"rng.{rank}")
        if rng.get_dtype() != "U8" or rng.get_shape() != list(torch.get_rng_state().shape):
            raise Damaged(f"rng.{rank} {NO_RNG}")
    for name, p in trained.items():
        moments = [kind for kind in MOMENTS if f"{kind}.{name}" in pieces]
        if moments and (len(moments) < len(MOMENTS) or not state["updates"]):
            raise Damaged(f"{name}: has {' and '.join(moments)} after {state['updates']} updates")
        for kind in ("weight", *moments):
            check_rows(f"{kind}.{name}", p, pieces.get(f"{kind}.{name}", []))
    known = {f"{kind}.{name}" for kind in ("weight", *MOMENTS) for name in trained}
    if foreign := set(pieces) - known:
        raise Damaged(f"{min(foreign)} belongs to no parameter")
    return pieces


def check_rows(name: str, p: Tensor, pieces: list) -> None:
    """Damaged unless these pieces are all rows of a parameter, each once, in its type."""
    at = 0
    rows = [(first, file.get_slice(name)) for first, file in pieces]
    spans = [(first, *view.get_shape()) for first, view in rows]
    for (first, *shape), (_, view) in sorted(zip(spans, rows), key=lambda pair: pair[0][:2]):
        if view.get_dtype() != NUMBERS.get(p.dtype):
            raise Damaged(f"{name} is of type {view.get_dtype()}")
        if p.ndim == 0 and not shape and first == at:
            at += 1
        elif p.ndim and shape[1:] == list(p.shape[1:]) and len(shape) == p.ndim and first == at:
            at += shape[0]
        else:
            raise Damaged(f"{name}: rows are missing or twice there")
    if at != (len(p) if p.ndim else 1):
        raise Damaged(f"{name}: rows are missing")


def set_rng(state: Tensor) -> None:
    """torch's random numbers go on from here. Damaged if that is no state of theirs."""
    try:
        torch.set_rng_state(state)
    except RuntimeError as e:
        raise Damaged(f"rng {NO_RNG}") from e
