import pytest

from core.tokenizer import Tokenizer
from toy import world as toy


@pytest.fixture(scope="session")
def tokenizer():
    return Tokenizer.from_pretrained(toy.MODEL)
