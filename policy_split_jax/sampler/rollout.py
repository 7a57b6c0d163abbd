"""The host loop over slots: waiting prompts in, finished rollouts out (continuous batching)."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby, islice
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Key, UInt32

from policy_split_jax.errors import UserError
from policy_split_jax.model import qwen3
from policy_split_jax.padding import bucket, lengths, pad_right
from policy_split_jax.sampler import engine
from policy_split_jax.sampler.sampling import SamplingSettings

FinishReason = Literal["stop", "length"]
_PREFILL_ROWS = 16


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
    keys: Key[Array, "N"]


class Rollout(NamedTuple):
    """One sampled response."""

    tokens: Int[np.ndarray, "_"]
    """New tokens, the stop token included where there is one."""
    logprobs: Float[np.ndarray, "_"]
    """Their log-probabilities at the sampling temperature (nats)."""
    finish_reason: FinishReason


_PENDING = Rollout(np.zeros(0, np.int32), np.zeros(0, np.float32), "length")
"""Stands in a result until its rollout has ended."""


class _Waiting(NamedTuple):
    """One rollout that has no slot yet."""

    prompt: int
    index: int
    prefix: engine.Prefix
    row: int


@partial(jax.jit, static_argnames="count")
def rollout_keys(
    key: Key[Array, ""], questions: Int[Array, "N"], modes: Int[Array, "N"], count: int
) -> Key[Array, "N count"]:
    """Keys of `count` rollouts of each (question, mode); rollout i has the same key for any count."""

    def of_prompt(question: Array, mode: Array) -> Array:
        own = jax.random.fold_in(jax.random.fold_in(key, question), mode)
        return jax.vmap(partial(jax.random.fold_in, own))(jnp.arange(count))

    return jax.vmap(of_prompt)(questions, modes)


class Sampler:
    """Samples rollouts of any number of prompts on a fixed number of slots."""

    def __init__(
        self,
        config: qwen3.Qwen3Config,
        stop_ids: Sequence[int],
        *,
        slots: int,
        max_prompt_tokens: int,
        decode_steps: int = 8,
        dtype: DTypeLike = jnp.float32,
    ):
        self._config = config
        self._stop_ids = jnp.array(sorted(stop_ids), jnp.int32)
        self._slots = slots
        self.max_prompt_tokens = max_prompt_tokens
        self._decode_steps = decode_steps
        self._dtype = dtype

    def __call__(
        self,
        params: qwen3.Params,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        progress: Callable[[int], None] = lambda finished: None,
    ) -> list[list[Rollout]]:
        """All rollouts of all prompts, in the prompts' order and each prompt's keys' order.

        Each prompt is prefilled once, however many rollouts it has. `progress` is told how many rollouts
        have ended since it was last called. Raises UserError for a prompt longer than `max_prompt_tokens`.
        """
        self._check(prompts)
        results: list[list[Rollout]] = [[_PENDING] * len(prompt.keys) for prompt in prompts]
        keys = [np.asarray(jax.random.key_data(prompt.keys)) for prompt in prompts]
        longest = max((len(prompt.tokens) for prompt in prompts), default=1)
        state = engine.init_state(
            self._config,
            self._slots,
            bucket(longest, self.max_prompt_tokens) + sampling.max_new_tokens,
            sampling.max_new_tokens,
            self._dtype,
        )
        waiting = self._prefilled(params, prompts)
        occupied: dict[int, _Waiting] = {}
        while True:
            state = self._fill(state, waiting, occupied, keys, sampling)
            if not occupied:
                return results
            state = engine.generate(
                params,
                state,
                self._stop_ids,
                steps=self._decode_steps,
                config=self._config,
                dtype=self._dtype,
            )
            progress(_collect(state, occupied, results))

    def _check(self, prompts: Sequence[Prompt]) -> None:
        for at, prompt in enumerate(prompts):
            if not 1 <= len(prompt.tokens) <= self.max_prompt_tokens:
                raise UserError(
                    f"prompt {at} has {len(prompt.tokens)} tokens, the limit is {self.max_prompt_tokens}; "
                    "raise rollout.max_prompt_tokens or leave the question out"
                )

    def _prefilled(self, params: qwen3.Params, prompts: Sequence[Prompt]) -> Iterator[_Waiting]:
        """Every rollout to be made; prompts are computed once, as they are reached, a bucket's together."""
        by_bucket: dict[int, list[int]] = {}
        for at, prompt in enumerate(prompts):
            by_bucket.setdefault(bucket(len(prompt.tokens), self.max_prompt_tokens), []).append(at)
        for width, members in by_bucket.items():
            for start in range(0, len(members), _PREFILL_ROWS):
                chosen = members[start : start + _PREFILL_ROWS]
                rows = [prompts[at].tokens for at in chosen] + [[0]] * (_PREFILL_ROWS - len(chosen))
                prefix = engine.prefill(
                    params, pad_right(rows, width), lengths(rows), config=self._config, dtype=self._dtype
                )
                for row, at in enumerate(chosen):
                    for index in range(len(prompts[at].keys)):
                        yield _Waiting(at, index, prefix, row)

    def _fill(
        self,
        state: engine.DecodeState,
        waiting: Iterator[_Waiting],
        occupied: dict[int, _Waiting],
        keys: Sequence[UInt32[np.ndarray, "_ words"]],
        sampling: Sampling,
    ) -> engine.DecodeState:
        """Puts waiting rollouts into free slots, those of one prefix in one call."""
        free = [slot for slot in range(self._slots) if slot not in occupied]
        placed = list(zip(free, islice(waiting, len(free)), strict=False))
        occupied.update(placed)
        for _, group in groupby(placed, key=lambda pair: id(pair[1].prefix)):
            batch = list(group)
            # Padded to all slots, so that one compiled program serves; slots out of range are dropped.
            unused = self._slots - len(batch)
            own_keys = [keys[item.prompt][item.index] for _, item in batch]
            request = engine.SlotRequest(
                keys=jax.random.wrap_key_data(jnp.asarray(np.stack(own_keys + own_keys[:1] * unused))),
                settings=SamplingSettings(
                    jnp.full(self._slots, sampling.temperature, jnp.float32),
                    jnp.full(self._slots, sampling.top_k, jnp.int32),
                    jnp.full(self._slots, sampling.top_p, jnp.float32),
                ),
                limits=jnp.full(self._slots, sampling.max_new_tokens, jnp.int32),
            )
            rows = np.array([item.row for _, item in batch] + [0] * unused, np.int32)
            slots = np.array([slot for slot, _ in batch] + [self._slots] * unused, np.int32)
            state = engine.insert(batch[0][1].prefix, state, rows, slots, request)
        return state


def _collect(state: engine.DecodeState, occupied: dict[int, _Waiting], results: list[list[Rollout]]) -> int:
    """Takes the rollouts that have ended out of their slots; returns how many."""
    live = np.asarray(state.live)
    ended = [slot for slot in occupied if not live[slot]]
    if not ended:
        return 0
    sizes, stopped, tokens, logprobs = jax.device_get((state.lengths, state.stopped, state.tokens, state.logprobs))
    for slot in ended:
        item = occupied.pop(slot)
        size = sizes[slot]
        results[item.prompt][item.index] = Rollout(
            tokens[slot, :size].copy(), logprobs[slot, :size].copy(), "stop" if stopped[slot] else "length"
        )
    return len(ended)
