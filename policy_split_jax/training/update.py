"""One training step as one jitted function of a donated state: scores, advantages, loss, gradient, optimizer.

With one update a step the advantages come from the update's own forward pass ("fused"): the ratio is
exp(logp − stop_gradient(logp)), exactly 1 with the right gradient, and no second scoring pass is needed. With
several updates the rollouts are scored first ("two-pass"). A question's statistics need only that question's
rollouts, so microbatches are whole questions.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float

from policy_split_jax import masked
from policy_split_jax.model import qwen3
from policy_split_jax.model.sharding import compiler_options, pinned
from policy_split_jax.modes import HIGH_ENTROPY, MODE_NAMES, NORMAL
from policy_split_jax.objective.advantages import AdvantageConfig, correctness_advantages, dual_mode_advantages
from policy_split_jax.objective.eta import EtaConfig, next_eta
from policy_split_jax.objective.losses import Aggregate, Metrics, token_losses, token_weights
from policy_split_jax.objective.scorer import Places, TokenScores, score_rollouts
from policy_split_jax.training.accumulate import Microbatches, accumulate_gradients, equal_parts, split_batch, take
from policy_split_jax.training.batch import Batch, Packing
from policy_split_jax.training.state import TrainState, state_shardings

Update = Callable[..., tuple[TrainState, Metrics]]


@dataclass(frozen=True)
class UpdateConfig:
    """What the update needs to know."""

    objective: Literal["policy_split", "grpo"] = "policy_split"
    """grpo trains the normal mode alone, on rollouts that it sampled (https://arxiv.org/abs/2402.03300)."""
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

    old_logprobs: Float[Array, "P M G T"]
    advantages: Float[Array, "P M G T"]


class TokenRecord(NamedTuple):
    """What the loss saw of each token under each training mode, for the metrics."""

    scores: TokenScores
    old_logprobs: Float[Array, "M P G T"]
    advantages: Float[Array, "M P G T"]
    clipped: Float[Array, "M P G T"]


class Measures(NamedTuple):
    """What was measured of the tokens of some microbatches."""

    means: dict[str, masked.Mean]
    largest: dict[str, Float[Array, ""]]

    def values(self) -> Metrics:
        return {name: mean.value for name, mean in self.means.items()} | self.largest


def joined(some: Measures, others: Measures) -> Measures:
    """Of the microbatches of both."""
    return Measures(
        jax.tree.map(jnp.add, some.means, others.means), jax.tree.map(jnp.maximum, some.largest, others.largest)
    )


def token_mask(batch: Batch) -> Bool[Array, "P G T"]:
    """The sampled tokens of graded rollouts."""
    return (jnp.arange(batch.responses.shape[-1]) < batch.response_lengths[..., None]) & batch.graded[..., None]


def _swap(values: Array) -> Array:
    """[M, P, …] to [P, M, …] and back: microbatches are cut along P."""
    return jnp.moveaxis(values, 1, 0)


def make_update(
    model: qwen3.Qwen3Config,
    config: UpdateConfig,
    optimizer: optax.GradientTransformation,
    mesh: Mesh | None = None,
) -> Update:
    """The jitted `update(state, batch, packing=None) -> (state, metrics)`; the state is donated.

    `batch` has P questions, P a multiple of `updates_per_step`; `packing` says how to pack them, and then
    `microbatch_questions` means nothing. The metrics are named in docs/architecture.md. On a mesh the state lies
    as `state_shardings` says, before and after; the sequences of a microbatch are divided over the devices,
    whosever question they are.
    """
    shardings = None if mesh is None else state_shardings(model, optimizer, mesh)
    contexts = 2 if config.objective == "policy_split" else 1

    def score(params: qwen3.Params, batch: Batch, places: Places | None) -> TokenScores:
        return score_rollouts(
            params,
            batch.prompts[:, :contexts],
            batch.prompt_lengths[:, :contexts],
            batch.responses,
            batch.response_lengths,
            config=model,
            places=places,
            dtype=jnp.dtype(config.dtype),
            remat=config.remat,
            temperature=config.temperature,
            chunk=config.score_chunk,
            with_kl=contexts == 2,
            mesh=mesh,
        )

    def advantages(logprobs: Array, batch: Batch, eta: Array) -> Float[Array, "M P G T"]:
        mask = token_mask(batch)
        if config.objective == "grpo":
            outcome = correctness_advantages(batch.rewards, batch.graded, config.advantage.norm_by_std)
            return masked.where(mask, jnp.broadcast_to(outcome[None, ..., None], logprobs.shape))
        return dual_mode_advantages(logprobs, batch.rewards, mask, replace(config.advantage, eta=eta), batch.graded)

    def microbatches(questions: int, packing: Packing | None) -> Microbatches:
        if packing is not None:
            return packing.microbatches
        return equal_parts(questions, questions // (config.microbatch_questions or questions))

    def loss(eta: Array, params: qwen3.Params, part: Any) -> tuple[Float[Array, ""], Measures]:
        batch, weights, fixed, places = part
        # Said of the parameters, it holds for their gradient too.
        scores = score(pinned(params, shardings and shardings.params), batch, places)
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
        return masked.total(losses * weights, mask), measure(jax.lax.stop_gradient(record), batch)

    def optimizer_step(
        state: TrainState, batch: Batch, fixed: Fixed | None, packing: Packing | None
    ) -> tuple[TrainState, Metrics]:
        mask = token_mask(batch)
        # All modes train on the same tokens, so their weights are the same: one row serves them.
        every = jnp.broadcast_to(mask, (contexts, *mask.shape))
        weights = token_weights(every, config.aggregate, config.max_new_tokens)[0]
        (value, measures), gradient = accumulate_gradients(
            partial(loss, state.eta.eta),
            state.params,
            (batch, weights, fixed, packing and packing.places),
            microbatches(mask.shape[0], packing),
            joined,
        )
        changes, opt_state = optimizer.update(gradient, state.opt_state, state.params)
        params = optax.apply_updates(state.params, changes)
        metrics = {"loss": value, "grad_norm": optax.tree.norm(gradient)} | measures.values()
        return state._replace(params=params, opt_state=opt_state), metrics

    def score_first(state: TrainState, batch: Batch, packing: Packing | None) -> Fixed:
        chosen = microbatches(batch.rewards.shape[0], packing)
        shape = (batch.rewards.shape[0], contexts, *batch.responses.shape[1:])

        def part(at: Array, found: Array) -> Array:
            members = chosen.members[at]
            places = packing and take(packing.places, members)
            return found.at[members].set(_swap(score(state.params, take(batch, members), places).logprobs), mode="drop")

        logprobs = _swap(jax.lax.fori_loop(0, chosen.used, part, jnp.zeros(shape)))
        return Fixed(_swap(logprobs), _swap(advantages(logprobs, batch, state.eta.eta)))

    def two_pass(state: TrainState, batch: Batch, packing: Packing | None) -> tuple[TrainState, Metrics]:
        parts = (split_batch(batch, config.updates_per_step), packing)
        fixed = jax.lax.map(lambda part: score_first(state, *part), parts)

        def one(state: TrainState, part: Any) -> tuple[TrainState, Metrics]:
            (batch, packing), fixed = part
            return optimizer_step(state, batch, fixed, packing)

        state, history = jax.lax.scan(one, state, (parts, fixed))
        metrics = jax.tree.map(jnp.mean, history)
        return state, metrics | {"sampler/max_difference": jnp.max(history["sampler/max_difference"])}

    @partial(jax.jit, donate_argnums=0, compiler_options=compiler_options(mesh))
    def update(state: TrainState, batch: Batch, packing: Packing | None = None) -> tuple[TrainState, Metrics]:
        if config.updates_per_step == 1 and not config.two_pass:
            only = None if packing is None else jax.tree.map(lambda leaf: leaf[0], packing)
            state, metrics = optimizer_step(state, batch, None, only)
        else:
            state, metrics = two_pass(state, batch, packing)
        eta = state.eta
        if config.objective == "policy_split":
            metrics["eta"] = eta.eta
            # Where no high-entropy rollout was graded, nothing was measured.
            measured = jnp.any(token_mask(batch) & (batch.modes == HIGH_ENTROPY)[..., None])
            moved = next_eta(eta, metrics["kl/high_entropy_to_normal"], config.eta)
            eta = jax.tree.map(partial(jnp.where, measured), moved, eta)
        return pinned(state._replace(step=state.step + 1, eta=eta), shardings), metrics

    return update


def measure(record: TokenRecord, batch: Batch) -> Measures:
    """What is measured of the tokens of a microbatch; means over tokens, nats."""
    mask = token_mask(batch)
    logprobs = record.scores.logprobs
    means: dict[str, masked.Mean] = {}
    for mode, name in enumerate(MODE_NAMES[: len(logprobs)]):
        own = mask & (batch.modes == mode)[..., None]
        means[f"entropy/{name}"] = masked.mean_parts(record.scores.entropy[mode], own)
        means[f"neg_logprob/{name}"] = masked.mean_parts(-logprobs[mode], own)
        means[f"advantage_abs/{name}"] = masked.mean_parts(jnp.abs(record.advantages[mode]), mask)
        means[f"clip_fraction/{name}"] = masked.mean_parts(record.clipped[mode], mask)
    if record.scores.kl is not None:
        means |= _divergences(logprobs, record.scores.kl, batch, mask)
    # The sampler's log-probabilities against the trainer's, on each rollout's own mode. Those before the step:
    # later updates move the policy away from what was sampled.
    first, last = record.old_logprobs[0], record.old_logprobs[-1]
    own_logprobs = jnp.where((batch.modes == NORMAL)[..., None], first, last)
    difference = masked.where(mask, batch.sampler_logprobs - own_logprobs)
    # k3 estimator of KL(sampler ‖ trainer).
    means["sampler/kl"] = masked.mean_parts(jnp.expm1(-difference) + difference, mask)
    return Measures(means, {"sampler/max_difference": jnp.max(jnp.abs(difference))})


def _divergences(
    logprobs: Float[Array, "2 P G T"], exact: Float[Array, "2 P G T"], batch: Batch, mask: Bool[Array, "P G T"]
) -> dict[str, masked.Mean]:
    """Between the modes: exact, and the estimators k1 and k3, on the rollouts of the mode that comes first."""
    means: dict[str, masked.Mean] = {}
    for first, second, name in (
        (HIGH_ENTROPY, NORMAL, "high_entropy_to_normal"),
        (NORMAL, HIGH_ENTROPY, "normal_to_high_entropy"),
    ):
        own = mask & (batch.modes == first)[..., None]
        log_ratio = masked.where(own, logprobs[first] - logprobs[second])
        means[f"kl/{name}"] = masked.mean_parts(exact[first], own)
        means[f"kl_k1/{name}"] = masked.mean_parts(log_ratio, own)
        means[f"kl_k3/{name}"] = masked.mean_parts(jnp.expm1(-log_ratio) + log_ratio, own)
    return means
