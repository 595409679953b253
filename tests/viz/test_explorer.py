"""The page from a file, and in a real browser where there is one (apt-get install chromium)."""
import base64
import io
import json
import re

import numpy as np
import pytest
from PIL import Image

from eval import load_model
from tests.viz.helpers import SCENE, random_sight
from toy import world as toy
from viz import explorer, maps

pytestmark = pytest.mark.usefixtures("one_thread")

EVIL = ["</script><img src=x onerror=\"document.title='hacked'\">", " <b>bold</b>",
        " &lt;i&gt;&amp;", " \u2028'\"`${1}\\"]
FOREIGN = (r"\b(?:src|href) ?=(?! (?:sight|seen)\.image|\"data:,\")|//\w|fetch\((?!path,)|"
           r"\bimport\b|XMLHttp|innerHTML|url\(")
MAP = "document.getElementById('map').toDataURL()"
VALUES = "[...document.querySelectorAll('#values td:nth-child(2)')].map(x => Number(x.textContent))"
CHOSEN = "document.querySelector('[name=kind]:checked').value"
FITS = "document.documentElement.scrollWidth <= innerWidth"


def embedded(page):
    return json.loads(page.split('id="data">')[1].split("</script>")[0])


def test_one_file_of_a_bearable_size():
    """336 px of noise, 24 layers, 576 patches, 128 tokens: under 1.5 MB, with nothing from
    elsewhere in it."""
    sight = random_sight(A=128, words=EVIL * 10)
    page = explorer.explorer(sight)
    assert len(page.encode()) <= 1.5e6
    code = explorer.TEMPLATE.read_text()
    code = code.replace("http://www.w3.org/2000/svg", "")          # SVG's name, nothing to fetch
    assert not re.search(FOREIGN, code)
    assert page.count("</script>") == 2 and page.count("<img") == 0
    assert "default-src 'none'" in page and "connect-src" not in page
    assert "connect-src 'self'" in explorer.page(dict(serve={}))      # to talk to its server
    data = embedded(page)
    assert data["words"] == EVIL * 10 and data["grid"] == 24
    for name, values in (("llm", sight.llm.mean(0)), ("W_lp", sight.maps["W_lp"])):
        numbers = np.frombuffer(base64.b64decode(data[name]), "<f4").reshape(values.shape)
        assert np.abs(numbers - values.numpy()).max() == 0


# --------------------------------------------------------------------------------------------------
# In a browser

class Page:
    """The bundled model's answer to a question, open in a browser.

    middle: the patch that is shown at first; L: the number of layers.
    """

    def __init__(self, browser, sight, file):
        self.browser, self.sight, self.file = browser, sight, file
        self.L, self.grid = len(sight.maps["w_hat"]), sight.grid
        self.middle = (sight.grid // 2) * (sight.grid + 1)

    def shows(self, patch, layer, token=None):
        """Whether the table has the numbers of a patch, to the three digits that are shown."""
        found = self.sight.maps
        rows = (found["W_lp"][layer - 1], found["layer_map"][layer - 1], found["w_p"],
                self.sight.looked(token))
        right = [values[patch].item() for values in rows]
        return self.browser.run(VALUES) == pytest.approx(right, rel=6e-3, abs=1e-9)

    def slide(self, layer):
        """As if the slider were dragged."""
        self.browser.run(f"(s => {{ s.value = {layer}; s.dispatchEvent(new Event('input')); }})"
                         "(document.getElementById('slider'))")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(a Sight of the bundled model, its page's file)."""
    model, tokenizer, _ = load_model(toy.MODEL, "cpu", "float32")
    question = "What color is the square? Answer in a sentence."
    sight = maps.ask(model, tokenizer, Image.open(SCENE).convert("RGB"), question)
    file = tmp_path_factory.mktemp("page") / "x.html"
    file.write_text(explorer.explorer(sight), encoding="utf-8")
    return sight, file


@pytest.fixture
def page(browser, saved):
    """Newly opened; in the end it hasn't complained."""
    browser.scheme("light")
    browser.size(1120, 810)
    browser.open(saved[1])
    yield Page(browser, *saved)
    assert browser.complaints() == []


def test_the_slider_changes_the_map(page, browser):
    assert browser.text("layer") == f"{page.L} of {page.L}" and page.shows(page.middle, page.L)
    pictures = {browser.run(MAP)}
    for layer in (1, 2):
        page.slide(layer)
        pictures.add(browser.run(MAP))
        assert browser.text("layer") == f"{layer} of {page.L}" and page.shows(page.middle, layer)
    browser.focus("slider")
    browser.key("ArrowRight", 39)                                  # by keyboard, too
    assert page.shows(page.middle, 3)
    pictures.add(browser.run(MAP))
    assert len(pictures) == 4


def test_keys_walk_over_curve_and_map(page, browser):
    browser.focus("curve")
    browser.key("End", 35)
    browser.key("ArrowLeft", 37)
    assert page.shows(page.middle, page.L - 1)
    browser.focus("map")
    browser.key("ArrowUp", 38)
    browser.key("ArrowLeft", 37)
    assert page.shows(page.middle - page.grid - 1, page.L - 1)


def test_the_mouse_chooses_patches_and_layers(page, browser):
    page.slide(page.L - 1)
    corner = page.grid * (page.grid - 1)
    browser.point("map", 0.01, 0.99)
    assert page.shows(corner, page.L - 1)
    first = 56 / 480, 0.2                                          # where the curve has layer 1
    browser.point("curve", *first)
    assert browser.text("weights").startswith("Layer 1:")          # told, not chosen
    assert browser.text("layer") == f"{page.L - 1} of {page.L}"
    browser.click("curve", *first)
    assert browser.text("layer") == f"1 of {page.L}" and page.shows(corner, 1)


def test_tokens_and_kinds_of_maps(page, browser):
    sight = page.sight
    assert browser.run("document.querySelectorAll('#words span').length") == len(sight.words)
    pictures = {browser.run(MAP)}
    browser.run("document.querySelector('[value=w_p]').click()")
    pictures.add(browser.run(MAP))
    assert browser.run("document.querySelectorAll('#tokens button').length") == len(
        sight.tokens) + 1 > 2
    for token in range(2):
        browser.run(f"document.querySelectorAll('#tokens button')[{token + 1}].click()")
        assert page.shows(page.middle, page.L, token)
        pictures.add(browser.run(MAP))
    assert len(pictures) == 4 and browser.run(CHOSEN) == "llm"
    browser.focus("slider")                                        # layers are LPWCA's and LWCA's
    browser.key("ArrowLeft", 37)
    assert browser.run(CHOSEN) == "W_lp"


def test_light_and_dark(page, browser):
    grounds = []
    for scheme in ("light", "dark"):
        browser.scheme(scheme)
        grounds.append(browser.run("getComputedStyle(document.body).backgroundColor"))
    assert grounds == ["rgb(255, 255, 255)", "rgb(23, 23, 26)"]
    browser.scheme("light")
    assert browser.run(FITS)                                       # nothing sticks out
    assert Image.open(io.BytesIO(browser.shot())).size == (1120, 810)


def test_text_cannot_become_markup(browser, tmp_path):
    """A question and an answer that try: they are shown as they were typed, and nothing of them is
    an element."""
    page = explorer.explorer(random_sight(A=len(EVIL), L=3, grid=4, words=EVIL, tokens=EVIL))
    (tmp_path / "evil.html").write_text(page, encoding="utf-8")
    browser.open(tmp_path / "evil.html")
    assert browser.run("document.querySelectorAll('img, b, i').length") == 0
    assert browser.run("document.title").startswith("nanoCCRA")
    words = "[...document.querySelectorAll('#words span')].map(x => x.firstChild.textContent)"
    tokens = "[...document.querySelectorAll('#tokens button')].slice(1).map(x => x.textContent)"
    for shown in (words, tokens):
        assert browser.run(shown) == [word.strip() for word in EVIL]
    assert browser.complaints() == []
    browser.size(390, 800, mobile=True)
    assert browser.run(FITS)                                       # on a telephone, too
