"""Ask a picture a question.

    python sample.py --image assets/scene.png --q "How many cats are there?"

The answer, and nothing else, goes to stdout as it is written; times go to stderr. The default model is the embedded one
(toy.py), which knows a small world of drawn objects; --model takes any folder that train.py wrote.
"""
import argparse
import sys
import time

import torch

import toy
from ccra import VLM
from clip import open_image, preprocess
from data import collate, prompt
from llama import Tokenizer
from weights import UserError, pick_device, read_config, run


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--image", required=True, help="a picture file")
    p.add_argument("--q", required=True, help="the question")
    p.add_argument("--model", default=toy.MODEL, help="a model folder (default: the embedded model)")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, mps")
    p.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token each time")
    p.add_argument("--top-p", type=float, default=1.0, help="draw among the likeliest tokens of this total probability")
    p.add_argument("--max-new-tokens", type=int, default=128)
    p.add_argument("--seed", type=int, default=0, help="for temperatures above 0")
    args = p.parse_args(argv)
    if args.temperature < 0 or not 0 < args.top_p <= 1 or args.max_new_tokens < 1:
        raise UserError("--temperature must be 0 or more, --top-p in (0, 1], --max-new-tokens 1 or more")
    started = time.perf_counter()
    image = open_image(args.image)                          # before the model: a wrong path should fail at once
    device = pick_device(args.device)
    model = VLM.from_pretrained(args.model, dtype=torch.float32 if device.type == "cpu" else None, device=device).eval()
    tokenizer = Tokenizer.from_pretrained(args.model)
    row = prompt([(args.q, None)], tokenizer)
    batch = collate([dict(ids=row.ids, labels=row.labels, query=row.query,
                          pixels=preprocess(image, model.vision.config.image_size, pad=True))])
    batch = {k: v.to(device) for k, v in batch.items() if k != "labels"}
    if read_config(args.model).get("world") == "toy" and not toy.knows(image):
        print(f"note: {toy.KNOWS}", file=sys.stderr)
    stream(model, tokenizer, batch, args, started)


def stream(model, tokenizer, batch, args, started):
    """Write the answer while it is being made, then the times. started: perf_counter when the program began."""
    times = []

    def ids():
        generator = torch.Generator(batch["ids"].device).manual_seed(args.seed)
        for token in model.generate(**batch, max_new_tokens=args.max_new_tokens, temperature=args.temperature,
                                    top_p=args.top_p, eos_ids=tokenizer.eos_ids, generator=generator):
            times.append(time.perf_counter())
            yield int(token[0])

    began = time.perf_counter()
    for piece in tokenizer.stream(ids()):
        print(piece, end="", flush=True)
    print(flush=True)
    if times:
        rate = f", then {(len(times) - 1) / (times[-1] - times[0]):.1f} tokens/s" if len(times) > 1 else ""
        print(f"[first token after {times[0] - began:.3f} s ({times[0] - started:.2f} s with loading), "
              f"{len(times)} tokens{rate}]", file=sys.stderr)


if __name__ == "__main__":
    run(main)
