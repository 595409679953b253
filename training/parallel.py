"""Several processes that train one model: who they are, how the model is shared out, and what they write to disk.

torchrun starts the processes; everything here also works in one of them alone. Two ways of sharing:

    ddp     every process holds the whole model and averages gradients with the others;
    fsdp    every process holds a slice of each parameter (FSDP2): a block's slices are gathered right before it runs,
            in bfloat16, and its gradients are summed in float32 and sliced again. Each process keeps float32 master
            weights and AdamW's two moments of its own slice only: 12 of 16 bytes a parameter are divided by the number
            of processes.

A checkpoint is a folder of safetensors files, one for each process, and a state.json; no pickle. Slices are rows of a
tensor, so any number of processes can read what another number wrote. It is written beside and renamed: a kill at any
moment leaves the old checkpoint or the new one. One trainer at a time may write to a folder.
"""
import json
import multiprocessing
import os
import shutil
import signal
import threading
import time
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.nn.parallel import DistributedDataParallel

from training.prepare import Lock
from core.weights import UserError, pick_device, read_json

# CCRA's maps are views; the warning is about writing into such outputs in place, which nobody does
warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")


# ---------------------------------------------------------------------------------------------------------------------
# Who am I?

def join(device="auto", threads=0):
    """(rank, number of processes, device): those that torchrun started, or this process alone.

    threads: CPU threads of this process (0: torch's choice alone, an even share of the cores under torchrun).
    """
    rank, size, local = (int(os.environ.get(key, default)) for key, default in
                         (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    device = pick_device(device)
    if "WORLD_SIZE" in os.environ:
        if device.type == "cuda":
            device = torch.device("cuda", local)
            torch.cuda.set_device(device)
        else:          # torchrun allows each process one thread; share the cores out instead
            torch.set_num_threads(max(1, os.cpu_count() // local_size()))
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    if threads:
        torch.set_num_threads(threads)
    return rank, size, device


def local_size() -> int:
    """How many processes torchrun started on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def leave():
    """Whoever leaves while others still talk takes them down with it, so all leave together."""
    if dist.is_initialized():
        dist.barrier()
        time.sleep(0.5)         # ... and those on their way out of the barrier, too (gloo aborted one run in about 35)
        dist.destroy_process_group()


def total(*numbers, device="cpu"):
    """Sums over all processes, in float64: one number, or a list of several in one message."""
    if not dist.is_initialized():
        return numbers[0] if len(numbers) == 1 else list(numbers)
    x = torch.tensor(numbers, dtype=torch.float64, device=device)
    dist.all_reduce(x)
    return x.item() if len(numbers) == 1 else x.tolist()


# ---------------------------------------------------------------------------------------------------------------------
# Sharing the model out

def layout(device, shard_size=0):
    """Who shares a copy of the model with whom, as a mesh. shard_size: processes of one copy (0: those of one machine);
    machines beyond hold further copies (HSDP), which keeps the busy exchange inside of each machine."""
    size = dist.get_world_size()
    shard_size = shard_size or min(size, local_size())
    if size % shard_size:
        raise UserError(f"{size} processes can't be split into groups of {shard_size} that share one copy")
    if shard_size == size:
        return init_device_mesh(device.type, (size,), mesh_dim_names=("shard",))
    return init_device_mesh(device.type, (size // shard_size, shard_size), mesh_dim_names=("copy", "shard"))


def share(model, how: str, device, dtype, keep_gathered=False, mesh=None):
    """The model (a VLM on the CPU) as it is trained: itself ("none"), in DDP, or sliced in place ("fsdp", over mesh).

    dtype: what FSDP gathers and computes in. keep_gathered: blocks stay gathered from forward to backward (as ZeRO-2
    does it: less talk, more memory).
    """
    if how == "none":
        return model.to(device)
    if how == "ddp":
        return DistributedDataParallel(model.to(device))
    narrow = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    exact = MixedPrecisionPolicy(param_dtype=torch.float32, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in [*model.vision.layers, *model.llm.layers]:
        fully_shard(block, mesh=mesh, mp_policy=narrow, reshard_after_forward=not keep_gathered)
    if any(True for _ in model.fuser.parameters()):
        fully_shard(model.fuser, mesh=mesh, mp_policy=exact, reshard_after_forward=False)   # CCRA computes in float32
    # Embeddings, head, norms and projector belong to the root: F_t and the prompt read the same embeddings
    fully_shard(model, mesh=mesh, mp_policy=narrow, reshard_after_forward=False)
    return model.float()          # master weights; every process converts its own slices only


def whole(p):
    """A parameter as one tensor. Of a sliced one all processes have to ask."""
    return p.full_tensor() if isinstance(p, DTensor) else p.detach()


def rows(p) -> tuple:
    """(the part of p that this process holds, number of its first row, whether nobody else holds it, too).

    A process of a second copy, or of DDP beyond the first, holds what another one writes.
    """
    if not isinstance(p, DTensor):
        return p.detach(), 0, not dist.is_initialized() or dist.get_rank() == 0
    local = p.to_local().detach()
    _, offset = compute_local_shape_and_global_offset(p.shape, p.device_mesh, p.placements)
    copies = [p.device_mesh.get_local_rank(i) for i, kind in enumerate(p.placements) if isinstance(kind, Replicate)]
    return local, offset[0] if offset else 0, not any(copies)


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints

class Checkpoints:
    """The numbered checkpoints of one training run, in folder/step-00000123; the last `keep` of them stay."""

    def __init__(self, folder: Path, keep=2):
        self.folder, self.keep = Path(folder), keep

    def steps(self) -> list[int]:
        """The steps there are checkpoints of, oldest first. What a kill left half-written isn't one."""
        found = [p.name for p in self.folder.glob("step-*") if (p / "state.json").is_file()]
        return sorted(int(name[5:]) for name in found if name[5:].isdecimal())

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def check_room(self, trained):
        """UserError, before work starts, if the disk can't hold another checkpoint."""
        need = 3 * 4 * sum(p.numel() for p in trained.values())
        free = shutil.disk_usage(self.folder.parent).free
        if free < need * 1.05:
            raise UserError(f"{self.folder}: a checkpoint takes {need / 1e9:.1f} GB, but only {free / 1e9:.1f} GB are "
                            "free; make room or choose another --out")

    def save(self, step: int, trained: dict, optimizer, settings: dict):
        """Model and optimiser after `step` steps. All processes call it; each writes its own rows."""
        target, rank, size = self.path(step), *where()
        tmp = target.with_name(target.name + ".tmp")
        if rank == 0:
            whole = {self.path(old) for old in self.steps()}
            for leftover in set(self.folder.glob("step-*")) - whole:       # of a kill; as large as a checkpoint
                shutil.rmtree(leftover, ignore_errors=True)
            tmp.mkdir(parents=True)
        wait()
        tensors, spans = {}, {}
        for name, p in trained.items():
            state = optimizer.state.get(p, {})
            for kind in ("weight", "exp_avg", "exp_avg_sq"):
                tensor = p if kind == "weight" else state.get(kind)
                if tensor is None:                  # no update yet
                    continue
                local, first, mine = rows(tensor)
                if mine and (local.numel() or first == 0):
                    tensors[f"{kind}.{name}"], spans[f"{kind}.{name}"] = local.cpu().contiguous(), first
        tensors[f"rng.{rank}"] = torch.get_rng_state()
        save_file(tensors, tmp / f"rank-{rank:04d}.safetensors", metadata={"first_rows": json.dumps(spans)})
        wait()
        if rank == 0:
            updates = {int(state["step"]) for state in optimizer.state.values()}
            state = dict(step=step, updates=max(updates, default=0), processes=size, settings=settings,
                         shapes={name: list(p.shape) for name, p in trained.items()})
            (tmp / "state.json").write_text(json.dumps(state, indent=1) + "\n")
            shutil.rmtree(target, ignore_errors=True)
            os.replace(tmp, target)
            for old in self.steps()[:-self.keep]:
                shutil.rmtree(self.path(old))
        wait()

    def load(self, trained: dict, optimizer, settings: dict) -> int:
        """Put the last checkpoint into parameters and optimiser; the step to go on from (0: there is none).

        UserError if it is of another model, of a run with other settings, or damaged.
        """
        steps = self.steps()
        if not steps:
            return 0
        folder = self.path(steps[-1])
        try:
            return self._load(folder, trained, optimizer, settings)
        except (SafetensorError, OSError, KeyError) as e:
            raise UserError(f"{folder}: is damaged ({e}); remove it, and the checkpoint before it is taken") from None

    @staticmethod
    def _load(folder: Path, trained: dict, optimizer, settings: dict) -> int:
        state = read_json(folder / "state.json")
        if state["shapes"] != {name: list(p.shape) for name, p in trained.items()}:
            raise UserError(f"{folder} belongs to another model; remove it or choose another --out")
        for key in [*settings, *state["settings"]]:        # those that only one of the two has, too
            before, now = state["settings"].get(key), settings.get(key)
            if before != now:
                raise UserError(f"{folder} is of a run with {key} {before}, not {now}; remove it or choose another "
                                "--out")
        files = [safe_open(folder / f"rank-{i:04d}.safetensors", "pt") for i in range(state["processes"])]
        pieces = {}            # tensor -> [(first row, file)]
        for file in files:
            for name, first in json.loads(file.metadata()["first_rows"]).items():
                pieces.setdefault(name, []).append((first, file))
        with torch.no_grad():
            for name, p in trained.items():
                fill(p, pieces[f"weight.{name}"], f"weight.{name}")
                if f"exp_avg.{name}" in pieces:
                    moments = {kind: torch.zeros_like(p) for kind in ("exp_avg", "exp_avg_sq")}
                    for kind, tensor in moments.items():
                        fill(tensor, pieces[f"{kind}.{name}"], f"{kind}.{name}")
                    fused = optimizer.defaults.get("fused")            # which counts steps on the device
                    count = torch.tensor(float(state["updates"]), device=p.device if fused else "cpu")
                    optimizer.state[p] = dict(step=count, **moments)
        rank, size = where()
        if size == state["processes"]:
            torch.set_rng_state(files[rank].get_tensor(f"rng.{rank}"))
        return state["step"]


def fill(tensor, pieces, name):
    """Copy the rows that this process holds of a tensor out of the files that hold them."""
    local, first, _ = rows(tensor)
    if local.ndim == 0:
        return local.copy_(pieces[0][1].get_tensor(name))
    found = 0
    for start, file in pieces:
        view = file.get_slice(name)
        stop = start + view.get_shape()[0]
        low, high = max(first, start), min(first + len(local), stop)
        if low < high:
            local[low - first:high - first] = view[low - start:high - start]
            found += high - low
    if found != len(local):
        raise UserError(f"the checkpoint lacks rows of {name}: it is damaged; remove it")


def sliced_again(model):
    """After forward passes that no backward follows: FSDP would keep what it gathered for them."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def where() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def wait():
    if dist.is_initialized():
        dist.barrier()


# ---------------------------------------------------------------------------------------------------------------------
# Living with others

def lock(folder: Path, what="training"):
    """Make this the only program that writes to a folder, until the returned lock is closed or the process ends.
    UserError if there is another."""
    (folder / ".lock").touch()
    try:
        return Lock(folder / ".lock")
    except BlockingIOError:
        raise UserError(f"{folder}: another {what} writes there; wait for it, stop it, or choose another --out") \
            from None


class Stop:
    """Whether somebody sent SIGTERM (a scheduler that wants the machine back): finish the step, save, leave."""

    def __init__(self):
        self.asked = False
        signal.signal(signal.SIGTERM, self.ask)

    def ask(self, *_):
        self.asked = True

    @staticmethod
    def in_reader(*_):
        """For the processes that read pictures: a signal to the whole group reaches them, too, but the trainer's step
        still needs them. So they end at its word alone, where the system tells who sent a signal (Linux)."""
        def wait():
            while signal.sigwaitinfo({signal.SIGTERM}).si_pid != multiprocessing.parent_process().pid:
                pass
            os._exit(0)
        if hasattr(signal, "sigwaitinfo"):
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
            threading.Thread(target=wait, daemon=True).start()
