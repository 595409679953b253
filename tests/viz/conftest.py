import shutil

import pytest

from core.tokenizer import Tokenizer
from toy import world as toy
from viz.browser import Browser


@pytest.fixture(scope="session")
def tokenizer():
    return Tokenizer.from_pretrained(toy.MODEL)


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    program = shutil.which("chromium") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("needs a browser: apt-get install chromium (or google-chrome)")
    browser = Browser(program, tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()
