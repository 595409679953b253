"""Train a vision-language model with CCRA: both stages of the paper (section 4.1, Table 5,
Algorithm 1).

    python train.py --stage 1          the projector alone learns to turn pictures into "words" (captions)
    python train.py --stage 2          projector, CCRA and language model learn to answer questions
    torchrun --nproc_per_node=8 train.py --stage 2          the paper's training on eight GPUs
    python train.py --stage 2 --plan --gpus 8 --gpu a100-80          what that takes, without a GPU

One process trains the embedded world (toy.py) on whatever this machine has; under torchrun it is
LLaVA's data and public towers, in the places that are printed when something is missing. --world
says otherwise, and so does --json.

The loss is the sum over the supervised tokens of the whole global batch divided by their number, so
cutting a batch into micro-batches (--micro), or sharing it out among processes, changes no
gradient. (LLaVA averages the means of micro-batches, which gives a token of a short answer more
weight.) A run that was stopped goes on where it was, bit for bit, when the same command is given
again; on another number of processes, too, with sums in another order.
"""
import json
import math
import time
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from itertools import islice, tee
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import data
from ccra import NAMED, VLM, outline
from clip import CLIPVision, CLIPVisionConfig
from core import common, distributed
from core.common import UserError, read_json, run, split, write_beside
from core.device import autocast_dtype
from core.distributed import total
from core.layouts import Folder
from core.tokenizer import Tokenizer
from core.weights import skeleton
from fast.memory import keep_memory
from llama import Llama, LlamaConfig
from toy import dataset, exam
from toy import world as toy
from training import curve, plan, sharding
from training.checkpoints import Checkpoints
from training.log import Log
from training.options import PAPER_STEPS, TOY_STEPS, arguments, check_places
from training.order import order
from training.prepared import Prepared
from training.stop import Stop

VICUNA = dict(model_type="llama", vocab_size=32000, hidden_size=4096, intermediate_size=11008,
              num_hidden_layers=32, num_attention_heads=32, rms_norm_eps=1e-5,
              max_position_embeddings=4096)


def get_lr(step, steps, peak, warmup):
    """Linear warm-up over ceil(warmup * steps), then half a cosine to zero. step counts from 0."""
    warm = math.ceil(warmup * steps)
    if step < warm:
        return peak * (step + 1) / warm
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def build(args):
    """The model before this stage, on the CPU and as it is stored, and its tokenizer."""
    if args.stage == 1:
        vision, llm = Path(args.vision or toy.OUT / "clip"), Path(args.llm or toy.OUT / "llama")
        if not (args.vision and args.llm) and not (vision / "config.json").is_file():
            raise UserError(
                f"{vision}: not there yet; `python toy.py retrain` makes the embedded world's towers, or "
                "take the study's: --vision study/towers/clip --llm study/towers/llama")
        tower, model = CLIPVision.from_pretrained(vision), Llama.from_pretrained(
            llm, dtype=None)  # as stored
        config = fuser_config(args, tower.config, model.config)
        torch.manual_seed(args.seed)                  # the projector's and the fuser's first values
        model = VLM.build(tower, model, config, query=args.query or "all")
        if args.mode != "off" and not model.fuser.asks:
            raise UserError(
                f"--stage1-ccra {args.mode}: --fuser {args.fuser} doesn't read the question; leave it out"
            )
        return model, Tokenizer.from_pretrained(llm)
    folder = Path(args.model or f"out/{args.world}/stage1")
    if not args.model and not folder.is_dir():
        raise UserError(f"{folder}: not there yet; run --stage 1 first, or give --model")
    model = VLM.from_pretrained(folder)
    if args.fuser or variant(args):
        model.fuser = refit(model.fuser, args, folder)
    model.query = args.query or model.query
    return model, Tokenizer.from_pretrained(folder)


def fuser_config(args, vision, llm):
    """The configuration of --fuser (default: CCRA) for towers of these configurations."""
    kind = NAMED[args.fuser or "ccra"][0]
    sizes = dict(text_dim=llm.hidden_size, vision_dim=vision.hidden_size,
                 n_layers=vision.num_hidden_layers, d_hidden=128 if args.world == "llava" else 64)
    return kind(**{key: n for key, n in sizes.items() if key in kind.__dataclass_fields__},
                **variant(args))


def refit(fuser, args, folder):
    """Stage 1's fuser, changed as the flags say. They may change no shape, so that stage 2 can go
    on from it."""
    kind = NAMED[args.fuser or "ccra"][0]
    new = type(fuser)(replace(fuser.config, **variant(args))) if type(
        fuser.config) is kind else None
    if new is None or new.width != fuser.width:
        why = f"--fuser {args.fuser} reads otherwise: choose it in stage 1" if args.fuser else \
            "--norm, --order and --off belong to CCRA"
        raise UserError(f"{folder}: its fuser is {fuser.name!r}; {why}")
    new.load_state_dict(fuser.state_dict())
    return new


def choices(model):
    """What flags may choose about a model, as it is."""
    names = ("norm", "order", "lpwca", "lwca", "pwca", "smooth", "copies", "kind")
    chosen = {key: value for key, value in vars(model.fuser.config).items() if key in names}
    return {"fuser": model.fuser.name, **chosen, "query": model.query}


def inherited(args, model):
    """What stage 2 takes over from stage 1, and what it changes, as a line; empty in stage 1."""
    before = Path(args.model or f"out/{args.world}/stage1") / "train.json"
    if args.stage == 1 or not before.is_file():
        return ""
    before = read_json(before)
    said = {**variant(args), **({"query": args.query} if args.query else {})}
    now = choices(model)
    was = before["model"]
    changed = [f"{key} {was.get(key)} -> {now[key]}" for key in said if was.get(key) != now[key]]
    kept = ", ".join(f"{key} {value}" for key, value in now.items() if key not in said)
    mode = f", {now['fuser']} {before['mode']}" * model.fuser.asks
    return f"from stage 1 ({before['steps']} steps{mode}): {kept}" + \
        (f"; changed: {', '.join(changed)}" if changed else "")


def save_precision(trained, model, dtype):
    """float32 for what is trained (master weights); what is frozen is only read, so it may be as
    narrow as products."""
    chosen = {id(p) for p in trained.values()}
    for p in model.parameters():
        p.data = p.data.to(torch.float32 if id(p) in chosen else dtype)


def variant(args) -> dict:
    """What the flags say about the fuser, as fields of its configuration; what they don't say stays
    as it is."""
    said = dict(NAMED[args.fuser][1]) if args.fuser else {}
    said |= {key: getattr(args, key) for key in ("norm", "order") if getattr(args, key)}
    return said | {part: False for part in args.off or ()}


def freeze(model: VLM, stage: int, mode="on", train_vision=False):
    """Stage 1 trains the projector, stage 2 everything but the vision tower (Algorithm 1). Returns
    what is trained.

    mode is how CCRA runs: if it is on in stage 1, it is trained there as well, as is a fuser that
    doesn't ask. What no gradient reaches (an ablated part) was frozen when the model was built and
    stays so; what nobody reads of the tower, its last norm and for plain LLaVA its last block,
    joins it.
    """
    fuser_too = stage == 2 or mode == "on" or not model.fuser.asks
    parts = ("projector.",) + ("fuser.",) * fuser_too + ("llm.",) * (stage == 2)
    parts += ("vision.",) if train_vision else ()
    unread = ("vision.post_layernorm.",)
    unread += tuple(f"vision.layers.{i}."
                    for i in range(model.fuser.n_blocks, len(model.vision.layers)))
    for name, p in model.named_parameters():
        p.requires_grad_(p.requires_grad and name.startswith(parts) and not name.startswith(unread))
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def pieces(rows, rank, size, micro):
    """This process's share of a step's samples in micro-batches, and how many of these count.

    All processes get as many micro-batches, since in each they wait for each other: who has fewer
    takes a sample again, which `train_step` is told not to count.
    """
    mine = split(rows[rank::size], micro)
    most = len(split(rows[::size], micro))
    return mine + [rows[:1]] * (most - len(mine)), len(mine)


def shares(steps, dataset, rank, size, micro):
    """pieces of every step. Where lengths can be told at once, a step's samples go by length, so
    that those of one micro-batch, and those of all processes at a time, need little padding. The
    step and its gradient stay the same."""
    for rows in steps:
        if hasattr(dataset, "length"):
            rows = sorted(rows, key=dataset.length)
        yield rows, *pieces(rows, rank, size, micro)


def settings(args, dataset):
    """What decides the course of a run. It is in the checkpoint, and a resume with others is
    refused."""
    n = len(dataset)
    given = dict(group=args.group, sha256_of_json=dataset.report["inputs"]["json"]["sha256"]) if args.data else \
        dict(sha256_of_json=dataset.sha256) if args.json else {}
    fuser = dict(fuser=args.fuser) if args.fuser else {}
    return dict(stage=args.stage, steps=args.steps or math.ceil(n / args.batch), samples=n,
                batch=args.batch, lr=args.lr, warmup=args.warmup, seed=args.seed,
                max_length=args.max_length, mode=args.mode, query=args.query, dtype=args.dtype,
                **given, **fuser, **variant(args))


def recompute(model: VLM):
    """Blocks of the language model forget what they computed inside and do it again in the
    backward: of 2,048 tokens a block keeps its input instead of some thirty tensors as large. (A
    wrapper module would rename the parameters.)"""
    for block in model.llm.layers:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def compile_blocks(model: VLM):
    """torch.compile for what each block computes. Before `recompute`, whose wrapper it wouldn't see
    through."""
    for block in [*model.vision.layers, *model.llm.layers]:
        block.forward = torch.compile(block.forward)


def adamw(trained, lr):
    """LLaVA's: no weight decay, and no gradient clipping (its DeepSpeed configuration leaves
    clipping off). On a GPU in one kernel: else a step's intermediate results take another 4 bytes a
    parameter."""
    on_gpu = next(iter(trained.values())).device.type == "cuda"
    return torch.optim.AdamW(trained.values(), lr=lr, betas=(0.9, 0.999), eps=1e-8,
                             weight_decay=0.0, fused=on_gpu or None)


def train_step(model, batches, device, dtype, mode="on", counting=None):
    """Forward and backward of one global batch, given as this process's micro-batches.

    dtype: of autocast. counting: how many of the micro-batches count (None: all); the others keep
    other processes company. Returns this process's share of the mean loss of a supervised token, to
    be summed.
    """
    for batch in batches[counting:] if counting is not None else ():
        batch["labels"].fill_(data.IGNORE)
    supervised = total(sum(int((b["labels"][:, 1:] != data.IGNORE).sum()) for b in batches),
                       device=device)
    size, loss_sum = dist.get_world_size() if dist.is_initialized() else 1, 0.0
    for i, batch in enumerate(batches, 1):
        batch = {k: v.to(device, non_blocking=True) for k, v in batch.items()}
        # DDP averages gradients over processes at the end of a backward; earlier micro-batches only
        # add to theirs. FSDP sums them every time: to put it off, each process would have to keep
        # whole gradients.
        ddp = isinstance(model, DistributedDataParallel)
        with model.no_sync() if ddp and i < len(batches) else nullcontext():
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
                loss = model(**batch, mode=mode) / max(1, supervised)
            (loss * size).backward()
        loss_sum += loss.item()
    return loss_sum


def collate(samples, query, max_length, picture_rows):
    rows = [row for sample in samples for row in data.by_query(sample, query)]
    return data.collate([data.cut(row, max_length, picture_rows) for row in rows])


def take(batches):
    """The next batch. What a reading process has to say comes as its whole traceback, of which the
    last line counts."""
    try:
        return next(batches)
    except UserError as e:
        line = str(e).strip().splitlines()[-1]
        raise UserError(line.partition("UserError: ")[2] or line) from None


def open_dataset(args, tokenizer, size, say):
    """What is trained on: a LLaVA json, all of it checked before the first step or long ago, or the
    embedded world."""
    template = "plain" if args.stage == 1 else "v1"
    if args.data:
        return Prepared(args.data, args.images, tokenizer, template, size,
                        damaged=args.out / "damaged.jsonl")
    if args.json:
        return data.load(args.json, args.images, tokenizer, template, size, say=say)
    n = (args.steps or TOY_STEPS[args.stage]) * args.batch
    return dataset.ToyScenes(f"train{args.stage}", n, args.stage, tokenizer, size)


def describe(args, model, trained, course, start, size, device, dtype):
    count = lambda parameters: sum(p.numel() for p in parameters)
    share = math.ceil(args.batch / size)
    how = [f"{size} processes, {args.parallel}"] * (size > 1)
    how += [f"{math.ceil(share / args.micro)} micro-batches of {args.micro} in each"] * (args.micro
                                                                                         < share)
    epoch = f"; the paper has {PAPER_STEPS[args.stage]:,} steps" if args.world == "llava" else ""
    return (
        f"stage {args.stage} on {device} in {dtype}: {count(trained.values()):,} of {count(model.parameters()):,} "
        f"parameters trained, {course['samples']:,} samples, {course['steps']:,} steps of {args.batch}"
        + (f" ({'; '.join(how)})" if how else "") + epoch +
        (f", going on after step {start}" if start else ""))


def say_answers(model, tokenizer, device, dtype, mode, step, n=4):
    """Answers to the first questions of the embedded world's exam, as the model is trained (dtype,
    mode). Forward passes alone, without a cache, since every process has to take part in each pass
    of a sharded model; all compute the same."""
    for item in exam.exam(0, n):
        row = data.prompt([(turn.question, turn.answer) for turn in item.turns[:-1]]
                          + [(item.turns[-1].question, None)], tokenizer)
        size = model.vision.config.image_size if hasattr(
            model, "vision") else model.module.vision.config.image_size
        pixels = toy.preprocess(toy.draw(item.scene), size, pad=True)
        sample, said = dict(ids=list(row.ids), labels=list(row.labels), query=row.query,
                            pixels=pixels), []
        for _ in range(12):
            batch = {k: v.to(device) for k, v in data.collate([sample]).items() if k != "labels"}
            with torch.no_grad(), torch.autocast(device.type, dtype=torch.bfloat16,
                                                 enabled=dtype == torch.bfloat16):
                said.append(int(model(**batch, mode=mode)[0, -1].argmax()))
            sample["ids"].append(said[-1])
            sample["labels"].append(data.IGNORE)
        end = next((i for i, token in enumerate(said) if token in tokenizer.eos_ids), len(said))
        last = item.turns[-1]
        yield f"  step {step}: {last.question} {tokenizer.decode(said[:end])!r}, right {last.answer!r}"
    sharding.sliced_again(model)


def loop(args, model, trained, optimizer, dataset, tokenizer, course, start, rank, size, device,
         dtype):
    """Steps start+1..steps. True when it came to the end, False when --stop-after or SIGTERM ended
    it."""
    if 0 < args.stop_after <= start:
        return False
    keep_memory(device)
    steps, vlm, stop = course["steps"], getattr(model, "module", model), Stop()
    picture_rows = vlm.picture_rows
    max_length = min(args.max_length, vlm.llm.config.max_position_embeddings)
    if max_length <= picture_rows:
        raise UserError(
            f"{max_length} positions (--max-length, or the language model's context) leave no room beside "
            f"the picture's {picture_rows}")
    like = {} if args.group == "none" else dict(group=args.group, pictures=dataset.has_picture(),
                                                lengths=dataset.lengths(picture_rows, max_length))
    todo = islice(order(len(dataset), steps, args.batch, args.seed, **like), start, None)
    todo, ahead = tee(shares(todo, dataset, rank, size, args.micro))
    # micro-batches; all are wanted at once
    of_a_step = math.ceil(math.ceil(args.batch / size) / args.micro)
    batches = iter(
        torch.utils.data.DataLoader(
            dataset,
            batch_sampler=(piece for _, mine, _ in ahead for piece in mine),
            num_workers=args.workers,
            prefetch_factor=max(2, math.ceil(of_a_step / args.workers)) if args.workers else None,
            worker_init_fn=Stop.in_reader,
            generator=torch.Generator(),  # else it would draw from the one that a checkpoint holds
            collate_fn=partial(collate, query=vlm.query, max_length=max_length,
                               picture_rows=picture_rows)))
    checkpoints = Checkpoints(args.out / "checkpoints", args.keep)
    log, spoilt = Log(args, start, steps) if rank == 0 else None, 0
    cost = lambda lengths, supervised: plan.flops(vlm, lengths, supervised, args.train_vision, args.
                                                  stage == 2)
    for step, (rows, mine, counting) in enumerate(todo, start):
        tic, lr = time.perf_counter(), get_lr(step, steps, args.lr, args.warmup)
        for group in optimizer.param_groups:
            group["lr"] = lr
        taken = [take(batches) for _ in mine]
        waited = time.perf_counter() - tic
        loss = train_step(model, taken, device, dtype, args.mode, counting)
        lengths = [
            n for b in taken for n in (b["mask"].sum(1) + (picture_rows - 1) *
                                       (b["ids"] == data.IMAGE_TOKEN).sum(1)).tolist()]
        work = cost(lengths, sum(int((b["labels"] != data.IGNORE).sum()) for b in taken))
        loss, tokens, work, asked = total(loss, sum(int(b["mask"].sum()) for b in taken), work,
                                          float(stop.asked), device=device)
        norm = float(sharding.whole(torch.nn.utils.get_total_norm([p.grad for p in trained.values()
                                                                  if p.grad is not None])))
        if math.isfinite(loss) and math.isfinite(norm):               # the same on all processes
            optimizer.step()
            spoilt = 0
        else:
            spoilt += 1
            ids = ", ".join(dataset.record_id(i) for i in rows[:8])
            what = f"step {step + 1}: loss {loss}, gradient norm {norm}; not updated; samples {ids}"
            if spoilt == 3:
                raise UserError(
                    f"{what}. That was the third step in a row: lower --lr, or look at these samples"
                )
            if rank == 0:
                print(what, flush=True)
        optimizer.zero_grad(set_to_none=True)
        now, ends = time.perf_counter(), step + 1 == args.stop_after or asked > 0
        if rank == 0:
            log.row(step + 1, loss, lr, norm, tokens, len(rows), now - tic, waited, work / size,
                    device)
        if (step + 1) % args.save_every == 0 or step + 1 == steps or ends:
            checkpoints.save(step + 1, trained, optimizer, course)
            if rank == 0:
                curve.draw(args.out)
        if args.ask_every and (step + 1) % args.ask_every == 0:
            for line in say_answers(model, tokenizer, device, dtype, args.mode, step + 1):
                if rank == 0:
                    print(line, flush=True)
        if ends:
            return False
    return True


def sketch(args):
    """The model of --plan, without numbers: of the folders if they are there, else of the paper's
    sizes."""
    with skeleton():
        if args.stage == 2 and Path(args.model, "config.json").is_file():
            model = outline(Folder(args.model))
            if args.fuser or variant(args):
                model.fuser = refit(model.fuser, args, args.model)
        else:
            parts = {
                part: getattr(args, part) and Path(getattr(args, part))
                for part in ("vision", "llm")}
            vision, llm = (Folder(dir).part(part) if dir and
                           (dir / "config.json").is_file() else None for part, dir in parts.items())
            tower = CLIPVision(CLIPVisionConfig.from_dict(vision) if vision else CLIPVisionConfig())
            llama = Llama(LlamaConfig.from_dict(llm or VICUNA))
            model = VLM.build(tower, llama, fuser_config(args, tower.config, llama.config))
    save_precision(freeze(model, args.stage, args.mode, args.train_vision), model, torch.bfloat16)
    if args.recompute:
        recompute(model)
    return model


def epoch(args):
    """(steps, samples) of --plan: of the prepared data if they are there, else of LLaVA's."""
    report = Path(args.data or "", "report.json")
    samples = read_json(report)["kept"] if args.data and report.is_file() else {
        1: 558128, 2: 665298}[args.stage]
    return args.steps or math.ceil(samples / args.batch), samples


def write_model(args, model, trained, tokenizer, course, dtype):
    """The trained model as a folder that from_pretrained reads, and train.json, which says how it
    came about.

    All processes call it; the first one writes. What stage 2 ends with is in dtype. Stage 1 goes
    on: what it trained is in float32, and the rest is written as it was found, since
    `save_precision` may have rounded it.
    """
    first, tensors = distributed.where()[0] == 0, {}
    found = dict(build(args)[0].named_parameters()) if first and args.stage == 1 else {}
    for name, p in model.named_parameters():
        tensor = sharding.whole(p)         # one after the other: a card never holds the whole model
        if first and args.stage == 1:
            tensors[name] = tensor.to("cpu",
                                      torch.float32) if name in trained else found[name].detach()
        elif first:
            tensors[name] = tensor.to("cpu", dtype)
    if first:
        model.save_pretrained(args.out, tokenizer_file=tokenizer.file, tensors=tensors)
        text = json.dumps({**course, "model": choices(model)}, indent=1)
        write_beside(args.out / "train.json", lambda tmp: tmp.write_text(text + "\n"))


def main(argv=None):
    args = arguments(argv)
    if args.plan:
        return print(plan.report(args, sketch(args), *epoch(args)))
    check_places(args)
    rank, size, device = distributed.join(args.device, args.threads)
    say = partial(print, flush=True) if rank == 0 else (lambda *_: None)
    dtype = autocast_dtype(device) if args.dtype == "auto" else getattr(torch, args.dtype)
    torch.manual_seed(args.seed)
    model, tokenizer = build(args)
    dataset = open_dataset(args, tokenizer, model.vision.config.image_size, say)
    if args.out.exists() and not args.out.is_dir():
        raise UserError(f"--out {args.out}: is a file; choose a folder")
    args.out.mkdir(parents=True, exist_ok=True)
    held = common.lock(args.out) if rank == 0 else None
    course = settings(args, dataset)
    save_precision(freeze(model, args.stage, args.mode, args.train_vision), model, dtype)
    if args.compile:
        compile_blocks(model)
    if args.recompute:
        recompute(model)
    mesh = sharding.layout(device, args.shard_size) if args.parallel == "fsdp" else None
    shared = sharding.share(model, args.parallel, device, dtype, args.shard == "grad", mesh)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = adamw(trained, args.lr)
    checkpoints = Checkpoints(args.out / "checkpoints", args.keep)
    checkpoints.check_room(trained)
    start = checkpoints.load(trained, optimizer, course)
    one, two = total(float(start), float(start) ** 2, device=device)
    if one ** 2 != two * size:
        raise UserError(
            f"{args.out}: the processes find different checkpoints there; it has to be one folder for all "
            "machines")
    say(describe(args, model, trained, course, start, size, device, dtype))
    if line := inherited(args, model):
        say(line)
    finished = loop(args, shared, trained, optimizer, dataset, tokenizer, course, start, rank, size,
                    device, dtype)
    if finished:
        write_model(args, model, trained, tokenizer, course, dtype)
    say(f"model written to {args.out}" if finished else
        f"stopped early, after a checkpoint; the same command{' without --stop-after' * bool(args.stop_after)} goes on"
        )
    distributed.leave()
    if held:
        held.close()


if __name__ == "__main__":
    run(main)
