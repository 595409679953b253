"""Train a vision-language model with CCRA: both stages of the paper (section 4.1, Table 5, Algorithm 1).

    python train.py --stage 1          the projector alone learns to turn pictures into "words" (captions)
    python train.py --stage 2          projector, CCRA and language model learn to answer questions
    torchrun --nproc_per_node=8 train.py --stage 2          the same on eight GPUs (DDP), with the same global batch

Without further flags this is the embedded world (toy.py) on whatever this machine has. With --json and --images it is
LLaVA's data, with --data the same prepared ahead (data.py prepare), with --vision and --llm any public towers.

The loss is the sum over the supervised tokens of the whole global batch divided by their number, so cutting a batch
into micro-batches (--micro), or sharing it out among processes, changes no gradient. (LLaVA averages the means of
micro-batches, which gives a token of a short answer more weight.)
A run that was stopped goes on where it was, bit for bit, when the same command is given again.
"""
import argparse
import csv
import math
import os
import time
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import data
import toy
from ccra import CCRA, NORMS, ORDERS, VLM, CCRAConfig
from clip import CLIPVision
from data import GROUPS, order, split
from llama import Llama, Tokenizer
from prepare import Prepared
from weights import UserError, autocast_dtype, pick_device, run

# Table 5 of the paper, and what suits the embedded world's small towers.
RECIPES = {
    ("llava", 1): dict(batch=256, lr=1e-3),
    ("llava", 2): dict(batch=128, lr=1e-5),
    ("toy", 1): dict(batch=32, lr=3e-3),
    ("toy", 2): dict(batch=32, lr=1e-3),
}
TOY_STEPS = {1: 250, 2: 1600}


def arguments(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--stage", type=int, choices=(1, 2), required=True, help="1: captions; 2: instruction tuning")
    p.add_argument("--out", help="for checkpoints, log.csv, the model (default: out/toy/stageN or out/llava/stageN)")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, mps")
    p.add_argument("--threads", type=int, default=0, help="CPU threads (default: torch's choice); they change rounding")
    g = p.add_argument_group("data")
    g.add_argument("--data", help="a folder that `python data.py prepare` wrote: a LLaVA json of any size")
    g.add_argument("--json", help="a LLaVA json as it is (default: the embedded world)")
    g.add_argument("--images", help="the folder that the pictures' paths are relative to (default: prepare's)")
    g.add_argument("--group", choices=GROUPS, help="samples of like length into a step (needs --data; default: "
                   "modality-length in stage 2, as LLaVA, else none)")
    g.add_argument("--workers", type=int, help="processes that read pictures (default: embedded world 0, else 4)")
    g = p.add_argument_group("model")
    g.add_argument("--vision", help="stage 1: folder of the CLIP tower (default: the embedded world's)")
    g.add_argument("--llm", help="stage 1: folder of the language model (default: the embedded world's)")
    g.add_argument("--model", help="stage 2: what stage 1 wrote (default: stage 1's default --out)")
    g.add_argument("--stage1-ccra", choices=("off", "neutral", "on"), default="off",
                   help="stage 1 without CCRA (section 4.1), with neutral maps, or asked by the caption's prompt")
    g.add_argument("--train-vision", action="store_true", help="stage 2: train the vision tower, too (appendix B)")
    g.add_argument("--query", choices=data.QUERIES, help="the questions of a conversation that CCRA reads the picture "
                   "with: all (default), those so far (a row for every turn), or the first")
    g.add_argument("--norm", choices=NORMS, help="LN of eq. 5 and 13 (README; default: joint)")
    g.add_argument("--order", choices=ORDERS, help="Figure 5 (default: progressive, which is PAI)")
    g.add_argument("--off", nargs="+", choices=("lpwca", "lwca", "pwca", "smooth"), help="parts made neutral (Table 4)")
    g = p.add_argument_group("optimisation (the defaults are Table 5's, or the embedded world's own)")
    g.add_argument("--batch", type=int, help="samples in a step")
    g.add_argument("--micro", type=int, help="samples in a forward pass of one process (default: all of its share)")
    g.add_argument("--lr", type=float, help="peak learning rate")
    g.add_argument("--steps", type=int, help="steps in all (default: one epoch)")
    g.add_argument("--warmup", type=float, default=0.03, help="share of the steps that warms up")
    g.add_argument("--max-length", type=int, default=2048, help="positions, picture included, that a sample is cut to")
    g.add_argument("--seed", type=int, default=42)
    g.add_argument("--save-every", type=int, default=100, help="steps between checkpoints")
    g.add_argument("--stop-after", type=int, default=0, help="stop after this step as if interrupted (0: never)")
    args = p.parse_args(argv)
    args.world = "llava" if args.json or args.data else "toy"
    args.group = args.group or ("modality-length" if args.data and args.stage == 2 else "none")
    if args.json and args.data:
        raise UserError("--json and --data are two ways to say what to train on: give one")
    if args.group != "none" and not args.data:
        raise UserError(f"--group {args.group} needs lengths: `python data.py prepare` the json, and give --data")
    args.mode = args.stage1_ccra if args.stage == 1 else "on"
    if args.train_vision and args.stage == 1:
        raise UserError("--train-vision belongs to --stage 2")
    recipe = RECIPES[args.world, args.stage]
    args.batch = args.batch or recipe["batch"]
    args.lr = args.lr or recipe["lr"]
    args.micro = args.micro or args.batch
    args.workers = (0 if args.world == "toy" else 4) if args.workers is None else args.workers
    args.out = Path(args.out or f"out/{args.world}/stage{args.stage}")
    return args


def join(args):
    """(rank, number of processes, device): those that torchrun started, or this process alone."""
    rank, size, local = (int(os.environ.get(key, default)) for key, default in
                         (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    device = pick_device(args.device)
    if size > 1:
        if device.type == "cuda":
            device = torch.device("cuda", local)
            torch.cuda.set_device(device)
        else:          # torchrun allows each process one thread; share the cores out instead
            torch.set_num_threads(max(1, os.cpu_count() // int(os.environ["LOCAL_WORLD_SIZE"])))
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    if args.threads:
        torch.set_num_threads(args.threads)
    return rank, size, device


def total(x: float, device) -> float:
    """The sum of a number over all processes."""
    if not dist.is_initialized():
        return x
    x = torch.tensor(x, dtype=torch.float64, device=device)
    dist.all_reduce(x)
    return x.item()


def get_lr(step, steps, peak, warmup):
    """Linear warm-up over ceil(warmup * steps), then half a cosine to zero. step counts from 0."""
    warm = math.ceil(warmup * steps)
    if step < warm:
        return peak * (step + 1) / warm
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def build(args, device):
    """The model before this stage, in float32, and its tokenizer."""
    if args.stage == 1:
        vision, llm = Path(args.vision or toy.OUT / "clip"), Path(args.llm or toy.OUT / "llama")
        if not (args.vision and args.llm) and not (vision / "config.json").is_file():
            raise UserError(f"{vision}: not there yet; `python toy.py retrain` makes the embedded world's towers, "
                            "or give --vision and --llm")
        tower, model = CLIPVision.from_pretrained(vision), Llama.from_pretrained(llm)
        config = CCRAConfig(text_dim=model.config.hidden_size, vision_dim=tower.config.hidden_size,
                            n_layers=tower.config.num_hidden_layers, d_hidden=128 if args.world == "llava" else 64,
                            **variant(args))
        torch.manual_seed(args.seed)                       # the projector's and CCRA's first values
        vlm = VLM.build(tower, model, config, query=args.query or "all").to(device)
        return vlm, Tokenizer.from_pretrained(llm)
    folder = Path(args.model or f"out/{args.world}/stage1")
    if not args.model and not folder.is_dir():
        raise UserError(f"{folder}: not there yet; run --stage 1 first, or give --model")
    model = VLM.from_pretrained(folder, dtype=torch.float32, device=device)
    if variant(args):           # none of these changes a shape, so stage 2 may choose anew
        fuser = CCRA(replace(model.fuser.config, **variant(args))).to(device)
        fuser.load_state_dict(model.fuser.state_dict())
        model.fuser = fuser
    model.query = args.query or model.query
    return model, Tokenizer.from_pretrained(folder)


def variant(args) -> dict:
    """What the flags say about CCRA, as fields of CCRAConfig; what they don't say stays as it is."""
    said = {key: getattr(args, key) for key in ("norm", "order") if getattr(args, key)}
    return said | {part: False for part in args.off or ()}


def freeze(model: VLM, stage: int, mode="on", train_vision=False):
    """Stage 1 trains the projector, stage 2 everything but the vision tower (Algorithm 1). Returns what is trained.

    mode is how CCRA runs: if it is on in stage 1, it is trained there as well. What no gradient reaches (an ablated
    part) was frozen when the model was built and stays so; the tower's last norm, which nobody reads, joins it.
    """
    parts = ("projector.", "fuser.")[:1 + (mode == "on")] if stage == 1 else ("projector.", "fuser.", "llm.")
    parts += ("vision.",) if train_vision else ()
    for name, p in model.named_parameters():
        p.requires_grad_(p.requires_grad and name.startswith(parts) and not name.startswith("vision.post_layernorm"))
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def pieces(rows, rank, size, micro):
    """This process's share of a step's samples, in micro-batches. If there are fewer samples than processes, some
    process has none: it takes the first, which `train_step` is told not to count."""
    return split(rows[rank::size] or rows[:1], micro)


def settings(args, steps, n):
    """What decides the course of a run. It is in the checkpoint, and a resume with others is refused."""
    return dict(stage=args.stage, steps=steps, samples=n, batch=args.batch, lr=args.lr, warmup=args.warmup,
                seed=args.seed, max_length=args.max_length, mode=args.mode, query=args.query,
                **({"group": args.group} if args.data else {}), **variant(args))


def save_checkpoint(path: Path, step, trained, optimizer, course):
    """What a resume needs, beside and renamed: a kill at any moment leaves the old checkpoint or the new one."""
    state = dict(step=step, trained={k: p.detach() for k, p in trained.items()}, optimizer=optimizer.state_dict(),
                 rng=torch.get_rng_state(), settings=course)
    torch.save(state, f"{path}.tmp")
    os.replace(f"{path}.tmp", path)


def resume(path: Path, trained, optimizer, course, device):
    """The step to go on from (0 when there is no checkpoint). A checkpoint of another run is an error."""
    if not path.exists():
        return 0
    state = torch.load(path, map_location=device, weights_only=True)
    if {k: p.shape for k, p in state["trained"].items()} != {k: p.shape for k, p in trained.items()}:
        raise UserError(f"{path} belongs to another model; remove it or choose another --out")
    for key, value in course.items():
        if state["settings"].get(key) != value:
            raise UserError(f"{path} is of a run with {key} {state['settings'].get(key)}, not {value}; remove it or "
                            "choose another --out")
    with torch.no_grad():
        for name, p in trained.items():
            p.copy_(state["trained"][name])
    optimizer.load_state_dict(state["optimizer"])
    torch.set_rng_state(state["rng"].cpu())
    return state["step"]


def train_step(model, batches, device, dtype, mode="on", counts=True):
    """Forward and backward of one global batch, given as this process's micro-batches.

    counts: False if this process only keeps the others company. Returns, over all processes, the mean loss of a
    supervised token, and how many tokens of text the batch has.
    """
    for batch in () if counts else batches:
        batch["labels"].fill_(data.IGNORE)
    supervised = total(sum(int((b["labels"][:, 1:] != data.IGNORE).sum()) for b in batches), device)
    size, loss_sum = dist.get_world_size() if dist.is_initialized() else 1, 0.0
    for i, batch in enumerate(batches, 1):
        batch = {k: v.to(device, non_blocking=True) for k, v in batch.items()}
        # DDP averages gradients over processes at the end of a backward; earlier micro-batches only add to theirs
        quiet = model.no_sync() if i < len(batches) and size > 1 else nullcontext()
        with quiet:
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
                loss = model(**batch, mode=mode) / max(1, supervised)
            (loss * size).backward()
        loss_sum += loss.item()
    return total(loss_sum, device), total(sum(int(b["mask"].sum()) for b in batches), device)


def collate(samples, query, max_length, picture_rows):
    rows = [row for sample in samples for row in data.by_query(sample, query)]
    return data.collate([data.cut(row, max_length, picture_rows) for row in rows])


def take(batches):
    """The next batch. What a reading process has to say comes as its whole traceback, of which the last line counts."""
    try:
        return next(batches)
    except UserError as e:
        raise UserError(str(e).strip().splitlines()[-1].removeprefix("weights.UserError: ")) from None


def open_dataset(args, tokenizer, size, say):
    """What is trained on: a LLaVA json, all of it checked before the first step or long ago, or the embedded world."""
    template = "plain" if args.stage == 1 else "v1"
    if args.data:
        return Prepared(args.data, args.images, tokenizer, template, size, damaged=args.out / "damaged.jsonl")
    if args.json:
        return data.load(args.json, args.images, tokenizer, template, size, say=say)
    n = (args.steps or TOY_STEPS[args.stage]) * args.batch
    return toy.ToyScenes(f"train{args.stage}", n, args.stage, tokenizer, size)


def describe(args, model, trained, course, start, size, device, dtype):
    count = lambda parameters: sum(p.numel() for p in parameters)
    share = math.ceil(args.batch / size)
    how = [f"{size} processes"] * (size > 1) + [f"{args.micro} samples at a time"] * (args.micro < share)
    return (f"stage {args.stage} on {device} in {dtype}: {count(trained.values()):,} of {count(model.parameters()):,} "
            f"parameters trained, {course['samples']:,} samples, {course['steps']} steps of {args.batch}"
            + (f" ({', '.join(how)})" if how else "") + (f", going on after step {start}" if start else ""))


def loop(args, model, trained, optimizer, dataset, course, start, rank, size, device, dtype):
    """Steps start+1..steps. True when it came to the end, False when --stop-after ended it."""
    steps, vlm = course["steps"], model.module if size > 1 else model
    picture_rows = vlm.vision.grid ** 2
    like = {} if args.group == "none" else dict(group=args.group, pictures=dataset.has_picture(),
                                                lengths=dataset.lengths(picture_rows, args.max_length))
    plan = list(order(len(dataset), steps, args.batch, args.seed, **like))[start:]
    mine = [pieces(rows, rank, size, args.micro) for rows in plan]
    batches = iter(torch.utils.data.DataLoader(
        dataset, batch_sampler=sum(mine, []), num_workers=args.workers,
        collate_fn=partial(collate, query=vlm.query, max_length=args.max_length, picture_rows=picture_rows)))
    log, began = Log(args.out / "log.csv", start, steps) if rank == 0 else None, time.perf_counter()
    for step, (rows, share) in enumerate(zip(plan, mine), start):
        tic, lr = time.perf_counter(), get_lr(step, steps, args.lr, args.warmup)
        for group in optimizer.param_groups:
            group["lr"] = lr
        loss, tokens = train_step(model, [take(batches) for _ in share], device, dtype, args.mode, rank < len(rows))
        norm = torch.nn.utils.get_total_norm([p.grad for p in trained.values() if p.grad is not None]).item()
        if not math.isfinite(loss) or not math.isfinite(norm):        # the same on all processes
            ids = ", ".join(dataset.record_id(i) for i in rows[:8])
            raise UserError(f"step {step + 1}: loss {loss}, gradient norm {norm}; not updated; samples {ids}")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        now, stop = time.perf_counter(), step + 1 == args.stop_after
        if rank == 0:
            log.row(step + 1, loss, lr, norm, tokens / (now - tic), (now - began) / (step + 1 - start))
            if (step + 1) % args.save_every == 0 or step + 1 == steps or stop:
                save_checkpoint(args.out / "checkpoint.pt", step + 1, trained, optimizer, course)
        if stop:
            return False
    return True


class Log:
    """One line a step on stdout, and the same in log.csv, which a resumed run continues."""

    def __init__(self, path: Path, start, steps):
        before = path.read_text().splitlines() if start and path.exists() else []
        self.file, self.steps = open(path, "w", newline=""), steps
        self.csv = csv.writer(self.file)
        # what an interrupted run logged after its last checkpoint is done again
        rows = [row for row in csv.reader(before) if row and row[0].isdecimal() and int(row[0]) <= start]
        self.csv.writerows([["step", "loss", "lr", "grad_norm", "tokens_per_s"], *rows])

    def row(self, step, loss, lr, norm, speed, each):
        print(f"step {step}/{self.steps} {100 * step / self.steps:.1f}% loss {loss:.4f} lr {lr:.2e} norm {norm:.2f} "
              f"{speed:,.0f} tokens/s eta {each * (self.steps - step) / 60:.1f} min", flush=True)
        self.csv.writerow([step, f"{loss:.6f}", f"{lr:.4e}", f"{norm:.4f}", f"{speed:.0f}"])
        self.file.flush()


def main(argv=None):
    args = arguments(argv)
    rank, size, device = join(args)
    say = partial(print, flush=True) if rank == 0 else (lambda *_: None)
    dtype = autocast_dtype(device)
    model, tokenizer = build(args, device)
    dataset = open_dataset(args, tokenizer, model.vision.config.image_size, say)
    course = settings(args, args.steps or math.ceil(len(dataset) / args.batch), len(dataset))
    trained = freeze(model, args.stage, args.mode, args.train_vision)
    # LLaVA's AdamW: no weight decay, and no gradient clipping (its DeepSpeed configuration leaves clipping off)
    optimizer = torch.optim.AdamW(trained.values(), lr=args.lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    start = resume(args.out / "checkpoint.pt", trained, optimizer, course, device)
    say(describe(args, model, trained, course, start, size, device, dtype))
    args.out.mkdir(parents=True, exist_ok=True)
    wrapped = DistributedDataParallel(model) if size > 1 else model
    finished = loop(args, wrapped, trained, optimizer, dataset, course, start, rank, size, device, dtype)
    if finished and rank == 0:
        model.save_pretrained(args.out, tokenizer_file=tokenizer.file)
    say(f"model written to {args.out}" if finished else
        f"stopped after step {args.stop_after}; the same command without --stop-after goes on")
    if size > 1:
        dist.barrier()          # whoever leaves while others still talk takes them down with it
        time.sleep(0.5)         # ... or are on their way out of the barrier (gloo aborted one run in about 35)
        dist.destroy_process_group()


if __name__ == "__main__":
    run(main)
