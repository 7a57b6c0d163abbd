"""`policy-split serve` as a process of its own: it says where it is, answers, and ends by Ctrl-C."""

import re
import signal
import socket
import subprocess
import sys

import httpx
import pytest

from policy_split_jax.cli import main


def test_serve_announces_itself_answers_and_ends_by_an_interrupt():
    command = [sys.executable, "-m", "policy_split_jax.cli", "serve", "--port", "0", "--name", "tiny", "--slots", "2"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            line = process.stdout.readline()
            found = re.fullmatch(r"tiny and tiny:high-entropy at (http://127\.0\.0\.1:\d+)/v1; Ctrl-C ends\n", line)
            assert found, line + process.stderr.read()
            body = {"model": "tiny:high-entropy", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3}
            transport = httpx.HTTPTransport(retries=5)
            with httpx.Client(transport=transport, timeout=120) as client:
                answer = client.post(f"{found[1]}/v1/chat/completions", json=body).json()
            assert 1 <= answer["usage"]["completion_tokens"] <= 3
        finally:
            process.send_signal(signal.SIGINT)
        errors = process.stderr.read()
    assert "Traceback" not in errors
    assert process.returncode in (0, 130)


def test_a_port_that_is_taken_is_an_error_of_one_line(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        taken.listen()
        port = taken.getsockname()[1]
        assert main(["serve", "--port", str(port)]) == 2
    assert re.search(rf"^policy-split: error: 127\.0\.0\.1:{port}: .*; choose another --host or --port$",
                     capsys.readouterr().err, re.M)  # fmt: skip


@pytest.mark.parametrize(
    ("option", "value"), [("--slots", "0"), ("--max-new-tokens", "0"), ("--decode-steps", "0"), ("--port", "65536")]
)
def test_sizes_out_of_range_are_refused(option, value, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["serve", option, value])
    assert ended.value.code == 2
    assert option in capsys.readouterr().err
