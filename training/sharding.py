"""How several processes share one model out. Two ways:

    ddp     every process holds the whole model and averages gradients with the others;
    fsdp    every process holds a slice of each parameter (FSDP2): a block's slices are gathered
            right before it runs, in bfloat16, and its gradients are summed in float32 and sliced
            again. Each process keeps float32 master weights and AdamW's two moments of its own
            slice only: 12 of 16 bytes a parameter are divided by the number of processes.

Slices are rows of a tensor (of its first dimension).
"""
import warnings

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.nn.parallel import DistributedDataParallel

from core.common import UserError
from core.distributed import local_size, where

# CCRA's maps are views; the warning is about writing into such outputs in place, which nobody does
warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")


def layout(device: torch.device, shard_size: int = 0) -> DeviceMesh:
    """Who shares a copy of the model with whom.

    shard_size: processes of one copy (0: those of one machine); machines beyond hold further copies
    (HSDP), which keeps the busy exchange inside of each machine. UserError if the processes can't
    be split so.
    """
    size = dist.get_world_size()
    shard_size = shard_size or min(size, local_size())
    if size % shard_size:
        raise UserError(
            f"{size} processes can't be split into groups of {shard_size} that share one copy")
    if shard_size == size:
        return init_device_mesh(device.type, (size,), mesh_dim_names=("shard",))
    return init_device_mesh(device.type, (size // shard_size, shard_size),
                            mesh_dim_names=("copy", "shard"))


def share(model: nn.Module, how: str, device: torch.device, dtype: torch.dtype,
          keep_gathered: bool = False, mesh: DeviceMesh | None = None) -> nn.Module:
    """The model (a VLM on the CPU) as it is trained: itself ("none"), in DDP, or sliced in place
    ("fsdp", over mesh).

    dtype: what FSDP gathers and computes in. keep_gathered: blocks stay gathered from forward to
    backward (as ZeRO-2 does it: less talk, more memory).
    """
    if how == "none":
        return model.to(device)
    if how == "ddp":
        return DistributedDataParallel(model.to(device))
    narrow = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    exact = MixedPrecisionPolicy(param_dtype=torch.float32, reduce_dtype=torch.float32,
                                 cast_forward_inputs=False)
    for block in [*model.vision.layers, *model.llm.layers]:
        fully_shard(block, mesh=mesh, mp_policy=narrow, reshard_after_forward=not keep_gathered)
    if any(True for _ in model.fuser.parameters()):                 # CCRA computes in float32
        fully_shard(model.fuser, mesh=mesh, mp_policy=exact, reshard_after_forward=False)
    # Embeddings, head, norms and projector belong to the root: F_t and the prompt read the same
    # embeddings
    fully_shard(model, mesh=mesh, mp_policy=narrow, reshard_after_forward=False)
    for p in model.parameters():            # master weights; every process converts its own slices
        if p.requires_grad:
            p.data = p.data.float()
    return model


def whole(p: Tensor) -> Tensor:
    """A parameter as one tensor. Of a sliced one all processes have to ask."""
    return p.full_tensor() if isinstance(p, DTensor) else p.detach()


def rows(p: Tensor) -> tuple[Tensor, int, bool]:
    """(the part of p that this process holds, number of its first row, whether it is the one that
    writes it to disk).

    A process of a second copy, or of DDP beyond the first, holds what another one writes.
    """
    if not isinstance(p, DTensor):
        return p.detach(), 0, where()[0] == 0
    local = p.to_local().detach()
    _, offset = compute_local_shape_and_global_offset(p.shape, p.device_mesh, p.placements)
    copies = [p.device_mesh.get_local_rank(i)
              for i, kind in enumerate(p.placements) if isinstance(kind, Replicate)]
    return local, offset[0] if offset else 0, not any(copies)


def products_in(dtype: torch.dtype, device: torch.device) -> torch.autocast:
    """Autocast to bfloat16, if that is what products are computed in."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16)


def sliced_again(model: nn.Module) -> None:
    """After forward passes that no backward follows: FSDP would keep what it gathered for them."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
