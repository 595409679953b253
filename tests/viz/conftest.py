import pytest
import torch

from core.tokenizer import Tokenizer
from tests.viz.helpers import build
from tests.viz.served import Live
from tests.viz.stub import Stub
from tests.viz.visitor import Page
from toy import world as toy
from viz.browser import Browser, find


@pytest.fixture(scope="session")
def tokenizer():
    return Tokenizer.from_pretrained(toy.MODEL)


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    program = find()
    if program is None:
        pytest.skip("needs a browser: apt-get install chromium (or google-chrome)")
    browser = Browser(program, tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def live(tmp_path_factory, towers):
    """The bundled model, and beside it one of random weights that knows nothing of that world."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    other = tmp_path_factory.mktemp("other")
    build(towers).save_pretrained(other, toy.MODEL / "tokenizer.model")
    live = Live(toy.MODEL, other)
    yield live
    live.close()
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def server():
    """One of canned answers."""
    stub = Stub()
    yield stub
    stub.shutdown()


@pytest.fixture
def page(browser, server):
    """A visitor of the page, newly opened. In the end it hasn't complained, except where the test
    refused something."""
    server.reset()
    browser.scheme("light")
    browser.size(1280, 900)
    page = Page(browser, server)
    page.open()
    yield page
    if server.refuse is None:
        assert browser.complaints() == []
