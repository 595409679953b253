"""Adapters for tests: a base with LoRA beside it, or another fuser in it, and what is saved of
that."""
from pathlib import Path

import torch

from ccra import IMAGE_TOKEN, VLM, CCRAConfig
from llama import Llama
from training import adapters, lora

CCRA = CCRAConfig(text_dim=48, vision_dim=16, n_layers=3, d_hidden=8, norm="stack")


def shake(tensors) -> None:
    """Away from where they began, so that they matter."""
    torch.manual_seed(7)
    with torch.no_grad():
        for p in tensors:
            p.add_(0.03 * torch.randn(p.shape, dtype=p.dtype))


def draw(llm: Llama) -> None:
    shake(layer.lora_B for _, _, layer in lora.layers(llm))


def learn(base: Path, folder: Path, r: int = 4, ccra: bool = False, query: str = "all",
          vision: Path | None = None) -> VLM:
    """What a run could have made of the base, with LoRA (r > 0), CCRA, or both; its adapter is
    saved in folder. Returns the model as it is trained, LoRA beside its matrices, in float64."""
    identity = adapters.identity(base, vision)
    model = VLM.from_pretrained(base, torch.float32, vision=vision).requires_grad_(False)
    if ccra:
        model = model.with_fuser(CCRA)
        model.fuser.requires_grad_(True)
        model.projector.requires_grad_(True)
        shake([*model.fuser.parameters(), *model.projector.parameters()])
    model.query = query
    if r:
        torch.manual_seed(0)
        lora.add(model.llm, r, 3 * r)
        draw(model.llm)
    names = dict(model.named_parameters())
    trained = [name for name, p in names.items() if p.requires_grad]
    held = {name: names[name] for name in adapters.held_names(model, trained, identity)}
    adapters.save(model, folder, identity, held, trained)
    return model.double().eval()


def logits(model: VLM) -> torch.Tensor:
    """Of two rows with a picture, (2, T', V), in float64."""
    g = torch.Generator().manual_seed(2)
    size, V = model.image["size"], model.llm.config.vocab_size
    ids = torch.randint(3, V, (2, 12), generator=g)
    ids[:, 3] = IMAGE_TOKEN
    pixels = torch.randn(2, 3, size, size, generator=g)
    mask = torch.ones(2, 5, dtype=torch.bool)
    with torch.no_grad():
        return model(pixels, ids, ids[:, 5:10], mask).double()


def near(one: VLM, other: VLM) -> float:
    """The largest difference of their logits, in parts of the largest logit."""
    got, want = logits(one), logits(other)
    return ((got - want).abs().max() / want.abs().max()).item()
