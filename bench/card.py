"""What the paper's training takes on one GPU: seconds a step, share of the card's peak (MFU), GiB
beside --plan's.

    torchrun --nproc_per_node=1 -m bench.card --stage 1 --micro 8 --length 640
    torchrun --nproc_per_node=1 -m bench.card --stage 2 --micro 4 --gpu h200
    torchrun --nproc_per_node=1 -m bench.card --stage 2 --micro 4 --layers 16

Stage 2 takes 16 bytes a parameter: 141 GB hold 7B, 80 GB half a language model. Weights and rows
are invented, sizes and code are those of `train.py --stage N`: CLIP ViT-L/336, Vicuna-7B, CCRA.
Rows are all --length positions long with the picture, a quarter of them supervised. Prints one line
of JSON.
"""
import argparse
import json
import statistics
import time
from pathlib import Path

import torch

import data
import fast
import train
from ccra import VLM
from clip import CLIPVision, CLIPVisionConfig
from core import distributed, flags
from core.common import run
from core.tokenizer import IGNORE, IMAGE_TOKEN
from core.weights import skeleton
from llama import Llama, LlamaConfig
from training import options, plan, setup, sharding


def arguments() -> argparse.Namespace:
    p = flags.Parser(prog="python -m bench.card", description=__doc__)
    p.add_argument("--stage", type=int, choices=(1, 2), required=True)
    p.add_argument("--micro", type=flags.batch, default=4,
                   help="rows at a time (default: %(default)s)")
    p.add_argument("--length", type=flags.whole(1, 1 << 20), default=2048,
                   help="positions of a row (default: %(default)s)")
    p.add_argument("--layers", type=flags.whole(1, 1000), default=32,
                   help="of the language model (default: %(default)s)")
    p.add_argument("--steps", type=flags.whole(1, flags.MANY), default=5,
                   help="after two that warm up (default: %(default)s)")
    p.add_argument("--gpu", choices=sorted(plan.GPUS), default="h100", help="default: %(default)s")
    p.add_argument("--parallel", choices=("none", "ddp", "fsdp"))
    p.add_argument("--recompute", action=argparse.BooleanOptionalAction)
    p.add_argument("--compile", action="store_true")
    p.add_argument("--profile", metavar="FILE", help="write what the kernels of one more step take")
    return p.parse_args()


def planned(args: argparse.Namespace) -> argparse.Namespace:
    """train.py's arguments, as for --plan on one card."""
    parallel = args.parallel or ("fsdp" if args.stage == 2 else "ddp")
    words = ["--plan", "--gpus", "1", "--gpu", args.gpu, "--parallel", parallel,
             "--stage", str(args.stage), "--micro", str(args.micro),
             "--max-length", str(args.length)]
    if args.recompute is not None:
        words.append("--recompute" if args.recompute else "--no-recompute")
    return options.arguments(words)


def sketch(a: argparse.Namespace, layers: int) -> VLM:
    """The model of the paper's sizes as it is trained, without numbers. a: train.py's arguments."""
    with skeleton():
        tower = CLIPVision(CLIPVisionConfig())
        llm = Llama(LlamaConfig.from_dict({**setup.VICUNA, "num_hidden_layers": layers}))
        model = VLM.build(tower, llm, setup.fuser_config(a, tower.config, llm.config))
    train.save_precision(train.freeze(model, a.stage, a.mode), model, torch.bfloat16)
    return model


def predict(a: argparse.Namespace, layers: int) -> dict[str, int]:
    """--plan's bytes at the peak, by kind. Before there is a group of processes."""
    model = sketch(a, layers)
    if a.recompute:
        setup.recompute(model)
    return plan.measure(model, a, a.micro)


def build(a: argparse.Namespace, args: argparse.Namespace, device: torch.device) -> VLM:
    """The model with random numbers, its blocks as the flags say."""
    model = sketch(a, args.layers).to_empty(device=device)
    for name, p in model.named_parameters():
        if p.ndim > 1:
            p.data.normal_(std=0.02)
        else:
            p.data.fill_("norm" in name and name.endswith("weight"))
    fast.prepare(model)
    if args.compile:
        setup.compile_blocks(model)
    if a.recompute:
        setup.recompute(model)
    return model


def invent(model: VLM, micro: int, length: int) -> dict[str, torch.Tensor]:
    """One micro-batch of rows that are `length` long with the picture."""
    size = model.vision.config.image_size
    T = length - model.picture_rows + 1
    kept = min(length // 4, T - 2)
    rows = []
    for ids in torch.randint(3, model.llm.config.vocab_size, (micro, T)).tolist():
        ids[:2] = [1, IMAGE_TOKEN]
        sample = data.Sample(ids, [IGNORE] * (T - kept) + ids[-kept:], [ids[2:34]])
        rows.append(data.item(sample, torch.rand(3, size, size)))
    return data.make_batch(rows)


class Steps:
    """Training steps on one batch again and again: their seconds, losses and gradients' norms."""

    def __init__(self, model: VLM, batch: dict, a: argparse.Namespace, device: torch.device):
        mesh = sharding.layout(device) if a.parallel == "fsdp" else None
        self.shared = sharding.share(model, a.parallel, device, torch.bfloat16, False, mesh)
        self.trained = train.trained_of(model)
        self.optimizer = train.adamw(self.trained, 1e-5)
        self.batch, self.mode, self.device = batch, a.mode, device
        self.seconds, self.losses, self.norms = [], [], []

    def step(self) -> None:
        tic = time.perf_counter()
        self.losses.append(train.train_step(self.shared, [dict(self.batch)], self.device,
                                            torch.bfloat16, self.mode))
        self.norms.append(train.gradient_norm(self.trained))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - tic)


def profile(steps: Steps, file: str) -> None:
    """Write what the kernels of one more step take."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as kernels:
        steps.step()
    averages = kernels.key_averages()
    Path(file).write_text(averages.table(sort_by="cuda_time_total", row_limit=30))


def main() -> None:
    args = arguments()
    a = planned(args)
    kinds = predict(a, args.layers)
    rank, _, device = distributed.join("cuda")
    torch.manual_seed(0)
    model = build(a, args, device)
    steps = Steps(model, invent(model, args.micro, args.length), a, device)
    torch.cuda.reset_peak_memory_stats()
    for _ in range(args.steps + 2):
        steps.step()
    most = torch.cuda.max_memory_allocated()
    second = statistics.median(steps.seconds[2:])
    losses, norms = list(steps.losses), list(steps.norms)
    if args.profile:
        profile(steps, args.profile)
    supervised = int((steps.batch["labels"][:, 1:] != IGNORE).sum())
    work = plan.flops(model, [args.length] * args.micro, supervised, False, args.stage == 2)
    name = torch.cuda.get_device_name()
    peak = plan.peak_flops(name)
    found = dict(vars(args), card=name, torch=torch.__version__, parallel=a.parallel,
                 recompute=a.recompute, parameters=sum(p.numel() for p in model.parameters()),
                 seconds=round(second, 4), samples_per_s=round(args.micro / second, 2),
                 tokens_per_s=round(args.micro * args.length / second),
                 mfu=round(work / second / peak, 4) if peak else None,
                 peak_gib=round(most / 2**30, 2), norms=norms, losses=losses,
                 planned_gib=round(kinds["total"] / 2**30, 2),
                 kinds={k: round(v / 2**30, 2) for k, v in kinds.items()})
    if rank == 0:
        print(json.dumps(found), flush=True)
    distributed.leave()


if __name__ == "__main__":
    run(main)
