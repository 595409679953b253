"""A real browser, as hands and eyes for the tests of the page and for its pictures."""
import base64
import json
import os
import shutil
import subprocess
import time
from pathlib import Path

FLAGS = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
         "--no-first-run", "--disable-sync", "--disable-dev-shm-usage", "--remote-debugging-pipe"]
READY = """new Promise((done, fail) => {
    const wait = setInterval(() => {
        if (document.body?.dataset.ready) { clearInterval(wait); done(); }
    }, 20);
    setTimeout(fail, 20000);
})"""
COMPLAINTS = ("Runtime.exceptionThrown", "Log.entryAdded", "Runtime.consoleAPICalled")


DROP = """(() => {
    const bytes = Uint8Array.from(atob("%s"), c => c.charCodeAt(0));
    const dataTransfer = new DataTransfer();
    dataTransfer.items.add(new File([bytes], %s));
    document.body.dispatchEvent(
        new DragEvent("drop", { bubbles: true, cancelable: true, dataTransfer }));
})()"""


def find() -> str | None:
    """A browser's program, if this machine has one."""
    return shutil.which("chromium") or shutil.which("google-chrome")


class Browser:
    """Chromium without a window, spoken to in its own protocol (JSON and a 0 byte, by way of two
    pipes). folder: for its profile."""

    def __init__(self, program: str, folder: Path):
        theirs, self.send_to = os.pipe()
        self.read_from, out = os.pipe()
        shell = ["bash", "-c", f'exec "$@" 3<&{theirs} 4>&{out}', "-", program, *FLAGS]
        self.process = subprocess.Popen([*shell, f"--user-data-dir={folder}", "about:blank"],
                                        pass_fds=(theirs, out), stderr=subprocess.DEVNULL,
                                        stdout=subprocess.DEVNULL)
        os.close(theirs)
        os.close(out)
        self.heard, self.last, self.session, self.events = b"", 0, {}, []
        self.home = "file:"                          # where requests may go
        targets = self("Target.getTargets")["targetInfos"]
        page = next(target for target in targets if target["type"] == "page")
        attached = self("Target.attachToTarget", targetId=page["targetId"], flatten=True)
        self.session = dict(sessionId=attached["sessionId"])
        for part in ("Page", "Runtime", "Log", "Network"):
            self(part + ".enable")

    def __call__(self, method: str, **params) -> dict:
        """One of the protocol's commands, and its result. What is heard meanwhile goes to
        `events`."""
        self.last += 1
        asked = dict(id=self.last, method=method, params=params, **self.session)
        os.write(self.send_to, json.dumps(asked).encode() + b"\0")
        while True:
            while b"\0" not in self.heard:
                more = os.read(self.read_from, 2 ** 20)
                if not more:
                    raise EOFError(f"the browser ended during {method}")
                self.heard += more
            message, self.heard = self.heard.split(b"\0", 1)
            message = json.loads(message)
            if message.get("id") == self.last:
                assert "error" not in message, message
                return message["result"]
            self.events.append(message)

    def close(self) -> None:
        self("Browser.close")
        self.process.wait(20)

    def run(self, script: str):
        """A JavaScript expression's value; a promise is waited for."""
        result = self("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def text(self, id: str) -> str:
        """What an element says."""
        return self.run(f"document.getElementById('{id}').textContent")

    def focus(self, id: str) -> None:
        self.run(f"document.getElementById('{id}').focus()")

    def key(self, name: str, code: int, text: str = "", shift: bool = False) -> None:
        """Press a key. text: what it writes."""
        for kind in ("keyDown", "keyUp"):
            self("Input.dispatchKeyEvent", type=kind, key=name, code=name, modifiers=8 * shift,
                 windowsVirtualKeyCode=code, **dict(text=text) if kind == "keyDown" else {})

    def write(self, text: str) -> None:
        """Into what has the focus, as from a keyboard that knows every sign."""
        self("Input.insertText", text=text)

    def drop(self, content: bytes, name: str) -> None:
        """A file, onto the page."""
        self.run(DROP % (base64.b64encode(content).decode(), json.dumps(name)))

    def point(self, id: str, across: float, down: float) -> tuple[float, float]:
        """Move the mouse to a place in an element, in shares of its size, and say where that
        is."""
        box = f"document.getElementById('{id}').getBoundingClientRect()"
        x, y = self.run(f"(r => [r.left + r.width * {across}, r.top + r.height * {down}])({box})")
        self("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
        return x, y

    def click(self, id: str, across: float, down: float) -> None:
        """Click at a place in an element."""
        x, y = self.point(id, across, down)
        for kind in ("mousePressed", "mouseReleased"):
            self("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def size(self, width: int, height: int, mobile: bool = False) -> None:
        """Of the window, in pixels."""
        self("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1,
             mobile=mobile)

    def scheme(self, name: str) -> None:
        """What the user likes, light or dark."""
        self("Emulation.setEmulatedMedia",
             features=[dict(name="prefers-color-scheme", value=name)])

    def open(self, page: Path | str) -> None:
        """Go to a page, a file or an address, and wait until it says that it's ready."""
        self.events.clear()
        self.home = page if isinstance(page, str) else "file:"
        self("Page.navigate", url=page if isinstance(page, str) else page.as_uri())
        self.run(READY)

    def until(self, script: str, seconds: float = 20) -> None:
        """Wait until a JavaScript expression is true. TimeoutError if it isn't then."""
        end = time.monotonic() + seconds
        while not self.run(f"Boolean({script})"):
            if time.monotonic() > end:
                raise TimeoutError(f"not within {seconds} s: {script}")
            time.sleep(0.02)

    def shot(self) -> bytes:
        """What the window shows, as PNG."""
        return base64.b64decode(self("Page.captureScreenshot", format="png")["data"])

    def complaints(self) -> list:
        """What went to the console, exceptions, and requests for anything but what the page is,
        data in it and, if it was served, its server, since the page was opened."""
        found = [event for event in self.events if event["method"] in COMPLAINTS]
        for event in self.events:
            if event["method"] == "Network.requestWillBeSent":
                if not event["params"]["request"]["url"].startswith((self.home, "data:")):
                    found.append(event)
        return found
