"""What `train.py --plan` says about memory, beside what processes on this CPU really take.

    MALLOC_MMAP_THRESHOLD_=65536 MALLOC_TRIM_THRESHOLD_=65536 torchrun --nproc_per_node=2 tests/peak.py --shard full

Rows and weights are invented: 190 million random parameters, rows all as long as they may be. The
code is train.py's and parallel.py's. Measured is how far the resident memory rises above what it
was before the model was made, while it is shared out and during two steps. (The two settings make
malloc give freed memory back; without, it is much more.) tests/test_plan.py runs this if
NANOCCRA_BIG is set: it takes about 3 GB for each of two processes.
"""
import argparse
import ctypes
import json
from pathlib import Path

import torch
import torch.distributed as dist

import clip  # noqa: E402
import data  # noqa: E402
import train  # noqa: E402
from ccra import VLM, CCRAConfig  # noqa: E402
from clip import CLIPVision, CLIPVisionConfig  # noqa: E402
from core import distributed
from core.weights import skeleton
from data import IGNORE, IMAGE_TOKEN
from fast import linear  # noqa: E402
from llama import Llama, LlamaConfig
from training import (
    plan,  # noqa: E402
    sharding,
)


def build(args):
    """A VLM without numbers, as train.py prepares it for sharing."""
    with skeleton():
        vision = CLIPVision(
            CLIPVisionConfig(image_size=112, hidden_size=256, intermediate_size=1024,
                             num_hidden_layers=6, num_attention_heads=4))
        llm = Llama(
            LlamaConfig(vocab_size=16000, hidden_size=1024, intermediate_size=2816,
                        num_hidden_layers=12, num_attention_heads=16, rms_norm_eps=1e-5,
                        max_position_embeddings=2048))
        model = VLM.build(vision, llm, CCRAConfig(text_dim=1024, vision_dim=256, n_layers=6))
    train.save_precision(train.freeze(model, 2), model, torch.bfloat16)
    if args.recompute:
        train.recompute(model)
    return model


def memory(what: str) -> int:
    """VmRSS: bytes resident now; VmHWM: at the most, since /proc/self/clear_refs was told 5."""
    [line] = [line for line in open("/proc/self/status") if line.startswith(what + ":")]
    return int(line.split()[1]) * 1024


def steps(model, args, n=2):
    """n training steps on rows of args.max_length positions with a picture, a quarter of which is
    supervised. From the second one on AdamW's moments are there while activations are."""
    shared = sharding.share(model, "fsdp", torch.device("cpu"), torch.bfloat16,
                            args.shard == "grad", sharding.layout(torch.device("cpu")))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5)
    length, size = args.max_length - model.vision.grid ** 2 + 1, model.vision.config.image_size
    for _ in range(n):
        ids = torch.randint(3, 16000, (args.micro, length)).tolist()
        rows = [
            dict(ids=[1, IMAGE_TOKEN, *row[2:]], query=row[2:66], pixels=torch.rand(3, size, size),
                 labels=[IGNORE] * (length - args.max_length // 4) + row[-(args.max_length // 4):])
            for row in ids]
        loss = train.train_step(shared, [data.collate(rows)], torch.device("cpu"), torch.bfloat16)
        torch.nn.utils.get_total_norm([p.grad for p in trained])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        assert 0 < loss < 20


def main():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--shard", choices=("full", "grad"), default="full")
    p.add_argument("--recompute", action=argparse.BooleanOptionalAction, default=True)
    p.add_argument("--micro", type=int, default=8)
    p.add_argument("--max-length", type=int, default=512)
    args = p.parse_args()
    # the ways that a GPU takes, as in plan.measure
    clip.WRITE_OUT, clip.SLOW, linear.SLOW = set(), set(), set()
    rank, args.gpus, _ = distributed.join("cpu", threads=1)
    args.parallel = "fsdp"
    before = memory("VmRSS")
    model = build(args).to_empty(device="cpu")
    for p in model.parameters():
        p.data.normal_(std=0.02)
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    steps(model, args)
    measured = memory("VmHWM") - before
    peaks = [None] * args.gpus
    dist.all_gather_object(peaks, measured)
    distributed.leave()
    if rank == 0:
        kinds = plan.measure(build(args), args, args.micro)
        print(
            json.dumps(dict(predicted=kinds["total"], measured=max(peaks), kinds=kinds,
                            peaks=peaks)))


if __name__ == "__main__":
    main()
