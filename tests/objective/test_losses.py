"""The clipped policy loss against plain float64 loops, finite differences and hand-computed numbers."""

import inspect
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policy_split_jax.objective import policy_loss
from policy_split_jax.objective.losses import token_weights

AGGREGATES = ("token_mean", "sequence_mean_token_sum", "sequence_mean_token_mean", "constant")
SHAPE = (2, 3, 4, 5)  # modes, questions, rollouts, tokens
# Float32 against float64: a ratio exp(x) of |x| < 2 has a relative error of about 5e-7 (what the subtraction
# of log-probabilities near 5 leaves), and about 60 of them are summed.
TOLERANCE = {"rtol": 1e-5, "atol": 3e-6}
GARBAGE = np.array([np.nan, np.inf, -np.inf, 1e30, 7.0], np.float32)
seeds = st.integers(0, 2**32 - 1)
few = settings(max_examples=20, deadline=None, derandomize=True)


def random_case(seed, clips=(0.8, 1.2, 1.28, 3.0)):
    """Ragged responses (some empty), a mask shared by both modes, no ratio at a kink of the surrogate."""
    rng = np.random.default_rng(seed)
    mask = np.arange(SHAPE[-1]) < rng.integers(0, SHAPE[-1] + 1, SHAPE[1:-1])[..., None]
    mask[0, 0] = True
    log_ratio = rng.uniform(-1.0, 1.6, SHAPE)
    for clip in clips:
        near = np.abs(log_ratio - math.log(clip)) < 0.01
        log_ratio = np.where(near, log_ratio + 0.025, log_ratio)
    old_logprobs = -rng.gamma(1.0, 2.0, SHAPE)
    advantages = rng.choice([-1.0, 1.0], SHAPE) * rng.uniform(0.1, 2.0, SHAPE)
    logprobs = old_logprobs + log_ratio
    return *(x.astype(np.float32) for x in (logprobs, old_logprobs, advantages)), mask


def compute(logprobs, old_logprobs, advantages, mask, **settings):
    arrays = (jnp.asarray(x, jnp.float32) for x in (logprobs, old_logprobs, advantages))
    loss, metrics = policy_loss(*arrays, jnp.asarray(mask), **settings)
    assert loss.shape == ()
    return float(loss), {name: float(value) for name, value in metrics.items()}


def gradient(logprobs, old_logprobs, advantages, mask, **settings):
    old_logprobs, advantages, mask = (jnp.asarray(x) for x in (old_logprobs, advantages, mask))
    loss = lambda values: policy_loss(values, old_logprobs, advantages, mask, **settings)[0]  # noqa: E731
    return np.asarray(jax.grad(loss)(jnp.asarray(logprobs, jnp.float32)))


SETTINGS = [
    {"clip_low": 0.2, "clip_high": 0.2},
    {"clip_low": 0.2, "clip_high": 0.28},
    {"clip_low": 0.2, "clip_high": 0.2, "dual_clip": 3.0},
]


@pytest.mark.parametrize("clips", SETTINGS, ids=["symmetric", "clip higher", "dual clip"])
@pytest.mark.parametrize("aggregate", AGGREGATES)
def test_agrees_with_plain_loops(oracle, aggregate, clips):
    for seed in range(3):
        case = random_case(seed)
        loss, metrics = compute(*case, aggregate=aggregate, **clips)
        expected_loss, expected_metrics = oracle.policy_loss(*case, aggregate=aggregate, **clips)
        np.testing.assert_allclose(loss, expected_loss, **TOLERANCE)
        for name, expected in expected_metrics.items():
            np.testing.assert_allclose(metrics[name], expected, err_msg=name, **TOLERANCE)


@pytest.mark.parametrize("clips", SETTINGS, ids=["symmetric", "clip higher", "dual clip"])
@pytest.mark.parametrize("aggregate", AGGREGATES)
def test_gradient_agrees_with_finite_differences(oracle, aggregate, clips):
    logprobs, old_logprobs, advantages, mask = random_case(7)
    # One question of it: the loops are slow.
    case = (logprobs[:, :1], old_logprobs[:, :1], advantages[:, :1], mask[:1])

    def loss(values):
        return oracle.policy_loss(values, *case[1:], aggregate=aggregate, **clips)[0]

    # A step of 1e-6 in float64 leaves an error of about 1e-9; the rest is float32.
    expected = oracle.finite_difference(loss, case[0].astype(np.float64))
    actual = gradient(*case, aggregate=aggregate, **clips)
    counted = np.broadcast_to(case[3], actual.shape)
    assert np.any(actual[counted] != 0)
    assert np.any(actual[counted] == 0)
    np.testing.assert_allclose(actual, expected, **TOLERANCE)


# Two responses in four places, and a third without a token; epsilon = 0.2.
#   A = 2:  ratio 1.5 -> min(3, 2.4) = 2.4 (clipped);  0.5 -> min(1, 1.6) = 1            sum  3.4
#   A = -1: ratio 1.5 -> min(-1.5, -1.2) = -1.5;  0.5 -> min(-0.5, -0.8) = -0.8 (clipped);
#           ratio 4 -> min(-4, -1.2) = -4, or -3 under dual_clip = 3                     sum -6.3, or -5.3
# token_mean                -(3.4 - 6.3) / 5         =  0.58      dual  0.38
# sequence_mean_token_sum   -(3.4 - 6.3) / 2         =  1.45      dual  0.95
# sequence_mean_token_mean  -(1.7 - 2.1) / 2         =  0.2       dual -(1.7 - 5.3/3) / 2 = 0.033333
# constant                  -(3.4 - 6.3) / (2 * 4)   =  0.3625    dual  0.2375
# clip_fraction 2/5, ratio_mean 8/5, approx_kl 8/5 - 1 - ln(1.5 * 0.5 * 1.5 * 0.5 * 4) / 5
HAND_RATIO = np.array([[1.5, 0.5, 9.0, 9.0], [1.5, 0.5, 4.0, 9.0], [9.0, 9.0, 9.0, 9.0]])
HAND_MASK = np.array([[1, 1, 0, 0], [1, 1, 1, 0], [0, 0, 0, 0]], bool)
HAND_ADVANTAGES = np.array([[2.0] * 4, [-1.0] * 4, [5.0] * 4])


@pytest.mark.parametrize(
    ("aggregate", "dual_clip", "expected"),
    [
        ("token_mean", None, 0.58),
        ("token_mean", 3.0, 0.38),
        ("sequence_mean_token_sum", None, 1.45),
        ("sequence_mean_token_sum", 3.0, 0.95),
        ("sequence_mean_token_mean", None, 0.2),
        ("sequence_mean_token_mean", 3.0, 0.0333333),
        ("constant", None, 0.3625),
        ("constant", 3.0, 0.2375),
    ],
)
def test_hand_computed(oracle, aggregate, dual_clip, expected):
    old_logprobs = np.full(HAND_RATIO.shape, -2.0)
    arguments = (old_logprobs + np.log(HAND_RATIO), old_logprobs, HAND_ADVANTAGES, HAND_MASK)
    for function in (compute, oracle.policy_loss):
        loss, metrics = function(*arguments, aggregate=aggregate, dual_clip=dual_clip)
        np.testing.assert_allclose(loss, expected, rtol=1e-5)
        np.testing.assert_allclose(metrics["clip_fraction"], 0.4, rtol=1e-6)
        np.testing.assert_allclose(metrics["ratio_mean"], 1.6, rtol=1e-6)
        np.testing.assert_allclose(metrics["approx_kl"], 0.6 - math.log(2.25) / 5, rtol=1e-5)


def test_by_default_the_clip_is_0p2_on_both_sides_without_a_dual_clip():
    case = random_case(0)
    explicit = compute(*case, aggregate="token_mean", clip_low=0.2, clip_high=0.2, dual_clip=None)
    assert compute(*case, aggregate="token_mean") == explicit


@pytest.mark.parametrize("aggregate", AGGREGATES)
def test_at_ratio_one_the_gradient_is_the_policy_gradient(aggregate):
    # d loss / d logp = -A * weight of the token, and the loss itself is -sum(A * weight).
    logprobs, _, advantages, mask = random_case(1)
    everywhere = np.broadcast_to(mask, SHAPE)
    lengths = everywhere.sum(-1, keepdims=True)
    sequences = (lengths > 0).sum()
    weight = {
        "token_mean": 1 / everywhere.sum(),
        "sequence_mean_token_sum": 1 / sequences,
        "sequence_mean_token_mean": 1 / (sequences * np.maximum(lengths, 1)),
        "constant": 1 / (sequences * SHAPE[-1]),
    }[aggregate]
    expected = np.where(everywhere, -advantages * weight, 0.0)
    case = (logprobs, logprobs, advantages, mask)
    np.testing.assert_allclose(gradient(*case, aggregate=aggregate), expected, rtol=1e-6, atol=1e-9)
    loss, metrics = compute(*case, aggregate=aggregate)
    np.testing.assert_allclose(loss, expected.sum(), **TOLERANCE)
    assert metrics["clip_fraction"] == 0.0
    np.testing.assert_allclose(metrics["ratio_mean"], 1.0, rtol=1e-6)
    assert metrics["approx_kl"] == 0.0


def test_one_update_a_step_reaches_the_parameters_as_the_policy_gradient():
    # old_logprobs = stop_gradient(logprobs), parameters behind a softmax, against -sum(A * logp) / N.
    tokens = jax.random.randint(jax.random.key(0), (3, 5), 0, 7)
    theta = jax.random.normal(jax.random.key(1), (3, 5, 7))
    advantages = jax.random.normal(jax.random.key(2), (3, 5))
    mask = jnp.arange(5) < jnp.array([5, 2, 0])[:, None]

    def logprobs(theta):
        return jnp.take_along_axis(jax.nn.log_softmax(theta), tokens[..., None], -1)[..., 0]

    def loss(theta):
        new = logprobs(theta)
        return policy_loss(new, jax.lax.stop_gradient(new), advantages, mask, aggregate="token_mean")[0]

    expected = jax.grad(lambda theta: -jnp.sum(jnp.where(mask, advantages * logprobs(theta), 0.0)) / 7)(theta)
    assert np.max(np.abs(expected)) > 0.01
    np.testing.assert_allclose(jax.grad(loss)(theta), expected, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("dual_clip", [None, 3.0])
@pytest.mark.parametrize("aggregate", AGGREGATES)
def test_an_empty_mask_gives_zero_loss_and_zero_gradient(aggregate, dual_clip):
    logprobs, old_logprobs, advantages, mask = random_case(2)
    for fill in (None, np.nan):
        values = logprobs if fill is None else np.full(SHAPE, fill, np.float32)
        case = (values, old_logprobs, advantages, np.zeros_like(mask))
        loss, metrics = compute(*case, aggregate=aggregate, dual_clip=dual_clip)
        assert loss == 0.0
        assert all(math.isfinite(value) for value in metrics.values())
        np.testing.assert_array_equal(gradient(*case, aggregate=aggregate, dual_clip=dual_clip), np.zeros(SHAPE))


@few
@given(seed=seeds, aggregate=st.sampled_from(AGGREGATES), dual_clip=st.sampled_from([None, 3.0]))
def test_garbage_in_padding_changes_nothing(seed, aggregate, dual_clip):
    case = random_case(seed)
    mask = np.broadcast_to(case[3], SHAPE)
    rng = np.random.default_rng(seed)
    dirty = *(np.where(mask, x, rng.choice(GARBAGE, SHAPE)) for x in case[:3]), case[3]
    options = {"aggregate": aggregate, "dual_clip": dual_clip}
    assert compute(*dirty, **options) == compute(*case, **options)
    actual = gradient(*dirty, **options)
    np.testing.assert_array_equal(actual, gradient(*case, **options))
    np.testing.assert_array_equal(actual[~mask], 0.0)


@few
@given(seed=seeds, aggregate=st.sampled_from(AGGREGATES))
def test_extra_padding_changes_nothing(seed, aggregate):
    case = random_case(seed)
    padding = 3
    padded = (
        *(np.pad(x, [(0, 0)] * 3 + [(0, padding)], constant_values=np.nan) for x in case[:3]),
        np.pad(case[3], [(0, 0)] * 2 + [(0, padding)]),
    )
    # Only Dr. GRPO's constant is the padded length itself.
    scale = SHAPE[-1] / (SHAPE[-1] + padding) if aggregate == "constant" else 1.0
    expected, expected_metrics = compute(*case, aggregate=aggregate)
    loss, metrics = compute(*padded, aggregate=aggregate)
    np.testing.assert_allclose(loss, expected * scale, **TOLERANCE)
    for name, value in expected_metrics.items():
        np.testing.assert_allclose(metrics[name], value, err_msg=name, **TOLERANCE)


@few
@given(seed=seeds, shuffle=st.permutations(range(SHAPE[2])), aggregate=st.sampled_from(AGGREGATES))
def test_the_order_of_rollouts_does_not_matter(seed, shuffle, aggregate):
    case = random_case(seed)
    shuffled = *(x[:, :, shuffle] for x in case[:3]), case[3][:, shuffle]
    np.testing.assert_allclose(
        compute(*shuffled, aggregate=aggregate)[0], compute(*case, aggregate=aggregate)[0], **TOLERANCE
    )


@few
@given(seed=seeds, aggregate=st.sampled_from(AGGREGATES))
def test_empty_responses_do_not_count_as_sequences(seed, aggregate):
    logprobs, old_logprobs, advantages, mask = random_case(seed)
    wider = (
        *(np.concatenate([x, x], axis=2) for x in (logprobs, old_logprobs, advantages)),
        np.concatenate([mask, np.zeros_like(mask)], axis=1),
    )
    expected = compute(logprobs, old_logprobs, advantages, mask, aggregate=aggregate)[0]
    np.testing.assert_allclose(compute(*wider, aggregate=aggregate)[0], expected, **TOLERANCE)


@pytest.mark.parametrize("aggregate", AGGREGATES)
def test_a_mask_shared_by_the_modes_counts_for_each(aggregate):
    *arrays, mask = random_case(5)
    shared = compute(*arrays, mask, aggregate=aggregate)
    explicit = compute(*arrays, np.broadcast_to(mask, SHAPE), aggregate=aggregate)
    assert shared == explicit


@pytest.mark.parametrize("aggregate", AGGREGATES)
def test_jitted_equals_not_jitted(aggregate):
    *arrays, mask = (jnp.asarray(x) for x in random_case(6))

    def loss(logprobs):
        return policy_loss(logprobs, *arrays[1:], mask, aggregate=aggregate, dual_clip=3.0)

    plain = jax.value_and_grad(loss, has_aux=True)
    # Fusion reorders sums: a few roundings.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        jax.jit(plain)(arrays[0]),
        plain(arrays[0]),
    )


def test_without_advantage_there_is_no_loss_and_nothing_counts_as_clipped():
    logprobs, old_logprobs, advantages, mask = random_case(8)
    loss, metrics = compute(logprobs, old_logprobs, np.zeros_like(advantages), mask, aggregate="token_mean")
    assert loss == 0.0
    assert metrics["clip_fraction"] == 0.0
    assert metrics["approx_kl"] > 0.01


def test_approx_kl_of_a_small_step_is_not_lost_to_rounding():
    # exp(x) - 1 - x = x^2 / 2 + x^3 / 6 = 5.0017e-7 at x = 1e-3; with exp(x) - 1 taken in float32 it would be
    # off by up to 6e-8, and could be negative.
    for log_ratio in (1e-3, -1e-3):
        case = (np.full((2, 3), log_ratio), np.zeros((2, 3)), np.ones((2, 3)), np.ones((2, 3), bool))
        expected = log_ratio**2 / 2 + log_ratio**3 / 6
        np.testing.assert_allclose(compute(*case, aggregate="token_mean")[1]["approx_kl"], expected, rtol=1e-3)


def test_an_unknown_aggregate_is_named():
    # Unwrapped: users run without the type checker that the tests switch on.
    with pytest.raises(ValueError, match="aggregate is 'mean'; it must be one of token_mean,"):
        inspect.unwrap(token_weights)(jnp.ones((1, 2), bool), "mean")
