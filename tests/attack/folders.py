"""Model folders that are damaged, or say nonsense: something of one is changed, and all that reads
such folders tries to.

    python -m tests.attack.folders --minutes 5 [--seed 0]
"""
import argparse
import base64
import copy
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from functools import cache, partial
from pathlib import Path

import torch

from ccra import VLM, CCRAConfig, outline
from clip import CLIP, CLIPVision
from core.common import UserError
from core.folders import read_config
from core.layouts import Folder
from core.tokenizer import LLAMA3, Tokenizer
from fusers import FUSERS
from llama import Llama
from tests.core import helpers
from toy.world import MODEL

SECONDS = 20                       # of one reader, before it counts as hanging
DEEP = "[" * 1000 + "]" * 1000     # put into the text: Python's own writer can't write it
NASTY = (None, True, False, 0, -1, 1, 2, 3, 7, 10 ** 9, 10 ** 12, 10 ** 30, -10 ** 30, 0.5, 1e308,
         1e-300, float("nan"), float("inf"), float("-inf"), "", "a\nerror: b", "x" * 10000,
         "\ud800", "../..", [], [1], [[]], ["a"], {}, {"a": {}}, {"content": 3}, "DEEP", "1", "\0",
         "\x1b[2J")
NAMES = ("rope_scaling", "rope_parameters", "rope_scale", "type", "eos_token_id", "vocab_size",
         "model_type", "llm", "text_config", "a\nb", "", "mm_hidden_size", "partial_rotary_factor",
         "vision_config_dict", "projection_dim", "head_dim", "added_tokens_decoder", "eos_token")
EXTRA = {"adapter_config.json": b"{}", "model.safetensors": b"", "tokenizer.model": b"\n",
         "tokenizer.json": b"{}", "tokenizer_config.json": b'{"eos_token": []}',
         "added_tokens.json": b'{"<box>": 5}', "params.json": b"{}", "config.json": b"[]",
         "special_tokens_map.json": b'{"additional_special_tokens": {"a": 3}}',
         "model.safetensors.index.json": b'{"weight_map": {"x": ".."}}',
         "pytorch_model.bin": b"\x80\x02}q\x00.", "consolidated.00.pth": b"PK\x03\x04"}
POINTER = (b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64
           + b"\nsize 13500000000\n")


# --------------------------------------------------------------------------------------------------
# Folders that are whole: made once

def sentencepiece() -> dict[str, bytes]:
    """The toy world's tokenizer."""
    return {"tokenizer.model": (MODEL / "tokenizer.model").read_bytes(),
            "added_tokens.json": b'{"[PAD]": 896}',
            "special_tokens_map.json": b'{"pad_token": {"content": "[PAD]"}, "bos_token": "<s>"}',
            "tokenizer_config.json": json.dumps({"added_tokens_decoder": {
                "0": {"content": "<unk>", "special": True}}}).encode()}


def tiktoken_text() -> dict[str, bytes]:
    """A small one of Meta's kind."""
    tokens = [bytes([b]) for b in range(256)] + [b"he", b"hel", b" w"]
    lines = [base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens)]
    return {"tokenizer.model": b"".join(lines)}


def byte_level() -> dict[str, bytes]:
    """A small tokenizer.json of Llama 3's kind."""
    from core.tokenizer import ALPHABET
    words = [*ALPHABET, "he", "hel"]
    spec = {"added_tokens": [{"id": 300, "content": "<end>", "special": True}], "normalizer": None,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": LLAMA3}, "behavior": "Isolated",
                 "invert": False},
                {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}]},
            "model": {"type": "BPE", "vocab": {word: id for id, word in enumerate(words)},
                      "merges": ["h e", ["he", "l"]]}}
    return {"tokenizer.json": json.dumps(spec).encode(),
            "tokenizer_config.json": b'{"eos_token": "<end>"}'}


def ours(name: str, dir: Path) -> None:
    """A model of ours, with this fuser."""
    sizes = {"text_dim": 48, "vision_dim": 16, "n_layers": 3, "d_hidden": 8, "heads": 2,
             "groups": 2}
    kind = CCRAConfig if name == "ccra" else FUSERS[name][1]
    known = {key: size for key, size in sizes.items() if key in kind.__dataclass_fields__}
    helpers.made(kind(**known)).save_pretrained(dir)


MAKERS = {**{name: partial(ours, name) for name in ("ccra", *FUSERS)},
          **{name: make for name, (make, _) in helpers.LLMS.items()},
          "clip": helpers.openai_clip, "llava-hf": helpers.llava_hf, "liuhaotian": helpers.original}
TOKENIZERS = (sentencepiece, tiktoken_text, byte_level)


@cache
def whole(name: str) -> dict[str, bytes]:
    """The files of one layout."""
    with tempfile.TemporaryDirectory() as dir:
        dir = Path(dir)
        if name in ("ccra", *FUSERS):
            MAKERS[name](dir)
        else:
            helpers.write(dir, *MAKERS[name]())
        return {path.name: path.read_bytes() for path in dir.iterdir()}


# --------------------------------------------------------------------------------------------------
# What is changed

def places(content, path=()) -> list[tuple]:
    """Where anything stands in a JSON value; of long lists and objects some."""
    inner = (content.items() if isinstance(content, dict) else
             enumerate(content) if isinstance(content, list) else ())
    found = [path]
    for key, value in list(inner)[:40]:
        found += places(value, (*path, key))
    return found


def spoil_json(rng: random.Random, text: bytes) -> bytes:
    """Another value somewhere, a key more, less, or with another's value."""
    content = json.loads(text)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        *way, last = rng.choice([path for path in places(content) if path] or [("x",)])
        holder = content
        for key in way:
            holder = holder[key]
        what = rng.choice(("value", "value", "value", "key", "gone", "swap", "copy"))
        if what == "gone":
            del holder[last]
        elif what == "key" and isinstance(holder, dict):
            holder[rng.choice(NAMES)] = copy.deepcopy(rng.choice(NASTY))
        elif what in ("swap", "copy") and isinstance(holder, dict) and len(holder) > 1:
            other = rng.choice(list(holder))
            kept, holder[last] = holder[last], copy.deepcopy(holder[other])
            holder[other] = kept if what == "swap" else holder[other]
        else:
            holder[last] = copy.deepcopy(rng.choice(NASTY))
        if not isinstance(content, dict) or not content:
            break
    return json.dumps(content).replace('"DEEP"', DEEP).encode()


def spoil_bytes(rng: random.Random, content: bytes) -> bytes:
    """Cut, changed or exchanged bytes."""
    a, b = sorted(rng.randrange(len(content) + 1) for _ in range(2))
    what = rng.choice(("cut", "cut", "flip", "flip", "few", "less", "twice", "noise", "empty"))
    if what == "cut":
        return content[:b]
    if what in ("flip", "few"):
        changed = bytearray(content)
        for _ in range(rng.choice((1, 3, 50))):
            at = rng.randrange(min(len(changed), 400) if what == "few" else len(changed))
            changed[at] = rng.randrange(256)
        return bytes(changed)
    return {"less": content[:a] + content[b:], "twice": content[:b] + content[a:],
            "noise": rng.randbytes(b), "empty": b""}[what]


def spoil_header(rng: random.Random, content: bytes) -> bytes:
    """A safetensors file whose header says something else."""
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8:8 + size])
    name = rng.choice([name for name in header if name != "__metadata__"])
    what = rng.choice(("shape", "dtype", "data_offsets", "name", "json"))
    if what == "name":
        header[rng.choice(("a\nb", "", "x" * 9999, "..", "model.norm.weight"))] = header.pop(name)
    elif what == "json":
        text = spoil_json(rng, json.dumps(header).encode())
        return len(text).to_bytes(8, "little") + text + content[8 + size:]
    elif what == "dtype":
        header[name]["dtype"] = rng.choice(("I64", "BOOL", "F8_E4M3", "F64", "U8", "C64", "F4"))
    else:
        header[name][what] = rng.choice(([], [0], [2 ** 62, 4], [-1], [1, 0], [0, 10 ** 12], [3]))
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + content[8 + size:]


def spoil_folder(rng: random.Random, folder: Path, name: str) -> str:
    """Something else where a file was, or something more."""
    path = folder / name
    what = rng.choice(("folder", "pipe", "link", "loop", "pointer", "gone", "extra", "inside"))
    if what == "extra":
        more = rng.choice(list(EXTRA))
        (folder / more).write_bytes(EXTRA[more])
    elif what == "inside":
        cache = folder / "models--a--b" / "snapshots" / "abc"
        cache.mkdir(parents=True)
        for file in list(folder.iterdir()):
            if file.is_file():
                file.rename(cache / file.name)
    else:
        path.unlink()
        {"folder": path.mkdir, "pipe": partial(os.mkfifo, path), "gone": lambda: None,
         "link": partial(path.symlink_to, "nowhere"), "loop": partial(path.symlink_to, path.name),
         "pointer": partial(path.write_bytes, POINTER)}[what]()
    return what


def spoil(rng: random.Random, folder: Path) -> str:
    """Change one thing in a folder, and say what."""
    name = rng.choice(sorted(path.name for path in folder.iterdir()))
    path, how = folder / name, rng.random()
    if how < 0.12:
        return f"{name}: {spoil_folder(rng, folder, name)}"
    spoiler = spoil_bytes
    if name.endswith(".json") and how < 0.85:
        spoiler = spoil_json
    elif name.endswith(".safetensors") and how < 0.7:
        spoiler = spoil_header
    path.write_bytes(spoiler(rng, path.read_bytes()))
    return f"{name}: {spoiler.__name__}"


# --------------------------------------------------------------------------------------------------
# Who reads it

def read_vlm(folder: Path) -> None:
    """As sample.py, eval.py and train.py's stage 2."""
    read_config(folder).get("world")
    model = VLM.from_pretrained(folder)
    ids = torch.tensor([[1, -200, 2]])
    size = model.image["size"]
    if size < 99:
        model(torch.zeros(1, 3, size, size, dtype=model.vision.class_embedding.dtype), ids,
              ids[:, :1], torch.ones(1, 1, dtype=torch.bool))


def read_liuhaotian(folder: Path) -> None:
    """A model whose tower lies in a folder of its own: here the same."""
    VLM.from_pretrained(folder, vision=folder)


def read_llama(folder: Path) -> None:
    """As train.py's stage 1."""
    Llama.from_pretrained(folder)(torch.tensor([[1, 2, 3]]))


def read_tower(folder: Path) -> None:
    CLIPVision.from_pretrained(folder)


def read_clip(folder: Path) -> None:
    CLIP.from_pretrained(folder)


def read_tokenizer(folder: Path) -> None:
    """As everything does."""
    tokenizer = Tokenizer.from_pretrained(folder)
    text = "hello w </s> <box> \n 1"
    tokenizer.decode(tokenizer.encode(text) + tokenizer.encode(text, continues=True))
    tokenizer.decode(tokenizer.eos_ids)


def read_plan(folder: Path) -> None:
    """As train.py --plan."""
    outline(Folder(folder))


READERS = (read_vlm, read_liuhaotian, read_llama, read_tower, read_clip, read_tokenizer, read_plan)


def late(*_) -> None:
    raise AssertionError(f"hangs for {SECONDS} seconds")


def tried(reader, folder: Path, limit: bool) -> str:
    """What a reader made of a folder: "read" or "refused". AssertionError for anything else."""
    if limit:
        signal.signal(signal.SIGALRM, late)
        signal.alarm(SECONDS)
    try:
        reader(folder)
        return "read"
    except UserError as e:
        assert "\n" not in str(e) and 20 < len(str(e)) < 2500, f"{reader.__name__}: {str(e)!r}"
        return "refused"
    except AssertionError:
        raise
    except BaseException as e:
        where = "".join(traceback.format_exception(e)[-3:])
        raise AssertionError(f"{reader.__name__}: {type(e).__name__}: {e}\n{where}") from e
    finally:
        if limit:
            signal.alarm(0)


def attack(rng: random.Random, folder: Path, names: tuple[str, ...] = tuple(MAKERS),
           limit: bool = hasattr(signal, "SIGALRM")) -> str:
    """Make one damaged folder in `folder`, and have it read by all that reads models. Returns what
    was tried. AssertionError for anything but success or a UserError of one line.

    limit: with an alarm against hanging; for the main thread of a process alone.
    """
    dir = folder / "model"
    shutil.rmtree(dir, ignore_errors=True)
    dir.mkdir(parents=True)
    layout, tokenizer = rng.choice(names), rng.choice(TOKENIZERS)
    for name, content in {**whole(layout), **tokenizer()}.items():
        (dir / name).write_bytes(content)
    said = f"{layout}, {tokenizer.__name__}, {spoil(rng, dir)}"
    try:
        ends = [tried(reader, dir, limit) for reader in READERS]
    except AssertionError as e:
        raise AssertionError(f"{said}: {e}") from e
    return f"{said}: {ends.count('read')} read it"


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--minutes", type=float, default=1)
    p.add_argument("--seed", type=int, default=0)
    args = p.parse_args()
    end, seed, bad = time.monotonic() + 60 * args.minutes, args.seed, Counter()
    with tempfile.TemporaryDirectory() as folder:
        while time.monotonic() < end:
            try:
                attack(random.Random(seed), Path(folder))
            except AssertionError as e:
                kind = str(e).splitlines()[-1] + " | " + str(e).splitlines()[0].split(": ")[2]
                bad[kind] += 1
                if bad[kind] == 1:
                    print(f"seed {seed}: {str(e)[:1500]}", flush=True)
            seed += 1
    print(f"{seed - args.seed:,} folders, {sum(bad.values())} ended badly, in {len(bad)} kinds")
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
