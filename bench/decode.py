"""What a token takes on a GPU once its work is recorded (fast/graph.py), and which kernels that is.

    python -m bench.decode

Random weights of Vicuna-7B's shape in bfloat16, a prompt of 627 positions. Answers of several
lengths are timed, so that what comes once (reading the prompt, recording) falls out of the
difference.
"""
import time

import torch
from torch import Tensor

import fast
from core import flags
from core.common import run
from core.weights import skeleton
from llama import Llama, LlamaConfig

VICUNA = LlamaConfig(32000, 4096, 11008, 32, 32, rms_norm_eps=1e-5, max_position_embeddings=4096)


def invented() -> Llama:
    """Vicuna-7B's shape with random weights, on the GPU."""
    with skeleton():
        model = Llama(VICUNA)
    model = model.bfloat16().to_empty(device="cuda").eval().requires_grad_(False)
    for p in model.parameters():
        if p.ndim > 1:
            p.normal_(std=0.02)
        else:
            p.fill_(1)
    return fast.prepare(model)


def seconds(model: Llama, prompt: Tensor, n: int) -> float:
    """What an answer of n tokens to a prompt (1, T, D) takes."""
    start = time.perf_counter()
    for _ in model.generate(prompt, max_new_tokens=n):
        pass
    torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    p = flags.Parser(prog="python -m bench.decode", description=__doc__)
    p.parse_args()
    model = invented()
    prompt = model.embed(torch.randint(3, 32000, (1, 627), device="cuda"))
    seconds(model, prompt, 16)
    took = {n: seconds(model, prompt, n) for n in (6, 8, 40, 104)}
    print("; ".join(f"{n} tokens {s:.3f} s" for n, s in took.items()))
    each = (took[104] - took[40]) / 64
    print(f"{torch.cuda.get_device_name()}: a replayed token takes {each * 1000:.2f} ms")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as kernels:
        seconds(model, prompt, 38)
    print(kernels.key_averages().table(sort_by="cuda_time_total", row_limit=24))


if __name__ == "__main__":
    run(main)
