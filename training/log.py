"""TODO training/log.py"""
import csv
import resource
import sys
import time

import torch

from core.common import write_beside
from training import plan

COLUMNS = ("step", "loss", "lr", "grad_norm", "tokens_per_s", "samples_per_s", "mfu", "data_wait",
           "peak_gib")


class Log:
    """One line a step on stdout, and the same in log.csv, which a resumed run continues. curve.py
    draws it."""

    def __init__(self, args, start, steps):
        path = args.out / "log.csv"
        before = path.read_text().splitlines() if start and path.exists() else []
        # what an interrupted run logged after its last checkpoint is done again
        rows = [
            line for line in before
            if line.partition(",")[0].isdecimal() and int(line.partition(",")[0]) <= start]
        write_beside(path, lambda tmp: tmp.write_text("\n".join([",".join(COLUMNS), *rows, ""])))
        self.file, self.start, self.steps, self.began = open(
            path, "a", newline=""), start, steps, time.perf_counter()
        self.csv, self.wandb = csv.writer(self.file, lineterminator="\n"), None
        if args.wandb:
            import wandb
            self.wandb = wandb.init(project="nanoccra", dir=args.out,
                                    config={k: str(v) for k, v in vars(args).items()})

    def row(self, step, loss, lr, norm, tokens, samples, seconds, waited, work, device):
        """work: FLOPs of one process; MFU is its share of the device's peak, where that is known.
        """
        if device.type == "cuda":
            peak, most = plan.peak_flops(
                torch.cuda.get_device_name(device)), torch.cuda.max_memory_allocated(device)
        else:
            unit = 1 if sys.platform == "darwin" else 1024
            peak, most = None, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        mfu = f"{100 * work / seconds / peak:.1f}" if peak else "-"
        left = (time.perf_counter() - self.began) / (step - self.start) * (self.steps - step) / 60
        values = (step, f"{loss:.6f}", f"{lr:.4e}", f"{norm:.4f}", f"{tokens / seconds:.0f}",
                  f"{samples / seconds:.2f}", mfu, f"{100 * waited / seconds:.1f}",
                  f"{most / 2 ** 30:.2f}")
        print(
            f"step {step}/{self.steps} {100 * step / self.steps:.1f}% loss {loss:.4f} lr {lr:.2e} norm {norm:.2f} "
            f"{tokens / seconds:,.0f} tokens/s {samples / seconds:.1f} samples/s mfu {mfu}% data {values[7]}% "
            f"peak {values[8]} GiB eta {left:.1f} min", flush=True)
        self.csv.writerow(values)
        self.file.flush()
        if self.wandb:
            self.wandb.log({k: float(v) for k, v in zip(COLUMNS[1:], values[1:]) if v != "-"},
                           step=step)
