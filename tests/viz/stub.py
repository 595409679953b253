"""A server for the page's tests: viz/server.py's contract, with canned answers."""
import hashlib
import io
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from PIL import Image

from tests.viz.helpers import noise, random_sight
from viz import explorer

ABOUT = dict(models=["toy"], toy=False, max_new_tokens=128, temperature=0.0,
             parts=["lpwca", "lwca", "pwca"], limits=dict(bytes=20_000_000))
TEXT = ["It", " is", " a", " cat", "."]


def sight(question: str = "What is it?", tokens: list[str] | None = None, seed: int = 0) -> dict:
    """Random maps of 4 x 4 patches and 3 layers."""
    made = random_sight(L=3, grid=4, size=(96, 96), words=question.split(), tokens=tokens or TEXT)
    made.maps["W_lp"] += seed
    return explorer.sight_data(made)


def done(text: str = "It is a cat.", **more) -> dict:
    """The last line of an answer."""
    return dict(done=True, text=text, cut=None, seconds=1.234, first=0.1, notes=[], sight=sight(),
                why=None) | more


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        """Nothing."""

    def reply(self, status: int, kind: str, content: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def json(self, value: dict, status: int = 200) -> None:
        self.reply(status, "application/json", json.dumps(value).encode())

    def do_GET(self):
        page = explorer.page(dict(serve=ABOUT | self.server.about))
        self.reply(200, "text/html; charset=utf-8", page.encode())

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.server.refuse:
            return self.json(dict(error=self.server.refuse[1]), self.server.refuse[0])
        if self.path == "/ask":
            return self.ask(json.loads(body))
        image = noise(64, 48, len(self.server.pictures))
        known = dict(picture=hashlib.sha256(body).hexdigest(), image=explorer.data_url(image),
                     size=image.size, notes=self.server.notes)
        self.server.pictures.append(body)
        self.json(known | (dict(caption="cat, red square") if self.path == "/scene" else {}))

    def ask(self, asked: dict) -> None:
        """The lines that the test's `answer` makes, each in two chunks, cut in a character."""
        self.server.asked.append(asked)
        self.send_response(200)
        self.send_header("Content-Type", "application/x-ndjson")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        try:
            for line in self.server.answer(asked):
                content = (json.dumps(line, ensure_ascii=False) + "\n").encode()
                middle = next((i for i, byte in enumerate(content) if byte >= 0x80), 3) + 1
                for part in (content[:middle], content[middle:]):
                    self.wfile.write(b"%x\r\n%s\r\n" % (len(part), part))
                    self.wfile.flush()
            self.wfile.write(b"0\r\n\r\n")
        except OSError:
            self.server.left.set()
            self.close_connection = True


class Stub(ThreadingHTTPServer):
    """about: changes what the page is told. answer: a question -> its lines. refuse: (status,
    line) for whatever is posted next. notes: on each picture. What it was sent: pictures, asked.
    left: set when a client went away. go: what `held` waits for."""
    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}/"
        self.reset()
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    def reset(self) -> None:
        self.about, self.notes, self.pictures, self.asked = {}, [], [], []
        self.refuse: tuple[int, str] | None = None
        self.answer: Callable[[dict], Iterator[dict]] = self.plain
        self.left, self.go = threading.Event(), threading.Semaphore(0)

    def handle_error(self, *_):
        """A browser that left is none."""

    def plain(self, asked: dict) -> Iterator[dict]:
        """Says at once that it's a cat."""
        yield from (dict(text=piece) for piece in TEXT)
        yield done(sight=sight(asked["question"], seed=len(self.asked)))

    def held(self, asked: dict) -> Iterator[dict]:
        """The same, a line each time that the test says go."""
        for line in self.plain(asked):
            if not self.go.acquire(timeout=20):
                raise OSError("nobody said go")
            yield line

    def endless(self, asked: dict) -> Iterator[dict]:
        """Never comes to its end."""
        while not self.left.wait(0.02):
            yield dict(text="na ")


def png(width: int = 40, height: int = 30) -> bytes:
    """A picture file."""
    file = io.BytesIO()
    Image.new("RGB", (width, height), "teal").save(file, format="PNG")
    return file.getvalue()
