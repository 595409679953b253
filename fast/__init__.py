"""Optional speed. Models are written plainly (clip.py, llama.py) and run without any of this;
`prepare` puts it into one that was loaded, by giving its modules other classes and functions:

    fast/attention.py   written out, or by way of float32, where a CPU is faster so
    fast/linear.py      half precision on a CPU that can't multiply it
    fast/norm.py        the norm of a single row
    fast/cache.py       decoding: a cache laid out for one new token; memory kept and fetched
    fast/graph.py       decoding on a GPU: its work recorded once and replayed
    fast/packed.py      weights laid out anew for decoding on a CPU, or in 8 bits: on request
    fast/memory.py      what Linux is told about memory

What they compute is the same but for rounding; int8 rounds the weights, too. Everyone who runs or
trains a model calls `prepare` once, before compiling, wrapping or sharding it. Parameters keep
their names, ties and numbers, except where a model is packed.
"""
from torch import nn

import clip
import llama
from ccra import VLM
from fast import attention
from fast.cache import DecodingAttention
from fast.graph import Recorded
from fast.linear import HalfLinear
from fast.memory import forget as forget
from fast.memory import keep_memory as keep_memory
from fast.norm import RowNorm
from fast.packed import pack_llama
from fusers.mmfuser import Deformable


def prepare(model: nn.Module, pack: bool = False, int8: bool = False) -> nn.Module:
    """Put the fast ways into a model (VLM, Llama, CLIPVision, CLIP), in place; returns it.

    pack: lay the language model's half-precision weights out for decoding on a CPU, exactly, if
    this machine gains from it. int8: round them to 8 bits instead, one scale per output, for half
    the memory; the embeddings and norms stay as they are. Both are for inference on a CPU, and for
    good: such a model can't be trained, moved or saved. UserError if the model is packed already or
    on another device, or if its matrices don't fit int8. Without them a second call changes
    nothing.
    """
    halves = [m for m in model.modules() if isinstance(m, (clip.Block, llama.Llama, Deformable))]
    if isinstance(model, VLM):
        halves.append(model.projector)
    for layer in (layer for part in halves for layer in part.modules()):
        if type(layer) is nn.Linear:
            layer.__class__ = HalfLinear
    for module in model.modules():
        if isinstance(module, (clip.SelfAttention, llama.Attention)):
            module.attend = attention.attention
        if type(module) is llama.Attention:
            module.__class__ = DecodingAttention
        elif type(module) is llama.RMSNorm:
            module.__class__ = RowNorm
        elif isinstance(module, llama.Llama):
            module.decoder = Recorded
    if pack or int8:
        for llm in [m for m in model.modules() if isinstance(m, llama.Llama)]:
            pack_llama(llm, int8)
    return model
