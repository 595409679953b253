"""What anybody can send to the page's server: does it answer, and go on?

    python -m tests.attack.server                  200 hostile requests, 1,000 idle connections and
                                                   500 questions, to a server of its own
    python -m tests.attack.server --requests 5000 --seed 1

A hostile request ends well if it gets a status, and not one that says that something of ours broke.
Where no status is possible, since the client is gone, the connection ends. After every tenth of
them, and while 1,000 connections say nothing, a question is asked and has to be answered. Of the
500 questions memory, open files and threads are watched. The server may say nothing on stderr.
"""
import argparse
import io
import json
import os
import random
import re
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress

from PIL import Image

from core.common import ROOT
from tests.attack.doors import NASTY, change, spoil
from tests.attack.soak import resident
from tests.viz.served import SCENE, Client

COLOR = "What color is the square?"
UP = "../../../../etc/passwd"
STATUSES = {200, 400, 403, 404, 405, 408, 411, 413, 415, 431, 503, 505}
CALM = 100                    # questions until what is kept is complete
GROWTH = 1.05                 # of memory, open files and threads after that


# --------------------------------------------------------------------------------------------------
# Hostile requests: each draws one, as bytes

class Hostile:
    """Requests to a port. picture: the ID of one that the server has."""

    def __init__(self, rng: random.Random, port: int, picture: str):
        self.rng, self.port, self.picture = rng, port, picture

    def head(self, first: str, *headers: str, host: str | None = None) -> bytes:
        lines = [first, f"Host: {host or f'127.0.0.1:{self.port}'}", *headers]
        return "".join(f"{line}\r\n" for line in lines).encode("utf-8", "replace") + b"\r\n"

    def post(self, path: str, body: bytes, *headers: str, length=None) -> bytes:
        length = len(body) if length is None else length
        return self.head(f"POST {path} HTTP/1.1", f"Content-Length: {length}", *headers) + body

    def question(self) -> dict:
        """A good one."""
        return dict(picture=self.picture, turns=[["Is there an owl?", "no"]], question=COLOR,
                    temperature=0.0, max_new_tokens=4, off=["lwca"], model=0)

    def body(self) -> tuple[str, bytes]:
        """A path, and what is good there."""
        if self.rng.random() < 0.5:
            return "/ask", json.dumps(self.question()).encode()
        return "/picture", SCENE.read_bytes()

    def cut_body(self) -> bytes:
        path, body = self.body()
        return self.post(path, body[:self.rng.randrange(len(body))], length=len(body))

    def cut_head(self) -> bytes:
        whole = self.post(*self.body()).partition(b"\r\n\r\n")[0]
        return whole[:self.rng.randrange(1, len(whole))]

    def wrong_length(self) -> bytes:
        path, body = self.body()
        length = self.rng.choice((0, 1, len(body) - 1, len(body) + 1, -1, "", "x", "1e3", "0x10",
                                  "9" * 400, "\u0663", " 5 5", "+5", "5,5", None, [], 10 ** 12))
        return self.post(path, body, length=length)

    def announced(self) -> bytes:
        path, body = self.body()
        more = self.rng.choice((["Expect: 100-continue"], []))
        return self.post(path, body, *more, length=self.rng.choice((10 ** 9, 2 ** 63, 20_000_001)))

    def chunked(self) -> bytes:
        path, body = self.body()
        coding = self.rng.choice(("chunked", "gzip, chunked", "identity", "\tchunked"))
        return self.head(f"POST {path} HTTP/1.1", f"Transfer-Encoding: {coding}",
                         f"Content-Length: {len(body)}") + b"5\r\nhello\r\n0\r\n\r\n"

    def upwards(self) -> bytes:
        """../ in a field, or in the path."""
        asked = self.question()
        key = self.rng.choice([*asked, "path", "image", "file"])
        if key == "path":
            up = self.rng.choice((UP, "%2e%2e/" * 4 + "etc/passwd", "..\\..\\x", "//etc/passwd"))
            way = self.rng.choice(("GET", "POST", "PUT"))
            return self.head(f"{way} /{up} HTTP/1.1", "Content-Length: 0")
        asked[key] = self.rng.choice((UP, [UP], [[UP, UP]], {UP: UP}, "/etc/passwd", "file:///x"))
        return self.post("/ask", json.dumps(asked).encode())

    def foreign(self) -> bytes:
        origin = self.rng.choice(("null", "http://evil.example", "", UP, "http://127.0.0.1:1",
                                  f"http://127.0.0.1:{self.port}@evil.example"))
        if self.rng.random() < 0.5:
            return self.post(*self.body(), f"Origin: {origin}")
        host = self.rng.choice(("evil.example", f"evil.example:{self.port}", UP, "[", ":", "\u212a",
                                f"127.0.0.1:{self.port}, evil", f"127.0.0.1:{'9' * 5000}"))
        return self.head("GET / HTTP/1.1", host=host)

    def broken_picture(self) -> bytes:
        file, image = io.BytesIO(), Image.open(SCENE).convert("RGB")
        kind = self.rng.choice(("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "ICO", "PPM"))
        image.save(file, format=kind)
        return self.post("/picture", spoil(self.rng, file.getvalue()))

    def no_picture(self) -> bytes:
        return self.post("/picture", self.rng.choice((
            b"", b"GIF89a", b"\0" * 999, b"%PDF-1.7", b"<svg/>", b"<html>", b"P6 99999 99999 255 ",
            UP.encode(), b"\x89PNG\r\n\x1a\n", self.rng.randbytes(5000))))

    def bad_json(self) -> bytes:
        return self.post("/ask", spoil(self.rng, json.dumps(self.question()).encode()))

    def bad_field(self) -> bytes:
        """A question with one thing in it changed, or with nonsense for one of its fields."""
        asked = self.question()
        if self.rng.random() < 0.5:
            asked[self.rng.choice(list(asked))] = self.rng.choice(NASTY)
        else:
            asked = change(self.rng, asked)
        return self.post("/ask", json.dumps(asked).encode())

    def no_object(self) -> bytes:
        return self.post("/ask", self.rng.choice((
            b"[" * 200_000, b"9" * 100_000, b"null", b"[]", b"\xff\xfe{\0}\0", b'{"a":' * 500,
            b'"' + b"x" * 900_000 + b'"', json.dumps(NASTY[:-3]).encode())))

    def header_flood(self) -> bytes:
        many = self.rng.choice((["X: y"] * 5000, ["X: " + "y" * 200_000], ["y" * 200_000], [":"],
                                ["Cookie: " + "a=b; " * 9000] * 2, ["X : y", " z", "\0: \x0b"]))
        return self.head("GET / HTTP/1.1", *many)

    def nonsense(self) -> bytes:
        return self.rng.choice((self.rng.randbytes(300) + b"\r\n\r\n", b"\x16\x03\x01\x02\0" * 50,
                                b"GET / HTTP/1.1\n\n", b"GET /\r\n\r\n", b"PRI * HTTP/2.0\r\n\r\n",
                                b"GET / HTTP/1.1\r\n" * 99 + b"\r\n", b"G" * 100_000 + b"\r\n\r\n",
                                b"POST /ask HTTP/9999999999.1\r\n\r\n", b" / \r\n\r\n"))

    def pipelined(self) -> bytes:
        return self.post("/scene", b"") + self.head("GET / HTTP/1.1") * 50


KINDS = [name for name, method in vars(Hostile).items()
         if name not in ("head", "post", "question", "body") and not name.startswith("_")]


def told(port: int, request: bytes) -> bytes:
    """What comes back. The client has sent all, and closed its side."""
    with socket.create_connection(("127.0.0.1", port), timeout=30) as there:
        answer = b""
        try:
            there.sendall(request)
            there.shutdown(socket.SHUT_WR)
        except OSError:                              # it was refused before all was sent
            pass
        with suppress(ConnectionResetError):
            while piece := there.recv(2 ** 16):
                answer += piece
    return answer


def fault(answer: bytes) -> str:
    """What is wrong with an answer; "" if nothing is."""
    heads = re.match(rb"(?:HTTP/1\.1 100 Continue\r\n\r\n)?HTTP/1\.1 (\d+) ", answer)
    if not heads or int(heads[1]) not in STATUSES:
        return f"no status, or a wrong one: {answer[:80]!r}"
    body = answer.rpartition(b"\r\n\r\n")[2]
    if int(heads[1]) != 200 and "\n" in json.loads(body)["error"]:
        return f"not one line: {body[:200]!r}"
    return ""


def attack(client: Client, n: int, seed: int) -> tuple[Counter, list[str]]:
    """n hostile requests, of each kind in turn: how they ended, and the faults."""
    ends, faults, picture = Counter(), [], client.scene()
    for i in range(n):
        kind = KINDS[i % len(KINDS)]
        hostile = Hostile(random.Random(f"{kind}/{seed}/{i}"), client.port, picture)
        answer = told(client.port, getattr(hostile, kind)())
        if wrong := fault(answer):
            faults.append(f"{kind}/{seed}/{i}: {wrong}")
        ends[f"{kind}: {answer[9:12].decode('latin-1')}"] += 1
        if i % 10 == 9 and client.ask(COLOR)["text"] != "black":
            faults.append(f"{kind}/{seed}/{i}: afterwards another answer came")
    return ends, faults


def idle(client: Client, n: int) -> float:
    """Open connections that say nothing, and ask. Seconds that the answer took."""
    silent = [socket.create_connection(("127.0.0.1", client.port), 30) for _ in range(n)]
    began = time.monotonic()
    assert client.ask(COLOR)["text"] == "black"
    took = time.monotonic() - began
    for one in silent:
        one.close()
    return took


def vanish(client: Client, n: int) -> None:
    """Go away in the middle of answers."""
    for _ in range(n):
        lines = client.lines(picture=client.scene(), question=COLOR, temperature=9)
        next(lines)
        lines.close()


# --------------------------------------------------------------------------------------------------
# The program

def look(pid: int) -> tuple[float, int, int]:
    """MB of memory, open files, threads."""
    return (resident(pid) / 1e6, len(os.listdir(f"/proc/{pid}/fd")),
            len(os.listdir(f"/proc/{pid}/task")))


def ask_often(client: Client, pid: int, n: int) -> list[tuple[float, int, int]]:
    """n questions about new scenes, in all kinds: `look` after each."""
    seen = []
    for i in range(n):
        status, scene = client.request("POST", "/scene", b"")
        assert status == 200, scene
        done = client.ask(COLOR, picture=scene["picture"], temperature=[0.0, 1.5][i % 2],
                           off=[["lpwca"], []][i // 2 % 2], turns=[["Is it?", "yes"]] * (i % 3))
        assert done["done"] and done["sight"], done
        seen.append(look(pid))
    return seen


def flat(seen: list[tuple[float, int, int]]) -> list[str]:
    """Print what was seen, and say what has grown."""
    grown = []
    for what, values in zip(("MB of memory", "open files", "threads"), zip(*seen)):
        early, late = (statistics.median(values[part]) for part in (
            slice(CALM, CALM + 50), slice(-50, None)))
        print(f"{what}: {early:.1f} after {CALM} questions, {late:.1f} in the end, most "
              f"{max(values):.1f}")
        if late > GROWTH * early:
            grown.append(f"{what}: not flat")
    return grown


def served(arguments: list[str]) -> tuple[subprocess.Popen, Client]:
    """sample.py --serve as a process of its own, ready."""
    command = [sys.executable, str(ROOT / "sample.py"), "--serve", *arguments]
    program = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    line = program.stdout.readline()
    return program, Client(int(re.match(r"http://127\.0\.0\.1:(\d+) ", line)[1]))


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--requests", type=int, default=200)
    p.add_argument("--idle", type=int, default=1000)
    p.add_argument("--questions", type=int, default=500, help=f"at least {2 * CALM}; 0: none")
    p.add_argument("--seed", type=int, default=0)
    args = p.parse_args()
    program, client = served(["--device", "cpu"])
    try:
        ends, faults = attack(client, args.requests, args.seed)
        print(*(f"{end:28} {count:6,}" for end, count in sorted(ends.items())), sep="\n")
        print(f"{args.requests:,} requests, {len(faults)} ended badly")
        took = idle(client, args.idle)
        print(f"beside {args.idle:,} idle connections a question was answered in {took:.2f} s")
        vanish(client, 20)
        seen = ask_often(client, program.pid, args.questions)
        faults += flat(seen)
        began = time.monotonic()
        program.send_signal(signal.SIGINT)
        code = program.wait(30)
        print(f"Ctrl-C: exit status {code} after {time.monotonic() - began:.2f} s")
        said = program.stderr.read()
        if code != 130 or said.strip() != "interrupted":
            faults.append(f"it said: {said}")
        print(f"{len(faults)} faults", *faults, sep="\n")
    finally:
        program.kill()
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
