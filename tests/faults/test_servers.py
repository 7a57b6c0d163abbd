"""The server as a process of its own under many clients at once, of which some vanish and some send nonsense."""

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from types import MappingProxyType

import httpx
import pytest

from policy_split_jax.access import TOKEN

QUESTION = "Make 35 from 3, 5, 4."
MAX_PROMPT = 64
SEEDS = 8
# Larger than any body that the server reads, and smaller than what a socket's buffers swallow at once.
BODY_BOUND = (1 << 16) + 64 * MAX_PROMPT
PROGRAM = "import sys; from policy_split_jax.cli import main; sys.exit(main())"
NAMES = ("tiny", "tiny:high-entropy")
# On a signal the server tells of its live objects: those of requests, and all.
TELLING = f"""
import collections, gc, signal, sys
def tell(*_):
    gc.collect()
    kinds = collections.Counter(type(found).__name__ for found in gc.get_objects())
    requests = sum(kinds[kind] for kind in ("_Client", "Job", "_Request", "_Running", "_Waiting", "_Work"))
    print("LIVE", requests, sum(kinds.values()), file=sys.stderr, flush=True)
signal.signal(signal.SIGUSR1, tell)
{PROGRAM}"""
# What leaks at each request grows in every wave. Now and then a wave adds some 1,300 objects and 20 MiB for once, as a
# program for new shapes would. So it is the wave of least growth that is bounded for objects, and the one in the
# middle for memory, which also moves by itself.
WARM, WAVES, MOST_OBJECTS, MOST_MIB = 3, 7, 100, 4


def head(length, host="localhost", method="POST", path="/v1/chat/completions", more=""):
    lines = [f"{method} {path} HTTP/1.1", f"Host: {host}", "Connection: close", *([more] if more else [])]
    return "\r\n".join([*lines, f"Content-Length: {length}", "", ""]).encode()


def asking(body):
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return head(len(content)) + content


def question(at, **options):
    messages = [{"role": "user", "content": QUESTION}]
    return {"model": NAMES[at % 2], "messages": messages, "max_tokens": 16, "seed": at % SEEDS, **options}


def chunked(size):
    parts = b"".join(b"1000\r\n" + b" " * 0x1000 + b"\r\n" for _ in range(size // 0x1000 + 1))
    start = head(0).replace(b"Content-Length: 0", b"Transfer-Encoding: chunked")
    return start + parts + b"0\r\n\r\n"


MALFORMED = {
    "no HTTP": (b"\x00\xff\x1b[31m\r\n\r\n", 400),
    "no JSON": (asking(b"{"), 400),
    "no UTF-8": (asking(b'{"model": "\xff\xfe"}'), 400),
    "half a surrogate": (asking(b'{"model": "\\ud800"}'), 400),
    "a nest of lists": (asking(b"[" * 60_000), 400),
    "a nest of objects": (asking(b'{"a":' * 12_000), 400),
    "a number of many digits": (asking(b'{"model": "tiny", "n": ' + b"9" * 60_000 + b"}"), 400),
    "not a number": (asking(json.dumps(question(0, temperature=float("nan"))).encode()), 400),
    "a temperature that divides to infinity": (asking(question(0, temperature=1e-300)), 400),
    "a top_k beyond 32 bits": (asking(question(0, top_k=10**12)), 400),
    "no such model": (asking(question(0) | {"model": "x\n" * 1000}), 404),
    "an unknown field": (asking(question(0) | {"\x1b[31m": 1}), 400),
    "too many turns": (asking(question(0, messages=[{"role": "user", "content": ""}] * 1000)), 400),
    "too long a prompt": (asking(question(0, messages=[{"role": "user", "content": "a" * 60_000}])), 400),
    "too long a head": (head(0, more=f"X-Long: {'a' * 70_000}"), 400),
    "too long a body": (asking(b" " * (BODY_BOUND + 1)), 413),
    "too long a body of no known length": (chunked(BODY_BOUND), 413),
    "a negative length": (head(-1), 400),
    "two lengths": (head(5, more="Content-Length: 6") + b"{}   ", 400),
    "a chunk of no size": (head(0).replace(b"Content-Length: 0", b"Transfer-Encoding: chunked") + b"x\r\n", 400),
    "no such path": (head(0, path="/%ff%00/../etc/passwd"), 404),
    "no such method": (head(0, method="DELETE"), 405),
    "another host": (head(0, host="evil.example"), 403),
    "another origin": (head(0, more="Origin: https://evil.example"), 403),
}


@dataclass
class Served:
    process: subprocess.Popen
    port: int
    log: Path

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}"

    def metric(self, name):
        lines = httpx.get(f"{self.url}/metrics", timeout=60).text.splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name))

    def free(self):
        return self.metric("policy_split_running") == self.metric("policy_split_waiting") == 0

    def live_objects(self):
        """How many there are; none of them belongs to a request, as soon as closed connections are forgotten."""
        told = []

        def ask():
            before = self.log.read_text().count("LIVE ")
            self.process.send_signal(signal.SIGUSR1)
            assert eventually(lambda: self.log.read_text().count("LIVE ") > before)
            told[:] = re.findall(r"LIVE (\d+) (\d+)\n", self.log.read_text())[-1]
            return told[0] == "0"

        assert eventually(ask), f"{told[0]} objects of requests are left"
        return int(told[1])

    def mebibytes(self):
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1024


@contextmanager
def served(folder, *options, program=PROGRAM, environment=MappingProxyType({})):
    command = [sys.executable, "-c", program, "serve", "--port", "0", "--name", "tiny", "--max-prompt-tokens",
               str(MAX_PROMPT), "--max-new-tokens", "400", *options]  # fmt: skip
    log = folder / "server.log"
    with log.open("w") as errors:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, env=os.environ | environment
        )
    with process:
        try:
            line = process.stdout.readline()
            found = re.search(r":(\d+)/v1; ", line)
            assert found, line + log.read_text()
            server = Served(process, int(found[1]), log)
            with httpx.Client(transport=httpx.HTTPTransport(retries=5), timeout=120) as client:
                client.get(f"{server.url}/health")
            yield server
        finally:
            process.send_signal(signal.SIGINT)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with served(tmp_path_factory.mktemp("server"), "--slots", "32") as server:
        yield server


def eventually(condition, seconds=60):
    """Whether it holds within so many seconds."""
    end = time.monotonic() + seconds
    while not (held := condition()) and time.monotonic() < end:
        time.sleep(0.1)
    return held


@dataclass
class Got:
    status: int
    text: str
    seconds: float


async def exchange(port, begin, request, read_bytes=None):
    """Sends a request as soon as `begin` is set; with `read_bytes` the client vanishes when it has read so many."""
    async with asyncio.timeout(300):
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 20)
        await begin.wait()
        start = time.perf_counter()
        answer = b""
        try:
            writer.write(request)
            if read_bytes is None:
                with suppress(ConnectionError):
                    while part := await reader.read(1 << 16):
                        answer += part
            elif read_bytes:
                answer = await reader.readexactly(read_bytes)
        finally:
            writer.transport.abort()
        status = int(answer.split(b" ", 2)[1]) if answer.startswith(b"HTTP/1.1 ") else 0
        return Got(status, answer.decode("utf-8", "replace"), time.perf_counter() - start)


def content(got):
    """The text of an answer, streamed or whole."""
    body = got.text.partition("\r\n\r\n")[2]
    if "text/event-stream" not in got.text:
        return json.loads(body)["choices"][0]["message"]["content"]
    assert "data: [DONE]" in body
    events = [json.loads(line[6:]) for line in body.splitlines() if line.startswith("data: {")]
    return "".join(choice["delta"].get("content", "") for event in events for choice in event["choices"])


def references(server):
    """The answer to every question of a wave, asked alone."""
    url = f"{server.url}/v1/chat/completions"
    answers = [httpx.post(url, json=question(at), timeout=120).json() for at in range(SEEDS)]
    return [answer["choices"][0]["message"]["content"] for answer in answers]


def role(at):
    """One of five clients vanishes and one sends nonsense."""
    return {0: "vanish", 1: "malformed"}.get(at % 5, "ask")


def client(server, begin, at):
    if role(at) == "malformed":
        return exchange(server.port, begin, list(MALFORMED.values())[at // 5 % len(MALFORMED)][0])
    if role(at) == "vanish":
        # Right after the request, within the first event, or further on.
        request = asking(question(at, stream=True, n=4, max_tokens=400, temperature=5.0))
        return exchange(server.port, begin, request, [0, 150, 700][at // 5 % 3])
    return exchange(server.port, begin, asking(question(at, stream=at % 2 == 0)))


async def wave(server, clients):
    """All clients are connected before the first of them asks."""
    begin = asyncio.Event()
    tasks = [asyncio.ensure_future(client(server, begin, at)) for at in range(clients)]
    await asyncio.sleep(0.5)
    begin.set()
    return await asyncio.gather(*tasks)


def check_wave(server, expected, clients):
    """One wave; every client that asks gets the text that it gets alone, every other a refusal. Returns its figures."""
    start = time.perf_counter()
    results = asyncio.run(wave(server, clients))
    seconds = time.perf_counter() - start
    answered = [(at, got) for at, got in enumerate(results) if role(at) == "ask"]
    assert [(at, got.status) for at, got in answered if got.status != 200] == []
    assert [at for at, got in answered if content(got) != expected[at % SEEDS]] == []
    refused = [(at // 5 % len(MALFORMED), got) for at, got in enumerate(results) if role(at) == "malformed"]
    wrong = [(list(MALFORMED)[kind], got.status) for kind, got in refused
             if got.status != list(MALFORMED.values())[kind][1]]  # fmt: skip
    assert wrong == []
    assert eventually(server.free)
    assert references(server) == expected
    assert server.process.poll() is None
    assert "Traceback" not in server.log.read_text()
    counts = Counter(map(role, range(clients)))
    p95 = sorted(got.seconds for _, got in answered)[int(0.95 * len(answered))]
    return (
        f"{clients} clients at once in {seconds:.1f} s: {counts['ask']} answered (95 % within {p95:.1f} s), "
        f"{counts['malformed']} refused, {counts['vanish']} vanished"
    )


def test_some_clients_vanish_and_some_send_nonsense(server):
    check_wave(server, references(server), 40)


@pytest.mark.parametrize(("request_bytes", "status"), MALFORMED.values(), ids=MALFORMED)
def test_nonsense_is_refused_and_logged(server, request_bytes, status):
    before = len(server.log.read_text())

    async def once():
        begin = asyncio.Event()
        begin.set()
        return await exchange(server.port, begin, request_bytes)

    assert asyncio.run(once()).status == status
    logged = server.log.read_text()[before:]
    assert logged.strip()
    assert "\x1b" not in logged
    assert max(map(len, logged.splitlines())) < 1000
    assert httpx.get(f"{server.url}/health").json() == {"status": "ok"}


@pytest.mark.slow
def test_1000_clients_at_once_leave_slots_free_and_no_memory_behind(tmp_path, figure):
    with served(tmp_path, "--slots", "32", program=TELLING) as server:
        expected = references(server)
        for _ in range(WARM):
            check_wave(server, expected, 1000)
        sizes = [(server.live_objects(), server.mebibytes())]
        for _ in range(WAVES):
            figure(check_wave(server, expected, 1000))
            sizes.append((server.live_objects(), server.mebibytes()))
        objects, memory = (
            [after - before for before, after in pairwise(column)] for column in zip(*sizes, strict=True)
        )
        figure(
            f"memory {sizes[0][1]:.0f} MiB after {WARM},000 clients, {sizes[-1][1]:.0f} MiB after {WAVES},000 more; "
            f"growth of a wave: {min(objects)} to {max(objects)} objects, {min(memory):.1f} to {max(memory):.1f} MiB"
        )
        assert min(objects) < MOST_OBJECTS
        assert median(memory) < MOST_MIB


@pytest.mark.slow
def test_what_is_too_much_is_told_to_come_again(tmp_path, figure):
    with served(tmp_path, "--slots", "4", "--max-waiting", "16") as server:
        expected = references(server)

        async def all_at_once():
            begin = asyncio.Event()
            tasks = [asyncio.ensure_future(exchange(server.port, begin, asking(question(at)))) for at in range(300)]
            await asyncio.sleep(0.5)
            begin.set()
            return await asyncio.gather(*tasks)

        results = asyncio.run(all_at_once())
        counts = Counter(got.status for got in results)
        assert set(counts) == {200, 429}
        assert all("\r\nretry-after: 5\r\n" in got.text for got in results if got.status == 429)
        right = [content(got) == expected[at % SEEDS] for at, got in enumerate(results) if got.status == 200]
        assert all(right)
        assert eventually(server.free)
        assert references(server) == expected
        figure(f"300 clients at once with room for 20: {counts[200]} answered, {counts[429]} told to come again")


@pytest.mark.slow
def test_clients_that_trickle_keep_nobody_out_and_are_cut_off(server, figure):
    """500 connections that never end their request, half in the head and half in the body."""

    async def trickle():
        async def slow(at):
            reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
            writer.write(head(1000) if at % 2 else head(1000)[:-2] + b"X-Slow: ")
            start = time.perf_counter()
            # Until the server hangs up; it answers 408 first where the head is whole.
            with suppress(ConnectionError):
                while time.perf_counter() - start < 120:
                    try:
                        if not await asyncio.wait_for(reader.read(1000), 2):
                            break
                    except TimeoutError:
                        writer.write(b" ")
            writer.transport.abort()
            return time.perf_counter() - start

        clients = [asyncio.ensure_future(slow(at)) for at in range(500)]
        await asyncio.sleep(3)
        begin = asyncio.Event()
        begin.set()
        got = await exchange(server.port, begin, asking(question(0)))
        return got, await asyncio.gather(*clients)

    got, seconds = asyncio.run(trickle())
    assert got.status == 200
    assert max(seconds) < 100
    assert httpx.get(f"{server.url}/health").json() == {"status": "ok"}
    assert "Traceback" not in server.log.read_text()
    figure(
        f"500 trickling clients: another is answered in {got.seconds:.2f} s, the last is cut after {max(seconds):.0f} s"
    )


@pytest.mark.slow
def test_connections_beyond_the_files_that_may_be_open_pass(tmp_path):
    """The server may open 256 files and is given 400 idle connections: it answers again when they have gone."""
    program = f"import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256)); {PROGRAM}"
    with served(tmp_path, "--slots", "4", program=program) as server:

        async def crowd():
            opened = [await asyncio.open_connection("127.0.0.1", server.port) for _ in range(400)]
            await asyncio.sleep(2)
            for _, writer in opened:
                writer.transport.abort()

        asyncio.run(crowd())
        assert eventually(lambda: httpx.get(f"{server.url}/health", timeout=30).status_code == 200)
        assert len(set(references(server))) > 1


@pytest.mark.slow
def test_a_server_that_is_open_to_others_wants_its_token(tmp_path):
    secret = "0123456789abcdef-secret"
    with served(tmp_path, "--host", "0.0.0.0", "--slots", "4", environment={TOKEN: secret}) as server:
        url = f"{server.url}/v1/chat/completions"
        assert httpx.post(url, json=question(0)).status_code == 401
        assert httpx.get(f"{server.url}/metrics").status_code == 401
        assert httpx.post(url, json=question(0), headers={"Authorization": "Bearer no"}).status_code == 401
        headers = {"Authorization": f"Bearer {secret}"}
        assert httpx.post(url, json=question(0), headers=headers, timeout=120).status_code == 200
        assert secret not in server.log.read_text()
