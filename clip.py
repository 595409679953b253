"""CLIP: both towers, and the exact preprocessing of its pictures.

CCRA reads every layer of CLIP's image tower, not only the last one, so that tower returns all its
hidden states. The text tower is here because the toy world trains a CLIP of its own (pictures
against captions); a vision-language model has no use for it. The arithmetic is OpenAI's CLIP, the
tensor names in files are those of Hugging Face's transformers.

Top to bottom: attention (Llama's too), pictures -> pixels, the transformer block, configurations,
image tower, text tower, CLIP.
"""
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from core import fields, weights
from core.common import UserError
from core.fields import Depth, Epsilon, Heads, Id, Range, Vocabulary, Width, check_config, shown
from core.layouts import Folder, tower_name
from core.pictures import MAX_PIXELS, Source, label, open_image

# else a GPU rounds what `patch_embedding` multiplies, in float32, too
torch.backends.cudnn.allow_tf32 = False

# --------------------------------------------------------------------------------------------------
# Attention

def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None,
              causal: bool = False) -> Tensor:
    """softmax(q k^T / sqrt(hd)) v: the one attention of the project.

    q (B, H, Tq, hd); k, v (B, H, Tk, hd). mask bool, True = may look, broadcastable to (B, 1, Tq,
    Tk). causal: position t looks at 0..t (Tq == Tk); with a mask, both hold. Returns (B, H, Tq,
    hd). A row that may look nowhere gives zeros.
    """
    if mask is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    if causal:
        mask = mask & lower_triangle(q, k)
    # Kernels differ in what they make of an empty row (0/0): let it look everywhere, then zero what
    # it saw.
    empty = ~mask.any(-1, keepdim=True)                                     # (B, 1, Tq, 1)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask | empty)     # (B, H, Tq, hd)
    return y.masked_fill(empty, 0)


def lower_triangle(q: Tensor, k: Tensor) -> Tensor:
    """Who may look at whom, (Tq, Tk) bool: the queries are the last Tq positions."""
    Tq, Tk = q.shape[-2], k.shape[-2]
    return torch.ones(Tq, Tk, dtype=torch.bool, device=q.device).tril(Tk - Tq)


# --------------------------------------------------------------------------------------------------
# Pictures -> pixels

MEAN = (0.48145466, 0.4578275, 0.40821073)   # of CLIP's training pictures, RGB
STD = (0.26862954, 0.26130258, 0.27577711)


def read_pixels(path: Source, size: int, pad: bool, upright: bool = False) -> Tensor:
    """A picture file's pixels (3, size, size): `open_image`, then `preprocess`. UserError naming
    the path."""
    image = open_image(path, upright)
    try:
        return preprocess(image, size, pad)
    except UserError as e:                     # too narrow for a large `size`
        raise UserError(f"{label(path)}: {e}") from None


def expand_to_square(image: Image.Image) -> Image.Image:
    """LLaVA's padding: the RGB picture centred on a square of CLIP's mean colour, so that nothing
    is cropped away."""
    side = max(image.size)
    _check_room(image, side, side)
    colour = tuple(int(255 * m) for m in MEAN)                              # (122, 116, 104)
    square = Image.new("RGB", (side, side), colour)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def preprocess(image: Image.Image, size: int, pad: bool) -> Tensor:
    """PIL image -> (3, size, size) float32, exactly as CLIP's own processor does it (bicubic, with
    Pillow).

    The shorter side becomes `size`, the middle is cut out, RGB values are normalised. pad=True
    first makes the picture square by padding (LLaVA, stage 2 and inference); pad=False crops the
    ends of the longer side (stage 1). UserError for a picture without pixels, or one so narrow that
    making it square would fill the memory.
    """
    if 0 in image.size:
        raise UserError(f"an image of {image.width} x {image.height} has no pixels")
    image = image.convert("RGB")
    if pad:
        image = expand_to_square(image)
    short = min(image.size)
    width, height = (int(size * side / short) for side in image.size)       # cut off, not rounded
    _check_room(image, width, height)
    # (Resizing only the box that is kept would be faster, but Pillow rounds a box to float32: other
    # pixels come out.)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    image = image.crop((left, top, left + size, top + size))
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255       # (3, size, size)
    return (pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def _check_room(image, width, height):
    if width * height > MAX_PIXELS:
        raise UserError(
            f"an image of {image.width} x {image.height} is too narrow to be made square: "
            f"that takes {width} x {height} pixels on the way")


# --------------------------------------------------------------------------------------------------
# The transformer block of both towers

class SelfAttention(nn.Module):
    """Every position looks at all others; causal: at those before it."""
    attend: Callable = staticmethod(attention)

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor, causal: bool) -> Tensor:
        """(B, T, d) -> (B, T, d)"""
        B, T, d = x.shape
        q, k, v = (proj(x).view(B, T, self.heads, d // self.heads).transpose(1, 2)
                   for proj in (self.q_proj, self.k_proj, self.v_proj))     # each (B, H, T, d / H)
        y = self.attend(q, k, v, causal=causal)                             # (B, H, T, d / H)
        return self.out_proj(y.transpose(1, 2).reshape(B, T, d))


class MLP(nn.Module):
    """fc2(QuickGELU(fc1(x))). The exact GELU is off by up to 0.02 each time."""

    def __init__(self, width: int, inner: int):
        super().__init__()
        self.fc1 = nn.Linear(width, inner)
        self.fc2 = nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, d) -> (B, T, d)"""
        x = self.fc1(x)                                                     # (B, T, inner)
        return self.fc2(x * torch.sigmoid(1.702 * x))


class Block(nn.Module):
    """Pre-norm transformer block: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: "CLIPVisionConfig | CLIPTextConfig"):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = SelfAttention(config.hidden_size, config.num_attention_heads)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = MLP(config.hidden_size, config.intermediate_size)

    def forward(self, x: Tensor, causal: bool = False) -> Tensor:
        """(B, T, d) -> (B, T, d)"""
        x = x + self.self_attn(self.layer_norm1(x), causal)
        return x + self.mlp(self.layer_norm2(x))


def init_weights(tower: "CLIPVision | CLIPText") -> None:
    """For training from scratch, CLIP's own: embeddings at std 0.02, matrices by width, those which
    write into the residual stream smaller by sqrt(2 L), biases 0. (0.02 for all, GPT-2's way, needs
    ~5x the steps at width 48.)"""
    d, depth = tower.config.hidden_size, 2 * len(tower.layers)
    stds = {"out_proj": (d * depth) ** -0.5, "fc1": (2 * d) ** -0.5, "fc2": (d * depth) ** -0.5}
    for name, parameter in tower.named_parameters():
        if name.endswith(".bias"):
            nn.init.zeros_(parameter)
        elif "norm" not in name:                    # norms stay at torch's (1, 0)
            kind = name.removesuffix(".weight").split(".")[-1]
            std = 0.02 if "embedding" in kind else stds.get(kind, d ** -0.5)
            nn.init.normal_(parameter, std=std)


# --------------------------------------------------------------------------------------------------
# Configurations and names: the public layout and ours

# What the arithmetic here takes for granted; a config that says otherwise would load and be quietly
# wrong.
FIXED = {"hidden_act": "quick_gelu", "num_channels": 3, "attention_dropout": 0.0}


def _read(cls, given, where, defaults):
    """Dataclass from a public config: keys left out get CLIP's public defaults, keys we don't know
    don't concern us."""
    config = fields.read(cls, given, where, defaults)
    for key, value in FIXED.items():
        if given.get(key, value) != value:
            raise UserError(f"{where}: {key} = {shown(given[key])} is not implemented (only "
                            f"{value!r} is)")
    return config


class _Tower:
    """What the configs of both towers have to be."""

    def __post_init__(self):
        check_config(self)
        if self.hidden_size % self.num_attention_heads:
            raise UserError(f"num_attention_heads = {self.num_attention_heads} doesn't divide "
                            f"hidden_size = {self.hidden_size}")


@dataclass
class CLIPVisionConfig(_Tower):
    """Shape of an image tower. The defaults are those of ViT-L/14 at 336 pixels, LLaVA's and
    CCRA's."""
    image_size: Annotated[int, Range(1, 2 ** 14)] = 336
    patch_size: Annotated[int, Range(1, 2 ** 14)] = 14
    hidden_size: Width = 1024
    intermediate_size: Width = 4096
    num_hidden_layers: Depth = 24
    num_attention_heads: Heads = 16
    layer_norm_eps: Epsilon = 1e-5

    @classmethod
    def from_dict(cls, config: dict, where: str = "config.json") -> "CLIPVisionConfig":
        """From a public vision_config or ours, of a file `where`. What it leaves out is as in
        transformers, whose default is ViT-B/32. UserError for what this file doesn't implement."""
        return _read(cls, config, where, dict(
            image_size=224, patch_size=32, hidden_size=768, intermediate_size=3072,
            num_hidden_layers=12, num_attention_heads=12, layer_norm_eps=1e-5))


@dataclass
class CLIPTextConfig(_Tower):
    """Shape of a text tower. eos_token_id is the end-of-text token, whose final state stands for
    the text."""
    vocab_size: Vocabulary = 49408
    hidden_size: Width = 512
    intermediate_size: Width = 2048
    num_hidden_layers: Depth = 12
    num_attention_heads: Heads = 8
    max_position_embeddings: Width = 77
    layer_norm_eps: Epsilon = 1e-5
    eos_token_id: Id = 49407

    @classmethod
    def from_dict(cls, config: dict, where: str = "config.json") -> "CLIPTextConfig":
        """From a public text_config. UserError for what this file doesn't implement."""
        return _read(cls, config, where, {})


def _from_public(tower):
    """The inverse: {public name: own name} of one tower."""
    return {tower_name(name): name for name, _ in tower.named_parameters()}


# --------------------------------------------------------------------------------------------------
# The towers

class CLIPVision(nn.Module):
    """CLIP's image tower: a ViT with a class token (CLS), pre-norm blocks and one more norm before
    the first block."""

    def __init__(self, config: CLIPVisionConfig):
        super().__init__()
        d, patch = config.hidden_size, config.patch_size
        self.config = config
        self.grid = config.image_size // patch                              # patches along one side
        self.class_embedding = nn.Parameter(torch.empty(d))
        self.patch_embedding = nn.Conv2d(3, d, patch, stride=patch, bias=False)
        self.position_embedding = nn.Parameter(torch.empty(1 + self.grid ** 2, d))
        # the public name, typo included
        self.pre_layrnorm = nn.LayerNorm(d, eps=config.layer_norm_eps)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.post_layernorm = nn.LayerNorm(d, eps=config.layer_norm_eps)    # only `pooled` uses it
        init_weights(self)

    def states(self, pixels: Tensor, n_layers: int | None = None) -> list[Tensor]:
        """The list that `forward` stacks, n_layers + 1 times (B, 1 + N, d); for whoever needs only
        its end and would pay for the copy."""
        size, L = self.config.image_size, len(self.layers)
        if pixels.ndim != 4 or tuple(pixels.shape[1:]) != (3, size, size):
            raise UserError(
                f"pixels are {tuple(pixels.shape)}, but this tower takes (B, 3, {size}, {size})")
        if n_layers is not None and not 0 <= n_layers <= L:
            raise UserError(f"{n_layers} layers were asked for, but this tower has {L}")
        pixels = pixels.to(self.patch_embedding.weight.dtype)
        patches = self.patch_embedding(pixels)                              # (B, d, grid, grid)
        patches = patches.flatten(2).transpose(1, 2)                        # (B, N, d), row by row
        cls = self.class_embedding.expand(len(pixels), 1, -1)               # (B, 1, d)
        x = torch.cat([cls, patches], dim=1) + self.position_embedding      # (B, 1 + N, d)
        hidden = [self.pre_layrnorm(x)]
        for block in self.layers[:n_layers]:
            hidden.append(block(hidden[-1]))
        return hidden

    def forward(self, pixels: Tensor, n_layers: int | None = None) -> Tensor:
        """pixels (B, 3, size, size) -> hidden (L + 1, B, 1 + N, d), numbered as in transformers:
        hidden[0] goes into the first block, hidden[l] comes out of block l, CLS first, no final
        norm. n_layers: stop after that many. UserError for pixels of another shape."""
        return torch.stack(self.states(pixels, n_layers))

    def pooled(self, hidden: Tensor | list[Tensor]) -> Tensor:
        """hidden (L + 1, B, 1 + N, d) -> (B, d): CLS after the last block, normed; what CLIP
        compares with texts."""
        return self.post_layernorm(hidden[-1][:, 0])

    @classmethod
    def from_pretrained(cls, dir: str | Path, dtype: torch.dtype | None = None,
                        device: str | torch.device | None = None) -> "CLIPVision":
        """The image tower out of any folder that holds one: a public CLIPVisionModel or CLIPModel,
        llava-hf's, ours. dtype None: as stored. UserError for anything that doesn't fit exactly."""
        folder = Folder(dir)
        with weights.skeleton():
            tower = cls(CLIPVisionConfig.from_dict(folder.part("vision"), folder.where))
        return folder.fill(tower, "vision", dtype, device)


class CLIPText(nn.Module):
    """CLIP's text tower: causal, learned positions, and one state per text: that of its end-of-text
    token."""

    def __init__(self, config: CLIPTextConfig):
        super().__init__()
        d, self.config = config.hidden_size, config
        self.token_embedding = nn.Embedding(config.vocab_size, d)
        self.position_embedding = nn.Parameter(torch.empty(config.max_position_embeddings, d))
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.final_layer_norm = nn.LayerNorm(d, eps=config.layer_norm_eps)
        init_weights(self)

    def forward(self, ids: Tensor) -> Tensor:
        """ids (B, T), padded on the right -> states (B, T, d) after the final norm. Causal: padding
        needs no mask. UserError for a text that is longer than the positions learned."""
        T, room = ids.shape[1], len(self.position_embedding)
        if T > room:
            raise UserError(f"a text of {T} tokens, but there are {room} positions")
        x = self.token_embedding(ids) + self.position_embedding[:T]         # (B, T, d)
        for block in self.layers:
            x = block(x, causal=True)
        return self.final_layer_norm(x)

    def pooled(self, hidden: Tensor, ids: Tensor) -> Tensor:
        """hidden (B, T, d), ids (B, T) -> (B, d): the state at the first end-of-text token.
        UserError for a text without one."""
        # OpenAI's config files say eos_token_id = 2, which is wrong but public; there end-of-text
        # is the highest id.
        if self.config.eos_token_id == 2:
            at = ids.argmax(-1)                                             # (B)
        else:
            ends = ids == self.config.eos_token_id                          # (B, T)
            if not ends.any(-1).all():
                raise UserError(f"a text without its end-of-text token {self.config.eos_token_id}")
            at = ends.int().argmax(-1)
        return hidden[torch.arange(len(ids), device=ids.device), at]


class CLIP(nn.Module):
    """Both towers, projected into one space where a picture lies near the text that describes it.
    """

    def __init__(self, vision: CLIPVisionConfig, text: CLIPTextConfig, projection_dim: int = 512):
        super().__init__()
        self.vision, self.text = CLIPVision(vision), CLIPText(text)
        self.visual_projection = nn.Linear(vision.hidden_size, projection_dim, bias=False)
        self.text_projection = nn.Linear(text.hidden_size, projection_dim, bias=False)
        nn.init.normal_(self.visual_projection.weight, std=vision.hidden_size ** -0.5)
        nn.init.normal_(self.text_projection.weight, std=text.hidden_size ** -0.5)
        # log of the inverse temperature
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def encode_image(self, pixels: Tensor) -> Tensor:
        """(B, 3, size, size) -> (B, projection_dim), not normalised."""
        return self.visual_projection(self.vision.pooled(self.vision.states(pixels)))

    def encode_text(self, ids: Tensor) -> Tensor:
        """(B, T) -> (B, projection_dim), not normalised."""
        return self.text_projection(self.text.pooled(self.text(ids), ids))

    def forward(self, pixels: Tensor, ids: Tensor) -> Tensor:
        """Pictures (B, 3, size, size), texts (C, T) -> logits_per_image (B, C): exp(logit_scale)
        times the cosines."""
        image = F.normalize(self.encode_image(pixels), dim=-1)              # (B, projection_dim)
        text = F.normalize(self.encode_text(ids), dim=-1)                   # (C, projection_dim)
        return self.logit_scale.exp() * image @ text.T

    def _public_names(self):
        """{public name: own name}"""
        names = {f"{tower}_model.{public}": f"{tower}.{name}" for tower in ("vision", "text")
                 for public, name in _from_public(getattr(self, tower)).items()}
        same = ("visual_projection.weight", "text_projection.weight", "logit_scale")
        return names | {name: name for name in same}

    @classmethod
    def from_pretrained(cls, dir: str | Path, dtype: torch.dtype | None = None,
                        device: str | torch.device | None = None) -> "CLIP":
        """From a public CLIPModel folder. dtype None: as stored. UserError for anything that
        doesn't fit exactly."""
        folder = Folder(dir)
        width = {"projection_dim": 512, **folder.config}
        fields.check(width, {"projection_dim": Width}, folder.where)
        with weights.skeleton():
            model = cls(CLIPVisionConfig.from_dict(folder.part("vision"), folder.where),
                        CLIPTextConfig.from_dict(folder.part("text"), folder.where),
                        width["projection_dim"])
        return folder.fill(model, dtype=dtype, device=device)

    def save_pretrained(self, dir: str | Path) -> None:
        """Write a public CLIPModel folder, which transformers and the two from_pretrained here
        read."""
        width = self.visual_projection.out_features
        own = dict(self.named_parameters())
        vision = {"model_type": "clip_vision_model", **asdict(self.vision.config), **FIXED,
                  "projection_dim": width}
        # transformers' defaults for bos and pad may lie outside a small vocabulary; the tower uses
        # neither
        text = {"model_type": "clip_text_model", **asdict(self.text.config),
                "projection_dim": width, "hidden_act": FIXED["hidden_act"],
                "bos_token_id": None, "pad_token_id": None}
        config = {"architectures": ["CLIPModel"], "model_type": "clip", "projection_dim": width,
                  "vision_config": vision, "text_config": text}
        tensors = {public: own[name] for public, name in self._public_names().items()}
        weights.save(dir, tensors, config)
