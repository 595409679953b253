"""The page of `python sample.py --serve`: Python's http.server, a thread for each connection, and
the models in the thread that began.

handler.py has a request, desk.py the models and what waits for them. Where all connections are
taken, the one that has been silent for longest makes room, so who opens many and says nothing keeps
nobody out.
"""
import argparse
import errno
import ipaddress
import json
import os
import socket
import sys
import threading
import time
from contextlib import suppress
from http.server import ThreadingHTTPServer
from socketserver import TCPServer

from core import flags
from core.common import UserError, one_line, visible
from viz import explorer
from viz.asking import Asker
from viz.desk import Desk
from viz.handler import Handler

HOST, PORT, PORTS = "127.0.0.1", 7860, 100           # PORTS: so many from PORT on are tried
CONNECTIONS = 32


# --------------------------------------------------------------------------------------------------
# Connections

class Server(ThreadingHTTPServer):
    """Listens from the start, and answers from `start` on. url: what to type into a browser."""
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128
    allow_reuse_address = os.name != "nt"            # Windows would let two listen to one port

    def __init__(self, host: str = HOST, port: int = 0):
        """port: 0 takes any that is free. OSError if the address can't be had."""
        self.address_family, _, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        self.lock = threading.Lock()
        # Each connection, and since when it has sent nothing; None once it needs to send no more
        self.connections: dict[socket.socket, float | None] = {}
        super().__init__(address[:2], Handler)
        ip = ipaddress.ip_address(self.server_address[0])
        self.local, self.everywhere = ip.is_loopback, ip.is_unspecified
        name = socket.gethostname() if self.everywhere else host
        self.names = {name.lower(), "127.0.0.1", "localhost", "::1"}
        self.url = f"http://{bracketed(name)}:{self.server_port}"

    def server_bind(self) -> None:
        """http.server's would look the host's name up in the network."""
        TCPServer.server_bind(self)
        self.server_name, self.server_port = self.server_address[:2]

    def start(self, desk: Desk) -> None:
        """Answer, in threads of its own, what a desk has to say."""
        self.desk = desk
        self.page = explorer.page({"serve": desk.about()}).encode()
        threading.Thread(target=self.serve_forever, args=[0.1], daemon=True).start()

    def known_as(self, host: str) -> bool:
        """Whether a Host header is this server. Where it listens to all addresses, it can't know
        them all, but a page of a foreign name can't send a number as its Host."""
        name, _, port = host.lower().rpartition(":")
        if port != str(self.server_port):            # a browser leaves out the usual port
            name, port = host.lower(), "80"
        bare = name.removeprefix("[").removesuffix("]")
        if int(port) != self.server_port or name != bracketed(bare):
            return False
        return bare in self.names or self.everywhere and numeric(bare)

    def process_request(self, request: socket.socket, client_address: tuple) -> None:
        """A thread for a connection, if there is room, or if room can be made."""
        with self.lock:
            if len(self.connections) >= CONNECTIONS:
                self.make_room()
            full = len(self.connections) >= CONNECTIONS
            if not full:
                self.connections[request] = time.monotonic()
        if full:
            return self.turn_away(request)
        try:
            super().process_request(request, client_address)
        except RuntimeError:                         # no more threads
            self.forget(request)
            self.turn_away(request)

    def make_room(self) -> None:
        """Close the connection that has been silent for longest, though it has more to send."""
        silent = {one: since for one, since in self.connections.items() if since is not None}
        if silent:
            oldest = min(silent, key=silent.get)
            del self.connections[oldest]
            with suppress(OSError):
                oldest.shutdown(socket.SHUT_RDWR)    # its thread reads its end, and leaves

    def heard(self, request: socket.socket, whole: bool = False) -> None:
        """A connection has sent something; whole: all that it had to."""
        with self.lock:
            if request in self.connections:
                self.connections[request] = None if whole else time.monotonic()

    def turn_away(self, request: socket.socket) -> None:
        """503, without waiting for anything: meanwhile nobody else is let in."""
        body = json.dumps(dict(error="too many connections; try again")).encode()
        with suppress(OSError):
            request.setblocking(False)
            request.send(b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\n"
                         b"Connection: close\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
        self.shutdown_request(request)

    def forget(self, request: socket.socket) -> None:
        with self.lock:
            self.connections.pop(request, None)

    def process_request_thread(self, request: socket.socket, client_address: tuple) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self.forget(request)

    def handle_error(self, request: socket.socket, client_address: tuple) -> None:
        """A connection that broke is nobody's mistake."""
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            line = one_line(f"{type(error).__name__}: {error}", 300)
            print(f"error: a connection failed: {visible(line)}", file=sys.stderr)


def bracketed(name: str) -> str:
    """A host's name or number as a URL has it."""
    return f"[{name}]" if ":" in name else name


def numeric(name: str) -> bool:
    with suppress(ValueError):
        return bool(ipaddress.ip_address(name))
    return False


# --------------------------------------------------------------------------------------------------
# sample.py --serve

ALONE = ("port", "host")                             # flags that need --serve
OTHERS = ("image", "q", "chat", "questions", "images", "answers", "batch", "heatmap", "html",
          "layers")                                  # flags that it doesn't go with


def options(g) -> None:
    g.add_argument("--serve", action="store_true",
                   help="a page to ask at, with the maps; --beside adds models to it")
    g.add_argument("--port", type=flags.whole(1, 65_535),
                   help=f"of its address (default: {PORT}, or the next that is free)")
    g.add_argument("--host", help=f"the address to listen to (default: {HOST}, this machine alone)")


def wanted(args: argparse.Namespace) -> bool:
    """Whether --serve is given. UserError for what doesn't go with it, or without."""
    if not args.serve:
        alone = [name for name in ALONE if getattr(args, name) is not None]
        if alone:
            raise UserError(f"--{alone[0]} is for --serve")
        return False
    others = [name for name in OTHERS if getattr(args, name) not in (None, False, [])]
    if others:
        raise UserError(f"--{others[0]} doesn't go with --serve, whose page takes pictures and "
                        "questions")
    return True


def listen(host: str | None, port: int | None) -> Server:
    """A server at --host and --port. UserError if it can't be had."""
    host, given = HOST if host is None else host, port is not None
    where = f"--host {visible(host)} --port {port}" if given else f"--host {visible(host)}"
    for port in [port] if given else range(PORT, PORT + PORTS):
        try:
            server = Server(host, port)
        except (socket.gaierror, UnicodeError):
            raise UserError(f"--host {host}: is no address of this machine") from None
        except OverflowError as e:
            raise UserError(f"{where}: {e}") from None
        except OSError as e:
            if e.errno != errno.EADDRINUSE or given:
                raise UserError(f"{where}: cannot listen there ({e.strerror or e}); choose "
                                "another") from None
        else:
            if not given and port != PORT:
                print(f"note: port {PORT} is taken, so this is {port}", file=sys.stderr)
            if not server.local:
                print(f"warning: --host {host}: whoever can reach this machine can ask here, and "
                      "use its time and memory; nothing is encrypted", file=sys.stderr)
            return server
    raise UserError(f"{where}: ports {PORT} to {PORT + PORTS - 1} are taken; choose another --port")


def serve(args: argparse.Namespace) -> None:
    """Answer until Ctrl-C: a KeyboardInterrupt, which ends all threads with this one."""
    server = listen(args.host, args.port)            # before models, which may take minutes
    models = [(args.model, args.adapter), *((other, None) for other in args.beside)]
    askers = [Asker(args, folder, adapter) for folder, adapter in models]
    desk = Desk(askers)
    server.start(desk)
    print(f"{server.url}  (Ctrl-C ends it)", flush=True)
    desk.work()
