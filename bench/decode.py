"""What a token takes on a GPU once its work is recorded (replay.py), and which kernels that is.

    python tests/decode.py

Random weights of Vicuna-7B's shape in bfloat16, a prompt of 627 positions. Answers of several
lengths are timed, so that what comes once (reading the prompt, recording) falls out of the
difference.
"""
import time

import torch

from core.weights import skeleton
from llama import Llama, LlamaConfig


def main():
    with skeleton():
        model = Llama(
            LlamaConfig(32000, 4096, 11008, 32, 32, rms_norm_eps=1e-5,
                        max_position_embeddings=4096))
    model = model.bfloat16().to_empty(device="cuda").eval().requires_grad_(False)
    for p in model.parameters():
        p.normal_(std=0.02) if p.ndim > 1 else p.fill_(1)
    prompt = model.embed(torch.randint(3, 32000, (1, 627), device="cuda"))

    def seconds(n):
        start = time.perf_counter()
        for _ in model.generate(prompt, max_new_tokens=n):
            pass
        torch.cuda.synchronize()
        return time.perf_counter() - start

    seconds(16)
    took = {n: seconds(n) for n in (6, 8, 40, 104)}
    print("; ".join(f"{n} tokens {s:.3f} s" for n, s in took.items()))
    print(
        f"{torch.cuda.get_device_name()}: a replayed token takes {(took[104] - took[40]) / 64 * 1000:.2f} ms"
    )
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as kernels:
        seconds(38)
    print(kernels.key_averages().table(sort_by="cuda_time_total", row_limit=24))


if __name__ == "__main__":
    main()
