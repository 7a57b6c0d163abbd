"""One training step as one jitted function of a donated state: scores, advantages, loss, gradient, optimizer.

With one update a step the advantages come from the update's own forward pass ("fused"): the ratio is
exp(logp − stop_gradient(logp)), exactly 1 with the right gradient, and no second scoring pass is needed. With
several updates the rollouts are scored first ("two-pass"). A question's statistics need only that question's
rollouts, so microbatches are whole questions.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float

from policy_split_jax import masked
from policy_split_jax.model import qwen3
from policy_split_jax.model.sharding import pinned
from policy_split_jax.modes import HIGH_ENTROPY, MODE_NAMES, NORMAL
from policy_split_jax.objective.advantages import AdvantageConfig, dual_mode_advantages
from policy_split_jax.objective.eta import EtaConfig, next_eta
from policy_split_jax.objective.losses import Aggregate, Metrics, token_losses, token_weights
from policy_split_jax.objective.scorer import TokenScores, score_rollouts
from policy_split_jax.training.accumulate import accumulate_gradients, split_batch
from policy_split_jax.training.batch import Batch
from policy_split_jax.training.state import TrainState, state_shardings

Update = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]


@dataclass(frozen=True)
class UpdateConfig:
    """What the update needs to know."""

    advantage: AdvantageConfig = field(default_factory=AdvantageConfig)
    eta: EtaConfig = field(default_factory=EtaConfig)
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None
    aggregate: Aggregate = "token_mean"
    max_new_tokens: int = 0
    """What the aggregate `constant` divides by: a batch's width changes with its longest response."""
    temperature: float = 1.0
    updates_per_step: int = 1
    microbatch_questions: int = 0
    """0: all questions of an update at once."""
    score_chunk: int = 256
    dtype: str = "float32"
    remat: str = "none"
    two_pass: bool = False
    """Score first even with one update a step; the fused path gives the same to rounding."""

    def __post_init__(self) -> None:
        if self.aggregate == "constant" and self.max_new_tokens < 1:
            raise ValueError("UpdateConfig: the aggregate constant needs max_new_tokens")


class Fixed(NamedTuple):
    """What was computed before the first update of a two-pass step; arrays begin with P."""

    old_logprobs: Float[Array, "P 2 G T"]
    advantages: Float[Array, "P 2 G T"]


class TokenRecord(NamedTuple):
    """What the loss saw of each token under each training mode, for the metrics."""

    scores: TokenScores
    old_logprobs: Float[Array, "2 P G T"]
    advantages: Float[Array, "2 P G T"]
    clipped: Float[Array, "2 P G T"]


def token_mask(batch: Batch) -> Bool[Array, "P G T"]:
    """The sampled tokens of graded rollouts."""
    return (jnp.arange(batch.responses.shape[-1]) < batch.response_lengths[..., None]) & batch.graded[..., None]


def _swap(values: Array) -> Array:
    """[2, P, …] to [P, 2, …] and back: microbatches are cut along P."""
    return jnp.moveaxis(values, 1, 0)


def make_update(
    model: qwen3.Qwen3Config,
    config: UpdateConfig,
    optimizer: optax.GradientTransformation,
    mesh: Mesh | None = None,
) -> Update:
    """The jitted `update(state, batch) -> (state, metrics)`; the state is donated.

    `batch` has P questions, P a multiple of `updates_per_step`. The metrics are named in
    docs/architecture.md. On a mesh the state lies as `state_shardings` says, before and after; the sequences of
    a microbatch are divided over the devices, whosever question they are.
    """
    shardings = None if mesh is None else state_shardings(model, optimizer, mesh)

    def score(params: qwen3.Params, batch: Batch) -> TokenScores:
        return score_rollouts(
            params,
            batch.prompts,
            batch.prompt_lengths,
            batch.responses,
            batch.response_lengths,
            config=model,
            dtype=jnp.dtype(config.dtype),
            remat=config.remat,
            temperature=config.temperature,
            chunk=config.score_chunk,
            with_kl=True,
            mesh=mesh,
        )

    def advantages(logprobs: Array, batch: Batch, eta: Array) -> Float[Array, "2 P G T"]:
        settings = replace(config.advantage, eta=eta)
        return dual_mode_advantages(logprobs, batch.rewards, token_mask(batch), settings, batch.graded)

    def microbatches(questions: int) -> int:
        return questions // (config.microbatch_questions or questions)

    def loss(eta: Array, params: qwen3.Params, part: Any) -> tuple[Float[Array, ""], TokenRecord]:
        batch, weights, fixed = part
        # Said of the parameters, it holds for their gradient too.
        scores = score(pinned(params, shardings and shardings.params), batch)
        old = jax.lax.stop_gradient(scores.logprobs) if fixed is None else _swap(fixed.old_logprobs)
        advantage = advantages(old, batch, eta) if fixed is None else _swap(fixed.advantages)
        mask = token_mask(batch)
        losses, measures = token_losses(
            masked.where(mask, scores.logprobs),
            masked.where(mask, old),
            advantage,
            clip_low=config.clip_low,
            clip_high=config.clip_high,
            dual_clip=config.dual_clip,
        )
        record = TokenRecord(scores, old, advantage, measures["clip_fraction"])
        return masked.total(losses * weights, mask), jax.tree.map(_swap, jax.lax.stop_gradient(record))

    def optimizer_step(state: TrainState, batch: Batch, fixed: Fixed | None) -> tuple[TrainState, Metrics]:
        mask = token_mask(batch)
        # Both modes train on the same tokens, so their weights are the same: one row serves both.
        both = jnp.broadcast_to(mask, (2, *mask.shape))
        weights = token_weights(both, config.aggregate, config.max_new_tokens)[0]
        (value, records), gradient = accumulate_gradients(
            partial(loss, state.eta.eta), state.params, (batch, weights, fixed), microbatches(mask.shape[0])
        )
        changes, opt_state = optimizer.update(gradient, state.opt_state, state.params)
        params = optax.apply_updates(state.params, changes)
        metrics = {"loss": value, "grad_norm": optax.tree.norm(gradient)}
        metrics |= step_metrics(jax.tree.map(_swap, records), batch)
        return state._replace(params=params, opt_state=opt_state), metrics

    def score_first(state: TrainState, batch: Batch) -> Fixed:
        parts = split_batch(batch, microbatches(batch.rewards.shape[0]))
        logprobs = jax.lax.map(lambda part: _swap(score(state.params, part).logprobs), parts)
        logprobs = _swap(logprobs.reshape(-1, *logprobs.shape[2:]))
        return Fixed(_swap(logprobs), _swap(advantages(logprobs, batch, state.eta.eta)))

    @partial(jax.jit, donate_argnums=0)
    def update(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        if config.updates_per_step == 1 and not config.two_pass:
            state, metrics = optimizer_step(state, batch, None)
        else:
            parts = split_batch((batch, score_first(state, batch)), config.updates_per_step)
            state, history = jax.lax.scan(lambda now, part: optimizer_step(now, *part), state, parts)
            metrics = jax.tree.map(jnp.mean, history)
            metrics["sampler/max_difference"] = jnp.max(history["sampler/max_difference"])
        metrics["eta"] = state.eta.eta
        # Where no high-entropy rollout was graded, nothing was measured.
        measured = jnp.any(token_mask(batch) & (batch.modes == HIGH_ENTROPY)[..., None])
        moved = next_eta(state.eta, metrics["kl/high_entropy_to_normal"], config.eta)
        eta = jax.tree.map(partial(jnp.where, measured), moved, state.eta)
        return pinned(state._replace(step=state.step + 1, eta=eta), shardings), metrics

    return update


def step_metrics(record: TokenRecord, batch: Batch) -> Metrics:
    """What is measured of the tokens of a step; means over tokens, nats."""
    mask = token_mask(batch)
    logprobs = record.scores.logprobs
    divergence = cast(Array, record.scores.kl)
    metrics: Metrics = {}
    for mode, name in enumerate(MODE_NAMES):
        own = mask & (batch.modes == mode)[..., None]
        metrics[f"entropy/{name}"] = masked.mean(record.scores.entropy[mode], own)
        metrics[f"neg_logprob/{name}"] = masked.mean(-logprobs[mode], own)
        metrics[f"advantage_abs/{name}"] = masked.mean(jnp.abs(record.advantages[mode]), mask)
        metrics[f"clip_fraction/{name}"] = masked.mean(record.clipped[mode], mask)
    for first, second, name in (
        (HIGH_ENTROPY, NORMAL, "high_entropy_to_normal"),
        (NORMAL, HIGH_ENTROPY, "normal_to_high_entropy"),
    ):
        own = mask & (batch.modes == first)[..., None]
        log_ratio = masked.where(own, logprobs[first] - logprobs[second])
        metrics[f"kl/{name}"] = masked.mean(divergence[first], own)
        metrics[f"kl_k1/{name}"] = masked.mean(log_ratio, own)
        metrics[f"kl_k3/{name}"] = masked.mean(jnp.expm1(-log_ratio) + log_ratio, own)
    return metrics | _sampler_agreement(record.old_logprobs, batch, mask)


def _sampler_agreement(logprobs: Float[Array, "2 P G T"], batch: Batch, mask: Bool[Array, "P G T"]) -> Metrics:
    """How far the sampler's log-probabilities lie from the trainer's, on each rollout's own mode.

    `logprobs` are those before the step: later updates move the policy away from what was sampled.
    """
    own = jnp.where((batch.modes == NORMAL)[..., None], logprobs[NORMAL], logprobs[HIGH_ENTROPY])
    difference = masked.where(mask, batch.sampler_logprobs - own)
    return {
        # k3 estimator of KL(sampler ‖ trainer).
        "sampler/kl": masked.mean(jnp.expm1(-difference) + difference, mask),
        "sampler/max_difference": jnp.max(jnp.abs(difference)),
    }
