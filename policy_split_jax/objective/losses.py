"""The clipped policy-gradient loss and how it is summed over tokens. Pure functions of arrays."""

from typing import Literal, get_args

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from policy_split_jax import masked

Aggregate = Literal["token_mean", "sequence_mean_token_sum", "sequence_mean_token_mean", "constant"]
Metrics = dict[str, Float[Array, ""]]
_LARGEST_LOG_RATIO = 20.0


def token_weights(mask: Bool[Array, "... T"], aggregate: Aggregate, max_new_tokens: int = 0) -> Float[Array, "... T"]:
    """Weights w with loss = Σ w·ℓ; 0 at masked positions.

    - token_mean: every token of the batch counts the same (DAPO, https://arxiv.org/abs/2503.14476);
    - sequence_mean_token_sum: mean over sequences of the sum of a sequence's tokens;
    - sequence_mean_token_mean: mean over sequences of the mean of a sequence's tokens (GRPO,
      https://arxiv.org/abs/2402.03300);
    - constant: sum over everything divided by sequences × `max_new_tokens`, or × T where that is 0 (Dr. GRPO,
      https://arxiv.org/abs/2503.20783).

    A sequence without a token is not counted. The weights of a whole step may be computed once and then cut
    into microbatches: that is how accumulated gradients equal those of one batch. Raises ValueError for any
    other `aggregate`.
    """
    if aggregate not in get_args(Aggregate):
        raise ValueError(f"aggregate is {aggregate!r}; it must be one of {', '.join(get_args(Aggregate))}")
    tokens = masked.count(mask, axis=-1, keepdims=True)
    sequences = jnp.maximum(masked.count(tokens > 0), 1.0)
    per_sequence = {
        "token_mean": 1.0 / jnp.maximum(masked.count(mask), 1.0),
        "sequence_mean_token_sum": 1.0 / sequences,
        "sequence_mean_token_mean": 1.0 / (sequences * jnp.maximum(tokens, 1.0)),
        "constant": 1.0 / (sequences * (max_new_tokens or mask.shape[-1])),
    }[aggregate]
    return jnp.where(mask, per_sequence, 0.0)


def token_losses(
    logprobs: Float[Array, "..."],
    old_logprobs: Float[Array, "..."],
    advantages: Float[Array, "..."],
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
) -> tuple[Float[Array, "..."], dict[str, Float[Array, "..."]]]:
    """−min(ρA, clip(ρ, 1−ε_low, 1+ε_high)A) of each token, and what to measure of each token.

    ρ = exp(logp − logp_old) (PPO, https://arxiv.org/abs/1707.06347). With `dual_clip` c > 1 a token of
    negative advantage loses at most c·|A| (https://arxiv.org/abs/1912.09729).
    """
    # Beyond ±20 the ratio would overflow, and its gradient with it.
    log_ratio = jnp.clip(logprobs - old_logprobs, -_LARGEST_LOG_RATIO, _LARGEST_LOG_RATIO)
    ratio = jnp.exp(log_ratio)
    plain = ratio * advantages
    clipped = jnp.clip(ratio, 1 - clip_low, 1 + clip_high) * advantages
    surrogate = jnp.minimum(plain, clipped)
    if dual_clip is not None:
        surrogate = jnp.where(advantages < 0, jnp.maximum(surrogate, dual_clip * advantages), surrogate)
    measures = {
        "clip_fraction": (clipped < plain).astype(jnp.float32),
        "ratio_mean": ratio,
        "approx_kl": jnp.expm1(log_ratio) - log_ratio,
    }
    return -surrogate, measures


def policy_loss(
    logprobs: Float[Array, "*batch T"],
    old_logprobs: Float[Array, "*batch T"],
    advantages: Float[Array, "*batch T"],
    mask: Bool[Array, "..."],
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    aggregate: Aggregate = "token_mean",
) -> tuple[Float[Array, ""], Metrics]:
    """The clipped surrogate loss of equation 5, to be minimised, and its metrics.

    `mask` broadcasts to the other arrays: a mask [P, G, T] serves both modes' [2, P, G, T]. The metrics are
    means over tokens: `clip_fraction`, `ratio_mean`, and `approx_kl`, the k3 estimator of KL(old ‖ new)
    (http://joschu.net/blog/kl-approx.html).
    """
    mask = jnp.broadcast_to(mask, logprobs.shape)
    losses, measures = token_losses(
        # Masked before exp(): an infinite ratio would turn the gradient of padding into NaN.
        masked.where(mask, logprobs),
        masked.where(mask, old_logprobs),
        masked.where(mask, advantages),
        clip_low=clip_low,
        clip_high=clip_high,
        dual_clip=dual_clip,
    )
    loss = masked.total(losses * token_weights(mask, aggregate), mask)
    return loss, {name: masked.mean(value, mask) for name, value in measures.items()}
