"""Whoever sits before the page: where to look, and hands for it."""
import base64
import json

from tests.viz.stub import png

FITS = "document.documentElement.scrollWidth <= innerWidth"
MAP = "document.getElementById('maps{}-map').toDataURL()"
SAID = "[...document.querySelectorAll('.said')].map(x => x.textContent)"
ASKED = "[...document.querySelectorAll('#turns h2')].map(x => x.textContent)"
ERROR = "!document.getElementById('error').hidden"
IDLE = "document.getElementById('stop').hidden"
DRAWN = "document.querySelectorAll('.explorer[data-drawn]').length === {}"
FILE = """(() => {
    const bytes = Uint8Array.from(atob("%s"), c => c.charCodeAt(0)), files = new DataTransfer();
    files.items.add(new File([bytes], "%s", { type: "image/png" }));
    return files;
})()"""
WHOLE = "It is a cat."


class Page:
    """The page in a browser, and hands for it."""

    def __init__(self, browser, server):
        self.browser, self.server = browser, server
        self.run, self.until, self.text = browser.run, browser.until, browser.text

    def open(self, **about):
        """Anew, with a picture. about: changes what the server says of itself."""
        self.server.about = about
        self.browser.open(self.server.url)
        self.drop()

    def drop(self):
        self.run("document.getElementById('status').textContent = ''")
        self.browser.drop(png(), "cat.png")
        self.until("document.getElementById('status').textContent === 'The picture is there.'")

    def ask(self, question, wait=True):
        """As a reader does: type, and press Enter."""
        self.browser.focus("question")
        self.browser.write(question)
        self.browser.key("Enter", 13, "\r")
        if wait:
            self.until(f"{IDLE} && document.querySelector('[aria-busy]') === null")

    def click(self, text, which=0):
        """A button by what stands on it."""
        buttons = "[...document.querySelectorAll('button')].filter(b => b.checkVisibility() && "
        self.run(f"{buttons} b.textContent === {json.dumps(text)})[{which}].click()")

    def idle(self):
        self.until(IDLE)


def files(name, content):
    return FILE % (base64.b64encode(content).decode(), name)
