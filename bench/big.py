"""`python data.py prepare` on a json of LLaVA's size and shape: how long, how much memory?

    python -m bench.big --llm vicuna-7b-v1.5 --folder /tmp/big

The records are invented: LLaVA's sources in their proportions, so many turns, so many words. So are
the pictures: 64 JPEGs of 640 x 480, under as many names as LLaVA's have (hard links), each shared
by about two records. What has been invented stays in the folder for the next time.
"""
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from clip import open_image, preprocess
from core import flags
from core.common import ROOT, UserError, run
from training import reading

# LLaVA's mix of 665,298: records by source, and what we take their turns and the ids of a question
# and of an answer to be like. The numbers of records are its authors'; the rest is assumed.
MIX = {     # folder, records, turns from-to, ids of a question, ids of an answer
    "LLaVA": ("coco/train2017", 157_712, (1, 5), 15, 60),
    "ShareGPT": (None, 40_688, (1, 6), 60, 300),
    "VQAv2": ("coco/train2017", 82_783, (1, 9), 8, 3),
    "GQA": ("gqa/images", 72_140, (1, 25), 10, 3),
    "OKVQA": ("coco/train2017", 8_998, (1, 1), 25, 3),
    "OCRVQA": ("ocr_vqa/images", 80_000, (3, 6), 12, 8),
    "A-OKVQA": ("coco/train2017", 66_160, (1, 2), 60, 3),
    "TextCaps": ("textvqa/train_images", 21_953, (1, 1), 60, 15),
    "RefCOCO": ("coco/train2017", 48_447, (1, 8), 30, 25),
    "VG": ("vg/VG_100K", 86_417, (5, 15), 30, 15)}
WORDS = (
    "the of and a to in is you that it he was for on are as with his they at be this have from or "
    "one had by word but not what all were we when your can said there use an each which she do "
    "how their if will up other about out many then them these so some her would make like him "
    "into time has look two more write go see number no way could people my than first water been "
    "call who its now find long down day did get come made may part picture red left bicycle "
    "umbrella standing behind table kitchen answer using single phrase").split()


def words(rng: random.Random, ids: int) -> str:
    """About `ids` words, log-normally distributed."""
    return " ".join(rng.choices(WORDS, k=max(1, round(ids * rng.lognormvariate(-0.125, 0.5)))))


def conversation(rng: random.Random, picture: bool, turns: tuple[int, int], question: int,
                 answer: int) -> str:
    """The json of a conversation. turns: from-to; question, answer: ids of one, about."""
    said = []
    for _ in range(rng.randint(*turns)):
        said += [{"from": "human", "value": words(rng, question)},
                 {"from": "gpt", "value": words(rng, answer)}]
    if picture:
        said[0]["value"] = "<image>\n" + said[0]["value"]
    return json.dumps(said)


def invented(n: int, rng: random.Random, shared: float = 1.8) -> Iterator[tuple[str, str | None]]:
    """n records of LLaVA's mix, shuffled: (json, path of the picture or None).

    A source has 1,000 conversations, again and again. A picture's number is below the source's
    records / shared.
    """
    sources = list(MIX.values())
    counts = [count for _, count, *_ in sources]
    texts = {source: [conversation(rng, source[0] is not None, *source[2:]) for _ in range(1000)]
             for source in sources}
    for i, source in enumerate(rng.choices(sources, counts, k=n)):
        folder, count, *_ = source
        path = image = ""
        if folder is not None:
            path = f"{folder}/{rng.randrange(1 + int(count * n / sum(counts) / shared)):012}.jpg"
            image = f'"image": "{path}", '
        text = f'{{"id": "{i:012}", {image}"conversations": {rng.choice(texts[source])}}}'
        yield text, path or None


def picture(rng: np.random.Generator) -> Image.Image:
    """Noise of several widths, as detailed as a photograph: about 60 kB as a JPEG."""
    image = np.zeros((480, 640, 3), np.float32)
    for width in (4, 8, 16, 32, 64, 128, 256):
        noise = Image.fromarray(rng.integers(0, 256, (width * 3 // 4, width, 3), dtype=np.uint8))
        image += np.asarray(noise.resize((640, 480), Image.BICUBIC), np.float32) / width ** 0.5
    return Image.fromarray(((image - image.min()) / np.ptp(image) * 255).astype(np.uint8))


def invent(folder: Path, n: int) -> None:
    """Write folder/data.json and folder/images."""
    names = set()
    (folder / "images").mkdir(parents=True)
    with open(folder / "data.json", "w") as file:
        for i, (text, path) in enumerate(invented(n, random.Random(0))):
            file.write(("[" if i == 0 else ",\n ") + text)
            names |= {path} if path else set()
        file.write("]\n")
    noise = np.random.default_rng(0)
    for i in range(64):
        picture(noise).save(folder / "images" / f"{i}.jpg", quality=90)
    for parent in {os.path.dirname(name) for name in names}:
        (folder / "images" / parent).mkdir(parents=True, exist_ok=True)
    for i, name in enumerate(names):
        os.link(folder / "images" / f"{i % 64}.jpg", folder / "images" / name)


def family(pid: int) -> list[int]:
    """A process and its descendants."""
    below = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid, *(q for p in below for q in family(int(p)))]


def memory(pid: int) -> int:
    """Bytes of the process and its descendants; pages that they share are counted once (PSS)."""
    total = 0
    for p in family(pid):
        for line in Path(f"/proc/{p}/smaps_rollup").read_text().splitlines():
            total += 1024 * int(line.split()[1]) if line.startswith("Pss:") else 0
    return total


def look_at_pictures(folder: Path) -> None:
    """Print the processor time of a picture, on one core: what prepare does with it, and what a
    training does."""
    names = [f"{i}.jpg" for i in range(64)]
    for what, do in (("prepare", lambda name: reading.look(folder, name, decode=False)),
                     ("prepare --decode", lambda name: reading.look(folder, name, decode=True)),
                     ("decode in full", lambda name: open_image(folder / name)),
                     ("to 336 pixels, padded",
                      lambda name: preprocess(open_image(folder / name), 336, True))):
        do(names[0])
        tic = time.process_time()
        for name in names:
            do(name)
        each = (time.process_time() - tic) / len(names)
        print(f"{what:22} {1000 * each:6.2f} ms a picture of 640 x 480, {1 / each:6,.0f} a second")


def main() -> None:
    p = flags.Parser(prog="python -m bench.big", description=__doc__)
    p.add_argument("--llm", required=True, help="a language model's folder: its tokenizer")
    p.add_argument("--folder", type=Path, required=True, help="for the json and the pictures")
    p.add_argument("--n", type=flags.whole(1, flags.MANY), default=665_000,
                   help="records (default: %(default)s)")
    p.add_argument("more", nargs="*", help="for data.py prepare, after --")
    args = p.parse_args()
    if not sys.platform.startswith("linux"):
        raise UserError("bench.big reads the memory of processes from /proc, which is Linux's")
    if not args.folder.exists():
        tic = time.perf_counter()
        invent(args.folder, args.n)
        size = os.path.getsize(args.folder / "data.json")
        print(f"invented in {time.perf_counter() - tic:.0f} s: {size / 1e6:,.0f} MB of json")
    torch.set_num_threads(1)
    look_at_pictures(args.folder / "images")
    command = [sys.executable, ROOT / "data.py", "prepare", "--json", args.folder / "data.json",
               "--images", args.folder / "images", "--out", args.folder / "prepared",
               "--llm", args.llm, *args.more]
    tic = time.perf_counter()
    prepare = subprocess.Popen(list(map(str, command)))
    peak = 0
    while prepare.poll() is None:
        try:
            peak = max(peak, memory(prepare.pid))
        except (OSError, ValueError):        # one of them ended in the meantime
            pass
        time.sleep(0.5)
    import resource  # Windows, which has none, doesn't come this far
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(f"{time.perf_counter() - tic:.0f} s, processor time "
          f"{used.ru_utime + used.ru_stime:.0f} s, peak memory of all processes together "
          f"{peak / 1e9:.2f} GB")
    sys.exit(prepare.returncode)


if __name__ == "__main__":
    run(main)
