"""What a training says: what it is, in a line; then of every step a line on stdout and a row of
log.csv, which training/curve.py draws."""
import csv
import math
import resource
import sys
import time

import torch

from core.common import write_text
from core.distributed import where
from training import plan
from training.options import PAPER_STEPS

COLUMNS = ("step", "loss", "lr", "grad_norm", "tokens_per_s", "samples_per_s", "mfu", "data_wait",
           "peak_gib")


def describe(run, start: int) -> str:
    """What is about to be trained, in a line. run: a train.Run; start: the step that it goes on
    from."""
    args, size = run.args, where()[1]
    trained = sum(p.numel() for p in run.trained.values())
    count = sum(p.numel() for p in run.vlm.parameters())
    line = (f"stage {args.stage} on {run.device} in {run.dtype}: {trained:,} of {count:,} "
            f"parameters trained, {run.course['samples']:,} samples, {run.course['steps']:,} "
            f"steps of {args.batch}")
    how = [f"{size} processes, {args.parallel}"] if size > 1 else []
    share = math.ceil(args.batch / size)
    if args.micro < share:
        how.append(f"{math.ceil(share / args.micro)} micro-batches of {args.micro} in each")
    if how:
        line += f" ({'; '.join(how)})"
    if args.world == "llava":
        line += f"; the paper has {PAPER_STEPS[args.stage]:,} steps"
    return line + (f", going on after step {start}" if start else "")


class Log:
    """One line a step on stdout, and the same in log.csv, which a resumed run continues."""

    def __init__(self, args, start: int, steps: int):
        """start: the step that is gone on from; steps: of the whole run."""
        self.start = start
        self.steps = steps
        self.began = time.perf_counter()
        path = args.out / "log.csv"
        before = path.read_text().splitlines() if start and path.exists() else []
        numbers = [line.partition(",")[0] for line in before]
        # what an interrupted run logged after its last checkpoint is done again
        rows = [line for line, number in zip(before, numbers)
                if number.isdecimal() and int(number) <= start]
        write_text(path, "\n".join([",".join(COLUMNS), *rows, ""]))
        self.file = open(path, "a", newline="")
        self.csv = csv.writer(self.file, lineterminator="\n")
        self.wandb = None
        if args.wandb:
            import wandb
            self.wandb = wandb.init(project="nanoccra", dir=args.out,
                                    config={k: str(v) for k, v in vars(args).items()})

    def row(self, step: int, loss: float, lr: float, norm: float, tokens: float, samples: int,
            seconds: float, waited: float, work: float, device: torch.device) -> None:
        """norm: of the gradient; tokens, samples: of the whole batch; seconds: that the step took,
        waited: those that it waited for data. work: FLOPs of one process; MFU is its share of the
        device's peak, where that is known."""
        peak = peak_flops(device)
        mfu = f"{100 * work / seconds / peak:.1f}" if peak else "-"
        wait = f"{100 * waited / seconds:.1f}"
        memory = f"{peak_memory(device) / 2 ** 30:.2f}"
        left = (time.perf_counter() - self.began) / (step - self.start) * (self.steps - step) / 60
        print(f"step {step}/{self.steps} {100 * step / self.steps:.1f}% loss {loss:.4f} "
              f"lr {lr:.2e} norm {norm:.2f} {tokens / seconds:,.0f} tokens/s "
              f"{samples / seconds:.1f} samples/s mfu {mfu}% data {wait}% peak {memory} GiB "
              f"eta {left:.1f} min", flush=True)
        values = (step, f"{loss:.6f}", f"{lr:.4e}", f"{norm:.4f}", f"{tokens / seconds:.0f}",
                  f"{samples / seconds:.2f}", mfu, wait, memory)
        self.csv.writerow(values)
        self.file.flush()
        if self.wandb:
            known = {k: float(v) for k, v in zip(COLUMNS[1:], values[1:]) if v != "-"}
            self.wandb.log(known, step=step)


def peak_flops(device: torch.device) -> float | None:
    """FLOP/s that the device can do, or None where it isn't known."""
    if device.type != "cuda":
        return None
    return plan.peak_flops(torch.cuda.get_device_name(device))


def peak_memory(device: torch.device) -> int:
    """Bytes that were in use at most: of the GPU, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
