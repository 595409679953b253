"""TODO core/device.py"""

import torch

from core.common import UserError

# bytes from which on a model is loaded with a progress bar, and kept on CPUs as it is stored
BIG = 1e9


# --------------------------------------------------------------------------------------------------
# Device and number format


def pick_device(name: str = "auto") -> torch.device:
    """`auto` takes cuda, then mps, then cpu. A device that was asked for by name and isn't there is
    a UserError."""
    there = {
        "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return torch.device(next(kind for kind, here in there.items() if here))
    kind, _, index = name.partition(":")
    if kind not in there or (index and not index.isdecimal()):
        raise UserError(f"no such device: {name!r} (choose auto, cpu, mps, cuda or cuda:N)")
    if not there[kind] or (index
                           and int(index) >= (torch.cuda.device_count() if kind == "cuda" else 1)):
        raise UserError(f"device {name} is not available here (use --device auto)")
    return torch.device(name)


def autocast_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the hardware multiplies it fast, float32 elsewhere.

    A CPU without AMX or AVX512-BF16 emulates bfloat16 matrix products, tens of times slower than
    float32.
    """
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "cpu":
        fast = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    else:
        fast = False
    return torch.bfloat16 if fast else torch.float32


def pick_dtype(name: str, device: torch.device, nbytes: int) -> torch.dtype | None:
    """What to run a model of nbytes in, for `load`: None is as stored. `auto` is as stored, except
    that on a CPU a model below BIG becomes float32, which is faster there (half precision is
    emulated) and still fits."""
    named = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in ("auto", *named):
        raise UserError(f"no such number format: {name!r} (choose auto, {', '.join(named)})")
    return named.get(name, torch.float32 if device.type == "cpu" and nbytes < BIG else None)
