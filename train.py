"""Train a vision-language model with CCRA: both stages of the paper (section 4.1, Table 5,
Algorithm 1).

    python train.py --stage 1       the projector alone learns to turn pictures into "words"
    python train.py --stage 2       projector, CCRA and language model learn to answer questions
    torchrun --nproc_per_node=8 train.py --stage 2     the paper's training on eight GPUs
    python train.py --model llava-1.5-7b-hf --fuser ccra --train fuser projector \\
                    --json my.json --images my         CCRA in a LLaVA that is trained already
    python train.py --stage 2 --plan --gpus 8 --gpu a100-80     what that takes, without a GPU

One process trains the toy world (toy/) on whatever this machine has; under torchrun it is LLaVA's
data and public towers, in the places that are printed when something is missing. --world says
otherwise, and so does --json.

The loss is the sum over the supervised tokens of the whole global batch divided by their number, so
cutting a batch into micro-batches (--micro), or sharing it out among processes, changes no
gradient. (LLaVA averages the means of micro-batches, which gives a token of a short answer more
weight.) A run that was stopped goes on where it was, bit for bit, when the same command is given
again; on another number of processes, too, with sums in another order.
"""
from core import common  # first: from here on Ctrl-C is a line

# isort: split
import argparse
import math
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import islice, tee

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import data
import fast
from ccra import VLM
from core import distributed
from core.common import UserError, split, write_json
from core.device import autocast_dtype
from core.distributed import say, together, total, where
from core.tokenizer import Tokenizer
from training import adapters, asking, before, lora, plan, setup, sharding
from training.checkpoints import Checkpoints
from training.log import Log, describe
from training.options import arguments, check_places
from training.order import order
from training.readers import Lenient, Notes, Readers
from training.setup import build, compile_blocks, open_dataset, recompute, settings
from training.stop import Stop
from training.val import Held

# --------------------------------------------------------------------------------------------------
# Who is trained, and how


def freeze(model: VLM, stage: int, mode: str = "on", train_vision: bool = False,
           parts: Sequence[str] = ()) -> dict[str, nn.Parameter]:
    """Stage 1 trains the projector, stage 2 everything but the vision tower (Algorithm 1), or the
    parts that are named. Returns what is trained.

    mode is how CCRA runs: if it is on in stage 1, it is trained there as well, as is a fuser that
    doesn't ask. What no gradient reaches (an ablated part) was frozen when the model was built and
    stays so; what nobody reads of the tower, its last norm and for plain LLaVA its last block,
    joins it.
    """
    chosen = {"projector"}
    if stage == 2 or mode == "on" or not model.fuser.asks:
        chosen.add("fuser")
    if stage == 2:
        chosen.add("llm")
    chosen = {*(parts or chosen), *(["vision"] if train_vision else [])}
    blocks = range(model.fuser.n_blocks, len(model.vision.layers))
    unread = ["vision.post_layernorm.", *(f"vision.layers.{i}." for i in blocks)]
    for name, p in model.named_parameters():
        p.requires_grad_(p.requires_grad and name.partition(".")[0] in chosen
                         and not name.startswith(tuple(unread)))
    return trained_of(model)


def trained_of(model: VLM) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def save_precision(trained: dict[str, nn.Parameter], model: VLM, dtype: torch.dtype,
                   narrow: Sequence[nn.Linear] = ()) -> None:
    """float32 for what is trained (master weights); what is frozen is only read, so it may be as
    narrow as products. narrow: layers whose frozen weight stays as it is stored."""
    chosen, kept = {id(p) for p in trained.values()}, {id(layer.weight) for layer in narrow}
    for p in model.parameters():
        if id(p) in kept:
            continue
        stored = p.data
        p.data = stored.to(torch.float32 if id(p) in chosen else dtype)
        if p.data_ptr() != stored.data_ptr():
            fast.forget(stored)                      # else its file's pages would stay, too


def get_lr(step: int, steps: int, peak: float, warmup: float) -> float:
    """Linear warm-up over ceil(warmup * steps), then half a cosine to zero. step counts from 0."""
    warm = math.ceil(warmup * steps)
    if step < warm:
        return peak * (step + 1) / warm
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def adamw(trained: dict[str, nn.Parameter], lr: float,
          rates: dict[str, float] | None = None) -> torch.optim.AdamW:
    """LLaVA's: no weight decay, and no gradient clipping (its DeepSpeed configuration leaves
    clipping off). On a GPU in one kernel: else a step's intermediate results take another 4 bytes a
    parameter. rates: peaks of the parts that have their own, as {"projector": 2e-5}."""
    on_gpu = next(iter(trained.values())).device.type == "cuda"
    groups = {}
    for name, p in trained.items():
        peak = (rates or {}).get(name.partition(".")[0], lr)
        groups.setdefault(peak, dict(params=[], lr=peak, peak=peak))["params"].append(p)
    return torch.optim.AdamW(groups.values(), betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0,
                             fused=on_gpu or None)


# --------------------------------------------------------------------------------------------------
# A run, and its data

@dataclass
class Run:
    """What all steps of a training have in common, in one of its processes."""
    args: argparse.Namespace            # train.py's, complete (training/options.py)
    model: nn.Module                    # as it is trained: a VLM, whole or sliced, or DDP around it
    trained: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    dataset: torch.utils.data.Dataset   # of data.item's
    tokenizer: Tokenizer
    course: dict                        # `settings`: what decides the course of the run
    device: torch.device
    dtype: torch.dtype                  # of products, by autocast
    size: int                           # bytes of the model that it ends with
    held: Held | None = None            # --val
    base: dict | None = None            # of an adapter, in the first process: adapters.identity

    @property
    def vlm(self) -> VLM:
        return getattr(self.model, "module", self.model)


def pieces(rows: list[int], rank: int, size: int, micro: int) -> tuple[list[list[int]], int]:
    """This process's share of a step's samples in micro-batches, and how many of these count.

    All processes get as many micro-batches, since in each they wait for each other: who has fewer
    takes a sample again, which `train_step` is told not to count.
    """
    mine = split(rows[rank::size], micro)
    most = len(split(rows[::size], micro))
    return mine + [rows[:1]] * (most - len(mine)), len(mine)


def shares(steps: Iterable[list[int]], dataset, rank: int, size: int, micro: int) -> Iterator:
    """(samples, *pieces) of every step. Where lengths can be told at once, a step's samples go by
    length, so that those of one micro-batch, and those of all processes at a time, need little
    padding. The step and its gradient stay the same."""
    for rows in steps:
        if hasattr(dataset, "length"):
            rows = sorted(rows, key=dataset.length)
        yield rows, *pieces(rows, rank, size, micro)


def feed(run: Run, start: int, stop: Stop) -> tuple[Iterator, Readers]:
    """The shares of steps start+1, start+2, ..., and the batches of all their pieces in turn, which
    other processes read ahead (--workers)."""
    args, vlm = run.args, run.vlm
    rank, size = where()
    max_length = before.row_length(args, vlm)
    like = {}
    if args.group != "none":
        lengths = run.dataset.lengths(vlm.picture_rows, max_length)
        like = dict(group=args.group, pictures=run.dataset.has_picture(), lengths=lengths)
    steps = order(len(run.dataset), run.course["steps"], args.batch, args.seed, **like)
    steps = shares(islice(steps, start, None), run.dataset, rank, size, args.micro)
    todo, ahead = tee(steps)
    # micro-batches of a step; all are wanted at once
    at_once = math.ceil(math.ceil(args.batch / size) / args.micro)
    dataset = run.dataset
    if args.world != "toy":
        dataset = Lenient(dataset, Notes(args.out / "damaged.jsonl"))
    return todo, Readers(
        dataset, (piece for _, mine, _ in ahead for piece in mine),
        partial(data.make_batch, query=vlm.query, max_length=max_length,
                picture_rows=vlm.picture_rows),
        args.workers, max(2, math.ceil(at_once / max(1, args.workers))), stop, args.micro,
        run.device)


# --------------------------------------------------------------------------------------------------
# A step, and all of them

def train_step(model: nn.Module, batches: list[dict[str, Tensor]], device: torch.device,
               dtype: torch.dtype, mode: str = "on", counting: int | None = None) -> float:
    """Forward and backward of one global batch, given as this process's micro-batches.

    dtype: of autocast. counting: how many of the micro-batches count (None: all); the others keep
    other processes company. Returns this process's share of the mean loss of a supervised token, to
    be summed: NaN, and no gradient, where there is no such token.
    """
    for batch in batches[counting:] if counting is not None else ():
        batch["labels"].fill_(data.IGNORE)
    # position t predicts label t + 1, so nothing predicts the first
    supervised = sum(int((b["labels"][:, 1:] != data.IGNORE).sum()) for b in batches)
    supervised = total(supervised, device=device)
    if supervised == 0:
        return math.nan
    size = where()[1]
    loss_sum = 0.0
    for i, batch in enumerate(batches, 1):
        batch = {k: v.to(device, non_blocking=True) for k, v in batch.items()}
        # DDP averages gradients over processes at the end of a backward; earlier micro-batches only
        # add to theirs. FSDP sums them every time: to put it off, each process would have to keep
        # whole gradients.
        ddp = isinstance(model, DistributedDataParallel)
        with model.no_sync() if ddp and i < len(batches) else nullcontext():
            with sharding.products_in(dtype, device):
                loss = model(**batch, mode=mode) / supervised
            (loss * size).backward()
        loss_sum += loss.item()
    return loss_sum


def cost(run: Run, batches: list[dict[str, Tensor]]) -> float:
    """FLOPs of this process's share of a step."""
    lengths, supervised = [], 0                                # of rows, with the picture in them
    for batch in batches:
        pictures = (batch["ids"] == data.IMAGE_TOKEN).sum(1)                                 # (B,)
        lengths += (batch["mask"].sum(1) + (run.vlm.picture_rows - 1) * pictures).tolist()
        supervised += int((batch["labels"] != data.IGNORE).sum())
    return plan.flops(run.vlm, lengths, supervised, run.args.train_vision,
                      plan.trains_llm(run.args))


def gradient_norm(trained: dict[str, nn.Parameter]) -> float:
    """Of all processes' slices together."""
    grads = [p.grad for p in trained.values() if p.grad is not None]
    return float(sharding.whole(torch.nn.utils.get_total_norm(grads)))


def update(run: Run, step: int, loss: float, norm: float, spoilt: int) -> int:
    """AdamW's step, unless loss or gradient isn't finite, which is then the same on all processes.
    step counts from 0. spoilt: how many steps in a row weren't, before this one; returns how many
    now."""
    finite = math.isfinite(loss) and math.isfinite(norm)
    if finite:
        for group in run.optimizer.param_groups:
            group["lr"] = get_lr(step, run.course["steps"], group["peak"], run.args.warmup)
        run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    return 0 if finite else spoilt + 1


def complain(run: Run, step: int, rows: list[int], loss: float, norm: float, spoilt: int) -> None:
    """Say that a step changed nothing. UserError if it is the third in a row."""
    ids = ", ".join(run.dataset.record_id(i) for i in rows[:8])
    fault, way_on = f"loss {loss}, gradient norm {norm}", "lower --lr"
    if norm == 0:                                    # there was no gradient: see train_step
        fault, way_on = "not one supervised token", "give a larger --max-length"
    what = f"step {step}: {fault}; not updated; samples {ids}"
    if spoilt == 3:
        raise UserError(f"{what}. That was the third step in a row: {way_on}, or look at these "
                        "samples")
    say(what)


def loop(run: Run, start: int) -> bool:
    """Steps start+1, start+2, ... True when it came to the end, False when --stop-after or a signal
    (training/stop.py) ended it."""
    if 0 < run.args.stop_after <= start:
        return False
    with Stop() as stop:
        return all_steps(run, start, stop)


def all_steps(run: Run, start: int, stop: Stop) -> bool:
    """`loop`, from its first step on."""
    args, steps = run.args, run.course["steps"]
    fast.keep_memory(run.device)
    todo, readers = feed(run, start, stop)
    checkpoints = Checkpoints(args.out / "checkpoints", args.keep)
    with together():
        log = Log(args, start, steps) if where()[0] == 0 else None
    spoilt = 0
    for step, (rows, mine, counting) in enumerate(todo, start + 1):
        # data
        began = time.perf_counter()
        taken = readers.take(len(mine))
        if taken is None:                            # and none will come
            if step - 1 > start and (step - 1) % args.save_every:
                save(run, checkpoints, log, step - 1)
            if readers.fault or step == 1:
                raise readers.fault or UserError("ended before the first step, for which no "
                                                 "picture came")
            return False
        waited = time.perf_counter() - began
        # forward and backward
        loss = train_step(run.model, taken, run.device, run.dtype, args.mode, counting)
        # what all processes have to say
        tokens = sum(int(batch["mask"].sum()) for batch in taken)
        loss, tokens, work, asked = total(loss, tokens, cost(run, taken), float(stop.asked),
                                          device=run.device)
        norm = gradient_norm(run.trained)
        # update
        lr = get_lr(step - 1, steps, args.lr, args.warmup)
        spoilt = update(run, step - 1, loss, norm, spoilt)
        if spoilt:
            complain(run, step, rows, loss, norm, spoilt)
        # log
        seconds = time.perf_counter() - began
        found = run.held.measure(run, step) if run.held else {}
        if log:
            log.row(step, loss, lr, norm, tokens, len(rows), seconds, waited, work / where()[1],
                    run.device, found)
        # save
        ends = step == args.stop_after or asked > 0
        if step % args.save_every == 0 or step == steps or ends:
            save(run, checkpoints, log, step)
        # ask
        if args.ask_every and step % args.ask_every == 0:
            asking.say_answers(run, step)
        if ends:
            return False
    return True


def save(run: Run, checkpoints: Checkpoints, log: Log | None, step: int) -> None:
    """A checkpoint of the model after `step` steps, and the losses so far as a picture."""
    with together():
        if log:
            log.check()
    checkpoints.save(step, run.trained, run.optimizer, run.course)
    if log:
        log.draw()


# --------------------------------------------------------------------------------------------------
# Before and after

def sketch(args: argparse.Namespace) -> VLM:
    """The model of --plan as it is trained, without numbers."""
    model = setup.sketch(args)
    dtype = plan.product_dtype(args)
    freeze(model, args.stage, args.mode, args.train_vision, args.train)
    if not plan.trains_llm(args):
        model.llm.bfloat16()                        # as public ones are stored
    narrow = setup.frozen_llm(args, model, dtype)
    save_precision(trained_of(model), model, dtype, narrow)
    if args.recompute:
        recompute(model)
    return model


def begin(args: argparse.Namespace, model: VLM, tokenizer: Tokenizer, dataset,
          device: torch.device) -> Run:
    """The run of a model from `build`: its parts frozen or in float32, its blocks as the flags say,
    shared out over processes."""
    dtype = autocast_dtype(device) if args.dtype == "auto" else getattr(torch, args.dtype)
    freeze(model, args.stage, args.mode, args.train_vision, args.train)
    course = settings(args, dataset) | dict(basis=setup.basis(model, tokenizer, args.stage))
    narrow = setup.frozen_llm(args, model, dtype)
    if not trained_of(model):
        raise UserError("nothing is left to train: the fuser "
                        f"{model.fuser.name!r} has no parameters of its own")
    size = setup.size_at_end(model, args, dtype)
    save_precision(trained_of(model), model, dtype, narrow)
    fast.prepare(model)
    if args.compile:
        compile_blocks(model)
    if args.recompute:
        recompute(model)
    mesh = sharding.layout(device, args.shard_size) if args.parallel == "fsdp" else None
    shared = sharding.share(model, args.parallel, device, dtype, args.shard == "grad", mesh)
    trained = trained_of(model)                     # sliced parameters are others than before
    optimizer = adamw(trained, args.lr, args.rates)
    run = Run(args, shared, trained, optimizer, dataset, tokenizer, course, device, dtype, size)
    with together():
        if args.adapter and where()[0] == 0:
            run.base = adapters.identity(args.model, args.vision, course["basis"])
    return run


def resume(run: Run) -> int:
    """The step to go on from, after loading its checkpoint. UserError if there isn't room for what
    is still to be written."""
    args = run.args
    checkpoints = Checkpoints(args.out / "checkpoints", args.keep)
    start = checkpoints.load(run.trained, run.optimizer, run.course)
    left = math.ceil((run.course["steps"] - start) / args.save_every)
    with together():
        best = run.held.room(run.trained) if run.held else 0
        checkpoints.check_room(run.trained, left, run.size + best)
    return start


def write_model(run: Run) -> None:
    """The trained model as a folder that from_pretrained reads, and train.json, which says how it
    came about.

    All processes call it; the first one writes. What stage 2 ends with is in dtype. Stage 1 goes
    on: what it trained is in float32, and the rest is written as it was found, since
    `save_precision` may have rounded it.
    """
    args, model = run.args, run.vlm
    first = where()[0] == 0
    with together():
        found = setup.found_again(run) if first and args.stage == 1 else {}
    tensors = {}
    for name, p in model.named_parameters():
        tensor = sharding.whole(p)         # one after the other: a card never holds the whole model
        if not first:
            continue
        if args.stage == 2:
            tensors[name] = tensor.to("cpu", torch.float32 if ".lora_" in name else run.dtype)
        elif name in run.trained:
            tensors[name] = tensor.to("cpu", torch.float32)
        else:
            tensors[name] = found[name].detach()
    with together():
        if first:
            model.save_pretrained(args.out, tokenizer_file=run.tokenizer.file,
                                  tensors=lora.folded(model, tensors))
            write_json(args.out / "train.json", {**run.course, "model": setup.choices(model)})


def write_adapter(run: Run) -> None:
    """What was learnt beside a base that stays as it is, as a folder for --adapter, and train.json.

    All processes call it; the first one writes (training/adapters.py).
    """
    args, model = run.args, run.vlm
    first = where()[0] == 0
    base = distributed.gather(run.base)[0]
    parameters, tensors = dict(model.named_parameters()), {}
    for name in adapters.held_names(model, run.trained, base):
        tensor = sharding.whole(parameters[name])
        if first:
            tensors[name] = tensor.to("cpu", torch.float32)
    with together():
        if first:
            adapters.save(model, args.out, base, tensors, run.trained)
            write_json(args.out / "train.json", {**run.course, "model": setup.choices(model)})


def main(argv: list[str] | None = None) -> None:
    args = arguments(argv, __doc__)
    if args.plan:
        print(plan.report(args, sketch(args)))
        return
    check_places(args)
    *_, device = distributed.join(args.device, args.threads)
    torch.manual_seed(args.seed)
    model, tokenizer = build(args)
    dataset = open_dataset(args, tokenizer, model.vision.config.image_size)
    before.check(args, dataset, model)
    held = Held(args, model, tokenizer, dataset) if args.val else None
    claimed = setup.claim(args.out)
    run = begin(args, model, tokenizer, dataset, device)
    run.held = held
    start = resume(run)
    say(describe(run, start))
    if line := setup.inherited(args, model):
        say(line)
    ended = loop(run, start)
    if ended and held:
        held.put_best(run)
    if ended and args.adapter:
        write_adapter(run)
        say(f"adapter written to {args.out}; ask it: python sample.py --model {args.model} "
            f"--adapter {args.out}")
    elif ended:
        write_model(run)
        say(f"model written to {args.out}")
    else:
        again = " without --stop-after" if args.stop_after else ""
        say(f"stopped early, after a checkpoint; the same command{again} goes on")
    distributed.leave()
    if claimed:
        claimed.close()
    if Stop.by_key:
        sys.exit(130)


if __name__ == "__main__":
    common.run(main, "what was saved stays in --out, and the same command goes on from there")
