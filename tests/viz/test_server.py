"""The page's server, asked by http.client and by hand: the page, every refusal, the program."""
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time

import pytest

import sample
from core.common import ROOT, UserError
from tests.attack.server import KINDS, attack
from tests.viz.served import SCENE, Client
from viz import handler, server

COLOR = "What color is the square?"


def test_the_page(live):
    status, page = live.request("GET", "/")
    assert status == 200 and page.startswith(b"<!DOCTYPE html>")
    assert live.headers["Content-Type"] == "text/html; charset=utf-8"
    policy = live.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy and "connect-src 'self'" in policy
    assert live.headers["X-Content-Type-Options"] == "nosniff"
    assert live.headers["Cache-Control"] == "no-store" and live.headers["Connection"] == "close"
    data = json.loads(page.decode().split('id="data">')[1].split("</script>")[0])
    about = data["serve"]
    assert about["models"][0] == "toy" and len(about["models"]) == 2 and about["toy"] is True
    assert about["parts"] == ["lpwca", "lwca", "pwca"]
    assert about["limits"] == {"bytes": 20_000_000}
    assert (about["max_new_tokens"], about["temperature"]) == (128, 0.0)


# --------------------------------------------------------------------------------------------------
# Refusals

@pytest.mark.parametrize("changes, why", [
    (dict(question=""), "empty"), (dict(question=" \n"), "empty"),
    (dict(question=None), "question"),
    (dict(question=["x"]), "a text"), (dict(question="\ud800"), "valid Unicode"),
    (dict(question="dog " * 1200), "too long"), (dict(picture=7), "picture"),
    (dict(turns="x"), "turns"), (dict(turns=[["a"]]), "pairs"),
    (dict(turns=[["a", None]]), "turns"),
    (dict(turns=[["", "x"]]), "empty"), (dict(turns=[["a", "\udfff"]]), "valid Unicode"),
    (dict(turns=[["a", "b"]] * 1001), "1000 pairs"),
    (dict(turns=[["a", "b " * 1200]]), "begin anew"),
    (dict(temperature=-1), "temperature"), (dict(temperature=1e-9), "temperature"),
    (dict(temperature=True), "temperature"), (dict(temperature=float("nan")), "temperature"),
    (dict(temperature=10 ** 400), "temperature"), (dict(max_new_tokens=0), "max_new_tokens"),
    (dict(max_new_tokens=129), "128"), (dict(max_new_tokens=1.5), "max_new_tokens"),
    (dict(off="lpwca"), "off"), (dict(off=["smooth"]), "off"), (dict(off=[None]), "off"),
    (dict(model=2), "models 0 to 1"), (dict(model=-1), "model"), (dict(model="../"), "model")])
def test_bad_questions(live, changes, why):
    body = json.dumps(dict(picture="x", question="What?") | changes)
    status, told = live.request("POST", "/ask", body)
    assert status == 400 and why in told["error"], told
    assert "\n" not in told["error"] and len(told["error"]) < 2100


@pytest.mark.parametrize("body", [
    b"", b"{", b"[]", b"7", b"\xff\xfe", b'{"question": ' + b"[" * 100_000, b'"x"',
    b"9" * 100_000, b'{"a": ' + b"[" * 200 + b"]" * 200 + b"}"])
def test_bad_json(live, body):
    status, told = live.request("POST", "/ask", body)
    assert status == 400 and "\n" not in told["error"]


def test_unknown_pictures(live):
    for name in ("0" * 64, "", "../../etc/passwd", "/etc/passwd", "\0", "x" * 10_000):
        status, told = live.request("POST", "/ask", json.dumps(dict(picture=name, question="x")))
        assert status == 404 and "choose the picture again" in told["error"]


@pytest.mark.parametrize("method, path, status", [
    ("GET", "/x", 404), ("GET", "/../etc/passwd", 404), ("GET", "/?x=1", 404),
    ("GET", "/page.html", 404), ("GET", "/%2e%2e/etc/passwd", 404), ("GET", "http://a.b/", 403),
    ("POST", "/", 405), ("GET", "/ask", 405), ("HEAD", "/", 405), ("DELETE", "/picture", 405),
    ("OPTIONS", "/ask", 405), ("PUT", "/scene", 405), ("POST", "/asks", 404)])
def test_nothing_else_is_there(live, method, path, status):
    got, told = live.request(method, path)
    assert got == status and (told == b"" if method == "HEAD" else told["error"])
    assert (live.headers["Allow"] is not None) == (status == 405)


def test_foreign_pages(live):
    """Another name (DNS rebinding), another port, another page, none."""
    port, picture = live.port, SCENE.read_bytes()
    for host in (f"evil.example:{port}", "127.0.0.1", f"127.0.0.1:{port + 1}", f"[::2]:{port}",
                 f"127.0.0.1:{port}.evil.example", f"::1:{port}", f"10.0.0.1:{port}", "", "x" * 99):
        for method, path in (("GET", "/"), ("POST", "/picture")):
            status, told = live.request(method, path, picture, Host=host)
            assert status == 403 and live.server.url in told["error"]
    for host in (f"localhost:{port}", f"LOCALHOST:{port}", f"[::1]:{port}", f"127.0.0.1:{port}"):
        assert live.request("GET", "/", Host=host)[0] == 200
        own = dict(Host=host, Origin=f"http://{host}".lower())
        assert live.request("POST", "/picture", picture, **own)[0] == 200
    for origin in ("null", "", "http://evil.example", f"https://127.0.0.1:{port}",
                   f"http://localhost:{port}", "http://127.0.0.1", "file://"):
        status, told = live.request("POST", "/picture", picture, Origin=origin)
        assert status == 403 and "can't ask here" in told["error"]
    twice = f"GET / HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nHost: evil\r\n\r\n".encode()
    assert live.raw(twice).startswith(b"HTTP/1.1 403")
    assert live.raw(b"GET / HTTP/1.1\r\n\r\n").startswith(b"HTTP/1.1 403")


def bare(live, first, *headers, body=b""):
    """What comes back for a request with these lines."""
    lines = [first, f"Host: 127.0.0.1:{live.port}", *headers]
    return live.raw("".join(f"{line}\r\n" for line in lines).encode() + b"\r\n" + body)


@pytest.mark.parametrize("status, first, headers", [
    (411, "POST /ask HTTP/1.1", []), (411, "POST /ask HTTP/1.1", ["Transfer-Encoding: chunked"]),
    (411, "POST /picture HTTP/1.1", ["Transfer-Encoding: x", "Content-Length: 3"]),
    (400, "POST /ask HTTP/1.1", ["Content-Length: -1"]),
    (400, "POST /ask HTTP/1.1", ["Content-Length: 1e3"]),
    (400, "POST /ask HTTP/1.1", ["Content-Length: \u0663"]),
    (400, "POST /ask HTTP/1.1", ["Content-Length: " + "9" * 5000]),
    (400, "POST /ask HTTP/1.1", ["Content-Length: 3", "Content-Length: 3"]),
    (400, "POST /ask HTTP/1.1", ["Content-Length: 99"]),           # the body ends before
    (413, "POST /ask HTTP/1.1", ["Content-Length: 1048577"]),
    (413, "POST /picture HTTP/1.1", ["Content-Length: 1000000000"]),
    (413, "POST /scene HTTP/1.1", ["Content-Length: 1"]),
    (431, "GET / HTTP/1.1", ["X: y"] * 200), (431, "GET / HTTP/1.1", ["X: " + "y" * 70_000]),
    (431, "GET /" + "x" * 70_000 + " HTTP/1.1", []),
    (400, "GET / HTTP/1.1 x", []), (400, "nonsense", []), (505, "GET / HTTP/2.0", []),
    (505, "GET / HTTP/1.0", []), (400, "GET / FTP/1.1", []), (505, "GET /", [])])
def test_bad_heads(live, status, first, headers):
    answer = bare(live, first, *headers)
    assert answer.startswith(b"HTTP/1.1 %d " % status), answer[:100]
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]


def test_a_head_that_ends(live):
    assert live.raw(b"GET / HT").startswith(b"HTTP/1.1 400") and live.raw(b"") == b""
    assert live.raw(b"\0\xff\r\n\r\n").startswith(b"HTTP/1.1 400")


def test_a_large_picture_is_sent_in_vain_but_reads_why(live):
    """A browser sends all of it before it reads the answer."""
    status, told = live.request("POST", "/picture", bytes(30_000_000))
    assert status == 413 and "20,000,000" in told["error"]


def test_an_announced_body_is_asked_for(live):
    """curl sends a long one after 100 alone."""
    expect = "Expect: 100-continue"
    answer = bare(live, "POST /scene HTTP/1.1", expect, "Content-Length: 0")
    assert answer.startswith(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200")
    answer = bare(live, "POST /picture HTTP/1.1", expect, "Content-Length: 1000000000")
    assert answer.startswith(b"HTTP/1.1 413")


def test_the_slow(live, monkeypatch):
    """Who says nothing, drips a head, or stops in a body is told so, and leaves."""
    monkeypatch.setattr(handler, "PATIENCE", 0.3)
    monkeypatch.setattr(handler, "WHOLE", 0.6)
    for said in (b"", b"GET / HTTP/1.1\r\nX: y",
                 f"POST /picture HTTP/1.1\r\nHost: 127.0.0.1:{live.port}\r\n"
                 "Content-Length: 900\r\n\r\nabc".encode()):
        assert live.raw(said, ends=False).startswith(b"HTTP/1.1 408")
    with socket.create_connection(("127.0.0.1", live.port), timeout=20) as there:
        there.sendall(f"POST /picture HTTP/1.1\r\nHost: 127.0.0.1:{live.port}\r\n"
                      "Content-Length: 900\r\n\r\n".encode())
        for _ in range(8):                                         # never silent, never done
            there.sendall(b"x")
            time.sleep(0.1)
        assert there.recv(100).startswith(b"HTTP/1.1 408")


def test_many_who_say_nothing(live):
    """The one that was silent for longest makes room; 32 that are heard leave none."""
    idle = [socket.create_connection(("127.0.0.1", live.port)) for _ in range(200)]
    assert live.ask(COLOR)["text"] == "black"
    assert len(live.server.connections) <= server.CONNECTIONS
    for one in idle:
        one.close()


def test_hostile_requests(live, capsys):
    """One of each kind; a question is answered after ten. (More: python -m tests.attack.server.)"""
    ends, faults = attack(live, len(KINDS), seed=0)
    assert not faults and sum(ends.values()) == len(KINDS) > 12
    assert capsys.readouterr().err == ""


def test_no_room(live, monkeypatch):
    monkeypatch.setattr(server, "CONNECTIONS", 0)
    assert live.raw(b"", ends=False).startswith(b"HTTP/1.1 503")
    monkeypatch.undo()
    assert live.request("GET", "/")[0] == 200


# --------------------------------------------------------------------------------------------------
# The program

def test_an_address(capsys, monkeypatch):
    """The usual port, the next one, one that is asked for and taken."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"--port {port}: cannot listen there"):
            server.listen(None, port)
        monkeypatch.setattr(server, "PORT", port)
        with server.listen(None, None) as other:
            assert other.server_port > port and other.url == f"http://127.0.0.1:{other.server_port}"
        assert f"port {port} is taken" in capsys.readouterr().err
        monkeypatch.setattr(server, "PORTS", 1)
        with pytest.raises(UserError, match="are taken"):
            server.listen(None, None)
    for host in ("no such", "1.2.3.4", "\ud800", "x" * 99):
        with pytest.raises(UserError, match="--host") as e:
            server.listen(host, None)
        assert "\n" not in str(e.value)
    with server.listen("0.0.0.0", None) as everywhere:
        assert "warning: --host 0.0.0.0: whoever can reach" in capsys.readouterr().err
        port = everywhere.server_port
        known = (f"10.0.0.1:{port}", f"[fe80::1]:{port}", f"localhost:{port}",
                 f"{socket.gethostname()}:{port}")
        assert all(map(everywhere.known_as, known))
        assert not any(map(everywhere.known_as, (f"evil.example:{port}", "10.0.0.1", "")))
    everywhere.server_port = 80
    assert everywhere.known_as("10.0.0.1") and everywhere.known_as("[::1]:80")


@pytest.mark.parametrize("arguments, names", [
    (["--port", "7999"], "--port is for --serve"), (["--host", "x"], "--host is for --serve"),
    (["--serve", "--image", "x"], "--image"), (["--serve", "--chat"], "--chat"),
    (["--serve", "--questions", "x"], "--questions"), (["--serve", "--html", "x"], "--html"),
    (["--serve", "--layers", ""], "--layers"), (["--serve", "--port", "0"], "1 to 65535"),
    (["--serve", "--port", "x"], "whole number"),
    (["--serve", "--pack", "--quant", "int8"], "exclude")])
def test_flags(arguments, names):
    with pytest.raises(UserError, match=re.escape(names)) as e:
        sample.arguments(arguments)
    assert "\n" not in str(e.value)


def test_a_wrong_model_is_named(tmp_path):
    with pytest.raises(UserError, match="nowhere"):
        sample.main(["--serve", "--beside", str(tmp_path / "nowhere")])


def test_ctrl_c_ends_it_at_once(tmp_path):
    """While clients are connected and an answer is being made."""
    command = [sys.executable, str(ROOT / "sample.py"), "--serve", "--device", "cpu"]
    program = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True,
                               stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        said = program.stdout.readline()
        port = int(re.fullmatch(r"http://127\.0\.0\.1:(\d+)  \(Ctrl-C ends it\)\n", said)[1])
        idle = [socket.create_connection(("127.0.0.1", port)) for _ in range(3)]
        told = Client(port).request("POST", "/picture", SCENE.read_bytes())[1]
        asked = dict(picture=told["picture"], question="Where is it?", temperature=100)
        lines = Client(port).lines(**asked)
        next(lines)
        began = time.monotonic()
        program.send_signal(signal.SIGINT)
        assert program.wait(20) == 130 and time.monotonic() - began < 5
        assert program.stderr.read().endswith("\ninterrupted\n")
    finally:
        program.kill()
        program.communicate()
    for one in idle:
        one.close()
