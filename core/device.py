"""The choice of a device and of a number format."""
import torch

from core.common import UserError

# Bytes from which on a model is loaded with a progress bar, and kept on CPUs as it is stored.
BIG = 1e9


def pick_device(name: str = "auto") -> torch.device:
    """`auto` takes cuda, then mps, then cpu. A device that was asked for by name and isn't there is
    a UserError."""
    count = {"cuda": torch.cuda.device_count() if torch.cuda.is_available() else 0,
             "mps": int(torch.backends.mps.is_available()), "cpu": 1}
    if name == "auto":
        return torch.device(next(kind for kind in count if count[kind]))
    kind, _, index = name.partition(":")
    if kind not in count or (index and not index.isdecimal()):
        raise UserError(f"no such device: {name!r} (choose auto, cpu, mps, cuda or cuda:N)")
    if int(index or 0) >= count[kind]:
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
    """What to run a model of nbytes in, for `weights.load`: None is as stored.

    `auto` is as stored, except that on a CPU a model below BIG becomes float32, which is faster
    there (half precision is emulated) and still fits.
    """
    named = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name in named:
        return named[name]
    if name != "auto":
        raise UserError(f"no such number format: {name!r} (choose auto, {', '.join(named)})")
    return torch.float32 if device.type == "cpu" and nbytes < BIG else None
