"""A tiny model with any fuser."""

import torch

from ccra import NAMED, VLM
from clip import CLIPVision, CLIPVisionConfig
from llama import Llama, LlamaConfig

TOWER = CLIPVisionConfig(image_size=32, patch_size=8, hidden_size=16, intermediate_size=24,
                         num_hidden_layers=4, num_attention_heads=2)


def tiny_vlm(name, D=24, seed=0):
    torch.manual_seed(seed)
    kind, settings = NAMED[name]
    sizes = dict(text_dim=D, vision_dim=16, n_layers=4, d_hidden=8)
    config = kind(**{key: n for key, n in sizes.items() if key in kind.__dataclass_fields__},
                  **settings)
    llm = LlamaConfig(vocab_size=50, hidden_size=D, intermediate_size=32, num_hidden_layers=2,
                      num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64)
    model = VLM.build(CLIPVision(TOWER), Llama(llm), config).double()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim >= 2:
                p.normal_(0, 0.25)
    return model
