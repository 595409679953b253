"""A json of records about pictures, prepared: what the tests of `data.py prepare` share."""
import json
import os
import random

import torch
from PIL import Image

from toy import world as toy
from training.prepare import prepare

LLM = toy.MODEL                          # for its tokenizer


def record(*texts, **more):
    """A record in which human and gpt say these in turns."""
    said = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]
    return {"id": "r", **more, "conversations": said}


def random_text(rng):
    words = ["a", "cat", "red", "12", "\n", "é", "日本", "🙂", "</s>", "?"]
    return " ".join(rng.choices(words, k=rng.randint(1, 12)))


def random_record(rng, i, pictures):
    """A conversation with a picture first, later or not at all."""
    texts = [random_text(rng) + "." for _ in range(2 * rng.randint(1, 4))]
    if rng.random() < 0.2:
        return record(*texts, id=f"{i}é")
    at = 2 * rng.randrange(len(texts) // 2)
    texts[at] = "<image>\n" + texts[at]
    return record(*texts, id=i, image=rng.choice(pictures))


def noise(path, size=(60, 40), **how):
    """A picture's file."""
    Image.effect_noise(size, 90).convert("RGB").save(path, **how)


def make_world(folder):
    """300 records (reading.CHUNK and some), four of which can't be learnt from, about five
    pictures. Returns the folder."""
    rng, images = random.Random(5), folder / "images"
    (images / "coco").mkdir(parents=True)
    names = ["coco/a.jpg", "coco/b.png", "c.jpg", "coco/../c.jpg", "coco/d.gif"]
    for name in {os.path.normpath(name) for name in names}:
        noise(images / name)
    records = [random_record(rng, i, names) for i in range(300)]
    records[17] = record("a", "")
    records[18] = record("<image>", "b", "c", image=names[0])
    records[290] = record("", "b")
    records[299] = record("<image>", " ", image=names[1])
    (folder / "x.json").write_text(json.dumps(records, ensure_ascii=False))
    return folder


def make(world, out="out", json_name="x.json", **more):
    """Prepare world/out. Returns what was said."""
    said = []
    prepare(world / json_name, world / "images", world / out, LLM, say=said.append,
            **{"tolerate": 0.5, **more})
    return said


def same_items(one, other):
    """Whether two data sets are the same, item by item."""
    assert len(one) == len(other)
    for i in range(len(one)):
        assert one.record_id(i) == other.record_id(i) and one.sample(i) == other.sample(i)
        a, b = one[i], other[i]
        assert a.keys() == b.keys() and torch.equal(a["pixels"], b["pixels"])
        assert all(a[key] == b[key] for key in a if key != "pixels")
