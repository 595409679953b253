"""Shared by all tests: no GPU but for those marked gpu, and a fixed number of threads, for
rounding."""
import os

import pytest
import torch

from clip import CLIP, CLIPTextConfig, CLIPVisionConfig
from core.tokenizer import Tokenizer
from llama import Llama, LlamaConfig
from toy import world as toy

torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)


def pytest_configure(config):
    """Of this process and those it starts: the same tests anywhere."""
    if "gpu" not in config.option.markexpr.replace("not gpu", ""):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture(scope="session")
def towers(tmp_path_factory):
    """A tiny CLIP and a tiny Llama with the toy world's tokenizer, in the public layout."""
    folder = tmp_path_factory.mktemp("towers")
    torch.manual_seed(0)
    vision = CLIPVisionConfig(image_size=32, patch_size=16, hidden_size=16, intermediate_size=32,
                              num_hidden_layers=3, num_attention_heads=2)
    text = CLIPTextConfig(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
                          num_attention_heads=2, max_position_embeddings=16, eos_token_id=63)
    CLIP(vision, text, projection_dim=8).save_pretrained(folder / "clip")
    (folder / "llama").mkdir()
    (folder / "llama" / "tokenizer.model").write_bytes((toy.MODEL / "tokenizer.model").read_bytes())
    tokenizer = Tokenizer.from_pretrained(toy.MODEL)
    llm = Llama(
        LlamaConfig(vocab_size=tokenizer.vocab_size, hidden_size=32, intermediate_size=48,
                    num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                    max_position_embeddings=512, tie_word_embeddings=True, bos_token_id=1,
                    eos_token_id=2))
    llm.init_weights()
    llm.save_pretrained(folder / "llama")
    return folder


@pytest.fixture(scope="session")
def stage1(towers, tmp_path_factory):
    """What three steps of stage 1 make of the towers."""
    import train
    folder = tmp_path_factory.mktemp("stage1")
    train.main(["--stage", "1", "--vision", str(towers / "clip"), "--llm", str(towers / "llama"),
                "--out", str(folder), "--steps", "3", "--batch", "4"])
    return folder


@pytest.fixture
def one_thread():
    """Tensors this small only make a second thread wait."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
