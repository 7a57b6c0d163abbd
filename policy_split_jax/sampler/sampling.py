"""From logits to a token and its log-probability, on the device, each slot with a key of its own."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key


class SamplingSettings(NamedTuple):
    """How each slot samples; a column of the decode state."""

    temperature: Float[Array, "B"]
    """0 is greedy."""
    top_k: Int[Array, "B"]
    """0 is off."""
    top_p: Float[Array, "B"]
    """1 is off."""


def token_keys(keys: Key[Array, "B"], index: Int[Array, "B"]) -> Key[Array, "B"]:
    """The key of each rollout's token: a rollout's noise depends on nothing but its key and the position."""
    return jax.vmap(jax.random.fold_in)(keys, index)


def allowed_tokens(logits: Float[Array, "B V"], top_k: Int[Array, "B"], top_p: Float[Array, "B"]) -> Bool[Array, "B V"]:
    """The tokens that top-k and top-p (https://arxiv.org/abs/1904.09751) leave; the likeliest always stays.

    top-p is applied to the distribution that top-k leaves, as Hugging Face transformers does. Tokens as
    likely as the last one kept are kept too.
    """
    vocabulary = logits.shape[-1]
    ordered = jnp.sort(logits, axis=-1, descending=True)
    rank = jnp.arange(vocabulary)
    within_k = rank < jnp.where(top_k > 0, top_k, vocabulary)[:, None]
    probability = jax.nn.softmax(jnp.where(within_k, ordered, -jnp.inf), axis=-1)
    before = jnp.cumsum(probability, axis=-1) - probability
    # With top-p off, rounding of the running sum must not cut the tail.
    within_p = (before < top_p[:, None]) | (top_p[:, None] >= 1)
    kept = (within_k & within_p).at[:, 0].set(True)
    threshold = jnp.min(jnp.where(kept, ordered, jnp.inf), axis=-1, keepdims=True)
    return logits >= threshold


def sample(
    logits: Float[Array, "B V"], keys: Key[Array, "B"], settings: SamplingSettings
) -> tuple[Int[Array, "B"], Float[Array, "B"]]:
    """One token of each slot and its log-probability (nats).

    The log-probability is that of the whole distribution at the slot's temperature (at temperature 1 for
    greedy slots): what the trainer's scorer computes, with or without truncation.
    """
    greedy = settings.temperature <= 0
    scaled = logits / jnp.where(greedy, 1.0, settings.temperature)[:, None]
    noise = jax.vmap(lambda key: jax.random.gumbel(key, scaled.shape[-1:]))(keys)
    noisy = scaled + jnp.where(greedy[:, None], 0.0, noise)
    truncating = ~greedy & ((settings.top_k > 0) | (settings.top_p < 1))
    # Sorting the vocabulary is most of the cost of sampling: skipped while nobody asks for it.
    tokens = jax.lax.cond(
        jnp.any(truncating),
        lambda: _likeliest(
            jnp.where(allowed_tokens(scaled, settings.top_k, settings.top_p) | ~truncating[:, None], noisy, -jnp.inf)
        ),
        lambda: _likeliest(noisy),
    )
    logp = jax.nn.log_softmax(scaled, axis=-1)
    return tokens, jnp.take_along_axis(logp, tokens[:, None], axis=-1)[:, 0]


def _likeliest(scores: Float[Array, "B V"]) -> Int[Array, "B"]:
    """argmax, as two reductions: XLA turns it into one that no CPU vectorises."""
    vocabulary = scores.shape[-1]
    best = jnp.max(scores, axis=-1, keepdims=True)
    return jnp.min(jnp.where(scores == best, jnp.arange(vocabulary), vocabulary - 1), axis=-1)
