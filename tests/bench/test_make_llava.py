"""bench/make_llava.py: a random LLaVA of the real layout and size."""
import math
import sys

import torch

from bench import make_llava
from core.layouts import Folder


def test_the_real_sizes():
    """What the hub's index files say: tensors and bytes of llava-hf/llava-1.5-7b-hf and of
    liuhaotian/llava-v1.5-7b."""
    sizes = make_llava.shapes(32)
    assert (len(sizes), 2 * sum(map(math.prod, sizes.values()))) == (686, 14_126_854_144)
    llm = sum(math.prod(shape) for name, shape in sizes.items()
              if not name.startswith("vision_tower"))
    extra = 2 * 64 * 4096                    # rows of the vocabulary; and 32 inv_freq of 64 float32
    assert 2 * (llm - extra) + 32 * 64 * 4 == 13_518_798_848


def test_the_random_llava_has_the_layout(tmp_path, monkeypatch):
    """The program, with sizes cut."""
    sizes = {name: tuple(min(n, 8) for n in shape) for name, shape in make_llava.shapes(2).items()}
    monkeypatch.setattr(make_llava, "shapes", lambda layers: sizes)
    monkeypatch.setattr(sys, "argv", ["make_llava", "--out", str(tmp_path), "--layers", "2"])
    make_llava.main()
    folder = Folder(tmp_path)
    tensors, llm = folder.tensors, folder.parts["llm"]
    assert {name: tensors.shape(name) for name in tensors} == sizes and len(tensors.handles) == 3
    assert all(t.dtype == torch.bfloat16 and t.isfinite().all() for t in tensors.values())
    assert (llm["num_hidden_layers"], llm["vocab_size"]) == (2, 32000)
    table = tensors["vision_tower.vision_model.embeddings.position_embedding.weight"]
    assert 0.005 < table.float().std() < 0.04
    assert tensors["language_model.model.norm.weight"].eq(1).all()
