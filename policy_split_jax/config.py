"""Every setting of a run: frozen, validated dataclasses, read from YAML with dotted overrides.

An unknown key, a wrong type or a value out of range is one `UserError` that names the file and the key.
"""

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from policy_split_jax.data.embedded import TASKS, PuzzleConfig
from policy_split_jax.errors import UserError
from policy_split_jax.limits import MAX_SEED, SMALLEST_TEMPERATURE, TEMPERATURES, is_temperature
from policy_split_jax.modes import DEFAULT_HIGH_ENTROPY_PROMPT, ModePrompts
from policy_split_jax.objective.advantages import AdvantageConfig
from policy_split_jax.objective.baselines import BaselineConfig, Objective, trained_modes
from policy_split_jax.objective.eta import EtaConfig
from policy_split_jax.objective.losses import Aggregate
from policy_split_jax.training.guard import GuardConfig

EMBEDDED = "embedded"
EMBEDDED_WALK = "embedded-walk"


def _require(name: str, value: int | float, holds: bool, rule: str) -> None:
    if not holds:
        raise ValueError(f"{name} is {value}; it must be {rule}")


def _at_least(smallest: int, section: Any, *names: str) -> None:
    for name in names:
        _require(name, getattr(section, name), getattr(section, name) >= smallest, f"at least {smallest}")


def _check_seed(seed: int) -> None:
    _require("seed", seed, 0 <= seed <= MAX_SEED, f"from 0 to {MAX_SEED}")


@dataclass(frozen=True)
class ModelConfig:
    """Which model is trained."""

    path: str = EMBEDDED
    """A Hugging Face folder, or a tiny model inside the package: `embedded` answers countdown, `embedded-walk` walk."""
    checkpoint: str = ""
    """Start from the last checkpoint of this run's folder instead (`--checkpoint`)."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the activations; parameters and optimizer stay float32."""
    remat: Literal["none", "dots", "full"] = "none"
    """What the backward pass recomputes: nothing, all but matrix products, or whole layers."""


@dataclass(frozen=True)
class MeshConfig:
    """How the devices share the work: their number is data x fsdp x tp. One of them may be -1, which is the rest."""

    data: int = 1
    """Copies of the parameters; sequences are divided over them."""
    fsdp: int = -1
    """Slices of the parameters, gathered layer by layer; sequences are divided over these too."""
    tp: int = 1
    """Every layer's heads, hidden units and vocabulary are divided over so many neighbours."""

    def __post_init__(self) -> None:
        for name in ("data", "fsdp", "tp"):
            value = getattr(self, name)
            _require(name, value, value >= 1 or value == -1, "at least 1, or -1 for the rest")


@dataclass(frozen=True)
class PromptConfig:
    """How a question becomes the prompts of both modes."""

    high_entropy: str = DEFAULT_HIGH_ENTROPY_PROMPT
    """The system prompt of the high-entropy mode."""
    high_entropy_file: str = ""
    """Read that prompt from this file instead."""
    enable_thinking: bool = True
    """Given to the chat template."""
    question_template: str = "{question}"
    """The user turn; `{question}` is replaced."""

    def __post_init__(self) -> None:
        if "{question}" not in self.question_template:
            raise ValueError("question_template must contain {question}")


@dataclass(frozen=True)
class DataConfig(PuzzleConfig):
    """Questions to train on and to test on."""

    train: str = EMBEDDED
    """A .jsonl, .parquet or .csv file, or `embedded` for generated puzzles."""
    test: str = EMBEDDED
    """The same, for evaluation."""
    question_column: str = "question"
    answer_column: str = "answer"
    train_size: int = 4096
    """Embedded task: number of training puzzles."""
    test_size: int = 256
    """Embedded task: number of test puzzles."""

    def __post_init__(self) -> None:
        _at_least(1, self, "train_size", "test_size")


@dataclass(frozen=True)
class RewardConfig:
    """How responses are graded."""

    grader: str = "countdown"
    """countdown, walk, exact, letter, math, prm800k, released (docs/fidelity.md), or your own function:
    `package.module:function` or `file.py:function`."""
    workers: int = 2
    """Grader processes (math, prm800k, released and your own function)."""
    time_limit: float = 5.0
    """Seconds for one answer; a grader that takes longer is killed and its rollout masked."""
    memory_limit_mb: int = 4096
    """Memory of one grader process."""

    def __post_init__(self) -> None:
        _at_least(1, self, "workers", "memory_limit_mb")
        _require("time_limit", self.time_limit, self.time_limit > 0, "above 0")


@dataclass(frozen=True)
class RolloutConfig:
    """Sampling of rollouts during training."""

    questions_per_step: int = 16
    rollouts_per_mode: int = 4
    """G/2: how many rollouts of a question each mode samples."""
    max_prompt_tokens: int = 1024
    long_prompts: Literal["error", "skip"] = "error"
    """What a question with a longer prompt in either mode is: an error, or left out and counted at the start."""
    max_new_tokens: int = 1024
    temperature: float = 1.0
    """Of sampling; the trainer's log-probabilities use the same."""
    top_k: int = 0
    """0 is off. Truncated sampling biases the update: leave it off unless you know why."""
    top_p: float = 1.0
    slots: int = 64
    """Rollouts decoded at once, on all devices together; finished ones make room for waiting ones."""
    decode_steps: int = 8
    """Decode steps between two looks of the host."""

    def __post_init__(self) -> None:
        _at_least(
            1, self, "questions_per_step", "rollouts_per_mode", "max_prompt_tokens", "max_new_tokens", "slots",
            "decode_steps",
        )  # fmt: skip
        least = SMALLEST_TEMPERATURE
        _require("temperature", self.temperature, self.temperature >= least, f"at least {least:g} in training")
        _at_least(0, self, "top_k")
        _require("top_p", self.top_p, 0 < self.top_p <= 1, "in (0, 1]")


@dataclass(frozen=True)
class SharingConfig:
    """What a mode trains on of the rollouts that the other mode sampled."""

    high_entropy_prompt: Literal["system", "user_turn"] = "system"
    """Of normal rollouts: the mode's own prompt, or as in the released code one user turn that holds its text."""
    response: Literal["tokens", "text"] = "tokens"
    """The sampled tokens, or as in the released code their text encoded anew, which loses the stop token."""
    rollouts: Literal["all", "own"] = "all"
    """`own` shares none: each mode has its advantages among its own rollouts, and trains on those."""
    importance_cap: float = 0.0
    """Weigh each token of a shared rollout by how much likelier the mode that trains finds it than the mode that
    sampled it, at most so much; 0 is off, as in the paper."""

    def __post_init__(self) -> None:
        _require("importance_cap", self.importance_cap, self.importance_cap == 0 or self.importance_cap >= 1,
                 "at least 1, or 0 for no weights")  # fmt: skip
        if self.rollouts == "own" and (self.importance_cap or not self.exact):
            raise ValueError("rollouts: own shares nothing; leave the other settings of sharing out")

    @property
    def exact(self) -> bool:
        """Whether shared rollouts are trained on as they were sampled, under each mode's own prompt."""
        return self.high_entropy_prompt == "system" and self.response == "tokens"


@dataclass(frozen=True)
class LossConfig:
    """The clipped surrogate."""

    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None
    aggregate: Aggregate = "token_mean"

    def __post_init__(self) -> None:
        _require("clip_low", self.clip_low, 0 <= self.clip_low < 1, "in [0, 1)")
        _at_least(0, self, "clip_high")
        if self.dual_clip is not None:
            _require("dual_clip", self.dual_clip, self.dual_clip > 1, "above 1")


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with gradient clipping. A schedule never depends on the length of the run."""

    learning_rate: float = 3e-6
    warmup_steps: int = 0
    """Linear warm-up from 0."""
    decay: Literal["constant", "cosine", "linear"] = "constant"
    decay_steps: int = 0
    """Updates after which a decaying rate has reached `final_fraction`."""
    final_fraction: float = 0.1
    weight_decay: float = 0.01
    b1: float = 0.9
    b2: float = 0.999
    gradient_clip: float = 1.0
    first_moment: Literal["float32", "bfloat16"] = "float32"
    """Its type; bfloat16 saves 2 of the 12 bytes that a parameter has in memory and checkpoints."""

    def __post_init__(self) -> None:
        _at_least(0, self, "learning_rate", "warmup_steps", "weight_decay", "final_fraction")
        for name in ("b1", "b2"):
            _require(name, getattr(self, name), 0 <= getattr(self, name) < 1, "in [0, 1)")
        _require("gradient_clip", self.gradient_clip, self.gradient_clip > 0, "above 0")
        if self.decay != "constant" and self.decay_steps < 1:
            raise ValueError(f"decay_steps must be at least 1 when decay is {self.decay}")


@dataclass(frozen=True)
class TrainConfig:
    """The loop."""

    steps: int = 78
    seed: int = 0
    updates_per_step: int = 1
    """1: advantages come from the update's own forward pass. More: rollouts are scored first."""
    update_order: Literal["questions", "quarters"] = "questions"
    """What each of several updates gets: whole questions, or as in the released code a part of all sequences, those
    of normal rollouts under the normal mode first (`training/quarters.py`)."""
    microbatch_questions: int = 0
    """Questions in one forward and backward pass; 0 is all of them. Changes memory, not results."""
    microbatch_rows: int = 0
    """Instead of so many questions: so many rows of rollout.max_prompt_tokens + rollout.max_new_tokens tokens, with
    as many questions as fit, their sequences one behind another without padding. 0 is off."""
    score_chunk: int = 256
    """Tokens of each sequence whose logits exist at once."""
    eval_every: int = 0
    """Steps between evaluations; 0 evaluates at start and end only."""
    save_every: int = 10
    """Steps between checkpoints; the last step is always saved."""
    keep_checkpoints: int = 3
    sample_questions: int = 2
    """Questions whose rollouts are written to samples.jsonl each step."""
    dump_rollouts: bool = False
    """Write every step's rollouts to `rollouts/STEP.jsonl`, as the released trainer does."""
    tensorboard: bool = False
    wandb: bool = False

    def __post_init__(self) -> None:
        _at_least(1, self, "steps", "updates_per_step", "score_chunk", "save_every", "keep_checkpoints")
        _at_least(0, self, "microbatch_questions", "microbatch_rows", "eval_every", "sample_questions")
        if self.microbatch_questions and self.microbatch_rows:
            raise ValueError("microbatch_questions and microbatch_rows exclude each other; set one of them to 0")
        _check_seed(self.seed)


@dataclass(frozen=True)
class EvalConfig:
    """Evaluation of both modes; its sampling is its own."""

    questions: int = 128
    """How many test questions; 0 is all."""
    k: int = 8
    """Samples of each question in each mode."""
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    max_new_tokens: int = 0
    """0: as in training."""
    seed: int = 1

    def __post_init__(self) -> None:
        _at_least(1, self, "k")
        _at_least(0, self, "questions", "top_k", "max_new_tokens")
        _require("temperature", self.temperature, is_temperature(self.temperature), TEMPERATURES)
        _require("top_p", self.top_p, 0 < self.top_p <= 1, "in (0, 1]")
        _check_seed(self.seed)


@dataclass(frozen=True)
class RunConfig:
    """A training run; `configs/*.yaml` are examples."""

    name: str
    output: str = "runs"
    """The run's folder is `output/name`."""
    preset: Literal["paper", "released"] = "paper"
    """`released` changes the defaults of the settings in which the authors' code differs from their paper."""
    objective: Objective = "policy_split"
    """All others train the normal mode alone, which then samples all 2 x rollout.rollouts_per_mode rollouts."""
    baseline: BaselineConfig = field(default_factory=BaselineConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    prompt: PromptConfig = field(default_factory=PromptConfig)
    data: DataConfig = field(default_factory=DataConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    advantage: AdvantageConfig = field(default_factory=AdvantageConfig)
    eta: EtaConfig = field(default_factory=EtaConfig)
    sharing: SharingConfig = field(default_factory=SharingConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)

    def __post_init__(self) -> None:
        questions = self.rollout.questions_per_step
        updates = self.train.updates_per_step
        micro = self.train.microbatch_questions or questions // updates
        if questions % updates:
            raise ValueError(f"train.updates_per_step ({updates}) must divide rollout.questions_per_step ({questions})")
        if (questions // updates) % micro:
            raise ValueError(
                f"train.microbatch_questions ({micro}) must divide the {questions // updates} questions of an update"
            )
        rows, rollouts = self.train.microbatch_rows, self.rollouts
        if 0 < rows < rollouts:
            raise ValueError(
                f"train.microbatch_rows ({rows}) must be at least the {rollouts} rollouts of a question, "
                "each of which may need a row of its own"
            )
        if self.objective != "policy_split" and self.preset == "released":
            raise ValueError(f"preset released is of policy_split, not of {self.objective}; leave preset out")
        quarters = self.train.update_order == "quarters"
        if rows and (quarters or not self.sharing.exact):
            raise ValueError(
                "train.microbatch_rows packs neither train.update_order=quarters nor other views of shared rollouts "
                "(sharing.high_entropy_prompt, sharing.response); set it to 0"
            )
        if self.objective != "policy_split" and (quarters or self.sharing != SharingConfig()):
            raise ValueError(f"objective {self.objective} trains one mode: train.update_order and sharing.* need two")
        if quarters and self.sharing.rollouts == "own":
            raise ValueError("sharing.rollouts=own leaves two of train.update_order's quarters empty; use questions")
        if self.data.train == EMBEDDED and self.reward.grader in {*TASKS} - {self.data.task}:
            raise ValueError(f"data.task is {self.data.task}, but reward.grader is {self.reward.grader}; make them one")
        for item in fields(self.baseline):
            settings = getattr(self.baseline, item.name)
            if item.name != self.objective and settings != type(settings)():
                raise ValueError(f"baseline.{item.name} is set, but the objective is {self.objective}")

    @property
    def folder(self) -> Path:
        return Path(self.output) / self.name

    @property
    def modes(self) -> tuple[int, ...]:
        """The modes that sample and train."""
        return trained_modes(self.objective)

    @property
    def rollouts(self) -> int:
        """G, the rollouts of a question."""
        return 2 * self.rollout.rollouts_per_mode


# What the authors' trainer does differently (docs/fidelity.md). What it offers as an option is named with the value
# that it has there unless asked for. How long its mini-batches are is the user's to say; here each is a quarter.
RELEASED: dict[str, dict[str, Any]] = {
    "advantage": {
        "clamp": "scaled_bonus",
        "bonus_repeats": 2,
        "normalize": "zscore",
        "low_quantile": 0.0,
        "only_uniform_groups": False,
        "surprise": "neg_logprob",
    },
    "sharing": {"high_entropy_prompt": "user_turn", "response": "text"},
    "train": {"update_order": "quarters", "updates_per_step": 4},
}


@dataclass(frozen=True)
class SizeConfig:
    """Sizes of a new Qwen3 model; the vocabulary is the tokenizer's."""

    hidden_size: int = 128
    intermediate_size: int = 384
    num_layers: int = 4
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 32
    rope_theta: float = 10_000.0


@dataclass(frozen=True)
class LessonConfig(PuzzleConfig):
    """The puzzles of the warm-up."""

    train_size: int = 4096

    def __post_init__(self) -> None:
        _at_least(1, self, "train_size")


@dataclass(frozen=True)
class ExamConfig:
    """The evaluation after the warm-up, at temperature 1."""

    questions: int = 256
    k: int = 8
    seed: int = 1

    def __post_init__(self) -> None:
        _at_least(1, self, "questions", "k")
        _check_seed(self.seed)


@dataclass(frozen=True)
class WarmupConfig:
    """Supervised learning of the embedded task: how the embedded model was made."""

    steps: int = 1000
    batch_size: int = 256
    """A multiple of 16, the size of a microbatch."""
    seed: int = 0
    high_entropy_fraction: float = 0.5
    """Share of the examples that are shown under the high-entropy prompt."""
    wrong_fraction: float = 0.0
    """Share of the examples whose answer is wrong: that of another target, or with another move."""
    log_every: int = 50

    def __post_init__(self) -> None:
        _at_least(1, self, "steps", "batch_size", "log_every")
        _require("batch_size", self.batch_size, self.batch_size % 16 == 0, "a multiple of 16")
        for name in ("high_entropy_fraction", "wrong_fraction"):
            _require(name, getattr(self, name), 0 <= getattr(self, name) <= 1, "in [0, 1]")
        _check_seed(self.seed)


@dataclass(frozen=True)
class SftConfig:
    """`policy-split sft`: a tiny Qwen3 from nothing to a model that solves part of the embedded task."""

    output: str
    """The Hugging Face folder to write."""
    size: SizeConfig = field(default_factory=SizeConfig)
    prompt: PromptConfig = field(default_factory=PromptConfig)
    data: LessonConfig = field(default_factory=LessonConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: WarmupConfig = field(default_factory=WarmupConfig)
    eval: ExamConfig = field(default_factory=ExamConfig)


ConfigT = TypeVar("ConfigT", RunConfig, SftConfig)
DataclassT = TypeVar("DataclassT")


class _Loader(yaml.SafeLoader):
    """Refuses a key that is written twice, of which YAML itself would keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value} is there twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def load(kind: type[ConfigT], path: str | Path, overrides: Sequence[str] = ()) -> ConfigT:
    """Reads a YAML file, its base and a prompt's own file, applies `section.key=value` overrides, and checks all."""
    path = Path(path)
    tree = _with_base(path)
    for override in overrides:
        _override(tree, override)
    config = from_dict(kind, with_preset(tree), str(path))
    if config.prompt.high_entropy_file:
        config = replace(config, prompt=_read_prompt_file(config.prompt))
    return config


def with_preset(tree: dict[str, Any]) -> dict[str, Any]:
    """The settings with those that their preset changes; what is written wins."""
    if tree.get("preset") != "released":
        return tree
    merged = _over(RELEASED, tree)
    data, reward = tree.get("data", {}), tree.get("reward", {})
    if isinstance(data, dict) and isinstance(reward, dict) and data.get("train", EMBEDDED) != EMBEDDED:
        merged["reward"] = {"grader": "released"} | reward
    return merged


def _with_base(path: Path) -> dict[str, Any]:
    """A file's settings over those of the file that its `base` names, relative to it."""
    tree = read_tree(path)
    base = tree.pop("base", None)
    if base is None:
        return tree
    if not isinstance(base, str):
        raise UserError(f"{path}: base is {base!r}: write the name of a YAML file")
    below = read_tree(path.parent / base)
    if "base" in below:
        raise UserError(f"{path.parent / base}: has a base itself; {path} can name a file without one only")
    return _over(below, tree)


def _over(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Nested settings, of which those of `above` win."""
    sections = {
        key: _over(below[key], value)
        for key, value in above.items()
        if isinstance(value, dict) and isinstance(below.get(key), dict)
    }
    return below | above | sections


def read_tree(path: Path) -> dict[str, Any]:
    """The settings of a YAML file as they are written, none of them checked."""
    if not path.is_file():
        raise UserError(f"{path}: no such configuration file; configs/tiny.yaml is an example")
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: not UTF-8, or a date that does not exist
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: expected a mapping of settings, found {type(tree).__name__}")
    return tree


def from_dict(kind: type[DataclassT], tree: dict[str, Any], source: str) -> DataclassT:
    """Builds a configuration, or a part of one, from plain values; `source` is named in errors."""
    from pydantic import ConfigDict, TypeAdapter, ValidationError

    # The wrapping dict lets unknown keys be refused in plain dataclasses.
    rules = ConfigDict(extra="forbid", arbitrary_types_allowed=True, allow_inf_nan=False)
    adapter = TypeAdapter(dict[str, kind], config=rules)  # type: ignore[valid-type]
    try:
        return adapter.validate_python({"": tree})[""]
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise UserError(f"{source}: {_explain(kind, first)}") from None


def to_dict(config: Any) -> dict[str, Any]:
    """Plain values, as they go into a run's config.yaml."""
    return {
        item.name: to_dict(value) if is_dataclass(value := getattr(config, item.name)) else _plain(value)
        for item in fields(config)
    }


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def known_keys(kind: Any, prefix: str = "") -> Iterator[str]:
    """Dotted names of every setting."""
    for item in fields(kind):
        nested = item.default_factory if is_dataclass(item.default_factory) else None
        if nested is None:
            yield prefix + item.name
        else:
            yield from known_keys(nested, f"{prefix}{item.name}.")


def _override(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"override {override!r}: write section.key=value, for example train.steps=10")
    *sections, last = key.split(".")
    for section in sections:
        tree = tree.setdefault(section, {})
        if not isinstance(tree, dict):
            raise UserError(f"override {override!r}: {section} is not a section")
    try:
        tree[last] = yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError):  # ValueError: a date that does not exist
        raise UserError(f"override {override!r}: {text!r} is not a YAML value") from None


def _explain(kind: Any, problem: Any) -> str:
    key = ".".join(str(part) for part in problem["loc"] if part != "")
    if problem["type"] == "unexpected_keyword_argument":
        nearest = difflib.get_close_matches(key, list(known_keys(kind)), n=1, cutoff=0.5)
        return f"unknown key {key}" + (f"; did you mean {nearest[0]}?" if nearest else "")
    if problem["type"] == "missing":
        return f"{key} is missing"
    if problem["type"] == "value_error":
        return f"{key + ': ' if key else ''}{problem['ctx']['error']}"
    return f"{key} is {problem['input']!r}: {problem['msg'][0].lower()}{problem['msg'][1:]}"


def mode_prompts(config: PromptConfig) -> ModePrompts:
    """The prompts of both modes."""
    return ModePrompts(config.high_entropy, config.enable_thinking, config.question_template)


def _read_prompt_file(prompt: PromptConfig) -> PromptConfig:
    """The same settings with the text itself in place of the file's name: a run keeps what it was trained with."""
    path = Path(prompt.high_entropy_file)
    try:
        text = path.read_text(encoding="utf-8").strip()
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 at byte {error.start}; save the file as UTF-8") from None
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"{path}: cannot be read ({reason}); prompt.high_entropy_file names a text file") from None
    return replace(prompt, high_entropy=text, high_entropy_file="")
