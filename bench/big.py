"""`python data.py prepare` on a json of LLaVA's size and shape: how long, how much memory?

    python tests/big.py --llm vicuna-7b-v1.5 --folder /tmp/big --n 665000

The records are invented: LLaVA's sources in their proportions, so many turns, so many words
(padding.MIX). So are the pictures: 64 JPEGs of 640 x 480, under as many names as LLaVA's have (hard
links), each shared by about two records. Nothing here is run by pytest.
"""
import argparse
import json
import os
import random
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from clip import open_image, preprocess  # noqa: E402
from training import (
    padding,
    prepare,  # noqa: E402
)

WORDS = (
    "the of and a to in is you that it he was for on are as with his they at be this have from or one had by word "
    "but not what all were we when your can said there use an each which she do how their if will up other about "
    "out many then them these so some her would make like him into time has look two more write go see number no "
    "way could people my than first water been call who its now find long down day did get come made may part "
    "picture red left bicycle umbrella standing behind table kitchen answer using single phrase"
).split()


def words(rng, ids):
    return " ".join(rng.choices(WORDS, k=max(1, round(ids * rng.lognormvariate(-0.125, 0.5)))))


def conversation(rng, picture, turns, question, answer):
    said = []
    for _ in range(rng.randint(*turns)):
        said += [{"from": "human", "value": words(rng, question)},
                 {"from": "gpt", "value": words(rng, answer)}]
    if picture:
        said[0]["value"] = "<image>\n" + said[0]["value"]
    return json.dumps(said)


def records(n, rng, shared=1.8):
    """n records of LLaVA's mix, shuffled, as text, with their pictures' paths: (text, path or
    None).

    A source has 1,000 conversations, again and again. A picture's number is below the source's
    records / shared.
    """
    sources = list(padding.MIX.values())
    total = sum(count for _, count, *_ in sources)
    texts = {
        source: [conversation(rng, source[0] is not None, *source[2:]) for _ in range(1000)]
        for source in sources}
    for i, source in enumerate(rng.choices(sources, [count for _, count, *_ in sources], k=n)):
        path = source[
            0] and f"{source[0]}/{rng.randrange(1 + int(source[1] * n / total / shared)):012}.jpg"
        image = f'"image": "{path}", ' if path else ""
        yield f'{{"id": "{i:012}", {image}"conversations": {rng.choice(texts[source])}}}', path


def picture(rng):
    """Noise of several widths, as detailed as a photograph: about 60 kB as a JPEG."""
    image = np.zeros((480, 640, 3), np.float32)
    for width in (4, 8, 16, 32, 64, 128, 256):
        noise = Image.fromarray(rng.integers(0, 256, (width * 3 // 4, width, 3), dtype=np.uint8))
        image += np.asarray(noise.resize((640, 480), Image.BICUBIC), np.float32) / width ** 0.5
    return Image.fromarray(((image - image.min()) / np.ptp(image) * 255).astype(np.uint8))


def invent(folder, n):
    rng, noise, names = random.Random(0), np.random.default_rng(0), set()
    (folder / "images").mkdir(parents=True)
    with open(folder / "data.json", "w") as file:
        for i, (text, path) in enumerate(records(n, rng)):
            file.write(("[" if i == 0 else ",\n ") + text)
            names |= {path} if path else set()
        file.write("]\n")
    for i in range(64):
        picture(noise).save(folder / "images" / f"{i}.jpg", quality=90)
    for parent in {os.path.dirname(name) for name in names}:
        (folder / "images" / parent).mkdir(parents=True, exist_ok=True)
    for i, name in enumerate(names):
        os.link(folder / "images" / f"{i % 64}.jpg", folder / "images" / name)


def family(pid):
    """A process and its descendants."""
    below = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid, *(q for p in below for q in family(int(p)))]


def memory(pid):
    """Bytes of the process and its descendants; pages that they share are counted once (PSS)."""
    total = 0
    for p in family(pid):
        for line in Path(f"/proc/{p}/smaps_rollup").read_text().splitlines():
            total += 1024 * int(line.split()[1]) if line.startswith("Pss:") else 0
    return total


def pictures(folder):
    """Processor time for a picture, on one core: what prepare does with it, and what a training
    does."""
    names = [f"{i}.jpg" for i in range(64)]
    for what, do in (("prepare", lambda name: prepare.look(folder, name, decode=False)),
                     ("prepare --decode", lambda name: prepare.look(folder, name, decode=True)),
                     ("decode in full", lambda name: open_image(folder / name)),
                     ("to 336 pixels, padded",
                      lambda name: preprocess(open_image(folder / name), 336, True))):
        do(names[0])
        tic = time.process_time()
        for name in names:
            do(name)
        each = (time.process_time() - tic) / len(names)
        print(f"{what:22} {1000 * each:6.2f} ms a picture of 640 x 480, {1 / each:6,.0f} a second")


def main():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--llm", required=True)
    p.add_argument("--folder", type=Path, required=True)
    p.add_argument("--n", type=int, default=665_000)
    p.add_argument("more", nargs="*", help="for data.py prepare, after --")
    args = p.parse_args()
    if not args.folder.exists():
        tic = time.perf_counter()
        invent(args.folder, args.n)
        size = os.path.getsize(args.folder / "data.json")
        print(f"invented in {time.perf_counter() - tic:.0f} s: {size / 1e6:,.0f} MB of json")
    torch.set_num_threads(1)
    pictures(args.folder / "images")
    tic, peak = time.perf_counter(), 0
    run = subprocess.Popen([
        sys.executable, "data.py", "prepare", "--json",
        str(args.folder / "data.json"), "--images",
        str(args.folder / "images"), "--out",
        str(args.folder / "prepared"), "--llm", args.llm, *args.more])
    while run.poll() is None:
        try:
            peak = max(peak, memory(run.pid))
        except (OSError, ValueError):        # one of them ended in the meantime
            pass
        time.sleep(0.5)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(
        f"{time.perf_counter() - tic:.0f} s, processor time {used.ru_utime + used.ru_stime:.0f} s, "
        f"peak memory of all processes together {peak / 1e9:.2f} GB")
    sys.exit(run.returncode)


if __name__ == "__main__":
    main()
