"""MMFuser (Cao et al., 2024): LLaVA's layer asks shallower ones for details, by deformable
attention."""
import math
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor, nn

from core.common import UserError
from core.fields import Heads, Range, Width, check_config
from fusers.common import Blocks, at


@dataclass
class MMFuserConfig:
    """Sizes of the vision tower, and of the deformable attention."""
    vision_dim: Width = 1024
    n_layers: Blocks = 24
    heads: Heads = 16
    points: Annotated[int, Range(1, 64)] = 4       # that a head looks at, in every layer

    def __post_init__(self):
        check_config(self)
        if self.vision_dim % self.heads:
            raise UserError(f"MMFuser: vision_dim = {self.vision_dim} should be a multiple of "
                            f"heads = {self.heads}")


class Deformable(nn.Module):
    """Deformable attention (Zhu et al., 2021): a query looks at a few points around its own place,
    in every level. It says itself where they are and how much each of them counts; no key is ever
    compared with it.

    It starts by looking evenly at points that go out from the query's place, each head in a
    direction of its own.
    """

    def __init__(self, d: int, heads: int, levels: int, points: int):
        super().__init__()
        self.shape = heads, levels, points
        self.offsets = nn.Linear(d, heads * levels * points * 2)
        self.shares = nn.Linear(d, heads * levels * points)
        self.value, self.out = nn.Linear(d, d), nn.Linear(d, d)
        for layer in (self.offsets, self.shares, self.value, self.out):
            nn.init.zeros_(layer.bias)
        nn.init.zeros_(self.offsets.weight)
        nn.init.zeros_(self.shares.weight)
        nn.init.xavier_uniform_(self.value.weight)
        nn.init.xavier_uniform_(self.out.weight)
        angle = torch.arange(heads) * (2 * math.pi / heads)                        # (H)
        step = torch.stack([angle.cos(), angle.sin()], -1)                         # (H, 2)
        step = step / step.abs().amax(-1, keepdim=True)            # onto a square, as patches are
        distance = torch.arange(1, points + 1)[:, None]                            # (P, 1), patches
        ring = step[:, None, None] * distance                                      # (H, 1, P, 2)
        with torch.no_grad():
            self.offsets.bias.copy_(ring.expand(heads, levels, points, 2).flatten())

    def forward(self, query: Tensor, levels: Tensor) -> Tensor:
        """query (B, N, d); levels (B, K, N, d), each N patches of a square picture, row by row ->
        (B, N, d)."""
        (B, N, d), (H, K, P) = query.shape, self.shape
        side = math.isqrt(N)
        wide = torch.promote_types(query.dtype, torch.float32)     # half is too coarse for places
        shares = self.shares(query).to(wide).view(B, N, H, K * P).softmax(-1)      # (B, N, H, K P)
        offsets = self.offsets(query).to(wide).view(B, N, H, K, P, 2)              # x, y in patches
        centre = torch.arange(side, device=query.device, dtype=wide) + 0.5
        y, x = torch.meshgrid(centre, centre, indexing="ij")
        own = torch.stack([x, y], -1).view(N, 1, 1, 1, 2)                          # of the patches
        place = 2 * (own + offsets) / side - 1                     # (B, N, H, K, P, 2), -1 to 1
        place = place.permute(0, 2, 3, 1, 4, 5).reshape(B * H * K, N, P, 2)
        value = self.value(levels).to(wide).view(B, K, side, side, H, d // H)
        value = value.permute(0, 4, 1, 5, 2, 3).reshape(B * H * K, d // H, side, side)
        # Between patches: bilinear; beyond the picture: zeros
        seen = nn.functional.grid_sample(value, place, align_corners=False)  # (B H K, d/H, N, P)
        seen = seen.view(B, H, K, d // H, N, P)
        shares = shares.view(B, N, H, K, P)
        out = torch.einsum("bhkcnp,bnhkp->bnhc", seen, shares)                     # (B, N, H, d/H)
        return self.out(out.reshape(B, N, d).to(query.dtype))


class MMFuser(nn.Module):
    """LLaVA's layer asks layers 3, 8, 13 and 18 (of 24) for details, then what it got.

    gamma1, gamma2 start at zero: at first this is plain LLaVA. It computes in its parameters' dtype
    (float32 where they are trained), not in autocast's.
    """
    name, asks = "mmfuser", False

    def __init__(self, config: MMFuserConfig):
        super().__init__()
        d, L = config.vision_dim, config.n_layers
        self.config, self.width, self.n_blocks = config, d, L - 1
        self.layers = [at(l, L) for l in (3, 8, 13, 18)]
        self.cross = Deformable(d, config.heads, len(self.layers), config.points)
        self.within = Deformable(d, config.heads, 1, config.points)
        self.query_norm = nn.LayerNorm(d, eps=1e-6)
        self.level_norm = nn.LayerNorm(d, eps=1e-6)
        self.within_norm = nn.LayerNorm(d, eps=1e-6)
        self.gamma1 = nn.Parameter(torch.zeros(d))
        self.gamma2 = nn.Parameter(torch.zeros(d))

    def forward(self, hidden: Tensor, F_t: Tensor, mask: Tensor,
                mode: str = "on") -> tuple[Tensor, dict[str, Tensor]]:
        """-> (B, N, d) and no maps."""
        with torch.autocast(hidden.device.type, enabled=False):
            dtype = self.gamma1.dtype
            X = hidden[self.n_blocks][:, 1:].to(dtype)                             # (B, N, d)
            levels = [hidden[l][:, 1:].to(dtype) for l in self.layers]
            levels = torch.stack(levels, 1)                                        # (B, 4, N, d)
            A = self.cross(self.query_norm(X), self.level_norm(levels))            # (B, N, d)
            normed = self.within_norm(A)
            A = A + self.gamma2 * self.within(normed, normed[:, None])
            return (X + self.gamma1 * A).to(hidden.dtype), {}
