"""How fast is it here, beside transformers, and beside what this machine could do?

    python bench.py --model smollm2 --peer                          a folder with a Llama, text only
    python bench.py --model llava-1.5-7b-hf --peer --tokens 16      a vision-language model, with a picture
    python bench.py --model smollm2 --pack                          weights laid out for decoding (see linear.py)
    python bench.py --model llava-1.5-7b-hf --quant int8
    python bench.py --model llava-1.5-7b-hf --peer --device cuda    on a GPU
    python bench.py --cost                                          what int8 costs: errors, accuracy, bytes

Every run is a process of its own, and the sides take turns: machine, ours, peer, machine, ours,
peer, ... The table has medians. Times start when the process does, with the files in the page cache
(they are read before). The decoding rate is that of the tokens after the first. Both sides get the
same ids, are greedy, and never stop early.

Two figures of the machine stand below: how fast it reads memory (decoding reads all weights, and
the keys and values of all that came before, for every token, so bandwidth / bytes is the limit) and
how fast it multiplies matrices (the limit for the prompt). The first is measured by the decoding
process itself, after its first token, every eighth from there and the last: what a virtual machine
gets of its host's memory can change from one second to the next.
"""
import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from itertools import chain
from pathlib import Path

from core.common import UserError, cores, read_config, run, write_beside
from toy import exam

DTYPES = ("float32", "bfloat16", "float16")
APART = 8               # tokens from one look at memory's speed to the next
PICTURE = -200          # llama.IMAGE_TOKEN, without what llama.py imports
TEXT = (
    "A bicycle has two wheels, one behind the other, and is driven by pedals. It was invented in Europe in the "
    "nineteenth century, and soon people in many countries rode to work on one. Describe what came after that. "
)


def arguments(argv=None):
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model",
                   help="a model folder: a Llama, or a vision-language model (config.json tells)")
    p.add_argument("--peer", action="store_true", help="transformers as well, on the same folder")
    p.add_argument("--device", default="cpu",
                   help="cpu (default), or cuda: memory is the GPU's then")
    p.add_argument("--dtype", choices=DTYPES, help="of both sides (default: as stored)")
    p.add_argument("--quant", choices=["int8"], help="8-bit weights, ours only")
    p.add_argument("--pack", action="store_true",
                   help="lay half-precision weights out for decoding, ours only")
    p.add_argument("--tokens", type=int, default=64, help="to generate (default 64)")
    p.add_argument(
        "--prompt", type=int,
        help="positions of the prompt, the picture's among them (default: text 64, "
        "or the picture and 51)")
    p.add_argument("--rounds", type=int, default=3, help="how often each side runs (default 3)")
    p.add_argument("--threads", type=int, default=cores(),
                   help="default: one for each core this process may use")
    p.add_argument("--json", metavar="FILE", help="write everything that was measured to a file")
    p.add_argument("--cost", action="store_true",
                   help="what int8 costs (--model: default the embedded one)")
    p.add_argument("--n", type=int, default=500, help="questions for --cost")
    p.add_argument("--child", help=argparse.SUPPRESS)
    args = p.parse_args(argv)
    if not args.model and not args.cost:
        raise UserError("give --model DIR (or --cost)")
    if args.tokens < 2 or args.rounds < 1 or args.threads < 1 or args.n < 1 or (args.prompt
                                                                                or 9) < 2:
        raise UserError(
            "--tokens and --prompt must be 2 or more, --rounds, --threads and --n 1 or more")
    if args.json and not Path(args.json).parent.is_dir():
        raise UserError(f"--json {args.json}: should be a file in a folder that exists")
    if args.pack and args.quant:
        raise UserError("--pack and --quant exclude each other")
    if (args.pack or args.quant) and args.device != "cpu":
        raise UserError("--pack and --quant are for CPUs")
    if args.peer and importlib.util.find_spec("transformers") is None:
        raise UserError(
            "--peer needs transformers (pip install -r requirements-test.txt, or leave --peer out)")
    return args


# --------------------------------------------------------------------------------------------------
# What the child processes do. torch is imported here only, so that its import counts as part of a
# start.

def memory(device) -> dict:
    """Resident memory of this process now, in bytes: `peak` so far, of it now `anonymous` (its own,
    not mapped). On a GPU what it holds of the GPU's."""
    if device != "cpu":
        import torch
        return dict(peak=torch.cuda.max_memory_allocated(), anonymous=torch.cuda.memory_allocated())
    try:
        lines = dict(
            line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return {
            name: int(lines[key].split()[0]) * 1024
            for name, key in (("peak", "VmHWM"), ("anonymous", "RssAnon"))}
    except (OSError, KeyError):            # not Linux
        return dict(peak=0, anonymous=0)


def forget_peak(device) -> None:
    """Let memory's `peak` be that of what comes now."""
    if device != "cpu":
        import torch
        torch.cuda.reset_peak_memory_stats()
    elif (file := Path("/proc/self/clear_refs")).exists():       # Linux
        file.write_text("5")


def the_prompt(args, config) -> list[int]:
    """The ids that both sides get, PICTURE where the picture goes: of a text if there is a
    tokenizer, else drawn."""
    from core.tokenizer import Tokenizer
    llm = config.get("llm") or config.get("text_config") or config
    picture = config["model_type"] != "llama"
    rest = patches(config) if picture else 0                               # positions of the prompt
    n = (51 if picture else 64) if args.prompt is None else args.prompt - rest
    if n < 4:
        raise UserError(f"--prompt {args.prompt} leaves no room for a text")
    try:
        tokenizer = Tokenizer.from_pretrained(args.model)
        ids = tokenizer.encode(TEXT * (n // 20 + 1), bos=tokenizer.bos_id is not None)[:n]
    except UserError:
        import torch
        vocab = min(llm.get("vocab_size", 32000), 32000)
        ids = torch.randint(3, vocab, (n,), generator=torch.Generator().manual_seed(0)).tolist()
    return ids[:2] + [PICTURE] * picture + ids[2:]


def patches(config) -> int:
    vision = config.get("vision") or config["vision_config"]
    return (vision["image_size"] // vision["patch_size"]) ** 2


def pixels_of(config):
    import torch
    size = (config.get("vision") or config["vision_config"])["image_size"]
    return torch.randn(1, 3, size, size,
                       generator=torch.Generator().manual_seed(0))  # (1, 3, size, size)


def ours(args, config):
    """Yields "loaded" with what a token reads (bytes of weights, and of the cache when half is
    said), then the ids."""
    import torch
    from torch import nn

    from fast.packed import Columns, Int8
    dtype = getattr(torch, args.dtype)
    ids = torch.tensor([the_prompt(args, config)], device=args.device)               # (1, T)
    if config["model_type"] == "llama":
        from llama import Llama
        llm = Llama.from_pretrained(args.model, dtype=dtype, device=args.device).eval()
    else:
        from ccra import VLM
        model = VLM.from_pretrained(args.model, dtype=dtype, device=args.device).eval()
        llm = model.llm
    if args.quant or args.pack:
        llm.pack(int8=args.quant == "int8")
    kinds = [m for m in llm.modules() if isinstance(m, (nn.Linear, Columns, Int8))]
    tensors = [
        t for m in kinds for t in chain(m.parameters(recurse=False), m.buffers(recurse=False))]
    c = llm.config
    body = sum(t.numel() for t in tensors) - c.vocab_size * c.hidden_size
    prompt = ids.shape[1] + (patches(config) - 1 if (ids == PICTURE).any() else 0)
    kept = 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * dtype.itemsize  # of a position
    yield dict(bytes=sum(t.nbytes for t in tensors), cache=kept * (prompt + args.tokens // 2),
               flops=2 * body * prompt)
    if config["model_type"] == "llama":
        with torch.no_grad():
            yield from map(int, llm.generate(llm.embed(ids), max_new_tokens=args.tokens))
    else:
        query = ids[:, 3:]
        yield from map(
            int,
            model.generate(
                pixels_of(config).to(args.device), ids, query,
                torch.ones_like(query, dtype=torch.bool), max_new_tokens=args.tokens))


def peer(args, config):
    """The same of transformers. Its streamer tells when an id is ready; a thread would disturb what
    is measured."""
    import torch
    import transformers
    from transformers.generation.streamers import BaseStreamer
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    text = config["model_type"] == "llama"
    kind = transformers.LlamaForCausalLM if text else transformers.LlavaForConditionalGeneration
    model = kind.from_pretrained(args.model, dtype=getattr(torch,
                                                           args.dtype)).eval().to(args.device)
    ids, more = the_prompt(args, config), {}
    if not text:
        at, n = ids.index(PICTURE), patches(config)
        ids[at:at + 1] = [config.get("image_token_index", config.get("image_token_id"))] * n
        more = dict(pixel_values=pixels_of(config).to(args.device, model.dtype))
    yield {}

    class Clock(BaseStreamer):
        def __init__(self):
            self.ids, self.times = [], []

        def put(self, value):
            self.ids.append(value.flatten().tolist())
            self.times.append(time.time())

        def end(self):
            pass

    clock, ids = Clock(), torch.tensor([ids], device=args.device)
    model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), streamer=clock,
                   do_sample=False, pad_token_id=0, eos_token_id=None, max_new_tokens=args.tokens,
                   min_new_tokens=args.tokens, **more)
    yield from zip((step[0] for step in clock.ids[1:]), clock.times[1:])   # the first is the prompt


def best(f, n: int) -> float:
    """Seconds that the fastest of n calls takes, after one more. f gives a tensor: to read a number
    waits for a GPU."""
    times = []
    for _ in range(n + 1):
        start = time.perf_counter()
        f().view(-1)[0].item()
        times.append(time.perf_counter() - start)
    return min(times[1:])


def bandwidth(device) -> float:
    """Bytes/s of reading memory now: 1 GB of it. (Of 128 MB a 32 MB cache keeps so much that 80
    GB/s looks like 90.)"""
    import torch
    numbers = torch.ones(2 ** 28, device=device)
    return numbers.nbytes / best(lambda: numbers.sum(), 4)


def side(which, args, config) -> dict:
    """One run of one side. BENCH_STARTED: when the parent started this process."""
    import torch
    torch.set_num_threads(args.threads)
    started, ids, times, seen, reads = float(os.environ["BENCH_STARTED"]), [], [], [], []
    steps = dict(ours=ours, peer=peer)[which](args, config)
    result = next(steps)
    result["load"] = time.time() - started
    seen.append(memory(args.device))
    for step in steps:
        id, at = step if isinstance(step, tuple) else (step, time.time())
        ids.append(id)
        times.append(at)
        if len(ids) % APART == 1:
            seen.append(memory(args.device))
            if which == "ours":           # (of the peer's tokens one hears when they are all there)
                reads.append((at, bandwidth(args.device), time.time()))
                forget_peak(args.device)                  # what that took is not the model's
    seen.append(memory(args.device))
    result |= dict(first=times[0] - started, rate=(len(ids) - 1) / (times[-1] - times[0]), ids=ids,
                   peak=max(m["peak"] for m in seen), anonymous=max(m["anonymous"] for m in seen))
    if which == "ours":
        reads.append((times[-1], bandwidth(args.device), None))
        spans = [(end - start, (a + b) / 2) for (_, a, start), (end, b, _) in zip(reads, reads[1:])]
        spent = sum(seconds for seconds, _ in spans)
        result["rate"] = (len(ids) - 1) / spent
        result["bandwidth"] = sum(seconds * speed for seconds, speed in spans) / spent
        result["bandwidth_share"] = (result["bytes"] +
                                     result["cache"]) * result["rate"] / result["bandwidth"]
        result["matrix_rate"] = result["flops"] / (result["first"] - result["load"])
    return result


def machine(args, config) -> dict:
    """Best of several: flop/s of matrix products with 512 rows (bfloat16: 64; GPU: 8192) and 4096 x
    4096 numbers."""
    import torch
    torch.set_num_threads(args.threads)
    result = {}
    for name, rows in (("float32", 512), ("bfloat16", 64)):
        rows = rows if args.device == "cpu" else 8192
        x, w = (torch.randn(n, 4096, device=args.device).to(getattr(torch, name))
                for n in (rows, 4096))
        result[name] = 2 * rows * 4096 ** 2 / best(lambda: x @ w.t(), 3)
    return result


# --------------------------------------------------------------------------------------------------
# The parent

def child(which, argv) -> dict:
    """Run one side in a process of its own; the last line of its stdout is what it found."""
    env = {**os.environ, "BENCH_STARTED": repr(time.time())}
    done = subprocess.run([sys.executable, "-m", "bench.speed", "--child", which, *argv], env=env,
                          capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1].removeprefix("error: ")
        raise UserError(f"{which}: {reason}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def read_files(folder) -> None:
    """Into the page cache. Before every run: packing may push a file that is as large as memory out
    of it."""
    for file in Path(folder).iterdir():
        if file.is_file():
            with open(file, "rb") as stream:
                while stream.read(2 ** 24):
                    pass


def measure(args, argv) -> dict:
    config = read_config(args.model)
    if "model_type" not in config:
        raise UserError(f"{args.model}: config.json has no model_type")
    if args.peer and config["model_type"] not in ("llama", "llava"):
        raise UserError(
            f"{args.model}: transformers doesn't know {config['model_type']!r} (leave --peer out)")
    if args.dtype is None:
        llm = config.get("llm") or config.get("text_config") or {}
        args.dtype = next((str(d[k]) for d in (config, llm)
                           for k in ("dtype", "torch_dtype") if d.get(k)), "float32")
        argv = [*argv, "--dtype", args.dtype]
    sides, runs = ["machine", "ours"] + ["peer"] * args.peer, {}
    for round in range(args.rounds):
        for which in sides:
            if sys.stderr.isatty():
                print(f"\rround {round + 1} of {args.rounds}: {which:8}\r", end="", file=sys.stderr,
                      flush=True)
            if which != "machine":
                read_files(args.model)
            runs.setdefault(which, []).append(child(which, argv))
    result = dict(model=args.model, dtype=args.dtype, quant=args.quant, pack=args.pack,
                  device=args.device, threads=args.threads, runs=runs)
    for which, found in runs.items():
        result[which] = {
            key: statistics.median(run[key] for run in found) for key in found[0] if key != "ids"}
    us, limit = result["ours"], result["machine"]
    us["matrix_share"] = us["matrix_rate"] / max(limit["float32"], limit["bfloat16"])
    if args.peer:
        result["ratio"] = {
            key: us[key] / result["peer"][key]
            for key in ("load", "first", "rate", "peak", "anonymous")}
        pairs = list(zip(runs["ours"][0]["ids"], runs["peer"][0]["ids"]))
        result["same_tokens"] = next((i for i, (our, their) in enumerate(pairs) if our != their),
                                     len(pairs))
    return result


def table(r) -> None:
    how = ", ".join(filter(None, [r["dtype"], r["quant"], "packed" if r["pack"] else None]))
    where = f"{r['threads']} threads" if r["device"] == "cpu" else r["device"]
    print(f"{r['model']} ({how}), {where}, medians of {len(r['runs']['ours'])}")
    print(
        f"{'':14}{'load':>9}{'first token':>13}{'tokens/s':>10}{'resident peak':>15}{'of it anonymous':>17}"
    )
    for name, key in (("nanoCCRA", "ours"), ("transformers", "peer")):
        if m := r.get(key):
            print(
                f"{name:14}{m['load']:7.2f} s{m['first']:11.2f} s{m['rate']:10.2f}{m['peak'] / 1e9:12.2f} GB"
                f"{m['anonymous'] / 1e9:14.2f} GB")
    if m := r.get("ratio"):
        print(f"{'ratio':14}{m['load']:8.2f}x{m['first']:12.2f}x{m['rate']:9.2f}x{m['peak']:14.2f}x"
              f"{m['anonymous']:16.2f}x")
        same, n = r["same_tokens"], len(r["runs"]["ours"][0]["ids"])
        # In bfloat16 two logits are often the very same number, and rounding elsewhere decides
        # which comes first.
        print("same tokens: " + ("yes" if same == n else f"the first {same} of {n}"))
    us, m = r["ours"], r["machine"]
    print(
        f"machine: reads {us['bandwidth'] / 1e9:.1f} GB/s, multiplies {m['float32'] / 1e9:.0f} GFlop/s in float32, "
        f"{m['bfloat16'] / 1e9:.0f} in bfloat16")
    print(
        f"decoding reads {us['bytes'] / 1e9:.2f} GB of weights and {us['cache'] / 1e9:.2f} GB of keys and values a "
        f"token: {us['bandwidth_share']:.0%} of that bandwidth; the prompt takes {us['flops'] / 1e12:.2f} TFlop: "
        f"{us['matrix_share']:.0%} of that rate")


def cost(args) -> None:
    """int8 against float32, on one model: logits over questions with their answers, accuracy,
    bytes."""
    import torch

    from ccra import VLM
    from clip import preprocess
    from core.tokenizer import Tokenizer
    from data import collate, prompt, query_of
    from eval import sit
    from toy import world as toy
    from toy.exam import score_toy
    torch.set_num_threads(args.threads)
    folder = args.model or toy.MODEL
    tokenizer, items, found = Tokenizer.from_pretrained(folder), exam.exam(0, args.n), {}
    for name in ("float32", "int8"):
        model = VLM.from_pretrained(folder, dtype=torch.float32).eval()
        model.llm.pack(int8=True) if name == "int8" else None
        rows = [prompt([(item.turns[0].question, None)], tokenizer) for item in items[:100]]
        batch = collate([
            dict(ids=row.ids, labels=row.labels, query=query_of(row.turns, model.query),
                 pixels=preprocess(toy.draw(item.scene), model.image["size"], pad=True))
            for row, item in zip(rows, items)])
        batch.pop("labels")
        with torch.no_grad():
            real = batch["mask"].sum(1) + (batch["ids"]
                                           == PICTURE).sum(1) * (model.picture_rows - 1)
            # (100, V), of the answers' starts
            logits = model(**batch)[torch.arange(len(rows)), real - 1]
        texts = sit(model, tokenizer, items, 100, torch.device("cpu"))
        size = sum(t.nbytes for t in chain(model.llm.parameters(), model.llm.buffers()))
        found[name] = logits, score_toy(items, texts)["accuracy"], size
    (exact, *_), (rounded, *_) = found["float32"], found["int8"]
    error = (rounded - exact).square().mean().sqrt() / exact.std()
    agree = (rounded.argmax(-1) == exact.argmax(-1)).float().mean()
    print(
        f"logits of 100 answers' first tokens: error {error:.4f} of their spread, same likeliest token {agree:.0%}"
    )
    for name, (_, accuracy, size) in found.items():
        print(f"{name:8} accuracy {accuracy:7.2%} of {args.n}, language model {size / 1e6:.1f} MB")


def main(argv=None):
    args = arguments(argv)
    if args.child:
        work = machine if args.child == "machine" else lambda *a: side(args.child, *a)
        return print(json.dumps(work(args, read_config(args.model))))
    if args.cost:
        return cost(args)
    result = measure(args, list(sys.argv[1:] if argv is None else argv))
    table(result)
    if args.json:
        write_beside(Path(args.json),
                     lambda tmp: tmp.write_text(json.dumps(result, indent=1) + "\n"))


if __name__ == "__main__":
    run(main)
