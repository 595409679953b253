"""What training will take, before anybody rents a machine: FLOPs, hours, and the peak memory of a card.

    python train.py --stage 2 --plan --gpus 8 --gpu a100-80

The memory isn't a formula. The real model is built and shared out by the code that trains it (sharding.share), but of
fake tensors, which have shapes and no numbers, in a fake group of processes; two steps of forward, backward and AdamW
run on them while every allocation is counted.
"""
import math
import weakref
from functools import partial

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

import clip
from ccra import LOSS_ROWS
from fast import linear
from training import sharding

# Dense bfloat16 FLOP/s by NVIDIA's data sheets (without sparsity), and GiB of memory
GPUS = {"a100-40": (312e12, 40), "a100-80": (312e12, 80), "h100": (989e12, 80), "h200": (989e12, 141),
        "l40s": (362e12, 48), "rtx4090": (165e12, 24)}


def peak_flops(name: str):
    """FLOP/s of a device as torch.cuda.get_device_name tells it, or None where it isn't known."""
    name = name.lower()
    return next((flops for gpu, (flops, _) in GPUS.items() if gpu.split("-")[0] in name.replace(" ", "")), None)


def flops(model, lengths: list, supervised: int, vision_trained=False, llm_trained=True) -> float:
    """Floating-point operations of one training step on merged rows of these lengths, in the usual accounting.

    A product of an (m, k) and a (k, n) matrix is 2 m k n. The backward costs as much again for the inputs and, where
    weights are trained, for them. What is recomputed isn't counted (so MFU, not HFU); norms and CCRA's score products
    are less than a hundredth.
    """
    llm, tower = model.llm.config, model.vision.config
    blocks = sum(p.numel() for p in model.llm.layers.parameters())
    T, times = sum(lengths), 3 if llm_trained else 2
    looks = 2 * llm.num_hidden_layers * llm.num_attention_heads * llm.head_dim * sum(n * n for n in lengths)   # causal
    head = 2 * llm.hidden_size * llm.vocab_size * supervised
    N = 1 + model.vision.grid ** 2
    tower_flops = 2 * N * sum(p.numel() for p in model.vision.layers.parameters()) \
        + 4 * tower.num_hidden_layers * tower.hidden_size * N * N
    projector = 2 * model.picture_rows * sum(p.numel() for p in model.projector.parameters())
    return times * (2 * blocks * T + looks + head) \
        + len(lengths) * (tower_flops * (3 if vision_trained else 1) + 3 * projector)


def report(args, model, steps, samples) -> str:
    """The plan on paper. model: a VLM without numbers, as it is trained; steps, samples: of the whole training."""
    peak, room = GPUS[args.gpu]
    length, samples_a_card = args.max_length, math.ceil(args.batch / args.gpus)
    work = flops(model, [length] * args.batch, args.batch * length // 4, args.train_vision, args.stage == 2)
    count = sum(p.numel() for p in model.parameters())
    lines = [f"stage {args.stage}: {count:,} parameters, {samples:,} samples in {steps:,} steps of {args.batch}, all "
             f"rows taken as {length} tokens long (real ones are shorter)",
             f"{work / 1e15:.1f} PFLOP a step; with {args.mfu:.0%} of {peak / 1e12:.0f} TFLOP/s ({args.gpu}):"]
    for n in (2 ** i for i in range(10)):
        if n > args.batch:
            lines.append(f"{n:5} x {args.gpu}   more cards than samples in a step: raise --batch, and --lr with it")
        elif args.batch % n == 0:
            hours, micro = steps * work / (n * peak * args.mfu) / 3600, min(args.micro, args.batch // n)
            lines.append(f"{n:5} x {args.gpu} {hours:9.1f} h   {args.batch // n} samples a card and step, "
                         f"{math.ceil(args.batch / n / micro)} x {micro}")
    micro = min(args.micro, samples_a_card)
    memory = measure(model, args, micro)
    how = f"--parallel {args.parallel}" + f", --shard {args.shard}" * (args.parallel == "fsdp")
    lines.append(f"peak memory of one of {args.gpus} cards, which have {room} GiB ({how}, {micro} rows at a time, "
                 f"{'' if args.recompute else 'not '}recomputed):")
    lines += [f"  {kind:14} {size / 2 ** 30:6.1f} GiB" for kind, size in memory.items()]
    if memory["total"] / 2 ** 30 > 0.95 * room:
        lines.append("  which doesn't fit: more cards, a smaller --micro, --recompute, or --parallel fsdp --shard full")
    return "\n".join(lines)


def measure(model, args, micro) -> dict:
    """Bytes at the peak of a training step, by kind, of one of args.gpus processes, each with `micro` rows of
    args.max_length tokens. Nothing is computed: tensors are fake, the group of processes is, too."""
    before = clip.WRITE_OUT, clip.SLOW, linear.SLOW
    clip.WRITE_OUT, clip.SLOW, linear.SLOW = set(), set(), set()          # the ways that a GPU takes
    try:
        return (sliced if args.parallel == "fsdp" else unsliced)(model, args, micro)
    finally:
        clip.WRITE_OUT, clip.SLOW, linear.SLOW = before


def sliced(model, args, micro) -> dict:
    """measure for FSDP, by torch's tracker, which knows what is gathered and when."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=args.gpus, store=FakeStore())
    try:
        mesh = sharding.layout(torch.device("cpu"), args.gpus)
        with FakeTensorMode():
            model = fake(model)
            model.forward = partial(whole_step, model)
            sharding.share(model, "fsdp", torch.device("cpu"), torch.bfloat16, args.shard == "grad", mesh)
            optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)
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


def unsliced(model, args, micro) -> dict:
    """measure for DDP, which keeps gradients once more in its messages, or for a process alone."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        model = fake(model)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-5)
        with Live() as live:
            kinds = {"frozen": live.see(*(p for p in model.parameters() if not p.requires_grad)),
                     "trained": live.see(*trained)}
            pixels, ids = rows(model, args, micro)
            for step in range(2):
                with torch.autocast("cpu", dtype=torch.bfloat16):
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
    """Counts the bytes of all tensors there are, `now` and at the `peak`. (torch's own MemTracker stumbles over frozen
    parameters.) Tensors that are views of the same memory count once."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.known = set()

    def see(self, *tensors) -> int:
        """Count these, too; how many bytes more that is."""
        before = self.now
        for storage in (x.untyped_storage() for x in tensors if isinstance(x, torch.Tensor)):
            if storage._cdata not in self.known:
                self.known.add(storage._cdata)
                weakref.finalize(storage, self.gone, storage._cdata, storage.nbytes())
                self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        return self.now - before

    def gone(self, key, size):
        self.known.discard(key)
        self.now -= size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.see(*tree_leaves(out))
        return out


def rows(model, args, micro):
    """(pixels, ids) of `micro` rows that are args.max_length long with the picture."""
    size = model.vision.config.image_size
    return torch.empty(micro, 3, size, size, dtype=torch.bfloat16), \
        torch.zeros(micro, args.max_length - model.picture_rows, dtype=torch.long)


def fake(model):
    """The model with fake tensors for its parameters, of the dtypes and with the requires_grad they had."""
    for module in model.modules():
        for name, p in list(module.named_parameters(recurse=False)):
            setattr(module, name, torch.nn.Parameter(torch.empty(p.shape, dtype=p.dtype), p.requires_grad))
    if model.llm.config.tie_word_embeddings:
        model.llm.lm_head.weight = model.llm.embed_tokens.weight
    return model


def whole_step(model, pixels, ids):
    """VLM.forward for rows of one length, whose shapes don't depend on numbers: a fake tensor has none."""
    asked = torch.ones_like(ids[:, :64], dtype=torch.bool)
    hidden = model.vision(pixels)                   # all blocks, even if not all are read: the tracker waits for them
    features, _ = model.fuse(hidden, model.llm.embed(ids[:, :64]), asked)
    embeds = torch.cat([model.projector(features), model.llm.embed(ids)], dim=1)            # (B, T', D)
    states = model.llm.hidden(embeds=embeds).flatten(0, 1)
    target = torch.zeros(states.shape[0] // 4, dtype=torch.long)                            # a quarter is supervised
    pieces = zip(states[:len(target)].split(LOSS_ROWS), target.split(LOSS_ROWS))
    return sum(checkpoint(model.loss, *piece, use_reentrant=False) for piece in pieces)
