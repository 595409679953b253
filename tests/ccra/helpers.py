"""The equations written out, and tiny models: what the tests of ccra.py share."""
import math

import torch

from ccra import CCRA, VLM, CCRAConfig
from clip import CLIPVision, CLIPVisionConfig
from llama import IGNORE, IMAGE_TOKEN, Llama, LlamaConfig

TINY = CCRAConfig(text_dim=12, vision_dim=10, n_layers=4, d_hidden=6, kernel_size=3)
ABLATIONS = ({}, {"lpwca": False}, {"lwca": False}, {"pwca": False}, {"smooth": False})


# --------------------------------------------------------------------------------------------------
# The oracle: eq. 1-14 as printed, one sample at a time, without padding, with every matrix the
# paper names

def literal_ln(x, norm, reading, layered):
    """x (L, N, d) if layered, else (N, d)."""
    axes = {"token": (-1, ), "joint": (-2, -1), "stack": (-3, -2, -1) if layered else
                                                         (-2, -1)}[reading]
    mean = x.mean(axes, keepdim=True)
    var = ((x - mean) ** 2).mean(axes, keepdim=True)
    return (x - mean) / torch.sqrt(var + 1e-5) * norm.weight + norm.bias


def literal_scores(part, F_t, X, cfg):
    """A = Q(F_t) K(X)^T / sqrt(h), (T, rows of X)."""
    return (F_t @ part.q.weight.T) @ (X @ part.k.weight.T).T / math.sqrt(cfg.d_hidden)


def literal_alpha(scorer, F_t):
    q, k, v = (F_t @ layer.weight.T for layer in (scorer.q, scorer.k, scorer.v))
    attended = torch.softmax(q @ k.T / math.sqrt(q.shape[1]), dim=1) @ v
    return torch.softmax((attended @ scorer.out.weight.T)[:, 0], dim=0)


def literal_lwca(model, F, alpha, F_t):
    """Eq. 6-10 on F (L, N, d)."""
    cfg, L = model.config, len(F)
    F_layer = F.mean(dim=1)                                                          # (6)
    A_l = literal_scores(model.lwca, F_t, F_layer, cfg)                              # (7)
    w_l = alpha @ A_l if cfg.lwca else F.new_zeros(L)                                # (8)
    w = w_l
    if cfg.smooth:
        g = [
            math.exp(-(j - (cfg.kernel_size - 1) / 2)**2 / (2 * cfg.sigma**2))
            for j in range(cfg.kernel_size)]
        w = torch.stack([
            sum(g[j] / sum(g) * w_l[min(max(l + j - (cfg.kernel_size - 1) // 2, 0), L - 1)]
                for j in range(cfg.kernel_size)) for l in range(L)])
    w_hat = torch.softmax(w, dim=0)
    F_hat = sum(w_hat[l] * F[l] for l in range(L))                                   # (9)
    x = F_hat + F_hat.mean(dim=0)
    return w_l, w_hat, literal_ln(x, model.lwca.norm, "token", False)                # (10)


def literal(model, F_stack, F_t):
    """F_stack (L, N, d), F_t (T, D) -> F_fused (N, 2d) and the maps."""
    cfg, (L, N, d) = model.config, F_stack.shape
    alpha = literal_alpha(model.scorer, F_t)                                         # (2)
    F_last = F_stack[cfg.anchor_layer]
    W_lp = F_stack.new_zeros(L, N)
    if cfg.order in ("progressive", "shuffled"):
        A_lp = literal_scores(model.lpwca, F_t, F_stack.reshape(L * N, d), cfg)      # (3) T x LN
        if cfg.lpwca:
            W_lp = (alpha @ A_lp).reshape(L, N)                                      # (4)
        F_lp = literal_ln(F_stack * W_lp[..., None] + F_stack, model.lpwca.norm, cfg.norm,
                          True)  # (5)
    if cfg.order == "progressive":
        w_l, w_hat, F_semantic = literal_lwca(model, F_lp, alpha, F_t)
        w_p = alpha @ literal_scores(model.pwca, F_t, F_semantic,
                                     cfg) if cfg.pwca else F_stack.new_zeros(N)  # (11, 12)
        left = literal_ln(F_semantic * (1 + w_p)[:, None], model.pwca.norm, cfg.norm, False)  # (13)
    elif cfg.order == "shuffled":
        w_p = torch.stack([alpha @ literal_scores(model.pwca, F_t, F_lp[l], cfg) for l in range(L)])
        w_p = w_p if cfg.pwca else torch.zeros_like(w_p)
        F_r = literal_ln(F_lp * (1 + w_p)[..., None], model.pwca.norm, cfg.norm, True)
        w_l, w_hat, left = literal_lwca(model, F_r, alpha, F_t)
    else:
        w_l, w_hat, S = literal_lwca(model, F_stack, alpha, F_t)
        w_p = alpha @ literal_scores(model.pwca, F_t, F_last,
                                     cfg) if cfg.pwca else F_stack.new_zeros(N)
        R = literal_ln(F_last * (1 + w_p)[:, None], model.pwca.norm, cfg.norm, False)
        left = {"decoupled": (S + R) / 2, "lwca_only": S, "pwca_only": R}[cfg.order]
        w_p = w_p if cfg.order != "lwca_only" else w_p * 0
        w_l, w_hat = (w_l, w_hat) if cfg.order != "pwca_only" else (w_l * 0, w_hat * 0 + 1 / L)
    F_fused = torch.cat([left, F_last], dim=1)                                       # (14)
    return F_fused, {"alpha": alpha, "W_lp": W_lp, "w_l": w_l, "w_hat": w_hat, "w_p": w_p}


def make(cfg, seed=0):
    """A CCRA in float64 whose norms and maps are far from trivial."""
    torch.manual_seed(seed)
    model = CCRA(cfg).double()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(1 if name.endswith("norm.weight") else 0, 0.4)
    return model


def inputs(cfg, B=3, N=5, T=4, lengths=(4, 1, 3), dtype=torch.float64):
    g = torch.Generator().manual_seed(1)
    F_stack = torch.randn(B, cfg.n_layers, N, cfg.vision_dim, generator=g, dtype=torch.float64)
    F_stack = F_stack * torch.linspace(0.5, 3, cfg.n_layers)[:, None, None] + torch.randn(
        cfg.vision_dim, generator=g)
    F_t = torch.randn(B, T, cfg.text_dim, generator=g, dtype=torch.float64)
    mask = torch.arange(T) < torch.tensor(lengths)[:, None]
    return F_stack.to(dtype), F_t.to(dtype), mask


# --------------------------------------------------------------------------------------------------
# A vision-language model

N_PATCHES, VOCAB, WIDTH, CONTEXT = 4, 50, 24, 64


def tiny_vlm(tied=True, seed=0, **ccra_settings):
    torch.manual_seed(seed)
    vision = CLIPVision(
        CLIPVisionConfig(image_size=8, patch_size=4, hidden_size=16, intermediate_size=24,
                         num_hidden_layers=3, num_attention_heads=2))
    llm = Llama(
        LlamaConfig(vocab_size=VOCAB, hidden_size=WIDTH, intermediate_size=32, num_hidden_layers=2,
                    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=CONTEXT,
                    tie_word_embeddings=tied))
    cfg = CCRAConfig(text_dim=WIDTH, vision_dim=16, n_layers=3, d_hidden=8, **ccra_settings)
    model = VLM.build(vision, llm, cfg).double()
    with torch.no_grad():
        for p in model.parameters():  # away from 0.02: so that pictures and words make a difference
            if p.ndim >= 2:
                p.normal_(0, 0.25)
    model.vision.requires_grad_(False)
    return model


def tiny_batch():
    """Row 0: a picture, its answer is 30 31. Row 1: text only, shorter. Row 2: a picture first, no
    question."""
    ids = torch.tensor([[1, 5, IMAGE_TOKEN, 6, 7, 30, 31], [1, 8, 9, 32, 2, 0, 0],
                        [1, IMAGE_TOKEN, 10, 11, 33, 2, 0]])
    mask = torch.arange(7) < torch.tensor([[7], [5], [6]])
    labels = torch.full_like(ids, IGNORE)
    labels[0, 5:], labels[1, 3:5], labels[2, 4:6] = ids[0, 5:], ids[1, 3:5], ids[2, 4:6]
    query = torch.tensor([[6, 7, 12], [8, 9, 0], [0, 0, 0]])
    query_mask = torch.arange(3) < torch.tensor([[3], [2], [0]])
    pixels = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(3),
                         dtype=torch.float64)
    pixels[1] = 0                     # the dummy picture of a text-only row
    return dict(pixels=pixels, ids=ids, query=query, query_mask=query_mask, mask=mask,
                labels=labels)


def prompt(batch, row):
    """Row's prompt alone, without its answer and without padding."""
    real = batch["mask"][row] & (batch["labels"][row] == IGNORE)
    return dict(pixels=batch["pixels"][row:row + 1], ids=batch["ids"][row:row + 1, real],
                query=batch["query"][row:row + 1], query_mask=batch["query_mask"][row:row + 1])


def prompts(batch):
    """All of them, padded on the right to the length of the samples."""
    mask = batch["mask"] & (batch["labels"] == IGNORE)
    return {**{k: batch[k] for k in ("pixels", "ids", "query", "query_mask")}, "mask": mask}


def answer(model, **kwargs):
    return torch.stack(list(model.generate(**kwargs)), 1).tolist()                   # B lists
