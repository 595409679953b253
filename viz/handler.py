"""One request to the page's server: what it may be, and what it gets.

    GET  /          the page
    POST /picture   a picture file's bytes         -> its ID, and what the model sees of it
    POST /scene     nothing                        -> the same of a new scene of the toy world
    POST /ask       a question, as desk.Asked      -> lines of JSON as they come: {"wait": 2},
                                                      {"text": "piece"} ..., {"done": true, ...}
    refused         a status and {"error": "why"}

Whoever can reach the port can send anything, so nothing is taken on trust. A request has ten
seconds for its head, and a minute for its body, whose length is checked before it is read. It has
to name the address that was printed, and a page that sends it has to be ours: no other page in the
same browser, under whatever name it came, can ask. No request names a file. A connection serves one
request.
"""
import io
import json
import re
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler
from queue import Empty

from core import flags
from core.common import deep, one_line, visible
from viz.desk import BYTES, Question, Refused

HEAD = 2 ** 16                # bytes of a request's first line and headers
ASKED = 2 ** 20               # bytes of a question, with what was said before
PATIENCE = 10                 # seconds for a head, and of silence within a body
WHOLE = 60                    # seconds for a body
LINGER = 2                    # seconds for one who is refused to read why
POLL = 0.05                   # seconds between looks at whether one who waits is still there
END = re.compile(rb"\r?\n\r?\n")
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; img-src data: blob:; style-src 'unsafe-inline';"
                               " script-src 'unsafe-inline'; connect-src 'self'; base-uri 'none'; "
                               "form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
    "Connection": "close",
}


class Handler(BaseHTTPRequestHandler):
    """http.server's, which parses a request's head and writes an answer's; the rest is here."""
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    command = requestline = ""                       # until there is one
    begun = False                                    # with the answer

    def handle(self) -> None:
        """One request, and whatever is wrong with it."""
        with suppress(OSError):                      # the client is gone
            try:
                if self.read_head():
                    self.serve()
            except Refused as e:
                self.refuse(e.status, str(e))
            except OSError:
                raise
            except Exception as e:                   # a mistake of ours: the others go on
                line = one_line(f"{type(e).__name__}: {e}", 300)
                print(f"error: a request failed: {visible(line)}", file=sys.stderr)
                self.refuse(500, f"this request failed ({line})")

    def refuse(self, status: int, why: str) -> None:
        if not self.begun:
            self.json(dict(error=why), status)
            self.linger()

    def serve(self) -> None:
        """What is asked for. Refused if it can't be had."""
        self.check_sender()
        if self.path not in ROUTES:
            raise Refused(404, f"there is no {flags.shown(self.path)} here")
        method, answer = ROUTES[self.path]
        if self.command != method:
            raise Refused(405, f"{self.path} is for {method}")
        answer(self)

    # What comes in

    def receive(self, until: float) -> bytes:
        """The next bytes, b"" at the end of what the client sends. Refused if they are too late."""
        left = until - time.monotonic()
        try:
            if left <= 0:
                raise TimeoutError
            self.connection.settimeout(min(left, PATIENCE))
            piece = self.connection.recv(2 ** 16)
        except TimeoutError:
            raise Refused(408, "the request came too slowly") from None
        self.server.heard(self.connection)
        return piece

    def read_head(self) -> bool:
        """Parse the first line and the headers; self.body is what came behind them. Whether there
        was a request."""
        self.rfile.close()
        head, until, end = b"", time.monotonic() + PATIENCE, None
        while end is None:
            piece = self.receive(until)
            if not piece and not head:
                return False
            if not piece:
                raise Refused(400, "the request ends before its headers do")
            start = max(0, len(head) - 3)
            head = (head + piece).lstrip(b"\r\n")
            end = END.search(head, start)
            if (end.start() if end else len(head)) > HEAD:
                raise Refused(431, f"more than {HEAD} bytes of headers")
        self.body = head[end.end():]
        self.rfile = io.BytesIO(head[:end.end()])
        self.raw_requestline = self.rfile.readline()
        if not self.parse_request():
            raise Refused(400, "this is no request of HTTP")
        if self.request_version != "HTTP/1.1":
            raise Refused(505, "HTTP/1.1 is spoken here")
        return True

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What parse_request finds wrong."""
        raise Refused(code, message or explain or "this is no request of HTTP")

    def handle_expect_100(self) -> bool:
        return True                                  # read_body sends it, once the length is known

    def check_sender(self) -> None:
        """Refused unless the request is to the address that was printed, and not by another page. A
        page of a foreign name that leads here (DNS rebinding) sends that name as its Host."""
        hosts, origins = (self.headers.get_all(name, []) for name in ("Host", "Origin"))
        if len(hosts) != 1 or not self.server.known_as(hosts[0]):
            raise Refused(403, f"this is {self.server.url}, and the request is to another Host")
        if origins and [origin.lower() for origin in origins] != [f"http://{hosts[0].lower()}"]:
            raise Refused(403, f"a page that isn't from {self.server.url} can't ask here")

    def read_body(self, most: int) -> bytes:
        """The request's body. Refused if its length isn't said, is more than `most`, or isn't what
        comes."""
        if "Transfer-Encoding" in self.headers:
            raise Refused(411, "give a Content-Length instead of a Transfer-Encoding")
        said = self.headers.get_all("Content-Length", [])
        if not said:
            raise Refused(411, "give a Content-Length")
        if len(said) > 1 or not re.fullmatch(r"[0-9]{1,18}", said[0]):
            raise Refused(400, "Content-Length should be one number")
        length = int(said[0])
        if length > most:
            raise Refused(413, f"{length:,} bytes; at most {most:,} are taken here")
        if self.headers.get("Expect", "").lower() == "100-continue":
            self.send_response_only(100)
            self.end_headers()
        body, until = bytearray(self.body[:length]), time.monotonic() + WHOLE
        while len(body) < length:
            piece = self.receive(until)
            if not piece:
                raise Refused(400, f"the body ends after {len(body):,} of {length:,} bytes")
            body += piece[:length - len(body)]
        self.server.heard(self.connection, whole=True)
        return bytes(body)

    def gone(self) -> bool:
        """Whether the client has closed the connection."""
        self.connection.setblocking(False)
        try:
            return not self.connection.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return False
        except OSError:
            return True
        finally:
            self.connection.settimeout(PATIENCE)

    def linger(self) -> None:
        """Take what a refused client still sends: closing at once would reset the connection, and
        it would never read why."""
        with suppress(Refused):
            self.connection.shutdown(socket.SHUT_WR)
            until = time.monotonic() + LINGER
            while self.receive(until):
                pass

    # What goes out

    def begin(self, status: int, kind: str, **more: str) -> None:
        """The head of an answer."""
        self.begun = True
        self.connection.settimeout(PATIENCE)
        self.request_version = self.protocol_version     # of an answer, whatever was asked
        self.send_response(status)
        for name, value in {"Content-Type": kind, **HEADERS, **more}.items():
            self.send_header(name, value)
        self.end_headers()

    def whole(self, content: bytes, kind: str, status: int = 200, **more: str) -> None:
        self.begin(status, kind, **{"Content-Length": str(len(content))}, **more)
        if self.command != "HEAD":
            self.wfile.write(content)

    def json(self, content: dict, status: int = 200) -> None:
        more = {}
        if status == 405:
            more["Allow"], _ = ROUTES[self.path]
        self.whole(json.dumps(content).encode(), "application/json", status, **more)

    def version_string(self) -> str:
        return "nanoCCRA"

    def log_message(self, format: str, *args) -> None:
        """Nothing: the terminal is for what somebody has to know."""

    # The four requests

    def page(self) -> None:
        self.whole(self.server.page, "text/html; charset=utf-8")

    def picture(self) -> None:
        self.json(self.server.desk.take(self.read_body(BYTES)))

    def scene(self) -> None:
        self.read_body(0)
        self.json(self.server.desk.scene())

    def ask(self) -> None:
        """Line after line. The answer is left as soon as the client is gone."""
        question = self.server.desk.ask(parsed(self.read_body(ASKED)))
        try:
            self.begin(200, "application/x-ndjson", **{"Transfer-Encoding": "chunked"})
            for line in self.lines(question):
                text = json.dumps(line).encode() + b"\n"
                self.wfile.write(b"%x\r\n%s\r\n" % (len(text), text))
            if question.complete:
                self.wfile.write(b"0\r\n\r\n")
        finally:
            self.server.desk.leave(question)

    def lines(self, question: Question) -> Iterator[dict]:
        """A question's lines as they come, until the last, or until the client is gone."""
        while not question.complete and not self.gone():
            with suppress(Empty):
                line = question.lines.get(timeout=POLL)
                question.complete = "done" in line or "error" in line
                yield line


ROUTES = {"/": ("GET", Handler.page), "/picture": ("POST", Handler.picture),
          "/scene": ("POST", Handler.scene), "/ask": ("POST", Handler.ask)}


def parsed(body: bytes) -> dict:
    """A body's JSON object. Refused if it is none."""
    try:
        content = json.loads(body)
    except (ValueError, RecursionError) as e:        # UnicodeDecodeError is a ValueError, too
        raise Refused(400, f"not valid JSON ({e})") from None
    if not isinstance(content, dict) or deep(content):
        raise Refused(400, "a question should be a JSON object, not deeply nested")
    return content
