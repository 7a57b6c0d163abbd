"""Gradient accumulation: a batch cut into microbatches, their losses and gradients summed.

The caller's loss is a weighted *sum* whose weights were made for the whole batch, so the sum over
microbatches is the whole batch's loss, whatever their size.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Tree = TypeVar("Tree")
LossFn = Callable[[Any, Any], tuple[Float[Array, ""], Any]]


def split_batch(batch: Tree, microbatches: int) -> Tree:
    """Every array's first axis N becomes [microbatches, N / microbatches]."""
    return jax.tree.map(lambda leaf: leaf.reshape(microbatches, -1, *leaf.shape[1:]), batch)


def accumulate_gradients(
    loss: LossFn, params: Any, batch: Any, microbatches: int
) -> tuple[tuple[Float[Array, ""], Any], Any]:
    """((Σ loss, auxiliary values of the whole batch), Σ gradients) of `loss(params, microbatch)`.

    The arrays of the auxiliary values begin with the batch axis; those of the microbatches are joined again.
    Microbatches bound memory on an accelerator. On a CPU they also keep activations in its caches, which
    makes the embedded model's update faster (docs/performance.md).
    """
    value_and_grad = jax.value_and_grad(loss, has_aux=True)
    if microbatches == 1:
        return value_and_grad(params, batch)

    def step(totals: Any, microbatch: Any) -> tuple[Any, Any]:
        (value, extra), gradient = value_and_grad(params, microbatch)
        return jax.tree.map(jnp.add, totals, (value, gradient)), extra

    zeros = (jnp.float32(0.0), jax.tree.map(jnp.zeros_like, params))
    (value, gradient), extra = jax.lax.scan(step, zeros, split_batch(batch, microbatches))
    return (value, jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), extra)), gradient
