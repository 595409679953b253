"""The other ways to turn the vision tower's layers into features for the language model, in CCRA's place.

A fuser takes hidden (L+1, B, 1+N, d), all states of the tower, the question F_t (B, T, D) with its mask (B, T), and a
mode; it gives features (B, N', width) and maps. What VLM and train.py want to know about it:

    .name, .config   in a VLM's config.json: which it is, and how it is set up
    .width           of its features, which is what the projector reads; .rows(N) -> N', where that isn't N
    .n_blocks        how many blocks of the tower it reads, so that the others need not run
    .asks            whether it reads the question. Only then the mode matters ("on" or not), and only then stage 1
                     leaves it as it is; one that doesn't ask belongs to the projector and is trained with it

Layers are numbered as in `hidden`: 0 goes into the first block, l comes out of block l. The indices are those of the
released code for CLIP's 24 blocks, each carried over to another depth by `at`; the last layer but one stays that. The
fusers are told apart by what they read and by their parameters; recipes of training are the same for all of them. PWCA
alone and LWCA alone aren't here: nobody has published them but as parts of CCRA's equations, so they are arrangements
of ccra.py's pieces (`CCRA.pwca_only`, `CCRA.lwca_only`), which this file comes before.
"""
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fast.linear import Linear
from core.weights import UserError

DENSE = ("sti", "sci", "dci")
MLVF_LAYERS = ("18", "3-18-23", "former", "latter", "all")


def whole(config, **least) -> None:
    """UserError for a setting that isn't a whole number, or is less than it may be."""
    for name, low in least.items():
        if type(value := getattr(config, name)) is not int or value < low:
            raise UserError(f"{type(config).__name__.removesuffix('Config')}: {name} = {value!r} should be a whole "
                            f"number, {low} or more")


def one_of(config, name: str, values: tuple) -> None:
    if (value := getattr(config, name)) not in values:
        raise UserError(f"{type(config).__name__.removesuffix('Config')}: {name} = {value!r} should be one of "
                        + ", ".join(values))


def at(layer: int, n_layers: int) -> int:
    """What layer `layer` of 24 is in a tower of n_layers: the one at the same share of its depth, halves up."""
    return (layer * n_layers + 12) // 24


def average(hidden: Tensor, start: int, stop: int) -> Tensor:
    """The mean of layers start..stop-1, patches only, (B, N, d)."""
    return hidden[start:stop, :, 1:].mean(0)


# ---------------------------------------------------------------------------------------------------------------------
# Without parameters of their own

@dataclass
class LLaVAConfig:
    """Sizes of the vision tower. copies: 2 is the wide control, whose projector has as many parameters as CCRA's."""
    vision_dim: int = 1024             # d
    n_layers: int = 24                 # L
    copies: int = 1

    def __post_init__(self):
        whole(self, vision_dim=1, n_layers=2, copies=1)


class LLaVA(nn.Module):
    """LLaVA-1.5: the patches of the last layer but one, whatever is asked. No parameters."""
    name, asks = "llava", False

    def __init__(self, config: LLaVAConfig):
        super().__init__()
        self.config, self.width = config, config.vision_dim * config.copies
        self.n_blocks = config.n_layers - 1        # hidden[-2] of L+1 states is what comes out of block L-1

    def forward(self, hidden: Tensor, F_t: Tensor, mask: Tensor, mode="on") -> tuple[Tensor, dict[str, Tensor]]:
        """hidden (n_blocks+1 or more, B, 1+N, d), CLS first -> (B, N, width) and no maps."""
        return torch.cat([hidden[self.n_blocks][:, 1:]] * self.config.copies, dim=-1), {}


@dataclass
class DenseConnectorConfig:
    """kind: sti adds tokens, sci channels of two layers, dci channels of two means (its authors' default)."""
    vision_dim: int = 1024
    n_layers: int = 24
    kind: str = "dci"

    def __post_init__(self):
        whole(self, vision_dim=1, n_layers=2)
        one_of(self, "kind", DENSE)


class DenseConnector(nn.Module):
    """Dense Connector (Yao et al., 2024), beside LLaVA's layer L-1, of 24 blocks:

        sti   layers 7 and 15 as tokens of their own, each the mean of 8 patches that follow each other in a row
        sci   layers 7 and 15 as channels
        dci   the means of layers 0..11 and 12..23 as channels. The embeddings (0) are in, the last layer (24) isn't
    """
    name, asks = "denseconnector", False

    def __init__(self, config: DenseConnectorConfig):
        super().__init__()
        L, self.config, self.n_blocks = config.n_layers, config, config.n_layers - 1
        self.width = config.vision_dim * (1 if config.kind == "sti" else 3)
        low, high = at(7, L), at(15, L)
        two = [(0, L // 2), (L // 2, L)] if config.kind == "dci" else [(low, low + 1), (high, high + 1)]
        self.groups = [(L - 1, L), *two]

    def rows(self, N: int) -> int:
        return N + 2 * (N // 8) if self.config.kind == "sti" else N

    def forward(self, hidden: Tensor, F_t: Tensor, mask: Tensor, mode="on") -> tuple[Tensor, dict[str, Tensor]]:
        """-> (B, N, 3d), but (B, N + 2 (N // 8), d) for sti; no maps."""
        last, *two = [average(hidden, *group) for group in self.groups]                  # each (B, N, d)
        if self.config.kind != "sti":
            return torch.cat([last, *two], dim=-1), {}
        two = [nn.functional.avg_pool1d(x.transpose(1, 2), 8).transpose(1, 2) for x in two]     # (B, N // 8, d)
        return torch.cat([last, *two], dim=1), {}


@dataclass
class MLVFConfig:
    """layers: which ones stand beside LLaVA's; the default is one of each stage, as the paper recommends."""
    vision_dim: int = 1024
    n_layers: int = 24
    layers: str = "3-18-23"

    def __post_init__(self):
        whole(self, vision_dim=1, n_layers=2)
        one_of(self, "layers", MLVF_LAYERS)


class MLVF(nn.Module):
    """Multi-layer visual feature fusion (Lin et al., 2025), its external direct fusion (E_D): channels side by side.

    Of 24 blocks: layer 18, layers 3 and 18, the mean of 1..12 ("former"), of 13..24 ("latter"), or both ("all"); then
    LLaVA's layer 23. The paper's other three fusions add weights elsewhere or reach into the language model.
    """
    name, asks = "mlvf", False

    def __init__(self, config: MLVFConfig):
        super().__init__()
        L, self.config = config.n_layers, config
        low, high, former, latter = at(3, L), at(18, L), (1, L // 2 + 1), (L // 2 + 1, L + 1)
        low, high = (low, low + 1), (high, high + 1)
        self.groups = [*{"18": [high], "3-18-23": [low, high], "former": [former], "latter": [latter],
                         "all": [former, latter]}[config.layers], (L - 1, L)]
        self.width, self.n_blocks = config.vision_dim * len(self.groups), max(stop for _, stop in self.groups) - 1

    def forward(self, hidden: Tensor, F_t: Tensor, mask: Tensor, mode="on") -> tuple[Tensor, dict[str, Tensor]]:
        """-> (B, N, 2d or 3d) and no maps."""
        return torch.cat([average(hidden, *group) for group in self.groups], dim=-1), {}


# ---------------------------------------------------------------------------------------------------------------------
# MMFuser

@dataclass
class MMFuserConfig:
    """Sizes of the vision tower, and of the deformable attention."""
    vision_dim: int = 1024
    n_layers: int = 24
    heads: int = 16
    points: int = 4                    # that a head looks at, in every layer

    def __post_init__(self):
        whole(self, vision_dim=1, n_layers=2, heads=1, points=1)
        if self.vision_dim % self.heads:
            raise UserError(f"MMFuser: vision_dim = {self.vision_dim} should be a multiple of heads = {self.heads}")


class Deformable(nn.Module):
    """Deformable attention (Zhu et al., 2021): a query looks at a few points around its own place, in every level, and
    says itself where they are and how much each of them counts. No key is ever compared with it.

    It starts by looking evenly at points that go out from the query's place, each head in a direction of its own.
    """

    def __init__(self, d: int, heads: int, levels: int, points: int):
        super().__init__()
        self.shape = heads, levels, points
        self.offsets, self.shares = Linear(d, heads * levels * points * 2), Linear(d, heads * levels * points)
        self.value, self.out = Linear(d, d), Linear(d, d)
        for layer in (self.offsets, self.shares, self.value, self.out):
            nn.init.zeros_(layer.bias)
        nn.init.zeros_(self.offsets.weight), nn.init.zeros_(self.shares.weight)
        nn.init.xavier_uniform_(self.value.weight), nn.init.xavier_uniform_(self.out.weight)
        angle = torch.arange(heads) * (2 * math.pi / heads)                              # (H)
        step = torch.stack([angle.cos(), angle.sin()], -1)                               # (H, 2)
        step = step / step.abs().amax(-1, keepdim=True)                                  # onto a square, as patches are
        ring = step[:, None, None] * torch.arange(1, points + 1)[:, None]                # (H, 1, P, 2), in patches
        with torch.no_grad():
            self.offsets.bias.copy_(ring.expand(heads, levels, points, 2).flatten())

    def forward(self, query: Tensor, levels: Tensor) -> Tensor:
        """query (B, N, d); levels (B, K, N, d), each N patches of a square picture, row by row -> (B, N, d)."""
        (B, N, d), (H, K, P), side = query.shape, self.shape, math.isqrt(query.shape[1])
        wide = torch.promote_types(query.dtype, torch.float32)     # places are too fine for half precision
        shares = self.shares(query).to(wide).view(B, N, H, K * P).softmax(-1)            # (B, N, H, K P)
        offsets = self.offsets(query).to(wide).view(B, N, H, K, P, 2)                    # x, y in patches
        y, x = torch.meshgrid(*[torch.arange(side, device=query.device, dtype=wide) + 0.5] * 2, indexing="ij")
        own = torch.stack([x, y], -1).view(N, 1, 1, 1, 2)                                # centres of the patches
        place = 2 * (own + offsets) / side - 1                                           # (B, N, H, K, P, 2), -1 to 1
        place = place.permute(0, 2, 3, 1, 4, 5).reshape(B * H * K, N, P, 2)
        value = self.value(levels).to(wide).view(B, K, side, side, H, d // H)
        value = value.permute(0, 4, 1, 5, 2, 3).reshape(B * H * K, d // H, side, side)
        # Between patches: bilinear; beyond the picture: zeros
        seen = nn.functional.grid_sample(value, place, align_corners=False)              # (B H K, d/H, N, P)
        seen = seen.view(B, H, K, d // H, N, P)
        out = torch.einsum("bhkcnp,bnhkp->bnhc", seen, shares.view(B, N, H, K, P))       # (B, N, H, d/H)
        return self.out(out.reshape(B, N, d).to(query.dtype))


class MMFuser(nn.Module):
    """MMFuser (Cao et al., 2024): LLaVA's layer asks layers 3, 8, 13 and 18 (of 24) for details, then what it got.

    gamma1, gamma2 start at zero: at first this is plain LLaVA. It computes in its parameters' dtype (float32 where they
    are trained), not in autocast's.
    """
    name, asks = "mmfuser", False

    def __init__(self, config: MMFuserConfig):
        super().__init__()
        d, L, self.config = config.vision_dim, config.n_layers, config
        self.width, self.n_blocks = d, L - 1
        self.layers = [at(l, L) for l in (3, 8, 13, 18)]
        self.cross = Deformable(d, config.heads, len(self.layers), config.points)
        self.within = Deformable(d, config.heads, 1, config.points)
        self.query_norm, self.level_norm, self.within_norm = (nn.LayerNorm(d, eps=1e-6) for _ in range(3))
        self.gamma1, self.gamma2 = nn.Parameter(torch.zeros(d)), nn.Parameter(torch.zeros(d))

    def forward(self, hidden: Tensor, F_t: Tensor, mask: Tensor, mode="on") -> tuple[Tensor, dict[str, Tensor]]:
        """-> (B, N, d) and no maps."""
        with torch.autocast(hidden.device.type, enabled=False):
            dtype = self.gamma1.dtype
            X = hidden[self.n_blocks][:, 1:].to(dtype)                                   # (B, N, d)
            levels = torch.stack([hidden[l][:, 1:].to(dtype) for l in self.layers], 1)   # (B, 4, N, d)
            A = self.cross(self.query_norm(X), self.level_norm(levels))                  # (B, N, d)
            normed = self.within_norm(A)
            A = A + self.gamma2 * self.within(normed, normed[:, None])
            return (X + self.gamma1 * A).to(hidden.dtype), {}


# ---------------------------------------------------------------------------------------------------------------------
# IGVA

@dataclass
class IGVAConfig:
    """text_dim: width of the sentence's vector. Its authors' is 768; with ours, the language model's."""
    text_dim: int = 4096
    vision_dim: int = 1024
    n_layers: int = 24
    groups: int = 4
    blocks: int = 4                    # of the allocator
    heads: int = 4

    def __post_init__(self):
        whole(self, text_dim=1, vision_dim=1, groups=2, blocks=1, heads=1)
        whole(self, n_layers=self.groups)
        if self.vision_dim % self.heads:
            raise UserError(f"IGVA: vision_dim = {self.vision_dim} should be a multiple of heads = {self.heads}")


class AllocatorBlock(nn.Module):
    """The question looks at the groups; post-norm."""

    def __init__(self, d: int, heads: int):
        super().__init__()
        self.attention = nn.MultiheadAttention(d, heads, batch_first=True)
        self.ffn = nn.Sequential(nn.Linear(d, d), nn.ReLU(), nn.Linear(d, d))
        self.norm1, self.norm2 = nn.LayerNorm(d), nn.LayerNorm(d)

    def forward(self, x: Tensor, groups: Tensor) -> Tensor:
        """x (B, 1, d), groups (B, K, d) -> (B, 1, d)."""
        x = self.norm1(x + self.attention(x, groups, groups, need_weights=False)[0])
        return self.norm2(x + self.ffn(x))


class IGVA(nn.Module):
    """Instruction-guided vision aggregator (Li et al., 2025): the question shares out weight among groups of layers.

    Of 24 blocks: 1..6, 7..12, 13..18, 19..24, each averaged. Whatever mode isn't "on" is stage 1 as released: no text,
    the plain mean of the groups through the same projector. The allocator joins in stage 2.

    Not as released: the sentence encoder (all-mpnet-base-v2, frozen, 109M) is not here. In its place stands the mean of
    F_t, the language model's own embeddings of the question, which are trained with it; so the allocator's first layer
    is as wide as they are. And there is no balance loss (minus the entropy of a softmax of w, which is a softmax
    already; times 0.02): the released model never hands w to the trainer that wants it, so nobody can have run that.
    """
    name, asks = "igva", True

    def __init__(self, config: IGVAConfig):
        super().__init__()
        d, L, K, self.config = config.vision_dim, config.n_layers, config.groups, config
        self.width, self.n_blocks = 2 * d, L
        self.groups = [(1 + k * L // K, 1 + (k + 1) * L // K) for k in range(K)]
        self.sentence, self.cls = nn.Linear(config.text_dim, d), nn.Linear(d, d)
        self.blocks = nn.ModuleList(AllocatorBlock(d, config.heads) for _ in range(config.blocks))
        self.out = nn.Linear(d, K)

    def allocate(self, cls: Tensor, F_t: Tensor, mask: Tensor) -> Tensor:
        """cls (B, K, d), the groups' CLS; F_t (B, T, D), mask (B, T) -> w (B, K), sums to 1. No words are zeros."""
        dtype = self.out.weight.dtype
        words = (F_t.to(dtype) * mask[..., None]).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)    # (B, D)
        x, groups = self.sentence(words)[:, None], self.cls(cls.to(dtype))               # (B, 1, d), (B, K, d)
        for block in self.blocks:
            x = block(x, groups)
        return self.out(x[:, 0]).softmax(-1)

    def forward(self, hidden: Tensor, F_t: Tensor, mask: Tensor, mode="on") -> tuple[Tensor, dict[str, Tensor]]:
        """-> (B, N, 2d): layer L-1 and the weighted groups; the map w_group (B, K), at least float32."""
        wide = torch.promote_types(hidden.dtype, torch.float32)
        with torch.autocast(hidden.device.type, enabled=False):
            groups = torch.stack([hidden[a:b].mean(0, dtype=wide) for a, b in self.groups], 1)   # (B, K, 1+N, d)
            if mode == "on":
                w = self.allocate(groups[:, :, 0], F_t, mask).to(wide)                   # (B, K)
            else:
                w = groups.new_full(groups.shape[:2], 1 / len(self.groups))
            fused = torch.einsum("bk,bknd->bnd", w, groups[:, :, 1:])                    # (B, N, d)
        return torch.cat([hidden[self.n_blocks - 1][:, 1:], fused.to(hidden.dtype)], dim=-1), {"w_group": w}
