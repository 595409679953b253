"""How fast is it here, beside transformers, and beside what this machine could do?

    python -m bench --model smollm2 --peer                        a folder with a Llama, text only
    python -m bench --model llava-1.5-7b-hf --peer --tokens 16    with a picture
    python -m bench --model smollm2 --pack                        weights laid out for decoding
    python -m bench --model llava-1.5-7b-hf --quant int8
    python -m bench --model llava-1.5-7b-hf --peer --device cuda  on a GPU
    python -m bench --cost                                        what int8 costs: errors, accuracy

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
from pathlib import Path

from core import flags
from core.common import ROOT, UserError, cores, write_json
from core.flags import whole
from core.folders import read_config

DTYPES = ("float32", "bfloat16", "float16")


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line, checked. UserError for what makes no sense."""
    p = flags.Parser(prog="python -m bench", description=__doc__)
    p.add_argument("--model",
                   help="a model folder: a Llama, or a vision-language model (config.json tells)")
    p.add_argument("--peer", action="store_true", help="transformers as well, on the same folder")
    p.add_argument("--device", default="cpu",
                   help="cpu (default), or cuda: memory is the GPU's then")
    p.add_argument("--dtype", choices=DTYPES, help="of both sides (default: as stored)")
    p.add_argument("--quant", choices=["int8"], help="8-bit weights, ours only")
    p.add_argument("--pack", action="store_true",
                   help="lay half-precision weights out for decoding, ours only")
    p.add_argument("--tokens", type=whole(2, 1 << 20), default=64,
                   help="to generate (default 64)")
    p.add_argument("--prompt", type=whole(2, 1 << 20),
                   help="positions of the prompt, the picture's among them (default: text 64, or "
                   "the picture and 51)")
    p.add_argument("--rounds", type=whole(1, 1000), default=3,
                   help="how often each side runs (default 3)")
    p.add_argument("--threads", type=whole(1, 1024), default=cores(),
                   help="default: one for each core this process may use")
    p.add_argument("--json", metavar="FILE", help="write everything that was measured to a file")
    p.add_argument("--cost", action="store_true",
                   help="what int8 costs (--model: default the bundled one)")
    p.add_argument("--n", type=whole(1, 1_000_000), default=500, help="questions for --cost")
    p.add_argument("--child", help=argparse.SUPPRESS)
    args = p.parse_args(argv)
    check(args)
    return args


def check(args: argparse.Namespace) -> None:
    """UserError for arguments that contradict each other or can't be had here."""
    if not args.model and not args.cost:
        raise UserError("give --model DIR (or --cost)")
    if args.json and not Path(args.json).parent.is_dir():
        raise UserError(f"--json {args.json}: should be a file in a folder that exists")
    if args.pack and args.quant:
        raise UserError("--pack and --quant exclude each other")
    if (args.pack or args.quant) and args.device != "cpu":
        raise UserError("--pack and --quant are for CPUs")
    if args.peer and importlib.util.find_spec("transformers") is None:
        raise UserError("--peer needs transformers (pip install -r requirements-test.txt, or leave "
                        "--peer out)")


def child(which: str, argv: list[str]) -> dict:
    """Run one side in a process of its own; the last line of its stdout is what it found."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "BENCH_STARTED": repr(time.time())}
    done = subprocess.run([sys.executable, "-m", "bench", "--child", which, *argv], env=env,
                          capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1].removeprefix("error: ")
        raise UserError(f"{which}: {reason}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def read_files(folder: str) -> None:
    """Into the page cache. Before every run: packing may push a file that is as large as memory out
    of it."""
    for file in Path(folder).iterdir():
        if file.is_file():
            with open(file, "rb") as stream:
                while stream.read(2 ** 24):
                    pass


def stored_dtype(config: dict) -> str:
    """The dtype that config.json names, the whole model's or its language model's."""
    llm = config.get("llm") or config.get("text_config") or {}
    named = [part.get(key) for part in (config, llm) for key in ("dtype", "torch_dtype")]
    return str(next(filter(None, named), "float32"))


def measure(args: argparse.Namespace, argv: list[str]) -> dict:
    """All rounds of all sides -> what `table` shows, and every run."""
    config = read_config(args.model)
    if "model_type" not in config:
        raise UserError(f"{args.model}: config.json has no model_type")
    if args.peer and config["model_type"] not in ("llama", "llava"):
        raise UserError(f"{args.model}: transformers doesn't know {config['model_type']!r} (leave "
                        "--peer out)")
    if args.dtype is None:
        args.dtype = stored_dtype(config)
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
    how = {key: getattr(args, key) for key in ("model", "dtype", "quant", "pack", "device",
                                               "threads")}
    return how | dict(runs=runs) | compare(runs)


def compare(runs: dict[str, list[dict]]) -> dict:
    """Medians of each side's runs; with a peer, ratios, and how many tokens are the same at first.
    """
    result = {which: {key: statistics.median(run[key] for run in found)
                      for key in found[0] if key != "ids"} for which, found in runs.items()}
    us, limit = result["ours"], result["machine"]
    us["matrix_share"] = us["matrix_rate"] / max(limit["float32"], limit["bfloat16"])
    if "peer" in runs:
        result["ratio"] = {key: us[key] / result["peer"][key]
                           for key in ("load", "first", "rate", "peak", "anonymous")}
        pairs = list(zip(runs["ours"][0]["ids"], runs["peer"][0]["ids"]))
        differ = (i for i, (our, their) in enumerate(pairs) if our != their)
        result["same_tokens"] = next(differ, len(pairs))
    return result


def table(r: dict) -> None:
    """Print what `measure` found."""
    how = ", ".join(filter(None, [r["dtype"], r["quant"], "packed" if r["pack"] else None]))
    where = f"{r['threads']} threads" if r["device"] == "cpu" else r["device"]
    print(f"{r['model']} ({how}), {where}, medians of {len(r['runs']['ours'])}")
    print(f"{'':14}{'load':>9}{'first token':>13}{'tokens/s':>10}{'resident peak':>15}"
          f"{'of it anonymous':>17}")
    for name, key in (("nanoCCRA", "ours"), ("transformers", "peer")):
        if m := r.get(key):
            print(f"{name:14}{m['load']:7.2f} s{m['first']:11.2f} s{m['rate']:10.2f}"
                  f"{m['peak'] / 1e9:12.2f} GB{m['anonymous'] / 1e9:14.2f} GB")
    if m := r.get("ratio"):
        print(f"{'ratio':14}{m['load']:8.2f}x{m['first']:12.2f}x{m['rate']:9.2f}x{m['peak']:14.2f}x"
              f"{m['anonymous']:16.2f}x")
        same, n = r["same_tokens"], len(r["runs"]["ours"][0]["ids"])
        # In bfloat16 two logits are often the very same number, and rounding elsewhere decides
        # which comes first.
        print("same tokens: " + ("yes" if same == n else f"the first {same} of {n}"))
    us, m = r["ours"], r["machine"]
    print(f"machine: reads {us['bandwidth'] / 1e9:.1f} GB/s, multiplies {m['float32'] / 1e9:.0f} "
          f"GFlop/s in float32, {m['bfloat16'] / 1e9:.0f} in bfloat16")
    print(f"decoding reads {us['bytes'] / 1e9:.2f} GB of weights and {us['cache'] / 1e9:.2f} GB of "
          f"keys and values a token: {us['bandwidth_share']:.0%} of that bandwidth; the prompt "
          f"takes {us['flops'] / 1e12:.2f} TFlop: {us['matrix_share']:.0%} of that rate")


def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    if args.child:
        # here, since its import of torch counts as part of a start
        from bench.sides import work
        print(json.dumps(work(args.child, args)))
    elif args.cost:
        from bench.cost import cost
        cost(args)
    else:
        result = measure(args, list(sys.argv[1:] if argv is None else argv))
        table(result)
        if args.json:
            write_json(Path(args.json), result)


if __name__ == "__main__":
    run(main)
