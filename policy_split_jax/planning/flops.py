"""FLOPs of a program as it is written: what its jaxpr multiplies, loops counted as often as they run.

XLA's own `cost_analysis` counts the body of a loop once, and knows nothing of a kernel's inside.
"""

import math
from collections.abc import Iterator
from typing import Any

from jax.extend import core


def count_flops(jaxpr: core.Jaxpr, while_trips: int = 1) -> int:
    """Multiplications and additions of all matrix products, on all devices together.

    A `while` loop is taken to run `while_trips` times: its jaxpr does not say. Everything else that a transformer
    computes is small beside its products.
    """
    return _of_jaxpr(jaxpr, while_trips)


def _of_jaxpr(jaxpr: core.Jaxpr, trips: int) -> int:
    return sum(_of_equation(equation, trips) for equation in jaxpr.eqns)


def _of_equation(equation: core.JaxprEqn, trips: int) -> int:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        return _product(equation)
    if name.startswith("dot_product_attention_"):
        return _cudnn_attention(equation)
    parts = [_of_jaxpr(jaxpr, trips) for jaxpr in _inner(params)]
    if name == "cond":
        return max(parts)
    return _repetitions(name, params, trips) * sum(parts)


def _repetitions(name: str, params: dict[str, Any], trips: int) -> int:
    """How often a primitive runs what is inside it."""
    if name == "scan":
        return params["length"]
    if name == "while":
        return trips
    if name == "shard_map":
        # Its inside is one device's part.
        return params["mesh"].size
    if name == "pallas_call":
        grid = params["grid_mapping"].grid
        blocks = grid[-1]
        # Splash attention passes over the blocks above the diagonal.
        splash = "splash" in str(params.get("name") or params.get("name_and_src_info"))
        return math.prod(grid) * (blocks + 1) // (2 * blocks) if splash else math.prod(grid)
    return 1


def _inner(params: dict[str, Any]) -> Iterator[core.Jaxpr]:
    """Every jaxpr among a primitive's parameters."""
    for value in params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if isinstance(item, core.ClosedJaxpr):
                yield item.jaxpr
            elif isinstance(item, core.Jaxpr):
                yield item


def _cudnn_attention(equation: core.JaxprEqn) -> int:
    """Two products of the forward pass, five of the backward pass, each of what is below the diagonal."""
    queries: Any = equation.invars[0].aval
    *batch, length, heads, size = queries.shape
    return (5 if "bwd" in equation.primitive.name else 2) * math.prod(batch) * heads * length**2 * size


def _product(equation: core.JaxprEqn) -> int:
    (contracted, _), _ = equation.params["dimension_numbers"]
    result: Any = equation.outvars[0].aval
    left: Any = equation.invars[0].aval
    return 2 * math.prod(result.shape) * math.prod(left.shape[axis] for axis in contracted)
