"""training/lora.py beside peft, in float64; in every number format; with what training adds."""
import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import fast
from core.common import UserError
from core.weights import skeleton
from fast.narrow import NarrowLinear
from llama import Llama, LlamaConfig
from tests.core.helpers import TEXT, public_llama
from tests.llamas import TINY, random_llama
from training import lora, setup, sharding

peft = pytest.importorskip("peft")
LlamaRMSNorm = pytest.importorskip("transformers.models.llama.modeling_llama").LlamaRMSNorm
pytestmark = [pytest.mark.usefixtures("one_thread"),
              pytest.mark.filterwarnings("ignore::UserWarning")]
IDS = torch.randint(90, (2, 11), generator=torch.Generator().manual_seed(0))


def draw(llm):
    """B away from zero, so that LoRA matters."""
    torch.manual_seed(3)
    for _, _, layer in lora.layers(llm):
        layer.lora_B.data.normal_(0, 0.05)
    return llm


def with_lora(r=4, alpha=12, seed=0, **more):
    llm = random_llama(seed=seed, **more)
    torch.manual_seed(seed)
    lora.add(llm, r, alpha)
    return draw(llm)


def trained(llm):
    return {name: p for name, p in llm.named_parameters() if p.requires_grad}


# --------------------------------------------------------------------------------------------------
# PEFT

@pytest.fixture(scope="module")
def pair():
    """(our Llama with LoRA, peft's), of the same numbers, in float64."""
    theirs = copy.deepcopy(public_llama(num_key_value_heads=2)).double()
    ours = Llama(LlamaConfig(**TEXT, num_key_value_heads=2)).double().requires_grad_(False)
    own = {name.removeprefix("model."): t for name, t in theirs.state_dict().items()}
    ours.load_state_dict(own)
    config = peft.LoraConfig(r=4, lora_alpha=12, lora_dropout=0.0, task_type="CAUSAL_LM",
                             target_modules=list(lora.MATRICES))
    theirs = peft.get_peft_model(theirs, config)
    lora.add(ours, 4, 12)
    draw(ours.double())
    names = dict(ours.named_parameters())
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if "lora_" in name:
                p.data = names[own_name(name)].clone()
    return ours, theirs


def own_name(name):
    """base_model.model.model.layers.0.mlp.up_proj.lora_A.default.weight -> ours."""
    return name.removeprefix("base_model.model.model.").removesuffix(".default.weight")


def exact_norm(self, x):
    """Of transformers' LlamaRMSNorm, which rounds to float32."""
    return self.weight * x * (x.square().mean(-1, keepdim=True) + self.variance_epsilon).rsqrt()


def test_equals_peft(pair, monkeypatch):
    monkeypatch.setattr(LlamaRMSNorm, "forward", exact_norm)
    ours, theirs = pair
    ours.zero_grad()
    theirs.zero_grad()
    got, want = ours(IDS), theirs(IDS).logits
    assert want.std() > 0.1 and (got - want).abs().max() < 1e-9
    for logits in (got, want):
        logits.double().logsumexp(-1).sum().backward()
    gradients = {own_name(name): p.grad for name, p in theirs.named_parameters() if p.requires_grad}
    assert gradients.keys() == trained(ours).keys() and len(gradients) == 2 * 7 * 2
    for name, p in trained(ours).items():
        assert gradients[name].abs().max() > 1e-3
        assert (p.grad - gradients[name]).abs().max() < 1e-9, name


def test_merged_equals_peft(pair):
    ours, theirs = (copy.deepcopy(model) for model in pair)
    before = ours(IDS)
    lora.merge(ours)
    whole = theirs.merge_and_unload().state_dict()
    own = ours.state_dict()
    assert {name.removeprefix("model.") for name in whole} == own.keys()
    for name, t in whole.items():
        assert (own[name.removeprefix("model.")] - t).abs().max() < 1e-9, name
    assert (ours(IDS) - before).abs().max() < 1e-9
    assert not any(isinstance(layer, lora.LoRALinear) for layer in ours.modules())


def test_starts_as_peft_does():
    """A as by Kaiming's rule with a = sqrt 5, that is, even within 1 / sqrt(in); B zero."""
    torch.manual_seed(0)
    llm = random_llama()
    want = llm(IDS)
    names = set(dict(llm.named_parameters()))
    lora.add(llm, 4, 8)
    assert torch.equal(llm(IDS), want)
    assert names <= set(dict(llm.named_parameters()))
    for _, _, layer in lora.layers(llm):
        bound = layer.in_features ** -0.5
        assert 0.9 * bound < layer.lora_A.abs().max() <= bound
        assert not layer.lora_B.any() and layer.scale == 2
        assert not layer.weight.requires_grad and layer.lora_A.dtype == torch.float32


# --------------------------------------------------------------------------------------------------
# Number formats

def test_merged_is_unmerged():
    llm = with_lora(std=0.1)
    want = llm(IDS)
    lora.merge(llm)
    assert (llm(IDS) - want).abs().max() < 1e-6 * want.abs().max()
    assert all(type(layer) is nn.Linear for _, _, layer in lora.layers(llm))


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_a_narrow_base_counts_as_the_widened_one(dtype):
    """Weights stored in 2 bytes, the rest float32: to the bit what the same weights in 4 give, and
    autograd keeps no wide copy of them."""
    narrow, wide = with_lora(), with_lora()
    for llm in (narrow, wide):
        for _, _, layer in lora.layers(llm):
            layer.weight.data = layer.weight.data.to(dtype)
    for _, _, layer in lora.layers(wide):
        layer.weight.data = layer.weight.data.float()
    shapes = {tuple(layer.weight.shape) for _, _, layer in lora.layers(narrow)}
    kept = []

    def pack(t):
        kept.append((t.dtype, tuple(t.shape)))
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        logits = narrow(IDS)
    logits.logsumexp(-1).sum().backward()
    want = wide(IDS)
    want.logsumexp(-1).sum().backward()
    assert torch.equal(logits, want)
    for name, p in trained(narrow).items():
        assert torch.equal(p.grad, trained(wide)[name].grad), name
    matrices = [(kind, shape) for kind, shape in kept if shape in shapes]
    assert len(matrices) >= 14 and all(kind == dtype for kind, _ in matrices)


def test_autocast():
    """bfloat16 products of float32 numbers: near the exact ones, and gradients are float32."""
    llm = with_lora()
    want = llm(IDS)
    with torch.autocast("cpu", torch.bfloat16):
        logits = llm(IDS)
    logits.float().logsumexp(-1).sum().backward()
    assert logits.dtype == torch.bfloat16
    assert (logits - want).abs().max() < 0.1 * want.abs().max()
    assert all(p.grad.dtype == torch.float32 and p.grad.any() for p in trained(llm).values())


def test_a_half_model_without_autocast():
    """As it is asked while it is trained: all in bfloat16 but LoRA, or LoRA as well."""
    llm = with_lora()
    want = llm(IDS)
    for p in llm.parameters():
        p.data = p.data.bfloat16() if not p.requires_grad else p.data
    assert llm(IDS).dtype == torch.bfloat16
    assert (llm(IDS) - want).abs().max() < 0.1 * want.abs().max()
    assert llm.bfloat16()(IDS).dtype == torch.bfloat16


def test_merging_rounds_once():
    """The sum is rounded to the weight's format, not the difference before it."""
    weight = torch.randn(6, 5).bfloat16()
    A, B = torch.randn(2, 5), torch.randn(6, 2)
    want = (weight.double() + 0.5 * B.double() @ A.double()).bfloat16()
    lora.fold(weight, A, B, 0.5)
    assert weight.dtype == torch.bfloat16 and torch.equal(weight, want)


# --------------------------------------------------------------------------------------------------
# What training adds

def gradients(llm, model=None):
    """Of one sum, by name."""
    (model or llm)(IDS).logsumexp(-1).sum().backward()
    return {name: sharding.whole(p.grad).clone() for name, p in trained(llm).items()}


def same(one, other):
    return one.keys() == other.keys() and all((one[n] - other[n]).abs().max() < 1e-5 * (
        1 + other[n].abs().max()) for n in one)


class Holder(nn.Module):
    """What setup and sharding want of a VLM."""

    def __init__(self, llm):
        super().__init__()
        self.llm, self.vision, self.fuser = llm, nn.Module(), nn.Module()
        self.vision.layers = nn.ModuleList()

    def forward(self, ids):
        return self.llm(ids)


def test_recompute_and_prepare():
    want = gradients(with_lora())
    llm = with_lora()
    fast.prepare(llm)
    setup.recompute(Holder(llm))
    assert all(type(layer) is lora.LoRALinear for _, _, layer in lora.layers(llm))
    assert same(gradients(llm), want)


@pytest.fixture
def alone(tmp_path):
    """A group of this process alone."""
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0,
                            world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("recompute", (False, True), ids=("", "recompute"))
def test_ddp_and_fsdp(alone, recompute):
    want = gradients(with_lora())
    llm = with_lora()
    assert same(gradients(llm, DistributedDataParallel(llm)), want)
    sliced = Holder(with_lora())
    if recompute:
        setup.recompute(sliced)
    cpu = torch.device("cpu")
    model = sharding.share(sliced, "fsdp", cpu, torch.float32, mesh=sharding.layout(cpu))
    found = {name.removeprefix("llm."): grad for name, grad in gradients(sliced, model).items()}
    assert same(found, want)


def test_without_numbers():
    """--plan's model."""
    with skeleton():
        llm = Llama(TINY)
        lora.add(llm, 4, 8)
    assert all(p.is_meta for p in llm.parameters())
    assert sum(p.numel() for p in trained(llm).values() if p.shape[0] == 4) > 0


def test_a_frozen_plain_layer_may_become_narrow():
    layer = nn.Linear(8, 6, bias=False).bfloat16().requires_grad_(False)
    layer.__class__ = NarrowLinear
    assert layer(torch.randn(2, 8)).dtype == torch.float32


@pytest.mark.parametrize("r", (0, -1, 49, 10 ** 9))
def test_a_rank_that_makes_no_sense(r):
    llm = random_llama()
    with pytest.raises(UserError, match=f"rank {r}: should be from 1 to 48"):
        lora.add(llm, r, 8)
    assert all(type(layer) is nn.Linear for _, _, layer in lora.layers(llm))
