"""Table 2: do the tower's layers agree about where to look, before LPWCA (F_stack) and after it
(F_lp)?

Appendix C.1, for features X (L, N, d). With LPWCA's own Q and K every layer has a distribution over
its patches,

    p_l = softmax over patches of Q(F_q) . K(X_l) / sqrt(h)      F_q: the last token of the question

and the metrics tell how alike these are: Jensen-Shannon divergence (nats) and cosine, over all
pairs of layers, and between each layer and the final map p* = softmax(w_p); how far their centroids
lie from the centroids' mean (the paper leaves the drift open), in picture widths, a patch's centre
being ((i + 0.5) / grid, (j + 0.5) / grid); the standard deviation over layers (population) of a
patch's share, averaged over patches. Then LWCA's weights of the layers, from X: total variation TV
= mean |w_l+1 - w_l| and entropy H (nats), of w_hat and of softmax(w_l), before the smoothing.

F_lp differs from F_stack in two things, weights and a norm. So there is a third row, the norm alone
(W_lp = 0): what that changes isn't LPWCA's doing.
"""
import math
from collections.abc import Iterable

import torch
from torch import Tensor

from ccra import CCRA, VLM, project
from core.common import UserError

PAPER = {"F_stack": (0.218, 0.731, 0.064, 0.052, 0.173, 0.754, 0.060, 2.41),
         "F_lp": (0.147, 0.812, 0.041, 0.038, 0.119, 0.835, 0.028, 2.95)}
NAMES = dict(js="JS-avg", cos="Cos-avg", drift="Drift", std="Std_patch", js_final="JS-to-final",
             cos_final="Cos-to-final", tv="TV(w_hat)", entropy="H(w_hat)", tv_raw="TV(w_l)",
             entropy_raw="H(w_l)")


def divergence(p: Tensor, q: Tensor) -> Tensor:
    """Jensen-Shannon, (..., N) twice -> (...), in nats: the entropy of the mixture less the mean of
    the entropies."""
    def entropy(x):
        return torch.special.entr(x).sum(-1)

    return entropy((p + q) / 2) - (entropy(p) + entropy(q)) / 2


def agreement(p: Tensor, final: Tensor) -> dict[str, Tensor]:
    """p (B, L, N), the layers' distributions over N = grid^2 patches; final (B, N) -> six metrics,
    (B) each."""
    _, L, N = p.shape
    grid = math.isqrt(N)
    i, j = torch.triu_indices(L, L, 1, device=p.device)                          # (pairs) both
    centre = (torch.arange(grid, device=p.device, dtype=p.dtype) + 0.5) / grid   # (grid)
    u = torch.cartesian_prod(centre, centre)                                     # (N, 2), by rows
    mu = p @ u                                                                   # (B, L, 2)
    cosine = torch.nn.functional.cosine_similarity
    return dict(
        js=divergence(p[:, i], p[:, j]).mean(1),
        cos=cosine(p[:, i], p[:, j], dim=-1).mean(1),
        drift=(mu - mu.mean(1, keepdim=True)).norm(dim=-1).mean(1),
        std=p.std(1, correction=0).mean(1),
        js_final=divergence(p, final[:, None]).mean(1),
        cos_final=cosine(p, final[:, None], dim=-1).mean(1))


def smoothness(w: Tensor) -> tuple[Tensor, Tensor]:
    """w (B, L), sums to 1 -> total variation and entropy, (B) both."""
    return w.diff(dim=-1).abs().mean(-1), torch.special.entr(w).sum(-1)


@torch.no_grad()
def compare(fuser: CCRA, F_stack: Tensor, F_t: Tensor,
            mask: Tensor) -> dict[str, dict[str, Tensor]]:
    """The metrics, (B) each, of F_stack (B, L, N, d), of its norm alone, of F_lp. F_t (B, T, D),
    mask: as for CCRA."""
    whole = isinstance(fuser, CCRA) and fuser.config.order == "progressive"
    if not (whole and fuser.config.lpwca and fuser.config.lwca and fuser.config.pwca):
        raise UserError("Table 2 needs a model with CCRA, all of it in the paper's order: it "
                        "compares before and after LPWCA, beside the final map of PWCA")
    F_stack, F_t = F_stack.float(), F_t.float()
    _, maps = fuser(F_stack, F_t, mask)
    text = (maps["alpha"][:, None] @ F_t)[:, 0]                                  # (B, D)
    last = F_t[torch.arange(len(F_t)), mask.sum(1) - 1]                          # (B, D), F_q
    key = fuser.key("lpwca", last)                                               # (B, d)
    final = maps["w_p"].double().softmax(-1)                                     # (B, N), p*
    weights = {"F_stack": None, "norm alone": torch.ones_like(maps["W_lp"]),
               "F_lp": 1 + maps["W_lp"]}                                         # (B, L, N) each
    result = {}
    for name, c in weights.items():
        X = F_stack                                                              # (B, L, N, d)
        if c is not None:
            X = fuser.lpwca.norm(F_stack, c, fuser.config.norm)                  # eq. 5 written out
        s = torch.stack([project(x, key) for x in X.unbind(1)], 1)               # (B, L, N)
        w_l, w_hat = fuser.layer_weights(X.mean(2), text)                        # (B, L) both
        tv, entropy = smoothness(w_hat.double())                                 # (B) both
        tv_raw, entropy_raw = smoothness(w_l.double().softmax(-1))
        result[name] = agreement(s.double().softmax(-1), final) | dict(
            tv=tv, entropy=entropy, tv_raw=tv_raw, entropy_raw=entropy_raw)
    return result


@torch.no_grad()
def measure(model: VLM, batches: Iterable) -> dict[str, dict[str, float]]:
    """The means over all questions. batches of (pixels (B, 3, H, W), query (B, Q), query_mask (B,
    Q))."""
    parts = []
    for pixels, query, mask in batches:
        hidden, F_t = model.see(pixels, query, mask)           # (L+1, B, 1+N, d), (B, Q, D)
        F_stack = hidden[1:, :, 1:].transpose(0, 1)                              # (B, L, N, d)
        parts.append(compare(model.fuser, F_stack, F_t, mask))
    means = {}
    for row in parts[0]:
        values = {name: torch.cat([part[row][name] for part in parts]) for name in NAMES}
        means[row] = {name: value.mean().item() for name, value in values.items()}
    return means


def show(result: dict, n: int, model: VLM) -> None:
    """`measure`'s result beside the paper's figures, of its own model on pictures that it doesn't
    name. n: how many questions it is of."""
    L, N = model.fuser.config.n_layers, model.vision.grid ** 2
    print(f"{'':20}" + "".join(f"{name:>14}" for name in NAMES.values()))
    for row, values in PAPER.items():
        figures = [f"{value:.3f}" for value in values] + ["-", "-"]
        print(f"{'paper, ' + row:20}" + "".join(f"{figure:>14}" for figure in figures))
    for row, values in result.items():
        print(f"{'here, ' + row:20}" + "".join(f"{values[name]:>14.4f}" for name in NAMES))
    print(f"\nmeans over {n} questions; L = {L} layers, N = {N} patches; the paper: 24 and 576")
    print(f"H is at most ln L: {math.log(L):.2f} here, {math.log(24):.2f} in the paper.")
    print(f"Std_patch is at most sqrt(L - 1) / N: {math.sqrt(L - 1) / N:.4f} here, "
          f"{math.sqrt(23) / 576:.4f} with the paper's sizes, which its own figures exceed.")
