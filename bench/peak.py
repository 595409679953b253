"""What `train.py --plan` says about memory, beside what processes on this CPU really take.

    MALLOC_MMAP_THRESHOLD_=65536 MALLOC_TRIM_THRESHOLD_=65536 \\
        torchrun --nproc_per_node=2 -m bench.peak --shard full

Rows and weights are invented: 190 million random parameters, rows all as long as they may be. The
code is train.py's and training/sharding.py's; the model is plain, as the plan takes it, not
prepared for a CPU. Measured is how far the resident memory rises above what it was before the model
was made, while it is shared out and during two steps. (The two settings make malloc give freed
memory back; without, it is much more.) tests/training/test_plan.py runs this when asked for `-m
big`: it takes about 3 GB for each of two processes.
"""
import argparse
import ctypes
import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

import data
import train
from ccra import VLM, CCRAConfig
from clip import CLIPVision, CLIPVisionConfig
from core import distributed, flags
from core.common import UserError, run
from core.tokenizer import IGNORE, IMAGE_TOKEN
from core.weights import skeleton
from llama import Llama, LlamaConfig
from training import plan, setup, sharding


def build(recompute: bool) -> VLM:
    """A VLM without numbers, as train.py prepares it for sharing."""
    with skeleton():
        vision = CLIPVision(CLIPVisionConfig(image_size=112, hidden_size=256,
                                             intermediate_size=1024, num_hidden_layers=6,
                                             num_attention_heads=4))
        llm = Llama(LlamaConfig(vocab_size=16000, hidden_size=1024, intermediate_size=2816,
                                num_hidden_layers=12, num_attention_heads=16, rms_norm_eps=1e-5,
                                max_position_embeddings=2048))
        model = VLM.build(vision, llm, CCRAConfig(text_dim=1024, vision_dim=256, n_layers=6))
    train.save_precision(train.freeze(model, 2), model, torch.bfloat16)
    if recompute:
        setup.recompute(model)
    return model


def memory(what: str) -> int:
    """VmRSS: bytes resident now; VmHWM: at the most, since /proc/self/clear_refs was told 5."""
    lines = Path("/proc/self/status").read_text().splitlines()
    [line] = [line for line in lines if line.startswith(what + ":")]
    return int(line.split()[1]) * 1024


def invent(model: VLM, micro: int, max_length: int) -> dict[str, torch.Tensor]:
    """A batch of rows of max_length positions with a picture, a quarter of which is supervised."""
    size = model.vision.config.image_size
    length, kept = max_length - model.vision.grid ** 2 + 1, max_length // 4
    rows = []
    for ids in torch.randint(3, 16000, (micro, length)).tolist():
        ids[:2] = [1, IMAGE_TOKEN]
        sample = data.Sample(ids, [IGNORE] * (length - kept) + ids[-kept:], [ids[2:66]])
        rows.append(data.item(sample, torch.rand(3, size, size)))
    return data.make_batch(rows)


def steps(model: VLM, args: argparse.Namespace, n: int = 2) -> None:
    """n training steps. From the second one on AdamW's moments are there while activations are."""
    cpu = torch.device("cpu")
    shared = sharding.share(model, "fsdp", cpu, torch.bfloat16, args.shard == "grad",
                            sharding.layout(cpu))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5)
    for _ in range(n):
        batch = invent(model, args.micro, args.max_length)
        loss = train.train_step(shared, [batch], cpu, torch.bfloat16)
        torch.nn.utils.get_total_norm([p.grad for p in trained])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        assert 0 < loss < 20


def main() -> None:
    p = flags.Parser(prog="python -m bench.peak", description=__doc__)
    p.add_argument("--shard", choices=("full", "grad"), default="full")
    p.add_argument("--recompute", action=argparse.BooleanOptionalAction, default=True)
    p.add_argument("--micro", type=flags.batch, default=8)
    p.add_argument("--max-length", type=flags.whole(1, 1 << 20), default=512)
    args = p.parse_args()
    if not sys.platform.startswith("linux"):
        raise UserError("bench.peak reads the memory of processes from /proc, which is Linux's")
    rank, args.gpus, _ = distributed.join("cpu", threads=1)
    args.parallel = "fsdp"
    before = memory("VmRSS")
    model = build(args.recompute).to_empty(device="cpu")
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
        kinds = plan.measure(build(args.recompute), args, args.micro)
        print(json.dumps(dict(predicted=kinds["total"], measured=max(peaks), kinds=kinds,
                              peaks=peaks)))


if __name__ == "__main__":
    run(main)
