"""What a training says: what it is, in a line; then of every step a line on stdout and a row of
log.csv, which training/curve.py draws."""
import math
import os
import sys
import time

import torch

from core.common import UserError, write_text
from core.distributed import where
from training import curve, plan
from training.options import PAPER_STEPS
from training.val import in_words

try:
    import resource
except ImportError:                 # Windows
    resource = None

COLUMNS = ("step", "loss", "lr", "grad_norm", "tokens_per_s", "samples_per_s", "mfu", "data_wait",
           "peak_gib", "val_loss", "val_right")
MEASURED = COLUMNS[-2:]             # on held-out records, where it is their turn; else empty


def describe(run, start: int) -> str:
    """What is about to be trained, in a line. run: a train.Run; start: the step that it goes on
    from."""
    args, size = run.args, where()[1]
    trained = sum(p.numel() for p in run.trained.values())
    count = sum(p.numel() for p in run.vlm.parameters())
    what = f" ({', '.join(args.train)}{f', LoRA {args.lora}' * bool(args.lora)})" * bool(args.train)
    line = (f"stage {args.stage} on {run.device} in {run.dtype}: {trained:,} of {count:,} "
            f"parameters trained{what}, {run.course['samples']:,} samples, {run.course['steps']:,} "
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
        self.path = args.out / "log.csv"
        self.fault = None                            # why a row is missing in the file
        try:
            write_text(self.path, "\n".join([",".join(COLUMNS), *self.before(), ""]))
            self.file = open(self.path, "ab", buffering=0)
        except OSError as e:
            raise UserError(f"{self.path}: cannot write it ({e.strerror or e})") from e
        self.wandb = None
        if args.wandb:
            import wandb
            self.wandb = wandb.init(project="nanoccra", dir=args.out,
                                    config={k: str(v) for k, v in vars(args).items()})

    def before(self) -> list[str]:
        """The rows to go on behind. What an interrupted run logged after its last checkpoint is
        done again. Rows of before there was MEASURED get it, empty."""
        if not self.start or not self.path.exists():
            return []
        lines = self.path.read_text(errors="replace").splitlines()
        rows = [line.split(",") for line in lines]
        old = len(COLUMNS) - len(MEASURED)
        rows = [row + [""] * len(MEASURED) if len(row) == old else row for row in rows]
        return [",".join(row) for row in rows
                if len(row) == len(COLUMNS) and row[0].isdecimal() and int(row[0]) <= self.start]

    def check(self) -> None:
        """UserError unless all rows are in the file: a checkpoint shall not be ahead of it."""
        try:
            os.fsync(self.file)
        except OSError as e:
            self.fault = self.fault or e.strerror or str(e)
        if self.fault:
            raise UserError(f"{self.path}: cannot write it ({self.fault}); mend that, and the same "
                            "command goes on from the last checkpoint")

    def draw(self) -> None:
        """The losses so far as a picture. Nothing else hangs on it."""
        try:
            curve.draw(self.path.parent)
        except (UserError, OSError) as e:
            print(f"warning: {e}; the training goes on without this picture", file=sys.stderr)

    def row(self, step: int, loss: float, lr: float, norm: float, tokens: float, samples: int,
            seconds: float, waited: float, work: float, device: torch.device,
            val: dict | None = None) -> None:
        """norm: of the gradient; tokens, samples: of the whole batch; seconds: that the step took,
        waited: those that it waited for data. work: FLOPs of one process; MFU is its share of the
        device's peak, where that is known. val: what `val.Held.measure` found, if it did."""
        peak = peak_flops(device)
        mfu = f"{100 * work / seconds / peak:.1f}" if peak else "-"
        wait = f"{100 * waited / seconds:.1f}"
        most = peak_memory(device)
        memory = f"{most / 2 ** 30:.2f}" if most else "-"
        left = (time.perf_counter() - self.began) / (step - self.start) * (self.steps - step) / 60
        print(f"step {step}/{self.steps} {100 * step / self.steps:.1f}% loss {loss:.4f} "
              f"lr {lr:.2e} norm {norm:.2f} {tokens / seconds:,.0f} tokens/s "
              f"{samples / seconds:.1f} samples/s mfu {mfu}% data {wait}% peak {memory} GiB "
              f"eta {left:.1f} min", flush=True)
        measured = ["", ""]
        if val:
            print(f"val: {in_words(val)}", flush=True)
            measured = ["" if val[key] is None else f"{val[key]:.6f}" for key in MEASURED]
        values = (step, f"{loss:.6f}", f"{lr:.4e}", f"{norm:.4f}", f"{tokens / seconds:.0f}",
                  f"{samples / seconds:.2f}", mfu, wait, memory, *measured)
        line = (",".join(map(str, values)) + "\n").encode()
        try:
            if self.file.write(line) < len(line):
                self.fault = self.fault or "there is no room"
        except OSError as e:
            self.fault = self.fault or e.strerror or str(e)
        if self.wandb:
            known = {k: float(v) for k, v in zip(COLUMNS[1:], values[1:])
                     if v not in ("-", "")}
            self.wandb.log(known, step=step)


def peak_flops(device: torch.device) -> float | None:
    """FLOP/s that the device can do, or None where it isn't known."""
    if device.type != "cuda":
        return None
    return plan.peak_flops(torch.cuda.get_device_name(device))


def peak_memory(device: torch.device) -> int:
    """Bytes that were in use at most: of the GPU, else of this process; 0 where nobody knows."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if resource is None:
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
