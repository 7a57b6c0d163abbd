"""Configurations: what is refused and with which words, and that every setting is read by somebody."""

import ast
import dataclasses
import importlib.util
import typing
from pathlib import Path

import pytest
import yaml

from policy_split_jax import config as settings
from policy_split_jax.config import EtaConfig, RunConfig, SftConfig, from_dict, known_keys, load, to_dict
from policy_split_jax.errors import UserError
from policy_split_jax.modes import HIGH_ENTROPY, NORMAL
from policy_split_jax.objective.baselines import Objective
from policy_split_jax.training.update import UpdateConfig

PROJECT = Path(__file__).parents[1]
PACKAGE = Path(importlib.util.find_spec("policy_split_jax").origin).parent


@pytest.fixture
def write(tmp_path):
    def write_file(text):
        path = tmp_path / "run.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write_file


def refusal(call):
    """The one line that a user sees."""
    with pytest.raises(UserError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    return message


# ----------------------------------------------------------------------------------------------- reading


def test_a_file_with_overrides(write):
    path = write("name: a\ntrain: {steps: 5, seed: 1}\ndata: {numbers: [3, 4]}\nloss:\n  dual_clip: 3\n")
    config = load(RunConfig, path, ["train.steps=7", "eval.k=2", "data.numbers=[4]", "output=elsewhere"])
    assert (config.name, config.train.steps, config.train.seed, config.eval.k) == ("a", 7, 1, 2)
    assert config.data.numbers == (4,)
    assert config.loss.dual_clip == 3.0
    assert config.folder == Path("elsewhere/a")
    assert config.optimizer == settings.OptimizerConfig()


def test_a_file_over_its_base(tmp_path, write):
    (tmp_path / "below").mkdir()
    base = "name: b\ntrain: {steps: 5, seed: 1}\nrollout: {rollouts_per_mode: 2}\n"
    (tmp_path / "below" / "base.yaml").write_text(base, encoding="utf-8")
    config = load(RunConfig, write("base: below/base.yaml\nname: a\ntrain: {steps: 7}\n"), ["train.save_every=3"])
    assert config == from_dict(
        RunConfig,
        {"name": "a", "train": {"steps": 7, "seed": 1, "save_every": 3}, "rollout": {"rollouts_per_mode": 2}},
        "the same",
    )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("base: none.yaml\n", "none.yaml: no such configuration file"),
        ("base: [a]\n", "run.yaml: base is ['a']: write the name of a YAML file"),
        ("base: run.yaml\n", "run.yaml: has a base itself"),
    ],
)
def test_a_base_that_cannot_be_read(write, text, words):
    path = write(text)
    assert words in refusal(lambda: load(RunConfig, path))


def test_baselines_of_the_embedded_task_are_its_configuration_with_an_objective():
    tiny = load(RunConfig, PROJECT / "configs" / "tiny.yaml")
    paths = sorted((PROJECT / "configs" / "baselines").glob("*.yaml"))
    found = {path.stem: load(RunConfig, path) for path in paths}
    objectives = {name: "grpo" if name == "clip_higher" else name for name in found}
    twice = {"clip_higher", "kl_cov"}
    for name, config in found.items():
        updates = 2 if name in twice else 1
        train = dataclasses.replace(tiny.train, updates_per_step=updates)
        # The learning rate decays over the updates.
        optimizer = dataclasses.replace(tiny.optimizer, decay_steps=updates * tiny.train.steps)
        loss = dataclasses.replace(tiny.loss, clip_high=0.28 if name == "clip_higher" else tiny.loss.clip_high)
        chosen = {"name": name.replace("_", "-"), "objective": objectives[name], "train": train, "loss": loss}
        assert config == dataclasses.replace(tiny, optimizer=optimizer, **chosen)
    assert {*objectives.values(), "policy_split"} == {*typing.get_args(Objective)}


@pytest.mark.parametrize("text", ["1e-4", "1.0e-4", "0.0001", '"1e-4"'])
def test_a_number_without_a_point_is_a_number(write, text):
    """YAML 1.1 reads 1e-4 as a string."""
    path = write(f"name: a\noptimizer: {{learning_rate: {text}}}\nadvantage: {{eta: {text}}}\n")
    config = load(RunConfig, path, [f"eta.gain={text}", f"loss.clip_high={text}"])
    values = (config.optimizer.learning_rate, config.advantage.eta, config.eta.gain, config.loss.clip_high)
    assert values == (1e-4,) * 4
    assert {type(value) for value in values} == {float}


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("prompt.high_entropy='a: b'", "a: b"),
        ("prompt.high_entropy=x=y", "x=y"),
        ("prompt.high_entropy='10'", "10"),
        ("prompt.high_entropy=''", ""),
        ("reward.grader=my.package:score", "my.package:score"),
    ],
)
def test_an_override_may_hold_anything(write, override, value):
    config = load(RunConfig, write("name: a\n"), [override])
    section, key = override.partition("=")[0].split(".")
    assert getattr(getattr(config, section), key) == value


def test_an_override_of_null_switches_off(write):
    path = write("name: a\nloss: {dual_clip: 3}\n")
    assert load(RunConfig, path, ["loss.dual_clip=null"]).loss.dual_clip is None


@pytest.mark.parametrize("kind", [RunConfig, SftConfig])
def test_a_configuration_survives_its_own_file(kind):
    required = {"name": "a"} if kind is RunConfig else {"output": "a"}
    tree = required | {
        "data": {"numbers": [3, 5], "train_size": 9},
        "optimizer": {"decay": "cosine", "decay_steps": 4, "learning_rate": 1e-7},
        "prompt": {"high_entropy": "Überraschung: «x»\n"},
    }
    config = from_dict(kind, tree, "test")
    plain = to_dict(config)
    assert plain["data"]["numbers"] == [3, 5]
    text = yaml.safe_dump(plain, allow_unicode=True)
    again = from_dict(kind, yaml.safe_load(text), "test")
    assert again == config
    assert to_dict(again) == plain
    assert again != from_dict(kind, required, "test")


def test_a_configuration_is_frozen():
    config = from_dict(RunConfig, {"name": "a"}, "test")
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.train.steps = 3


# ----------------------------------------------------------------------------------------------- refusing


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("train.stepz", "train.steps"),
        ("optimizer.lerning_rate", "optimizer.learning_rate"),
        ("advantage.kapa", "advantage.kappa"),
        ("outputs", "output"),
        ("rolout", None),
        ("train.zzzzzzzzzzzzzzzzzzz", None),
    ],
)
def test_an_unknown_key_names_the_nearest_one(write, key, nearest):
    path = write("name: a\n")
    message = refusal(lambda: load(RunConfig, path, [f"{key}=1"]))
    assert message.startswith(f"{path}: unknown key {key}")
    if nearest is not None:
        assert message.endswith(f"; did you mean {nearest}?")


@pytest.mark.parametrize(("task", "grader"), [("walk", "countdown"), ("countdown", "walk")])
def test_an_embedded_task_has_its_own_grader_or_yours(write, task, grader):
    path = write(f"name: a\ndata: {{task: {task}}}\nreward: {{grader: {grader}}}\n")
    assert f"data.task is {task}, but reward.grader is {grader}" in refusal(lambda: load(RunConfig, path))
    assert load(RunConfig, path, ["reward.grader=mine.py:score"]).data.task == task
    assert load(RunConfig, path, ["data.train=questions.jsonl"]).reward.grader == grader


def test_an_unknown_task_is_refused(write):
    assert "data.task is 'maze'" in refusal(lambda: load(RunConfig, write("name: a\ndata: {task: maze}\n")))


def test_an_unknown_section_in_the_file(write):
    path = write("name: a\nrolouts:\n  slots: 3\n")
    assert f"{path}: unknown key rolouts" in refusal(lambda: load(RunConfig, path))


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.steps=many", ["train.steps", "'many'", "integer"]),
        ("train.steps=1.5", ["train.steps", "1.5", "integer"]),
        ("train.steps=", ["train.steps", "None"]),
        ("train.steps=[1]", ["train.steps", "integer"]),
        ("name=3", ["name", "3", "string"]),
        ("optimizer.learning_rate=fast", ["optimizer.learning_rate", "'fast'"]),
        ("optimizer.learning_rate=.nan", ["optimizer.learning_rate", "finite"]),
        ("optimizer.learning_rate=.inf", ["optimizer.learning_rate", "finite"]),
        ("advantage.eta=fast", ["advantage.eta", "'fast'"]),
        ("model.dtype=float16", ["model.dtype", "'float16'", "'float32' or 'bfloat16'"]),
        ("loss.aggregate=mean", ["loss.aggregate", "'mean'", "token_mean"]),
        ("data.numbers=[a]", ["data.numbers.0", "'a'"]),
        ("train.tensorboard=perhaps", ["train.tensorboard", "'perhaps'"]),
        ("train=3", ["train", "3"]),
        # Out of range.
        ("rollout.temperature=0", ["rollout", "temperature is 0", "at least 1e-06"]),
        ("rollout.top_p=0", ["rollout", "top_p is 0"]),
        ("rollout.slots=0", ["rollout", "slots is 0", "at least 1"]),
        ("advantage.kappa=0.5", ["advantage", "kappa", "at least 1"]),
        ("advantage.alpha=2", ["advantage", "alpha", "[0, 1]"]),
        ("eta.target_kl=0", ["eta", "target_kl", "above 0"]),
        ("prompt.question_template=Hello", ["prompt", "question_template", "{question}"]),
        ("optimizer.decay=cosine", ["optimizer", "decay_steps", "cosine"]),
        ("train.updates_per_step=3", ["train.updates_per_step (3)", "rollout.questions_per_step (16)"]),
        ("train.updates_per_step=0", ["train", "updates_per_step is 0", "at least 1"]),
        ("train.microbatch_questions=5", ["train.microbatch_questions (5)", "16"]),
        ("train.microbatch_questions=-4", ["train", "microbatch_questions is -4", "at least 0"]),
        ("train.seed=-1", ["train", "seed is -1", "from 0 to 4294967295"]),
        ("train.seed=1000000000000", ["train", "seed", "from 0 to 4294967295"]),
        ("train.score_chunk=0", ["train", "score_chunk is 0"]),
        ("train.keep_checkpoints=-1", ["train", "keep_checkpoints is -1"]),
        ("train.save_every=0", ["train", "save_every is 0"]),
        ("train.steps=0", ["train", "steps is 0"]),
        ("eval.k=0", ["eval", "k is 0"]),
        ("eval.temperature=-1", ["eval", "temperature is -1"]),
        ("eval.top_p=2", ["eval", "top_p is 2"]),
        ("loss.clip_low=-3", ["loss", "clip_low is -3", "[0, 1)"]),
        ("loss.clip_high=-0.1", ["loss", "clip_high is -0.1"]),
        ("loss.dual_clip=1", ["loss", "dual_clip is 1", "above 1"]),
        ("optimizer.learning_rate=-1", ["optimizer", "learning_rate is -1"]),
        ("optimizer.b2=1", ["optimizer", "b2 is 1", "[0, 1)"]),
        ("optimizer.gradient_clip=0", ["optimizer", "gradient_clip is 0"]),
        ("reward.workers=0", ["reward", "workers is 0"]),
        ("reward.time_limit=0", ["reward", "time_limit is 0"]),
        ("data.test_size=0", ["data", "test_size is 0"]),
        ("preset=verl", ["preset is 'verl'", "'paper' or 'released'"]),
        ("preset=", ["preset is None", "'paper' or 'released'"]),
        ("objective=ppo", ["objective is 'ppo'", "'policy_split'", "'grpo'", "'kl_cov'", "'entropy_advantage'"]),
        ("sharing.high_entropy_prompt=user", ["sharing.high_entropy_prompt is 'user'", "'system' or 'user_turn'"]),
        ("sharing.response=ids", ["sharing.response is 'ids'", "'tokens' or 'text'"]),
        ("sharing.exact=true", ["unknown key sharing.exact"]),
        ("train.update_order=random", ["train.update_order is 'random'", "'questions' or 'quarters'"]),
        ("train.dump_rollouts=perhaps", ["train.dump_rollouts is 'perhaps'"]),
        ("baseline.grpo.share=1", ["unknown key baseline.grpo"]),
        ("baseline.forking_tokens.share=0", ["baseline.forking_tokens", "share is 0", "(0, 1]"]),
        ("baseline.clip_cov.low=5", ["baseline.clip_cov", "low is 5", "below high, which is 5"]),
        ("baseline.kl_cov.coefficient=-1", ["baseline.kl_cov", "coefficient is -1", "at least 0"]),
        ("baseline.entropy_advantage.kappa=0", ["baseline.entropy_advantage", "kappa is 0", "at least 1"]),
    ],
)
def test_a_bad_value_is_named(write, override, words):
    path = write("name: a\n")
    message = refusal(lambda: load(RunConfig, path, [override]))
    assert message.startswith(f"{path}: ")
    for word in words:
        assert word in message, message


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.steps", ["'train.steps'", "section.key=value"]),
        ("=3", ["section.key=value"]),
        ("train.steps=[1", ["train.steps", "not a YAML value"]),
        ("name.first=3", ["name.first", "name is not a section"]),
        ("name=2026-02-30", ["name=2026-02-30", "not a YAML value"]),
    ],
)
def test_a_bad_override_is_named(write, override, words):
    message = refusal(lambda: load(RunConfig, write("name: a\n"), [override]))
    for word in words:
        assert word in message, message


def test_a_missing_name(write):
    path = write("train: {steps: 3}\n")
    assert refusal(lambda: load(RunConfig, path)) == f"{path}: name is missing"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("- a\n- b\n", "expected a mapping of settings, found list"),
        ("", "expected a mapping of settings, found NoneType"),
        ("name", "expected a mapping of settings, found str"),
        ("name: [a\n", "not valid YAML"),
        ("name: a\n\tsteps: 3\n", "not valid YAML"),
        ("name: a\ntrain: {steps: 1}\ntrain: {seed: 2}\n", "train is there twice"),
        ("name: a\ntrain:\n  steps: 1\n  seed: 2\n  steps: 3\n", "steps is there twice"),
        ("name: !!python/object/apply:os.getcwd []\n", "not valid YAML"),
        ("name: a\ntrain:\n", "train is None"),
        ("name: 2026-02-30\n", "not valid YAML"),
    ],
)
def test_a_file_that_is_no_configuration(write, text, words):
    path = write(text)
    message = refusal(lambda: load(RunConfig, path))
    assert message.startswith(f"{path}: ")
    assert words in message


def test_a_file_that_is_no_text(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_bytes(b"name: \xff\xfe")
    assert "not valid YAML" in refusal(lambda: load(RunConfig, path))


def test_a_missing_file(tmp_path):
    message = refusal(lambda: load(RunConfig, tmp_path / "none.yaml"))
    assert message.startswith(f"{tmp_path / 'none.yaml'}: no such configuration file")


ONE_MODE = "trains one mode: train.update_order and sharing.* need two"
NOT_PACKED = (
    "train.microbatch_rows packs neither train.update_order=quarters nor other views of shared rollouts "
    "(sharing.high_entropy_prompt, sharing.response); set it to 0"
)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["objective=grpo", "train.update_order=quarters"], f"objective grpo {ONE_MODE}"),
        (["objective=clip_cov", "sharing.response=text"], f"objective clip_cov {ONE_MODE}"),
        (["objective=kl_cov", "sharing.high_entropy_prompt=user_turn"], f"objective kl_cov {ONE_MODE}"),
        (["objective=grpo", "sharing.rollouts=own"], f"objective grpo {ONE_MODE}"),
        (["objective=grpo", "sharing.importance_cap=2"], f"objective grpo {ONE_MODE}"),
        (
            ["sharing.rollouts=own", "sharing.importance_cap=2"],
            "sharing: rollouts: own shares nothing; leave the other settings of sharing out",
        ),
        (["sharing.importance_cap=0.5"], "sharing: importance_cap is 0.5; it must be at least 1, or 0 for no weights"),
        (
            ["sharing.rollouts=own", "train.update_order=quarters"],
            "sharing.rollouts=own leaves two of train.update_order's quarters empty; use questions",
        ),
        (["objective=grpo", "preset=released"], "preset released is of policy_split, not of grpo; leave preset out"),
        (["train.microbatch_rows=8", "train.update_order=quarters"], NOT_PACKED),
        (["train.microbatch_rows=8", "sharing.response=text"], NOT_PACKED),
        (["train.microbatch_rows=8", "sharing.high_entropy_prompt=user_turn"], NOT_PACKED),
        (["train.microbatch_rows=8", "preset=released"], NOT_PACKED),
        (["baseline.clip_cov.share=0.1"], "baseline.clip_cov is set, but the objective is policy_split"),
        (
            ["baseline.clip_cov.share=0.1", "objective=kl_cov"],
            "baseline.clip_cov is set, but the objective is kl_cov",
        ),
        (
            ["preset=released", "rollout.questions_per_step=6"],
            "train.updates_per_step (4) must divide rollout.questions_per_step (6)",
        ),
    ],
)
def test_settings_that_do_not_go_together_are_named(write, overrides, words):
    path = write("name: a\n")
    assert refusal(lambda: load(RunConfig, path, overrides)) == f"{path}: {words}"


@pytest.mark.parametrize(
    "overrides",
    [
        ["objective=grpo", "train.microbatch_rows=8"],
        ["objective=clip_cov", "baseline.clip_cov.share=0.1", "baseline.kl_cov.share=0.0002"],
        ["train.update_order=quarters", "train.updates_per_step=4", "train.microbatch_questions=2"],
        ["preset=released"],
    ],
)
def test_settings_that_go_together_are_taken(write, overrides):
    config = load(RunConfig, write("name: a\n"), overrides)
    plain = flat(to_dict(config))
    for key, value in (override.split("=") for override in overrides):
        assert str(plain[key]) == value


@pytest.mark.parametrize(
    ("objective", "modes"), [("policy_split", (NORMAL, HIGH_ENTROPY)), ("grpo", (NORMAL,)), ("clip_cov", (NORMAL,))]
)
def test_every_objective_has_as_many_rollouts(write, objective, modes):
    """A mode that samples alone samples for both."""
    config = load(RunConfig, write("name: a\n"), [f"objective={objective}", "rollout.rollouts_per_mode=3"])
    assert (config.modes, config.rollouts) == (modes, 6)


# ------------------------------------------------------------------------------------------------ presets

# The differences of the released trainer, as the table of the method's description counts them (1 to 5).
RELEASED = {
    "advantage.clamp": "scaled_bonus",
    "advantage.bonus_repeats": 2,
    "sharing.high_entropy_prompt": "user_turn",
    "sharing.response": "text",
    "train.update_order": "quarters",
    "train.updates_per_step": 4,
}


def changes(config, other):
    """The settings of `config` in which it differs from `other`."""
    before = flat(to_dict(other))
    return {key: value for key, value in flat(to_dict(config)).items() if value != before[key]}


def test_the_preset_changes_what_the_released_trainer_does_differently(write):
    path = write("name: a\n")
    paper, released = load(RunConfig, path), load(RunConfig, path, ["preset=released"])
    assert changes(released, paper) == {"preset": "released"} | RELEASED
    assert load(RunConfig, path, ["preset=paper"]) == paper


def test_what_is_written_wins_over_the_preset(write):
    """In the file or on the command line, even where it is the paper's value; the rest of a section is untouched."""
    path = write("name: a\npreset: released\nadvantage: {bonus_repeats: 1, eta: 0.5}\nsharing: {}\n")
    config = load(RunConfig, path, ["train.updates_per_step=2", "sharing.response=tokens", "train.steps=7"])
    paper = load(RunConfig, write("name: a\n"))
    assert changes(config, paper) == {
        "preset": "released",
        "advantage.clamp": "scaled_bonus",
        "advantage.eta": 0.5,
        "sharing.high_entropy_prompt": "user_turn",
        "train.update_order": "quarters",
        "train.updates_per_step": 2,
        "train.steps": 7,
    }


def test_the_preset_names_the_options_that_are_off_by_default_in_both():
    """It does not follow other defaults."""
    named = flat(settings.RELEASED)
    paper = flat(to_dict(from_dict(RunConfig, {"name": "a"}, "test")))
    options = {"normalize": "zscore", "low_quantile": 0.0, "only_uniform_groups": False, "surprise": "neg_logprob"}
    same = {f"advantage.{name}": value for name, value in options.items()}
    assert named == RELEASED | same
    assert {key: paper[key] for key in same} == same


@pytest.mark.parametrize(
    ("lines", "grader"),
    [
        ("", "countdown"),
        ("data: {train: embedded}\n", "countdown"),
        ("data: {test: questions.jsonl}\n", "countdown"),
        ("data: {train: questions.jsonl}\n", "released"),
        ("data: {train: questions.jsonl}\nreward: {workers: 1}\n", "released"),
        ("data: {train: questions.jsonl}\nreward: {grader: math}\n", "math"),
    ],
)
def test_the_preset_grades_questions_of_a_file(write, lines, grader):
    assert load(RunConfig, write(f"name: a\npreset: released\n{lines}")).reward.grader == grader
    if "grader" not in lines:
        assert load(RunConfig, write(f"name: a\n{lines}")).reward.grader == "countdown"


def test_a_resolved_configuration_with_a_preset_stays_as_it_is(write):
    """A run's config.yaml names the preset and every setting."""
    path = write("name: a\npreset: released\ndata: {train: q.jsonl}\n")
    config = load(RunConfig, path, ["advantage.bonus_repeats=1", "reward.grader=math"])
    again = load(RunConfig, write(yaml.safe_dump(to_dict(config))))
    assert again == config
    assert (again.advantage.bonus_repeats, again.reward.grader, again.preset) == (1, "math", "released")


def test_a_preset_leaves_the_settings_as_they_were_given():
    tree = {"name": "a", "preset": "released", "data": {"train": "q.jsonl"}, "train": {"steps": 3}}
    merged = settings.with_preset(tree)
    assert tree == {"name": "a", "preset": "released", "data": {"train": "q.jsonl"}, "train": {"steps": 3}}
    assert merged["train"] == {"update_order": "quarters", "updates_per_step": 4, "steps": 3}


@pytest.mark.parametrize("section", ["advantage", "sharing", "train", "data", "reward"])
def test_a_section_that_is_none_is_named_with_a_preset_too(write, section):
    path = write("name: a\npreset: released\n")
    assert refusal(lambda: load(RunConfig, path, [f"{section}=3"])).startswith(f"{path}: {section} is 3")


def test_the_high_entropy_prompt_may_stand_in_a_file(tmp_path, write):
    path = tmp_path / "prompt.txt"
    path.write_text("  Surprise me.\n", encoding="utf-8")
    config = write("name: a\nprompt: {high_entropy: unused, enable_thinking: false}\n")

    def read(name):
        return load(RunConfig, config, [f"prompt.high_entropy_file={tmp_path / name}"])

    # The run keeps the text: the file may change later.
    assert read("prompt.txt").prompt == settings.PromptConfig(high_entropy="Surprise me.", enable_thinking=False)
    assert f"{tmp_path / 'none.txt'}: cannot be read" in refusal(lambda: read("none.txt"))
    (tmp_path / "latin.txt").write_bytes("Überrasche mich.".encode("latin-1"))
    assert f"{tmp_path / 'latin.txt'}: not UTF-8 at byte 0" in refusal(lambda: read("latin.txt"))


def flat(tree):
    """The values of a tree of settings by their dotted names."""
    result = {}
    for key, value in tree.items():
        inner = flat(value) if isinstance(value, dict) else {None: value}
        result |= {key if name is None else f"{key}.{name}": leaf for name, leaf in inner.items()}
    return result


def test_known_keys_are_all_leaves():
    keys = list(known_keys(RunConfig))
    assert {"name", "output", "train.steps", "advantage.eta", "eta.target_kl", "baseline.clip_cov.low"} <= set(keys)
    assert "train" not in keys
    assert len(keys) == len(set(keys))
    assert sorted(keys) == sorted(flat(to_dict(from_dict(RunConfig, {"name": "a"}, "test"))))


# -------------------------------------------------------------------------------- every setting is read
#
# A setting that nobody reads is a flag that does nothing. The names of variables are followed through the
# package's syntax trees: annotated parameters, class fields and plain assignments say what a name holds,
# and every `name.section.key` is then a read of that key of that configuration.

ROOTS = (RunConfig, SftConfig, UpdateConfig)


def nested(kind, name):
    """The dataclass that a field holds, or None."""
    hint = typing.get_type_hints(kind).get(name)
    return hint if dataclasses.is_dataclass(hint) else None


def reachable(kind):
    yield kind
    for item in dataclasses.fields(kind):
        if (inner := nested(kind, item.name)) is not None:
            yield from reachable(inner)


CLASSES = {
    kind.__name__: kind
    for root in ROOTS
    for section in reachable(root)
    for kind in section.__mro__
    if dataclasses.is_dataclass(kind)
}


def annotated_class(annotation):
    """The configuration class that an annotation names, or None."""
    if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
        annotation = ast.parse(annotation.value, mode="eval").body
    name = getattr(annotation, "attr", getattr(annotation, "id", None))
    return CLASSES.get(name)


class Reads(ast.NodeVisitor):
    """Collects (class, dotted key) of every setting that a module reads."""

    def __init__(self):
        self.names = {}  # what a variable holds: (root class, path of attributes, class at that path)
        self.found = set()

    def place(self, node):
        """(root, path, class) of an expression that is a configuration or a section of one, or None."""
        if isinstance(node, ast.Name):
            return self.names.get(node.id)
        if isinstance(node, ast.Attribute):
            if (held := self.names.get(ast.unparse(node))) is not None:
                return held
            base = self.place(node.value)
            inner = base and nested(base[2], node.attr)
            return base and inner and (base[0], (*base[1], node.attr), inner)
        if isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Name | ast.Attribute):
            function = ast.unparse(node.func).split(".")[-1]
            if function in ("load", "from_dict"):
                kind = annotated_class(node.args[0])
                return kind and (kind, (), kind)
            if function == "replace":
                return self.place(node.args[0])
        return None

    def hold(self, name, place):
        if place:
            self.names[name] = place
        else:
            self.names.pop(name, None)

    def visit_ClassDef(self, node):
        before = dict(self.names)
        for item in node.body:
            if isinstance(item, ast.AnnAssign) and (kind := annotated_class(item.annotation)):
                self.names[f"self.{item.target.id}"] = (kind, (), kind)
        if kind := CLASSES.get(node.name):
            self.names["self"] = (kind, (), kind)
        self.generic_visit(node)
        self.names = before

    def visit_FunctionDef(self, node):
        if node.name == "__post_init__":
            return  # checks alone are no use of a setting
        before = dict(self.names)
        for argument in [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]:
            if argument.arg != "self":
                kind = argument.annotation and annotated_class(argument.annotation)
                self.hold(argument.arg, kind and (kind, (), kind))
        self.generic_visit(node)
        self.names = before

    def visit_Assign(self, node):
        self.generic_visit(node)
        for target in node.targets:
            if isinstance(target, ast.Name | ast.Attribute):
                self.hold(ast.unparse(target), self.place(node.value))

    def visit_Attribute(self, node):
        self.generic_visit(node)
        base = self.place(node.value)
        if base and isinstance(node.ctx, ast.Load) and node.attr in {f.name for f in dataclasses.fields(base[2])}:
            self.found.add((base[0], ".".join((*base[1], node.attr))))

    def visit_Call(self, node):
        self.generic_visit(node)
        whole = node.args and ast.unparse(node.func).split(".")[-1] == "asdict" and self.place(node.args[0])
        if whole:
            for item in dataclasses.fields(whole[2]):
                self.found.add((whole[0], ".".join((*whole[1], item.name))))


def reads_of(source):
    visitor = Reads()
    visitor.visit(ast.parse(source))
    return visitor.found


def unread(kind, found):
    """Dotted keys that nobody reads, neither through the whole configuration nor through their section alone."""
    missing = []
    # What is read of a base class is read of this one.
    found = found | {(kind, key) for root, key in found if root in kind.__mro__}
    for item in dataclasses.fields(kind):
        inner = nested(kind, item.name)
        if inner is None:
            missing += [item.name] * ((kind, item.name) not in found)
            continue
        deeper = found | {
            (inner, key.removeprefix(f"{item.name}.")) for root, key in found if root is kind and "." in key
            and key.startswith(f"{item.name}.")
        }  # fmt: skip
        missing += [f"{item.name}.{key}" for key in unread(inner, deeper)]
    return missing


def of_sections(found):
    """What is read through an UpdateConfig, which is made of a RunConfig's sections, as reads of those sections."""
    parts = [(key.partition(".")) for root, key in found if root is UpdateConfig and "." in key]
    return {(nested(UpdateConfig, section), key) for section, _, key in parts}


@pytest.mark.parametrize("kind", ROOTS, ids=lambda kind: kind.__name__)
def test_every_setting_is_read(kind):
    found = set().union(*(reads_of(path.read_text(encoding="utf-8")) for path in PACKAGE.rglob("*.py")))
    assert unread(kind, found | of_sections(found)) == []


@pytest.mark.parametrize(
    ("source", "key"),
    [
        ("def f(config: RunConfig):\n    return config.train.steps", "train.steps"),
        ("def f(config: 'settings.RunConfig'):\n    part = config.train\n    return part.steps", "train.steps"),
        ("class A:\n    config: RunConfig\n    def f(self):\n        return self.config.train.steps", "train.steps"),
        ("def f():\n    config = settings.load(RunConfig, path)\n    g(config.train.steps)", "train.steps"),
        ("def f(config: RunConfig):\n    def g():\n        return config.train.steps\n    return g", "train.steps"),
        ("def f(config: EtaConfig):\n    return config.gain", "eta.gain"),
        ("def f(config: RunConfig):\n    return asdict(config.model)", "model.path"),
        ("def f(config: RunConfig):\n    return replace(config.eta, gain=1).target_kl", "eta.target_kl"),
    ],
)
def test_a_read_is_seen(source, key):
    assert key not in unread(RunConfig, reads_of(source))
    assert "optimizer.b1" in unread(RunConfig, reads_of(source))


def test_a_read_through_the_update_is_one_of_the_run():
    found = reads_of("def f(config: UpdateConfig):\n    return config.baseline.kl_cov.coefficient")
    assert "baseline.kl_cov.coefficient" in unread(RunConfig, found)
    missing = unread(RunConfig, found | of_sections(found))
    assert "baseline.kl_cov.coefficient" not in missing
    assert "baseline.entropy_regularization.coefficient" in missing


@pytest.mark.parametrize(
    "source",
    [
        "def f(config: SftConfig):\n    return config.eval.k",
        "def f(eval):\n    return eval.k",
        "def f(config: RunConfig):\n    config.eval.k = 3",
        "class EvalConfig:\n    def __post_init__(self):\n        assert self.k",
        "def f(config: RunConfig):\n    config = other()\n    return config.eval.k",
    ],
)
def test_no_read_is_seen_where_there_is_none(source):
    assert "eval.k" in unread(RunConfig, reads_of(source))


def test_settings_of_the_equations_keep_their_paper_values():
    """The defaults are the paper's: a changed one changes every run that does not name it."""
    config = from_dict(RunConfig, {"name": "a"}, "test")
    advantage = config.advantage
    assert (advantage.eta, advantage.alpha, advantage.kappa, advantage.eta_normal) == (0.03, 0.5, 2.0, 0.0)
    assert (config.loss.clip_low, config.loss.clip_high, config.optimizer.learning_rate) == (0.2, 0.2, 3e-6)
    assert (config.optimizer.weight_decay, config.optimizer.gradient_clip) == (0.01, 1.0)
    assert (config.rollout.rollouts_per_mode, config.rollout.temperature, config.rollout.top_p) == (4, 1.0, 1.0)
    assert config.eta == EtaConfig()
    assert config.eta.schedule == "constant"
