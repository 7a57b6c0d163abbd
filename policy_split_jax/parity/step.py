"""`policy-split compare step`: one training step in PyTorch and in JAX, on the same rollouts, number by number."""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from policy_split_jax import config as settings
from policy_split_jax.config import OptimizerConfig, RunConfig
from policy_split_jax.model import huggingface, qwen3
from policy_split_jax.modes import HIGH_ENTROPY, NORMAL
from policy_split_jax.objective.advantages import normalized_bonus, raw_bonus
from policy_split_jax.objective.baselines import selection_noise
from policy_split_jax.padding import lengths, pad_right
from policy_split_jax.policy import Policy
from policy_split_jax.rollouts import Group, group_batch, shared_groups, shared_views
from policy_split_jax.training.batch import Batch, training_mask
from policy_split_jax.training.collate import SharedGroup
from policy_split_jax.training.loop import update_config
from policy_split_jax.training.optimizer import make_optimizer
from policy_split_jax.training.state import init_state
from policy_split_jax.training.update import Step, UpdateConfig, make_update, selection_key

ETA = 0.3
OPTIMIZER = OptimizerConfig(learning_rate=1e-3, weight_decay=0.01, gradient_clip=1.0)

UPDATES = int(settings.RELEASED["train"]["updates_per_step"])
"""The most updates that a variant's step has; the questions of a comparison must be divisible by it."""

# Shares and bands are larger than the papers', so that small batches have such tokens; two updates let clipping act.
_TWICE = {"train": {"updates_per_step": 2}}
VARIANTS: dict[str, dict[str, Any]] = {
    "paper": {},
    "released": {"preset": "released"},
    "grpo": {"objective": "grpo"} | _TWICE,
    "clip_higher": {"objective": "grpo", "loss": {"clip_high": 0.28}} | _TWICE,
    "forking_tokens": {"objective": "forking_tokens"},
    "clip_cov": {"objective": "clip_cov", "baseline": {"clip_cov": {"share": 0.05, "low": 0.1}}},
    "kl_cov": {"objective": "kl_cov", "baseline": {"kl_cov": {"share": 0.05}}} | _TWICE,
    "entropy_driven_advantage": {"objective": "entropy_driven_advantage"},
    "entropy_regularization": {"objective": "entropy_regularization"},
    "entropy_advantage": {"objective": "entropy_advantage"},
}

# Largest absolute differences that rounding explains. float32: sums of some hundred terms of size 1 to 10, those of the
# bonus divided by a deviation below 1; AdamW divides a gradient by its own size, which magnifies rounding where it is
# nearly zero, so that a parameter may differ by a tenth of an update. bfloat16 has 8 bits: 0.4 % of logits of size 10,
# layer for layer, and a ratio has four such log-probabilities. There AdamW's first updates turn with the sign of every
# small gradient: of a parameter's change an eighth may have the other sign, which makes 2·√⅛ of its norm.
# Of some hundred tokens one may be clipped on one side alone, which is a tenth of a gradient's norm.
TOLERANCES = {
    "float32": {
        "logits": 1e-4, "logprobs": 1e-4, "entropy": 1e-4, "bonus": 1e-3, "advantages": 1e-3, "ratio": 1e-4,
        "loss": 1e-5, "gradient norm (relative)": 1e-4, "parameter": 0.1 * OPTIMIZER.learning_rate,
    },
    "bfloat16": {
        "logits": 0.2, "logprobs": 0.2, "entropy": 0.1, "bonus": 0.3, "advantages": 0.1, "ratio": 0.5, "loss": 0.02,
        "gradient norm (relative)": 0.1, "parameter": 0.7,
    },
}  # fmt: skip


@dataclass(frozen=True)
class Difference:
    """One line of the table: absolute differences of one quantity."""

    name: str
    largest: float
    mean: float
    tolerance: float
    part: str = ""
    """Which parameter it is of."""

    @property
    def passes(self) -> bool:
        return self.largest <= self.tolerance


@dataclass(frozen=True)
class Comparison:
    """One variant of the step in one type of activations."""

    variant: str
    dtype: str
    differences: Sequence[Difference]

    @property
    def passes(self) -> bool:
        return all(difference.passes for difference in self.differences)


def variant_config(variant: str, questions: int, per_mode: int) -> RunConfig:
    """The settings of a run of this variant."""
    tree = settings.with_preset({"name": variant} | VARIANTS[variant])
    config = settings.from_dict(RunConfig, tree | {"rollout": {"questions_per_step": questions}}, variant)
    return replace(
        config,
        advantage=replace(config.advantage, eta=ETA),
        rollout=replace(config.rollout, rollouts_per_mode=per_mode),
        optimizer=OPTIMIZER,
    )


def compare(
    policy: Policy, params: qwen3.Params, groups: Sequence[Group], variant: str, dtype: str, steps: int
) -> Comparison:
    """`steps` training steps of one variant on the same rollouts, in PyTorch and in JAX.

    All rollouts must be graded, and half of them be of either mode; a variant that samples in the normal mode alone
    takes all for such. What is compared of steps is the parameters after the first and the last; all else is of the
    first.
    """
    config = variant_config(variant, len(groups), len(groups[0].rollouts) // 2)
    groups = [replace(group, modes=_sampled_by(group.modes, config.modes)) for group in groups]
    update = replace(update_config(config), dtype=dtype)
    longest = 2 * max(len(rollout.tokens) for group in groups for rollout in group.rollouts)
    shared = shared_groups(policy, groups, config.sharing, longest)
    rollouts = _rollouts(groups, shared, config.modes)
    ours = _Ours(policy.config, update, _batch(groups, shared, longest), params)
    theirs = _Theirs(policy, update, rollouts, params)

    found = dict(ours.before(rollouts))
    record = theirs.step(ours.noise(rollouts))
    metrics = ours.step()
    differences = [*_before(found, record, dtype), *_of_step(metrics, record, dtype)]
    differences.append(_by_tokens("ratio", ours.ratio(rollouts), theirs.ratio(record), dtype))
    differences += _parameters(params, theirs.params(), ours.state.params, 1, dtype)
    for _ in range(steps - 1):
        theirs.step(ours.noise(rollouts))
        ours.step()
    if steps > 1:
        differences += _parameters(params, theirs.params(), ours.state.params, steps, dtype)
    return Comparison(variant, dtype, differences)


def _sampled_by(modes: Sequence[int], sampling: Sequence[int]) -> list[int]:
    return [mode if mode in sampling else sampling[0] for mode in modes]


class _Theirs:
    """The PyTorch side: transformers' Qwen3 in float32 with the same weights, and the step as its equations say."""

    def __init__(self, policy: Policy, config: UpdateConfig, rollouts: Any, params: qwen3.Params):
        import torch
        from transformers import AutoModelForCausalLM

        self._config, self._rollouts, self._model_config = config, rollouts, policy.config
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "model"
            huggingface.save_model(folder, params, policy.config, dtype="float32")
            model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32", attn_implementation="eager")
        self._model = model.eval()
        self._half = config.dtype == "bfloat16"
        self._optimizer = torch.optim.AdamW(
            model.parameters(),
            lr=OPTIMIZER.learning_rate,
            betas=(OPTIMIZER.b1, OPTIMIZER.b2),
            weight_decay=OPTIMIZER.weight_decay,
        )

    def step(self, noise: Sequence[Mapping[Any, Any]]) -> Any:
        from policy_split_jax.parity.torch_step import step

        return step(
            self._model,
            self._optimizer,
            self._rollouts,
            self._config,
            eta=ETA,
            gradient_clip=OPTIMIZER.gradient_clip,
            noise=noise,
            half=self._half,
        )

    def ratio(self, record: Any) -> dict[Any, np.ndarray]:
        """Of the parameters now against those before the recorded step."""
        from policy_split_jax.parity.torch_step import score

        def of(place: Any) -> np.ndarray:
            now = score(self._model, self._rollouts.samples[place], self._config.temperature, self._half)
            return (now.logprobs - record.logprobs[place]).exp().detach().numpy()

        return {place: of(place) for place in record.logprobs}

    def params(self) -> qwen3.Params:
        with tempfile.TemporaryDirectory() as scratch:
            self._model.save_pretrained(scratch)
            return huggingface.load_params(Path(scratch), self._model_config)


class _Ours:
    """The JAX side: the step as training runs it, and its parts before the first update."""

    def __init__(self, model: qwen3.Qwen3Config, config: UpdateConfig, batch: Batch, params: qwen3.Params):
        optimizer = make_optimizer(OPTIMIZER)
        self._parts = Step(model, config, optimizer, None, None)
        self._update = make_update(model, config, optimizer)
        self._batch = batch
        # The update takes its state's arrays for itself.
        self.state = init_state(jax.tree.map(jnp.copy, params), optimizer, 0, ETA)

    def step(self) -> dict[str, float]:
        self.state, metrics = self._update(self.state, self._batch)
        return {name: float(value) for name, value in metrics.items()}

    def before(self, rollouts: Any) -> Iterator[tuple[str, Mapping[Any, np.ndarray]]]:
        """What there is before the first update, each as the values of every sequence's tokens."""
        batch, config = self._batch, self._parts.config
        scores = jax.jit(self._parts.score)(self.state.params, batch, None)
        terms = jax.jit(partial(self._parts.terms, number=0))(scores, batch, self.state)
        self._old = scores.logprobs
        yield "logits", _logits(self.state.params, self._parts, rollouts)
        for name, values in (
            ("logprobs", scores.logprobs),
            ("entropy", scores.entropy),
            ("advantages", terms.advantages),
        ):
            yield name, _by_place(values, rollouts)
        if config.objective == "policy_split":
            yield "bonus", _by_place(_bonus(scores.logprobs, batch, config), rollouts)

    def ratio(self, rollouts: Any) -> Mapping[Any, np.ndarray]:
        """Of the parameters after a step against those before it."""
        scores = jax.jit(self._parts.score)(self.state.params, self._batch, None)
        return _by_place(jnp.exp(scores.logprobs - self._old), rollouts)

    def noise(self, rollouts: Any) -> list[Mapping[Any, Any]]:
        """What the next step's updates choose tokens by, where they do."""
        import torch

        if self._parts.config.objective != "clip_cov":
            return []
        updates = self._parts.config.updates_per_step
        questions = self._batch.rewards.shape[0] // updates
        shape = (questions, *self._batch.responses.shape[1:])
        each = [selection_noise(selection_key(self.state, number), shape) for number in range(updates)]
        values = _by_place(jnp.concatenate(each)[None], rollouts)
        return [
            {place: torch.tensor(row) for place, row in values.items() if place[1] // questions == number}
            for number in range(updates)
        ]


def _bonus(logprobs: Float[Array, "2 P G T"], batch: Batch, config: UpdateConfig) -> Float[Array, "2 P G T"]:
    """B of both modes."""
    mask = jnp.broadcast_to(training_mask(batch), logprobs.shape)
    masked = jnp.where(mask, logprobs, 0.0)
    modes = ((NORMAL, HIGH_ENTROPY), (HIGH_ENTROPY, NORMAL))
    raw = (raw_bonus(masked[own], masked[other], config.advantage.alpha) for own, other in modes)
    return jnp.stack([normalized_bonus(bonus, mask[at], config.advantage.normalize) for at, bonus in enumerate(raw)])


def _by_place(values: Float[Array, "M P G T"], rollouts: Any) -> dict[Any, np.ndarray]:
    """The values of each sequence's tokens, without padding."""
    host = np.asarray(values)
    return {place: host[place][: len(sample.response)] for place, sample in rollouts.samples.items()}


def _logits(params: qwen3.Params, parts: Step, rollouts: Any) -> dict[Any, np.ndarray]:
    """[t, V] of each sequence; for comparisons only, since nothing else needs whole logits."""
    samples = list(rollouts.samples.values())
    rows = [[*sample.prompt, *sample.response] for sample in samples]
    tokens = jnp.asarray(pad_right(rows, max(map(len, rows))))
    valid = jnp.arange(tokens.shape[1]) < jnp.asarray(lengths(rows))[:, None]

    @jax.jit
    def run(params: qwen3.Params) -> Float[Array, "B T V"]:
        dtype = jnp.dtype(parts.config.dtype)
        hidden = qwen3.forward(params, tokens, config=parts.model, valid=valid, dtype=dtype)
        return qwen3.logits(params, hidden, parts.model) / parts.config.temperature

    found = np.asarray(run(params))
    return {
        place: found[at, len(sample.prompt) - 1 : len(rows[at]) - 1]
        for at, (place, sample) in enumerate(rollouts.samples.items())
    }


def _batch(groups: Sequence[Group], shared: Sequence[SharedGroup] | None, longest: int) -> Batch:
    return group_batch(
        groups,
        max_prompt_tokens=max(len(prompt) for pair in _prompts(groups, shared) for prompt in pair),
        max_new_tokens=longest,
        shared=shared,
    )


def _prompts(groups: Sequence[Group], shared: Sequence[SharedGroup] | None) -> list[Any]:
    return [*(group.prompts for group in groups), *(group.prompts for group in shared or ())]


def _rollouts(groups: Sequence[Group], shared: Sequence[SharedGroup] | None, modes: Sequence[int]) -> Any:
    """The same rollouts as lists of token ids, for PyTorch."""
    from policy_split_jax.parity.torch_step import Rollouts, Sample

    views = shared_views(groups, shared)
    samples = {}
    for mode in modes:
        for p, (group, view) in enumerate(zip(groups, views, strict=True)):
            for i, rollout in enumerate(group.rollouts):
                own = group.modes[i] == mode
                prompt = group.prompts[mode] if own else view.prompts[mode]
                tokens = rollout.tokens if own else view.responses[i]
                samples[mode, p, i] = Sample(list(prompt), [int(token) for token in tokens])
    rewards = [[float(grade.score or 0.0) for grade in group.grades] for group in groups]
    return Rollouts(samples, [group.modes for group in groups], rewards)


def _before(ours: Mapping[str, Mapping[Any, Any]], record: Any, dtype: str) -> Iterator[Difference]:
    """What there is before the first update."""
    for name in ("logits", "logprobs", "entropy", "bonus", "advantages"):
        if theirs := getattr(record, name):
            yield _by_tokens(name, ours[name], theirs, dtype)


def _of_step(metrics: Mapping[str, float], record: Any, dtype: str) -> Iterator[Difference]:
    """Means over the step's updates."""
    yield _difference("loss", np.mean(record.losses), metrics["loss"], TOLERANCES[dtype]["loss"])
    name = "gradient norm (relative)"
    yield _difference(name, 1.0, metrics["grad_norm"] / np.mean(record.gradient_norms), TOLERANCES[dtype][name])


def _by_tokens(name: str, ours: Mapping[Any, Any], theirs: Mapping[Any, Any], dtype: str) -> Difference:
    values, expected = (np.concatenate([np.asarray(side[place]) for place in theirs]) for side in (ours, theirs))
    return _difference(name, expected, values, TOLERANCES[dtype][name])


def _parameters(
    start: qwen3.Params, theirs: qwen3.Params, ours: qwen3.Params, steps: int, dtype: str
) -> Iterator[Difference]:
    """Of every parameter; those of all layers are one."""
    name = f"parameters after {steps} step{'s' if steps > 1 else ''}"
    tolerance = TOLERANCES[dtype]["parameter"]
    named = zip(jax.tree.leaves_with_path(ours), jax.tree.leaves(start), jax.tree.leaves(theirs), strict=True)
    for (path, own), old, other in named:
        part = jax.tree_util.keystr(path, simple=True, separator="/")
        if dtype == "float32":
            yield _difference(name, other, own, tolerance, part)
        else:
            moved, apart = (np.linalg.norm(np.asarray(change)) for change in (other - old, own - other))
            yield _difference(f"{name} (of their change)", 0.0, apart / moved, tolerance, part)


def _difference(name: str, theirs: Any, ours: Any, tolerance: float, part: str = "") -> Difference:
    values = np.abs(np.asarray(theirs, np.float64) - np.asarray(ours, np.float64))
    # A NaN is no small difference.
    values = np.where(np.isnan(values), np.inf, values)
    return Difference(name, float(values.max()), float(values.mean()), tolerance, part)
