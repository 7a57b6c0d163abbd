"""Our engine behind the `Engine` interface of JetStream, and a server that speaks its gRPC protocol.

JetStream (https://github.com/AI-Hypercomputer/JetStream) is archived: this file serves those who have it running.
Nothing else in the package imports it. It needs `pip install "policy-split-jax[jetstream]"`, which installs PyPI's
`google-jetstream` 0.2.2; the package that PyPI calls `jetstream` is unrelated.

Two states of JetStream are supported, told apart by `PREFILL_SAMPLES`: that of PyPI, where the first token of a
response comes out of `generate`, and the last one of the repository, where `prefill` returns it.

A request's mode is the client's choice. A request with text names it in its first line, `normal` or
`high_entropy`, and the question follows; a text without such a line is a question in the normal mode. A request
with token ids is a prompt that `modes.render` has made in either mode, and is taken as it is.

JetStream's protocol has no sampling settings and no seeds, so all requests share the engine's `Sampling`, and
request i, counted as they are prefilled, draws with the key `split(fold_in(key(seed), i), samples)[0]`. One prompt
asked several times is thus answered differently at a temperature above 0, and a server that is asked the same
prompts in the same order gives the same answers.

A request ends at the first of: any stop token of the policy, `Sampling.max_new_tokens`, the client's `max_tokens`.
JetStream cannot refuse a single request: an exception in a thread of its orchestrator ends the whole process. A
prompt that the engine cannot take therefore gets an answer of no tokens, and a warning is logged.
"""

import logging
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import count
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Int

from policy_split_jax.access import is_loopback
from policy_split_jax.model import qwen3
from policy_split_jax.modes import MODE_NAMES, NORMAL, render
from policy_split_jax.padding import bucket, lengths, pad_right
from policy_split_jax.policy import Policy
from policy_split_jax.sampler import engine
from policy_split_jax.sampler.batcher import Sampling
from policy_split_jax.sampler.sampling import SamplingSettings


@contextmanager
def _root_logger_kept() -> Iterator[None]:
    """Undoes what JetStream's import does: it sends the debug messages of all packages to standard output."""
    level, handlers = logging.root.level, logging.root.handlers[:]
    try:
        yield
    finally:
        logging.root.setLevel(level)
        logging.root.handlers[:] = handlers


try:
    with _root_logger_kept():
        import grpc  # pyright: ignore[reportMissingImports, reportMissingModuleSource]
        from jetstream.core import orchestrator, server_lib  # pyright: ignore[reportMissingImports]
        from jetstream.engine import (  # pyright: ignore[reportMissingImports]
            engine_api,
            token_utils,
            tokenizer_api,
            tokenizer_pb2,
        )
except ImportError as error:
    raise ImportError(
        f"{error}; install policy-split-jax[jetstream] (it brings PyPI's google-jetstream; PyPI's jetstream is "
        "something else)"
    ) from error

PREFILL_SAMPLES: Final = hasattr(engine_api.Engine, "bulk_insert")
"""Whether this JetStream wants the first token from `prefill`: the last state of its repository, not PyPI's 0.2.2."""

_BEGIN = -1
"""Stands where JetStream puts a beginning-of-sequence token before a prompt: Qwen3 has none, so it is taken off."""
_LONGEST = 1 << 15
"""The longest of the lengths to which JetStream pads prompts; all are powers of two from 16."""
_ENDED = np.iinfo(np.int32).max

_log = logging.getLogger(__name__)

Tokens = Int[Array, "S"] | Int[np.ndarray, "S"]


def read_mode(text: str) -> tuple[int, str]:
    """The mode and the question of a request's text: see the head of this file."""
    name, newline, question = text.partition("\n")
    return (MODE_NAMES.index(name), question) if newline and name in MODE_NAMES else (NORMAL, text)


class ModeTokenizer(tokenizer_api.Tokenizer):
    """Questions to prompts and tokens to text, as JetStream's threads ask for them."""

    def __init__(self, policy: Policy):
        self._policy = policy

    @property
    def bos_id(self) -> int:
        return _BEGIN

    @property
    def pad_id(self) -> int:
        """Any number: the padding is cut off again."""
        return 0

    @property
    def eos_id(self) -> int:
        return self._policy.stop_ids[0]

    @property
    def stop_tokens(self) -> set[int]:
        """All stop tokens of the policy: JetStream ends a request at any of them."""
        return set(self._policy.stop_ids)

    def encode(self, s: str, **kwargs: Any) -> tuple[Tokens, int]:
        """The padded prompt of a request's text and its length; `kwargs` are those of JetStream's `pad_tokens`.

        Whatever a question spells, it never becomes a special token.
        """
        mode, question = read_mode(s)
        prompt = render(self._policy.tokenizer, [question], mode, self._policy.prompts)[0]
        return token_utils.pad_tokens(np.array(prompt, np.int32), self.bos_id, self.pad_id, **kwargs)

    def decode(self, token_ids: list[int], **kwargs: Any) -> str:
        """Text of tokens without a stop token at their end.

        JetStream asks for each token by itself: a character of several tokens comes out as U+FFFD for each.
        """
        return self._policy.text(token_ids)


class JetStreamEngine(engine_api.Engine):
    """Our engine as JetStream's orchestrator calls it, on one device.

    What JetStream calls a prefix is here a `DecodeState` of its own with a slot for each sample of the prompt;
    inserting it copies its slots. It takes as much memory as the slots that it will fill.
    """

    def __init__(
        self,
        policy: Policy,
        params: qwen3.Params,
        sampling: Sampling,
        *,
        slots: int,
        max_prompt_tokens: int,
        seed: int = 0,
        dtype: DTypeLike = jnp.float32,
    ):
        """`slots` requests are decoded at once; each has room for `max_prompt_tokens` and `sampling.max_new_tokens`.

        Raises ValueError for a `max_prompt_tokens` that JetStream cannot pad to.
        """
        if not 1 <= max_prompt_tokens < _LONGEST:
            raise ValueError(f"max_prompt_tokens is {max_prompt_tokens}; JetStream takes 1 to {_LONGEST - 1}")
        self._policy = policy
        self._weights = qwen3.sampling_weights(params, config=policy.config, dtype=dtype)
        self._sampling = sampling
        self._slots = slots
        self._max_prompt_tokens = max_prompt_tokens
        self._key = jax.random.key(seed)
        self._request = count()
        self._dtype = dtype
        self._stop_ids = jnp.array(sorted(policy.stop_ids), jnp.int32)

    def prefill(
        self,
        *,
        params: qwen3.SamplingWeights,
        existing_prefix: Any = None,
        padded_tokens: Tokens,
        true_length: int,
        sampler: Any = None,
        request_id: Any = None,
    ) -> engine.DecodeState | tuple[engine.DecodeState, engine_api.ResultTokens]:
        """Computes one prompt for one slot; with its first token where this JetStream wants it here."""
        _refuse(existing_prefix=existing_prefix, sampler=sampler)
        prefix = self._prefill(params, padded_tokens, true_length, samples=1)
        return self.generate(params, prefix) if PREFILL_SAMPLES else prefix

    def prefill_multisampling(
        self,
        *,
        params: qwen3.SamplingWeights,
        existing_prefix: Any = None,
        padded_tokens: Tokens,
        true_length: int,
        sampler: Any = None,
        rng: Any = None,
        num_samples: int = 1,
    ) -> tuple[engine.DecodeState, engine_api.ResultTokens]:
        """Computes one prompt for several slots, with the first token of each."""
        _refuse(existing_prefix=existing_prefix, sampler=sampler, rng=rng)
        prefix = self._prefill(params, padded_tokens, true_length, num_samples)
        prefix, data = self._step(params, prefix)
        return prefix, _results(data, num_samples)

    def insert(
        self, prefix: engine.DecodeState, decode_state: engine.DecodeState, slot: int, request_id: Any = None
    ) -> engine.DecodeState:
        """Puts a prefix of one sample into a slot. `decode_state` is donated."""
        return self.bulk_insert(prefix, decode_state, [slot])

    def bulk_insert(
        self, prefix: engine.DecodeState, decode_state: engine.DecodeState, slots: list[int]
    ) -> engine.DecodeState:
        """Puts the samples of a prefix into as many slots. `decode_state` is donated."""
        return _put(prefix, decode_state, jnp.array(slots, jnp.int32))

    def generate(
        self, params: qwen3.SamplingWeights, decode_state: engine.DecodeState, sampler: Any = None
    ) -> tuple[engine.DecodeState, engine_api.ResultTokens]:
        """One token of every slot that has not ended. `decode_state` is donated."""
        _refuse(sampler=sampler)
        state, data = self._step(params, decode_state)
        return state, _results(data, self.samples_per_slot)

    def init_decode_state(self) -> engine.DecodeState:
        """Empty slots."""
        return self._empty(self._slots)

    def load_params(self) -> qwen3.SamplingWeights:
        return self._weights

    def get_tokenizer(self) -> Any:
        """What JetStream hands to `build_tokenizer`, which has no need of it."""
        return tokenizer_pb2.TokenizerParameters(path=str(self._policy.folder))  # pyright: ignore[reportAttributeAccessIssue]

    def build_tokenizer(self, metadata: Any) -> ModeTokenizer:
        return ModeTokenizer(self._policy)

    def get_prefix_destination_sharding(self) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec())

    @property
    def max_concurrent_decodes(self) -> int:
        return self._slots

    @property
    def samples_per_slot(self) -> int:
        return 1

    @property
    def max_prefill_length(self) -> int:
        """One of the lengths to which JetStream pads, with room for what it puts before a prompt."""
        return bucket(self._max_prompt_tokens + 1, _LONGEST)

    @property
    def mesh(self) -> Mesh:
        return Mesh(np.array(jax.devices()[:1]), ("device",))

    @property
    def colocated_cpus(self) -> None:
        return None

    @property
    def use_chunked_prefill(self) -> bool:
        return False

    @property
    def prefill_chunk_size(self) -> int:
        """Asked for, and not used without chunked prefill."""
        return self.max_prefill_length

    def _empty(self, slots: int) -> engine.DecodeState:
        new = self._sampling.max_new_tokens
        return engine.init_state(self._policy.config, slots, self._max_prompt_tokens + new, new, self._dtype)

    def _prefill(
        self, params: qwen3.SamplingWeights, padded_tokens: Tokens, true_length: int, samples: int
    ) -> engine.DecodeState:
        """Slots that hold the prompt; a prompt that cannot be taken leaves them at their end, with no tokens."""
        prompt = self._prompt(padded_tokens, true_length)
        rows = [prompt or [0]]
        width = bucket(len(rows[0]), self._max_prompt_tokens)
        config, dtype = self._policy.config, self._dtype
        nothing = engine.no_prefix(config, dtype)
        prefix = engine.prefill(params, pad_right(rows, width), lengths(rows), nothing, config=config)
        request = self._slot_request(samples, self._sampling.max_new_tokens if prompt else 0)
        slots = jnp.arange(samples)
        return engine.insert(prefix, self._empty(samples), jnp.zeros_like(slots), slots, request)

    def _step(
        self, params: qwen3.SamplingWeights, state: engine.DecodeState
    ) -> tuple[engine.DecodeState, Int[Array, "B 3"]]:
        return _step(params, state, self._stop_ids, config=self._policy.config)

    def _prompt(self, padded_tokens: Tokens, true_length: int) -> list[int]:
        """The prompt's own tokens; none where the engine cannot take it."""
        tokens = np.asarray(padded_tokens)[:true_length]
        prompt = tokens[np.sum(tokens[:1] == _BEGIN) :]
        known = (prompt >= 0) & (prompt < self._policy.config.vocab_size)
        # JetStream cuts off the beginning, and with it the mode, of what is too long for it: the rest is so for us.
        if not 1 <= len(prompt) <= self._max_prompt_tokens or not known.all():
            _log.warning(
                "a request of %d tokens is answered with none: prompts have 1 to %d tokens of the vocabulary",
                true_length,
                self._max_prompt_tokens,
            )
            return []
        return prompt.tolist()

    def _slot_request(self, samples: int, limit: int) -> engine.SlotRequest:
        """What the next request's samples are drawn with."""
        keys = jax.random.split(jax.random.fold_in(self._key, next(self._request)), samples)
        full, sampling = partial(jnp.full, (samples,)), self._sampling
        settings = SamplingSettings(
            full(sampling.temperature, jnp.float32), full(sampling.top_k, jnp.int32), full(sampling.top_p, jnp.float32)
        )
        return engine.SlotRequest(keys, settings, full(limit, jnp.int32))


@partial(jax.jit, donate_argnames="state")
def _put(prefix: engine.DecodeState, state: engine.DecodeState, slots: Int[Array, "N"]) -> engine.DecodeState:
    """Copies the N slots of a prefix into `slots`."""
    return jax.tree.map(lambda into, values: into.at[slots].set(values), state, prefix)


@partial(jax.jit, static_argnames="config", donate_argnames="state")
def _step(
    params: qwen3.SamplingWeights,
    state: engine.DecodeState,
    stop_ids: Int[Array, "E"],
    *,
    config: qwen3.Qwen3Config,
) -> tuple[engine.DecodeState, Int[Array, "B 3"]]:
    """One decode step, and what JetStream is told of each slot: a token, whether it is one, and how many there are."""
    after = engine.generate(params, state, stop_ids, steps=1, config=config)
    # An ended slot is beyond every limit: by the flag alone, JetStream's last state would send its token once more.
    made = jnp.where(state.live, after.lengths, _ENDED)
    return after, jnp.stack([after.last_tokens, state.live.astype(jnp.int32), made], axis=1)


def _results(data: Int[Array, "B 3"], samples: int) -> engine_api.ResultTokens:
    """The columns of `_step` as JetStream reads them."""
    return engine_api.ResultTokens(
        data, tokens_idx=(0, 1), valid_idx=(1, 2), length_idx=(2, 3), samples_per_slot=samples
    )


class Driver(orchestrator.Driver):
    """JetStream's orchestrator without two of the ways in which it ends the process."""

    def place_request_on_prefill_queue(self, request: Any) -> None:
        """Where a request has tokens and names a session, PyPI's version asks their list for its shape."""
        if not isinstance(request.prefill_content, str):
            request.prefill_content = np.array(request.prefill_content, np.int32)
        super().place_request_on_prefill_queue(request)

    def _generate_thread(self, idx: int) -> None:
        """Begins decoding anew where JetStream found all slots free, which it asserts never to see.

        It does see it when the last request's slot is given back between its look for new requests and its next
        step. Nothing is lost then: no slot holds a request.
        """
        while True:
            try:
                return super()._generate_thread(idx)
            except AssertionError:
                if not self._generate_slots[idx].full():
                    raise


def start_driver(adapter: JetStreamEngine) -> Driver:
    """The orchestrator on this engine; its threads run until its `stop()`.

    A failure in one of them ends the whole process: that is JetStream's way.
    """
    # PyPI's version frees an inserted prefix by `jax.tree_map`, which jax has removed.
    orchestrator.delete_pytree = partial(jax.tree.map, lambda array: array.delete())
    params = adapter.load_params()
    return Driver(
        prefill_engines=[adapter],
        generate_engines=[adapter],
        prefill_params=[params],
        generate_params=[params],
        interleaved_mode=True,
        jax_padding=False,
    )


def serve(adapter: JetStreamEngine, *, host: str = "127.0.0.1", port: int = 9000) -> server_lib.JetStreamServer:
    """Starts JetStream's gRPC server; `wait_for_termination()` of the result waits for it, `stop()` ends it.

    It is not encrypted and asks nobody who they are, and JetStream has no setting for either. So `host` is a loopback
    address or name; raises ValueError for others, and OSError where the port is taken.
    """
    # gRPC would share a port with another server, and JetStream would leave its threads behind where it fails.
    with socket.create_server((host, port)) as bound:
        if not is_loopback(bound.getsockname()[0]):
            raise ValueError(
                f"{host} is open to others: serve on 127.0.0.1 and put a proxy with encryption and passwords before it"
            )
    # JetStream has no setting for this and listens on every interface.
    server_lib._HOST = host
    credentials = grpc.insecure_server_credentials()
    server = server_lib.JetStreamServer(start_driver(adapter), adapter.max_concurrent_decodes, port, credentials)
    server.start()
    return server


def _refuse(**arguments: Any) -> None:
    """Raises NotImplementedError for arguments of JetStream's interface that its orchestrator never gives us."""
    given = [name for name, value in arguments.items() if value is not None]
    if given:
        raise NotImplementedError(f"not supported here: {', '.join(given)}")
