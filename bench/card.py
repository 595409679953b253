"""What the paper's training takes on one GPU: seconds a step, share of the card's peak (MFU), GiB
beside --plan's.

    torchrun --nproc_per_node=1 tests/card.py --stage 1 --micro 8 --length 640
    torchrun --nproc_per_node=1 tests/card.py --stage 2 --micro 4 --gpu h200        16 bytes a parameter: 141 GB hold 7B
    torchrun --nproc_per_node=1 tests/card.py --stage 2 --micro 4 --layers 16       half a language model: 80 GB do

Weights and rows are invented, sizes and code are those of `train.py --stage N`: CLIP ViT-L/336,
Vicuna-7B, CCRA. Rows are all --length positions long with the picture, a quarter of them
supervised. Prints one line of JSON.
"""
import argparse
import json
import statistics
import time
from pathlib import Path

import torch

import data  # noqa: E402
import train  # noqa: E402
from core import distributed
from data import IGNORE, IMAGE_TOKEN
from training import (
    options,
    plan,  # noqa: E402
    setup,
    sharding,
)


def planned(args):
    """train.py's arguments, as for --plan on one card."""
    setup.VICUNA["num_hidden_layers"] = args.layers
    sharing = args.parallel or ("fsdp" if args.stage == 2 else "ddp")
    more = [] if args.recompute is None else ["--recompute" if args.recompute else "--no-recompute"]
    return options.arguments([
        "--stage",
        str(args.stage), "--plan", "--gpus", "1", "--gpu", args.gpu, "--micro",
        str(args.micro), "--max-length",
        str(args.length), "--parallel", sharing, *more])


def batch(args, model, device, length):
    """One micro-batch, as data.collate makes it of samples."""
    V, rows, size = model.llm.config.vocab_size, [], model.vision.config.image_size
    T = length - model.picture_rows + 1
    for ids in torch.randint(3, V, (args.micro, T)).tolist():
        kept = length // 4
        rows.append(
            dict(ids=[1, IMAGE_TOKEN, *ids[2:]], query=ids[2:34], pixels=torch.rand(3, size, size),
                 labels=[IGNORE] * (T - kept) + ids[-kept:] if kept < T else [IGNORE] * 2 +
                 ids[2:]))
    return data.collate(rows)


def main():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--stage", type=int, choices=(1, 2), required=True)
    p.add_argument("--micro", type=int, default=4, help="rows at a time (default: %(default)s)")
    p.add_argument("--length", type=int, default=2048,
                   help="positions of a row (default: %(default)s)")
    p.add_argument("--layers", type=int, default=32,
                   help="of the language model (default: %(default)s)")
    p.add_argument("--steps", type=int, default=5,
                   help="after two that warm up (default: %(default)s)")
    p.add_argument("--gpu", choices=sorted(plan.GPUS), default="h100", help="default: %(default)s")
    p.add_argument("--parallel", choices=("none", "ddp", "fsdp"))
    p.add_argument("--recompute", action=argparse.BooleanOptionalAction)
    p.add_argument("--compile", action="store_true")
    p.add_argument("--profile", metavar="FILE", help="write what the kernels of one more step take")
    args = p.parse_args()
    a = planned(args)
    kinds = plan.measure(train.sketch(a), a, args.micro)      # before there is a group of processes
    rank, _, device = distributed.join("cuda")
    torch.manual_seed(0)
    recompute, a.recompute = a.recompute, False
    model = train.sketch(a).to_empty(device=device)
    for name, p in model.named_parameters():
        p.data.normal_(
            std=0.02) if p.ndim > 1 else p.data.fill_("norm" in name and name.endswith("weight"))
    if args.compile:
        train.compile_blocks(model)
    if recompute:
        train.recompute(model)
    mesh = sharding.layout(device) if a.parallel == "fsdp" else None
    shared = sharding.share(model, a.parallel, device, torch.bfloat16, False, mesh)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = train.adamw(trained, 1e-5)
    made = batch(args, model, device, args.length)
    torch.cuda.reset_peak_memory_stats()
    seconds, losses = [], []

    def step():
        tic = time.perf_counter()
        losses.append(train.train_step(shared, [dict(made)], device, torch.bfloat16, a.mode))
        norm = float(
            sharding.whole(torch.nn.utils.get_total_norm([p.grad for p in trained.values()])))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - tic)
        return norm

    norms = [step() for _ in range(args.steps + 2)]
    second = statistics.median(seconds[2:])
    if args.profile:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as kernels:
            step()
        Path(args.profile).write_text(kernels.key_averages().table(sort_by="cuda_time_total",
                                                                   row_limit=30))
    most = torch.cuda.max_memory_allocated()
    supervised = int((made["labels"][:, 1:] != IGNORE).sum())
    work = plan.flops(model, [args.length] * args.micro, supervised, False, args.stage == 2)
    name = torch.cuda.get_device_name()
    peak = plan.peak_flops(name)
    found = dict(vars(args), card=name, torch=torch.__version__, parallel=a.parallel,
                 recompute=recompute, parameters=sum(p.numel() for p in model.parameters()),
                 seconds=round(second, 4), samples_per_s=round(args.micro / second, 2),
                 tokens_per_s=round(args.micro * args.length / second),
                 mfu=round(work / second / peak, 4) if peak else None,
                 peak_gib=round(most / 2**30, 2), norms=norms, losses=losses,
                 planned_gib=round(kinds["total"] / 2**30,
                                   2), kinds={k: round(v / 2**30, 2) for k, v in kinds.items()})
    if rank == 0:
        print(json.dumps(found), flush=True)
    distributed.leave()


if __name__ == "__main__":
    main()
