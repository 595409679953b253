"""Pictures of the page, as a browser shows it, for README.md and docs/.

    python -m viz.shots --out assets

explorer.png: a question and its maps. explorer-beside.png: the same question, with a part of CCRA
switched off beside it; dark. explorer-narrow.png: on a telephone. They are taken in Chromium
(apt-get install chromium) from the real server with the bundled model; only the times that the page
shows differ from run to run.
"""
import argparse
import io
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image

from core import flags
from core.common import ROOT, UserError, run, write_beside
from toy import world as toy
from viz.asking import Asker
from viz.browser import Browser, find
from viz.desk import Desk
from viz.server import Server

SCENE = ROOT / "assets" / "scene.png"
QUESTION = "What color is the square? Answer in a sentence."
IDLE = "document.getElementById('stop').hidden && !document.querySelector('[aria-busy]')"
DRAWN = "document.querySelectorAll('.explorer[data-drawn]').length === {}"
TALLEST = 3000                # pixels


@contextmanager
def served(seed: int = 0) -> Iterator[str]:
    """The address of the page with the bundled model, which answers meanwhile. Its thread lasts as
    long as the process."""
    args = argparse.Namespace(model=toy.MODEL, vision=None, device="cpu", dtype="float32",
                              quant=None, pack=False, seed=seed, temperature=0.0, top_p=1.0,
                              max_new_tokens=64)
    desk, server = Desk([Asker(args, toy.MODEL)]), Server()
    server.start(desk)
    threading.Thread(target=desk.work, daemon=True).start()
    try:
        yield server.url + "/"
    finally:
        server.shutdown()


def ask(browser: Browser, question: str, maps: int = 1) -> None:
    """Type it and press Enter; wait for the answer, and until so many maps are drawn."""
    browser.focus("question")
    browser.write(question)
    browser.key("Enter", 13, "\r")
    browser.until(f"{IDLE} && {DRAWN.format(maps)}")


def press(browser: Browser, name: str) -> None:
    """The first button that says so."""
    browser.run("[...document.querySelectorAll('#talk button')].find(button => "
                f"button.textContent === {name!r}).click()")


def begin(browser: Browser, url: str, width: int, scheme: str) -> None:
    """The page with README's picture in it, in a window of a width, light or dark."""
    browser.scheme(scheme)
    browser("Emulation.setScrollbarsHidden", hidden=True)
    browser.size(width, 800, mobile=width < 600)
    browser.open(url)
    browser.drop(SCENE.read_bytes(), SCENE.name)
    browser.until(f"document.getElementById('about').textContent === {SCENE.name!r}")


def write(browser: Browser, width: int, file: Path) -> None:
    """All of the page, as long as it is, of a width in pixels."""
    browser.run("document.activeElement.blur(); document.getElementById('turns').scrollTop = 0")
    height = browser.run("document.documentElement.scrollHeight")
    browser.size(width, min(height, TALLEST), mobile=width < 600)
    browser.run("scrollTo(0, 0)")
    pixels = np.asarray(Image.open(io.BytesIO(browser.shot())).convert("RGB"))
    # nobody sees the last two bits, and without them the files are a third smaller
    image = Image.fromarray((np.rint(pixels / 4) * 4).clip(max=255).astype(np.uint8))
    write_beside(file, lambda tmp: image.save(tmp, format="PNG", optimize=True))
    print(f"{file}: {image.width} x {image.height}, {file.stat().st_size / 1000:.0f} kB")


def take(browser: Browser, url: str, out: Path) -> None:
    """The three pictures."""
    begin(browser, url, 1280, "light")
    ask(browser, QUESTION)
    write(browser, 1280, out / "explorer.png")

    begin(browser, url, 1280, "dark")
    ask(browser, QUESTION)
    browser.run("document.querySelector('#parts [value=lpwca]').click()")
    press(browser, "Ask again")
    browser.until(f"{IDLE} && {DRAWN.format(2)}")
    write(browser, 1280, out / "explorer-beside.png")

    begin(browser, url, 360, "light")
    ask(browser, QUESTION)
    write(browser, 360, out / "explorer-narrow.png")


def main(argv: list[str] | None = None) -> None:
    p = flags.Parser(description=__doc__)
    p.add_argument("--out", type=Path, required=True, metavar="DIR", help="a folder that exists")
    args = p.parse_args(argv)
    if not args.out.is_dir():
        raise UserError(f"--out {args.out}: should be a folder that exists")
    program = find()
    if program is None:
        raise UserError("needs a browser: apt-get install chromium (or google-chrome)")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile, served() as url:
        browser = Browser(program, Path(profile))
        try:
            take(browser, url, args.out)
            if complaints := browser.complaints():
                raise UserError(f"the page complained: {complaints[0]}")
        finally:
            browser.close()


if __name__ == "__main__":
    run(main)
