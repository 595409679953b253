"""Who asks a page's server, and one in this process."""
import http.client
import json
import socket
import threading
from pathlib import Path
from queue import SimpleQueue
from types import SimpleNamespace

import sample
from core.common import ROOT
from viz.asking import Asker
from viz.desk import Desk
from viz.server import Server

SCENE = ROOT / "assets" / "scene.png"


class Client:
    """Who asks a server at a port of this machine."""

    def __init__(self, port: int):
        self.port = port

    def request(self, method: str, path: str, body=None, **headers) -> tuple[int, object]:
        """(status, the answer: its JSON, or bytes if it is none)."""
        there = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            there.request(method, path, body, headers)
            answer = there.getresponse()
            content = answer.read()
            self.headers = answer.headers
        finally:
            there.close()
        parsed = content and answer.headers["Content-Type"] == "application/json"
        return answer.status, json.loads(content) if parsed else content

    def raw(self, request: bytes, ends: bool = True, patience: float = 60) -> bytes:
        """What comes back for these bytes. ends: nothing comes after them."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=patience) as there:
            there.sendall(request)
            if ends:
                there.shutdown(socket.SHUT_WR)
            answer = b""
            while piece := there.recv(2 ** 16):
                answer += piece
        return answer

    def show(self, content: bytes) -> str:
        """The ID of a picture file's content, which it takes."""
        status, told = self.request("POST", "/picture", content)
        assert status == 200, told
        return told["picture"]

    def scene(self) -> str:
        return self.show(SCENE.read_bytes())

    def lines(self, **asked):
        """A question's lines, one as soon as it comes."""
        there = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            there.request("POST", "/ask", json.dumps(asked))
            answer = there.getresponse()
            assert answer.status == 200, answer.read()
            while line := answer.readline():
                yield json.loads(line)
        finally:
            there.close()

    def ask(self, question: str, **asked) -> dict:
        """The last line of an answer about the scene, or about the picture that is given."""
        asked = {"picture": asked.pop("picture", None) or self.scene(), "question": question,
                 **asked}
        return list(self.lines(**asked))[-1]


class Ended(BaseException):
    """What ends a desk's work, as Ctrl-C does."""


class Live(Client):
    """A server on a free port, its models at work in a thread.

    folders: of its models. It ends with `close`.
    """

    def __init__(self, *folders: Path, most: int = 128):
        args = sample.arguments(["--serve", "--device", "cpu", "--max-new-tokens", str(most)])
        self.desk = Desk([Asker(args, folder) for folder in folders])
        self.server = Server()
        self.server.start(self.desk)
        super().__init__(self.server.server_port)
        self.thread = threading.Thread(target=self.work)
        self.thread.start()

    def work(self) -> None:
        try:
            self.desk.work()
        except Ended:
            pass

    def close(self) -> None:
        def end(question):
            raise Ended

        self.desk.answer = end
        self.desk.line.append(SimpleNamespace(lines=SimpleQueue()))
        self.server.shutdown()
        self.server.server_close()
        self.thread.join(30)
        assert not self.thread.is_alive()
