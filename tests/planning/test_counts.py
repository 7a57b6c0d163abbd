# ruff: noqa: E501 (HLO has long lines)
"""FLOPs and bytes against counts by hand."""

import importlib.util

import jax
import jax.numpy as jnp
import pytest
from jax import ShapeDtypeStruct

from policy_split_jax.model.attention import cudnn_attention, splash_attention
from policy_split_jax.planning.flops import count_flops
from policy_split_jax.planning.hlo import arrays, parse, traffic

X, W = ShapeDtypeStruct((8, 16), jnp.float32), ShapeDtypeStruct((16, 16), jnp.float32)
PRODUCT = 2 * 8 * 16 * 16


def flops(function, *arguments, trips=1):
    return count_flops(jax.jit(function).trace(*arguments).jaxpr.jaxpr, trips)


def test_products_are_counted():
    assert flops(lambda x, w: x @ w, X, W) == PRODUCT
    assert flops(lambda x, w: jnp.sin(x), X, W) == 0


def test_a_scan_counts_as_often_as_it_runs():
    assert flops(lambda x, w: jax.lax.scan(lambda x, _: (x @ w, None), x, None, length=5)[0], X, W) == 5 * PRODUCT


def test_a_while_loop_counts_as_often_as_it_is_said_to_run():
    def loop(x, w):
        return jax.lax.while_loop(lambda x: jnp.sum(x) > 0, lambda x: x @ w, x)

    assert flops(loop, X, W, trips=3) == 3 * PRODUCT


def test_what_is_computed_again_for_a_gradient_counts_again():
    """Two products forward; computed again but the last, whose result nothing needs; and two each backward."""

    def loss(w, x):
        return jnp.sum(jax.checkpoint(lambda w: jnp.sin(jnp.sin(x @ w) @ w))(w))

    assert flops(jax.grad(loss), W, X) == pytest.approx((2 + 2 + 3) * PRODUCT)


def test_of_two_branches_the_dearer_counts():
    def choose(x, w):
        return jax.lax.cond(x[0, 0] > 0, lambda: x @ w @ w, lambda: x @ w)

    assert flops(choose, X, W) == 2 * PRODUCT


def test_splash_attention_counts_what_is_below_the_diagonal():
    heads, length = ShapeDtypeStruct((2, 2048, 4, 128), jnp.float32), 2048
    kinds = ShapeDtypeStruct((2, length), jnp.int32)

    def attend(queries, keys, values, kinds):
        return splash_attention(queries, keys, values, kinds=kinds, mesh=None, interpret=True)

    whole = 2 * 2 * 2 * 4 * length**2 * 128
    # Blocks of 512: 10 of 16 have something below the diagonal.
    assert flops(attend, heads, heads, heads, kinds) == pytest.approx(whole * 10 / 16)


@pytest.mark.skipif(
    not any(importlib.util.find_spec(name) for name in ("jax_cuda12_plugin", "jax_cuda13_plugin")),
    reason="needs policy-split-jax[cuda]",
)
def test_cudnn_attention_counts_what_is_below_the_diagonal():
    length, heads, size = 256, 4, 64
    queries = ShapeDtypeStruct((2, length, heads, size), jnp.bfloat16)
    keys = ShapeDtypeStruct((2, length, 2, size), jnp.bfloat16)
    mask = ShapeDtypeStruct((2, length, length), jnp.bool_)

    def summed(queries, keys, mask):
        return jnp.sum(cudnn_attention(queries, keys, keys, mask=mask, mesh=None).astype(jnp.float32))

    product = 2 * 2 * heads * length**2 * size // 2
    assert flops(summed, queries, keys, mask) == 2 * product
    assert flops(jax.grad(summed), queries, keys, mask) == 7 * product


# A module as a TPU's compiler writes them: a loop of five, in which a slice of stacked weights is gathered; a fusion
# that updates one row in place; a kernel that reads the row, whose attributes go on over further lines; a result kept
# near the cores, S(1), that no memory sees.
MODULE = """HloModule jit_f, is_scheduled=true

%slicer (p0: bf16[5,64,32], p1: s32[]) -> bf16[1,64,32] {
  %p0 = bf16[5,64,32]{2,1,0:T(8,128)(2,1)} parameter(0)
  %p1 = s32[]{:T(128)} parameter(1)
  %zero = s32[]{:T(128)} constant(0)
  ROOT %cut = bf16[1,64,32]{2,1,0:T(8,128)(2,1)S(1)} dynamic-slice(%p0, %p1, %zero, %zero), dynamic_slice_sizes={1,64,32}
}

%writer (q0: f32[100,32], q1: f32[1,32], q2: s32[]) -> f32[100,32] {
  %q0 = f32[100,32]{1,0} parameter(0)
  %q1 = f32[1,32]{1,0} parameter(1)
  %q2 = s32[] parameter(2)
  %none = s32[] constant(0)
  ROOT %put = f32[100,32]{1,0} dynamic-update-slice(%q0, %q1, %q2, %none)
}

%body (state: (s32[], bf16[5,64,32], f32[100,32], f32[1,32])) -> (s32[], bf16[5,64,32], f32[100,32], f32[1,32]) {
  %state = (s32[], bf16[5,64,32]{2,1,0}, f32[100,32]{1,0}, f32[1,32]{1,0}) parameter(0)
  %at = s32[] get-tuple-element(%state), index=0
  %stack = bf16[5,64,32]{2,1,0} get-tuple-element(%state), index=1
  %table = f32[100,32]{1,0} get-tuple-element(%state), index=2
  %row = f32[1,32]{1,0} get-tuple-element(%state), index=3
  %kernel = f32[1,32]{1,0:T(8,128)S(1)} custom-call(%row), custom_call_target="tpu_custom_call", backend_config={"body":"
"blocks = 2", "%none = f32[9] add(%row)
}}
  %part = bf16[1,64,32]{2,1,0:T(8,128)(2,1)S(1)} fusion(%stack, %at), kind=kLoop, calls=%slicer
  %all = bf16[1,256,32]{2,1,0:T(8,128)(2,1)S(1)} all-gather(%part), channel_id=1, replica_groups=[1,4]<=[4], dimensions={1}
  %next = f32[100,32]{1,0} fusion(%table, %row, %at), kind=kLoop, calls=%writer
  ROOT %new = (s32[], bf16[5,64,32]{2,1,0}, f32[100,32]{1,0}, f32[1,32]{1,0}) tuple(%at, %stack, %next, %row)
}

%condition (state: (s32[], bf16[5,64,32], f32[100,32], f32[1,32])) -> pred[] {
  %state = (s32[], bf16[5,64,32]{2,1,0}, f32[100,32]{1,0}, f32[1,32]{1,0}) parameter(0)
  %five = s32[] constant(5)
  %at = s32[] get-tuple-element(%state), index=0
  ROOT %less = pred[] compare(%at, %five), direction=LT
}

ENTRY %main (a: s32[], b: bf16[5,64,32], c: f32[100,32], d: f32[1,32]) -> f32[100,32] {
  %a = s32[] parameter(0)
  %b = bf16[5,64,32]{2,1,0} parameter(1)
  %c = f32[100,32]{1,0} parameter(2)
  %d = f32[1,32]{1,0} parameter(3)
  %sum = f32[100,32]{1,0} all-reduce(%c), channel_id=2, to_apply=%condition
  %start = (s32[], bf16[5,64,32]{2,1,0}, f32[100,32]{1,0}, f32[1,32]{1,0}) tuple(%a, %b, %sum, %d)
  %loop = (s32[], bf16[5,64,32]{2,1,0}, f32[100,32]{1,0}, f32[1,32]{1,0}) while(%start), condition=%condition, body=%body
  ROOT %result = f32[100,32]{1,0} get-tuple-element(%loop), index=2
}
"""


def test_bytes_of_a_module_by_hand():
    found = traffic(MODULE)
    table, row, part = 100 * 32 * 4, 32 * 4, 64 * 32 * 2
    # The gathered part is as large as four devices' parts; a sum passes twice.
    assert found.collectives == {"all-gather": 5 * 4 * part, "all-reduce": 2 * table}
    index = 4
    # The sum reads and writes the table. A turn reads its slice, the row twice, indices, and writes the row.
    assert found.memory == 2 * table + 5 * (row + part + index + row + index + row)


# As a TPU's compiler writes collectives that go on beside a product, and a sum of which each device takes a part.
FUSED = """HloModule jit_g, is_scheduled=true

%begin (s0: bf16[8,64]) -> (bf16[8,64], bf16[32,64], u32[]) {
  %s0 = bf16[8,64]{1,0} parameter(0)
  %gathered = bf16[32,64]{1,0} all-gather(%s0), channel_id=1, dimensions={0}
  ROOT %began = (bf16[8,64]{1,0}, bf16[32,64]{1,0}, u32[]) tuple(%s0, %gathered)
}

%async_collective_fusion.1 (t0: bf16[8,64], t1: bf16[32,64], t2: f32[16,16]) -> (f32[16,16], bf16[8,64], bf16[32,64]) {
  %t0 = bf16[8,64]{1,0} parameter(0)
  %t1 = bf16[32,64]{1,0} parameter(1)
  %t2 = f32[16,16]{1,0} parameter(2)
  %again = bf16[32,64]{1,0} all-gather(%t0), channel_id=1, dimensions={0}
  %product = f32[16,16]{1,0} convolution(%t2, %t2), dim_labels=bf_io->bf
  ROOT %both = (f32[16,16]{1,0}, bf16[8,64]{1,0}, bf16[32,64]{1,0}) tuple(%product, %t0, %again)
}

%all-reduce-scatter.2 (v0: f32[64,16]) -> f32[16,16] {
  %v0 = f32[64,16]{1,0} parameter(0)
  %sum = f32[64,16]{1,0} all-reduce(%v0), channel_id=2, to_apply=%add
  ROOT %own = f32[16,16]{1,0} dynamic-slice(%sum), dynamic_slice_sizes={16,16}
}

ENTRY %main (a: bf16[8,64], b: f32[16,16], c: f32[64,16]) -> f32[16,16] {
  %a = bf16[8,64]{1,0} parameter(0)
  %b = f32[16,16]{1,0} parameter(1)
  %c = f32[64,16]{1,0} parameter(2)
  %async-collective-start.3 = (bf16[8,64]{1,0}, bf16[32,64]{1,0}, u32[]) fusion(%a), kind=kCustom, calls=%begin
  %own = bf16[8,64]{1,0} get-tuple-element(%async-collective-start.3), index=0
  %all = bf16[32,64]{1,0} get-tuple-element(%async-collective-start.3), index=1
  %fusion.4 = (f32[16,16]{1,0}, bf16[8,64]{1,0}, bf16[32,64]{1,0}) fusion(%own, %all, %b), kind=kOutput, \
output_to_operand_aliasing={{1}: (0, {}), {2}: (1, {})}, calls=%async_collective_fusion.1
  ROOT %fusion.5 = f32[16,16]{1,0} fusion(%c), kind=kCustom, calls=%all-reduce-scatter.2
}
""".replace("\\\n", "")


def test_collectives_within_fusions_count_once():
    found = traffic(FUSED)
    assert found.collectives == {"all-gather": 32 * 64 * 2, "reduce-scatter": 64 * 16 * 4}
    # The product reads and writes its squares; the sum reads its rows and writes the part.
    assert found.memory == 2 * 16 * 16 * 4 + (64 + 16) * 16 * 4


def test_what_only_starts_is_counted_once():
    """A copy to nearer memory, and a quarter of a weight brought there, as a TPU's compiler writes them."""
    module = """HloModule jit_f

ENTRY %main (a: f32[8,16], b: bf16[64,32]) -> f32[8,16] {
  %a = f32[8,16]{1,0} parameter(0)
  %b = bf16[64,32]{1,0} parameter(1)
  %near = (f32[8,16]{1,0:S(1)}, f32[8,16]{1,0}, u32[]{:S(2)}) copy-start(%a)
  %part = ((bf16[64,32]{1,0}), bf16[16,32]{1,0:S(1)}, s32[]{:S(2)}) slice-start(%b), slice={[0:16], [0:32]}
  %cut = bf16[16,32]{1,0} slice(%b), slice={[0:16], [0:32]}
  ROOT %back = f32[8,16]{1,0} copy-done(%near)
}
"""
    copied, part = 8 * 16 * 4, 16 * 32 * 2
    assert traffic(module).memory == copied + part + 2 * part


def test_a_loop_whose_count_is_not_known_runs_as_often_as_is_said():
    unknown = MODULE.replace("constant(5)", "add(%at, %at)")
    assert traffic(unknown, while_trips=3).collectives["all-gather"] == 3 * 4 * 64 * 32 * 2
    known = unknown.replace("body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"7"}}')
    assert traffic(known, while_trips=3).collectives["all-gather"] == 7 * 4 * 64 * 32 * 2


def test_shapes_of_all_kinds():
    assert list(arrays("pred[7]{0}")) == [(7, True)]
    assert list(arrays("(s4[3]{0}, f8e4m3fn[2,2]{1,0:S(1)}, token[])")) == [(2, True), (4, False), (0, True)]


def test_a_compiled_programs_traffic_is_its_inputs_and_outputs():
    """On a CPU: one product, nothing kept between."""
    wide = ShapeDtypeStruct((256, 512), jnp.float32), ShapeDtypeStruct((512, 128), jnp.float32)
    text = jax.jit(lambda x, w: x @ w).lower(*wide).compile().as_text()
    assert parse(text)[1]
    assert traffic(text).memory == 4 * (256 * 512 + 512 * 128 + 256 * 128)
    assert not traffic(text).collectives
