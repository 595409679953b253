"""What tests of training share: samples, a json of records, and how to read what a run wrote."""
import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

import data
from clip import preprocess
from toy import questions
from toy import world as toy


def uneven_samples(tokenizer, size: int = 32) -> list[dict]:
    """8 samples, two of them text only, with answers of 1 to 43 words."""
    samples = []
    for i in range(8):
        image = "x" if i % 4 else ""
        record = questions.record([("Describe.", "yes " * (1 + 6 * i))], image=image)
        pixels = torch.zeros(3, size, size)
        if image:
            pixels = preprocess(toy.draw(toy.make_scene(f"cut/{i}")), size, pad=True)
        samples.append(data.item(data.render(record, tokenizer, "v1"), pixels))
    return samples


def mixed_json(folder: Path, n: int = 22) -> list[str]:
    """A LLaVA json that mixes text-only and picture samples with answers of very different lengths,
    as train.py's flags."""
    records = []
    for i in range(n):
        said = [{"from": "human", "value": "Describe."},
                {"from": "gpt", "value": "yes " * (1 + 3 * (i % 7))}]
        record = {"id": i, "conversations": said}
        if i % 3:
            toy.draw(toy.make_scene(f"mixed/{i}")).save(folder / f"{i}.png")
            said[0]["value"] = "<image>\n" + said[0]["value"]
            record["image"] = f"{i}.png"
        records.append(record)
    (folder / "data.json").write_text(json.dumps(records))
    return ["--json", str(folder / "data.json"), "--images", str(folder)]


def parameters(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def same_parameters(one: Path, other: Path) -> bool:
    """To the last bit."""
    ours, theirs = parameters(one), parameters(other)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def log_of(folder: Path) -> list[list[float]]:
    """log.csv as rows of step, loss, lr, norm; what comes behind are times, and memory."""
    rows = (folder / "log.csv").read_text().splitlines()[1:]
    return [[float(x) for x in row.split(",")[:4]] for row in rows]
