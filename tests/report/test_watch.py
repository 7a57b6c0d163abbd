"""The page that is served and renews itself: what the server answers, and to whom."""

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading

import pytest

from policy_split_jax.cli import main
from policy_split_jax.report.groups import parse_named
from policy_split_jax.report.watch import Watcher, watch

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

    def start(folder, host="127.0.0.1"):
        bound = socket.socket()
        bound.bind((host, 0))
        bound.listen()
        port = bound.getsockname()[1]
        threading.Thread(target=watch, args=(watcher(folder), bound), daemon=True).start()
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


def test_an_open_server_answers_to_any_name(tmp_path, serve):
    port = serve(append(tmp_path / "run", GOOD), host="0.0.0.0")
    assert ask(port, Host="workstation:1234")[0].status == 200


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
