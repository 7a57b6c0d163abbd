"""Gradient accumulation: a batch cut into microbatches, their losses and gradients summed.

The caller's loss is a weighted *sum* whose weights were made for the whole batch, so the sum over
microbatches is the whole batch's loss, whatever their size.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

Tree = TypeVar("Tree")
LossFn = Callable[[Any, Any], tuple[Float[Array, ""], Any]]


class Microbatches(NamedTuple):
    """Which entries of a batch are computed together."""

    members: Int[Array, "N Q"]
    """Indices along the batch's first axis; one beyond its end stands for nobody, whose arrays are zeros."""
    used: Int[Array, ""] | int
    """So many microbatches are computed; the rest have no members. One program serves any number."""


def equal_parts(size: int, count: int) -> Microbatches:
    """A batch of `size` entries in `count` microbatches of neighbours."""
    return Microbatches(jnp.arange(size).reshape(count, -1), count)


def split_batch(batch: Tree, count: int) -> Tree:
    """Every array's first axis N becomes [count, N / count]."""
    return jax.tree.map(lambda leaf: leaf.reshape(count, -1, *leaf.shape[1:]), batch)


def take(batch: Tree, members: Int[Array, "Q"]) -> Tree:
    """One microbatch."""
    return jax.tree.map(lambda leaf: jnp.take(leaf, members, axis=0, mode="fill", fill_value=0), batch)


def accumulate_gradients(
    loss: LossFn, params: Any, batch: Any, microbatches: Microbatches, join: Callable[[Any, Any], Any]
) -> tuple[tuple[Float[Array, ""], Any], Any]:
    """((Σ loss, joined auxiliary values), Σ gradients) of `loss(params, microbatch)`.

    `join` makes one of two microbatches' auxiliary values, to which zeros add nothing. Microbatches bound memory
    on an accelerator. On a CPU they also keep activations in its caches, which makes the embedded model's update
    faster (docs/performance.md).
    """
    value_and_grad = jax.value_and_grad(loss, has_aux=True)
    if len(microbatches.members) == 1:
        return value_and_grad(params, take(batch, microbatches.members[0]))

    def step(at: Array, totals: Any) -> Any:
        (value, extra), gradient = value_and_grad(params, take(batch, microbatches.members[at]))
        (values, extras), gradients = totals
        return (values + value, join(extras, extra)), jax.tree.map(jnp.add, gradients, gradient)

    shapes = jax.eval_shape(value_and_grad, params, take(batch, microbatches.members[0]))
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    return jax.lax.fori_loop(0, microbatches.used, step, zeros)
