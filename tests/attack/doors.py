"""What people bring, damaged: records, prepared folders, pickles, pictures, answers, flags,
adapters.

Each door takes a random generator and an empty folder, puts one damaged thing there and opens it as
a program would. It returns "taken" or "refused". AssertionError, or any exception but a UserError
of one line, is a fault.
"""
import copy
import io
import json
import random
import shutil
import warnings
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import torch
from PIL import Image

import data
import eval as evaluation
import sample
from benchmarks.answers import read_answers
from benchmarks.score import score
from ccra import VLM
from clip import preprocess
from core import pictures
from core.common import UserError
from core.tokenizer import Tokenizer
from core.weights import unpickle
from tests.attack.faults import tiny_model
from tests.benchmarks.cases import MAKE
from tests.benchmarks.helpers import write_lines
from toy.world import MODEL
from training import adapters, lora, options, prepare
from training.prepared import Prepared

TOKENIZER = Tokenizer.from_pretrained(MODEL)
NASTY = (None, True, 0, -1, 7, 10 ** 19, 0.5, float("nan"), float("inf"), "", "a\nb", "\ud800",
         "..", "../../etc/passwd", "/etc/passwd", "C:\\x.png", "a\\..\\..\\b.png", "\0", "x" * 5000,
         [], {}, [1], {"a": 1}, [[[]]], "<image>", "</s>")


def opened(do) -> str:
    """How it ended. AssertionError for a message that isn't one line."""
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()), \
                warnings.catch_warnings(action="ignore"):
            do()
    except UserError as e:
        assert "\n" not in str(e) and len(str(e)) < 3000, f"not one short line: {str(e)!r}"
        return "refused"
    return "taken"


def change(rng: random.Random, value, depth: int = 0):
    """A JSON value with one thing in it changed, dropped, doubled or replaced by nonsense."""
    if isinstance(value, dict) and value and (depth == 0 or rng.random() < 0.8):
        key = rng.choice(list(value))
        kind = rng.randrange(6)
        if kind == 0:
            del value[key]
        elif kind == 1:
            more = rng.choice(("image", "id", "", "a\nb", key + " "))
            value[more] = copy.deepcopy(rng.choice(NASTY))
        else:
            value[key] = change(rng, value[key], depth + 1)
        return value
    if isinstance(value, list) and value and (depth == 0 or rng.random() < 0.8):
        i = rng.randrange(len(value))
        if rng.random() < 0.2:
            return value[:i] + rng.choice(([], [copy.deepcopy(value[i])] * 2)) + value[i + 1:]
        value[i] = change(rng, value[i], depth + 1)
        return value
    return copy.deepcopy(rng.choice(NASTY))


def spoil(rng: random.Random, content: bytes) -> bytes:
    """Bytes cut, changed, doubled, or with others put in."""
    at = rng.randrange(len(content) + 1)
    some = bytes(rng.randrange(256) for _ in range(rng.randint(1, 4)))
    return rng.choice((content[:at], content[:at] + some + content[at + len(some):],
                       content[:at] + some + content[at:], content[at:], content + content[:at],
                       b"\xef\xbb\xbf" + content, content.replace(b'"', some[:1], 1), b""))


def damaged_json(rng: random.Random, value) -> bytes:
    value = copy.deepcopy(value)
    for _ in range(rng.randint(1, 3)):
        value = change(rng, value)
    content = json.dumps(value).encode(errors="surrogatepass")
    return spoil(rng, content) if rng.random() < 0.3 else content


# --------------------------------------------------------------------------------------------------

def records(rng: random.Random, folder: Path) -> str:
    """A json for train.py --json, and the samples in it."""
    stage = rng.choice((1, 2))
    template = ("plain", "v1")[stage - 1]
    content = json.loads((data.EXAMPLE / f"stage{stage}.json").read_text())[:4]
    (folder / "x.json").write_bytes(damaged_json(rng, content))

    def read():
        rows = data.load(folder / "x.json", rng.choice((data.EXAMPLE, None)), TOKENIZER, template,
                         96)
        for i in range(len(rows)):
            data.make_batch([data.item(rows.sample(i), torch.zeros(3, 8, 8))], rng.choice(
                data.QUERIES), max_length=rng.choice((3, 70, 2048)), picture_rows=64)

    return opened(read)


def prepared(rng: random.Random, folder: Path) -> str:
    """A folder that data.py prepare wrote, changed afterwards, for train.py --data."""
    whole = folder.parent / "whole-prepared"
    if not whole.exists():
        opened(lambda: prepare.prepare(data.EXAMPLE / "stage2.json", data.EXAMPLE, whole, MODEL))
    out = folder / "prepared"
    shutil.copytree(whole, out)
    file = rng.choice(sorted(out.iterdir()))
    if file.name == "report.json" and rng.random() < 0.8:
        file.write_bytes(damaged_json(rng, json.loads(file.read_text())))
    else:
        file.write_bytes(spoil(rng, file.read_bytes()))

    def read():
        rows = Prepared(out, None, TOKENIZER, "v1", 96)
        for i in range(len(rows)):
            rows[i]

    return opened(read)


def pickles(rng: random.Random, folder: Path) -> str:
    """A .bin or .pth file."""
    file = io.BytesIO()
    torch.save({"a": torch.zeros(3), "b": torch.ones(2, 2)}, file,
               _use_new_zipfile_serialization=rng.random() < 0.5)
    (folder / "x.bin").write_bytes(spoil(rng, file.getvalue()))
    return opened(lambda: unpickle(folder / "x.bin"))


KINDS = (("png", "RGB"), ("png", "RGBA"), ("png", "P"), ("png", "I;16"), ("jpeg", "RGB"),
         ("jpeg", "CMYK"), ("gif", "P"), ("webp", "RGB"), ("bmp", "RGB"), ("tiff", "F"),
         ("tiff", "I;16"), ("ppm", "L"), ("ico", "RGBA"), ("tga", "RGB"))


def pictures_door(rng: random.Random, folder: Path) -> str:
    """A picture file, for sample.py, prepare and train.py alike: all take it, or none does."""
    kind, mode = rng.choice(KINDS)
    size = rng.choice(((19, 17), (32, 20), (1, 40), (3, 900))) if kind != "ico" else (32, 32)
    file = io.BytesIO()
    image = Image.effect_noise(size, 80)
    (image if mode == "L" else image.convert("I").convert(mode) if mode == "I;16"
     else image.convert(mode)).save(file, kind)
    path = folder / f"x.{rng.choice((kind, 'png', 'jpg', 'heic', 'svg', ''))}"
    path.write_bytes(spoil(rng, file.getvalue()) if rng.random() < 0.9 else file.getvalue())

    def read():
        preprocess(pictures.open_image(path, upright=rng.random() < 0.5), 14, True)

    end = opened(read)
    looked = opened(lambda: pictures.inspect(path, decode=True))
    assert end == looked, f"{path.name}: sample {end}, prepare {looked}"
    return end


def scoring(rng: random.Random, folder: Path) -> str:
    """A benchmark's official file, or a file of answers, for eval.py --score."""
    task = rng.choice(list(MAKE))
    path, own = MAKE[task](folder)
    answers = write_lines(folder / "a.jsonl", own)
    files = [file for file in [answers, path, *path.rglob("*")] if file.is_file()]
    file = answers if rng.random() < 0.5 else rng.choice(files)
    content = file.read_bytes()
    if file == answers and rng.random() < 0.8:
        rows = [json.loads(line) for line in content.splitlines()]
        rows = change(rng, rows)
        rows = rows if isinstance(rows, list) else [rows]
        content = b"".join(json.dumps(row).encode() + b"\n" for row in rows)
    elif file.suffix == ".json" and task != "pope" and rng.random() < 0.8:    # pope's are lines
        content = damaged_json(rng, json.loads(content))
    else:
        content = spoil(rng, content)
    file.write_bytes(content)
    return opened(lambda: score(task, path, read_answers(answers, task == "vizwiz")))


VALUES = ("nan", "inf", "-inf", "1e999", "-1", "0", "1", "2", "0.5", "1e-40", "1" + "0" * 19, "",
          " ", "x", "1,2", "\0", "9" * 400, "0x10", "1_000", "١", "--", "a\nb", "/dev/null", ".")
PROGRAMS = {
    "train": (options.arguments, ["--stage", "2"], "--batch --micro --lr --warmup --steps --seed "
              "--max-length --threads --workers --save-every --keep --stop-after --ask-every "
              "--gpus --shard-size --mfu --data --json --out --device --dtype --model".split()),
    "eval": (evaluation.arguments, ["--task", "toy"], "--batch --n --seed --limit --threads "
             "--wrong --data --out --device --model --annotations --predictions".split()),
    "sample": (sample.arguments, ["--image", "x.png", "--q", "?"], "--temperature --top-p --seed "
               "--max-new-tokens --layers --heatmap --html --device --dtype --beside".split())}


def flags(rng: random.Random, folder: Path) -> str:
    """A command line. argparse itself ends with status 2."""
    arguments, argv, names = PROGRAMS[rng.choice(list(PROGRAMS))]
    argv = list(argv)
    for _ in range(rng.randint(1, 4)):
        argv += [rng.choice(names), rng.choice(VALUES)]

    def parse():
        try:
            arguments(argv)
        except SystemExit as e:
            assert e.code == 2, f"{argv}: status {e.code}"
            raise UserError("by argparse") from None

    return opened(parse)


def make_adapter(base: Path, out: Path) -> None:
    """LoRA, fuser and projector of a tiny model, as train.py writes them."""
    model = VLM.from_pretrained(tiny_model(base))
    lora.add(model.llm, 2, 4.0)
    identity = adapters.identity(base)
    held = dict(model.named_parameters())
    trained = [name for name in held if name.startswith(("fuser.", "projector.")) or "lora" in name]
    names = adapters.held_names(model, trained, identity)
    adapters.save(model, out, identity, {name: held[name] for name in names}, trained)


def adapter(rng: random.Random, folder: Path) -> str:
    """An adapter's folder, changed, for --adapter."""
    base, whole = folder.parent / "adapter-base", folder.parent / "whole-adapter"
    if not whole.exists():
        make_adapter(base, whole)
    out = shutil.copytree(whole, folder / "adapter")
    file = rng.choice(sorted(out.iterdir()))
    if rng.random() < 0.1:
        file.unlink()
    elif file.suffix == ".json" and rng.random() < 0.8:
        file.write_bytes(damaged_json(rng, json.loads(file.read_text())))
    else:
        file.write_bytes(spoil(rng, file.read_bytes()))
    return opened(lambda: adapters.load(base, out))


DOORS = dict(records=records, prepared=prepared, pickles=pickles, pictures=pictures_door,
             scoring=scoring, flags=flags, adapters=adapter)
