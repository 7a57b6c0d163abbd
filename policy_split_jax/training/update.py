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
from jaxtyping import Array, Bool, Float, Key

from policy_split_jax import masked
from policy_split_jax.model import qwen3
from policy_split_jax.model.sharding import compiler_options, pinned
from policy_split_jax.modes import HIGH_ENTROPY, MODE_NAMES, NORMAL
from policy_split_jax.objective.advantages import (
    AdvantageConfig,
    correctness_advantages,
    dual_mode_advantages,
    importance_weights,
)
from policy_split_jax.objective.baselines import (
    WHOLE_BATCH,
    BaselineConfig,
    Objective,
    Terms,
    baseline_terms,
    trained_modes,
)
from policy_split_jax.objective.eta import EtaConfig, next_eta
from policy_split_jax.objective.losses import Aggregate, Metrics, token_losses, token_weights
from policy_split_jax.objective.scorer import Places, TokenScores, score_rollouts
from policy_split_jax.training.accumulate import Microbatches, accumulate_gradients, equal_parts, split_batch, take
from policy_split_jax.training.batch import Batch, Packing, own_rollouts, token_mask, training_mask
from policy_split_jax.training.quarters import Sequences, in_quarters
from policy_split_jax.training.state import TrainState, state_shardings

Update = Callable[..., tuple[TrainState, Metrics]]
_LARGEST = 2**32 - 1


@dataclass(frozen=True)
class UpdateConfig:
    """What the update needs to know."""

    objective: Objective = "policy_split"
    """All others train the normal mode alone, on rollouts that it sampled."""
    advantage: AdvantageConfig = field(default_factory=AdvantageConfig)
    baseline: BaselineConfig = field(default_factory=BaselineConfig)
    eta: EtaConfig = field(default_factory=EtaConfig)
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None
    aggregate: Aggregate = "token_mean"
    max_new_tokens: int = 0
    """What the aggregate `constant` divides by: a batch's width changes with its longest response."""
    temperature: float = 1.0
    share: bool = True
    """Whether a mode trains on the rollouts that the other sampled."""
    importance_cap: float = 0.0
    """Largest importance weight of a token of such a rollout; 0 is no weights."""
    updates_per_step: int = 1
    update_order: Literal["questions", "quarters"] = "questions"
    """What an update of several is made of: whole questions, or sequences in the order of `quarters.py`."""
    microbatch_questions: int = 0
    """0: all questions of an update at once."""
    score_chunk: int = 256
    dtype: str = "float32"
    remat: str = "none"
    two_pass: bool = False
    """Score first even where there is no need to; the fused path gives the same to rounding."""

    def __post_init__(self) -> None:
        if self.aggregate == "constant" and self.max_new_tokens < 1:
            raise ValueError("UpdateConfig: the aggregate constant needs max_new_tokens")

    @property
    def contexts(self) -> int:
        """How many modes are trained."""
        return len(trained_modes(self.objective))

    @property
    def fused(self) -> bool:
        """Whether the update's own forward pass is all the scoring that there is."""
        whole = self.objective in WHOLE_BATCH or self.update_order == "quarters"
        return self.updates_per_step == 1 and not self.two_pass and not whole


class Fixed(NamedTuple):
    """What was computed before the first update of a two-pass step; arrays begin with P."""

    old_logprobs: Float[Array, "P M G T"]
    terms: Terms


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


def _swap(values: Any) -> Any:
    """[M, P, …] to [P, M, …] and back, of every array: microbatches are cut along P."""
    return jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 1, 0), values)


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
    step = Step(model, config, optimizer, mesh, shardings)

    @partial(jax.jit, donate_argnums=0, compiler_options=compiler_options(mesh))
    def update(state: TrainState, batch: Batch, packing: Packing | None = None) -> tuple[TrainState, Metrics]:
        if config.fused:
            only = None if packing is None else jax.tree.map(lambda leaf: leaf[0], packing)
            state, metrics = step.one_update(state, 0, batch, None, only)
        elif config.update_order == "quarters":
            state, metrics = step.by_quarters(state, batch)
        else:
            state, metrics = step.two_pass(state, batch, packing)
        eta = state.eta
        if config.objective == "policy_split":
            metrics["eta"] = eta.eta
            divergence = metrics["kl/high_entropy_to_normal"]
            # Where no high-entropy rollout was graded, nothing was measured.
            measured = jnp.any(token_mask(batch) & (batch.modes == HIGH_ENTROPY)[..., None]) & jnp.isfinite(divergence)
            moved = next_eta(eta, divergence, config.eta)
            eta = jax.tree.map(partial(jnp.where, measured), moved, eta)
        return pinned(state._replace(step=state.step + 1, eta=eta), shardings), metrics

    return update


@dataclass(frozen=True)
class Step:
    """The parts of an update, as functions of arrays; what it holds is static."""

    model: qwen3.Qwen3Config
    config: UpdateConfig
    optimizer: optax.GradientTransformation
    mesh: Mesh | None
    shardings: TrainState | None

    def score(self, params: qwen3.Params, batch: Batch, places: Places | None) -> TokenScores:
        """Every rollout under every mode that is trained, as that mode trains on it."""
        contexts = self.config.contexts
        seen = (
            batch.prompts[:, :contexts],
            batch.prompt_lengths[:, :contexts],
            batch.responses,
            batch.response_lengths,
        )
        own = self.score_rollouts(params, *seen, places=places, with_kl=contexts == 2)
        if batch.shared is None:
            return own
        return as_trained(own, self.score_rollouts(params, *batch.shared), batch)

    def score_rollouts(self, params: qwen3.Params, *sequences: Array, **chosen: Any) -> TokenScores:
        config = self.config
        return score_rollouts(
            params,
            *sequences,
            config=self.model,
            dtype=jnp.dtype(config.dtype),
            remat=config.remat,
            temperature=config.temperature,
            chunk=config.score_chunk,
            mesh=self.mesh,
            **chosen,
        )

    def terms(self, scores: TokenScores, batch: Batch, state: TrainState, number: Array | int) -> Terms:
        """Of scores at the time of sampling [M, P, G, T]; `number` counts the step's updates."""
        config = self.config
        if config.objective == "policy_split":
            seen = scores.logprobs if config.advantage.surprise == "neg_logprob" else -scores.entropy
            moved = replace(config.advantage, eta=state.eta.eta)
            valid = batch.graded if config.share else batch.graded & own_rollouts(batch)[..., 0]
            advantages = dual_mode_advantages(seen, batch.rewards, training_mask(batch), moved, valid)
            if config.importance_cap:
                weights = importance_weights(scores.logprobs, batch.modes, config.importance_cap)
                advantages = masked.where(self.mask(batch), advantages * weights)
            return Terms(advantages)
        outcome = correctness_advantages(batch.rewards, batch.graded, config.advantage.norm_by_std)
        key = selection_key(state, number)
        terms = baseline_terms(
            config.objective, outcome, scores.logprobs[0], scores.entropy[0], token_mask(batch), config.baseline, key
        )
        return jax.tree.map(lambda leaf: leaf[None], terms)

    def mask(self, batch: Batch) -> Bool[Array, "#M P G T"]:
        """The tokens that each mode trains on."""
        mask = training_mask(batch)
        return mask if self.config.share else mask & own_rollouts(batch)

    def token_losses(self, scores: TokenScores, old: Array, terms: Terms, mask: Array) -> tuple[Array, Array]:
        """Each token's loss, and where it was clipped; zeros at padding."""
        config = self.config
        # KL-Cov penalises in place of clipping.
        low, high = (1.0, jnp.inf) if config.objective == "kl_cov" else (config.clip_low, config.clip_high)
        logprobs, old = masked.where(mask, scores.logprobs), masked.where(mask, old)
        losses, measures = token_losses(
            logprobs, old, terms.advantages, clip_low=low, clip_high=high, dual_clip=config.dual_clip
        )
        if terms.kept is not None:
            losses = masked.where(terms.kept, losses)
        if terms.penalised is not None:
            apart = logprobs - old
            # |x| whose slope is 0 where nothing has moved; that of jnp.abs is 1.
            moved = masked.where(terms.penalised, jnp.sign(apart) * apart)
            losses = losses + config.baseline.kl_cov.coefficient * moved
        if config.objective == "entropy_regularization":
            losses = losses - config.baseline.entropy_regularization.coefficient * masked.where(mask, scores.entropy)
        return losses, measures["clip_fraction"]

    def loss(
        self, state: TrainState, number: Array | int, params: qwen3.Params, part: Any
    ) -> tuple[Float[Array, ""], Measures]:
        """Of a microbatch of questions, in the step's update of this number."""
        batch, weights, fixed, places = part
        # Said of the parameters, it holds for their gradient too.
        scores = self.score(pinned(params, self.shardings and self.shardings.params), batch, places)
        if fixed is None:
            detached = jax.lax.stop_gradient(scores)
            old, terms = detached.logprobs, self.terms(detached, batch, state, 0)
        else:
            old, terms = _swap(fixed)
            # Nothing has moved before the first update. Two programs' rounding would give |log ρ| a gradient there.
            old = jnp.where(number == 0, jax.lax.stop_gradient(scores.logprobs), old)
        mask = self.mask(batch)
        losses, clipped = self.token_losses(scores, old, terms, mask)
        record = TokenRecord(scores, old, terms.advantages, clipped)
        return masked.total(losses * _swap(weights), mask), measure(jax.lax.stop_gradient(record), batch, mask)

    def weights(self, batch: Batch) -> Float[Array, "P #M G T"]:
        """Of every token in the update's loss."""
        mask = self.mask(batch)
        every = jnp.broadcast_to(mask, (self.config.contexts, *mask.shape[1:]))
        return _swap(token_weights(every, self.config.aggregate, self.config.max_new_tokens)[: len(mask)])

    def one_update(
        self, state: TrainState, number: Array | int, batch: Batch, fixed: Fixed | None, packing: Packing | None
    ) -> tuple[TrainState, Metrics]:
        """On whole questions."""
        (value, measures), gradient = accumulate_gradients(
            partial(self.loss, state, number),
            state.params,
            (batch, self.weights(batch), fixed, packing and packing.places),
            self.microbatches(batch.rewards.shape[0], packing),
            joined,
        )
        state, metrics = self.moved(state, value, gradient, sampled_soundly(batch))
        return state, metrics | measures.values()

    def moved(
        self, state: TrainState, value: Array, gradient: Any, sound: Bool[Array, ""]
    ) -> tuple[TrainState, Metrics]:
        """The state after an update with this loss and gradient: as it was, if not all of it is finite or `sound`."""
        norm = optax.tree.norm(gradient)
        sound = sound & jnp.isfinite(value) & jnp.isfinite(norm)
        changes, opt_state = self.optimizer.update(gradient, state.opt_state, state.params)
        new = optax.apply_updates(state.params, changes), opt_state
        params, opt_state = jax.tree.map(partial(jnp.where, sound), new, (state.params, state.opt_state))
        metrics = {"loss": value, "grad_norm": norm, "skipped": 1.0 - sound}
        return state._replace(params=params, opt_state=opt_state), metrics

    def microbatches(self, questions: int, packing: Packing | None) -> Microbatches:
        if packing is not None:
            return packing.microbatches
        return equal_parts(questions, questions // (self.config.microbatch_questions or questions))

    def score_first(self, state: TrainState, batch: Batch, packing: Packing | None) -> TokenScores:
        """The scores of all questions of a batch, a microbatch at a time."""
        chosen = self.microbatches(batch.rewards.shape[0], packing)

        def scored(at: Array | int) -> Any:
            members = chosen.members[at]
            places = packing and take(packing.places, members)
            return members, _swap(self.score(state.params, take(batch, members), places))

        def part(at: Array, found: Any) -> Any:
            members, scores = scored(at)
            return jax.tree.map(lambda all_, some: all_.at[members].set(some, mode="drop"), found, scores)

        shape = jax.eval_shape(lambda: scored(0)[1])
        zeros = jax.tree.map(lambda leaf: jnp.zeros((batch.rewards.shape[0], *leaf.shape[1:]), leaf.dtype), shape)
        return _swap(jax.lax.fori_loop(0, chosen.used, part, zeros))

    def two_pass(self, state: TrainState, batch: Batch, packing: Packing | None) -> tuple[TrainState, Metrics]:
        """Several updates, each on its share of the questions; all are scored before the first."""
        numbers = jnp.arange(self.config.updates_per_step)
        parts = (split_batch(batch, self.config.updates_per_step), packing)

        def fix(part: Any) -> Fixed:
            number, (batch, packing) = part
            scores = self.score_first(state, batch, packing)
            return _swap(Fixed(scores.logprobs, self.terms(scores, batch, state, number)))

        fixed = jax.lax.map(fix, (numbers, parts))

        def one(state: TrainState, part: Any) -> tuple[TrainState, Metrics]:
            number, (batch, packing), fixed = part
            return self.one_update(state, number, batch, fixed, packing)

        state, history = jax.lax.scan(one, state, (numbers, parts, fixed))
        metrics = jax.tree.map(jnp.mean, history)
        return state, metrics | {"sampler/max_difference": jnp.max(history["sampler/max_difference"])}

    def by_quarters(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        """Several updates, each on its share of the sequences (`quarters.py`); all are scored before the first."""
        updates, questions = self.config.updates_per_step, batch.rewards.shape[0]
        scores = self.score_first(state, batch, None)
        terms = self.terms(scores, batch, state, 0)
        parts = split_batch(in_quarters(batch, scores.logprobs, terms.advantages), updates)
        count = len(self.microbatches(questions // updates, None).members)
        microbatches = equal_parts(parts.modes.shape[1], count)

        def one(state: TrainState, part: Sequences) -> tuple[TrainState, Any]:
            weights = token_weights(part.mask, self.config.aggregate, self.config.max_new_tokens)
            (value, measures), gradient = accumulate_gradients(
                self.sequence_loss, state.params, (part, weights), microbatches, joined
            )
            state, metrics = self.moved(state, value, gradient, sampled_soundly(batch))
            return state, (metrics, measures)

        state, (history, clipped) = jax.lax.scan(one, state, parts)
        # Everything but the clipping is of the policy that sampled.
        record = TokenRecord(scores, scores.logprobs, terms.advantages, jnp.zeros(scores.logprobs.shape))
        means = {name: masked.Mean(*map(jnp.sum, mean)) for name, mean in clipped.means.items()}
        found = measure(record, batch, self.mask(batch)).values() | Measures(means, {}).values()
        return state, jax.tree.map(jnp.mean, history) | found

    def sequence_loss(self, params: qwen3.Params, part: Any) -> tuple[Float[Array, ""], Measures]:
        """Of a microbatch of sequences, each under one mode."""
        each, weights = part
        params = pinned(params, self.shardings and self.shardings.params)
        scores = self.score_rollouts(params, each.prompts, each.prompt_lengths, each.responses, each.response_lengths)
        terms = Terms(each.advantages[None])
        losses, clipped = self.token_losses(scores, each.old_logprobs[None], terms, each.mask[None])
        means = {
            f"clip_fraction/{name}": masked.mean_parts(clipped[0], each.mask & (each.modes == mode)[..., None])
            for mode, name in enumerate(MODE_NAMES)
        }
        return masked.total(losses[0] * weights, each.mask), Measures(means, {})


def sampled_soundly(batch: Batch) -> Bool[Array, ""]:
    """Whether every log-probability of the sampler is a number."""
    return jnp.all(jnp.isfinite(masked.where(token_mask(batch), batch.sampler_logprobs)))


def as_trained(own: TokenScores, other: TokenScores, batch: Batch) -> TokenScores:
    """Of scores of what was sampled and of what is shared, those of what each mode trains on.

    Divergences are of what was sampled.
    """
    mine, mask = own_rollouts(batch), training_mask(batch)
    # Where one of the two is longer, the bonus meets nothing of the other.
    logprobs = masked.where(mask, jnp.where(mine, own.logprobs, other.logprobs))
    return TokenScores(logprobs, masked.where(mask, jnp.where(mine, own.entropy, other.entropy)), own.kl)


def selection_key(state: TrainState, number: Array | int) -> Key[Array, ""]:
    """What a step's update of this number chooses tokens with."""
    # Rollouts' keys fold small numbers into the step's, those of questions.
    return jax.random.fold_in(
        jax.random.fold_in(jax.random.fold_in(state.key, state.step), jnp.uint32(_LARGEST)), number
    )


def measure(record: TokenRecord, batch: Batch, trained: Bool[Array, "#M P G T"]) -> Measures:
    """What is measured of the tokens of a microbatch, of which each mode trains on some; means over tokens, nats."""
    mask = token_mask(batch)
    logprobs = record.scores.logprobs
    trained = jnp.broadcast_to(trained, logprobs.shape)
    means: dict[str, masked.Mean] = {}
    for mode, name in enumerate(MODE_NAMES[: len(logprobs)]):
        own = mask & (batch.modes == mode)[..., None]
        means[f"entropy/{name}"] = masked.mean_parts(record.scores.entropy[mode], own)
        means[f"neg_logprob/{name}"] = masked.mean_parts(-logprobs[mode], own)
        means[f"advantage_abs/{name}"] = masked.mean_parts(jnp.abs(record.advantages[mode]), trained[mode])
        means[f"clip_fraction/{name}"] = masked.mean_parts(record.clipped[mode], trained[mode])
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
    """Between the modes, on the rollouts of the mode that comes first: exact, and the estimators k1 and k3 where both
    modes were scored on what was sampled."""
    means: dict[str, masked.Mean] = {}
    for first, second, name in (
        (HIGH_ENTROPY, NORMAL, "high_entropy_to_normal"),
        (NORMAL, HIGH_ENTROPY, "normal_to_high_entropy"),
    ):
        own = mask & (batch.modes == first)[..., None]
        means[f"kl/{name}"] = masked.mean_parts(exact[first], own)
        if batch.shared is None:
            log_ratio = masked.where(own, logprobs[first] - logprobs[second])
            means[f"kl_k1/{name}"] = masked.mean_parts(log_ratio, own)
            means[f"kl_k3/{name}"] = masked.mean_parts(jnp.expm1(-log_ratio) + log_ratio, own)
    return means
