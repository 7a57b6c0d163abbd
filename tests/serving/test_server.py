"""The server driven by the OpenAI client, over HTTP: both modes, streams, and clients that vanish."""

import asyncio
import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace

import httpx
import jax
import numpy as np
import openai
import pytest

from policy_split_jax.modes import HIGH_ENTROPY, NORMAL, render, system_turn
from policy_split_jax.policy import load_model
from policy_split_jax.sampler.batcher import Batcher, EngineConfig, Prompt, Sampling
from policy_split_jax.sampler.rollout import Sampler, rollout_keys
from policy_split_jax.serving import app, connection
from policy_split_jax.serving.app import Server, http_server
from policy_split_jax.serving.service import EngineService

QUESTION = "Make 35 from 3, 5, 4."
LIMITS = {"max_prompt_tokens": 64, "max_new_tokens": 400}
# The server's token ids equal the sampler's; log-probabilities differ by float32 rounding of the batch.
CLOSE = 1e-5
TOKEN = "0123456789abcdef-secret"


@pytest.fixture(scope="module")
def model():
    return load_model("embedded")


class Running:
    """A server on a free port of this machine."""

    def __init__(self, model, slots=8, token=None, **bounds):
        policy, params = model
        self.batcher = Batcher(EngineConfig(policy.config, policy.stop_ids, slots, 2), params, **LIMITS)
        self.service = EngineService(self.batcher, **bounds)
        self.service.start()
        self.socket = socket.socket()
        self.socket.bind(("127.0.0.1", 0))
        self.server = http_server(Server(policy, self.service, "tiny", **LIMITS), self.socket, token)
        self.thread = threading.Thread(target=self.server.run, args=([self.socket],))
        self.thread.start()
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        while not self.server.started:
            time.sleep(0.01)

    def stop(self):
        self.server.should_exit = True
        self.thread.join()
        self.socket.close()


@pytest.fixture(scope="module")
def running(model):
    running = Running(model)
    yield running
    running.stop()


@pytest.fixture(scope="module")
def client(running):
    with openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def chat(client, question=QUESTION, model="tiny", **options):
    messages = [{"role": "user", "content": question}]
    return client.chat.completions.create(model=model, messages=messages, **{"max_tokens": 16, "seed": 3, **options})


def sampled(model, prompt, mode, count, seed, limit=16, **options):
    """The same rollouts by the sampler."""
    policy, params = model
    keys = rollout_keys(jax.random.key(seed), np.zeros(1, np.int32), np.full(1, mode), count)[0]
    sampler = Sampler(EngineConfig(policy.config, policy.stop_ids, slots=4), 64)
    return sampler(params, [Prompt(prompt, keys)], Sampling(limit, **options))[0]


@pytest.mark.parametrize(("name", "mode"), [("tiny", NORMAL), ("tiny:high-entropy", HIGH_ENTROPY)])
@pytest.mark.parametrize("options", [{}, {"temperature": 0.0}, {"temperature": 0.7, "top_p": 0.8}], ids=str)
def test_a_chat_gives_the_samplers_rollouts_in_the_mode_of_its_name(client, model, name, mode, options):
    policy, _ = model
    answer = chat(client, model=name, n=3, logprobs=True, **options)
    prompt = render(policy.tokenizer, [QUESTION], mode, policy.prompts)[0]
    rollouts = sampled(model, prompt, mode, 3, 3, **options)
    assert answer.model == name
    assert len(answer.choices) == 3
    for choice, rollout in zip(answer.choices, rollouts, strict=True):
        assert choice.message.content == policy.text(rollout.tokens)
        assert choice.finish_reason == rollout.finish_reason
        entries = choice.logprobs.content
        assert [entry.token for entry in entries] == policy.tokenizer.batch_decode([[int(t)] for t in rollout.tokens])
        np.testing.assert_allclose([entry.logprob for entry in entries], rollout.logprobs, atol=CLOSE)
    made = sum(len(rollout.tokens) for rollout in rollouts)
    usage = answer.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (len(prompt), made, len(prompt) + made)


def test_the_modes_read_different_prompts(client):
    normal, high = (chat(client, model=name).usage.prompt_tokens for name in ("tiny", "tiny:high-entropy"))
    assert high > normal


@pytest.mark.parametrize("n", [1, 3])
def test_a_stream_joins_to_the_whole_answer(client, n):
    whole = chat(client, n=n, logprobs=True, model="tiny:high-entropy")
    options = {"include_usage": True}
    chunks = list(chat(client, n=n, logprobs=True, model="tiny:high-entropy", stream=True, stream_options=options))
    assert chunks[-1].usage == whole.usage
    assert chunks[-1].choices == []
    for choice in whole.choices:
        own = [part for chunk in chunks for part in chunk.choices if part.index == choice.index]
        assert own[0].delta.role == "assistant"
        assert "".join(part.delta.content or "" for part in own) == choice.message.content
        assert [part.finish_reason for part in own[:-1]] == [None] * (len(own) - 1)
        assert own[-1].finish_reason == choice.finish_reason
        logprobs = [entry.logprob for part in own if part.logprobs for entry in part.logprobs.content]
        np.testing.assert_allclose(logprobs, [entry.logprob for entry in choice.logprobs.content], atol=CLOSE)
        assert len(own) > 2


@pytest.mark.parametrize(("name", "mode"), [("tiny", NORMAL), ("tiny:high-entropy", HIGH_ENTROPY)])
@pytest.mark.parametrize("as_tokens", [False, True])
def test_a_completion_continues_the_prompt_as_it_is(client, model, name, mode, as_tokens):
    """A prompt that spells the chat template's normal turn: the same rollouts as the chat's."""
    policy, _ = model
    prompt = render(policy.tokenizer, [QUESTION], NORMAL, policy.prompts)[0]
    given = prompt if as_tokens else policy.tokenizer.decode(prompt)
    answer = client.completions.create(model=name, prompt=given, max_tokens=16, seed=3, logprobs=1)
    (rollout,) = sampled(model, system_turn(policy.tokenizer, mode, policy.prompts) + prompt, mode, 1, 3)
    assert answer.choices[0].text == policy.text(rollout.tokens) == chat(client, model=name).choices[0].message.content
    np.testing.assert_allclose(answer.choices[0].logprobs.token_logprobs, rollout.logprobs, atol=CLOSE)
    streamed = client.completions.create(model=name, prompt=given, max_tokens=16, seed=3, stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == answer.choices[0].text


def test_without_a_seed_answers_differ(client):
    assert (
        len({chat(client, seed=None, max_tokens=40, temperature=5.0).choices[0].message.content for _ in range(4)}) > 1
    )


def test_stop_texts_end_an_answer_before_them(client):
    plain = chat(client, temperature=0.0).choices[0].message.content
    answer = chat(client, temperature=0.0, stop=plain[2]).choices[0]
    assert answer.message.content == plain[: plain.index(plain[2])]
    assert answer.finish_reason == "stop"
    streamed = chat(client, temperature=0.0, stop=["never", plain[2]], stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in streamed) == plain[: plain.index(plain[2])]


def test_max_tokens_ends_an_answer(client):
    answer = chat(client, max_tokens=2)
    assert (answer.choices[0].finish_reason, answer.usage.completion_tokens) == ("length", 2)


def test_conversations_of_several_turns_are_read(client):
    turns = [("system", "Be brief."), ("user", "Hi."), ("assistant", "Yes?"), ("user", QUESTION)]
    messages = [{"role": role, "content": text} for role, text in turns]
    answer = client.chat.completions.create(model="tiny", messages=messages, max_tokens=4, seed=1)
    assert answer.usage.prompt_tokens > chat(client).usage.prompt_tokens + 8


def test_64_requests_at_once_in_both_modes(client, model):
    """On 8 slots, streamed and not; each as it is alone."""
    names = ["tiny", "tiny:high-entropy"]

    def ask(at):
        name, stream = names[at % 2], at % 4 > 1
        answer = chat(client, model=name, seed=at, stream=stream)
        if not stream:
            return answer.choices[0].message.content
        return "".join(chunk.choices[0].delta.content or "" for chunk in answer)

    with ThreadPoolExecutor(64) as pool:
        answers = list(pool.map(ask, range(64)))
    policy, _ = model
    for at, answer in enumerate(answers):
        prompt = render(policy.tokenizer, [QUESTION], at % 2, policy.prompts)[0]
        assert answer == policy.text(sampled(model, prompt, at % 2, 1, at)[0].tokens)
    assert len(set(answers)) > 5


# What is refused


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [({"model": "other"}, openai.NotFoundError, "the model 'other' does not exist; there are 'tiny' and"),
     ({"max_tokens": 401}, openai.BadRequestError, "max_tokens is 401; this server makes at most 400"),
     ({"question": "Make " * 60}, openai.BadRequestError, "tokens; this server takes 1 to 64"),
     ({"temperature": -1}, openai.BadRequestError, "temperature: "),
     ({"n": 0}, openai.BadRequestError, "n: "),
     ({"temperature": 1e-40}, openai.BadRequestError, "temperature: "),
     ({"extra_body": {"top_k": 2**31}}, openai.BadRequestError, "top_k: "),
     ({"seed": -1}, openai.BadRequestError, "seed: "),
     ({"stop": [""]}, openai.BadRequestError, "stop.0: "),
     ({"stop": ["x" * 257]}, openai.BadRequestError, "stop.0: "),
     ({"frequency_penalty": 0.5}, openai.BadRequestError, "frequency_penalty: "),
     ({"logprobs": True, "top_logprobs": 5}, openai.BadRequestError, "top_logprobs: "),
     ({"tools": []}, openai.BadRequestError, "tools: "),
     ({"extra_body": {"min_p": 0.1}}, openai.BadRequestError, "min_p: ")],
    ids=lambda value: str(value)[:40],
)  # fmt: skip
def test_what_cannot_be_done_is_an_error_that_says_so(client, options, error, message):
    with pytest.raises(error) as caught:
        chat(client, **options)
    assert message in caught.value.body["message"]


def test_a_body_that_is_not_json_is_an_error(running):
    answer = httpx.post(f"{running.url}/v1/chat/completions", content=b"{")
    assert answer.status_code == 400
    assert "JSON" in answer.json()["error"]["message"]


def test_token_ids_outside_the_vocabulary_are_an_error(client):
    with pytest.raises(openai.BadRequestError, match="token ids must be in"):
        client.completions.create(model="tiny", prompt=[1, 10_000], max_tokens=2)


# The server itself


def test_models_and_health(client, running):
    assert [model.id for model in client.models.list()] == ["tiny", "tiny:high-entropy"]
    assert httpx.get(f"{running.url}/health").json() == {"status": "ok"}


def metric(running, name):
    lines = httpx.get(f"{running.url}/metrics").text.splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name))


def test_metrics_count_requests_and_tokens(client, running):
    names = ["policy_split_requests_total", 'policy_split_generated_tokens_total{mode="high_entropy"}']
    before = [metric(running, name) for name in names]
    made = chat(client, model="tiny:high-entropy", n=2).usage.completion_tokens
    assert [metric(running, name) for name in names] == [before[0] + 1, before[1] + made]
    assert metric(running, 'policy_split_requests_total{end="complete"') > 0


def eventually(condition):
    """Whether it holds within 20 seconds."""
    for _ in range(2000):
        if condition():
            return True
        time.sleep(0.01)
    return False


BODY = {"model": "tiny", "messages": [{"role": "user", "content": QUESTION}], "max_tokens": 400, "n": 4}


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_vanishes_frees_its_slots(model, stream):
    """Nothing stops by itself here: the model's stop ids are replaced by none."""
    policy, params = model
    running = Running((replace(policy, stop_ids=(-1,)), params))
    try:

        async def vanish():
            async with httpx.AsyncClient() as client:
                body = json.dumps(BODY | {"stream": stream})
                asking = client.build_request("POST", f"{running.url}/v1/chat/completions", content=body)
                task = asyncio.ensure_future(client.send(asking, stream=True))
                await asyncio.to_thread(eventually, lambda: running.service.running == 4)
                assert running.service.running == 4
                task.cancel()
                answer = (await asyncio.gather(task, return_exceptions=True))[0]
                if isinstance(answer, httpx.Response):
                    await answer.aclose()

        asyncio.run(vanish())
        assert eventually(lambda: running.service.running == 0)
        assert metric(running, "policy_split_generated_tokens_total") < 4 * 400
        assert metric(running, "policy_split_requests_total{") == 1
    finally:
        running.stop()


def test_an_error_of_the_engine_reaches_everyone_and_health_and_log_say_so(model, monkeypatch, caplog):
    running = Running(model)
    try:
        monkeypatch.setattr(running.batcher, "step", lambda: 1 / 0)
        answer = httpx.post(f"{running.url}/v1/chat/completions", json=BODY)
        assert answer.status_code == 503
        assert answer.json()["error"]["message"] == "the engine has stopped"
        assert httpx.get(f"{running.url}/health").status_code == 503
        assert httpx.post(f"{running.url}/v1/chat/completions", json=BODY).status_code == 503
        assert isinstance(running.service.error, ZeroDivisionError)
        assert "the engine has stopped; start the server again" in caplog.messages
    finally:
        running.stop()


def test_shutting_down_lets_running_requests_end(model):
    running = Running(model)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(httpx.post, f"{running.url}/v1/chat/completions", json=BODY, timeout=60)
        assert eventually(lambda: running.service.running > 0 or answer.done())
        running.stop()
        assert answer.result().status_code == 200
    assert not running.service.alive
    assert not running.thread.is_alive()


# Bounds


def test_more_answers_than_the_bound_are_refused_until_there_is_room(model):
    running = Running(model, max_rollouts=3)
    try:
        assert httpx.post(f"{running.url}/v1/chat/completions", json=BODY | {"n": 3}).status_code == 200
        answer = httpx.post(f"{running.url}/v1/chat/completions", json=BODY)
        assert (answer.status_code, answer.headers["Retry-After"]) == (429, "5")
        assert answer.json()["error"]["message"] == "this server takes 3 answers at once, and has 0"
        assert httpx.post(f"{running.url}/v1/chat/completions", json=BODY | {"n": 3}).status_code == 200
    finally:
        running.stop()


@pytest.mark.parametrize("stream", [True, False])
def test_an_answer_that_takes_too_long_is_given_up(model, stream):
    policy, params = model
    running = Running((replace(policy, stop_ids=(-1,)), params), max_seconds=0.001)
    try:
        answer = httpx.post(f"{running.url}/v1/chat/completions", json=BODY | {"stream": stream}, timeout=60)
        assert answer.status_code == (200 if stream else 503)
        assert "the answer took too long" in answer.text
        assert "[DONE]" not in answer.text
        assert eventually(lambda: running.service.running == running.service.waiting == 0)
    finally:
        running.stop()


def test_a_body_is_read_up_to_its_bound(running):
    limit = (1 << 16) + 64 * LIMITS["max_prompt_tokens"]
    url = f"{running.url}/v1/chat/completions"
    filled = json.dumps(BODY | {"max_tokens": 1}).ljust(limit)
    assert httpx.post(url, content=filled).status_code == 200
    for content in (filled + " ", iter([filled.encode(), b" "])):
        answer = httpx.post(url, content=content)
        assert answer.status_code == 413
        assert answer.json()["error"]["message"] == f"the body is longer than the {limit} bytes that this server reads"


def test_a_conversation_of_more_turns_than_tokens_is_refused(client):
    turns = [{"role": "user", "content": ""}] * 65
    with pytest.raises(openai.BadRequestError, match="the conversation has 65 turns; this server takes 1 to 64 tokens"):
        client.chat.completions.create(model="tiny", messages=turns)


@pytest.mark.parametrize("seconds", ["whole", "body"])
def test_a_request_that_does_not_end_is_given_up(running, monkeypatch, seconds):
    """A head that trickles is cut off however little is missing of it, and a body too."""
    begun = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\nX-Slow: "
    if seconds == "body":
        monkeypatch.setattr(app, "_BODY_SECONDS", 0.3)
        begun += b"\r\n\r\n"
    else:
        monkeypatch.setattr(connection, "REQUEST_SECONDS", 0.3)
    with socket.create_connection(running.socket.getsockname()) as slow:
        slow.settimeout(0.05)
        slow.sendall(begun)
        answer, sent = b"", 0
        while not answer and sent < 100:
            with suppress(TimeoutError):
                answer = slow.recv(1000)
            if not answer and sent < 8:
                slow.sendall(b"a")
            sent += 1
    assert answer.startswith(b"HTTP/1.1 408 Request Timeout\r\n")
    assert sent < 60


def test_a_body_that_is_not_wanted_and_does_not_end_is_cut_off(running, monkeypatch):
    monkeypatch.setattr(connection, "REQUEST_SECONDS", 0.3)
    with socket.create_connection(running.socket.getsockname()) as endless:
        endless.settimeout(20)
        endless.sendall(b"POST /nowhere HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000000000\r\n\r\n")
        assert b"404 Not Found" in endless.recv(1000)

        def cut_off():
            try:
                endless.sendall(b"a")
            except (ConnectionResetError, BrokenPipeError):
                return True

        assert eventually(cut_off)


def test_a_client_that_reads_nothing_is_cut_off(model, monkeypatch):
    monkeypatch.setattr(connection, "STALL_SECONDS", 0.3)
    policy, params = model
    running = Running((replace(policy, stop_ids=(-1,)), params))
    # So small that an answer does not fit into what the two systems keep.
    running.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 12)
    body = json.dumps(BODY | {"stream": True, "n": 16, "logprobs": True})
    try:
        with socket.socket() as silent:
            silent.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 12)
            silent.connect(running.socket.getsockname())
            silent.sendall(f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}"
                           f"\r\n\r\n{body}".encode())  # fmt: skip
            assert eventually(lambda: metric(running, 'policy_split_requests_total{end="cut"') == 1)
        assert eventually(lambda: running.service.running == running.service.waiting == 0)
    finally:
        running.stop()


# Who may ask


@pytest.fixture(scope="module")
def guarded(model):
    running = Running(model, token=TOKEN)
    yield running
    running.stop()


@pytest.mark.parametrize(
    ("authorization", "status"),
    [(f"Bearer {TOKEN}", 200), (f"bearer  {TOKEN}", 200), (TOKEN, 401), (f"Basic {TOKEN}", 401), ("Bearer", 401),
     (f"Bearer {TOKEN}x", 401), (f"Bearer {TOKEN[:-1]}", 401), (b"Bearer \xff\xfe", 401), ("", 401)],
)  # fmt: skip
@pytest.mark.parametrize("path", ["/v1/models", "/metrics"])
def test_a_token_is_asked_for(guarded, path, authorization, status):
    answer = httpx.get(guarded.url + path, headers={"Authorization": authorization, "Host": "any.example"})
    assert answer.status_code == status
    if status == 401:
        assert answer.headers["WWW-Authenticate"] == "Bearer"
        assert answer.json()["error"]["code"] == "invalid_api_key"


def test_an_openai_client_gives_the_token_as_its_key(guarded):
    with openai.OpenAI(base_url=f"{guarded.url}/v1", api_key=TOKEN, max_retries=0) as client:
        assert chat(client).choices[0].message.content
    with (
        openai.OpenAI(base_url=f"{guarded.url}/v1", api_key="other", max_retries=0) as stranger,
        pytest.raises(openai.AuthenticationError, match="wants its token as the API key"),
    ):
        chat(stranger)


def test_health_needs_no_token(guarded):
    assert httpx.get(f"{guarded.url}/health").status_code == 200


@pytest.mark.parametrize(
    ("headers", "status"),
    [({"Host": "localhost"}, 200), ({"Host": "LOCALHOST:9"}, 200), ({"Host": "127.0.0.1:9"}, 200),
     ({"Host": "evil.example"}, 403), ({"Host": "localhost.evil.example:8000"}, 403), ({"Host": ""}, 403),
     ({"Origin": "http://localhost:3000"}, 200), ({"Origin": "https://evil.example"}, 403), ({"Origin": "null"}, 403),
     ({"Origin": "http://[::1"}, 403)],
)  # fmt: skip
def test_without_a_token_pages_elsewhere_may_not_ask(running, headers, status):
    assert httpx.get(f"{running.url}/v1/models", headers=headers).status_code == status


def test_what_is_refused_is_logged_on_one_line(running, caplog):
    httpx.post(f"{running.url}/v1/chat/completions", content=b"{\n")
    httpx.get(f"{running.url}/a%0Ab")
    httpx.post(f"{running.url}/v1/chat/completions", json=BODY | {"x\ny" * 1000: 1})
    begin, path, long = caplog.messages[-3:]
    assert begin.startswith("POST '/v1/chat/completions' from 127.0.0.1: 400 'Invalid JSON: ")
    assert path == r"GET '/a\nb' from 127.0.0.1: 404 'Not Found'"
    assert "\n" not in long
    assert len(long) < 1200
