"""Write a model of random weights at LLaVA-1.5-7B's real size, in the layout of
llava-hf/llava-1.5-7b-hf.

    python -m bench.make_llava --out out/llava-random                14.1 GB, to measure a 7B model
    python -m bench.make_llava --out out/llava-random --layers 4     the same widths, fewer layers

Tensor after tensor goes straight into its file, so this needs the memory of one (0.5 GB in all).
Weights are N(0, 0.02), norms 1 and biases 0, so that activations and logits stay finite in
bfloat16. The answers are nonsense.
"""
import argparse
import json
import math
import shutil
import sys
from pathlib import Path

import torch
from tqdm import tqdm

from ccra import VLM
from clip import CLIPVision, CLIPVisionConfig
from core import flags
from core.common import run, write_json
from core.layouts import llava_hf_name
from core.weights import INDEX, skeleton
from fusers.llava import LLaVAConfig
from llama import Llama, LlamaConfig

DTYPES = {"bfloat16": (torch.bfloat16, "BF16"), "float16": (torch.float16, "F16"),
          "float32": (torch.float32, "F32")}
STORED = 32064                              # rows of the vocabulary with <image>, <pad> and padding


def shapes(layers: int) -> dict[str, tuple[int, ...]]:
    """{public name: shape}, in the order of the hub's files: vision tower, projector, language
    model."""
    with skeleton():
        llm = LlamaConfig(STORED, 4096, 11008, layers, 32, rms_norm_eps=1e-5,
                          max_position_embeddings=4096)
        model = VLM.build(CLIPVision(CLIPVisionConfig()), Llama(llm), LLaVAConfig())
    order = ("vision.", "projector.", "llm.")
    return {llava_hf_name(name): tuple(p.shape) for part in order
            for name, p in model.named_parameters() if name.startswith(part)}


def config(layers: int, dtype: str) -> dict:
    """The hub's, which leaves out the language model's sizes where they are LLaMA-7B's."""
    text = {"max_position_embeddings": 4096, "model_type": "llama", "rms_norm_eps": 1e-5,
            "vocab_size": STORED}
    if layers != 32:
        text["num_hidden_layers"] = layers
    vision = {"hidden_size": 1024, "image_size": 336, "intermediate_size": 4096,
              "model_type": "clip_vision_model", "num_attention_heads": 16,
              "num_hidden_layers": 24, "patch_size": 14, "projection_dim": 768}
    return {"architectures": ["LlavaForConditionalGeneration"], "model_type": "llava",
            "image_token_index": 32000, "pad_token_id": 32001, "projector_hidden_act": "gelu",
            "vision_feature_layer": -2, "vision_feature_select_strategy": "default",
            "vision_config": vision, "text_config": text, "torch_dtype": dtype}


def values(name: str, shape: tuple[int, ...], dtype: torch.dtype, device: str) -> torch.Tensor:
    """A tensor's numbers, by its public name, on the CPU."""
    if "norm" in name and name.endswith("weight"):
        return torch.ones(shape, dtype=dtype)
    if name.endswith("bias"):
        return torch.zeros(shape, dtype=dtype)
    return torch.empty(shape, dtype=dtype, device=device).normal_(std=0.02).cpu()


def write_shard(path: Path, names: list[str], sizes: dict, dtype: torch.dtype, label: str,
                device: str, bar) -> None:
    """A safetensors file: the header's length in 8 bytes, a table in JSON, then the tensors' bytes,
    one by one."""
    table, at = {"__metadata__": {"format": "pt"}}, 0
    for name in names:
        end = at + math.prod(sizes[name]) * dtype.itemsize
        table[name] = {"dtype": label, "shape": sizes[name], "data_offsets": [at, end]}
        at = end
    header = json.dumps(table).encode()
    header += b" " * (-len(header) % 8)            # the tensors have to be aligned
    with open(path, "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for name in names:
            tensor = values(name, sizes[name], dtype, device)
            file.write(tensor.flatten().view(torch.uint8).numpy().data)
            bar.update(tensor.nbytes)


def shared_out(sizes: dict, shards: int) -> list[list[str]]:
    """The names of each file's tensors: cut where a part of the whole is full."""
    total, at = sum(map(math.prod, sizes.values())), 0
    names = [[] for _ in range(shards)]
    for name, shape in sizes.items():
        names[min(shards - 1, at * shards // total)].append(name)
        at += math.prod(shape)
    return names


def arguments() -> argparse.Namespace:
    p = flags.Parser(prog="python -m bench.make_llava", description=__doc__)
    p.add_argument("--out", type=Path, required=True, help="the folder to write")
    p.add_argument("--layers", type=flags.whole(1, 1000), default=32,
                   help="of the language model (default: %(default)s)")
    p.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    p.add_argument("--shards", type=flags.whole(1, 1000), default=3,
                   help="files (default: %(default)s, as on the hub)")
    p.add_argument("--tokenizer", type=Path,
                   help="a tokenizer.model of Llama 2 to put beside it; sample.py needs one")
    p.add_argument("--seed", type=flags.seed, default=0)
    p.add_argument("--device", default="cpu",
                   help="that draws the numbers; a GPU draws others, faster")
    return p.parse_args()


def main() -> None:
    args = arguments()
    torch.manual_seed(args.seed)
    sizes = shapes(args.layers)
    dtype, label = DTYPES[args.dtype]
    args.out.mkdir(parents=True, exist_ok=True)
    total = sum(map(math.prod, sizes.values())) * dtype.itemsize
    files = [f"model-{i:05d}-of-{args.shards:05d}.safetensors" for i in range(1, args.shards + 1)]
    shards = dict(zip(files, shared_out(sizes, args.shards)))
    with tqdm(total=total, unit="B", unit_scale=True, file=sys.stderr) as bar:
        for file, names in shards.items():
            write_shard(args.out / file, names, sizes, dtype, label, args.device, bar)
    where = {name: file for file, names in shards.items() for name in names}
    write_json(args.out / INDEX, {"metadata": {"total_size": total}, "weight_map": where})
    write_json(args.out / "config.json", config(args.layers, args.dtype))
    if args.tokenizer:
        shutil.copyfile(args.tokenizer, args.out / "tokenizer.model")
    print(f"{args.out}: {len(sizes)} tensors, {total:,} bytes")


if __name__ == "__main__":
    run(main)
