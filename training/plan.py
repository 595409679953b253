"""What training will take, before anybody rents a machine: FLOPs, hours, and the peak memory of a
card.

    python train.py --stage 2 --plan --gpus 8 --gpu a100-80

The memory isn't a formula. The real model is built and shared out by the code that trains it
(sharding.share), but of fake tensors, which have shapes and no numbers, in a fake group of
processes; two steps of forward, backward and AdamW run on them while every allocation is counted.
"""
import argparse
import math
import weakref
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from ccra import VLM
from core.common import UserError
from core.records import read_records
from llama import LOSS_ROWS
from training import sharding
from training.prepared import read_report

# Dense bfloat16 FLOP/s by NVIDIA's data sheets (without sparsity), and GiB of memory
GPUS = {"rtx-3090": (71e12, 24), "rtx-4090": (165e12, 24), "a100-40": (312e12, 40),
        "a6000": (155e12, 48), "l40s": (362e12, 48), "a100-80": (312e12, 80),
        "h100": (989e12, 80), "h200": (989e12, 141)}
TOKENS = 1 << 22               # at a time: more is beyond all of them
SAMPLES = {1: 558128, 2: 665298}                    # LLaVA's, of the two stages


def peak_flops(name: str) -> float | None:
    """FLOP/s of a device as torch.cuda.get_device_name tells it, or None where it isn't known."""
    name = name.lower().replace(" ", "")
    marks = {gpu.removesuffix("-40").removesuffix("-80").replace("-", ""): flops
             for gpu, (flops, _) in GPUS.items()}
    return next((flops for mark, flops in marks.items() if mark in name), None)


def flops(model: VLM, lengths: list[int], supervised: int, vision_trained: bool = False,
          llm_trained: bool = True) -> float:
    """Floating-point operations of one training step on merged rows of these lengths, in the usual
    accounting.

    A product of an (m, k) and a (k, n) matrix is 2 m k n. The backward costs as much again for the
    inputs and, where weights are trained, for them. What is recomputed isn't counted (so MFU, not
    HFU); norms and CCRA's score products are less than a hundredth.
    """
    llm, tower = model.llm.config, model.vision.config
    T = sum(lengths)
    blocks = 2 * T * numbers(model.llm.layers)
    looks = 2 * llm.num_hidden_layers * llm.num_attention_heads * llm.head_dim \
        * sum(n * n for n in lengths)                                                    # causal
    head = 2 * llm.hidden_size * llm.vocab_size * supervised
    N = 1 + model.vision.grid ** 2
    eyes = 2 * N * numbers(model.vision.layers) \
        + 4 * tower.num_hidden_layers * tower.hidden_size * N * N
    projector = 2 * model.picture_rows * numbers(model.projector)
    return (3 if llm_trained else 2) * (blocks + looks + head) \
        + len(lengths) * ((3 if vision_trained else 1) * eyes + 3 * projector)


def numbers(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


# --------------------------------------------------------------------------------------------------
# What --plan prints

def report(args: argparse.Namespace, model: VLM) -> str:
    """The plan on paper. args: train.py's; model: a VLM without numbers, as it is trained.
    UserError for rows that hold no text, or more of them at a time than any card does."""
    micro = min(args.micro, math.ceil(args.batch / args.gpus))
    if args.max_length <= model.picture_rows:
        raise UserError(f"--max-length {args.max_length}: the picture alone takes "
                        f"{model.picture_rows} of it")
    if micro * args.max_length > TOKENS:
        raise UserError(f"{micro} rows of {args.max_length} tokens at a time fit on no card; give "
                        "a smaller --micro")
    peak, room = GPUS[args.gpu]
    steps, samples = epoch(args)
    work = flops(model, [args.max_length] * args.batch, args.batch * args.max_length // 4,
                 args.train_vision, trains_llm(args))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    lines = [f"stage {args.stage}: {numbers(model):,} parameters, {trained:,} of them trained; "
             f"{samples:,} samples in {steps:,} steps of {args.batch}, all rows taken as "
             f"{args.max_length} tokens long (real ones are shorter)",
             f"{work / 1e15:.1f} PFLOP a step; with {args.mfu:.0%} of {peak / 1e12:.0f} TFLOP/s "
             f"({args.gpu}):"]
    lines += hours(args, steps * work / (peak * args.mfu) / 3600)
    memory = measure(model, args, micro)
    most = "" if args.parallel == "fsdp" else largest(model, args, memory["total"], micro)
    how = f"--parallel {args.parallel}" + f", --shard {args.shard}" * (args.parallel == "fsdp")
    lines.append(f"peak memory of one of {args.gpus} cards, which have {room} GiB ({how}, {micro} "
                 f"rows at a time, {'' if args.recompute else 'not '}recomputed):")
    lines += [f"  {kind:14} {size / 2 ** 30:6.1f} GiB" for kind, size in memory.items()]
    if memory["total"] / 2 ** 30 > 0.95 * room:
        lines.append("  which doesn't fit: more cards, a smaller --micro, --recompute, or "
                     "--parallel fsdp --shard full")
    return "\n".join([*lines, most] if most else lines)


def trains_llm(args: argparse.Namespace) -> bool:
    """Whether the language model's own weights are trained."""
    return args.stage == 2 and (not args.train or "llm" in args.train)


def largest(model: VLM, args: argparse.Namespace, total: int, micro: int) -> str:
    """How many rows at a time fit, in a line: by what one row takes more than none, then measured.
    total: the peak with `micro` rows."""
    room = 0.95 * GPUS[args.gpu][1] * 2 ** 30
    other = 1 if micro > 1 else 2
    row = (measure(model, args, other)["total"] - total) / (other - micro)     # bytes
    fits = min(int(micro + (room - total) / row), args.batch, TOKENS // args.max_length)
    while fits > 0 and measure(model, args, fits)["total"] > room:
        fits -= 1
    if fits < 1:
        return f"not even one row at a time fits on a {args.gpu}"
    most = f"all {fits} of a step" if fits == args.batch else str(fits)
    return f"the largest --micro that fits on a {args.gpu}: {most} ({row / 2 ** 30:.2f} GiB a row)"


def epoch(args: argparse.Namespace) -> tuple[int, int]:
    """(steps, samples): of the prepared data if they are there, else of LLaVA's."""
    samples = SAMPLES[args.stage]
    if args.json and Path(args.json).is_file():
        samples = len(read_records(Path(args.json))[0])
    if args.data and Path(args.data, "report.json").is_file():
        samples = read_report(args.data)["kept"]
    return args.steps or math.ceil(samples / args.batch), samples


def hours(args: argparse.Namespace, alone: float) -> list[str]:
    """A line for 1, 2, 4, ... cards that share a step's samples evenly. alone: hours of one."""
    lines = []
    for n in (2 ** i for i in range(10)):
        if n > args.batch:
            lines.append(f"{n:5} x {args.gpu}   more cards than samples in a step: raise --batch, "
                         "and --lr with it")
        elif args.batch % n == 0:
            share = args.batch // n
            micro = min(args.micro, share)
            lines.append(f"{n:5} x {args.gpu} {alone / n:9.1f} h   {share} samples a card and "
                         f"step, {math.ceil(share / micro)} x {micro}")
    return lines


# --------------------------------------------------------------------------------------------------
# Memory, by counting it

def measure(model: VLM, args: argparse.Namespace, micro: int) -> dict[str, int]:
    """Bytes at the peak of a training step, by kind, of one of args.gpus processes, each with
    `micro` rows of args.max_length tokens.

    Nothing is computed: tensors are fake, the group of processes is, too. The model is used up. It
    should be plain, as fast.prepare hasn't touched it: that is what a GPU trains.
    """
    if args.parallel == "fsdp":
        return sliced(model, args, micro)
    return unsliced(model, args, micro)


def sliced(model: VLM, args: argparse.Namespace, micro: int) -> dict[str, int]:
    """measure for FSDP, by torch's tracker, which knows what is gathered and when."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
    from torch.testing._internal.distributed.fake_pg import FakeStore

    cpu = torch.device("cpu")
    dist.init_process_group("fake", rank=0, world_size=args.gpus, store=FakeStore())
    try:
        mesh = sharding.layout(cpu, args.gpus)
        with FakeTensorMode():
            model = fake(model)
            model.forward = partial(whole_step, model)
            sharding.share(model, "fsdp", cpu, torch.bfloat16, args.shard == "grad", mesh)
            trained = [p for p in model.parameters() if p.requires_grad]
            optimizer = torch.optim.AdamW(trained, lr=1e-5)
            tracker = FSDPMemTracker(model, optimizer)
            pixels, ids = rows(model, args, micro)
            tracker.track_external(pixels, ids)
            with tracker:
                for step in range(2):           # AdamW's moments are there from the second step on
                    model(pixels, ids).backward()
                    optimizer.step()
                    optimizer.zero_grad()
                    tracker.reset_mod_stats()
            [peak] = tracker.get_tracker_snapshot("peak").values()
    finally:
        dist.destroy_process_group()
    return {str(getattr(kind, "value", kind)).lower(): size for kind, size in peak.items()}


def unsliced(model: VLM, args: argparse.Namespace, micro: int) -> dict[str, int]:
    """measure for DDP, which keeps gradients once more in its messages, or for a process alone."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        model = fake(model)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-5)
        with Live() as live:
            frozen = live.see(*(p for p in model.parameters() if not p.requires_grad))
            kinds = {"frozen": frozen, "trained": live.see(*trained)}
            pixels, ids = rows(model, args, micro)
            for step in range(2):
                with sharding.products_in(product_dtype(args), torch.device("cpu")):
                    loss = whole_step(model, pixels, ids)
                loss.backward()
                del loss
                optimizer.step()
                optimizer.zero_grad()
    kinds["optstate"] = 2 * kinds["trained"]
    kinds["rows, gradient"] = live.peak - sum(kinds.values())
    kinds["messages"] = kinds["trained"] if args.parallel == "ddp" else 0
    return {**kinds, "total": sum(kinds.values())}


class Live(TorchDispatchMode):
    """Counts the bytes of all tensors there are, `now` and at the `peak`. (torch's own MemTracker
    stumbles over frozen parameters.) Tensors that are views of the same memory count once."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.known = set()

    def see(self, *tensors) -> int:
        """Count these, too; how many bytes more that is."""
        before = self.now
        for storage in (x.untyped_storage() for x in tensors if isinstance(x, Tensor)):
            if storage._cdata not in self.known:
                self.known.add(storage._cdata)
                weakref.finalize(storage, self.gone, storage._cdata, storage.nbytes())
                self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        return self.now - before

    def gone(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.see(*tree_leaves(out))
        return out


def product_dtype(args: argparse.Namespace) -> torch.dtype:
    """What a GPU multiplies in, unless --dtype says otherwise."""
    return torch.float32 if args.dtype == "float32" else torch.bfloat16


def rows(model: VLM, args: argparse.Namespace, micro: int) -> tuple[Tensor, Tensor]:
    """(pixels, ids) of `micro` rows that are args.max_length long with the picture."""
    size = model.vision.config.image_size
    pixels = torch.empty(micro, 3, size, size, dtype=product_dtype(args))
    return pixels, torch.zeros(micro, args.max_length - model.picture_rows, dtype=torch.long)


def fake(model: VLM) -> VLM:
    """The model with fake tensors for its parameters, of the dtypes and with the requires_grad they
    had. All blocks of the tower run, even if not all are read: FSDP's tracker waits for them."""
    model.fuser.n_blocks = len(model.vision.layers)
    for module in model.modules():
        for name, p in list(module.named_parameters(recurse=False)):
            empty = torch.empty(p.shape, dtype=p.dtype)
            setattr(module, name, nn.Parameter(empty, p.requires_grad))
    if model.llm.config.tie_word_embeddings:
        model.llm.lm_head.weight = model.llm.embed_tokens.weight
    return model


def whole_step(model: VLM, pixels: Tensor, ids: Tensor) -> Tensor:
    """The loss of VLM.forward for rows of one length, whose shapes don't depend on numbers: a fake
    tensor has none.

    pixels (B, 3, H, W); ids (B, T) long, text alone, of which the first 64 are the query.
    """
    query = ids[:, :64]
    asked = torch.ones_like(query, dtype=torch.bool)
    hidden, F_t = model.see(pixels, query, asked)
    features, _ = model.fuse(hidden, F_t, asked)                                   # (B, N', width)
    embeds = torch.cat([model.projector(features), model.llm.embed(ids)], dim=1)     # (B, T', D)
    states = model.llm.hidden(embeds=embeds).flatten(0, 1)                           # (B T', D)
    target = torch.zeros(len(states) // 4, dtype=torch.long)             # a quarter is supervised
    pieces = zip(states[:len(target)].split(LOSS_ROWS), target.split(LOSS_ROWS))
    return sum(checkpoint(model.llm.loss_of, *piece, use_reentrant=False) for piece in pieces)
