"""Weights on disk: find them, rename them, check every one, put them into a module, write them
back.

All models here read and write the public layout: a folder with config.json and safetensors files
(older ones: pickles, .bin), where each tensor has the name that Hugging Face's transformers gave
it. core/layouts.py knows how a public name maps to ours (`rename`) and which public tensors are of
no use (`unneeded`); everything else is done by `load`, which is strict. A tensor that is missing,
unknown, twice there or of the wrong shape ends the program with one line that names it. A model
with one layer left at random looks almost right, and that costs days; an error costs a minute.

Files are mapped, not read: a tensor that keeps its number format is the file's own memory, paged in
where it is used, and what is written to it later never reaches the file. So a large model is there
at once, without a second copy.
"""
import ctypes
import mmap
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatchcase
from itertools import chain
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from tqdm import tqdm

from core.common import UserError, discard, make_folder, read_json, write_beside, write_json
from core.device import BIG
from core.fields import fits, shown
from core.folders import JSON_BYTES, instead, present

SINGLE = "model.safetensors"               # one file with everything in it, or ...
INDEX = "model.safetensors.index.json"     # ... a table "tensor -> shard" beside the shards
PICKLE = "pytorch_model.bin"               # the same before safetensors, by torch.save
STORES = ((SINGLE, INDEX), (PICKLE, "pytorch_model.bin.index.json"))
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)      # that models compute in


def is_zip(path: Path) -> bool:
    """What torch.save writes since 1.6 is a zip archive, and can be mapped."""
    with open(path, "rb") as file:
        return file.read(4) == b"PK\x03\x04"


def unpickle(path: Path) -> dict[str, Tensor]:
    """The tensors of a file that torch.save wrote, mapped if the format allows it.

    A pickle is a program. torch.load(weights_only=True) runs none of it but what makes plain data;
    a file that wants more, is cut short or holds anything but named tensors is a UserError.
    """
    try:
        with warnings.catch_warnings():                  # of torch, about the file's age
            warnings.simplefilter("ignore")
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip(path))
    except Exception as e:       # UnpicklingError, RuntimeError, EOFError, IndexError and others
        raise UserError(f"{path}: not a complete file of plain tensors ({_reason(path, e)}); "
                        "download it again, or get its safetensors") from e
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__}, not tensors by name")
    for name, tensor in content.items():
        if not isinstance(name, str) or not _plain(tensor):
            raise UserError(f"{path}: {shown(name)} is not a plain tensor "
                            f"({type(tensor).__name__})")
    return {name: tensor.detach() for name, tensor in content.items()}


def _plain(tensor) -> bool:
    return (isinstance(tensor, Tensor) and tensor.layout == torch.strided
            and tensor.device.type == "cpu" and not tensor.is_quantized)


def _reason(path: Path, error: Exception) -> str:
    """What torch.load found, in our words. Its own are a page, and advise to run what is there."""
    if isinstance(error, OSError) and error.strerror:
        return f"cannot read it: {error.strerror}"
    if path.stat().st_size == 0:
        return "it is empty"
    if wants := re.search(r"GLOBAL ([\w.]+)", str(error)):
        return f"it wants to run {wants[1]}"
    return "it is cut short, damaged, or something else"


def drop_pages(tensor: Tensor) -> None:
    """Give back the memory of a mapped tensor that was read: the file still has it. (Other systems
    than Linux do so when memory runs short.) Never for memory that isn't a file's, and never after
    writing to it."""
    if sys.platform != "linux":
        return
    page = mmap.PAGESIZE         # rounded inwards: the outermost pages have other owners, too
    start = -(-tensor.data_ptr() // page) * page
    end = (tensor.data_ptr() + tensor.nbytes) // page * page
    if end > start:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start),
                                  mmap.MADV_DONTNEED)


class Tensors(Mapping):
    """A folder's tensors by public name. Opening reads only headers; `self[name]` maps that one.

    Accepts model.safetensors, or model.safetensors.index.json with its shards; if there is neither,
    pytorch_model.bin or its index with shards. Opening checks that every file is complete and that
    index and shards agree about who holds what, so nothing can go wrong halfway through a load.
    """

    def __init__(self, dir: str | Path):
        self.dir = Path(dir)
        self.handles: dict[Path, safe_open | dict] = {}         # file -> open file
        self.files: dict[str, Path] = {}                        # tensor -> file that holds it
        # the hub often keeps .bin beside safetensors
        for store in STORES:
            found = [self.dir / name for name in store if present(self.dir / name)]
            if found:
                break
        else:
            names = ", ".join(name for store in STORES for name in store)
            what = instead(self.dir) or f"no weights here (looked for {names})"
            raise UserError(f"{self.dir}: {what}")
        if len(found) == 2:
            raise UserError(f"{self.dir}: holds both {store[0]} and {store[1]}; remove the one "
                            "that is outdated")
        index = found[0]
        if index.name == store[0]:
            self._open(index)
            return
        table = self._read_index(index)
        for path in sorted(set(table.values())):
            self._open(path)
        self._compare(table, index)

    @staticmethod
    def _read_index(path: Path) -> dict[str, Path]:
        table = read_json(path, most=JSON_BYTES).get("weight_map")
        if not fits(table, dict[str, str]):
            raise UserError(f'{path}: no "weight_map" from tensor names to file names')
        for name, file in table.items():
            if Path(file).name != file:              # an index must not reach out of its folder
                raise UserError(f"{path}: {name} is said to be in {file!r}, which is not a plain "
                                "file name")
        return {name: path.parent / file for name, file in table.items()}

    def _open(self, path: Path) -> None:
        if not present(path):
            raise UserError(f"{path}: this shard is missing (the index names it)")
        if path.suffix == ".bin":
            self.handles[path] = unpickle(path)
        else:
            try:
                self.handles[path] = safe_open(path, framework="pt", device="cpu")
            # cut short by a broken download, or not safetensors at all
            except (SafetensorError, OSError) as e:
                raise UserError(f"{path}: not a complete safetensors file ({e}); download or copy "
                                "it again") from e
        for name in self.handles[path].keys():
            if name in self.files:
                raise UserError(f"{path}: {name} is also in {self.files[name].name}")
            self.files[name] = path

    def _compare(self, table: dict[str, Path], index: Path) -> None:
        for name, path in table.items():
            if self.files.get(name) != path:
                raise UserError(f"{index}: says that {name} is in {path.name}, but that file "
                                "doesn't hold it")
        for name, path in self.files.items():
            if name not in table:
                raise UserError(f"{path}: holds {name}, which {index.name} doesn't list")

    def __getitem__(self, name: str) -> Tensor:
        handle = self.handles[self.files[name]]          # mapped either way
        if isinstance(handle, dict):
            return handle[name]
        try:
            return handle.get_tensor(name)
        except Exception as e:                           # a number format that torch hasn't
            raise UserError(f"{self.files[name]}: {name} can't be read ({e})") from e

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def __len__(self) -> int:
        return len(self.files)

    def __contains__(self, name) -> bool:              # Mapping's own would map the tensor
        return name in self.files

    def shape(self, name: str) -> tuple[int, ...]:
        """The tensor's shape; no number is read for it."""
        return tuple(self[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        """The tensor's number format."""
        return self[name].dtype

    def nbytes(self, name: str) -> int:
        """How many bytes of the files it takes."""
        return self[name].nbytes

    def file(self, name: str) -> Path:
        """The file that holds it."""
        return self.files[name]

    def drop(self, name: str) -> None:
        """The tensor was read and copied: its pages may go."""
        if self.file(name).suffix == ".safetensors" or is_zip(self.file(name)):    # so it is mapped
            drop_pages(self[name])


class OneFile(Tensors):
    """The tensors of one safetensors file, whatever it is called. UserError if it isn't one."""

    def __init__(self, path: Path):
        self.dir, self.handles, self.files = path, {}, {}
        self._open(path)


def stored_files(dir: str | Path) -> list[Path]:
    """The files of the folder's weights: those that would be loaded."""
    for kind in ("safetensors", "bin", "pth"):
        if files := sorted(Path(dir).glob(f"*.{kind}")):
            return files
    return []


def stored_bytes(dir: str | Path) -> int:
    """How large the folder's weights are."""
    return sum(file.stat().st_size for file in stored_files(dir))


class _NoNumbers(TorchFunctionMode):
    """torch.nn.init does nothing: on meta it would import torch's compiler, 1.6 seconds, to draw no
    numbers."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


@contextmanager
def skeleton():
    """`with skeleton():` builds modules for `load` to fill: shapes without memory and without
    initial values."""
    with torch.device("meta"), _NoNumbers():
        yield


def load(module: nn.Module, tensors: Tensors, rename: Callable[[str], str | None],
         unneeded: tuple[str, ...] = (), dtype: torch.dtype | None = None,
         device: str | torch.device | None = None) -> nn.Module:
    """Fill a module that was built under `with skeleton()`, tensor by tensor. Returns it.

    rename: public name -> name in the module, or None for a name it doesn't know. unneeded: shell
    patterns of public names that are known and left out. Anything else must land in the module.
    dtype, device: of the filled module; floating tensors are cast (None keeps what the file has,
    and costs no memory). A part of the module that is filled already, so isn't on meta any more,
    isn't missing. Raises UserError naming tensor and file when something is missing, unknown, twice
    there or of another shape.
    """
    owners = _owners(module)
    plan = _plan(module, owners, tensors, rename, unneeded)
    total = sum(map(tensors.nbytes, plan.values()))
    seen = set()                                             # addresses
    # disable=None: no bar where nobody watches, that is, if stderr isn't a terminal
    with tqdm(desc=f"loading {tensors.dir.name}", total=total, unit="B", unit_scale=True,
              file=sys.stderr, disable=None if total >= BIG else True, leave=False) as bar:
        for first, public in plan.items():
            names, old = owners[first]
            stored = tensors[public]
            cast = dtype if stored.is_floating_point() else None
            new = stored.to(device=device, dtype=cast).contiguous()
            if new.data_ptr() != stored.data_ptr():
                tensors.drop(public)
            elif new.data_ptr() in seen:         # an old pickle may keep one memory under two names
                new = new.clone()
            seen.add(new.data_ptr())
            if isinstance(old, nn.Parameter):
                new = nn.Parameter(new, requires_grad=old.requires_grad)
            for name in names:
                path, _, leaf = name.rpartition(".")
                setattr(module.get_submodule(path), leaf, new)
            bar.update(stored.nbytes)
    return module


def _owners(module: nn.Module) -> dict[str, tuple[list[str], Tensor]]:
    """A module's tensors, each once, by its first name: (all its names, the tensor). A tied weight
    is one tensor under several names."""
    owners, first_names = {}, {}
    for name, tensor in chain(module.named_parameters(remove_duplicate=False),
                              module.named_buffers(remove_duplicate=False)):
        first = first_names.setdefault(id(tensor), name)
        owners.setdefault(first, ([], tensor))[0].append(name)
    return owners


def _plan(module: nn.Module, owners: dict[str, tuple[list[str], Tensor]], tensors: Tensors,
          rename: Callable[[str], str | None], unneeded: tuple[str, ...]) -> dict[str, str]:
    """Which public tensor goes where: first name in the module -> public name. UserError unless
    everything fits."""
    first_of = {name: first for first, (names, _) in owners.items() for name in names}
    plan, unknown, misshapen, unlike = {}, [], [], []
    for public in tensors:
        if any(fnmatchcase(public, pattern) for pattern in unneeded):
            continue
        where = tensors.file(public).name
        first = first_of.get(rename(public))
        if first is None:
            unknown.append(f"{public} in {where}")
            continue
        if first in plan:
            raise UserError(f"{tensors.dir}: {public} in {where} and {plan[first]} in "
                            f"{tensors.file(plan[first]).name} are both meant for {first}")
        plan[first] = public
        needed = owners[first][1]
        shape, dtype = tensors.shape(public), tensors.dtype(public)
        if shape != needed.shape:
            misshapen.append(f"{public} in {where} is {shape}, needed {tuple(needed.shape)}")
        elif needed.is_floating_point() and dtype not in FLOATS:
            unlike.append(f"{public} in {where} is {dtype}")
    missing = [first for first, (_, tensor) in owners.items()
               if first not in plan and tensor.is_meta]
    faults = listed(missing=missing, unknown=unknown, misshapen=misshapen, unlike=unlike)
    if faults:
        raise UserError(f"{tensors.dir}: these weights don't fit {type(module).__name__}: {faults}")
    return plan


def listed(**faults: list[str]) -> str:
    """What is wrong with which tensors, in words; "" if nothing is."""
    said = []
    for what, names in faults.items():
        if names:
            more = ", ..." if len(names) > 3 else ""
            what = what.replace("unlike", "of a number format that isn't implemented")
            said.append(f"{len(names)} {what} ({', '.join(names[:3])}{more})")
    return "; ".join(said)


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """A safetensors file, whole or not at all. UserError if it can't be written."""
    def write(tmp: Path) -> None:
        try:
            save_file(tensors, tmp, metadata=metadata)
        except SafetensorError as e:         # a full disk, for instance
            raise OSError(str(e)) from e

    write_beside(path, write)


def to_save(module: nn.Module, dir: str | Path) -> dict[str, Tensor]:
    """What is saved of a module, all of its numbers by name: the parameters, a tied one once.

    UserError if numbers are buffers instead: it is packed (fast/packed.py), and `dir` would lack
    them.
    """
    if any(True for _ in module.buffers()):
        raise UserError(f"{dir}: a packed model can't be saved; load it again, and save that")
    return dict(module.named_parameters())


def save(dir: str | Path, tensors: Mapping[str, Tensor], config: dict,
         max_shard_bytes: float = 5e9) -> None:
    """Write tensors (by public name) and config.json to a folder; in shards beyond max_shard_bytes.

    A tied weight goes in once: safetensors refuses two names for one memory. UserError if it can't
    be written.
    """
    dir = Path(dir)
    make_folder(dir, flag="")
    shards, room = [[]], max_shard_bytes
    for name, tensor in tensors.items():
        room -= tensor.nbytes
        if room < 0 and shards[-1]:
            shards.append([])
            room = max_shard_bytes - tensor.nbytes
        shards[-1].append(name)
    n = len(shards)
    files = [SINGLE] if n == 1 else [f"model-{i + 1:05d}-of-{n:05d}.safetensors" for i in range(n)]
    if n > 1:                    # a kill shall not leave old and new shards that look whole
        discard(dir / INDEX)
    for file, names in zip(files, shards):
        content = {name: tensors[name].detach().to("cpu").contiguous() for name in names}
        # transformers wants the format tag; without it, it refuses the file
        write_tensors(dir / file, content, {"format": "pt"})
    if n > 1:
        total = sum(tensor.nbytes for tensor in tensors.values())
        table = {name: file for file, names in zip(files, shards) for name in names}
        write_json(dir / INDEX, {"metadata": {"total_size": total}, "weight_map": table})
    write_json(dir / "config.json", config)
    discard(dir / (INDEX if n == 1 else SINGLE))                         # an earlier save's
