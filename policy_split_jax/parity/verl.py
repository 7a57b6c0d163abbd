"""A run of verl's PPO and GRPO trainer (`verl.trainer.main_ppo`) as a configuration of ours."""

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from policy_split_jax.config import RunConfig, read_tree
from policy_split_jax.errors import UserError
from policy_split_jax.parity.verl_keys import DEFAULTS, present_key, rule_of
from policy_split_jax.parity.verl_rules import Converted, Outcome, Rule, Unsupported, WithoutEffect
from policy_split_jax.parity.verl_script import script_words

_WORDS = {"null": None, "true": True, "false": False}
_INTEGER = re.compile(r"[+-]?(0|[1-9](_?[0-9]){0,99})")
_FLOAT = re.compile(r"[+-]?([0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))([eE][+-]?[0-9]+)?")


class Setting(NamedTuple):
    """One of our settings and where it comes from; both keys are dotted."""

    verl: str
    ours: str
    value: Any


class Refusal(NamedTuple):
    """A value that cannot be honoured, and why."""

    value: Any
    reason: str


@dataclass(frozen=True)
class Conversion:
    """Our settings, and what became of every key that was given: each is in exactly one of the four lists."""

    settings: dict[str, Any]
    """Nested, as in our YAML."""
    converted: tuple[Setting, ...]
    """A key of verl's may make several settings."""
    without_effect: dict[str, str]
    """Key of verl's: why there is nothing to set."""
    unsupported: dict[str, Refusal]
    unknown: dict[str, Any]
    defaults: tuple[Setting, ...]
    """What was not given, where verl's default is not ours; these are in `settings` too."""
    remarks: tuple[str, ...]
    """What is not the same here, or is left to do."""


def read_overrides(source: str | Path | Sequence[str]) -> dict[str, Any]:
    """verl's dotted keys and their values, in the order in which they are given; of a key given twice the last value.

    `source` is a list of overrides in hydra's form (`key=value`, `+key=value`, `++key=value`, `~key`), a YAML file
    with verl's configuration, or a shell script that starts the trainer with overrides. A deletion is the key `~key`.
    References of any kind (`$HOME`, `${trainer.project_name}`) are kept as text, but for variables that the script
    itself sets; a word of the script that could not be read is a key without value.

    Raises:
      UserError: what was given is no override, or the file cannot be read.
    """
    if not isinstance(source, str | Path):
        return _read_words(source)
    path = Path(source)
    if path.suffix in (".yaml", ".yml"):
        return dict(_leaves(read_tree(path)))
    return _read_words(script_words(path))


def convert(overrides: Mapping[str, Any]) -> Conversion:
    """Our settings for the same run, from what `read_overrides` gives.

    Settings that verl has another default for than we are set to it, so that what was not given is the same too.
    """
    given: dict[str, Any] = {}
    for key, value in overrides.items():
        name = present_key(key)
        given[name] = value if given.get(name) is None else given[name]
    run = DEFAULTS | given
    defaults, of_defaults = _outcomes([key for key in DEFAULTS if key not in given], run)
    converted, outcomes = _outcomes(overrides, run)
    settings = {setting.ours: setting.value for setting in (*defaults, *converted)}
    return Conversion(
        settings=_nested(settings),
        converted=tuple(converted),
        without_effect={key: each.reason for key, each in outcomes.items() if isinstance(each, WithoutEffect)},
        unsupported={
            key: Refusal(overrides[key], each.reason) for key, each in outcomes.items() if isinstance(each, Unsupported)
        },
        unknown={key: value for key, value in overrides.items() if key not in outcomes},
        defaults=tuple(defaults),
        remarks=tuple(dict.fromkeys([*_remarks(outcomes, of_defaults), *_loose_ends(settings)])),
    )


def to_yaml(conversion: Conversion) -> str:
    """A configuration file of ours: verl's keys beside the settings, and at the end what could not be converted."""
    given: dict[str, list[str]] = {}
    for setting in conversion.converted:
        given.setdefault(setting.ours, []).append(setting.verl)
    origins = {setting.ours: f"verl's default of {setting.verl}" for setting in conversion.defaults}
    origins |= {ours: ", ".join(keys) for ours, keys in given.items()}
    lines = ["# A run of verl's trainer.", *_yaml_lines(conversion.settings, origins)]
    refused = conversion.unsupported.items()
    sections = {
        "Not the same here, or left to do": conversion.remarks,
        "Unsupported": [f"{key}={_short(value)}: {reason}" for key, (value, reason) in refused],
        "Unknown": [f"{key}={_short(value)}" for key, value in conversion.unknown.items()],
    }
    for title, entries in sections.items():
        lines += ["", f"# {title}:", *(f"# - {_line(entry)}" for entry in entries)] if entries else []
    return "\n".join(lines) + "\n"


def _outcomes(keys: Iterable[str], run: Mapping[str, Any]) -> tuple[list[Setting], dict[str, Outcome]]:
    """Our settings of these keys, and what became of each that is known."""
    settings: list[Setting] = []
    outcomes: dict[str, Outcome] = {}
    for key in keys:
        name = present_key(key.removeprefix("~"))
        rule = rule_of(name)
        if rule is None:
            continue
        outcomes[key] = WithoutEffect("deleted there") if key.startswith("~") else _outcome(rule, run[name], run)
        if isinstance(outcome := outcomes[key], Converted):
            settings += [Setting(key, ours, value) for ours, value in outcome.settings.items()]
    return settings, outcomes


def _outcome(rule: Rule, value: Any, run: Mapping[str, Any]) -> Outcome:
    try:
        outcome = rule(value, run)
    except ValueError as error:
        outcome = Unsupported(str(error))
    if isinstance(outcome, Unsupported) and isinstance(value, str) and "$" in value:
        return outcome._replace(reason=f"what it stands for is not known here; {outcome.reason}")
    return outcome


def _remarks(outcomes: Mapping[str, Outcome], defaults: Mapping[str, Outcome]) -> Iterator[str]:
    """Each once for all that say it; first those of defaults that cannot be honoured."""
    for key, outcome in defaults.items():
        if isinstance(outcome, Unsupported):
            yield f"{key} is not given and therefore {_short(DEFAULTS[key])} in verl: {outcome.reason}"
    for outcome in (*defaults.values(), *outcomes.values()):
        if not isinstance(outcome, WithoutEffect) and outcome.remark:
            yield outcome.remark


def _loose_ends(settings: Mapping[str, Any]) -> Iterator[str]:
    """Texts that mean something else in a shell, in hydra or to a hub of models, and files that are not named."""
    for ours in ("model.path", "data.train", "data.test"):
        if ours not in settings:
            yield f"{ours} is not set: without it the run uses what is embedded in the package"
    for ours, value in settings.items():
        if isinstance(value, str) and ("$" in value or value.startswith("~")):
            yield f"{ours} is {value}, which nothing replaces here: write it out"
        elif ours == "model.path" and value.count("/") == 1 and not value.startswith((".", "/")):
            yield f"model.path is a folder here: where {value} is a name on a hub, download it and give its folder"


def _read_words(words: Iterable[str]) -> dict[str, Any]:
    return {key: value for word in words for key, value in _read_word(word)}


def _read_word(word: str) -> Iterator[tuple[str, Any]]:
    key, equals, text = word.partition("=")
    if key.startswith(("~", "$")):
        return iter([(key, _value(text) if equals else None)])
    key = key.lstrip("+")
    if not equals or not key:
        raise UserError(f"{word!r}: is no override of verl's; write key=value")
    return _leaves({key: _value(text)})


def _leaves(tree: Mapping[Any, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """The dotted keys of nested sections; an empty section is a value."""
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value


def _value(text: str) -> Any:
    """A value as hydra reads it: https://hydra.cc/docs/advanced/override_grammar/basic/."""
    if text.startswith(("[", "{")):
        try:
            # Its scalars stay text: YAML would read dates and numbers that hydra does not.
            return _typed(yaml.load(text, yaml.BaseLoader))
        except (yaml.YAMLError, RecursionError):
            return text
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        return text[1:-1]
    return _typed(text)


def _typed(value: Any) -> Any:
    if isinstance(value, list):
        return [_typed(item) for item in value]
    if isinstance(value, dict):
        return {key: _typed(item) for key, item in value.items()}
    if value.lower() in _WORDS:
        return _WORDS[value.lower()]
    if _INTEGER.fullmatch(value):
        return int(value)
    return float(value) if _FLOAT.fullmatch(value) else value


def _nested(settings: Mapping[str, Any]) -> dict[str, Any]:
    """In the order of RunConfig."""
    tree: dict[str, Any] = {}
    order = [item.name for item in fields(RunConfig)]
    for key, value in sorted(settings.items(), key=lambda item: order.index(item[0].partition(".")[0])):
        *sections, last = key.split(".")
        place = tree
        for section in sections:
            place = place.setdefault(section, {})
        place[last] = value
    return tree


def _yaml_lines(tree: Mapping[str, Any], origins: Mapping[str, str], above: str = "") -> Iterator[str]:
    indent = "  " * above.count(".")
    for key, value in tree.items():
        if isinstance(value, dict):
            yield f"{indent}{key}:"
            yield from _yaml_lines(value, origins, f"{above}{key}.")
        else:
            yield f"{indent}{key}: {_scalar(value)}  # {_line(origins[above + key])}"


def _scalar(value: Any) -> str:
    """In YAML, on one line."""
    quoted = isinstance(value, str) and not value.isprintable()
    return yaml.safe_dump(value, default_style='"' if quoted else None, width=math.inf).partition("\n")[0]


def _short(value: Any) -> str:
    """As hydra writes it, not all of a long one."""
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    return text if len(text) <= 200 else text[:199] + "…"


def _line(text: str) -> str:
    """Fit for a comment."""
    return "".join(letter if letter.isprintable() else " " for letter in text)
