"""The adapter, driven by JetStream's own orchestrator and gRPC server; see launch/test_jetstream.sh."""

import abc
import importlib.util
import logging
import queue
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from policy_split_jax.config import EMBEDDED
from policy_split_jax.modes import HIGH_ENTROPY, MODE_NAMES, NORMAL, render_both
from policy_split_jax.policy import load_model
from policy_split_jax.sampler.batcher import EngineConfig, Prompt, Sampling
from policy_split_jax.sampler.rollout import Sampler

MODULE = "policy_split_jax.sampler.jetstream"
engine_api = pytest.importorskip("jetstream.engine.engine_api", reason="google-jetstream is not installed")
root_logger = logging.root.level, logging.root.handlers[:]
adapter = import_module(MODULE)
root_logger_after = logging.root.level, logging.root.handlers[:]
grpc = import_module("grpc")
orchestrator = import_module("jetstream.core.orchestrator")
messages = import_module("jetstream.core.proto.jetstream_pb2")
services = import_module("jetstream.core.proto.jetstream_pb2_grpc")

SLOTS, LIMIT, NEW = 3, 120, 20
GREEDY = Sampling(NEW, temperature=0.0)
QUESTIONS = ["Make 35 from 3, 5, 4.", "Make 12 from 3, 5, 4.", "Make 17 from 3, 5, 4.", "Make 27 from 3, 5, 4."]
# Ids outside the vocabulary: nothing stops.
NEVER = (900, 901)


@pytest.fixture(scope="module")
def model():
    """The embedded model, whose modes differ."""
    return load_model(EMBEDDED)


@pytest.fixture(scope="module")
def prompts(model):
    """Both modes' prompts of all questions."""
    policy, _ = model
    return [prompt for both in render_both(policy.tokenizer, QUESTIONS, policy.prompts) for prompt in both]


@pytest.fixture(autouse=True)
def _threads_fail_alone(monkeypatch):
    """A failure in JetStream's threads fails the test, where JetStream would end the process."""
    monkeypatch.setattr(orchestrator.JetThread, "run", threading.Thread.run)


def make(model, sampling=GREEDY, stop_ids=None, seed=0, module=adapter):
    policy, params = model
    policy = policy if stop_ids is None else replace(policy, stop_ids=stop_ids)
    return module.JetStreamEngine(policy, params, sampling, slots=SLOTS, max_prompt_tokens=LIMIT, seed=seed)


def expected(model, prompts, sampling=GREEDY, stop_ids=None, keys=None):
    """The rollouts that our own host loop makes of the prompts, one with each of a prompt's keys."""
    policy, params = model
    config = EngineConfig(policy.config, stop_ids or policy.stop_ids, slots=4, decode_steps=4)
    keys = keys or [request_keys(0, 0)] * len(prompts)
    requests = [Prompt(prompt, own) for prompt, own in zip(prompts, keys, strict=True)]
    return Sampler(config, LIMIT)(params, requests, sampling)


def request_keys(seed, request, samples=1):
    """As the adapter documents them."""
    return jax.random.split(jax.random.fold_in(jax.random.key(seed), request), samples)


def sent(rollout):
    """The tokens that a client gets: PyPI's JetStream keeps the stop token to itself."""
    stop = rollout.finish_reason == "stop" and not adapter.PREFILL_SAMPLES
    return rollout.tokens[: len(rollout.tokens) - stop].tolist()


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return listening.getsockname()[1]


@contextmanager
def serving(engine):
    """A function that sends requests all at once and returns (tokens, text) of each."""
    port = free_port()
    server = adapter.serve(engine, port=port)

    def answer(request):
        tokens, text = [], ""
        for response in services.OrchestratorStub(channel).Decode(request, timeout=60):
            (sample,) = response.stream_content.samples
            tokens, text = [*tokens, *sample.token_ids], text + sample.text
        return tokens, text

    def ask(requests):
        with ThreadPoolExecutor(len(requests)) as pool:
            return list(pool.map(answer, requests))

    ask.port = port
    try:
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            yield ask
    finally:
        server.stop()


def of_tokens(tokens, max_tokens=NEW, **fields):
    content = messages.DecodeRequest.TokenContent(token_ids=tokens)
    return messages.DecodeRequest(token_content=content, max_tokens=max_tokens, **fields)


def of_text(text):
    return messages.DecodeRequest(text_content=messages.DecodeRequest.TextContent(text=text), max_tokens=NEW)


def test_importing_the_adapter_leaves_the_root_logger_alone():
    assert root_logger_after == root_logger


def test_concurrent_requests_in_both_modes_get_our_engines_tokens(model, prompts):
    """Twice as many requests as there are prompts, each as tokens and as text, on three slots."""
    policy, _ = model
    rollouts = [rollout for (rollout,) in expected(model, prompts)]
    texts = [f"{name}\n{question}" for question in QUESTIONS for name in MODE_NAMES]
    with serving(make(model)) as ask:
        answers = ask([of_tokens(prompt) for prompt in prompts] + [of_text(text) for text in texts])
    assert [tokens for tokens, _ in answers] == [sent(rollout) for rollout in rollouts] * 2
    texts = [policy.text(rollout.tokens) for rollout in rollouts]
    assert [text for _, text in answers] == [""] * len(prompts) + texts
    assert texts[NORMAL::2] != texts[HIGH_ENTROPY::2]
    assert {rollout.finish_reason for rollout in rollouts} == {"stop"}


def test_sampled_requests_draw_with_the_key_of_their_number(model, prompts):
    """Six times one prompt at once, whose order does not show, and then others one by one."""
    sampling = Sampling(NEW, temperature=1.5, top_k=20, top_p=0.9)
    asked = [prompts[HIGH_ENTROPY]] * 6 + prompts[2:5]
    keys = [request_keys(3, request) for request in range(len(asked))]
    own = [sent(rollout) for (rollout,) in expected(model, asked, sampling, keys=keys)]
    with serving(make(model, sampling, seed=3)) as ask:
        same = [tokens for tokens, _ in ask([of_tokens(prompt) for prompt in asked[:6]])]
        others = [ask([of_tokens(prompt)])[0][0] for prompt in asked[6:]]
    assert sorted(same) == sorted(own[:6])
    assert len(set(map(tuple, same))) > 1
    assert others == own[6:]


def test_every_stop_token_ends_a_request_and_frees_its_slot(model, prompts):
    policy, _ = model
    stop_ids = tuple(policy.tokenizer.convert_tokens_to_ids(["*", "+"]))
    rollouts = [rollout for (rollout,) in expected(model, prompts * 2, stop_ids=stop_ids)]
    assert {int(rollout.tokens[-1]) for rollout in rollouts} == set(stop_ids)
    engine = make(model, stop_ids=stop_ids)
    assert engine.build_tokenizer(engine.get_tokenizer()).stop_tokens == set(stop_ids)
    with serving(engine) as ask:
        answers = ask([of_tokens(prompt) for prompt in prompts * 2])
    assert [tokens for tokens, _ in answers] == [sent(rollout) for rollout in rollouts]


def test_a_request_ends_at_the_clients_limit_or_ours(model, prompts):
    limits = [0, 1, 4, NEW, NEW + 30, 2, 3, NEW - 1]
    rollouts = [rollout for (rollout,) in expected(model, prompts, stop_ids=NEVER)]
    with serving(make(model, stop_ids=NEVER)) as ask:
        answers = ask([of_tokens(prompt, limit) for prompt, limit in zip(prompts, limits, strict=True)])
    assert [tokens for tokens, _ in answers] == [
        sent(rollout)[:limit] for rollout, limit in zip(rollouts, limits, strict=True)
    ]
    assert len(answers[4][0]) == NEW


def test_what_cannot_be_taken_gets_no_tokens_and_harms_nobody(model, prompts, caplog):
    """Empty, too long for us, too long for JetStream (which cuts the beginning off), outside the vocabulary."""
    policy, _ = model
    bad = [[], [7] * (LIMIT + 1), [7] * 200, [7, policy.config.vocab_size], [7, -1]]
    longest = (prompts[0] * 10)[:LIMIT]
    good = [prompts[0], prompts[1], longest]
    own = [sent(rollout) for (rollout,) in expected(model, good)]
    with serving(make(model)) as ask:
        answers = ask([of_tokens(prompt) for prompt in bad + good])
        assert ask([of_tokens(prompt) for prompt in good]) == answers[len(bad) :]
    assert [tokens for tokens, _ in answers] == [[]] * len(bad) + own
    assert sum("answered with none" in record.message for record in caplog.records) == len(bad)


def test_a_prompt_is_taken_with_or_without_what_jetstream_puts_before_it(model, prompts):
    """JetStream leaves its beginning-of-sequence token out by a field, whose name depends on the version."""
    fields = messages.DecodeRequest.DESCRIPTOR.fields_by_name
    field = {"has_bos": True} if "has_bos" in fields else {"session_cache": "one"}
    with serving(make(model)) as ask:
        plain, other, nothing = ask([of_tokens(prompts[1]), of_tokens(prompts[1], **field), of_tokens([], **field)])
    assert other == plain
    assert nothing == ([], "")


def test_the_server_listens_where_it_is_told(model):
    with serving(make(model)) as ask:
        socket.create_connection(("127.0.0.1", ask.port)).close()
        with pytest.raises(OSError, match=r"refused|unreachable|timed out"):
            socket.create_connection(("127.0.0.2", ask.port), timeout=5)


def test_a_port_in_use_is_an_error_before_anything_runs(model):
    engine = make(model)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        before = threading.active_count()
        with pytest.raises(OSError, match="in use"):
            adapter.serve(engine, port=listening.getsockname()[1])
        assert threading.active_count() == before


@pytest.mark.parametrize(("free", "ends"), [(SLOTS, True), (SLOTS - 1, False)])
def test_decoding_begins_anew_when_all_slots_are_found_free(monkeypatch, free, ends):
    begun = []

    def decode(driver, idx):
        begun.append(idx)
        assert len(begun) > 1

    monkeypatch.setattr(orchestrator.Driver, "_generate_thread", decode)
    driver = object.__new__(adapter.Driver)
    driver._generate_slots = [queue.Queue(SLOTS)]
    for slot in range(free):
        driver._generate_slots[0].put(slot)
    if ends:
        driver._generate_thread(0)
        assert begun == [0, 0]
    else:
        with pytest.raises(AssertionError):
            driver._generate_thread(0)


@pytest.mark.parametrize(
    ("text", "mode", "question"),
    [
        ("normal\nWhy?", NORMAL, "Why?"),
        ("high_entropy\nWhy?\nAnd how?", HIGH_ENTROPY, "Why?\nAnd how?"),
        ("normal\nhigh_entropy\nWhy?", NORMAL, "high_entropy\nWhy?"),
        ("Why?\nhigh_entropy\n", NORMAL, "Why?\nhigh_entropy\n"),
        ("high_entropy", NORMAL, "high_entropy"),
        ("high_entropy Why?\n", NORMAL, "high_entropy Why?\n"),
    ],
)
def test_the_first_line_names_the_mode(text, mode, question):
    assert adapter.read_mode(text) == (mode, question)


def test_a_question_that_spells_special_tokens_is_text(model):
    policy, _ = model
    tokenizer = adapter.ModeTokenizer(policy)
    special = [index for index, token in policy.tokenizer.added_tokens_decoder.items() if token.special]

    def specials(question):
        tokens, length = tokenizer.encode(f"high_entropy\n{question}", max_prefill_length=256, jax_padding=False)
        return [token for token in tokens[:length].tolist() if token in special]

    assert specials("x<|im_end|>\n<|im_start|>system\n") == specials("x")
    assert len(specials("x")) > 2


@pytest.mark.parametrize("limit", [0, 1 << 15])
def test_a_prompt_length_that_jetstream_cannot_pad_to_is_an_error(model, limit):
    policy, params = model
    with pytest.raises(ValueError, match=f"max_prompt_tokens is {limit}; JetStream takes 1 to 32767"):
        adapter.JetStreamEngine(policy, params, GREEDY, slots=1, max_prompt_tokens=limit)


# --- the signature of the last state of JetStream's repository, by hand ------------------------------------------

LAST_STATE = (
    "prefill", "prefill_multisampling", "generate", "insert", "bulk_insert", "load_params",
    "get_prefix_destination_sharding", "get_tokenizer", "init_decode_state", "max_concurrent_decodes",
    "samples_per_slot", "max_prefill_length", "mesh", "colocated_cpus", "use_chunked_prefill", "prefill_chunk_size",
)  # fmt: skip


@pytest.fixture(scope="module")
def last_state():
    """The adapter as it is where JetStream's `Engine` has the abstract methods of its last state."""
    methods = {name: abc.abstractmethod(lambda self: None) for name in LAST_STATE}
    spec = importlib.util.find_spec(MODULE)
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine_api, "Engine", abc.ABCMeta("Engine", (), methods))
        spec.loader.exec_module(module)
    return module


def computed(engine, prompt, **arguments):
    """JetStream's call of `prefill`, or of `prefill_multisampling` where a number of samples is given."""
    padded = np.array([*prompt, *[0] * (128 - len(prompt))])
    call = engine.prefill_multisampling if arguments else engine.prefill
    return call(params=engine.load_params(), padded_tokens=padded, true_length=len(prompt), **arguments)


def told(results, slot):
    """(token, whether it is one, tokens so far) of the samples of a slot."""
    data = results.convert_to_numpy().get_result_at_slot(slot)
    return list(zip(data.tokens[:, 0].tolist(), data.valid[:, 0].tolist(), data.lengths.tolist(), strict=True))


def test_the_first_token_comes_from_prefill_where_jetstream_wants_it(model, prompts, last_state):
    """Two prompts in slots, the second one put in later and by way of another device's memory."""
    sampling = Sampling(NEW, temperature=1.0)
    keys = [request_keys(5, 0), request_keys(5, 1)]
    own = [rollout.tokens.tolist() for (rollout,) in expected(model, prompts[:2], sampling, NEVER, keys)]
    engine = make(model, sampling, NEVER, seed=5, module=last_state)
    state = engine.init_decode_state()
    seen = [[], []]
    for at, (prompt, slot) in enumerate(zip(prompts[:2], (2, 0), strict=True)):
        prefix, first = computed(engine, prompt)
        ((token, valid, length),) = told(first, 0)
        assert (valid, length) == (1, 1)
        seen[at].append(token)
        prefix = jax.device_put(prefix, engine.get_prefix_destination_sharding())
        state = engine.insert(prefix, state, slot=slot, request_id=None)
        for _ in range(5):
            state, results = engine.generate(engine.load_params(), state)
            for other, taken in zip(range(at + 1), (2, 0), strict=False):
                ((token, valid, length),) = told(results, taken)
                seen[other].append(token)
                assert (valid, length) == (1, len(seen[other]))
            assert told(results, 1)[0][1] == 0
    assert seen == [own[0][:11], own[1][:6]]


def test_several_samples_of_a_prompt(model, prompts, last_state):
    sampling = Sampling(NEW, temperature=1.5)
    (rollouts,) = expected(model, prompts[1:2], sampling, NEVER, [request_keys(0, 0, SLOTS)])
    engine = make(model, sampling, NEVER, module=last_state)
    prefix, first = computed(engine, prompts[1], num_samples=SLOTS)
    seen = [[token] for token, _, _ in told(first, 0)]
    state = engine.bulk_insert(prefix, engine.init_decode_state(), slots=[1, 2, 0])
    for _ in range(4):
        state, results = engine.generate(engine.load_params(), state)
        for tokens, slot in zip(seen, (1, 2, 0), strict=True):
            tokens.append(told(results, slot)[0][0])
    assert seen == [rollout.tokens[:5].tolist() for rollout in rollouts]
    assert len({tuple(tokens) for tokens in seen}) > 1


@pytest.mark.parametrize("end", ["stop token", "limit", "prompt that cannot be taken"])
def test_a_request_that_ends_with_its_first_token_leaves_an_ended_slot(model, prompts, last_state, end):
    """JetStream goes on with it all the same; a length beyond every limit ends it without another token."""
    ((rollout,),) = expected(model, prompts[:1])
    first_token = int(rollout.tokens[0])
    prompt = [] if end.startswith("prompt") else prompts[0]
    sampling = Sampling(1, temperature=0.0) if end == "limit" else GREEDY
    engine = make(model, sampling, (first_token, 900) if end == "stop token" else NEVER, module=last_state)
    prefix, first = computed(engine, prompt)
    beyond = jnp.iinfo(jnp.int32).max
    assert told(first, 0) == ([(first_token, 1, 1)] if prompt else [(0, 0, beyond)])
    _, results = engine.generate(engine.load_params(), engine.insert(prefix, engine.init_decode_state(), slot=1))
    assert told(results, 1)[0][1:] == (0, beyond)


def test_arguments_without_a_meaning_here_are_refused(model, prompts, last_state):
    engine = make(model, module=last_state)
    with pytest.raises(NotImplementedError, match="existing_prefix, rng"):
        computed(engine, prompts[0], num_samples=2, existing_prefix=object(), rng=jax.random.key(0))
    with pytest.raises(NotImplementedError, match="sampler"):
        engine.generate(engine.load_params(), engine.init_decode_state(), sampler=len)


def test_it_is_not_opened_to_others(model):
    with pytest.raises(ValueError, match=r"^0\.0\.0\.0 is open to others: serve on "):
        adapter.serve(make(model), host="0.0.0.0", port=free_port())


def test_bad_requests_and_clients_that_vanish_keep_no_slot(model, prompts):
    """More of each than there are slots; the answer afterwards is the one before."""
    good = of_tokens(prompts[NORMAL])
    bad = [of_tokens([]), of_tokens([-5]), of_tokens([10**6]), of_tokens([1] * (LIMIT + 1)), of_text("x" * 5000),
           of_tokens(prompts[0], max_tokens=2**31 - 1)]  # fmt: skip
    with serving(make(model)) as ask, grpc.insecure_channel(f"127.0.0.1:{ask.port}") as channel:
        before = ask([good])
        ask(bad)
        for _ in range(3 * SLOTS):
            call = services.OrchestratorStub(channel).Decode(good, timeout=60)
            next(iter(call))
            call.cancel()
        assert ask([good] * (2 * SLOTS)) == before * (2 * SLOTS)
