"""The page that is served and renews itself: what the server answers, and to whom."""

import base64
import gzip
import http.client
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
from contextlib import suppress

import pytest

from policy_split_jax.cli import main
from policy_split_jax.report.groups import parse_named
from policy_split_jax.report.watch import Watcher, watch

TOKEN = "0123456789abcdef-secret"
GOOD = {"kind": "train", "step": 1, "reward/normal": 0.5}


def append(folder, *rows):
    folder.mkdir(exist_ok=True)
    with (folder / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return folder


def watcher(*runs):
    return Watcher([parse_named(str(run)) for run in runs])


@pytest.fixture
def serve():
    """Serves a folder on a free port of a host, and returns the port; as a daemon it ends with the tests."""

    def start(folder, host="127.0.0.1", token=None):
        bound = socket.socket()
        bound.bind((host, 0))
        bound.listen()
        port = bound.getsockname()[1]
        threading.Thread(target=watch, args=(watcher(folder), bound, token), daemon=True).start()
        return port

    return start


def ask(port, method="GET", path="/", **headers):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request(method, path, headers=headers)
    answer = connection.getresponse()
    body = answer.read()
    connection.close()
    return answer, body.decode()


def test_the_page_is_made_anew_only_when_a_file_has_changed(tmp_path):
    folder = append(tmp_path / "run", GOOD)
    pages = watcher(folder)
    first = pages.page()
    assert b"training step 1" in first.body
    assert pages.page() is first
    append(folder, GOOD | {"step": 2})
    second = pages.page()
    assert b"training step 2" in second.body
    assert second.tag != first.tag
    (folder / "summary.json").write_text("{}")
    assert b"\xc2\xb7 finished" in pages.page().body


def test_who_can_unpack_is_sent_less(tmp_path, serve):
    port = serve(append(tmp_path / "run", GOOD))
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request("GET", "/", headers={"Accept-Encoding": "gzip, deflate, br"})
    answer = connection.getresponse()
    packed = answer.read()
    connection.close()
    assert answer.headers["Content-Encoding"] == "gzip"
    plain, body = ask(port)
    assert plain.headers["Content-Encoding"] is None
    assert gzip.decompress(packed).decode() == body
    assert len(packed) < len(body) / 2
    assert plain.headers["ETag"] == answer.headers["ETag"]


def test_a_run_without_metrics_is_waited_for(tmp_path):
    pages = watcher(f"mine={tmp_path / '<run>'},{append(tmp_path / 'b', GOOD)}")
    assert f"Waiting for the first metrics of {tmp_path}/&lt;run&gt;<" in pages.page().body.decode()
    append(tmp_path / "<run>", GOOD)
    assert b"training step 1" in pages.page().body


def test_a_malformed_file_is_told_and_not_fatal(tmp_path):
    folder = append(tmp_path / "run", GOOD)
    (folder / "metrics.jsonl").write_text("no JSON\n")
    pages = watcher(folder)
    assert b"metrics.jsonl, line 1 is not JSON" in pages.page().body
    (folder / "metrics.jsonl").write_text(json.dumps(GOOD) + "\n")
    assert b"training step 1" in pages.page().body


def test_the_root_is_served_with_its_tag(tmp_path, serve):
    port = serve(append(tmp_path / "run", GOOD))
    answer, body = ask(port)
    assert (answer.status, answer.getheader("Content-Type")) == (200, "text/html; charset=utf-8")
    assert "training step 1" in body
    assert "; connect-src 'self'" in body
    again, nothing = ask(port, **{"If-None-Match": answer.getheader("ETag")})
    assert (again.status, nothing) == (304, "")
    assert ask(port, **{"If-None-Match": '"other"'})[0].status == 200


@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", "/index.html"), ("GET", "/?x"), ("GET", "/../etc/passwd"), ("POST", "/"), ("HEAD", "/"),
     ("DELETE", "/"), ("OPTIONS", "*")],
)  # fmt: skip
def test_nothing_else_is_there(tmp_path, serve, method, path):
    answer, body = ask(serve(append(tmp_path / "run", GOOD)), method, path)
    assert answer.status == 404
    assert "training" not in body


@pytest.mark.parametrize(
    ("host", "status"),
    [("127.0.0.1:{port}", 200), ("localhost:{port}", 200), ("localhost:1", 403), ("evil.example:{port}", 403),
     ("localhost.evil.example:{port}", 403), ("", 403)],
)  # fmt: skip
def test_a_page_elsewhere_cannot_name_itself_this_server(tmp_path, serve, host, status):
    port = serve(append(tmp_path / "run", GOOD))
    assert ask(port, Host=host.format(port=port))[0].status == status


def basic(password, name="any"):
    return f"Basic {base64.b64encode(f'{name}:{password}'.encode()).decode()}"


@pytest.mark.parametrize(
    ("authorization", "status"),
    [(basic(TOKEN), 200), (basic(TOKEN, ""), 200), (basic(TOKEN + "x"), 401), (basic(""), 401), ("Basic !", 401),
     (f"Basic {base64.b64encode(TOKEN.encode()).decode()}", 401), ("Basic /////w==", 401), (f"Bearer {TOKEN}", 401),
     ("", 401)],
)  # fmt: skip
def test_an_open_server_wants_its_token_and_answers_to_any_name(tmp_path, serve, authorization, status, capfd):
    port = serve(append(tmp_path / "run", GOOD), "0.0.0.0", TOKEN)
    answer, body = ask(port, Host="workstation:1234", Authorization=authorization)
    assert answer.status == status
    assert ("training step 1" in body) == (status == 200)
    if status == 401:
        assert answer.getheader("WWW-Authenticate").startswith("Basic realm=")
        assert "code 401" in capfd.readouterr().err


def test_what_is_refused_is_logged_and_what_is_served_is_not(tmp_path, serve, capfd):
    port = serve(append(tmp_path / "run", GOOD))
    ask(port)
    assert capfd.readouterr().err == ""
    ask(port, "GET", "/secret")
    with socket.create_connection(("127.0.0.1", port)) as client:
        client.sendall(b"\x00\x01\x1b[31m\r\n\r\n")
        assert b"Error code: 400" in client.recv(1000)
    errors = capfd.readouterr().err
    assert "code 404" in errors
    assert "code 400" in errors
    assert "\x1b" not in errors


def test_clients_that_trickle_or_vanish_keep_nobody_out(tmp_path, serve, capfd):
    """Many more than there may be connections; the oldest are closed."""
    port = serve(append(tmp_path / "run", GOOD))
    slow = [socket.create_connection(("127.0.0.1", port)) for _ in range(200)]
    for client in slow:
        client.sendall(b"GET / HTTP/1.1\r\nX-Slow: ")
    assert ask(port)[0].status == 200
    slow[0].settimeout(10)
    assert slow[0].recv(1) == b""
    for client in slow[-60:]:
        with suppress(OSError):
            client.sendall(f"\r\nHost: localhost:{port}\r\n\r\n".encode())
    for client in slow:
        # With a reset in place of a farewell.
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.close()
    assert ask(port)[0].status == 200
    assert "Traceback" not in capfd.readouterr().err


def test_output_and_watch_exclude_each_other(tmp_path, capsys):
    assert main(["report", str(tmp_path), "--watch", "--output", "x.html"]) == 2
    assert "--output and --watch exclude each other" in capsys.readouterr().err


def test_a_port_in_use_is_named(tmp_path, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert main(["report", str(tmp_path), "--watch", "--port", str(taken.getsockname()[1])]) == 2
    assert "choose another --host or --port" in capsys.readouterr().err


def test_an_interrupt_ends_it(tmp_path):
    command = [sys.executable, "-m", "policy_split_jax.cli", "report", str(tmp_path / "run"), "--watch", "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ)
    assert process.stdout is not None
    port = int(process.stdout.readline().split("/; Ctrl-C")[0].rpartition(":")[2])
    assert "Waiting for" in ask(port)[1]
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (130, "policy-split: interrupted\n")
