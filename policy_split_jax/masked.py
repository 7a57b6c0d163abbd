"""Reductions over padded arrays: the only way in which this project reduces over a mask.

Values at masked positions may be anything, NaN and infinity included: they are replaced before they are
used, so they reach neither the result nor its gradient.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Shaped

Axis = int | tuple[int, ...] | None


class Mean(NamedTuple):
    """A mean whose parts are still to be added to those of other microbatches."""

    total: Float[Array, "..."]
    number: Float[Array, "..."]

    @property
    def value(self) -> Float[Array, "..."]:
        """0 where there is nothing to take the mean of."""
        return self.total / jnp.maximum(self.number, 1.0)


def where(mask: Bool[Array, "..."], values: Shaped[Array, "..."], fill: float = 0.0) -> Shaped[Array, "..."]:
    """`values` where the mask is true, `fill` elsewhere; the mask broadcasts."""
    return jnp.where(mask, values, jnp.asarray(fill, values.dtype))


def count(mask: Bool[Array, "..."], axis: Axis = None, keepdims: bool = False) -> Float[Array, "..."]:
    """Number of true positions, as float32."""
    return jnp.sum(mask, axis=axis, keepdims=keepdims, dtype=jnp.float32)


def total(
    values: Float[Array, "..."], mask: Bool[Array, "..."], axis: Axis = None, keepdims: bool = False
) -> Float[Array, "..."]:
    """Sum over the true positions."""
    return jnp.sum(where(mask, values), axis=axis, keepdims=keepdims)


def mean(
    values: Float[Array, "..."], mask: Bool[Array, "..."], axis: Axis = None, keepdims: bool = False
) -> Float[Array, "..."]:
    """Mean over the true positions; 0 where there are none."""
    return mean_parts(values, mask, axis, keepdims).value


def mean_parts(
    values: Float[Array, "..."], mask: Bool[Array, "..."], axis: Axis = None, keepdims: bool = False
) -> Mean:
    """Sum and number of the true positions."""
    mask = jnp.broadcast_to(mask, values.shape)
    return Mean(total(values, mask, axis, keepdims), count(mask, axis, keepdims))


def std(
    values: Float[Array, "..."], mask: Bool[Array, "..."], axis: Axis = None, keepdims: bool = False
) -> Float[Array, "..."]:
    """Unbiased standard deviation over the true positions; 0 where there are fewer than two."""
    mask = jnp.broadcast_to(mask, values.shape)
    deviation = where(mask, values - mean(values, mask, axis, keepdims=True))
    number = count(mask, axis, keepdims)
    variance = jnp.sum(deviation**2, axis=axis, keepdims=keepdims) / jnp.maximum(number - 1.0, 1.0)
    # The root's slope at 0 is infinite: without spread the gradient would be NaN instead of 0.
    spread = variance > 0
    return where(spread, jnp.sqrt(where(spread, variance, 1.0)))


def extent(
    values: Float[Array, "..."], mask: Bool[Array, "..."], axis: Axis = None, keepdims: bool = False
) -> Float[Array, "..."]:
    """Largest minus smallest value over the true positions; 0 where there are none."""
    mask = jnp.broadcast_to(mask, values.shape)
    high = jnp.max(where(mask, values, -jnp.inf), axis=axis, keepdims=keepdims)
    low = jnp.min(where(mask, values, jnp.inf), axis=axis, keepdims=keepdims)
    return jnp.where(jnp.any(mask, axis=axis, keepdims=keepdims), high - low, 0.0)


def quantile(values: Float[Array, "N"], mask: Bool[Array, "N"], q: float) -> Float[Array, ""]:
    """The q-quantile (0 ≤ q ≤ 1, linear interpolation) of the true positions; 0 where there are none."""
    ordered = jnp.sort(where(mask, values, jnp.inf))
    last = jnp.maximum(count(mask) - 1.0, 0.0)
    below = jnp.floor(q * last).astype(jnp.int32)
    above = jnp.ceil(q * last).astype(jnp.int32)
    low, high = ordered[below], ordered[above]
    return jnp.where(jnp.any(mask), low + (high - low) * (q * last - below), 0.0)
