"""How both towers of the toy world are trained: with Muon, for a fixed number of steps, on batches
that are functions of their step.

Stage 1 and 2 are AdamW alone, as in the paper (train.py). Here, where two cores have to teach a
small model to look things up, Muon gets there in a fraction of the steps.
"""
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

import fast
from core.common import write_beside
from core.device import autocast_dtype

CPU = torch.device("cpu")


class Muon(torch.optim.Optimizer):
    """Momentum whose update is made orthogonal by five Newton-Schulz steps (Jordan et al. 2024),
    for matrices.

    torch.optim.Muon does these steps in bfloat16, which takes a CPU that can't three seconds a
    step; this does them in what suits the machine.
    """

    def __init__(self, params: Iterable[nn.Parameter], lr: float, momentum: float = 0.95):
        super().__init__(params, dict(lr=lr, momentum=momentum))

    @torch.no_grad()
    def step(self) -> None:
        """Move every matrix by its gradient and its history."""
        for group in self.param_groups:
            for p in group["params"]:
                history = self.state[p].setdefault("momentum", torch.zeros_like(p))
                history.lerp_(p.grad, 1 - group["momentum"])
                u = torch.lerp(p.grad, history, group["momentum"])                    # Nesterov
                # as large as AdamW's steps
                p.add_(orthogonal(u), alpha=-group["lr"] * 0.2 * max(p.shape) ** 0.5)


def orthogonal(u: Tensor) -> Tensor:
    """About the orthogonal matrix that is nearest to u: all its singular values come close to 1."""
    tall = u.shape[0] > u.shape[1]
    u = u.T if tall else u
    u = (u / (u.norm() + 1e-7)).to(autocast_dtype(u.device))
    for _ in range(5):
        gram = u @ u.T
        u = 3.4445 * u + (-4.775 * gram + 2.0315 * gram @ gram) @ u
    return u.T if tall else u


def optimizers(model: nn.Module, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the blocks, AdamW for everything else."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "layers." in name]
    chosen = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    return [Muon(matrices, lr), torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.95), weight_decay=0.0)]


def pretrain(name: str, model: nn.Module,
             loss_of_step: Callable[[nn.Module, int], Iterable[tuple[Tensor, float]]],
             steps: int, lr: float, out: Path) -> None:
    """Train a model in place.

    loss_of_step(model, step) gives, in one part or several, the loss on the step's own,
    reproducible batch, and the share of its predictions that are right: [(loss, right)], to be
    summed. Warm-up over 50 steps, constant, linear to zero over the last quarter. Every 100 steps
    everything is written to out/NAME.ckpt, whole or not at all, and a run that was stopped goes on
    from there. out/NAME.csv is the log.
    """
    opts = optimizers(model, lr)
    start = resume(out / f"{name}.ckpt", model, opts)
    log = start_log(out / f"{name}.csv", start)
    fast.prepare(model)
    fast.keep_memory(CPU)
    began = time.perf_counter()
    for step in range(start, steps):
        rate = min(1, (step + 1) / 50, (steps - step) / (steps / 4))
        loss, right = train_step(model, opts, lr * rate, loss_of_step, step)
        done = step + 1
        if done % 20 == 0 or done == steps:
            each = (time.perf_counter() - began) / (done - start)
            print(f"{name} {done}/{steps} loss {loss:.3f} right {right:.3f} {each:.2f} s/step "
                  f"eta {each * (steps - done) / 60:.0f} min", flush=True)
            with open(log, "a") as file:
                file.write(f"{done},{loss:.4f},{right:.3f}\n")
        if done % 100 == 0 or done == steps:
            state = dict(model=model.state_dict(), opts=[o.state_dict() for o in opts], step=done)
            write_beside(out / f"{name}.ckpt", lambda tmp: torch.save(state, tmp))


def train_step(model: nn.Module, opts: list[torch.optim.Optimizer], lr: float,
               loss_of_step: Callable, step: int) -> tuple[float, float]:
    """One step at this learning rate; gives the loss and the share of right predictions."""
    loss = right = 0.0
    half = autocast_dtype(CPU) == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        for part, share in loss_of_step(model, step):
            part.backward()
            loss += part.item()
            right += share
    for opt in opts:
        for group in opt.param_groups:
            group["lr"] = lr
        opt.step()
        opt.zero_grad(set_to_none=True)
    return loss, right


def resume(checkpoint: Path, model: nn.Module, opts: list[torch.optim.Optimizer]) -> int:
    """Put a checkpoint back, if there is one; the number of steps that were done."""
    if not checkpoint.exists():
        return 0
    state = torch.load(checkpoint, weights_only=True)
    model.load_state_dict(state["model"])
    for opt, saved in zip(opts, state["opts"]):
        opt.load_state_dict(saved)
    return state["step"]


def start_log(log: Path, start: int) -> Path:
    """A log without what was written after the checkpoint, at `start`: that is done again."""
    rows = log.read_text().splitlines()[1:] if start else []
    rows = [row for row in rows if int(row.split(",")[0]) <= start]
    log.write_text("".join(f"{row}\n" for row in ["step,loss,right", *rows]))
    return log
