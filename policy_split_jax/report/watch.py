"""Serves the report of runs that go on, made anew when their files have changed. For one reader, on this machine."""

import hashlib
import html
import ipaddress
import socket
import threading
from collections.abc import Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple

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
    "X-Content-Type-Options": "nosniff",
}


class Served(NamedTuple):
    """A page as it goes over the wire, and the tag by which a browser says that it has it."""

    body: bytes
    tag: str


class Watcher:
    """The page about these runs; any thread may ask for it."""

    def __init__(self, runs: Sequence[Named]):
        self._runs = runs
        self._lock = threading.Lock()
        self._seen: list[tuple[int, int] | None] | None = None
        self._served = Served(b"", "")

    def page(self) -> Served:
        """Of the files as they are now."""
        with self._lock:
            # Looked at before they are read: what is written in between is seen the next time.
            state = self._state()
            if state != self._seen:
                body = self._render().encode("utf-8", errors="replace")
                self._seen, self._served = state, Served(body, f'"{hashlib.sha256(body).hexdigest()[:32]}"')
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


def watch(watcher: Watcher, bound: socket.socket) -> None:
    """Serves on a socket that listens, until it is interrupted."""
    host, port = bound.getsockname()[:2]
    local = ipaddress.ip_address(host).is_loopback
    allowed = {f"{name}:{port}" for name in ("localhost", "127.0.0.1", host)} if local else None
    with _Server(bound.getsockname(), _handler(watcher, allowed), bind_and_activate=False) as server:
        server.socket.close()
        server.socket = bound
        server.serve_forever()


class _Server(ThreadingHTTPServer):
    daemon_threads = True


def _handler(watcher: Watcher, allowed: set[str] | None) -> type[BaseHTTPRequestHandler]:
    """Answers GET / and nothing else; to other names than those `allowed` (None: all) not even that.

    A page elsewhere could otherwise read this one by letting its own name point here (DNS rebinding).
    """

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        server_version, sys_version = "policy-split", ""
        # A connection on which nobody asks for anything more is closed.
        timeout = 30

        def parse_request(self) -> bool:
            if not super().parse_request():
                return False
            if allowed is not None and self.headers.get("Host", "") not in allowed:
                self.send_error(HTTPStatus.FORBIDDEN, "Unknown host name")
                return False
            if (self.command, self.path) != ("GET", "/"):
                self.send_error(HTTPStatus.NOT_FOUND)
                return False
            return True

        def do_GET(self) -> None:
            body, tag = watcher.page()
            known = self.headers.get("If-None-Match") == tag
            self.send_response(HTTPStatus.NOT_MODIFIED if known else HTTPStatus.OK)
            for name, value in {**HEADERS, "ETag": tag}.items():
                self.send_header(name, value)
            if not known:
                self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if not known:
                self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Asked every two seconds, it has nothing to tell."""

    return Handler


def _size_and_time(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns
