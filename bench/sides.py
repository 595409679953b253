"""What the processes of `python -m bench` do, one side each: this code, transformers, the machine.

Nothing is imported from this repository or from transformers before the side that needs it, so that
the time of an import is in the right side's start.
"""
import argparse
import os
import time
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor, nn

from core.common import UserError
from core.folders import read_config

APART = 8               # tokens from one look at memory's speed to the next
PICTURE = -200          # core.tokenizer.IMAGE_TOKEN, without what that file imports
TEXT = ("A bicycle has two wheels, one behind the other, and is driven by pedals. It was invented "
        "in Europe in the nineteenth century, and soon people in many countries rode to work on "
        "one. Describe what came after that. ")


def work(which: str, args: argparse.Namespace) -> dict:
    """One run of "machine", "ours" or "peer" -> what was measured."""
    torch.set_num_threads(args.threads)
    config = read_config(args.model)
    if which == "machine":
        return machine(args.device)
    return side(which, args, config)


# --------------------------------------------------------------------------------------------------
# Memory

def memory(device: str) -> dict:
    """Resident memory of this process now, in bytes: `peak` so far, of it now `anonymous` (its own,
    not mapped). On a GPU what it holds of the GPU's."""
    if device != "cpu":
        return dict(peak=torch.cuda.max_memory_allocated(), anonymous=torch.cuda.memory_allocated())
    try:
        status = Path("/proc/self/status").read_text().splitlines()
        lines = dict(line.split(":", 1) for line in status)
        return {name: int(lines[key].split()[0]) * 1024
                for name, key in (("peak", "VmHWM"), ("anonymous", "RssAnon"))}
    except (OSError, KeyError):            # not Linux
        return dict(peak=0, anonymous=0)


def forget_peak(device: str) -> None:
    """Let memory's `peak` be that of what comes now."""
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    elif (file := Path("/proc/self/clear_refs")).exists():       # Linux
        file.write_text("5")


# --------------------------------------------------------------------------------------------------
# The same prompt for both sides

def the_prompt(args: argparse.Namespace, config: dict) -> list[int]:
    """Ids, PICTURE where the picture goes: of a text if there is a tokenizer, else drawn."""
    from core.tokenizer import Tokenizer
    llm = config.get("llm") or config.get("text_config") or config
    picture = config["model_type"] != "llama"
    rest = patches(config) if picture else 0             # positions that aren't text
    n = (51 if picture else 64) if args.prompt is None else args.prompt - rest
    if n < 4:
        raise UserError(f"--prompt {args.prompt} leaves no room for a text")
    try:
        tokenizer = Tokenizer.from_pretrained(args.model)
        ids = tokenizer.encode(TEXT * (n // 20 + 1), bos=tokenizer.bos_id is not None)[:n]
    except UserError:
        vocab = min(llm.get("vocab_size", 32000), 32000)
        ids = torch.randint(3, vocab, (n,), generator=torch.Generator().manual_seed(0)).tolist()
    return ids[:2] + [PICTURE] * picture + ids[2:]


def vision_of(config: dict) -> dict:
    return config.get("vision") or config["vision_config"]


def patches(config: dict) -> int:
    return (vision_of(config)["image_size"] // vision_of(config)["patch_size"]) ** 2


def pixels_of(config: dict) -> Tensor:
    """A picture of noise, (1, 3, size, size)."""
    size = vision_of(config)["image_size"]
    return torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))


# --------------------------------------------------------------------------------------------------
# The sides: each yields once when its model is loaded, then a token id as often as one is ready

def ours(args: argparse.Namespace, config: dict) -> Iterator:
    """Yields what a token reads (bytes of weights, and of the cache when half is said) and the
    prompt's FLOPs, then the ids."""
    import fast
    text = config["model_type"] == "llama"
    dtype = getattr(torch, args.dtype)
    ids = torch.tensor([the_prompt(args, config)], device=args.device)               # (1, T)
    if text:
        from llama import Llama
        model = Llama.from_pretrained(args.model, dtype=dtype, device=args.device).eval()
    else:
        from ccra import VLM
        model = VLM.from_pretrained(args.model, dtype=dtype, device=args.device).eval()
    model = fast.prepare(model, pack=args.pack, int8=args.quant == "int8")
    positions = ids.shape[1] + (0 if text else patches(config) - 1)
    yield demands(model if text else model.llm, positions, args.tokens, dtype)
    if text:
        with torch.no_grad():
            steps = model.generate(model.embed(ids), max_new_tokens=args.tokens)
            yield from map(int, steps)
    else:
        query = ids[:, 3:]
        pixels = pixels_of(config).to(args.device)
        steps = model.generate(pixels, ids, query, torch.ones_like(query, dtype=torch.bool),
                               max_new_tokens=args.tokens)
        yield from map(int, steps)


def demands(llm: nn.Module, positions: int, tokens: int, dtype: torch.dtype) -> dict:
    """What decoding reads for a token, in bytes, and what a prompt of so many positions takes."""
    from fast.packed import Columns, Int8
    matrices = [m for m in llm.modules() if isinstance(m, (nn.Linear, Columns, Int8))]
    tensors = [tensor for m in matrices
               for tensor in chain(m.parameters(recurse=False), m.buffers(recurse=False))]
    c = llm.config
    body = sum(t.numel() for t in tensors) - c.vocab_size * c.hidden_size
    position = 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * dtype.itemsize
    return dict(bytes=sum(t.nbytes for t in tensors), cache=position * (positions + tokens // 2),
                flops=2 * body * positions)


def peer(args: argparse.Namespace, config: dict) -> Iterator:
    """The same of transformers; (id, time) for each token. Its streamer tells when an id is ready;
    a thread would disturb what is measured."""
    import transformers
    from transformers.generation.streamers import BaseStreamer
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    text = config["model_type"] == "llama"
    kind = transformers.LlamaForCausalLM if text else transformers.LlavaForConditionalGeneration
    model = kind.from_pretrained(args.model, dtype=getattr(torch, args.dtype)).eval()
    model = model.to(args.device)
    ids, more = the_prompt(args, config), {}
    if not text:
        at = ids.index(PICTURE)
        image_token = config.get("image_token_index", config.get("image_token_id"))
        ids[at:at + 1] = [image_token] * patches(config)
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

    clock = Clock()
    ids = torch.tensor([ids], device=args.device)                                    # (1, T)
    model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), streamer=clock,
                   do_sample=False, pad_token_id=0, eos_token_id=None, max_new_tokens=args.tokens,
                   min_new_tokens=args.tokens, **more)
    yield from zip((step[0] for step in clock.ids[1:]), clock.times[1:])   # the first is the prompt


# --------------------------------------------------------------------------------------------------
# Measuring

def side(which: str, args: argparse.Namespace, config: dict) -> dict:
    """One run of one side. BENCH_STARTED: when the parent started this process."""
    started = float(os.environ["BENCH_STARTED"])
    ids, times, seen, reads = [], [], [], []
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
        read = (result["bytes"] + result["cache"]) * result["rate"]                  # bytes/s
        result["bandwidth_share"] = read / result["bandwidth"]
        result["matrix_rate"] = result["flops"] / (result["first"] - result["load"])
    return result


def best(f: Callable[[], Tensor], n: int) -> float:
    """Seconds that the fastest of n calls takes, after one more. f gives a tensor: to read a number
    waits for a GPU."""
    times = []
    for _ in range(n + 1):
        start = time.perf_counter()
        f().view(-1)[0].item()
        times.append(time.perf_counter() - start)
    return min(times[1:])


def bandwidth(device: str) -> float:
    """Bytes/s of reading memory now: 1 GB of it. (Of 128 MB a 32 MB cache keeps so much that 80
    GB/s looks like 90.)"""
    numbers = torch.ones(2 ** 28, device=device)
    return numbers.nbytes / best(lambda: numbers.sum(), 4)


def machine(device: str) -> dict:
    """Best of several: flop/s of matrix products with 512 rows (bfloat16: 64; GPU: 8192) and 4096 x
    4096 numbers."""
    result = {}
    for name, rows in (("float32", 512), ("bfloat16", 64)):
        rows = rows if device == "cpu" else 8192
        dtype = getattr(torch, name)
        x, w = (torch.randn(n, 4096, device=device).to(dtype) for n in (rows, 4096))
        result[name] = 2 * rows * 4096 ** 2 / best(lambda: x @ w.t(), 3)
    return result
