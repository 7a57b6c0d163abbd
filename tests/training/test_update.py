"""The update against a plain PyTorch step, against NumPy in float64, and against itself cut differently."""

import math
from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from policy_split_jax.config import OptimizerConfig
from policy_split_jax.model import huggingface
from policy_split_jax.modes import HIGH_ENTROPY, NORMAL
from policy_split_jax.objective.advantages import AdvantageConfig
from policy_split_jax.objective.eta import EtaConfig
from policy_split_jax.objective.scorer import TokenScores
from policy_split_jax.training import update as update_module
from policy_split_jax.training.batch import Batch, training_mask
from policy_split_jax.training.optimizer import make_optimizer
from policy_split_jax.training.state import init_state
from policy_split_jax.training.update import TokenRecord, UpdateConfig, make_update, measure

# Those of the batches (`conftest.py`).
VOCAB, QUESTIONS, GROUP, WIDTH, LENGTH = 64, 4, 4, 12, 7
AGGREGATES = ("token_mean", "sequence_mean_token_sum", "sequence_mean_token_mean", "constant")
ETA = 0.5
ADAMW = OptimizerConfig(learning_rate=1e-3, weight_decay=0.1, gradient_clip=0.05)
# κ = 1 lets bonuses of the size of |A| through; the clipping range is narrow enough to act.
FUSED = UpdateConfig(advantage=AdvantageConfig(alpha=0.3, kappa=1.0), clip_low=0.002, clip_high=0.001, score_chunk=3)


# ------------------------------------------------------------------------------------------------ inputs


def fresh_state(params, optimizer, eta=ETA):
    """A state that may be donated."""
    return init_state(jax.tree.map(jnp.copy, params), optimizer, 0, eta)


# Compiling is most of this file's time, and each program serves several tests.
@cache
def _compiled(model, config, optimizer, treedef, shapes):
    chain = make_optimizer(optimizer) if isinstance(optimizer, OptimizerConfig) else optax.sgd(optimizer)
    state, batch = jax.tree.unflatten(treedef, shapes)
    return make_update(model, config, chain).lower(state, batch).compile()


def run(model, params, batches, config=FUSED, optimizer=ADAMW, eta=ETA):
    """The state after all batches and each step's metrics. A number for an optimizer is SGD's rate."""
    chain = make_optimizer(optimizer) if isinstance(optimizer, OptimizerConfig) else optax.sgd(optimizer)
    state = fresh_state(params, chain, eta)
    history = []
    for batch in batches:
        leaves, treedef = jax.tree.flatten((state, batch))
        shapes = tuple(jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves)
        state, metrics = _compiled(model, config, optimizer, treedef, shapes)(state, batch)
        history.append({name: float(value) for name, value in metrics.items()})
    return state, history


def assert_trees_close(first, second, atol):
    assert jax.tree.structure(first) == jax.tree.structure(second)
    for (path, one), other in zip(jax.tree.leaves_with_path(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_allclose(one, other, atol=atol, rtol=0, err_msg=jax.tree_util.keystr(path))


def largest_change(before, after):
    changes = jax.tree.map(lambda old, new: float(jnp.max(jnp.abs(new - old))), before, after)
    return max(jax.tree.leaves(changes))


# ---------------------------------------------------------------------- an independent step, in PyTorch


def full_logp(model, batch, p, mode, i, temperature):
    """[t, V] of one response after one prompt, alone and unpadded."""
    prompt = batch.prompts[p, mode, WIDTH - batch.prompt_lengths[p, mode] :]
    response = batch.responses[p, i, : batch.response_lengths[p, i]]
    ids = torch.tensor(np.concatenate([prompt, response]).astype(np.int64))[None]
    logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1]
    return torch.log_softmax(logits / temperature, dim=-1)


def token_logp(model, batch, p, mode, i, temperature):
    response = batch.responses[p, i, : batch.response_lengths[p, i]]
    logp = full_logp(model, batch, p, mode, i, temperature)
    return logp[torch.arange(len(response)), torch.tensor(response.astype(np.int64))]


def torch_advantages(old, batch, p, config, eta, share=True):
    """Equations 1 to 4 for one question: {(mode, rollout): [t]}."""
    if not share:
        alone = [batch._replace(graded=batch.graded & (batch.modes == mode)) for mode in (NORMAL, HIGH_ENTROPY)]
        both = [torch_advantages(old, each, p, config, eta) for each in alone]
        return {(m, i): advantage for mode in (0, 1) for (m, i), advantage in both[mode].items() if m == mode}
    graded = [i for i in range(GROUP) if batch.graded[p, i]]
    rewards = torch.tensor([float(batch.rewards[p, i]) for i in graded])
    alone = len(graded) == 1
    correctness = rewards if alone else (rewards - rewards.mean()) / (rewards.std() + 1e-6)
    bonus = [-config.alpha * old[p, HIGH_ENTROPY, i] - (1 - config.alpha) * old[p, NORMAL, i] for i in graded]
    everything = torch.cat(bonus)
    result = {}
    for i, advantage, b in zip(graded, correctness, bonus, strict=True):
        normalized = (b - everything.mean()) / (everything.std() + 1e-6)
        limit = float(advantage.abs()) / config.kappa
        result[NORMAL, i] = advantage.expand(len(b))
        result[HIGH_ENTROPY, i] = advantage + eta * normalized.clamp(-limit, limit)
    return result


def torch_step(model, optimizer, batch, config, eta, gradient_clip):
    """One training step of one or several updates; (mean loss, mean clip fraction of each mode)."""
    scored = [(p, m, i) for p in range(QUESTIONS) for m in (0, 1) for i in range(GROUP) if batch.graded[p, i]]
    everyone = [(p, m, i) for p, m, i in scored if config.share or batch.modes[p, i] == m]
    with torch.no_grad():
        old = {(p, m, i): token_logp(model, batch, p, m, i, config.temperature) for p, m, i in scored}
        advantages = [torch_advantages(old, batch, p, config.advantage, eta, config.share) for p in range(QUESTIONS)]
    losses, fractions = [], []
    for part in np.split(np.arange(QUESTIONS), config.updates_per_step):
        terms, clipped = [], {NORMAL: [], HIGH_ENTROPY: []}
        for p, m, i in everyone:
            if p in part:
                advantage = advantages[p][m, i]
                if config.importance_cap:
                    advantage = advantage * (old[p, m, i] - old[p, int(batch.modes[p, i]), i]).exp().clamp(
                        max=config.importance_cap
                    )
                ratio = torch.exp(token_logp(model, batch, p, m, i, config.temperature) - old[p, m, i])
                limited = ratio.clamp(1 - config.clip_low, 1 + config.clip_high) * advantage
                terms.append(torch.minimum(ratio * advantage, limited))
                clipped[m].append(limited < ratio * advantage)
        loss = -torch.cat(terms).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), gradient_clip)
        optimizer.step()
        losses.append(loss.item())
        fractions.append([torch.cat(clipped[m]).float().mean().item() for m in (0, 1)])
    return np.mean(losses), np.mean(fractions, axis=0)


@pytest.mark.parametrize(
    ("updates", "microbatch", "temperature"), [(1, 0, 1.0), (2, 1, 0.7)], ids=["fused", "two updates"]
)
def test_three_steps_are_those_of_pytorch(
    make_torch_model, model, params, batches, tmp_path, updates, microbatch, temperature
):
    config = UpdateConfig(
        advantage=FUSED.advantage,
        clip_low=FUSED.clip_low,
        clip_high=FUSED.clip_high,
        score_chunk=FUSED.score_chunk,
        temperature=temperature,
        updates_per_step=updates,
        microbatch_questions=microbatch,
    )
    oracle = make_torch_model()
    optimizer = torch.optim.AdamW(
        oracle.parameters(), lr=ADAMW.learning_rate, betas=(ADAMW.b1, ADAMW.b2), weight_decay=ADAMW.weight_decay
    )
    expected = [torch_step(oracle, optimizer, b, config, ETA, ADAMW.gradient_clip) for b in batches]
    oracle.save_pretrained(tmp_path)
    state, history = run(model, params, batches, config)

    # Sums of some hundred float32 terms of size 1.
    losses = [metrics["loss"] for metrics in history]
    np.testing.assert_allclose(losses, [loss for loss, _ in expected], atol=1e-5, rtol=0)
    assert max(map(abs, losses)) > 1e-3
    fractions = [[metrics["clip_fraction/normal"], metrics["clip_fraction/high_entropy"]] for metrics in history]
    np.testing.assert_allclose(fractions, [fraction for _, fraction in expected], atol=1e-5, rtol=0)
    # With one update the ratio is 1, and nothing is ever clipped.
    assert (np.max(fractions) > 0.1) == (updates > 1)
    # Every weight moves by up to 1e-3 an update, and AdamW divides each gradient by its own size, which
    # magnifies rounding where a gradient is nearly zero: 1e-4 is a tenth of one update.
    theirs = huggingface.load_params(tmp_path)
    assert_trees_close(state.params, theirs, atol=1e-4)
    assert largest_change(params, theirs) > 1e-3


@pytest.mark.parametrize(
    "config",
    [FUSED, replace(FUSED, share=False), replace(FUSED, importance_cap=1.5)],
    ids=["shared", "own rollouts only", "importance weights"],
)
def test_the_gradient_is_that_of_pytorch(make_torch_model, model, params, batches, tmp_path, config):
    """Before any optimizer: SGD of rate 1 subtracts the gradient itself."""
    oracle = make_torch_model()
    optimizer = torch.optim.SGD(oracle.parameters(), lr=1.0)
    torch_step(oracle, optimizer, batches[0], config, ETA, gradient_clip=math.inf)
    oracle.save_pretrained(tmp_path)
    state, history = run(model, params, batches[:1], config, optimizer=1.0)
    theirs = huggingface.load_params(tmp_path)
    # Gradients of size 0.1 after two float32 backward passes; weights of size 1 lose 1e-7 to rounding.
    assert_trees_close(state.params, theirs, atol=2e-6)
    difference = jax.tree.leaves(jax.tree.map(jnp.subtract, params, theirs))
    norm = math.sqrt(sum(float(jnp.sum(leaf**2)) for leaf in difference))
    assert history[0]["grad_norm"] == pytest.approx(norm, rel=1e-4)
    assert norm > 0.01


# --------------------------------------------------------------------------------- metrics, real model


def float64_metrics(oracle, batch, temperature):
    """Every metric of the distributions from whole logits in float64: (name -> value)."""
    oracle.double()
    values = {}

    def record(name, number):
        values.setdefault(name, []).append(number)

    for p, i in np.ndindex(QUESTIONS, GROUP):
        if not batch.graded[p, i]:
            continue
        with torch.no_grad():
            logp = [full_logp(oracle, batch, p, m, i, temperature).numpy() for m in (0, 1)]
        own = int(batch.modes[p, i])
        name = ("normal", "high_entropy")[own]
        direction = ("normal_to_high_entropy", "high_entropy_to_normal")[own]
        for t in range(batch.response_lengths[p, i]):
            mine, other = logp[own][t], logp[1 - own][t]
            token = batch.responses[p, i, t]
            log_ratio = mine[token] - other[token]
            record(f"entropy/{name}", -np.sum(np.exp(mine) * mine))
            record(f"neg_logprob/{name}", -mine[token])
            record(f"kl/{direction}", np.sum(np.exp(mine) * (mine - other)))
            record(f"kl_k1/{direction}", log_ratio)
            record(f"kl_k3/{direction}", np.exp(-log_ratio) - 1 + log_ratio)
            difference = batch.sampler_logprobs[p, i, t] - mine[token]
            record("sampler/kl", np.exp(-difference) - 1 + difference)
            record("sampler/max_difference", abs(difference))
    largest = max(values.pop("sampler/max_difference"))
    return {name: np.mean(numbers) for name, numbers in values.items()} | {"sampler/max_difference": largest}


def test_metrics_are_those_of_whole_logits_in_float64(make_torch_model, model, params, batches):
    """At another temperature than 1, which belongs to every log-probability, entropy and divergence."""
    config = UpdateConfig(temperature=0.7, eta=EtaConfig("target_kl", target_kl=0.2))
    _, [metrics] = run(model, params, batches[:1], config)
    expected = float64_metrics(make_torch_model(), batches[0], 0.7)
    assert len(expected) == 12
    for name, value in expected.items():
        # Means of some 30 float32 values up to 10, and the exponential in k3 of errors near 1e-6.
        assert metrics[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name
    assert expected["kl/high_entropy_to_normal"] > 0.05
    at_one = float64_metrics(make_torch_model(), batches[0], 1.0)
    assert abs(at_one["entropy/normal"] - expected["entropy/normal"]) > 0.1


def test_metrics_by_hand():
    """One question, two rollouts; the second one's last token is padding with garbage in it."""
    nan = np.nan
    own, other = np.log([[0.5, 0.25], [0.5, nan]]), np.log([[0.25, 0.5], [0.125, nan]])
    batch = Batch(
        prompts=np.zeros((1, 2, 1), np.int32),
        prompt_lengths=np.ones((1, 2), np.int32),
        responses=np.zeros((1, 2, 2), np.int32),
        response_lengths=np.array([[2, 1]], np.int32),
        modes=np.array([[NORMAL, HIGH_ENTROPY]], np.int32),
        truncated=np.zeros((1, 2), bool),
        rewards=np.zeros((1, 2), np.float32),
        graded=np.ones((1, 2), bool),
        sampler_logprobs=np.array([[[math.log(0.5), math.log(0.5)], [math.log(0.25), nan]]], np.float32),
    )

    def both(normal, high_entropy):
        return jnp.array([[normal], [high_entropy]], jnp.float32)

    normal = np.stack([own[0], other[1]])
    high_entropy = np.stack([other[0], own[1]])
    record = TokenRecord(
        scores=TokenScores(
            logprobs=both(normal, high_entropy),
            entropy=both([[1.0, 2.0], [50.0, nan]], [[60.0, 70.0], [4.0, nan]]),
            kl=both([[0.1, 0.3], [50.0, nan]], [[60.0, 70.0], [0.5, nan]]),
        ),
        old_logprobs=both(normal, high_entropy),
        advantages=both([[1.0, -2.0], [3.0, nan]], [[0.0, -1.0], [-5.0, nan]]),
        clipped=both([[1.0, 0.0], [0.0, nan]], [[1.0, 1.0], [0.0, nan]]),
    )
    metrics = {name: float(value) for name, value in measure(record, batch, training_mask(batch)).values().items()}
    log2 = math.log(2)
    expected = {
        "entropy/normal": 1.5,  # (1 + 2) / 2
        "entropy/high_entropy": 4.0,
        "neg_logprob/normal": 1.5 * log2,  # (ln 2 + ln 4) / 2
        "neg_logprob/high_entropy": log2,
        "advantage_abs/normal": 2.0,  # all three tokens, whoever sampled them
        "advantage_abs/high_entropy": 2.0,
        "clip_fraction/normal": 1 / 3,
        "clip_fraction/high_entropy": 2 / 3,
        "kl/normal_to_high_entropy": 0.2,
        "kl/high_entropy_to_normal": 0.5,
        "kl_k1/normal_to_high_entropy": 0.0,  # (ln 2 − ln 2) / 2
        "kl_k1/high_entropy_to_normal": 2 * log2,  # ln (0.5 / 0.125)
        "kl_k3/normal_to_high_entropy": 0.25,  # (1/2 − 1 + ln 2 + 2 − 1 − ln 2) / 2
        "kl_k3/high_entropy_to_normal": 0.25 - 1 + 2 * log2,
        # The sampler's ln q − ln p of the rollout's own mode: 0, ln 2, −ln 2.
        "sampler/kl": (0 + (0.5 - 1 + log2) + (2 - 1 - log2)) / 3,
        "sampler/max_difference": log2,
    }
    assert metrics == pytest.approx(expected, abs=1e-6)  # a few float32 operations on values near 1


def test_the_first_scores_are_what_the_sampler_is_compared_with(make_torch_model, model, params, batches):
    """With several updates the policy moves within a step; the sampler's agreement must not see that."""
    config = UpdateConfig(updates_per_step=2, microbatch_questions=1, score_chunk=3)
    _, [metrics] = run(model, params, batches[:1], config, OptimizerConfig(learning_rate=0.03))
    expected = float64_metrics(make_torch_model(), batches[0], 1.0)
    # float32 log-probabilities of size 5.
    assert metrics["sampler/max_difference"] == pytest.approx(expected["sampler/max_difference"], abs=1e-4)


# ------------------------------------------------------- the same numbers along other paths, real model


def test_fused_is_two_pass(model, params, batches):
    two_pass = UpdateConfig(
        advantage=FUSED.advantage,
        clip_low=FUSED.clip_low,
        clip_high=FUSED.clip_high,
        score_chunk=FUSED.score_chunk,
        two_pass=True,
    )
    for steps in (1, 3):
        state, history = run(model, params, batches[:steps])
        other_state, other_history = run(model, params, batches[:steps], two_pass)
        assert len(history) == steps
        for metrics, other in zip(history, other_history, strict=True):
            # Two programs of the same float32 sums; clipping at 1.001 is far from a ratio's rounding error.
            assert metrics == pytest.approx(other, rel=1e-4, abs=1e-5)
        # AdamW magnifies rounding of nearly vanishing gradients: a tenth of one update, as above.
        assert_trees_close(state.params, other_state.params, atol=1e-4)
        assert largest_change(params, state.params) > 5e-4


def padded(batch, left, right):
    """The same batch in wider arrays, with garbage in the new columns."""
    wider = {
        "prompts": np.pad(batch.prompts, [(0, 0), (0, 0), (left, 0)], constant_values=5),
        "responses": np.pad(batch.responses, [(0, 0), (0, 0), (0, right)], constant_values=9),
        "sampler_logprobs": np.pad(batch.sampler_logprobs, [(0, 0), (0, 0), (0, right)], constant_values=-30),
    }
    return batch._replace(**wider)


def test_padding_changes_nothing(model, params, batches):
    state, [metrics] = run(model, params, batches[:1], optimizer=1.0)
    wide_state, [wide_metrics] = run(model, params, [padded(batches[0], 5, 4)], optimizer=1.0)
    # Softmax and loss sum over more zeros, in another order.
    assert metrics == pytest.approx(wide_metrics, rel=1e-5, abs=1e-5)
    assert_trees_close(state.params, wide_state.params, atol=1e-5)


def test_an_ungraded_rollout_counts_nowhere(model, params, batches):
    batch = batches[0]
    [[p, i]] = np.argwhere(~batch.graded)
    changed = jax.tree.map(np.copy, batch)
    changed.responses[p, i] = (changed.responses[p, i] + 11) % VOCAB
    changed.response_lengths[p, i] = LENGTH + 1 - changed.response_lengths[p, i]
    changed.modes[p, i] = 1 - changed.modes[p, i]
    changed.rewards[p, i] = -100.0
    changed.sampler_logprobs[p, i] = np.nan
    state, [metrics] = run(model, params, [batch], optimizer=1.0)
    other_state, [other_metrics] = run(model, params, [changed], optimizer=1.0)
    # Exactly: one program, and every term that differs is replaced by zero.
    assert metrics == other_metrics
    assert_trees_close(state.params, other_state.params, atol=0)
    counted = changed._replace(graded=np.ones_like(batch.graded), sampler_logprobs=batch.sampler_logprobs)
    assert run(model, params, [counted], optimizer=1.0)[1][0]["loss"] != pytest.approx(metrics["loss"], abs=1e-3)


def test_equal_rewards_give_no_gradient(model, params, batches):
    """While the clamp is on: |A| = 0 leaves no room for a bonus."""
    batch = batches[0]._replace(rewards=np.full((QUESTIONS, GROUP), 0.1, np.float32))
    state, [metrics] = run(model, params, [batch], optimizer=1.0)
    assert metrics["loss"] == metrics["grad_norm"] == 0
    assert metrics["advantage_abs/high_entropy"] == 0
    assert_trees_close(state.params, params, atol=0)


# ------------------------------------------- the same numbers along other paths, on a policy that compiles fast


def one_step(params, batch, config, model, eta=ETA):
    """With SGD of rate 1."""
    state, [metrics] = run(model, params, [batch], config, 1.0, eta)
    return state, metrics


@pytest.mark.parametrize("aggregate", AGGREGATES)
def test_microbatches_change_nothing(bag, model, batches, aggregate):
    results = [
        one_step(bag, batches[0], UpdateConfig(aggregate=aggregate, max_new_tokens=9, microbatch_questions=size), model)
        for size in (0, 1, 2, QUESTIONS)
    ]
    state, metrics = results[0]
    for other_state, other_metrics in results[1:]:
        # The same sums in another order.
        for name, value in metrics.items():
            assert other_metrics[name] == pytest.approx(value, rel=1e-5, abs=1e-6), name
        assert_trees_close(state.params, other_state.params, atol=1e-6)
    assert largest_change(bag, state.params) > 1e-3


def test_aggregates_differ(bag, model, batches):
    losses = [
        one_step(bag, batches[0], UpdateConfig(aggregate=name, max_new_tokens=9), model)[1]["loss"]
        for name in AGGREGATES
    ]
    assert len({round(loss, 4) for loss in losses}) == len(AGGREGATES)


@pytest.mark.parametrize("aggregate", AGGREGATES)
def test_padding_changes_no_aggregate(bag, model, batches, aggregate):
    config = UpdateConfig(aggregate=aggregate, max_new_tokens=20)
    state, metrics = one_step(bag, batches[0], config, model)
    wide_state, wide_metrics = one_step(bag, padded(batches[0], 5, 4), config, model)
    assert wide_metrics["loss"] == pytest.approx(metrics["loss"], abs=1e-6)  # float32 sums
    assert_trees_close(state.params, wide_state.params, atol=1e-6)
    assert abs(metrics["loss"]) > 1e-4


def test_the_constant_is_the_most_new_tokens(bag, model, batches):
    """Dr. GRPO: twice the budget, half the loss."""
    losses = [
        one_step(bag, batches[0], UpdateConfig(aggregate="constant", max_new_tokens=n), model)[1]["loss"]
        for n in (10, 20)
    ]
    assert losses[0] == pytest.approx(2 * losses[1], rel=1e-5)  # one float32 division


def test_the_constant_must_be_given():
    with pytest.raises(ValueError, match="max_new_tokens"):
        UpdateConfig(aggregate="constant")


def test_the_order_of_rollouts_means_nothing(bag, model, batches):
    """Any order of a question's rollouts, their modes with them, is the same step."""
    batch = batches[0]
    orders = np.stack([np.random.default_rng(seed).permutation(GROUP) for seed in range(QUESTIONS)])
    per_rollout = ("responses", "response_lengths", "modes", "truncated", "rewards", "graded", "sampler_logprobs")
    shuffled = batch._replace(
        **{
            name: np.stack([rows[order] for rows, order in zip(getattr(batch, name), orders, strict=True)])
            for name in per_rollout
        }
    )
    assert not np.array_equal(shuffled.modes, batch.modes)
    for config in (UpdateConfig(), UpdateConfig(updates_per_step=2)):
        state, metrics = one_step(bag, batch, config, model)
        other_state, other_metrics = one_step(bag, shuffled, config, model)
        # The same sums in another order.
        for name, value in metrics.items():
            assert other_metrics[name] == pytest.approx(value, rel=1e-5, abs=1e-5), name
        assert_trees_close(state.params, other_state.params, atol=1e-5)


def test_the_modes_column_decides_what_is_measured(bag, model, batches):
    """The loss does not ask who sampled a rollout, the metrics do."""
    swapped = batches[0]._replace(modes=1 - batches[0].modes)
    _, metrics = one_step(bag, batches[0], UpdateConfig(), model)
    _, other = one_step(bag, swapped, UpdateConfig(), model)
    assert other["loss"] == metrics["loss"]
    assert abs(other["entropy/normal"] - metrics["entropy/normal"]) > 1e-3


def test_two_updates_are_two_minibatches_with_frozen_old_logprobs(bag, bag_scores, model, batches):
    """By hand, from the objective's parts: score, then two gradient steps on halves of the questions."""
    batch, config = batches[0], UpdateConfig(updates_per_step=2, clip_low=0.05, clip_high=0.02)
    mask = (jnp.arange(LENGTH) < batch.response_lengths[..., None]) & batch.graded[..., None]
    ignored = dict.fromkeys(("config", "places", "dtype", "remat", "chunk", "with_kl", "mesh"))

    def logprobs(params, rows):
        return bag_scores(params, *(leaf[rows] for leaf in batch[:4]), temperature=1.0, **ignored).logprobs

    settings = AdvantageConfig(eta=ETA)
    everyone = slice(None)
    old = logprobs(bag, everyone)
    advantages = update_module.dual_mode_advantages(
        old, jnp.asarray(batch.rewards), mask, settings, jnp.asarray(batch.graded)
    )

    def surrogate(params, rows):
        ratio = jnp.exp(jnp.where(mask[rows], logprobs(params, rows) - old[:, rows], 0.0))
        bounded = jnp.clip(ratio, 1 - config.clip_low, 1 + config.clip_high)
        values = jnp.minimum(ratio * advantages[:, rows], bounded * advantages[:, rows])
        return -jnp.sum(jnp.where(mask[rows], values, 0.0)) / (2 * jnp.sum(mask[rows]))

    expected = bag
    for rows in (slice(0, 2), slice(2, 4)):
        expected = jax.tree.map(jnp.subtract, expected, jax.grad(surrogate)(expected, rows))
    state, metrics = one_step(bag, batch, config, model)
    assert_trees_close(state.params, expected, atol=1e-6)  # the same float32 sums, fused otherwise
    assert metrics["clip_fraction/normal"] > 0.05
    assert int(state.step) == 1


# -------------------------------------------------------------------------------- the state from step to step


def test_eta_moves_towards_the_target_only_when_asked(bag, model, batches):
    state, metrics = one_step(bag, batches[0], UpdateConfig(), model, eta=0.3)
    measured = metrics["kl/high_entropy_to_normal"]
    assert float(state.eta.eta) == np.float32(0.3)
    assert float(state.eta.kl) == measured > 0.1
    for factor in (2.0, 0.5):
        eta = EtaConfig("target_kl", target_kl=factor * measured, gain=0.1, largest=2.0)
        state, metrics = one_step(bag, batches[0], UpdateConfig(eta=eta), model, eta=0.3)
        # A tenth of `largest` for each unit of log(target / measured).
        assert float(state.eta.eta) == pytest.approx(0.3 + 0.2 * math.log(factor), abs=1e-6)
        assert metrics["eta"] == pytest.approx(0.3)  # the one that this step was made with
        assert float(state.eta.kl) == pytest.approx(measured)


def test_eta_stays_where_no_high_entropy_rollout_was_graded(bag, model, batches):
    batch = batches[0]._replace(graded=batches[0].graded & (batches[0].modes == NORMAL))
    config = UpdateConfig(eta=EtaConfig("target_kl", target_kl=0.2, smoothing=0.0))
    state, _ = one_step(bag, batch, config, model, eta=0.3)
    assert (float(state.eta.eta), float(state.eta.kl)) == (np.float32(0.3), -1.0)  # still nothing measured


def test_eta_is_the_states(bag, model, batches):
    """Not the one of the configuration, where it starts."""
    config = UpdateConfig(advantage=AdvantageConfig(eta=7.0))
    losses = [one_step(bag, batches[0], config, model, eta=eta)[1]["loss"] for eta in (0.0, 0.5)]
    without = UpdateConfig(advantage=AdvantageConfig(eta=0.0))
    assert losses[0] == one_step(bag, batches[0], without, model, eta=0.0)[1]["loss"]
    assert abs(losses[1] - losses[0]) > 1e-3


def test_the_state_is_donated_and_the_update_compiled_once(bag, model, batches):
    optimizer = make_optimizer(ADAMW)
    update = make_update(model, UpdateConfig(eta=EtaConfig("target_kl")), optimizer)
    states = [fresh_state(bag, optimizer)]
    for batch in batches:
        states.append(update(states[-1], batch)[0])
    assert update._cache_size() == 1
    for used in states[:-1]:
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves((used.params, used.opt_state, used.step)))
    assert not states[-1].params["table"].is_deleted()
    assert int(states[-1].step) == len(batches)
    np.testing.assert_array_equal(jax.random.key_data(states[-1].key), jax.random.key_data(jax.random.key(0)))


def test_another_shape_is_the_only_reason_to_compile_again(bag, model, batches):
    optimizer = optax.sgd(1.0)
    update = make_update(model, UpdateConfig(), optimizer)
    for batch, programs in ((batches[0], 1), (batches[1], 1), (padded(batches[0], 1, 0), 2)):
        update(fresh_state(bag, optimizer), batch)
        assert update._cache_size() == programs


# --------------------------------------------------------------------------------- numbers that are none


def with_reward(batch, value):
    rewards = batch.rewards.copy()
    rewards[1, 0] = value
    return batch._replace(rewards=rewards)


def with_logprob(batch, value):
    logprobs = batch.sampler_logprobs.copy()
    logprobs[1, 0, 0] = value
    return batch._replace(sampler_logprobs=logprobs)


TWO_PASS = replace(FUSED, two_pass=True)
IN_QUARTERS = replace(FUSED, updates_per_step=4, update_order="quarters")


@pytest.mark.parametrize("config", [FUSED, TWO_PASS, replace(FUSED, microbatch_questions=1), IN_QUARTERS])
@pytest.mark.parametrize("spoil", [with_reward, with_logprob])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_step_with_a_number_that_is_none_changes_nothing(bag, model, batches, config, spoil, value):
    state, history = run(model, bag, [batches[0], spoil(batches[1], value)], config)
    before, _ = run(model, bag, [batches[0]], config)
    assert [row["skipped"] for row in history] == [0.0, 1.0]
    for one, other in zip(
        jax.tree.leaves((state.params, state.opt_state)),
        jax.tree.leaves((before.params, before.opt_state)),
        strict=True,
    ):
        np.testing.assert_array_equal(one, other)
    # The next step draws other numbers all the same.
    assert (int(state.step), int(before.step)) == (2, 1)
    assert np.isfinite(float(state.eta.eta))
    assert np.isfinite(float(state.eta.kl))


def test_parameters_that_are_no_numbers_skip_every_update(bag, model, batches):
    spoilt = {"table": bag["table"].at[3, 2].set(jnp.nan)}
    state, history = run(model, spoilt, batches[:2])
    assert [row["skipped"] for row in history] == [1.0, 1.0]
    np.testing.assert_array_equal(state.params["table"], spoilt["table"])
    assert float(state.eta.eta) == ETA


def test_of_several_updates_the_sound_ones_count(bag, model, batches):
    """Two updates of two questions each; the second has the reward that is none."""
    config = replace(FUSED, updates_per_step=2)
    rewards = batches[0].rewards.copy()
    rewards[3, 0] = np.nan
    state, (row,) = run(model, bag, [batches[0]._replace(rewards=rewards)], config)
    assert row["skipped"] == 0.5
    assert np.all(np.isfinite(state.params["table"]))
    assert largest_change(bag, state.params) > 1e-4


def test_an_ungraded_rollout_may_hold_anything(bag, model, batches):
    logprobs = batches[0].sampler_logprobs.copy()
    logprobs[2, 1] = np.nan
    _, (row,) = run(model, bag, [batches[0]._replace(sampler_logprobs=logprobs)])
    assert row["skipped"] == 0.0
