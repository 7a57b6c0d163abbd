"""What a setting of verl's PPO and GRPO trainer is here.

What the settings mean: https://verl.readthedocs.io/en/latest/examples/config.html and, for the losses,
`verl/trainer/ppo/core_algos.py` in https://github.com/volcengine/verl.
"""

import math
from collections.abc import Callable, Mapping
from pathlib import PurePosixPath
from typing import Any, NamedTuple


class Converted(NamedTuple):
    """Our dotted keys with their values."""

    settings: dict[str, Any]
    remark: str = ""


class WithoutEffect(NamedTuple):
    """There is nothing to set."""

    reason: str


class Unsupported(NamedTuple):
    """The value cannot be honoured."""

    reason: str
    remark: str = ""


Run = Mapping[str, Any]
"""verl's settings of a run as far as they are known."""
Outcome = Converted | WithoutEffect | Unsupported
Rule = Callable[[Any, Run], Outcome]
"""Of a value and the run that it belongs to. Raises ValueError, with what it must be, for a value that is none."""

ACTOR, MODEL, ROLLOUT = (f"actor_rollout_ref.{part}." for part in ("actor", "model", "rollout"))
OPTIM, POLICY_LOSS, VALIDATION = ACTOR + "optim.", ACTOR + "policy_loss.", ROLLOUT + "val_kwargs."
REWARD = "custom_reward_function."

_SCHEDULE = (
    "verl's learning rate moves once a step and starts at 0; here each update moves it, and the first one learns"
)
NO_REFERENCE = "there is no reference model and no KL to one"


def real(value: Any) -> float:
    """A finite number."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        raise ValueError("it must be a number") from None
    if isinstance(value, bool) or not math.isfinite(number):
        raise ValueError("it must be a number")
    return number


def _number(words: str, holds: Callable[[float], bool]) -> Callable[[Any], float]:
    def read(value: Any) -> float:
        if not holds(number := real(value)):
            raise ValueError(f"it must be {words}")
        return number

    return read


not_negative = _number("at least 0", lambda number: number >= 0)
positive = _number("above 0", lambda number: number > 0)
share = _number("above 0 and at most 1", lambda number: 0 < number <= 1)
_fraction = _number("from 0 to 1", lambda number: 0 <= number <= 1)
below_1 = _number("from 0 to below 1", lambda number: 0 <= number < 1)


def whole(least: int, most: int | None = None) -> Callable[[Any], int]:
    """What reads whole numbers of this range."""

    def read(value: Any) -> int:
        number = real(value)
        if number != int(number) or number < least or (most is not None and number > most):
            raise ValueError(f"it must be a whole number from {least}" + (f" to {most}" if most else " on"))
        return int(number)

    return read


def flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("it must be true or false")
    return value


def text(value: Any) -> str:
    if value is None or isinstance(value, list | dict) or not str(value):
        raise ValueError("it must be a text")
    return str(value)


def one_file(value: Any) -> str:
    """A path, or a list of one."""
    files = value if isinstance(value, list) else [value]
    if len(files) != 1:
        raise ValueError(f"these are {len(files)} files; join them into one")
    return text(files[0])


def betas(value: Any, run: Run) -> Converted:
    if not isinstance(value, list) or len(value) != 2:
        raise ValueError("it must be a list of two numbers")
    return Converted({"optimizer.b1": below_1(value[0]), "optimizer.b2": below_1(value[1])})


def top_k(value: Any) -> int:
    """0 is off here, -1 in verl's samplers."""
    return 0 if value == -1 else whole(0)(value)


def to(ours: str, read: Callable[[Any], Any], remark: str = "") -> Rule:
    """The same setting under another name."""
    return lambda value, run: Converted({ours: read(value)}, remark)


def unless_null(reason: str, rule: Rule) -> Rule:
    """`rule`, but nothing to set for null."""
    return lambda value, run: WithoutEffect(reason) if value is None else rule(value, run)


def nothing(reason: str) -> Rule:
    """There is nothing to set, whatever the value."""
    return lambda value, run: WithoutEffect(reason)


def only(accepted: tuple[Any, ...], otherwise: str, reason: str = "the same here") -> Rule:
    """Nothing to set for these values; others are unsupported."""
    return lambda value, run: WithoutEffect(reason) if value in accepted else Unsupported(otherwise)


def _updates(run: Run) -> int:
    """Updates of a step; 1 where that is not known."""
    try:
        settings = mini_batch(run.get(ACTOR + "ppo_mini_batch_size"), run)
    except ValueError:
        return 1
    return settings.settings["train.updates_per_step"]


def mini_batch(value: Any, run: Run) -> Converted:
    """Both count questions; their rollouts follow."""
    mini, batch = whole(1)(value), whole(1)(run.get("data.train_batch_size"))
    if batch % mini:
        raise ValueError(f"it must divide data.train_batch_size, which is {batch}")
    remark = (
        "verl's micro-batches are not converted: all questions of an update are computed at once unless "
        "train.microbatch_questions or train.microbatch_rows is set"
    )
    return Converted({"train.updates_per_step": batch // mini}, remark)


def rollouts(value: Any, run: Run) -> Converted:
    """G, of one mode or of both."""
    rollouts = whole(1)(value)
    if rollouts % 2:
        raise ValueError("it must be even: rollout.rollouts_per_mode is half of it")
    return Converted({"rollout.rollouts_per_mode": rollouts // 2})


def _total_steps(run: Run) -> int | None:
    total = run.get("trainer.total_training_steps")
    return None if total is None else whole(1)(total)


def epochs(value: Any, run: Run) -> WithoutEffect | Unsupported:
    """verl drops the last, smaller batch of an epoch."""
    if _total_steps(run) is not None:
        return WithoutEffect("trainer.total_training_steps counts")
    batch = run.get("data.train_batch_size")
    return Unsupported(f"runs are as long as train.steps: set it to {value} x (number of questions // {batch})")


def truncation(value: Any, run: Run) -> WithoutEffect | Unsupported:
    if value == "error" or run.get("data.filter_overlong_prompts") is True:
        return WithoutEffect("rollout.long_prompts decides")
    return Unsupported("prompts are never truncated; rollout.long_prompts=skip leaves the long ones out")


def _warmup_steps(run: Run) -> int | None:
    """Steps of verl's warm-up; None where they are a share of an unknown length."""
    steps = run.get(OPTIM + "lr_warmup_steps")
    if steps is not None and real(steps) >= 0:
        return whole(0)(steps)
    ratio, total = _fraction(run.get(OPTIM + "lr_warmup_steps_ratio") or 0), _total_steps(run)
    if not ratio:
        return 0
    return None if total is None else int(ratio * total)


def warmup(value: Any, run: Run) -> Converted | WithoutEffect:
    if value is None or real(value) < 0:
        return WithoutEffect("lr_warmup_steps_ratio counts")
    return _warmed(whole(0)(value), run)


def warmup_ratio(value: Any, run: Run) -> Outcome:
    steps = run.get(OPTIM + "lr_warmup_steps")
    if steps is not None and real(steps) >= 0:
        return WithoutEffect("lr_warmup_steps counts")
    if not _fraction(value or 0):
        return WithoutEffect("no warm-up")
    if (steps := _warmup_steps(run)) is None:
        return Unsupported(
            "a share of trainer.total_training_steps, which is not given",
            f"optimizer.warmup_steps counts updates: set it to {value} x train.steps x {_updates(run)}",
        )
    return _warmed(steps, run)


def _warmed(steps: int, run: Run) -> Converted:
    return Converted({"optimizer.warmup_steps": steps * _updates(run)}, _SCHEDULE if steps else "")


def scheduler(value: Any, run: Run) -> Outcome:
    """verl's cosine ends with the run; ours has a length of its own."""
    if value == "constant":
        return Converted({"optimizer.decay": "constant"})
    if value != "cosine":
        raise ValueError("it must be constant or cosine")
    total, warmup = _total_steps(run), _warmup_steps(run)
    if total is None or warmup is None:
        return Unsupported(
            "its length is trainer.total_training_steps, which is not given",
            "optimizer.decay_steps counts updates: set it, with optimizer.decay=cosine, to "
            f"(train.steps - steps of the warm-up) x {_updates(run)}",
        )
    if total <= warmup:
        raise ValueError("the warm-up leaves no step for the decay")
    decay = {"decay": "cosine", "decay_steps": (total - warmup) * _updates(run), "final_fraction": lowest(run)}
    return Converted({f"optimizer.{key}": setting for key, setting in decay.items()}, _SCHEDULE)


def newer_scheduler(value: Any, run: Run) -> Outcome:
    if run.get(OPTIM + "warmup_style") is not None:
        return WithoutEffect("warmup_style counts")
    return scheduler(value, run)


def lowest(run: Run) -> float:
    return _fraction(run.get(OPTIM + "min_lr_ratio") or 0)


def _decays(run: Run) -> bool:
    return (run.get(OPTIM + "warmup_style") or run.get(OPTIM + "lr_scheduler_type")) == "cosine"


def if_cosine(rule: Rule) -> Rule:
    return lambda value, run: rule(value, run) if _decays(run) else WithoutEffect("the learning rate is constant")


def clip_ratio(value: Any, run: Run) -> Converted | WithoutEffect:
    """For the sides that have no ratio of their own."""
    sides = {"loss.clip_low": ACTOR + "clip_ratio_low", "loss.clip_high": ACTOR + "clip_ratio_high"}
    missing = {ours: theirs for ours, theirs in sides.items() if run.get(theirs) is None}
    if not missing:
        return WithoutEffect("clip_ratio_low and clip_ratio_high count")
    settings = dict.fromkeys(missing, below_1(value))
    unheard = real(value) != 0.2 and any(theirs not in run for theirs in missing.values())
    remark = (
        "in newer versions of verl clip_ratio counts only where clip_ratio_low and clip_ratio_high are null, and they "
        f"are 0.2 by default: for such a run set {' and '.join(settings)} to 0.2"
    )
    return Converted(settings, remark if unheard else "")


def clip_grad(value: Any, run: Run) -> Converted | WithoutEffect:
    if run.get(ACTOR + "grad_clip") is not None:
        return WithoutEffect("actor.grad_clip counts")
    return Converted({"optimizer.gradient_clip": positive(value)})


def _loss_mode(run: Run) -> Any:
    return run.get(POLICY_LOSS + "loss_mode") or "vanilla"


def dual_clip(value: Any, run: Run) -> Converted | WithoutEffect:
    if _loss_mode(run) in ("clip_cov", "kl_cov"):
        return WithoutEffect(f"{_loss_mode(run)} has no dual clip")
    remark = "verl's dual clip is on by default, with c = 3.0; ours is off unless loss.dual_clip is set, as it is here"
    return Converted({"loss.dual_clip": _number("above 1", lambda number: number > 1)(value)}, remark)


def _objective(run: Run) -> str:
    if _loss_mode(run) in ("clip_cov", "kl_cov"):
        return _loss_mode(run)
    try:
        regularized = real(run.get(ACTOR + "entropy_coeff")) > 0
    except ValueError:
        regularized = False
    return "entropy_regularization" if regularized else "grpo"


def estimator(value: Any, run: Run) -> Converted | Unsupported:
    """How verl computes advantages."""
    if value not in ("grpo", "grpo_vectorized"):
        return Unsupported("advantages are those of grpo; there is no critic, and no other baseline")
    remark = "this is verl's run, of one mode; with objective: policy_split the same settings train both"
    return Converted({"objective": _objective(run)}, remark if _objective(run) == "grpo" else "")


def policy_loss(value: Any, run: Run) -> Converted | Unsupported:
    if value not in (None, "vanilla", "clip_cov", "kl_cov"):
        return Unsupported("the losses are vanilla, clip_cov and kl_cov")
    if _objective(run) != value:
        return Converted({"objective": _objective(run)})
    clipped = " and leaves out those that are clipped already" if value == "clip_cov" else ""
    remark = (
        f"verl chooses the tokens of {value} in each micro-batch by its present log-probabilities{clipped}; "
        "here they are chosen out of a whole update's, before its gradient"
    )
    return Converted({"objective": value}, remark)


def of_loss(mode: str, ours: str, read: Callable[[Any], float]) -> Rule:
    """A setting of one loss, which is refused here beside another."""

    def rule(value: Any, run: Run) -> Converted | WithoutEffect:
        if _loss_mode(run) != mode or value is None:
            return WithoutEffect(f"loss_mode is not {mode}" if value is not None else "verl's default counts")
        return Converted({f"baseline.{mode}.{ours}": read(value)})

    return rule


def entropy(value: Any, run: Run) -> Outcome:
    coefficient = not_negative(value)
    if not coefficient:
        return WithoutEffect("no entropy in the loss")
    if _objective(run) != "entropy_regularization":
        return Unsupported(f"objective {_objective(run)} has no entropy bonus beside it")
    return Converted({"objective": _objective(run), "baseline.entropy_regularization.coefficient": coefficient})


def aggregate(value: Any, run: Run) -> Converted | Unsupported:
    if str(value) not in AGGREGATES:
        return Unsupported(f"losses are summed by {', '.join(AGGREGATES)}")
    ours, remark = AGGREGATES[value]
    return Converted({"loss.aggregate": ours}, remark)


AGGREGATES = {
    "token-mean": (
        "token_mean",
        "older versions of verl take token-mean within each micro-batch and average those; here it is the mean over "
        "all tokens of an update",
    ),
    "seq-mean-token-sum": ("sequence_mean_token_sum", ""),
    "seq-mean-token-mean": ("sequence_mean_token_mean", ""),
    "seq-mean-token-sum-norm": (
        "constant",
        "older versions of verl sum over the sequences of a micro-batch in seq-mean-token-sum-norm; ours is the mean "
        "over sequences, so that its gradients are smaller by that factor before they are clipped",
    ),
}
"""verl's ways to sum a loss: ours, and where it differs."""


def scale_factor(value: Any, run: Run) -> WithoutEffect | Unsupported:
    normed = run.get(ACTOR + "loss_agg_mode") == "seq-mean-token-sum-norm"
    if not normed or value in (None, run.get("data.max_response_length")):
        return WithoutEffect("as loss.aggregate has it" if normed else "loss_agg_mode does not use it")
    return Unsupported("loss.aggregate=constant divides by rollout.max_new_tokens")


def penalty(switch: str, coefficient: str) -> Rule:
    """KL to a reference model: the switch itself, or its coefficient (0.001 unless given)."""

    def rule(value: Any, run: Run) -> WithoutEffect | Unsupported:
        if run.get(switch) in (None, False):
            return WithoutEffect("off")
        if run.get(coefficient, 0.001) == 0:
            return WithoutEffect("its coefficient is 0")
        if run[switch] is not True:
            raise ValueError(f"{switch} must be true or false")
        return Unsupported(NO_REFERENCE)

    return rule


def grader(value: Any, run: Run) -> Converted | WithoutEffect:
    path, name = run.get(REWARD + "path"), run.get(REWARD + "name") or "compute_score"
    if path is None:
        return WithoutEffect("custom_reward_function.path is not given")
    return Converted({"reward.grader": f"{text(path)}:{name}"})


def grader_file(value: Any, run: Run) -> Converted | WithoutEffect:
    if value is not None:
        return grader(value, run)
    remark = (
        "verl chooses a grader by each question's data_source; here reward.grader=math compares the last box, "
        "or what follows ####, of every answer"
    )
    return Converted({"reward.grader": "math"}, remark)


def validation_mode(value: Any, run: Run) -> WithoutEffect | Unsupported:
    """Of no account in newer versions of verl, where a temperature of 0 is greedy."""
    temperature = run.get(VALIDATION + "temperature")
    if value is True or temperature == 0:
        return WithoutEffect("eval.temperature decides")
    return Unsupported("verl then decodes greedily in older versions: set eval.temperature to 0 for one of these")


def logger(value: Any, run: Run) -> Converted:
    names = value if isinstance(value, list) else [value]
    if any("$" in str(name) for name in names):
        raise ValueError("it must be names of loggers")
    others = ", ".join(str(name) for name in names if name not in ("console", "file", "tensorboard", "wandb"))
    settings = {f"train.{name}": name in names for name in ("tensorboard", "wandb")}
    return Converted(settings, f"of trainer.logger there is no {others}" if others else "")


def output(value: Any, run: Run) -> Converted:
    """The folder above the run's own, where that has the run's name."""
    folder, name = PurePosixPath(text(value)), str(run.get("trainer.experiment_name"))
    if folder.name in (name, "${trainer.experiment_name}"):
        return Converted({"output": str(folder.parent)})
    return Converted({"output": str(folder)}, f"the run's folder is output/name: {folder / name}")


def dump(value: Any, run: Run) -> Converted:
    remark = "rollouts are written to the folder rollouts inside the run's own"
    return Converted({"train.dump_rollouts": value is not None}, remark if value is not None else "")


def every(ours: str, never: Converted | WithoutEffect) -> Rule:
    """Steps between two of something, of which there are none from 0 down."""
    return lambda value, run: Converted({ours: whole(1)(value)}) if real(value) > 0 else never


def dtype(value: Any) -> str:
    names = {"bfloat16": "bfloat16", "bf16": "bfloat16", "float32": "float32", "fp32": "float32"}
    if str(value) not in names:
        raise ValueError("it must be bfloat16 or float32")
    return names[value]
