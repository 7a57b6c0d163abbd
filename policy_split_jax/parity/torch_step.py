"""One training step in PyTorch, as the equations are written: a sequence at a time, nothing padded, nothing fast.

It shares no code with the JAX step, so that each is the other's check. Equations are those of Policy Split
(https://arxiv.org/abs/2604.11510) and of the papers named in `objective/baselines.py`. Needs the extra `torch`.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from policy_split_jax.modes import HIGH_ENTROPY, NORMAL
from policy_split_jax.objective.advantages import AdvantageConfig
from policy_split_jax.objective.baselines import trained_modes
from policy_split_jax.training.update import UpdateConfig

Place = tuple[int, int, int]
"""(training mode, question, rollout)."""
Tokens = dict[Place, Tensor]
"""A value for each response token of each sequence."""
_EPS = 1e-6


class Sample(NamedTuple):
    """A response behind the prompt under which it is trained, as token ids."""

    prompt: list[int]
    response: list[int]


@dataclass(frozen=True)
class Rollouts:
    """A step's rollouts. Questions are counted through, and each one's rollouts."""

    samples: Mapping[Place, Sample]
    """By training mode; of baselines only the normal one is used."""
    modes: Sequence[Sequence[int]]
    """The mode that sampled each rollout of each question."""
    rewards: Sequence[Sequence[float]]

    def places(self, modes: Sequence[int], questions: Sequence[int]) -> list[Place]:
        return [(m, p, i) for m in modes for p in questions for i in range(len(self.modes[p]))]


class Scores(NamedTuple):
    """Of one response: [t, V] and [t], in nats."""

    logits: Tensor
    logprobs: Tensor
    entropy: Tensor


@dataclass
class Record:
    """What a step computed on its way; of its updates, one entry each."""

    logits: Tokens = field(default_factory=dict)
    logprobs: Tokens = field(default_factory=dict)
    entropy: Tokens = field(default_factory=dict)
    bonus: Tokens = field(default_factory=dict)
    advantages: Tokens = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)
    gradient_norms: list[float] = field(default_factory=list)


def score(model: Any, sequence: Sample, temperature: float, half: bool) -> Scores:
    """The response's tokens behind its prompt; with `half`, matrix products in bfloat16."""
    ids = torch.tensor([[*sequence.prompt, *sequence.response]])
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        logits = model(input_ids=ids).logits
    logits = logits[0, len(sequence.prompt) - 1 : -1].float() / temperature
    logp = torch.log_softmax(logits, dim=-1)
    chosen = logp.gather(-1, torch.tensor(sequence.response)[:, None])[:, 0]
    return Scores(logits, chosen, -(logp.exp() * logp).sum(-1))


def step(
    model: Any,
    optimizer: torch.optim.Optimizer,
    rollouts: Rollouts,
    config: UpdateConfig,
    *,
    eta: float,
    gradient_clip: float,
    noise: Sequence[Mapping[Place, Tensor]] = (),
    half: bool = False,
) -> Record:
    """All updates of a training step, in place. `noise` is what `clip_cov` chooses by, of each update."""
    modes = trained_modes(config.objective)
    questions, record = range(len(rollouts.modes)), Record()
    with torch.no_grad():
        for place in rollouts.places(modes, questions):
            found = score(model, rollouts.samples[place], config.temperature, half)
            record.logits[place], record.logprobs[place], record.entropy[place] = found
    kept: Tokens = {}
    penalised: Tokens = {}
    cut = _cut(list(questions), config.updates_per_step)
    for number, part in enumerate(cut):
        places = rollouts.places(modes, part)
        if config.objective == "policy_split":
            _policy_split(record, rollouts, part, config.advantage, eta)
        else:
            _baseline(record, rollouts, part, config)
            chosen = noise[number] if config.objective == "clip_cov" else {}
            kept |= _kept(record, places, config, chosen)
            penalised |= _penalised(record, places, config)
    parts = [rollouts.places(modes, part) for part in cut]
    if config.update_order == "quarters":
        parts = _cut(_by_quarters(rollouts), config.updates_per_step)
    for number, places in enumerate(parts):
        losses = {}
        for place in places:
            found = score(model, rollouts.samples[place], config.temperature, half)
            # Nothing has moved before the first update; what rounding makes of that has no meaning.
            old = record.logprobs[place] if number else found.logprobs.detach()
            losses[place] = _token_losses(found, old, place, record, config, kept, penalised)
        loss = _aggregate(losses, config)
        optimizer.zero_grad()
        loss.backward()
        record.gradient_norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), gradient_clip)))
        record.losses.append(loss.item())
        optimizer.step()
    return record


def _cut(items: list[Any], count: int) -> list[list[Any]]:
    size = len(items) // count
    return [items[at : at + size] for at in range(0, len(items), size)]


def _by_quarters(rollouts: Rollouts) -> list[Place]:
    """Own sequences of either mode, then those that the modes share with each other, by training mode."""
    places = rollouts.places((NORMAL, HIGH_ENTROPY), range(len(rollouts.modes)))
    own = [place for place in places if rollouts.modes[place[1]][place[2]] == place[0]]
    return own + [place for place in places if place not in own]


def correctness(rewards: Sequence[float], by_std: bool) -> Tensor:
    """Equation 1 of a question's rewards; the unbiased deviation."""
    values = torch.tensor(rewards)
    if len(values) == 1:
        return values / (1 + _EPS) if by_std else values
    centred = values - values.mean()
    return centred / (values.std() + _EPS) if by_std else centred


def _policy_split(
    record: Record, rollouts: Rollouts, questions: Sequence[int], config: AdvantageConfig, eta: float
) -> None:
    """Equations 1 to 4."""
    seen = record.logprobs
    if config.surprise == "entropy":
        seen = {place: -entropy for place, entropy in record.entropy.items()}
    for p in questions:
        outcome = correctness(rollouts.rewards[p], config.norm_by_std)
        group = range(len(outcome))
        equal = min(rollouts.rewards[p]) == max(rollouts.rewards[p])
        for mode, size in ((NORMAL, config.eta_normal), (HIGH_ENTROPY, eta)):
            raw = {i: _raw(seen[mode, p, i], seen[1 - mode, p, i], config.alpha) for i in group}
            every = torch.cat(list(raw.values()))
            threshold = torch.quantile(every, config.low_quantile)
            for i in group:
                bonus = _normalised(raw[i], every, config.normalize)
                extra = _clamped(bonus, float(outcome[i].abs()), size, config)
                if config.only_uniform_groups and not equal:
                    extra = torch.zeros_like(extra)
                extra = torch.where(raw[i] >= threshold, extra, 0.0)
                record.bonus[mode, p, i] = bonus
                record.advantages[mode, p, i] = outcome[i] + config.bonus_repeats * extra


def _raw(own: Tensor, other: Tensor, alpha: float) -> Tensor:
    """Equation 2; where the other mode's tokens are fewer, it says nothing of the rest."""
    met = torch.zeros_like(own)
    length = min(len(own), len(other))
    met[:length] = other[:length]
    return -alpha * own - (1 - alpha) * met


def _normalised(raw: Tensor, every: Tensor, how: str) -> Tensor:
    """Equation 3."""
    if how == "none":
        return raw
    scale = every.std() if how == "zscore" else every.max() - every.min()
    return (raw - every.mean()) / (scale + _EPS)


def _clamped(bonus: Tensor, size: float, eta: float, config: AdvantageConfig) -> Tensor:
    """Equation 4's bonus."""
    limit = size / config.kappa if config.kappa else math.inf
    if config.clamp == "bonus":
        return eta * bonus.clamp(-limit, limit)
    return (eta * bonus).clamp(-limit, limit)


def _baseline(record: Record, rollouts: Rollouts, questions: Sequence[int], config: UpdateConfig) -> None:
    """A of each token, changed by the baselines that change it."""
    settings = config.baseline.entropy_advantage
    for p in questions:
        outcome = correctness(rollouts.rewards[p], config.advantage.norm_by_std)
        entropies = [record.entropy[NORMAL, p, i] for i in range(len(outcome))]
        means = torch.stack([entropy.mean() for entropy in entropies])
        if config.objective == "entropy_driven_advantage":
            outcome = outcome / (means / means.mean())
        for i, entropy in enumerate(entropies):
            advantage = outcome[i].expand_as(entropy)
            if config.objective == "entropy_advantage":
                advantage = advantage + (settings.alpha * entropy).clamp(max=float(outcome[i].abs()) / settings.kappa)
            record.advantages[NORMAL, p, i] = advantage


def _covariances(record: Record, places: Sequence[Place]) -> Tokens:
    logprobs = torch.cat([record.logprobs[place] for place in places])
    advantages = torch.cat([record.advantages[place] for place in places])
    return {
        place: (record.logprobs[place] - logprobs.mean()) * (record.advantages[place] - advantages.mean())
        for place in places
    }


def _kept(record: Record, places: Sequence[Place], config: UpdateConfig, noise: Mapping[Place, Tensor]) -> Tokens:
    """Which tokens have a gradient, where not all have."""
    if config.objective == "forking_tokens":
        every = torch.cat([record.entropy[place] for place in places])
        threshold = torch.quantile(every, 1 - config.baseline.forking_tokens.share)
        return {place: record.entropy[place] >= threshold for place in places}
    if config.objective != "clip_cov":
        return {}
    settings, cov = config.baseline.clip_cov, _covariances(record, places)
    band = [
        (float(noise[place][t]), place, t)
        for place in places
        for t, value in enumerate(cov[place])
        if settings.low < value < settings.high
    ]
    kept = {place: torch.ones_like(cov[place], dtype=torch.bool) for place in places}
    for _, place, t in sorted(band)[: _number(cov, settings.share)]:
        kept[place][t] = False
    return kept


def _penalised(record: Record, places: Sequence[Place], config: UpdateConfig) -> Tokens:
    """Which tokens pay for moving."""
    if config.objective != "kl_cov":
        return {}
    cov = _covariances(record, places)
    each = sorted(((float(value), place, t) for place in places for t, value in enumerate(cov[place])), reverse=True)
    penalised = {place: torch.zeros_like(cov[place], dtype=torch.bool) for place in places}
    for _, place, t in each[: _number(cov, config.baseline.kl_cov.share)]:
        penalised[place][t] = True
    return penalised


def _number(values: Tokens, share: float) -> int:
    return max(int(share * sum(map(len, values.values()))), 1)


def _token_losses(
    found: Scores, old: Tensor, place: Place, record: Record, config: UpdateConfig, kept: Tokens, penalised: Tokens
) -> Tensor:
    """Equation 5 of one sequence's tokens, negative, and what baselines add to it."""
    log_ratio = found.logprobs - old
    ratio, advantage = log_ratio.exp(), record.advantages[place]
    surrogate = ratio * advantage
    if config.objective != "kl_cov":
        surrogate = torch.minimum(surrogate, ratio.clamp(1 - config.clip_low, 1 + config.clip_high) * advantage)
    if config.dual_clip is not None:
        least = torch.maximum(surrogate, config.dual_clip * advantage)
        surrogate = torch.where(advantage < 0, least, surrogate)
    loss = -surrogate
    if place in kept:
        loss = torch.where(kept[place], loss, 0.0)
    if place in penalised:
        loss = loss + config.baseline.kl_cov.coefficient * torch.where(penalised[place], log_ratio.abs(), 0.0)
    if config.objective == "entropy_regularization":
        loss = loss - config.baseline.entropy_regularization.coefficient * found.entropy
    return loss


def _aggregate(losses: Tokens, config: UpdateConfig) -> Tensor:
    """An update's loss from those of its tokens."""
    each = [loss for loss in losses.values() if len(loss)]
    if config.aggregate == "token_mean":
        return torch.cat(each).mean()
    if config.aggregate == "sequence_mean_token_sum":
        return torch.stack([loss.sum() for loss in each]).mean()
    if config.aggregate == "sequence_mean_token_mean":
        return torch.stack([loss.mean() for loss in each]).mean()
    return torch.stack([loss.sum() for loss in each]).mean() / config.max_new_tokens
