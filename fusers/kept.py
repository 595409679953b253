"""Another fuser in a trained model, which answers as before and learns from there.

LLaVA-1.5 projects the patches F of one layer: its first matrix W1 is (D, d). CCRA's is (D, 2d), of
[F_regional; F]. As [0 | W1] it makes of these what LLaVA made of F, whatever CCRA's weights are,
and CCRA isn't lost: the left half gets a gradient at once, CCRA's own weights from the second step
on. ControlNet's zero convolutions and Flamingo's gates start like that, too.
"""
from copy import deepcopy
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.common import UserError
from core.fields import title
from fusers.llava import LLaVA, LLaVAConfig


class Halves(nn.Linear):
    """A first matrix [left | right] as two products, the right half's first. So it rounds as the
    matrix that it was made of: in one product of twice the width, sums would be cut elsewhere."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., 2d) -> (..., D)"""
        W_left, W_right = self.weight.chunk(2, dim=1)                            # (D, d) both
        left, right = (half.contiguous() for half in x.chunk(2, dim=-1))         # (..., d) both
        return F.linear(right, W_right, self.bias) + F.linear(left, W_left)


def of_llava(fuser: nn.Module, config):
    """The config of a fuser that can take plain LLaVA's place, with LLaVA's layer as its anchor.

    UserError, saying why, if the fuser there isn't plain LLaVA, or if the new one doesn't hand on
    that layer in the right half of its features.
    """
    if not isinstance(fuser, LLaVA) or fuser.config.copies != 1:
        name = "wide" if isinstance(fuser, LLaVA) else fuser.name
        raise UserError(f"its fuser is {name!r}: only in plain LLaVA's place can another start "
                        "with the same answers")
    if hasattr(config, "anchor_layer"):
        return replace(config, anchor_layer=fuser.n_blocks - 1 - fuser.config.n_layers)
    if isinstance(config, LLaVAConfig) and config.copies == 2:
        return config
    raise UserError(f"{title(config)} can't start from plain LLaVA: "
                    f"its features don't end with LLaVA's layer, so no projector gives the same "
                    "answers; begin it with stage 1 (or take ccra, pwca, lwca or wide)")


def carry_over(old: nn.Module, new: nn.Module) -> nn.Module:
    """The projector of a VLM `old`, of width d, into another of width 2d, whose left half is 0.
    Returns the other."""
    first, fresh = old.projector[0], new.projector[0]
    fresh.__class__ = Halves
    left = torch.zeros_like(first.weight)                                        # (D, d)
    fresh.weight = nn.Parameter(torch.cat([left, first.weight.detach()], dim=1))     # (D, 2d)
    fresh.bias = nn.Parameter(first.bias.detach().clone())
    new.projector[2] = deepcopy(old.projector[2])
    new.fuser.to(first.weight.device)
    return new.train(old.training)


@torch.no_grad()
def keep_right(projector: nn.Sequential) -> None:
    """[Wa | Wb], which stage 1 trained on [F; F], as [0 | Wa + Wb], in place: of [F_regional; F] it
    makes what it made of [F; F]."""
    left, right = projector[0].weight.chunk(2, dim=1)                            # (D, d) both
    projector[0].weight = nn.Parameter(torch.cat([torch.zeros_like(left), left + right], dim=1))
