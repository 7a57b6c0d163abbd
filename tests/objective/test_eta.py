"""The controller of η: its direction, its bounds, and a closed loop with a plant that feeds itself."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from policy_split_jax.objective.eta import EtaConfig, EtaState, init_eta, lowered, next_eta

TARGET = 0.2
STEERED = EtaConfig(schedule="target_kl", target_kl=TARGET)
step = jax.jit(next_eta, static_argnames="config")


def after(measurements, config=STEERED, eta=0.1):
    """The states after each of some measured divergences."""
    state, states = init_eta(eta), []
    for kl in measurements:
        state = step(state, jnp.float32(kl), config)
        states.append(state)
    return states


def by_hand(measurements, config, eta):
    """The same controller in float64."""
    kl, error = None, None
    for measured in measurements:
        kl = measured if kl is None else config.smoothing * kl + (1 - config.smoothing) * measured
        new = min(max(math.log(config.target_kl / max(kl, 1e-6)), -3.0), 2.0)
        change = 0.0 if error is None else new - error
        moved = config.largest * (config.gain * new + config.damping * change)
        eta = min(max(eta + moved, config.smallest), config.largest)
        error = new
    return eta, kl


def closed_loop(response, steps, *, kl=0.01, eta=0.03, balance=0.1, noise=0.0):
    """A plant whose log divergence drifts by response · (η - balance) a step: constant η runs away."""
    rng = np.random.default_rng(0)
    state, log_kl, seen = init_eta(eta), math.log(kl), []
    for _ in range(steps):
        measured = math.exp(log_kl + noise * rng.normal())
        state = step(state, jnp.float32(measured), STEERED)
        log_kl = max(log_kl + response * (float(state.eta) - balance), math.log(1e-4))
        seen.append(math.exp(log_kl))
    return np.array(seen), state


def test_constant_schedule_keeps_eta_and_measures():
    config = EtaConfig(smoothing=0.5)
    states = after([0.4, 0.1, 5.0], config, eta=0.03)
    assert all(state.eta == np.float32(0.03) for state in states)
    # Running mean with weight 1/2: 0.4, then 0.25, then 2.625; the first measurement counts whole.
    np.testing.assert_allclose([state.kl for state in states], [0.4, 0.25, 2.625], rtol=1e-6)


@pytest.mark.parametrize(("kl", "direction"), [(0.01, 1), (0.15, 1), (0.25, -1), (5.0, -1)])
def test_eta_rises_below_the_target_and_falls_above(kl, direction):
    etas = [0.5] + [float(state.eta) for state in after([kl] * 4, eta=0.5)]
    assert all(np.sign(np.diff(etas)) == direction)


def test_eta_rests_at_the_target():
    # log(0.2 / 0.2) is 0 up to float32 rounding of the running mean.
    np.testing.assert_allclose([state.eta for state in after([TARGET] * 5)], 0.1, atol=1e-7)


@pytest.mark.parametrize("largest", [1.0, 0.4])
@pytest.mark.parametrize("measurements", [[0.01, 0.05, 0.3, 0.2], [3.0, 0.4, 0.1], [0.0, 0.0], [9.0, 9.0], [0.15]])
def test_equals_the_same_rule_in_float64(measurements, largest):
    config = EtaConfig("target_kl", TARGET, gain=0.03, damping=0.1, smoothing=0.25, largest=largest)
    state = after(measurements, config, eta=0.2)[-1]
    eta, kl = by_hand(measurements, config, 0.2)
    assert 0 < eta < largest
    # A few float32 roundings of numbers of at most 1.
    np.testing.assert_allclose([state.eta, state.kl], [eta, kl], rtol=1e-5, atol=1e-6)


def test_a_moving_divergence_is_damped():
    """At the same smoothed divergence, η is lower when it was reached from below."""
    config = EtaConfig("target_kl", target_kl=TARGET, smoothing=0.0)
    rising = after([0.1, 0.15], config, eta=0.5)[-1].eta - after([0.1], config, eta=0.5)[-1].eta
    steady = after([0.15, 0.15], config, eta=0.5)[-1].eta - after([0.15], config, eta=0.5)[-1].eta
    np.testing.assert_allclose(steady - rising, config.damping * math.log(1.5), rtol=1e-5)


@pytest.mark.parametrize("smallest", [0.0, 0.05])
@pytest.mark.parametrize("kl", [0.0, 1e-9, 100.0])
def test_eta_stays_within_its_bounds(kl, smallest):
    config = EtaConfig("target_kl", target_kl=TARGET, smallest=smallest, largest=0.3)
    etas = [float(state.eta) for state in after([kl] * 40, config)]
    assert np.float32(smallest) <= min(etas) <= max(etas) <= np.float32(0.3)
    assert etas[-1] == np.float32(0.3 if kl < TARGET else smallest)


@pytest.mark.parametrize("kl", [1e-9, 100.0])
def test_nothing_winds_up_at_a_bound(kl):
    """Leaving a bound takes as long after 300 steps as after 60, of which at least 10 were at it."""

    def way_back(steps):
        opposite = TARGET**2 / max(kl, 1e-6)
        return [float(state.eta) for state in after([kl] * steps + [opposite] * 15)[steps:]]

    assert way_back(60) == way_back(300)
    bound = 1.0 if kl < TARGET else 0.0
    # Within these few steps the running mean has crossed the target and η has left the bound.
    assert abs(way_back(300)[-1] - bound) > STEERED.gain


@pytest.mark.parametrize("response", [0.1, 0.3, 1.0, 3.0])
@pytest.mark.parametrize("start", [0.001, 0.01])
def test_closed_loop_settles_without_running_away(response, start):
    kls, state = closed_loop(response, 400, kl=start)
    assert kls.max() < 3 * TARGET
    settled = kls[300:]
    assert TARGET / 1.5 < settled.min() <= settled.max() < 1.5 * TARGET
    # At rest η is what balances the plant.
    np.testing.assert_allclose(state.eta, 0.1, atol=0.02)


def test_closed_loop_comes_back_from_far_above():
    kls, _ = closed_loop(1.0, 400, kl=5.0, eta=0.3)
    assert TARGET / 1.5 < kls[300:].min() <= kls[300:].max() < 1.5 * TARGET


def test_closed_loop_stands_noisy_measurements():
    kls, _ = closed_loop(1.0, 400, noise=0.2)
    assert kls.max() < 3 * TARGET
    assert TARGET / 2 < kls[300:].min() <= kls[300:].max() < 2 * TARGET


@pytest.mark.parametrize("response", [0.1, 0.3, 1.0])
def test_closed_loop_leaves_a_long_saturation_without_running_away(response):
    """The plant does not move for 200 steps, while η goes to its bound; then it does."""
    state = after([0.001] * 200)[-1]
    assert state.eta == 1
    log_kl, seen = math.log(0.001), []
    for _ in range(300):
        log_kl += response * (float(state.eta) - 0.1)
        state = step(state, jnp.float32(math.exp(log_kl)), STEERED)
        seen.append(math.exp(log_kl))
    assert TARGET / 1.5 < seen[-1] < 1.5 * TARGET
    assert max(seen) < 3 * TARGET


def test_what_was_lowered_stays_low():
    """Whatever the controller would do: a divergence far below its target asks for more."""
    state = lowered(step(init_eta(0.4), jnp.float32(1e-4), STEERED))
    half = float(state.eta)
    for _ in range(50):
        state = step(state, jnp.float32(1e-4), STEERED)
    assert float(state.eta) == half
    assert float(step(lowered(init_eta(0.4)), jnp.float32(0.1), EtaConfig()).eta) == pytest.approx(0.2)


def test_the_state_is_float32_scalars():
    state = step(init_eta(0.03), jnp.float32(0.1), STEERED)
    assert isinstance(state, EtaState)
    assert [(leaf.shape, leaf.dtype.name) for leaf in state] == [((), "float32")] * 3


@pytest.mark.parametrize(
    "wrong",
    [
        {"schedule": "cosine"},
        {"target_kl": 0.0},
        {"gain": 0.0},
        {"damping": -0.1},
        {"smoothing": 1.0},
        {"smoothing": -0.1},
        {"largest": 0.0},
        {"smallest": -0.1},
        {"smallest": 1.1},
    ],
    ids=str,
)
def test_settings_that_make_no_sense_are_refused(wrong):
    # Set past the run-time type check, which refuses an unknown word before the configuration can.
    config = EtaConfig()
    for name, value in wrong.items():
        object.__setattr__(config, name, value)
    with pytest.raises(ValueError, match=f"EtaConfig: {next(iter(wrong))} must"):
        config.__post_init__()
