"""A whole update of every baseline against a plain PyTorch step, and against itself cut differently."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from policy_split_jax.objective.baselines import (
    BaselineConfig,
    ClipCov,
    EntropyAdvantage,
    EntropyRegularization,
    KlCov,
    Terms,
    selection_noise,
)
from policy_split_jax.objective.scorer import TokenScores
from policy_split_jax.training import update as update_module
from policy_split_jax.training.update import UpdateConfig

# Coefficients and shares so large that each change shows in some 60 tokens.
SETTINGS = {
    "grpo": BaselineConfig(),
    "forking_tokens": BaselineConfig(),
    "clip_cov": BaselineConfig(clip_cov=ClipCov(0.1, 0.1, 5.0)),
    "kl_cov": BaselineConfig(kl_cov=KlCov(0.1, 0.5)),
    "entropy_driven_advantage": BaselineConfig(),
    "entropy_regularization": BaselineConfig(entropy_regularization=EntropyRegularization(0.3)),
    "entropy_advantage": BaselineConfig(entropy_advantage=EntropyAdvantage(0.2, 1.5)),
}
CLIP = {"clip_low": 0.02, "clip_high": 0.01}


def settings(objective, **changes):
    return UpdateConfig(
        **{"objective": objective, "baseline": SETTINGS[objective], "score_chunk": 3, **CLIP, **changes}
    )


@pytest.fixture
def batch(batches):
    """All rollouts are the normal mode's."""
    return batches[0]._replace(modes=np.zeros_like(batches[0].modes))


# ------------------------------------------------------------------------ an independent step, in PyTorch


def covariance(logprobs, advantages):
    return (logprobs - logprobs.mean()) * (advantages - advantages.mean())


def changed_advantages(objective, advantages, entropies, config):
    """{rollout: [t]}, of one question."""
    if objective == "entropy_driven_advantage":
        group = torch.stack([entropy.mean() for entropy in entropies.values()]).mean()
        return {i: advantages[i] / (entropies[i].mean() / group) for i in advantages}
    if objective == "entropy_advantage":
        chosen = config.baseline.entropy_advantage
        return {
            i: advantages[i] + torch.minimum(chosen.alpha * entropies[i], advantages[i].abs() / chosen.kappa)
            for i in advantages
        }
    return advantages


def chosen_tokens(objective, logprobs, advantages, entropies, noise, config):
    """(tokens without a gradient, tokens that pay for moving) of a whole update."""
    nobody = torch.zeros(len(logprobs), dtype=torch.bool)
    if objective == "forking_tokens":
        return entropies < torch.quantile(entropies, 0.8), nobody
    if objective == "clip_cov":
        chosen = config.baseline.clip_cov
        found = covariance(logprobs, advantages)
        band = torch.nonzero((found > chosen.low) & (found < chosen.high))[:, 0]
        dropped = nobody.clone()
        dropped[band[noise[band].argsort()][: max(int(chosen.share * len(logprobs)), 1)]] = True
        assert 0 < dropped.sum() < len(band), "the choice would not show"
        return dropped, nobody
    if objective == "kl_cov":
        paying = nobody.clone()
        number = max(int(config.baseline.kl_cov.share * len(logprobs)), 1)
        paying[covariance(logprobs, advantages).topk(number).indices] = True
        return nobody, paying
    return nobody, nobody


def token_losses(logprobs, old, advantages, entropies, dropped, paying, config):
    """Of the policy that moves, `entropies` with it."""
    ratio = torch.exp(logprobs - old)
    if config.objective == "kl_cov":
        losses = -ratio * advantages + config.baseline.kl_cov.coefficient * (logprobs - old).abs() * paying
    else:
        bounded = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
        losses = -torch.minimum(ratio * advantages, bounded * advantages) * ~dropped
    if config.objective == "entropy_regularization":
        losses = losses - config.baseline.entropy_regularization.coefficient * entropies
    return losses


def torch_step(twin, oracle, batch, config, noises, rate):
    """SGD of rate `rate` on the updates' questions in turn; all choices are made before the first. Mean loss."""

    def scores(p, i):
        prompt = batch.prompts[p, 0, batch.prompts.shape[-1] - batch.prompt_lengths[p, 0] :]
        return twin.token_scores(oracle, prompt, batch.responses[p, i, : batch.response_lengths[p, i]])

    parts = np.split(np.arange(len(batch.modes)), config.updates_per_step)
    fixed = []
    for part, noise in zip(parts, noises, strict=True):
        old, advantages, entropies, kept_noise = [], [], [], []
        for at, p in enumerate(part):
            graded = [i for i in range(batch.modes.shape[1]) if batch.graded[p, i]]
            rewards = torch.tensor([float(batch.rewards[p, i]) for i in graded])
            outcome = (rewards - rewards.mean()) / (rewards.std() + 1e-6)
            with torch.no_grad():
                seen = {i: scores(p, i) for i in graded}
            plain = {i: a.expand(len(seen[i][0])) for i, a in zip(graded, outcome, strict=True)}
            moved = changed_advantages(config.objective, plain, {i: seen[i][1] for i in graded}, config)
            for i in graded:
                old.append(seen[i][0])
                entropies.append(seen[i][1])
                advantages.append(moved[i])
                kept_noise.append(noise[at, i, : len(seen[i][0])])
        joined = [torch.cat(values) for values in (old, advantages, entropies)]
        fixed.append((*joined, *chosen_tokens(config.objective, *joined, torch.cat(kept_noise), config)))
    optimizer = torch.optim.SGD(oracle.parameters(), lr=rate)
    losses = []
    for part, (old, advantages, _, dropped, paying) in zip(parts, fixed, strict=True):
        seen = [scores(p, i) for p in part for i in range(batch.modes.shape[1]) if batch.graded[p, i]]
        logprobs, entropies = (torch.cat(values) for values in zip(*seen, strict=True))
        loss = token_losses(logprobs, old, advantages, entropies, dropped, paying, config).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return np.mean(losses)


def noises(batch, config):
    """What each of the updates of step 0 chooses by: the run's key, the step, no question's number, the update."""
    shape = (len(batch.modes) // config.updates_per_step, *batch.responses.shape[1:])
    step = jax.random.fold_in(jax.random.fold_in(jax.random.key(0), 0), np.uint32(2**32 - 1))
    keys = [jax.random.fold_in(step, number) for number in range(config.updates_per_step)]
    return [torch.tensor(np.asarray(selection_noise(key, shape))) for key in keys]


def change_of(params, moved):
    return jax.tree.map(jnp.subtract, params, moved)


def norm(tree):
    return math.sqrt(sum(float(jnp.sum(leaf**2)) for leaf in jax.tree.leaves(tree)))


def compare(twin, sgd_step, model, params, batch, config, rate):
    """What an update changes, and its metrics; asserts that the twin's changes the same."""
    found, metrics = sgd_step(model, params, batch, config, rate=rate)
    oracle = twin.make(params)
    loss = torch_step(twin, oracle, batch, config, noises(batch, config), rate)
    assert metrics["loss"] == pytest.approx(loss, rel=1e-5, abs=1e-6)  # some 60 float32 terms of size 1
    assert abs(loss) > 1e-3
    # Gradients of size 0.1 after two float32 backward passes; weights of size 1 lose 1e-7 to rounding.
    close = partial(np.testing.assert_allclose, atol=3e-6, rtol=0)
    jax.tree.map(close, found, twin.parameters(oracle))
    return change_of(params, found), metrics


def test_a_real_model(twin, sgd_step, model, params, batch):
    """Its entropy is in the loss: with a gradient of its own."""
    config = settings("entropy_regularization")
    change, metrics = compare(twin, sgd_step, model, params, batch, config, 1.0)
    assert metrics["grad_norm"] == pytest.approx(norm(change), rel=1e-4)
    assert norm(change) > 0.01


# Where nothing has moved yet |log ρ| must have no slope, and has none in PyTorch; in JAX the slope of |x| at 0 is 1.
@pytest.mark.parametrize("updates", [1, 2])
@pytest.mark.parametrize("objective", SETTINGS)
def test_updates_are_those_of_pytorch(twin, bag, sgd_step, model, batch, objective, updates):
    """A second update meets a policy that has moved, and chooses among its own tokens."""
    config = settings(objective, updates_per_step=updates)
    change, metrics = compare(twin, sgd_step, model, bag, batch, config, 0.3)
    plain, _ = sgd_step(model, bag, batch, settings("grpo", updates_per_step=updates), rate=0.3)
    difference = norm(jax.tree.map(jnp.subtract, change, change_of(bag, plain)))
    assert norm(change) > 0.01
    # The penalty stands in the place of clipping, and takes part when something has moved.
    same = objective == "grpo" or (objective == "kl_cov" and updates == 1)
    assert (difference > 0.01 * norm(change)) == (not same)
    assert (metrics["clip_fraction/normal"] > 0) == (updates == 2 and objective != "kl_cov")


def test_the_penalty_of_a_policy_that_has_moved_is_that_of_pytorch(model):
    """Losses of tokens and their slopes; no ratio is clipped, and padding has neither."""
    config = settings("kl_cov")
    step = update_module.Step(model, config, optax.sgd(1.0), None, None)
    draw = np.random.default_rng(0)
    shape = (1, 2, 3, 5)
    logprobs, advantages = draw.normal(-3, 1, shape).astype(np.float32), draw.normal(0, 1, shape).astype(np.float32)
    old = logprobs + draw.choice([-1, 1], shape).astype(np.float32) * draw.uniform(0.1, 1, shape).astype(np.float32)
    mask = draw.random(shape) < 0.8
    paying = mask & (draw.random(shape) < 0.5)
    terms = Terms(jnp.asarray(np.where(mask, advantages, 0.0)), penalised=jnp.asarray(paying))

    def total(values):
        scores = TokenScores(values, values, None)
        losses, clipped = step.token_losses(scores, jnp.where(mask, old, jnp.nan), terms, jnp.asarray(mask))
        return jnp.sum(losses), (losses, clipped)

    slope, (losses, clipped) = jax.grad(total, has_aux=True)(jnp.where(mask, logprobs, jnp.nan))
    theirs = torch.tensor(logprobs[mask], requires_grad=True)
    others = (torch.tensor(values[mask]) for values in (old, advantages, old, paying, paying))
    expected = token_losses(theirs, *others, config)
    expected.sum().backward()
    # exp of a float32 difference, of numbers near 1.
    np.testing.assert_allclose(np.asarray(losses)[mask], expected.detach(), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(np.asarray(slope)[mask], theirs.grad, rtol=1e-5, atol=1e-6)
    for values in (losses, slope):
        np.testing.assert_array_equal(np.asarray(values)[~mask], 0.0)
    assert not np.any(clipped)


# ----------------------------------------------- the same numbers along other paths, on a policy that compiles fast


def assert_same(first, second):
    (params, metrics), (other_params, other_metrics) = first, second
    assert metrics.keys() == other_metrics.keys()
    # The same float32 sums in another order.
    for name, value in metrics.items():
        assert other_metrics[name] == pytest.approx(value, rel=1e-5, abs=1e-5), name
    np.testing.assert_allclose(params["table"], other_params["table"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("updates", [1, 2])
@pytest.mark.parametrize("objective", SETTINGS)
def test_microbatches_change_nothing(bag, sgd_step, model, batch, objective, updates):
    """Not even which tokens of a whole update are chosen."""
    whole, parts = (
        sgd_step(model, bag, batch, settings(objective, updates_per_step=updates, microbatch_questions=size), rate=0.3)
        for size in (0, 1)
    )
    assert_same(whole, parts)
    assert float(jnp.max(jnp.abs(whole[0]["table"] - bag["table"]))) > 1e-3


@pytest.mark.parametrize("objective", SETTINGS)
def test_padding_changes_nothing(bag, sgd_step, model, batch, objective):
    """With all of Clip-Cov's band: which of them are less than all is drawn for the whole width."""
    every = BaselineConfig(clip_cov=ClipCov(1.0, 0.1, 5.0)) if objective == "clip_cov" else SETTINGS[objective]
    wide = batch._replace(
        prompts=np.pad(batch.prompts, [(0, 0), (0, 0), (5, 0)], constant_values=5),
        responses=np.pad(batch.responses, [(0, 0), (0, 0), (0, 4)], constant_values=9),
        sampler_logprobs=np.pad(batch.sampler_logprobs, [(0, 0), (0, 0), (0, 4)], constant_values=-30),
    )
    config = settings(objective, baseline=every)
    assert_same(sgd_step(model, bag, batch, config), sgd_step(model, bag, wide, config))


@pytest.mark.parametrize("objective", SETTINGS)
def test_an_ungraded_rollout_counts_nowhere(bag, sgd_step, model, batch, objective):
    every = BaselineConfig(clip_cov=ClipCov(1.0, 0.1, 5.0)) if objective == "clip_cov" else SETTINGS[objective]
    [[p, i]] = np.argwhere(~batch.graded)
    changed = jax.tree.map(np.copy, batch)
    changed.responses[p, i] = (changed.responses[p, i] + 11) % 64
    changed.rewards[p, i] = -100.0
    changed.sampler_logprobs[p, i] = np.nan
    config = settings(objective, baseline=every)
    assert_same(sgd_step(model, bag, batch, config), sgd_step(model, bag, changed, config))


def test_the_high_entropy_prompt_is_no_part_of_it(bag, sgd_step, model, batch):
    other = batch._replace(prompts=np.copy(batch.prompts))
    other.prompts[:, 1] = 7
    for objective in SETTINGS:
        first, second = (sgd_step(model, bag, each, settings(objective)) for each in (batch, other))
        np.testing.assert_array_equal(first[0]["table"], second[0]["table"])
        assert first[1] == second[1]


@pytest.mark.parametrize("objective", SETTINGS)
def test_metrics_are_those_of_one_mode(bag, sgd_step, model, batch, objective):
    _, metrics = sgd_step(model, bag, batch, settings(objective))
    own = {f"{name}/normal" for name in ("entropy", "neg_logprob", "advantage_abs", "clip_fraction")}
    assert set(metrics) == own | {"loss", "grad_norm", "skipped", "sampler/kl", "sampler/max_difference"}
    assert metrics["entropy/normal"] > 0.5


def test_clip_cov_chooses_anew_each_time(bag, sgd_step, model, batch):
    """By the run's key."""
    config = settings("clip_cov")
    norms = [sgd_step(model, bag, batch, config, seed=seed)[1]["grad_norm"] for seed in (0, 0, 1)]
    assert norms[0] == norms[1]
    assert abs(norms[0] - norms[2]) > 1e-4


def test_clip_higher_is_of_every_baseline_that_clips(bag, sgd_step, model, batch):
    """DAPO is GRPO with another upper limit."""
    fractions = [
        sgd_step(model, bag, batch, settings("grpo", clip_high=high, updates_per_step=2))[1]["clip_fraction/normal"]
        for high in (0.01, 5.0)
    ]
    assert fractions[0] > fractions[1] > 0
