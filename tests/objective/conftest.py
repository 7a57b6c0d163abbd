"""The objective once more, in NumPy float64 and plain loops, for the tests of this folder to compare with."""

import math
from types import SimpleNamespace

import numpy as np
import pytest

EPS = 1e-6


def _mean(values):
    return sum(values) / len(values)


def _unbiased_std(values):
    mean = _mean(values)
    return math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))


def _correctness(rewards, norm_by_std):
    """Equation 1: (r - mean) / (std + eps); a group of one has mean 0 and std 1."""
    mean, std = (0.0, 1.0) if len(rewards) == 1 else (_mean(rewards), _unbiased_std(rewards))
    return [(reward - mean) / (std + EPS) if norm_by_std else reward - mean for reward in rewards]


def _spread(values, normalize):
    if normalize == "range":
        return max(values) - min(values)
    return _unbiased_std(values) if len(values) > 1 else 0.0


def _normalized(bonus, normalize):
    """Equation 3 over all response tokens of a question, given and returned as {(rollout, token): value}."""
    if normalize == "none" or not bonus:
        return dict(bonus)
    values = list(bonus.values())
    scale = _spread(values, normalize)
    return {where: (value - _mean(values)) / (scale + EPS) for where, value in bonus.items()}


def _clamped(bonus, eta, advantage, config):
    """Equation 4's second term, in the paper's order or in the released trainer's."""
    limit = abs(advantage) / config.kappa if config.kappa else math.inf
    if config.clamp == "bonus":
        return config.bonus_repeats * eta * min(max(bonus, -limit), limit)
    return config.bonus_repeats * min(max(eta * bonus, -limit), limit)


def dual_mode_advantages(logprobs, rewards, mask, config, valid=None):
    """The mask is that of both modes, or one for each; a mode's log-probabilities are 0 where it has no tokens."""
    logprobs, rewards = np.asarray(logprobs, np.float64), np.asarray(rewards, np.float64)
    mask = np.broadcast_to(np.asarray(mask), logprobs.shape)
    logprobs = np.where(mask, logprobs, 0.0)
    _, questions, rollouts, length = logprobs.shape
    valid = np.ones((questions, rollouts), bool) if valid is None else np.asarray(valid)
    result = np.zeros(logprobs.shape)
    for p in range(questions):
        graded = [i for i in range(rollouts) if valid[p, i]]
        if not graded:
            continue
        group = [float(rewards[p, i]) for i in graded]
        advantage = dict(zip(graded, _correctness(group, config.norm_by_std), strict=True))
        gets_bonus = not config.only_uniform_groups or len(set(group)) == 1
        for mode, eta in enumerate((config.eta_normal, config.eta)):
            tokens = [(i, t) for i in graded for t in range(length) if mask[mode, p, i, t]]
            if not tokens:
                continue
            own, other = logprobs[mode, p], logprobs[1 - mode, p]
            raw = {(i, t): -config.alpha * own[i, t] - (1 - config.alpha) * other[i, t] for i, t in tokens}
            normalized = _normalized(raw, config.normalize)
            threshold = np.quantile(list(raw.values()), config.low_quantile)
            for i, t in tokens:
                result[mode, p, i, t] = advantage[i]
                if gets_bonus and raw[i, t] >= threshold:
                    result[mode, p, i, t] += _clamped(normalized[i, t], eta, advantage[i], config)
    return result


def _surrogate(ratio, advantage, clip_low, clip_high, dual_clip):
    """Equation 5 for one token: (objective, whether the clipped branch is the smaller one)."""
    plain = ratio * advantage
    clipped = min(max(ratio, 1 - clip_low), 1 + clip_high) * advantage
    objective = min(plain, clipped)
    if dual_clip is not None and advantage < 0:
        objective = max(objective, dual_clip * advantage)
    return objective, clipped < plain


def policy_loss(logprobs, old_logprobs, advantages, mask, *, aggregate, clip_low=0.2, clip_high=0.2, dual_clip=None):
    logprobs, old_logprobs, advantages, mask = (
        np.broadcast_to(np.asarray(x), np.shape(logprobs)) for x in (logprobs, old_logprobs, advantages, mask)
    )
    length = logprobs.shape[-1]
    sequences, log_ratios, clipped = [], [], []
    for index in np.ndindex(logprobs.shape[:-1]):
        objectives = []
        for t in range(length):
            if mask[index][t]:
                log_ratio = float(logprobs[index][t]) - float(old_logprobs[index][t])
                objective, active = _surrogate(
                    math.exp(log_ratio), float(advantages[index][t]), clip_low, clip_high, dual_clip
                )
                objectives.append(objective)
                log_ratios.append(log_ratio)
                clipped.append(active)
        if objectives:
            sequences.append(objectives)
    if not sequences:
        return 0.0, {}
    total = sum(sum(objectives) for objectives in sequences)
    loss = {
        "token_mean": -total / len(log_ratios),
        "sequence_mean_token_sum": -total / len(sequences),
        "sequence_mean_token_mean": -_mean([_mean(objectives) for objectives in sequences]),
        "constant": -total / (len(sequences) * length),
    }[aggregate]
    metrics = {
        "clip_fraction": _mean(clipped),
        "ratio_mean": _mean([math.exp(x) for x in log_ratios]),
        "approx_kl": _mean([math.exp(x) - 1 - x for x in log_ratios]),
    }
    return loss, metrics


def finite_difference(function, x, step=1e-6):
    """Central differences of a scalar function of a float64 array."""
    gradient = np.zeros(x.shape)
    for index in np.ndindex(x.shape):
        up, down = x.copy(), x.copy()
        up[index] += step
        down[index] -= step
        gradient[index] = (function(up) - function(down)) / (2 * step)
    return gradient


@pytest.fixture(scope="session")
def oracle():
    return SimpleNamespace(
        dual_mode_advantages=dual_mode_advantages,
        policy_loss=policy_loss,
        finite_difference=finite_difference,
    )
