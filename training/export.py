"""A plain LLaVA model as a llava-hf folder, for transformers and whatever reads its layout."""
from dataclasses import asdict
from pathlib import Path

import torch

from ccra import VLM
from clip import FIXED
from core import weights
from core.common import UserError, copy_into
from core.layouts import llava_hf_name
from fusers.llava import LLaVA


def export_llava(model: VLM, dir: str | Path, tokenizer_file: str | Path | None = None,
                 max_shard_bytes: float = 5e9) -> None:
    """Write a folder that transformers' LlavaForConditionalGeneration reads, with the same logits.

    UserError for any fuser but plain LLaVA's: there is no place for it in that layout. transformers
    wants <image> and <pad> in the vocabulary, and the hub's models pad it to a multiple of 64. The
    new rows are the mean of the others (on the hub they scatter about it, closely): the logit of a
    mean row is the mean logit, so it is never the highest.
    """
    if not isinstance(model.fuser, LLaVA) or model.fuser.config.copies > 1:
        raise UserError("only plain LLaVA can be written as a llava-hf folder, not the fuser "
                        f"{model.fuser.name!r}")
    V = model.llm.config.vocab_size
    extra = -(-(V + 2) // 64) * 64 - V
    tensors = {}
    for name, p in weights.to_save(model, dir).items():
        if name in ("llm.embed_tokens.weight", "llm.lm_head.weight"):
            mean = p.float().mean(0, keepdim=True).to(p.dtype)                     # (1, D)
            p = torch.cat([p, mean.expand(extra, -1)])                             # (V + extra, D)
        tensors[llava_hf_name(name)] = p
    dtype = str(model.projector[0].weight.dtype).removeprefix("torch.")
    vision = {"model_type": "clip_vision_model", **asdict(model.vision.config), **FIXED}
    config = {"architectures": ["LlavaForConditionalGeneration"], "model_type": "llava",
              "image_token_index": V, "pad_token_id": V + 1, "projector_hidden_act": "gelu",
              "vision_feature_layer": -2, "vision_feature_select_strategy": "default",
              "image_seq_length": model.vision.grid ** 2,
              "tie_word_embeddings": model.llm.config.tie_word_embeddings, "torch_dtype": dtype,
              "text_config": {**model.llm.config.to_dict(), "vocab_size": V + extra},
              "vision_config": vision}
    weights.save(dir, tensors, config, max_shard_bytes)
    copy_into(dir, tokenizer_file)
