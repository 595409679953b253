"""A model's folder before anything in it is believed: whether it is one, whether its files are
files, and what people have in hand instead."""
import os
import stat
from pathlib import Path

from core.common import UserError, read_json

POINTER = b"version https://git-lfs.github.com/spec/v1"
# What is no model, by a file in it
HELD = {
    "adapter_config.json": "holds an adapter (LoRA), not a model; give its base model as --model "
                           "and this as --adapter, or merge them (python -m training.merge)",
    "nanoccra.json": "holds an adapter, not a model; give its base model as --model and this as "
                     "--adapter, or merge them (python -m training.merge)",
    "*.gguf": "holds a GGUF file, which llama.cpp reads; get the model's safetensors",
    "tf_model.h5": "holds TensorFlow's weights; get the model's safetensors",
    "flax_model.msgpack": "holds Flax's weights; get the model's safetensors"}
# Where a model may lie in what was given: the hub's cache of one model, of all; a folder around it
CACHED = ("snapshots/*", "models--*/snapshots/*")
AROUND = ("*",)
CONFIG_BYTES = 2 ** 24
JSON_BYTES = 2 ** 28                       # of an index, of a tokenizer


def present(path: Path, most: int | None = None) -> bool:
    """Whether this file of a model's folder is there. UserError for what is there under its name
    and can't be read as one: a folder, a pipe, a link to nothing, a Git LFS pointer, a file of more
    than `most` bytes."""
    try:
        if not stat.S_ISLNK(os.lstat(path).st_mode) or os.path.exists(path):
            about = os.stat(path)
        else:
            raise UserError(f"{path}: a link to {os.readlink(path)}, which isn't there; copy or "
                            "download the file itself")
        if not stat.S_ISREG(about.st_mode):
            kind = "folder" if stat.S_ISDIR(about.st_mode) else "pipe or device"
            raise UserError(f"{path}: a {kind}; it should be a file")
        with open(path, "rb") as file:
            head = file.read(len(POINTER))
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, ValueError) as e:               # ValueError: such a name is impossible
        raise UserError(f"{path}: cannot read it ({getattr(e, 'strerror', e)})") from e
    if head == POINTER:
        raise UserError(f"{path}: a Git LFS pointer, not the file itself; fetch that: git lfs pull")
    if most is not None and about.st_size > most:
        raise UserError(f"{path}: has {about.st_size:,} bytes, more than such a file can have")
    return True


def check_folder(dir: Path) -> None:
    """UserError if this isn't a folder that can be read."""
    try:
        os.listdir(dir)
    except FileNotFoundError:
        raise UserError(f"{dir}: no such folder (models are read from local folders; download it "
                        "first)") from None
    except NotADirectoryError:
        raise UserError(f"{dir}: a file; give the folder that it lies in") from None
    except (OSError, ValueError) as e:
        raise UserError(f"{dir}: cannot read it ({getattr(e, 'strerror', e)})") from e


def instead(dir: Path) -> str:
    """What a folder without a model is, or where one lies in it; "" if nobody can tell."""
    for file, what in HELD.items():
        if any(dir.glob(file)):
            return what
    for pattern in CACHED + AROUND:
        found = sorted(path.parent for path in dir.glob(f"{pattern}/config.json"))
        if found:
            newest = [path for path in found if _main(path.parents[1]) == path.name]
            what = "is the hub's cache" if pattern in CACHED else "holds other folders"
            return f"{what}; the model's own folder is {(newest or found)[0]}"
    return ""


def _main(cache: Path) -> str:
    """Which snapshot of the hub's cache its main branch is."""
    try:
        return (cache / "refs" / "main").read_bytes()[:100].decode().strip()
    except (OSError, ValueError):
        return ""


def read_config(dir: str | Path) -> dict:
    """The config.json of a model's folder. UserError if there is no such folder or file."""
    dir = Path(dir)
    check_folder(dir)
    if not present(dir / "config.json"):
        raise UserError(
            f"{dir}: {instead(dir) or 'no config.json in this folder, so it is not a model'}")
    return read_json(dir / "config.json", most=CONFIG_BYTES)
