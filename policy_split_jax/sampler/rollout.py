"""All rollouts of a list of prompts: what training and evaluation ask of the engine."""

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Key

from policy_split_jax.errors import UserError
from policy_split_jax.model import qwen3
from policy_split_jax.padding import bucket
from policy_split_jax.sampler.batcher import Batcher, EngineConfig, Prompt, Rollout, Sampling

_PENDING = Rollout(np.zeros(0, np.int32), np.zeros(0, np.float32), "length")
"""Stands in a result until its rollout has ended."""


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

    def __init__(self, config: EngineConfig, max_prompt_tokens: int):
        self._config = config
        self.max_prompt_tokens = max_prompt_tokens

    def __call__(
        self,
        params: qwen3.Params,
        prompts: Sequence[Prompt],
        sampling: Sampling | Sequence[Sampling],
        progress: Callable[[int], None] = lambda finished: None,
    ) -> list[list[Rollout]]:
        """All rollouts of all prompts, in the prompts' order and each prompt's keys' order.

        `sampling` is one for all or one for each prompt. Each prompt is prefilled once, however many rollouts
        it has. `progress` is told how many rollouts have ended since it was last called. Raises UserError for
        a prompt longer than `max_prompt_tokens`.
        """
        self._check(prompts)
        each = [sampling] * len(prompts) if isinstance(sampling, Sampling) else list(sampling)
        results: list[list[Rollout]] = [[_PENDING] * len(prompt.keys) for prompt in prompts]
        longest = max((len(prompt.tokens) for prompt in prompts), default=1)
        batcher = Batcher(
            self._config,
            params,
            max_prompt_tokens=bucket(longest, self.max_prompt_tokens),
            max_new_tokens=max((own.max_new_tokens for own in each), default=1),
        )
        for at, (prompt, own) in enumerate(zip(prompts, each, strict=True)):
            batcher.add(at, prompt, own)
        while batcher.busy:
            ended = batcher.step()
            for place, rollout in ended:
                results[place.prompt][place.index] = rollout
            progress(len(ended))
        return results

    def _check(self, prompts: Sequence[Prompt]) -> None:
        for at, prompt in enumerate(prompts):
            if not 1 <= len(prompt.tokens) <= self.max_prompt_tokens:
                raise UserError(
                    f"prompt {at} has {len(prompt.tokens)} tokens, the limit is {self.max_prompt_tokens}; "
                    "raise rollout.max_prompt_tokens or leave the question out"
                )
