"""IGVA, the instruction-guided vision aggregator (Li et al., 2025): the question shares out weight
among groups of layers."""
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from core.common import UserError
from core.fields import Depth, Heads, Width, check_config
from fusers.common import Blocks


@dataclass
class IGVAConfig:
    """text_dim: width of the sentence's vector. Its authors' is 768; with ours, the language
    model's."""
    text_dim: Width = 4096
    vision_dim: Width = 1024
    n_layers: Blocks = 24
    groups: Blocks = 4                 # of layers
    blocks: Depth = 4                  # of the allocator
    heads: Heads = 4

    def __post_init__(self):
        check_config(self)
        if self.groups > self.n_layers:
            raise UserError(f"IGVA: groups = {self.groups} should be at most n_layers = "
                            f"{self.n_layers}")
        if self.vision_dim % self.heads:
            raise UserError(f"IGVA: vision_dim = {self.vision_dim} should be a multiple of "
                            f"heads = {self.heads}")


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
    """Of 24 blocks: 1..6, 7..12, 13..18, 19..24, each averaged. Whatever mode isn't "on" is stage 1
    as released: no text, the plain mean of the groups through the same projector. The allocator
    joins in stage 2.

    Not as released: the sentence encoder (all-mpnet-base-v2, frozen, 109M) is not here. In its
    place stands the mean of F_t, the language model's own embeddings of the question, which are
    trained with it; so the allocator's first layer is as wide as they are. And there is no balance
    loss (minus the entropy of a softmax of w, which is a softmax already; times 0.02): the released
    model never hands w to the trainer that wants it, so nobody can have run that.
    """
    name, asks = "igva", True

    def __init__(self, config: IGVAConfig):
        super().__init__()
        d, L, K = config.vision_dim, config.n_layers, config.groups
        self.config, self.width, self.n_blocks = config, 2 * d, L
        self.groups = [(1 + k * L // K, 1 + (k + 1) * L // K) for k in range(K)]
        self.sentence, self.cls = nn.Linear(config.text_dim, d), nn.Linear(d, d)
        self.blocks = nn.ModuleList(AllocatorBlock(d, config.heads) for _ in range(config.blocks))
        self.out = nn.Linear(d, K)

    def allocate(self, cls: Tensor, F_t: Tensor, mask: Tensor) -> Tensor:
        """cls (B, K, d), the groups' CLS; F_t (B, T, D), mask (B, T) -> w (B, K), sums to 1. No
        words are zeros."""
        dtype = self.out.weight.dtype
        total = (F_t.to(dtype) * mask[..., None]).sum(1)                           # (B, D)
        words = total / mask.sum(1, keepdim=True).clamp(min=1)                     # (B, D), mean
        x = self.sentence(words)[:, None]                                          # (B, 1, d)
        groups = self.cls(cls.to(dtype))                                           # (B, K, d)
        for block in self.blocks:
            x = block(x, groups)
        return self.out(x[:, 0]).softmax(-1)

    def forward(self, hidden: Tensor, F_t: Tensor, mask: Tensor,
                mode: str = "on") -> tuple[Tensor, dict[str, Tensor]]:
        """-> (B, N, 2d): layer L-1 and the weighted groups; the map w_group (B, K), at least
        float32."""
        wide = torch.promote_types(hidden.dtype, torch.float32)
        with torch.autocast(hidden.device.type, enabled=False):
            groups = [hidden[start:stop].mean(0, dtype=wide) for start, stop in self.groups]
            groups = torch.stack(groups, 1)                                        # (B, K, 1+N, d)
            w = groups.new_full(groups.shape[:2], 1 / len(self.groups))            # (B, K)
            if mode == "on":
                w = self.allocate(groups[:, :, 0], F_t, mask).to(wide)
            fused = torch.einsum("bk,bknd->bnd", w, groups[:, :, 1:])              # (B, N, d)
        last = hidden[self.n_blocks - 1][:, 1:]                                    # (B, N, d)
        return torch.cat([last, fused.to(hidden.dtype)], dim=-1), {"w_group": w}
