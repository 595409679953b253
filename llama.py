"""The language model: Llama 1, 2 and 3 (so Vicuna and SmolLM2 as well), and the two kinds of
tokenizer they come with.

A decoder is a stack of equal blocks. Each reads the running sum x of its predecessors through a
norm, and adds to it:

    x = x + attention(norm(x))       looks at this position and those before it
    x = x + mlp(norm(x))             thinks about each position by itself

Positions enter only inside the attention: queries and keys are turned by an angle proportional to
their position (RoPE), so that their products depend on distances. `Llama` knows tensors, never text
or pictures; a picture arrives as rows of `embeds`. The tokenizers, at the end, know text and
nothing else.
"""
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clip import attention
from core.common import UserError
from core.layouts import Folder
from core.weights import save, skeleton
from fast.graph import AFTER, Replay
from fast.linear import HALF, Linear
from fast.memory import fetch, holds, keep_memory
from fast.packed import SUMS, Columns, Int8, replace, sums

# --------------------------------------------------------------------------------------------------
# Configuration

LLAMA3_ROPE = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


@dataclass
class LlamaConfig:
    """The names are Hugging Face's. Absent in a config.json, the optional ones mean what they mean
    there."""
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    # fewer than heads: grouped-query attention. None: as many
    num_key_value_heads: int | None = None
    head_dim: int | None = None             # None: hidden_size / heads
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None        # Llama 3.1 and later: see `frequencies`
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = False
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2

    def __post_init__(self):
        self.num_key_value_heads = self.num_key_value_heads or self.num_attention_heads
        self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads
        if self.num_attention_heads % self.num_key_value_heads:
            raise UserError(
                f"{self.num_attention_heads} attention heads can't evenly share {self.num_key_value_heads} "
                "key/value heads")
        if self.head_dim % 2:
            raise UserError(f"head_dim {self.head_dim} is odd, and RoPE turns pairs")
        scaling = self.rope_scaling or {"rope_type": "llama3", **dict.fromkeys(LLAMA3_ROPE, 1)}
        if scaling.get("rope_type") != "llama3":
            raise UserError(
                f"rope_type {scaling.get('rope_type')!r} is not implemented, only 'llama3' is")
        for key in LLAMA3_ROPE:
            if type(scaling.get(key)) not in (int, float) or scaling[key] <= 0:
                raise UserError(
                    f"rope_scaling: {key} should be a positive number, not {scaling.get(key)!r}")

    @classmethod
    def from_dict(cls, d: dict, where: str = "config.json") -> "LlamaConfig":
        """From a public config.json (`where`). What this file doesn't implement is a UserError,
        never ignored."""
        only = {
            "model_type": ("llama",
                           ), "hidden_act": ("silu", None), "attention_bias": (False, None),
            "mlp_bias": (False, None), "quantization_config": (None, )}
        for key, fine in only.items():
            if d.get(key) not in fine:
                raise UserError(
                    f"{where}: {key} is {d.get(key)!r}; the language model needs {fine[0]!r} here")
        fields = {key: d[key] for key in cls.__dataclass_fields__ if key in d}
        # Transformers 5 keeps theta and scaling together in rope_parameters; before, rope_scaling
        # held the latter.
        rope = {**(d.get("rope_scaling") or {}), **(d.get("rope_parameters") or {})}
        fields["rope_theta"] = rope.pop("rope_theta", fields.get("rope_theta", 10000.0))
        kind = rope.get("rope_type", rope.get("type", "default"))
        scaling = {"rope_type": kind, **{key: rope.get(key) for key in LLAMA3_ROPE}}
        fields["rope_scaling"] = None if kind == "default" else scaling
        for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                    "num_attention_heads"):
            if not isinstance(fields.get(key), int) or fields[key] < 1:
                raise UserError(
                    f"{where}: {key} should be a positive whole number, not {fields.get(key)!r}")
        try:
            return cls(**fields)
        except UserError as e:
            raise UserError(f"{where}: {e}") from None

    def to_dict(self) -> dict:
        """What the public config.json of this model says."""
        return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
                "attention_bias": False, "mlp_bias": False, **asdict(self)}


# --------------------------------------------------------------------------------------------------
# The decoder


class RMSNorm(nn.Module):
    """x / rms(x) * weight. As in Llama 2: the quotient in float32, cast back, and only then times
    the weight."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: Tensor) -> Tensor:
        if x.numel() == x.shape[-1] and x.device.type == "cpu" and not torch.is_grad_enabled():
            # One row, when a token is decoded: fewer operations, which take longer to start than to
            # compute.
            row = x.view(-1).to(torch.promote_types(x.dtype, torch.float32))
            return x * (torch.dot(row, row).item() / len(row) + self.eps) ** -0.5 * self.weight
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return F.rms_norm(wide, wide.shape[-1:], eps=self.eps).to(x.dtype) * self.weight


def frequencies(config: LlamaConfig, device) -> Tensor:
    """(hd/2,) float32: theta^(-2j/hd), the angle by which pair j turns from one position to the
    next.

    Llama 3.1 was taught longer contexts than Llama 3 by slowing down what turns slowly: pairs that
    turn less than low_freq_factor times within the old context by `factor`, those that turn more
    than high_freq_factor times not at all, and those between in proportion. (The factor is 8 for
    3.1 and 32 for 3.2: it comes from the config.)
    """
    exponent = torch.arange(0, config.head_dim, 2, device=device,
                            dtype=torch.float32) / config.head_dim
    inv_freq = 1.0 / config.rope_theta ** exponent                  # (hd/2,)
    if config.rope_scaling is None:
        return inv_freq
    factor, low, high, context = (config.rope_scaling[key] for key in LLAMA3_ROPE)
    turns = context * inv_freq / (2 * math.pi)                      # (hd/2,) within the old context
    share = ((turns - low) / (high - low)).clamp(0, 1)              # 0: slowed down; 1: as it was
    return (1 - share) * inv_freq / factor + share * inv_freq


def rope(config: LlamaConfig, positions: Tensor) -> tuple[Tensor, Tensor]:
    """(cos, cos) and (-sin, sin), both (B, 1, T, hd) float32: `rotate` by the angles position *
    frequency.

    Always float32, and never a buffer of a module: model.to(bfloat16) would cast it, and in
    bfloat16 the angles of position 4000 are wrong by whole turns.
    """
    angles = positions[:, None, :, None].float() * frequencies(config,
                                                               positions.device)  # (B, 1, T, hd/2)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs of x (B, H, T, hd). Pair j is (x[j], x[j + hd/2]), as in Hugging Face's
    weights.

    (a, b) becomes (a cos - b sin, b cos + a sin): x times cos, plus x with its halves swapped times
    (-sin, sin). Meta's own files pair neighbours (x[2j], x[2j + 1]) instead; one read as the other
    runs, and talks gibberish.
    """
    return x * cos.to(x.dtype) + x.roll(x.shape[-1] // 2, dims=-1) * sin.to(x.dtype)


MANY = 2 ** 19        # numbers of a layer's keys from which on `attend` is worth its six operations


class KVCache:
    """Keys and values of all positions so far, for every layer, so that a new token costs one
    position of work.

    Allocated once for `length` positions: growing it by concatenation would copy all of it for
    every token. `.length` is the number of positions filled; Llama.hidden appends. For decoding
    without gradients.

    turned: keys are kept with positions last, and `attend` is to be used for one new position. On
    CPUs, with much in half precision: there it takes half of the time of `attention` or less.
    """

    def __init__(self, config: LlamaConfig, batch: int, length: int,
                 dtype: torch.dtype = torch.float32, device="cpu"):
        shape = (config.num_hidden_layers, batch, config.num_key_value_heads, length,
                 config.head_dim)
        # L x (B, n_kv, length, hd)
        self.values = torch.empty(shape, dtype=dtype, device=device).unbind()
        many, on_cpu = self.values[0].numel() > MANY, torch.device(device).type == "cpu"
        self.turned = SUMS and on_cpu and dtype in HALF and many
        order = (0, 1, 2, 4, 3) if self.turned else (0, 1, 2, 3, 4)  # as they lie in memory
        keys = torch.empty([shape[i] for i in order], dtype=dtype, device=device).permute(order)
        self.keys = keys.unbind()  # L x (B, n_kv, length, hd)
        self.room, self.length = length, 0

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k and v (B, n_kv, T, hd) of one layer; all of its keys and values so far, (B, n_kv,
        length + T, hd)."""
        end = self.length + k.shape[2]
        if end > self.room:
            raise UserError(
                f"the key/value cache has room for {self.room} positions, not for {end}; make it longer"
            )
        keys, values = self.keys[layer], self.values[layer]
        keys.narrow(2, self.length, k.shape[2]).copy_(k)
        values.narrow(2, self.length, v.shape[2]).copy_(v)
        return keys.narrow(2, 0, end), values.narrow(2, 0, end)

    def attend(self, layer: int, q: Tensor, mask: Tensor | None) -> Tensor:
        """What `attention` gives for one new position's q (B, H, 1, hd), by `sums` over a layer's
        keys and values.

        mask (B, 1, 1, length + 1) or None. q k^T is the sum of a head's hd lines of keys, each a
        number for every position, weighted with q; what comes of it the sum of values, each
        weighted with a position's share.
        """
        B, H, _, hd = q.shape
        # (B n_kv, hd or room, ..)
        keys, values = self.keys[layer].mT.flatten(0, 1), self.values[layer].flatten(0, 1)
        q = (q * hd ** -0.5).view(len(keys), -1, hd)  # (B n_kv, group, hd)
        scores = sums(keys, q)[..., :self.length + 1].view(B, H, -1)  # (B, H, length + 1)
        if mask is not None:
            scores = scores.masked_fill(~mask[:, 0], torch.finfo(scores.dtype).min)
        return sums(values, scores.softmax(-1).view(*q.shape[:2], -1)).view(B, H, 1, hd)


class Attention(nn.Module):
    """Causal self-attention. Each key/value head serves n_heads / n_kv consecutive query heads (all
    equal: Llama 1)."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.n_heads, self.n_kv, self.head_dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.q_proj = Linear(config.hidden_size, self.n_heads * self.head_dim, bias=False)
        self.k_proj = Linear(config.hidden_size, self.n_kv * self.head_dim, bias=False)
        self.v_proj = Linear(config.hidden_size, self.n_kv * self.head_dim, bias=False)
        self.o_proj = Linear(self.n_heads * self.head_dim, config.hidden_size, bias=False)
        self.qkv_proj = None  # all three in one: `Llama.pack`

    def qkv(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, T, D) -> q (B, H, T, hd), k and v (B, n_kv, T, hd); q and k turned to their
        positions."""
        B, T, _ = x.shape
        if self.qkv_proj is None:
            q, k, v = (proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)
                       for proj in (self.q_proj, self.k_proj, self.v_proj))
            return rotate(q, cos, sin), rotate(k, cos, sin), v
        # (B, H + 2 n_kv, T, hd)
        heads = self.qkv_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)
        turned = rotate(heads.narrow(1, 0, self.n_heads + self.n_kv), cos, sin)
        return *turned.split(
            (self.n_heads, self.n_kv), dim=1), heads.narrow(1, self.n_heads + self.n_kv, self.n_kv)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, causal: bool,
                cache: KVCache | None, layer: int) -> Tensor:
        B, T, _ = x.shape
        q, k, v = self.qkv(x, cos, sin)
        if cache is not None:
            k, v = cache.append(layer, k, v)                                     # (B, n_kv, Tk, hd)
            if T == 1 and cache.turned:
                return self.o_proj(cache.attend(layer, q, mask).view(B, 1, -1))  # (B, 1, D)
        group = self.n_heads // self.n_kv
        # one query a head: those of a group become rows of one product, so the cache needs no
        # copies
        if T == 1:
            q = q.view(B, self.n_kv, group, self.head_dim)
        elif group > 1:
            k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group,
                                                                          dim=1)  # (B, H, Tk, hd)
        y = attention(q, k, v, mask=mask, causal=causal)                             # (B, H, T, hd)
        return self.o_proj(
            y.reshape(B, self.n_heads, T, self.head_dim).transpose(1, 2).reshape(B, T,
                                                                                 -1))  # (B, T, D)


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.gate_up_proj = None                                         # both in one: `Llama.pack`

    def forward(self, x: Tensor) -> Tensor:
        if self.gate_up_proj is None:
            gate, up = self.gate_proj(x), self.up_proj(x)                # (B, T, inner) both
        else:
            gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate) * up)                         # (B, T, D)


class Block(nn.Module):
    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, causal: bool,
                cache: KVCache | None, layer: int) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask, causal, cache,
                               layer)  # (B, T, D)
        return x + self.mlp(self.post_attention_layernorm(x))  # (B, T, D)


class Llama(nn.Module):
    """The decoder. Built from a LlamaConfig it is randomly initialised; `from_pretrained` reads a
    folder.

    When tie_word_embeddings is set, lm_head.weight is the very tensor embed_tokens.weight.
    """

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config, self.packed, self.fetched, self.replays = config, False, False, True
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
        self.init_weights()

    def init_weights(self) -> None:
        """For training from scratch: normal, std 0.02, and less where a block adds to the residual
        sum (as in GPT-2).

        PyTorch's own N(0, 1) for embeddings would make a tied head start at a loss in the hundreds.
        """
        for name, p in self.named_parameters():
            if p.ndim == 2:
                residual = name.endswith(
                    ("o_proj.weight", "down_proj.weight"))  # two of them a layer
                nn.init.normal_(
                    p, std=0.02 * (2 * self.config.num_hidden_layers)**-0.5 if residual else 0.02)
            else:
                nn.init.ones_(p)

    def embed(self, tokens: Tensor) -> Tensor:
        """Input embeddings, (B, T) -> (B, T, D)."""
        return self.embed_tokens(tokens)

    def hidden(self, tokens: Tensor | None = None, embeds: Tensor | None = None,
               mask: Tensor | None = None, positions: Tensor | None = None,
               cache: KVCache | None = None) -> Tensor:
        """(B, T, D) after the final norm: what lm_head turns into logits.

        tokens (B, T) or embeds (B, T, D): the new positions. With a cache they follow its
        cache.length old ones and are appended to it. mask (B, T_total) bool: which of the old and
        new positions are real; padding may be left or right, and nobody looks at it (what comes out
        AT a padded position means nothing). positions (B, T): default 0, 1, 2, ... counted on from
        the cache, over real positions only if there is a mask.
        """
        if (tokens is None) == (embeds is None):
            raise ValueError("give either tokens or embeds")
        x = self.embed(tokens) if embeds is None else embeds                     # (B, T, D)
        B, T, _ = x.shape
        past = cache.length if cache is not None else 0
        if mask is not None and mask.shape != (B, past + T):
            raise ValueError(
                f"mask is {tuple(mask.shape)}; {past} old and {T} new positions need {(B, past + T)}"
            )
        if positions is None and mask is None:
            positions = torch.arange(past, past + T, device=x.device)[None]      # (1, T)
        elif positions is None:
            positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, past:]             # (B, T)
        # (B, 1, T, hd), for all layers
        cos, sin = (turn.to(x.dtype) for turn in rope(self.config, positions))
        look, causal = self._looks(mask, past, T, x.device)
        for i, block in enumerate(self.layers):
            x = block(x, cos, sin, look, causal, cache, i)                       # (B, T, D)
        if cache is not None:
            cache.length += T      # once for all layers, which append at the same place
        return self.norm(x)

    @staticmethod
    def _looks(mask: Tensor | None, past: int, T: int, device) -> tuple[Tensor | None, bool]:
        """Who may look at whom, for attention(): a (B, 1, T, T_total) mask where needed, and the
        causal flag."""
        look = None if mask is None else mask.bool()[:, None, None, :]          # (B, 1, 1, T_total)
        if T == 1:
            return look, False     # the newest position sees all there is
        if past == 0:
            return look, True
        before = torch.ones(T, past + T, dtype=torch.bool,
                            device=device).tril(past)[None, None]  # (1, 1, T, T_total)
        return (before if look is None else look & before), False

    def forward(self, tokens: Tensor | None = None, embeds: Tensor | None = None,
                mask: Tensor | None = None, positions: Tensor | None = None,
                cache: KVCache | None = None) -> Tensor:
        """Logits (B, T, V) of the next token at every new position. Arguments as in `hidden`."""
        return self.lm_head(self.hidden(tokens, embeds, mask, positions, cache))

    @torch.inference_mode()
    def generate(self, embeds: Tensor, mask: Tensor | None = None, max_new_tokens: int = 128,
                 temperature: float = 0.0, top_p: float = 1.0, eos_ids: Iterable[int] = (),
                 generator: torch.Generator | None = None):
        """Yields the next ids, (B,) long, one position of the answers after the other.

        embeds (B, T, D), the prompts, padded on the left; mask (B, T) bool: real positions. It ends
        once every row has met one of eos_ids (that step isn't yielded: a prompt alone never shows
        its EOS), after max_new_tokens, or with the context. A row that is done repeats its EOS
        while others go on. temperature 0 is greedy. The prompt is read once; one that fills the
        context is a UserError, at the first step.
        """
        if temperature < 0 or not 0 < top_p <= 1:
            raise UserError(
                f"temperature {temperature} should be at least 0, and top_p {top_p} in (0, 1]")
        keep_memory(embeds.device)
        if not self.fetched and embeds.device.type == "cpu":
            fetch(self)
            self.fetched = True
        (B, prompt, _), context = embeds.shape, self.config.max_position_embeddings
        if prompt >= context:
            raise UserError(
                f"no room to answer: {prompt} positions with the picture, the language model has {context}"
            )
        steps = min(max_new_tokens, context - prompt)
        # Without padding no mask, for the faster attention; otherwise all that is to come is real.
        full = mask is None or mask.all()
        mask = None if full else torch.cat([mask, mask.new_ones(B, steps)], dim=1)  # (B, T + steps)
        device = embeds.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(
            device) else embeds.dtype
        # what is cast can't be recorded
        replays = self.replays and device == "cuda" and dtype == embeds.dtype
        # masks are copied at other lengths
        room = -(-(prompt + steps) // 8) * 8 if replays else prompt + steps
        cache = KVCache(self.config, B, room, dtype, embeds.device)
        eos = torch.tensor(sorted(eos_ids), dtype=torch.long, device=embeds.device)
        done, token = torch.zeros(B, dtype=torch.bool, device=embeds.device), None
        step = partial(self._step, mask, cache)
        for i in range(steps):
            if i == AFTER and replays:
                step = Replay(self, cache, mask)
            choice = pick(step(embeds), temperature, top_p, generator)              # (B,)
            token = choice if token is None else torch.where(done, token, choice)
            done = done | torch.isin(token, eos)
            if done.all():
                return
            yield token
            embeds = self.embed(token[:, None])                                     # (B, 1, D)

    def _step(self, mask: Tensor | None, cache: KVCache, embeds: Tensor) -> Tensor:
        """Logits (B, V) of what comes after embeds (B, T, D), which go into the cache; mask (B,
        T_total or more)."""
        shown = None if mask is None else mask[:, :cache.length + embeds.shape[1]]
        return self.lm_head(self.hidden(embeds=embeds, mask=shown, cache=cache)[:, -1])

    @classmethod
    def from_pretrained(cls, dir: str | Path, dtype: torch.dtype | None = torch.float32,
                        device="cpu") -> "Llama":
        """Read the language model out of any folder that holds one: Hugging Face's, Meta's, a
        vision-language model's.

        dtype None: as stored, which costs no memory until it is used. UserError for anything that
        doesn't fit exactly, and for architectures that only resemble Llama.
        """
        folder = Folder(dir)
        with skeleton():
            model = cls(LlamaConfig.from_dict(folder.part("llm"), folder.where))
        return folder.fill(model, "llm", dtype, device)

    def pack(self, int8: bool = False) -> "Llama":
        """Replace all matrix products, in place and layer by layer, with those of linear.py that
        decode faster.

        For inference on a CPU, and for good: a packed model can't be trained, moved or saved. int8:
        weights of 8 bits, one scale per output, for half the memory; the embeddings and norms stay
        as they are. Otherwise half-precision weights are laid out anew, exactly, if this machine
        gains from it. Returns the model.
        """
        if self.packed:
            raise UserError("this language model is packed already")
        kind, self.packed = Int8 if int8 else Columns, True
        # the file, and what comes of it
        short = not holds(2 * sum(weight.nbytes for weight in self.parameters()))
        for block in self.layers:
            attn, mlp = block.self_attn, block.mlp
            replace(attn, ("q_proj", "k_proj", "v_proj"), "qkv_proj", kind, short=short)
            replace(attn, ("o_proj",), "o_proj", kind, short=short)
            replace(mlp, ("gate_proj", "up_proj"), "gate_up_proj", kind, short=short)
            replace(mlp, ("down_proj",), "down_proj", kind, short=short)
        replace(self, ("lm_head", ), "lm_head", kind, shared=self.config.tie_word_embeddings,
                short=short)
        return self

    def save_pretrained(self, dir: str | Path) -> None:
        """Write the public layout, which transformers' LlamaForCausalLM reads; a tied head is not
        written twice."""
        if self.packed:
            raise UserError(f"{dir}: a packed model can't be saved; load it again, and save that")
        tensors = {
            name if name == "lm_head.weight" else f"model.{name}": p
            for name, p in self.named_parameters()}
        dtype = str(self.embed_tokens.weight.dtype).removeprefix("torch.")
        save(dir, tensors, {**self.config.to_dict(), "torch_dtype": dtype})


def pick(logits: Tensor, temperature: float, top_p: float,
         generator: torch.Generator | None) -> Tensor:
    """(B, V) -> (B,): the likeliest id (temperature 0), or a draw among the likeliest that reach
    top_p together."""
    if temperature == 0:
        return logits.argmax(-1)
    share, ids = (logits.float() / temperature).softmax(-1).sort(dim=-1,
                                                                 descending=True)  # (B, V) both
    before = share.cumsum(-1) - share             # out: an id before which top_p is reached already
    drawn = torch.multinomial(share.masked_fill(before >= top_p, 0), 1,
                              generator=generator)  # (B, 1)
    return ids.gather(1, drawn)[:, 0]
