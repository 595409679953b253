"""CCRA in a trained LLaVA's place: the same answers at first, and it learns from there."""
import pytest
import torch

from ccra import CCRA, NORMS, VLM, CCRAConfig
from clip import CLIPVision, CLIPVisionConfig
from core.common import UserError
from core.tokenizer import IMAGE_TOKEN
from fusers import kept
from fusers.dense_connector import DenseConnectorConfig
from fusers.llava import LLaVAConfig
from llama import Llama, LlamaConfig
from tests.core.helpers import llava_hf, original, public_llava, write
from tests.core.test_llava_layouts import agree

pytestmark = pytest.mark.usefixtures("one_thread")
CONFIG = dict(text_dim=48, vision_dim=16, n_layers=3, d_hidden=8)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A LLaVA by transformers, in both layouts: {layout: from_pretrained's arguments}."""
    base = tmp_path_factory.mktemp("kept")
    public_llava().model.vision_tower.save_pretrained(base / "clip")
    return {"hf": dict(dir=write(base / "hf", *llava_hf())),
            "liuhaotian": dict(dir=write(base / "own", *original()), vision=base / "clip")}


def a_batch(vocabulary, size):
    """A picture and a conversation about it: VLM.forward's arguments."""
    ids = torch.randint(3, vocabulary, (2, 12))
    ids[:, 4] = IMAGE_TOKEN
    return dict(pixels=torch.randn(2, 3, size, size), ids=ids, query=ids[:, 6:9],
                query_mask=torch.ones(2, 3, dtype=torch.bool))


@pytest.mark.parametrize("layout", ["hf", "liuhaotian"])
@pytest.mark.parametrize("norm", NORMS)
def test_answers_stay(folders, layout, norm):
    """Transformers' logits as plain LLaVA's are, ours to the bit, the same greedy tokens."""
    plain = VLM.from_pretrained(**folders[layout])
    batch = a_batch(plain.llm.config.vocab_size, 12)
    for order in ("progressive", "shuffled", "decoupled", "lwca_only", "pwca_only"):
        model = plain.with_fuser(CCRAConfig(**CONFIG, norm=norm, order=order))
        assert isinstance(model.fuser, CCRA) and model.fuser.config.anchor_layer == -2
        assert model.fuser.config.order == order and model.image == plain.image
        with torch.no_grad():
            assert torch.equal(model(**batch), plain(**batch))
    agree(plain.with_fuser(CCRAConfig(**CONFIG, norm=norm)), public_llava(), 9, 12, 1e-5)
    assert torch.equal(plain.with_fuser(LLaVAConfig(16, 3, copies=2))(**batch), plain(**batch))


def test_real_widths(dtype=torch.float32):
    """One product of twice the width would round otherwise there."""
    torch.manual_seed(0)
    with torch.no_grad():
        x = torch.randn(2, 50, 1024)
        plain = torch.nn.Sequential(torch.nn.Linear(1024, 4096), torch.nn.GELU(),
                                    torch.nn.Linear(4096, 64))
        old = torch.nn.Module()
        old.projector, old.fuser = plain, torch.nn.Identity()
        new = torch.nn.Module()
        new.fuser = torch.nn.Identity()
        new.projector = torch.nn.Sequential(torch.nn.Linear(2048, 4096), torch.nn.GELU(),
                                            torch.nn.Linear(4096, 64))
        kept.carry_over(old, new)
        both = torch.cat([torch.randn_like(x), x], dim=-1)
        assert torch.equal(new.projector(both), plain(x))


def test_it_learns_from_there(folders):
    """The left half gets a gradient in the first step, CCRA's own weights move by the third, and
    the LLaVA that it was made of stays."""
    torch.manual_seed(0)
    plain = VLM.from_pretrained(**folders["hf"]).float()
    before = {name: p.clone() for name, p in plain.named_parameters()}
    model = plain.with_fuser(CCRAConfig(**CONFIG)).requires_grad_(False)
    trained = [*model.fuser.parameters(), *model.projector.parameters()]
    first = {name: p.clone() for name, p in model.fuser.named_parameters()}
    for p in trained:
        p.requires_grad_(True)
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.0)
    batch = a_batch(plain.llm.config.vocab_size, 12)
    labels = batch["ids"].clone().masked_fill(batch["ids"] == IMAGE_TOKEN, -100)
    for step in range(3):
        optimizer.zero_grad()
        model(**batch, labels=labels).backward()
        left, right = model.projector[0].weight.grad.chunk(2, dim=1)
        assert left.abs().max() > 0 and right.abs().max() > 0
        moved = any(p.grad.abs().max() > 0 for p in model.fuser.parameters())
        assert moved == (step > 0)
        optimizer.step()
    assert all(not torch.equal(p, first[name]) for name, p in model.fuser.named_parameters()
               if p.requires_grad)
    assert all(torch.equal(p, before[name]) for name, p in plain.named_parameters())


def test_what_stage_1_trained_is_kept():
    """[Wa | Wb] of [F; F] and [0 | Wa + Wb] of [anything; F] are the same."""
    torch.manual_seed(0)
    projector = torch.nn.Sequential(torch.nn.Linear(32, 24), torch.nn.GELU(),
                                    torch.nn.Linear(24, 24)).double()
    x = torch.randn(2, 5, 16).double()
    want = projector(torch.cat([x, x], dim=-1))
    kept.keep_right(projector)
    got = projector(torch.cat([torch.randn_like(x), x], dim=-1))
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_what_cannot_start_so(folders):
    plain = VLM.from_pretrained(**folders["hf"])
    with pytest.raises(UserError, match="DenseConnector can't start from plain LLaVA: .*stage 1"):
        plain.with_fuser(DenseConnectorConfig(16, 3))
    with pytest.raises(UserError, match="text_dim = 4096, but these towers need 48"):
        plain.with_fuser(CCRAConfig(vision_dim=16, n_layers=3))
    with pytest.raises(UserError, match="its fuser is 'ccra': only in plain LLaVA's place"):
        plain.with_fuser(CCRAConfig(**CONFIG)).with_fuser(CCRAConfig(**CONFIG))
    tower = CLIPVision(CLIPVisionConfig(image_size=8, patch_size=4, hidden_size=16,
                                        intermediate_size=8, num_hidden_layers=3,
                                        num_attention_heads=2))
    llm = Llama(LlamaConfig(vocab_size=9, hidden_size=48, intermediate_size=8, num_hidden_layers=1,
                            num_attention_heads=2))
    wide = VLM.build(tower, llm, LLaVAConfig(16, 3, copies=2))
    with pytest.raises(UserError, match="its fuser is 'wide': only in plain"):
        wide.with_fuser(CCRAConfig(**CONFIG))
