"""The language model: Llama 1, 2 and 3, so Vicuna and SmolLM2 as well.

A decoder is a stack of equal blocks. Each reads the running sum x of its predecessors through a
norm, and adds to it:

    x = x + attention(norm(x))       looks at this position and those before it
    x = x + mlp(norm(x))             thinks about each position by itself

Positions enter only inside the attention: queries and keys are turned by an angle proportional to
their position (RoPE), so that their products depend on distances. `Llama` knows tensors, never text
or pictures; a picture arrives as rows of `embeds`. Text becomes tokens in core/tokenizer.py.

Top to bottom: configuration, norm, positions, the cache of keys and values, attention, MLP, block,
the model, how it generates.
"""
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from clip import attention
from core import fields, weights
from core.common import UserError
from core.fields import Count, Depth, Epsilon, Heads, Id, Vocabulary, Width
from core.layouts import LLAMA3_ROPE, Folder, rope_of
from core.tokenizer import IGNORE, IMAGE_TOKEN, Tokenizer  # noqa: F401 (llama.Tokenizer is public)

# --------------------------------------------------------------------------------------------------
# Configuration

LOSS_ROWS = 4096       # supervised positions whose logits exist at once
# What the arithmetic here takes for granted: the first is what the key has to say, others mean it
FIXED = {"model_type": ("llama",), "hidden_act": ("silu", None), "attention_bias": (False, None),
         "mlp_bias": (False, None), "quantization_config": (None,)}


@dataclass
class LlamaConfig:
    """The names are Hugging Face's. Absent in a config.json, the optional ones mean what they mean
    there."""
    vocab_size: Vocabulary
    hidden_size: Width
    intermediate_size: Width
    num_hidden_layers: Depth
    num_attention_heads: Heads
    num_key_value_heads: Heads | None = None    # fewer: grouped-query attention. None: as all heads
    head_dim: Width | None = None               # None: hidden_size / heads
    rms_norm_eps: Epsilon = 1e-6
    rope_theta: fields.Scale = 10000.0
    rope_scaling: dict | None = None            # Llama 3.1 and later: see `frequencies`
    max_position_embeddings: Count = 2048
    tie_word_embeddings: bool = False
    bos_token_id: Id | list[Id] | None = 1
    eos_token_id: Id | list[Id] | None = 2

    def __post_init__(self):
        fields.check_config(self)
        heads = self.num_attention_heads
        if self.head_dim is None and self.hidden_size % heads:
            raise UserError(f"{heads} attention heads don't divide hidden_size {self.hidden_size}")
        self.num_key_value_heads = self.num_key_value_heads or heads
        self.head_dim = self.head_dim or self.hidden_size // heads
        if heads % self.num_key_value_heads:
            raise UserError(f"{heads} attention heads can't evenly share "
                            f"{self.num_key_value_heads} key/value heads")
        if self.head_dim % 2:
            raise UserError(f"head_dim {self.head_dim} is odd, and RoPE turns pairs")
        if scaling := self.rope_scaling:
            fields.check(scaling, LLAMA3_ROPE, "rope_scaling")
            if scaling["low_freq_factor"] >= scaling["high_freq_factor"]:
                raise UserError("rope_scaling: low_freq_factor should be below high_freq_factor")

    @classmethod
    def from_dict(cls, d: dict, where: str = "config.json") -> "LlamaConfig":
        """From a public config.json (`where`). What this file doesn't implement is a UserError,
        never ignored."""
        for key, fine in FIXED.items():
            if d.get(key) not in fine:
                raise UserError(f"{where}: {key} is {fields.shown(d.get(key))}; the language "
                                f"model needs {fine[0]!r} here")
        return fields.read(cls, {**d, **rope_of(d, where)}, where)

    def to_dict(self) -> dict:
        """What the public config.json of this model says."""
        return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
                "attention_bias": False, "mlp_bias": False, **asdict(self)}


# --------------------------------------------------------------------------------------------------
# Norm and positions

class RMSNorm(nn.Module):
    """x / rms(x) * weight. As in Llama 2: the quotient in float32, cast back, and only then times
    the weight."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)"""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return F.rms_norm(wide, wide.shape[-1:], eps=self.eps).to(x.dtype) * self.weight


def frequencies(config: LlamaConfig, device: str | torch.device) -> Tensor:
    """(hd/2,) float32: theta^(-2j/hd), the angle by which pair j turns from one position to the
    next.

    Llama 3.1 was taught longer contexts than Llama 3 by slowing down what turns slowly: pairs that
    turn less than low_freq_factor times within the old context by `factor`, those that turn more
    than high_freq_factor times not at all, and those between in proportion. (The factor is 8 for
    3.1 and 32 for 3.2: it comes from the config.)
    """
    hd = config.head_dim
    exponent = torch.arange(0, hd, 2, device=device, dtype=torch.float32) / hd
    inv_freq = 1.0 / config.rope_theta ** exponent                  # (hd/2,)
    if config.rope_scaling is None:
        return inv_freq
    factor, low, high, context = (config.rope_scaling[key] for key in LLAMA3_ROPE)
    turns = context * inv_freq / (2 * math.pi)                      # (hd/2,) within the old context
    share = ((turns - low) / (high - low)).clamp(0, 1)              # 0: slowed down; 1: as it was
    return (1 - share) * inv_freq / factor + share * inv_freq


def rope(config: LlamaConfig, positions: Tensor) -> tuple[Tensor, Tensor]:
    """positions (B, T) -> (cos, cos) and (-sin, sin), both (B, 1, T, hd) float32: `rotate` by the
    angles position * frequency.

    Always float32, and never a buffer of a module: model.to(bfloat16) would cast it, and in
    bfloat16 the angles of position 4000 are wrong by whole turns.
    """
    turns = frequencies(config, positions.device)                   # (hd/2,)
    angles = positions[:, None, :, None].float() * turns            # (B, 1, T, hd/2)
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


# --------------------------------------------------------------------------------------------------
# The decoder

class KVCache:
    """Keys and values of all positions so far, for every layer, so that a new token costs one
    position of work.

    Allocated once for `length` positions: growing it by concatenation would copy all of it for
    every token. `.length` is the number of positions filled; Llama.hidden appends. For decoding
    without gradients.
    """

    def __init__(self, config: LlamaConfig, batch: int, length: int,
                 dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"):
        L, n_kv, hd = config.num_hidden_layers, config.num_key_value_heads, config.head_dim
        shape = (L, batch, n_kv, length, hd)
        self.keys = torch.empty(shape, dtype=dtype, device=device).unbind()     # L x (B, n_kv, ...)
        self.values = torch.empty(shape, dtype=dtype, device=device).unbind()
        self.room = length
        self.length = 0

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k and v (B, n_kv, T, hd) of one layer; all of its keys and values so far, (B, n_kv,
        length + T, hd). UserError if there is no room for them."""
        start, end = self.length, self.length + k.shape[2]
        if end > self.room:
            raise UserError(f"the key/value cache has room for {self.room} positions, not for "
                            f"{end}; make it longer")
        keys, values = self.keys[layer], self.values[layer]
        keys[:, :, start:end] = k
        values[:, :, start:end] = v
        return keys[:, :, :end], values[:, :, :end]


class Attention(nn.Module):
    """Causal self-attention. Each key/value head serves n_heads / n_kv consecutive query heads (all
    equal: Llama 1)."""
    attend: Callable = staticmethod(attention)

    def __init__(self, config: LlamaConfig):
        super().__init__()
        D, hd = config.hidden_size, config.head_dim
        self.n_heads = config.num_attention_heads
        self.n_kv = config.num_key_value_heads
        self.head_dim = hd
        self.q_proj = nn.Linear(D, self.n_heads * hd, bias=False)
        self.k_proj = nn.Linear(D, self.n_kv * hd, bias=False)
        self.v_proj = nn.Linear(D, self.n_kv * hd, bias=False)
        self.o_proj = nn.Linear(self.n_heads * hd, D, bias=False)

    def qkv(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, T, D) -> q (B, H, T, hd), k and v (B, n_kv, T, hd); q and k turned to their
        positions."""
        B, T, _ = x.shape
        q, k, v = (proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)
                   for proj in (self.q_proj, self.k_proj, self.v_proj))
        return rotate(q, cos, sin), rotate(k, cos, sin), v

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, causal: bool,
                cache: KVCache | None, layer: int) -> Tensor:
        """x (B, T, D) -> (B, T, D). cos, sin: of `rope`; mask, causal: of `attention`; cache: where
        this layer's keys and values go, and those of earlier positions are."""
        B, T, _ = x.shape
        q, k, v = self.qkv(x, cos, sin)
        if cache is not None:
            k, v = cache.append(layer, k, v)                            # (B, n_kv, Tk, hd)
        group = self.n_heads // self.n_kv
        if group > 1:
            k = k.repeat_interleave(group, dim=1)                       # (B, H, Tk, hd)
            v = v.repeat_interleave(group, dim=1)
        y = self.attend(q, k, v, mask=mask, causal=causal)              # (B, H, T, hd)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        D, inner = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(D, inner, bias=False)
        self.up_proj = nn.Linear(D, inner, bias=False)
        self.down_proj = nn.Linear(inner, D, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)"""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, causal: bool,
                cache: KVCache | None, layer: int) -> Tensor:
        """x (B, T, D) -> (B, T, D); the rest is the attention's."""
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask, causal, cache, layer)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder:
    """A model and what it has read: called with the embeddings of what comes next, first the whole
    prompt, then token by token, it gives the logits of the token after that."""

    def __init__(self, llm: "Llama", prompt: Tensor, mask: Tensor | None, steps: int):
        """prompt (B, T, D), padded on the left; mask (B, T) bool: its real positions; steps: how
        many tokens may follow."""
        B, T, _ = prompt.shape
        self.llm = llm
        self.mask = None                  # without padding there is none, for the faster attention
        if mask is not None and not mask.all():
            self.mask = torch.cat([mask, mask.new_ones(B, steps)], dim=1)       # (B, T + steps)
        device, dtype = prompt.device, prompt.dtype
        if torch.is_autocast_enabled(device.type):
            dtype = torch.get_autocast_dtype(device.type)                       # keys come in that
        self.cache = self.new_cache(prompt, T + steps, dtype)

    def new_cache(self, prompt: Tensor, length: int, dtype: torch.dtype) -> KVCache:
        """An empty cache for `length` positions of as many rows as the prompt has."""
        return KVCache(self.llm.config, len(prompt), length, dtype, prompt.device)

    def __call__(self, embeds: Tensor) -> Tensor:
        """embeds (B, T, D) -> logits (B, V) of what comes after them."""
        end = self.cache.length + embeds.shape[1]
        mask = None if self.mask is None else self.mask[:, :end]
        hidden = self.llm.hidden(embeds=embeds, mask=mask, cache=self.cache)    # (B, T, D)
        return self.llm.lm_head(hidden[:, -1])


class Llama(nn.Module):
    """The decoder. Built from a LlamaConfig it is randomly initialised; `from_pretrained` reads a
    folder.

    When tie_word_embeddings is set, lm_head.weight is the very tensor embed_tokens.weight.
    `decoder`: with what `generate` steps through an answer.
    """
    decoder: type[Decoder] = Decoder

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
        self.init_weights()

    def init_weights(self) -> None:
        """For training from scratch: normal, std 0.02, and less where a block adds to the residual
        sum (as in GPT-2).

        PyTorch's own N(0, 1) for embeddings would make a tied head start at a loss in the hundreds.
        """
        into_sum = ("o_proj.weight", "down_proj.weight")                # two of them a layer
        for name, p in self.named_parameters():
            if p.ndim == 1:
                nn.init.ones_(p)
            elif name.endswith(into_sum):
                nn.init.normal_(p, std=0.02 * (2 * self.config.num_hidden_layers) ** -0.5)
            else:
                nn.init.normal_(p, std=0.02)

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
        x = self.embed(tokens) if embeds is None else embeds                    # (B, T, D)
        B, T, _ = x.shape
        past = cache.length if cache is not None else 0
        if mask is not None and mask.shape != (B, past + T):
            raise ValueError(f"mask is {tuple(mask.shape)}; {past} old and {T} new positions need "
                             f"{(B, past + T)}")
        if positions is None and mask is None:
            positions = torch.arange(past, past + T, device=x.device)[None]     # (1, T)
        elif positions is None:
            positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, past:]            # (B, T)
        # for all layers, (B, 1, T, hd) both
        cos, sin = (turn.to(x.dtype) for turn in rope(self.config, positions))
        look, causal = self._looks(mask, past, T, x.device)
        for i, block in enumerate(self.layers):
            x = block(x, cos, sin, look, causal, cache, i)                      # (B, T, D)
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
        before = torch.ones(T, past + T, dtype=torch.bool, device=device).tril(past)[None, None]
        return (before if look is None else look & before), False

    def forward(self, tokens: Tensor | None = None, embeds: Tensor | None = None,
                mask: Tensor | None = None, positions: Tensor | None = None,
                cache: KVCache | None = None) -> Tensor:
        """Logits (B, T, V) of the next token at every new position. Arguments as in `hidden`."""
        return self.lm_head(self.hidden(tokens, embeds, mask, positions, cache))

    def loss(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """The SUM of cross-entropy, in float32, of states (B, T, D) against labels (B, T), not
        shifted, over the supervised ones (those that aren't IGNORE; 0 if there are none)."""
        labels = labels[:, 1:]                                   # position t predicts label t + 1
        supervised = labels != IGNORE                            # S of them; few, and V is large
        states, target = hidden[:, :-1][supervised], labels[supervised]              # (S, D), (S,)
        if len(target) <= LOSS_ROWS:
            return self.loss_of(states, target)
        # In pieces whose logits are computed again in the backward: 32,768 rows of 32,000 in
        # float32 are 4 GB
        pieces = zip(states.split(LOSS_ROWS), target.split(LOSS_ROWS))
        return sum(checkpoint(self.loss_of, *piece, use_reentrant=False) for piece in pieces)

    def loss_of(self, states: Tensor, target: Tensor) -> Tensor:
        """`loss` of final states (S, D) against the ids (S,) that come next."""
        logits = self.lm_head(states)                                                # (S, V)
        wide = torch.promote_types(logits.dtype, torch.float32)
        return F.cross_entropy(logits.to(wide), target, reduction="sum")

    @torch.inference_mode()
    def generate(self, embeds: Tensor, mask: Tensor | None = None, max_new_tokens: int = 128,
                 temperature: float = 0.0, top_p: float = 1.0, eos_ids: Iterable[int] = (),
                 generator: torch.Generator | None = None) -> Iterator[Tensor]:
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
        (B, T, _), context = embeds.shape, self.config.max_position_embeddings
        if T >= context:
            raise UserError(f"no room to answer: {T} positions with the picture, the language "
                            f"model has {context}")
        steps = min(max_new_tokens, context - T)
        decoder = self.decoder(self, embeds, mask, steps)
        eos = torch.tensor(sorted(eos_ids), dtype=torch.long, device=embeds.device)
        done = torch.zeros(B, dtype=torch.bool, device=embeds.device)
        token = None
        for _ in range(steps):
            choice = pick(decoder(embeds), temperature, top_p, generator)       # (B,)
            token = choice if token is None else torch.where(done, token, choice)
            done = done | torch.isin(token, eos)
            if done.all():
                return
            yield token
            embeds = self.embed(token[:, None])                                 # (B, 1, D)

    @classmethod
    def from_pretrained(cls, dir: str | Path, dtype: torch.dtype | None = torch.float32,
                        device: str | torch.device = "cpu") -> "Llama":
        """Read the language model out of any folder that holds one: Hugging Face's, Meta's, a
        vision-language model's.

        dtype None: as stored, which costs no memory until it is used. UserError for anything that
        doesn't fit exactly, and for architectures that only resemble Llama.
        """
        folder = Folder(dir)
        with weights.skeleton():
            model = cls(LlamaConfig.from_dict(folder.part("llm"), folder.where))
        return folder.fill(model, "llm", dtype, device)

    def save_pretrained(self, dir: str | Path) -> None:
        """Write the public layout, which transformers' LlamaForCausalLM reads; a tied head is not
        written twice. UserError for a packed model (fast/packed.py)."""
        tensors = {name if name == "lm_head.weight" else f"model.{name}": p
                   for name, p in weights.to_save(self, dir).items()}
        dtype = str(self.embed_tokens.weight.dtype).removeprefix("torch.")
        weights.save(dir, tensors, {**self.config.to_dict(), "torch_dtype": dtype})


def pick(logits: Tensor, temperature: float, top_p: float,
         generator: torch.Generator | None) -> Tensor:
    """(B, V) -> (B,): the likeliest id (temperature 0), or a draw among the likeliest that reach
    top_p together."""
    if temperature == 0:
        return logits.argmax(-1)
    shares = (logits.float() / temperature).softmax(-1)                         # (B, V)
    shares, ids = shares.sort(dim=-1, descending=True)                          # (B, V) both
    before = shares.cumsum(-1) - shares     # an id is out if top_p is reached before it already
    drawn = torch.multinomial(shares.masked_fill(before >= top_p, 0), 1, generator=generator)
    return ids.gather(1, drawn)[:, 0]
