"""fast.prepare: what it puts where, and that a model stays what it was."""
import copy

import pytest
import torch

import clip
import fast
from ccra import VLM
from clip import CLIP, CLIPTextConfig, CLIPVision, CLIPVisionConfig
from fast.attention import attention
from fast.cache import DecodingAttention
from fast.linear import HalfLinear
from fast.norm import RowNorm
from fusers.mmfuser import MMFuserConfig
from llama import Llama
from tests.llamas import SHAPES, left_padded, random_llama

VISION = CLIPVisionConfig(image_size=32, patch_size=8, hidden_size=48, intermediate_size=80,
                          num_hidden_layers=6, num_attention_heads=4)


def kinds(model):
    return [type(module) for module in model.modules()]


@pytest.mark.parametrize("kind", SHAPES)
def test_a_model_stays_what_it_was(kind):
    """Names, ties, numbers; what it says, but for rounding; a second call changes nothing."""
    net = random_llama(SHAPES[kind])
    ids, mask = left_padded([12, 7])
    names = [name for name, _ in net.named_parameters()]
    before, memory = net(ids, mask=mask), [p.data_ptr() for p in net.parameters()]
    assert fast.prepare(net) is net
    assert [name for name, _ in net.named_parameters()] == names
    assert [p.data_ptr() for p in net.parameters()] == memory
    torch.testing.assert_close(net(ids, mask=mask), before, atol=1e-4, rtol=1e-4)
    now = kinds(net)
    assert kinds(fast.prepare(net)) == now
    again = copy.deepcopy(net)
    assert kinds(again) == now and torch.equal(again(ids, mask=mask), net(ids, mask=mask))


def test_what_is_replaced_in_a_vlm():
    """The towers' blocks, the projector and MMFuser's attention; not what CCRA or CLIP itself has.
    """
    vlm = VLM.build(CLIPVision(VISION), random_llama(), MMFuserConfig(48, 6, heads=4))
    fast.prepare(vlm)
    block, eye = vlm.llm.layers[0], vlm.vision.layers[0]
    for layer in (block.mlp.up_proj, eye.mlp.fc1, eye.self_attn.out_proj, vlm.projector[0],
                  vlm.projector[2], vlm.fuser.cross.value, vlm.llm.lm_head):
        assert type(layer) is HalfLinear
    assert type(block.self_attn) is DecodingAttention and type(vlm.llm.norm) is RowNorm
    assert block.self_attn.attend is eye.self_attn.attend is attention
    assert clip.SelfAttention.attend is clip.attention           # others are as they were
    assert type(Llama(SHAPES["llama2"]).norm) is not RowNorm
    text = CLIPTextConfig(99, 32, 64, 2, 2, 9, eos_token_id=98)
    both = fast.prepare(CLIP(VISION, text))
    assert type(both.text.layers[1].mlp.fc2) is HalfLinear
    assert type(both.visual_projection) is torch.nn.Linear


def test_gradients_are_the_plain_models():
    plain, ids = random_llama(SHAPES["tied+gqa"]).requires_grad_(True), left_padded([12, 7])[0]
    ours = fast.prepare(copy.deepcopy(plain))
    for net in (plain, ours):
        net(ids).square().mean().backward()
    for a, b in zip(plain.parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-5, rtol=1e-5)
