"""The host's half of continuous batching: waiting prompts in, tokens and finished rollouts out."""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Float, Int, Key, UInt32

from policy_split_jax.model import qwen3
from policy_split_jax.model.cache import PromptCache
from policy_split_jax.model.sharding import batch_shards
from policy_split_jax.padding import bucket, lengths, pad_right
from policy_split_jax.processes import fetch
from policy_split_jax.sampler import engine
from policy_split_jax.sampler.sampling import SamplingSettings

FinishReason = Literal["stop", "length"]
# Prompts computed together: at most so many, and fewer where they are long.
_PREFILL_ROWS, _PREFILL_TOKENS = 16, 1 << 13
# Insertions are padded to one of few counts, each four times the one before: a program for each.
_SMALLEST_INSERTION = 8
# A shared beginning shorter than this is not worth a program of its own.
_SMALLEST_SHARED = 16
# The cache's length is a power of two between a sixteenth of the largest (but no less than this) and the largest.
_SMALLEST_CACHE, _CACHE_RANGE = 64, 16


@dataclass(frozen=True)
class Sampling:
    """How rollouts are drawn."""

    max_new_tokens: int
    temperature: float = 1.0
    """0 is greedy."""
    top_k: int = 0
    top_p: float = 1.0


class Prompt(NamedTuple):
    """One prompt and a key for each of its rollouts."""

    tokens: Sequence[int]
    keys: Key[jax.Array, "N"]
    shared: int = 0
    """So many of its first tokens begin many prompts, as those of a system turn do: they are computed once."""


class Rollout(NamedTuple):
    """One sampled response."""

    tokens: Int[np.ndarray, "_"]
    """New tokens, the stop token included where there is one."""
    logprobs: Float[np.ndarray, "_"]
    """Their log-probabilities at the sampling temperature (nats)."""
    finish_reason: FinishReason


@dataclass(frozen=True)
class EngineConfig:
    """What the engine is compiled for."""

    model: qwen3.Qwen3Config
    stop_ids: tuple[int, ...]
    slots: int
    """Rollouts decoded at once."""
    decode_steps: int = 8
    """Decode steps between two looks of the host."""
    dtype: DTypeLike = jnp.float32
    mesh: Mesh | None = None
    """The devices; slots are divided over them. None: the default device alone.

    With several processes all of them make the same calls: a batcher decides by what it is given alone.
    """

    def __post_init__(self) -> None:
        if self.slots % batch_shards(self.mesh):
            raise ValueError(f"slots ({self.slots}) must be a multiple of {batch_shards(self.mesh)}, data x fsdp")


class Place(NamedTuple):
    """Whose rollout it is: the prompt, as `Batcher.add` was told, and the index of its key."""

    prompt: int
    index: int


class _Kind(NamedTuple):
    """Prompts of one kind are computed together."""

    width: int
    """The bucket of their own tokens."""
    shared: tuple[int, ...]
    """The tokens with which they all begin."""


@dataclass(frozen=True)
class _Request:
    """A prompt that has not been computed."""

    name: int
    tokens: Sequence[int]
    keys: UInt32[np.ndarray, "N words"]
    sampling: Sampling
    kind: _Kind


class _Waiting(NamedTuple):
    """A rollout whose prompt has been computed and that has no slot yet."""

    request: _Request
    index: int
    prefix: engine.Prefix
    row: int


@dataclass
class _Running:
    """A rollout in a slot."""

    request: _Request
    index: int
    length: int = 0
    """New tokens when the host last looked."""

    def reach(self, steps: int) -> int:
        """The cache entries that it uses in its next `steps` steps."""
        return len(self.request.tokens) + min(self.length + steps, self.request.sampling.max_new_tokens)


class Batcher:
    """Runs any number of rollouts on a fixed number of slots; a slot is filled again as soon as it is free.

    `step` decodes for a few steps and returns what has ended. The weights are those given here: a new policy
    needs a new Batcher, and with it every computed prompt is dropped.
    """

    def __init__(self, config: EngineConfig, params: qwen3.Params, *, max_prompt_tokens: int, max_new_tokens: int):
        self._config = config
        self._max_prompt_tokens = max_prompt_tokens
        self._max_new_tokens = max_new_tokens
        self._weights = qwen3.sampling_weights(params, config=config.model, dtype=config.dtype, mesh=config.mesh)
        self._stop_ids = jnp.array(sorted(config.stop_ids), jnp.int32)
        self._state: engine.DecodeState | None = None
        self._requests: deque[_Request] = deque()
        self._waiting: deque[_Waiting] = deque()
        self._running: dict[int, _Running] = {}
        self._shared: dict[tuple[int, ...], PromptCache] = {(): engine.no_prefix(config.model, config.dtype)}

    @property
    def busy(self) -> bool:
        """Whether anything is left to do."""
        return bool(self._requests or self._waiting or self._running)

    @property
    def running(self) -> int:
        """Slots in use."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """Rollouts that have no slot yet."""
        return len(self._waiting) + sum(len(request.keys) for request in list(self._requests))

    def add(self, name: int, prompt: Prompt, sampling: Sampling) -> None:
        """Lets a prompt's rollouts wait for slots; `name` is the caller's, to know them by.

        Raises ValueError where the engine is too small for it.
        """
        size = len(prompt.tokens)
        if not 1 <= size <= self._max_prompt_tokens:
            raise ValueError(f"a prompt of {size} tokens; it may have 1 to {self._max_prompt_tokens}")
        if not 1 <= sampling.max_new_tokens <= self._max_new_tokens:
            raise ValueError(f"{sampling.max_new_tokens} new tokens; 1 to {self._max_new_tokens} can be made")
        keys = np.asarray(jax.random.key_data(prompt.keys))
        # The last token is never shared: every prompt needs one of its own.
        shared = min(prompt.shared, size - 1)
        shared = shared if shared >= _SMALLEST_SHARED else 0
        kind = _Kind(bucket(size - shared, self._max_prompt_tokens), tuple(prompt.tokens[:shared]))
        if len(keys):
            self._requests.append(_Request(name, prompt.tokens, keys, sampling, kind))

    def step(self) -> list[tuple[Place, Rollout]]:
        """Fills free slots, decodes all for at most `decode_steps` steps; returns the rollouts that have ended."""
        state = self._fill()
        if not self._running:
            return []
        state = engine.generate(
            self._weights,
            state,
            self._stop_ids,
            steps=self._config.decode_steps,
            config=self._config.model,
            mesh=self._config.mesh,
        )
        self._state = state
        return self._collect(state)

    def partial(self) -> list[tuple[Place, Rollout]]:
        """The rollouts in slots so far; the finish reason means nothing yet."""
        if self._state is None:
            return []
        tokens, logprobs = fetch((self._state.tokens, self._state.logprobs))
        return [
            (
                Place(item.request.name, item.index),
                Rollout(tokens[slot, : item.length].copy(), logprobs[slot, : item.length].copy(), "length"),
            )
            for slot, item in self._running.items()
        ]

    def cancel(self, name: int, index: int | None = None) -> None:
        """Gives up a prompt's rollouts, or the one of its key `index` that has begun; their slots are free at once."""

        def kept(item: _Waiting | _Running) -> bool:
            return item.request.name != name or index not in (None, item.index)

        if index is None:
            self._requests = deque(request for request in self._requests if request.name != name)
        self._waiting = deque(filter(kept, self._waiting))
        gone = [slot for slot, item in self._running.items() if not kept(item)]
        for slot in gone:
            del self._running[slot]
        if gone and self._state is not None:
            # Of one length always, so that one program serves.
            padded = gone + [self._config.slots] * (self._config.slots - len(gone))
            self._state = engine.release(self._state, jnp.array(padded, jnp.int32), self._config.mesh)

    def _fill(self) -> engine.DecodeState:
        """Puts waiting rollouts into free slots, those of one prefix in one call."""
        placed: list[tuple[int, _Waiting]] = []
        for slot in range(self._config.slots):
            if slot in self._running:
                continue
            if not self._waiting and self._requests:
                self._waiting.extend(self._computed(self._next_requests()))
            if not self._waiting:
                break
            item = self._waiting.popleft()
            placed.append((slot, item))
            self._running[slot] = _Running(item.request, item.index)
        state = self._sized()
        for _, group in groupby(placed, key=lambda pair: id(pair[1].prefix)):
            state = self._inserted(state, list(group))
        return state

    def _next_requests(self) -> list[_Request]:
        """The first request and those behind it that can be computed with it."""
        kind = self._requests[0].kind
        chosen = list(islice((item for item in self._requests if item.kind == kind), prefill_rows(kind.width)))
        names = set(map(id, chosen))
        self._requests = deque(item for item in self._requests if id(item) not in names)
        return chosen

    def _computed(self, requests: list[_Request]) -> Iterator[_Waiting]:
        """Every rollout of these requests; each prompt is computed once."""
        width, shared = requests[0].kind
        rows = [request.tokens[len(shared) :] for request in requests]
        rows += [[0]] * (_quadruple(len(rows), 1, prefill_rows(width)) - len(rows))
        prefix = self._prefill(rows, width, self._shared_part(shared))
        for row, request in enumerate(requests):
            for index in range(len(request.keys)):
                yield _Waiting(request, index, prefix, row)

    def _shared_part(self, tokens: tuple[int, ...]) -> PromptCache:
        if tokens not in self._shared:
            self._shared[tokens] = engine.shared_prefix(self._prefill([tokens], len(tokens), self._shared[()]))
        return self._shared[tokens]

    def _prefill(self, rows: Sequence[Sequence[int]], width: int, shared: PromptCache) -> engine.Prefix:
        config = self._config
        return engine.prefill(
            self._weights, pad_right(rows, width), lengths(rows), shared, config=config.model, mesh=config.mesh
        )

    def _sized(self) -> engine.DecodeState:
        """The slots with a cache as long as the longest rollout in them needs."""
        config = self._config
        capacity = self._max_prompt_tokens + self._max_new_tokens
        needed = max((item.reach(config.decode_steps) for item in self._running.values()), default=1)
        length = bucket(needed, capacity, max(_SMALLEST_CACHE, capacity // _CACHE_RANGE))
        if self._state is None:
            return engine.init_state(
                config.model, config.slots, length, self._max_new_tokens, config.dtype, config.mesh
            )
        if length != self._state.cache[0].length:
            return self._resized(self._state, length)
        return self._state

    def _resized(self, state: engine.DecodeState, length: int) -> engine.DecodeState:
        """Layer by layer, each old one given back at once: the cache may be most of a device's memory."""
        layers = []
        for layer in state.cache:
            layers.append(jax.block_until_ready(engine.resize(layer, length, self._config.mesh)))
            jax.tree.map(lambda leaf: leaf.delete(), layer)
        return state._replace(cache=tuple(layers))

    def _inserted(self, state: engine.DecodeState, group: list[tuple[int, _Waiting]]) -> engine.DecodeState:
        """Copies one prefix into the slots of its rollouts."""
        unused = insertion_size(len(group), self._config.slots) - len(group)
        items = [item for _, item in group] + [group[0][1]] * unused
        samplings = [item.request.sampling for item in items]
        request = engine.SlotRequest(
            keys=jax.random.wrap_key_data(jnp.array([item.request.keys[item.index] for item in items])),
            settings=SamplingSettings(
                jnp.array([sampling.temperature for sampling in samplings], jnp.float32),
                jnp.array([sampling.top_k for sampling in samplings], jnp.int32),
                jnp.array([sampling.top_p for sampling in samplings], jnp.float32),
            ),
            limits=jnp.array([sampling.max_new_tokens for sampling in samplings], jnp.int32),
        )
        rows = jnp.array([item.row for item in items], jnp.int32)
        slots = jnp.array([slot for slot, _ in group] + [self._config.slots] * unused, jnp.int32)
        return engine.insert(group[0][1].prefix, state, rows, slots, request, self._config.mesh)

    def _collect(self, state: engine.DecodeState) -> list[tuple[Place, Rollout]]:
        """Takes the rollouts that have ended out of their slots."""
        live, sizes = fetch((state.live, state.lengths))
        for slot, item in self._running.items():
            item.length = int(sizes[slot])
        ended = [slot for slot in self._running if not live[slot]]
        if not ended:
            return []
        stopped, tokens, logprobs = fetch((state.stopped, state.tokens, state.logprobs))
        results = []
        for slot in ended:
            item, size = self._running.pop(slot), sizes[slot]
            reason: FinishReason = "stop" if stopped[slot] else "length"
            rollout = Rollout(tokens[slot, :size].copy(), logprobs[slot, :size].copy(), reason)
            results.append((Place(item.request.name, item.index), rollout))
        return results


def prefill_rows(width: int) -> int:
    """How many prompts of this width are computed together at most."""
    return max(1, min(_PREFILL_ROWS, _PREFILL_TOKENS // width))


def insertion_size(count: int, slots: int) -> int:
    """To how many insertions so many are padded."""
    return _quadruple(count, _SMALLEST_INSERTION, slots)


def _quadruple(count: int, smallest: int, largest: int) -> int:
    """The first of smallest, 4 · smallest, 16 · smallest, … that is at least `count`, but at most `largest`."""
    size = smallest
    while size < count:
        size *= 4
    return min(size, largest)
