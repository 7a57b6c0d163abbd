"""Serves the report of runs that go on, made anew when their files have changed. For few readers."""

import base64
import gzip
import hashlib
import html
import socket
import sys
import threading
from collections import deque
from collections.abc import Collection, Sequence
from contextlib import suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

from policy_split_jax.access import own_names, same_token
from policy_split_jax.errors import UserError
from policy_split_jax.report.frame import frame
from policy_split_jax.report.groups import Named, read_groups
from policy_split_jax.report.page import live, render, watch_line

FILES = ("metrics.jsonl", "samples.jsonl", "config.yaml", "summary.json")
HEADERS = {
    "Content-Type": "text/html; charset=utf-8",
    "Cache-Control": "no-cache",
    "Content-Security-Policy": "frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Vary": "Accept-Encoding",
    "X-Content-Type-Options": "nosniff",
}
_ASK = {"WWW-Authenticate": 'Basic realm="policy-split", charset="UTF-8"'}
_CONNECTIONS = 64
_GZIP_LEVEL = 1
"""A page is packed as often as it changes: quickly."""


class Served(NamedTuple):
    """A page as it goes over the wire, and the tag by which a browser says that it has it."""

    body: bytes
    packed: bytes
    """The same as gzip: a third of its megabytes, for readers over the air."""
    tag: str


class Watcher:
    """The page about these runs; any thread may ask for it."""

    def __init__(self, runs: Sequence[Named]):
        self._runs = runs
        self._lock = threading.Lock()
        self._seen: list[tuple[int, int] | None] | None = None
        self._served = Served(b"", b"", "")

    def page(self) -> Served:
        """Of the files as they are now."""
        with self._lock:
            # Looked at before they are read: what is written in between is seen the next time.
            state = self._state()
            if state != self._seen:
                body = self._render().encode("utf-8", errors="replace")
                tag = f'"{hashlib.sha256(body).hexdigest()[:32]}"'
                self._seen, self._served = state, Served(body, gzip.compress(body, _GZIP_LEVEL, mtime=0), tag)
            return self._served

    def _state(self) -> list[tuple[int, int] | None]:
        """Size and time of every file, None for one that is not there."""
        return [_size_and_time(Path(path) / name) for run in self._runs for path in run.paths for name in FILES]

    def _render(self) -> str:
        waiting = [path for run in self._runs for path in run.paths if not (Path(path) / FILES[0]).is_file()]
        if waiting:
            return waiting_page(f"Waiting for the first metrics of {', '.join(waiting)}")
        try:
            return render(read_groups(self._runs), watched=True)
        except UserError as error:
            return waiting_page(f"Cannot be shown: {error}")


def waiting_page(words: str) -> str:
    """What stands there as long as there is nothing to show."""
    main = live("waiting", f'<p class="verdict muted">{html.escape(words)}</p>')
    return frame("waiting", watch_line(True), main, charts=[], scripts=["watch.js"])


def watch(watcher: Watcher, bound: socket.socket, token: str | None = None) -> None:
    """Serves on a socket that listens, until it is interrupted.

    With a `token` to all who give it as the password of basic authentication, with any name; without one to those who
    call the server by a name of this machine's own. A page elsewhere could otherwise read this one by letting its own
    name point here (DNS rebinding).
    """
    host, port = bound.getsockname()[:2]
    names = {f"{name}:{port}" for name in own_names(host)}
    with _Server(bound.getsockname(), _handler(watcher, token, names), bind_and_activate=False) as server:
        server.socket.close()
        server.socket = bound
        server.serve_forever()


class _Server(ThreadingHTTPServer):
    """Keeps so many connections and no more: for a new one the oldest is closed, as slow as its client may be."""

    daemon_threads = True

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, **options)
        self._connections: deque[socket.socket] = deque()

    def process_request(self, request: Any, client_address: Any) -> None:
        self._connections = deque(connection for connection in self._connections if connection.fileno() >= 0)
        if len(self._connections) >= _CONNECTIONS:
            _hang_up(self._connections.popleft())
        self._connections.append(request)
        super().process_request(request, client_address)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that has gone is no error."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)


def _hang_up(connection: socket.socket) -> None:
    """Its thread reads the end and closes it."""
    with suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)


def _handler(watcher: Watcher, token: str | None, names: Collection[str]) -> type[BaseHTTPRequestHandler]:
    """Answers GET / and nothing else, to whoever may ask."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        server_version, sys_version = "policy-split", ""
        # A connection on which nobody asks for anything more, or reads, is closed.
        timeout = 30

        def parse_request(self) -> bool:
            if not super().parse_request():
                return False
            if token is not None and not _knows(self.headers.get("Authorization", ""), token):
                self._ask_for_token()
                return False
            if token is None and self.headers.get("Host", "").lower() not in names:
                self.send_error(HTTPStatus.FORBIDDEN, "Unknown host name")
                return False
            if (self.command, self.path) != ("GET", "/"):
                self.send_error(HTTPStatus.NOT_FOUND)
                return False
            return True

        def _ask_for_token(self) -> None:
            self.log_error("code 401, no token")
            self.send_response(HTTPStatus.UNAUTHORIZED)
            for name, value in {**_ASK, "Content-Length": "0", "Connection": "close"}.items():
                self.send_header(name, value)
            self.end_headers()

        def do_GET(self) -> None:
            body, packed, tag = watcher.page()
            known = self.headers.get("If-None-Match") == tag
            self.send_response(HTTPStatus.NOT_MODIFIED if known else HTTPStatus.OK)
            for name, value in {**HEADERS, "ETag": tag}.items():
                self.send_header(name, value)
            if not known:
                if "gzip" in self.headers.get("Accept-Encoding", ""):
                    body = packed
                    self.send_header("Content-Encoding", "gzip")
                self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if not known:
                self.wfile.write(body)

        def log_request(self, code: object = "-", size: object = "-") -> None:
            """Asked every two seconds, it has nothing to tell; what is refused is told by `log_error`."""

    return Handler


def _knows(authorization: str, token: str) -> bool:
    """Whether basic authentication gives the token as its password."""
    scheme, _, coded = authorization.partition(" ")
    try:
        given = base64.b64decode(coded, validate=True).decode()
    except ValueError:
        return False
    return scheme.lower() == "basic" and same_token(given.partition(":")[2], token)


def _size_and_time(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns
