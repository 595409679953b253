"""Meta's own downloads of Llama: params.json, consolidated.00.pth, consolidated.01.pth, ...

`Meta` is such a folder as core/weights.py's `Tensors` are: by name, whole, mapped where there is
nothing to put together, with the rows of queries and keys in the order of Hugging Face. What
params.json doesn't say, the tensors tell.
"""
from pathlib import Path
from typing import Annotated

import torch
from torch import Tensor

from core import weights
from core.common import UserError
from core.fields import Count, Depth, Epsilon, Heads, Range, Scale, Vocabulary, Width, check
from core.folders import present
from core.weights import Tensors

EMBED, HEAD = "tok_embeddings.weight", "output.weight"
QUERIES = "layers.0.attention.wq.weight"
# What params.json says. Other keys are about training.
PARAMS = {"dim": Width, "n_layers": Depth, "n_heads": Heads, "n_kv_heads": Heads | None,
          "multiple_of": Count,                         # of which the width of the MLPs is one
          "ffn_dim_multiplier": Scale | None, "norm_eps": Epsilon,
          "vocab_size": Vocabulary | Annotated[int, Range(-1, -1)] | None,   # -1: the tokenizer's
          "rope_theta": Scale | None, "use_scaled_rope": bool | None,
          "rope_scaling_factor": Scale | None}
# How matrices are cut in files for several GPUs: by rows or, where the input is cut, by columns.
# The rest is whole.
CUTS = {"wq": 0, "wk": 0, "wv": 0, "w1": 0, "w3": 0, "output": 0, "wo": 1, "w2": 1}


def half_split(weight: Tensor, heads: int) -> Tensor:
    """Meta's wq or wk, (heads * hd, D), with the rows of each head in Hugging Face's order.

    RoPE turns pairs of channels: Meta's are neighbours (2j, 2j + 1), Hugging Face's, and
    llama.py's, (j, j + hd/2).
    """
    pairs = weight.unflatten(0, (heads, -1, 2))          # (heads, hd/2, 2, D)
    return pairs.transpose(1, 2).flatten(0, 2)


class Meta(Tensors):
    """Meta's files: every one has every name, and holds a slice of most; `self[name]` is whole.

    .llama: what params.json amounts to as a public Llama config.
    """

    def __init__(self, dir: Path, params: dict):
        self.dir, self.params = dir, params
        self.paths = sorted(dir.glob("consolidated.*.pth"))
        names = [f"consolidated.{i:02d}.pth" for i in range(len(self.paths) or 1)]
        for name in names:
            if dir / name not in self.paths:
                raise UserError(f"{dir / name}: this file is missing (params.json is Meta's "
                                f"layout, {len(self.paths)} files of which are there)")
        self.shards = [weights.unpickle(path) for path in self.paths if present(path)]
        for path, shard in zip(self.paths, self.shards):
            for name, tensor in self.shards[0].items():
                if name not in shard or shard[name].shape != tensor.shape:
                    raise UserError(f"{path}: {name} should be as in {self.paths[0].name}, "
                                    f"{tuple(tensor.shape)}")
            if unknown := shard.keys() - self.shards[0].keys():
                raise UserError(f"{path}: holds {min(unknown)}, which {self.paths[0].name} doesn't")
        self.files = dict.fromkeys(self.shards[0], self.paths[0])
        self.llama = self._config(f"{dir}/params.json")

    def _config(self, where: str) -> dict:
        """params.json as a public config. UserError if it is of no Llama that is known."""
        p = self.params
        check(p, PARAMS, where)
        self._check_rows()
        inner = int(2 * 4 * p["dim"] / 3)    # 2/3 of the usual 4 D, since SwiGLU has three matrices
        if p.get("ffn_dim_multiplier") is not None:
            inner = int(p["ffn_dim_multiplier"] * inner)
        tied = self._tied()
        vocab = p.get("vocab_size")
        if vocab in (None, -1):              # "as the tokenizer says"
            vocab = self.shape(EMBED)[0]
        config = {
            "model_type": "llama", "vocab_size": vocab, "hidden_size": p["dim"],
            "intermediate_size": -(-inner // p["multiple_of"]) * p["multiple_of"],
            "num_hidden_layers": p["n_layers"], "num_attention_heads": p["n_heads"],
            "num_key_value_heads": p.get("n_kv_heads"), "rms_norm_eps": p["norm_eps"],
            "max_position_embeddings": 4096, "tie_word_embeddings": tied}
        return config | self._positions(where, vocab, tied)

    def _check_rows(self) -> None:
        """Whether the last files are there: their names don't tell how many there should be."""
        for name in (EMBED, QUERIES):
            if name not in self.files or self.shards[0][name].ndim != 2:
                raise UserError(f"{self.paths[0]}: holds no matrix {name}")
        rows, need = len(self.shards) * len(self.shards[0][QUERIES]), self.params["dim"]
        if rows < need:
            raise UserError(f"{self.dir}/consolidated.{len(self.shards):02d}.pth: this file is "
                            f"missing (the others hold {rows} of the {need} rows of {QUERIES})")

    def _tied(self) -> bool:
        """Whether the output matrix is the embedding: isn't there, or is a copy."""
        if HEAD not in self.files:
            return True
        if self.shape(HEAD) != self.shape(EMBED):
            return False
        # one row is enough to tell most
        return all(torch.equal(self[HEAD][:n], self[EMBED][:n]) for n in (1, None))

    def _positions(self, where: str, vocab: int, tied: bool) -> dict:
        """What of the config goes with the base of RoPE: Llama 2's, 3's or 3.1's."""
        theta, scaled = self.params.get("rope_theta"), self.params.get("use_scaled_rope")
        theta = 10000.0 if theta is None else theta
        if theta not in (10000.0, 500000.0) or (scaled and theta != 500000.0):
            raise UserError(f"{where}: rope_theta {theta!r} is neither Llama-2's 10000 nor "
                            "Llama-3's 500000; get this model in Hugging Face's layout")
        config = {"rope_theta": theta}
        if theta == 500000.0:
            config["max_position_embeddings"] = 8192
        if theta == 500000.0 and vocab > 256:     # control tokens come last; see core/tokenizer.py
            config |= {"bos_token_id": vocab - 256,
                       "eos_token_id": [vocab - 255, vocab - 248, vocab - 247]}
        if scaled:
            # params.json says that frequencies are scaled, not by how much: 8 in Llama 3.1 and 3.3,
            # 32 in 3.2. But the text models of 3.2 (1B, 3B) share embedding and output matrix, and
            # no other Llama does.
            factor = self.params.get("rope_scaling_factor") or (32 if tied else 8)
            config |= {"max_position_embeddings": 131072, "rope_scaling": {
                "rope_type": "llama3", "factor": factor, "low_freq_factor": 1,
                "high_freq_factor": 4, "original_max_position_embeddings": 8192}}
        return config

    def _assemble(self, name: str, slices: list[Tensor]) -> Tensor:
        kind = name.removesuffix(".weight").rpartition(".")[2]
        cut = CUTS.get(kind)
        if name == EMBED:                          # Llama 2 cuts it by columns, Llama 3 by rows
            cut = 0 if slices[0].shape[-1] == self.params["dim"] else 1
        uncut = len(slices) == 1 or cut is None or slices[0].ndim <= cut
        whole = slices[0] if uncut else torch.cat(slices, cut)
        heads = None
        if kind == "wq":
            heads = self.params["n_heads"]
        elif kind == "wk":
            heads = self.params.get("n_kv_heads") or self.params["n_heads"]
        if heads and whole.ndim == 2 and len(whole) % (2 * heads) == 0:
            return half_split(whole, heads)
        return whole                               # if that is wrong, `load` will say so

    def __getitem__(self, name: str) -> Tensor:
        slices = [shard[name] for shard in self.shards]
        whole = self._assemble(name, slices)
        if whole.data_ptr() != slices[0].data_ptr():
            self.drop(name)                        # it is a copy now
        return whole

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._assemble(name, [shard[name].to("meta") for shard in self.shards]).shape)

    def dtype(self, name: str) -> torch.dtype:
        return self.shards[0][name].dtype

    def nbytes(self, name: str) -> int:
        return sum(shard[name].nbytes for shard in self.shards)

    def drop(self, name: str) -> None:
        for path, shard in zip(self.paths, self.shards):
            if weights.is_zip(path):
                weights.drop_pages(shard[name])
