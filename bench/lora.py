"""A training step of LoRA in time and memory, beside transformers with peft.

    python -m bench.lora                          two blocks of LLaVA-7B's size, one row of 640
    python -m bench.lora --supervised 640         every position is learnt from, not the last 64
    python -m bench.lora --recompute              blocks compute again in the backward
    python -m bench.lora --stored bfloat16        ours: frozen weights in 2 bytes, products float32

Both sides get the same numbers, frozen weights and LoRA beside the seven matrices of each block; a
step is forward, loss, backward and AdamW. What goes in needs a gradient, too, since a projector
before it is trained. The sides take turns, each run a process of its own. Time is the median of all
steps but each run's first, and beside it the processor's, which says more on a busy machine; memory
is the highest resident one during the steps (on a GPU: what was allocated), above what it was
before them, and with the weights. That the first losses agree is checked.
"""
from core.common import run  # first: from here on Ctrl-C is a line

# isort: split
import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from bench.sides import forget_peak, memory
from core import flags
from core.common import ROOT, UserError, write_json
from core.flags import whole
from core.tokenizer import IGNORE
from training.lora import MATRICES

SIDES = {"ours": "this code", "peer": "transformers, peft"}
TOLERANCE = 2e-3               # of the first loss: what bfloat16 makes of it


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    p = flags.Parser(prog="python -m bench.lora", description=__doc__)
    p.add_argument("--layers", type=whole(1, 200), default=2)
    p.add_argument("--width", type=whole(8, 1 << 17), default=4096, help="D (default 4096)")
    p.add_argument("--inner", type=whole(8, 1 << 17), default=11008, help="of the MLPs "
                   "(default 11008)")
    p.add_argument("--heads", type=whole(1, 1024), default=32)
    p.add_argument("--vocab", type=whole(8, 1 << 20), default=32000)
    p.add_argument("--positions", type=whole(2, 1 << 16), default=640, help="of the row")
    p.add_argument("--supervised", type=whole(1, 1 << 16), default=64,
                   help="of these, its last, are learnt from (default 64: a short answer behind a "
                   "picture)")
    p.add_argument("--r", type=whole(1, 1 << 12), default=16, help="LoRA's rank (default 16)")
    p.add_argument("--recompute", action="store_true")
    p.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32",
                   help="of frozen weights and, by autocast, of products, on both sides")
    p.add_argument("--stored", choices=("bfloat16", "float16"),
                   help="ours: frozen matrices stay in this; products as --dtype says")
    p.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    p.add_argument("--steps", type=whole(2, 1000), default=3, help="of each run (default 3)")
    p.add_argument("--rounds", type=whole(1, 1000), default=3, help="runs of each side (default 3)")
    p.add_argument("--threads", type=whole(1, 1024), default=1, help="default: 1")
    p.add_argument("--json", metavar="FILE", help="write all that was measured to a file")
    p.add_argument("--child", choices=SIDES, help=argparse.SUPPRESS)
    args = p.parse_args(argv)
    if importlib.util.find_spec("peft") is None:
        raise UserError("this needs peft and transformers (pip install -r requirements-test.txt)")
    if args.supervised >= args.positions:
        args.supervised = args.positions - 1         # nothing predicts the first
    return args


# --------------------------------------------------------------------------------------------------
# The two sides: a model with LoRA, and what it makes of a row

def numbers(model: nn.Module, args: argparse.Namespace) -> nn.Module:
    """Frozen weights, the same on both sides, whatever prefix their names have."""
    kind, g = getattr(torch, args.dtype), torch.Generator(args.device)
    model.to_empty(device=args.device)
    with torch.no_grad():
        for name, p in model.named_parameters():
            g.manual_seed(sum(ord(c) * 7 ** (i % 9) for i, c in enumerate(
                name.removeprefix("model."))))
            p.data = p.data.to(kind)
            p.fill_(1) if p.ndim == 1 else p.normal_(std=0.02, generator=g)
    return model.requires_grad_(False)


def ours(args: argparse.Namespace) -> tuple[nn.Module, Callable]:
    """Our Llama, as train.py prepares it."""
    import fast
    from core.weights import skeleton
    from llama import Llama, LlamaConfig
    from training import lora, setup
    with skeleton():
        llm = Llama(LlamaConfig(args.vocab, args.width, args.inner, args.layers, args.heads,
                                rms_norm_eps=1e-5, max_position_embeddings=4096))
    numbers(llm, args)
    lora.add(llm, args.r, 2 * args.r)
    for _, _, layer in lora.layers(llm) if args.stored else ():
        layer.weight.data = layer.weight.data.to(getattr(torch, args.stored))
    fast.prepare(llm)
    fast.keep_memory(torch.device(args.device))
    if args.recompute:
        setup.recompute(SimpleNamespace(llm=llm))

    def loss(embeds: Tensor, labels: Tensor) -> Tensor:
        return llm.loss(llm.hidden(embeds=embeds), labels) / args.supervised

    return llm, loss


def peer(args: argparse.Namespace) -> tuple[nn.Module, Callable]:
    """transformers' Llama in peft's wrapper."""
    import peft
    import transformers
    transformers.logging.set_verbosity_error()
    config = transformers.LlamaConfig(
        vocab_size=args.vocab, hidden_size=args.width, intermediate_size=args.inner,
        num_hidden_layers=args.layers, num_attention_heads=args.heads, rms_norm_eps=1e-5,
        max_position_embeddings=4096, use_cache=False)
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    numbers(model, args)
    rotary = model.model.rotary_emb                  # to_empty emptied its buffers
    model.model.rotary_emb = type(rotary)(config=config).to(args.device)
    model = peft.get_peft_model(model, peft.LoraConfig(
        r=args.r, lora_alpha=2 * args.r, lora_dropout=0.0, target_modules=list(MATRICES),
        task_type="CAUSAL_LM")).train()
    if args.recompute:
        model.gradient_checkpointing_enable({"use_reentrant": False})

    def loss(embeds: Tensor, labels: Tensor) -> Tensor:
        return model(inputs_embeds=embeds, labels=labels).loss

    return model, loss


def measure(args: argparse.Namespace) -> dict:
    """One run of a side: seconds of its steps, the first loss, memory in bytes."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    model, loss_of = {"ours": ours, "peer": peer}[args.child](args)
    g = torch.Generator().manual_seed(1)
    embeds = torch.randn(1, args.positions, args.width, generator=g).mul_(0.02).to(args.device)
    labels = torch.randint(args.vocab, (1, args.positions), generator=g).to(args.device)
    labels[:, :-args.supervised] = IGNORE
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0)
    autocast = torch.autocast(args.device, torch.bfloat16, enabled=args.dtype == "bfloat16")
    before = resident(args.device)
    forget_peak(args.device)
    took, cpu, losses = [], [], []
    for _ in range(args.steps):
        began, worked = time.perf_counter(), time.process_time()
        with autocast:
            loss = loss_of(embeds.requires_grad_(), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        embeds.grad = None
        losses.append(loss.item())                   # on a GPU this waits
        took.append(time.perf_counter() - began)
        cpu.append(time.process_time() - worked)
    peak = memory(args.device)["peak"]
    return dict(seconds=took[1:], cpu=cpu[1:], loss=losses[0], peak=peak, rise=peak - before,
                trained=sum(p.numel() for p in trained))


def resident(device: str) -> int:
    """Bytes that this process has now."""
    forget_peak(device)
    return memory(device)["peak"]


# --------------------------------------------------------------------------------------------------
# Turns

def child(side: str, argv: list[str]) -> dict:
    """One run, in a process of its own."""
    done = subprocess.run([sys.executable, "-m", "bench.lora", *argv, "--child", side],
                          capture_output=True, text=True, cwd=ROOT, env=os.environ)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(f"{side}: {reason.removeprefix('error: ')}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def summary(runs: list[dict]) -> dict:
    """Of one side's runs."""
    times = {key: [s for one in runs for s in one[key]] for key in ("seconds", "cpu")}
    return dict(seconds=statistics.median(times["seconds"]), fastest=min(times["seconds"]),
                cpu=statistics.median(times["cpu"]),
                **{key: statistics.median(one[key] for one in runs) for key in ("peak", "rise")},
                loss=runs[0]["loss"], trained=runs[0]["trained"])


def show(found: dict[str, dict]) -> None:
    """The table, and how much ours is better."""
    print(f"{'':20s}  s a step: median  fastest  processor's  above the weights  with them  loss")
    for side, row in found.items():
        times = f"{row['seconds']:16.2f} {row['fastest']:8.2f} {row['cpu']:12.2f}"
        print(f"{SIDES[side]:20s}  {times}  {row['rise'] / 1e9:14.2f} GB  "
              f"{row['peak'] / 1e9:6.2f} GB  {row['loss']:.5f}")
    one, other = found["ours"], found["peer"]
    faster, cheaper = (other[key] / one[key] for key in ("seconds", "cpu"))
    share = one["rise"] / max(1, other["rise"])
    print(f"{faster:.2f}x as fast (processor's time {cheaper:.2f}x), {share:.2f} of the memory "
          f"above the weights; {one['trained']:,} parameters trained")


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    args = arguments(argv)
    if args.child:
        return print(json.dumps(measure(args)))
    runs = {side: [] for side in SIDES}
    for turn in range(args.rounds):
        for side in SIDES:
            runs[side].append(child(side, argv))
            times = zip(runs[side][-1]["seconds"], runs[side][-1]["cpu"])
            print(f"round {turn + 1} of {args.rounds}, {SIDES[side]}: "
                  + ", ".join(f"{s:.2f} s ({cpu:.2f})" for s, cpu in times), file=sys.stderr)
    found = {side: summary(those) for side, those in runs.items()}
    losses = [row["loss"] for row in found.values()]
    if abs(losses[0] - losses[1]) > TOLERANCE * losses[1] or len({
            row["trained"] for row in found.values()}) > 1:
        raise UserError(f"the sides compute different things: first losses {losses}")
    show(found)
    if args.json:
        write_json(Path(args.json), dict(args=vars(args), runs=runs, **found))


if __name__ == "__main__":
    run(main)
