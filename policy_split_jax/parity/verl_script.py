"""The overrides of hydra that a shell script gives to verl's trainer. Nothing is executed."""

import math
import re
import shlex
from collections.abc import Iterator, Sequence
from itertools import dropwhile, pairwise
from pathlib import Path

from policy_split_jax.errors import UserError

_PART = r"""'[^']*'|"(?:\\.|[^"\\])*"|\\.|\$\((?:[^()]|\([^()]*\))*\)|\$\{(?:[^{}]|\{[^{}]*\})*\}|[^\s'"\\;&|<>()]"""
_COMMENT = r"(?<![^\s(;&|])\#[^\n]*"
_ARRAY = rf"[A-Za-z_]\w*\+?=\((?>{_COMMENT}|\s|{_PART})*\)"
_TOKEN = re.compile(rf"(?P<skipped>{_COMMENT}|[^\S\n]+)|(?P<word>{_ARRAY}|(?>{_PART})+)|[\n;&|<>()]", re.DOTALL)
_ASSIGNMENT = re.compile(r"([A-Za-z_]\w*)(\+?)=(\()?(.*)", re.DOTALL)
_VARIABLE = re.compile(r"\$(?:([A-Za-z_]\w*)|\{([A-Za-z_]\w*)(?::?-((?:[^{}]|\{[^{}]*\})*))?\})")
_ELEMENTS = re.compile(r"\$\{([A-Za-z_]\w*)\[[@*]\]\}")
_ARITHMETIC = re.compile(r"\$\(\(([\w\s+*${}]*)\)\)")
_ARGUMENTS = re.compile(r"\$\{?[@*].*")
_TRAINER = re.compile(r"[\w./-]*\bmain_(ppo|ppo_sync|dapo)(\.py)?")

_CONFIGURATION = {
    "--config-name": "--config-name",
    "-cn": "--config-name",
    "--config-path": "--config-path",
    "-cp": "--config-path",
}
"""Options of hydra whose value may be the next word."""
_SIGNS = tuple("\n;&|<>()")
_LEADING = ("then", "else", "do", "{", "export", "declare", "typeset", "local", "readonly")
_OPENING = ("if", "case", "for", "while", "until", "select", "function", "{")
_CLOSING = ("fi", "esac", "done", "}")


def script_words(path: Path) -> list[str]:
    """The words behind the trainer's name that are overrides, or that stand for words that are not known here.

    A variable that the script sets is replaced by its value, and `${NAME:-value}` by `value` where it is set nowhere.
    One that is set only under a condition keeps its name.

    Raises:
      UserError: the file cannot be read, or does not start the trainer just once.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}); check the path") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 at byte {error.start}; save the file as UTF-8") from None
    variables, found = _Variables(), []
    for certain, raw in _commands(_tokens(text, str(path))):
        words = list(dropwhile(lambda word: word in _LEADING or word.startswith("-"), raw))
        assignments = [match for word in words if (match := _ASSIGNMENT.fullmatch(word))]
        if len(assignments) == len(words):
            variables.assign(assignments, certain)
            continue
        words = variables.words(words)
        place = next((index for index, word in enumerate(words) if _TRAINER.fullmatch(word)), None)
        if place is not None:
            found.append(list(_overrides(words[place + 1 :])))
    if len(found) != 1:
        raise UserError(
            f"{path}: starts verl.trainer.main_ppo {len(found)} times; leave one such command in the script"
        )
    return found[0]


def _overrides(words: Sequence[str]) -> Iterator[str]:
    for before, word in pairwise(("", *words)):
        if before in _CONFIGURATION:
            yield f"{_CONFIGURATION[before]}={word}"
        elif _may_override(word):
            yield word


def _may_override(word: str) -> bool:
    return ("=" in word or word.startswith(("~", "$"))) and not _ARGUMENTS.fullmatch(word)


def _tokens(text: str, source: str) -> Iterator[str]:
    """Words as they are written, among them whole arrays, and signs."""
    position = 0
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None:
            line = text.count("\n", 0, position) + 1
            raise UserError(f"{source}:{line}: a quotation mark without its partner; give the overrides themselves")
        position = match.end()
        # A line that goes on leaves an empty word.
        if match["skipped"] is None and (token := match[0].replace("\\\n", "")):
            yield token


def _commands(tokens: Iterator[str]) -> Iterator[tuple[bool, list[str]]]:
    """Of each simple command whether it is executed whatever happens, and its words."""
    depth, before, words = 0, "\n", []
    for token in (*tokens, "\n"):
        if token not in _SIGNS:
            words.append(token)
            continue
        if words:
            depth += (words[0] in _OPENING) - (words[0] in _CLOSING)
            yield depth == 0 and before not in ("&", "|"), words
        before, words = token, []


class _Variables:
    """The variables that a script sets, as far as their values are certain."""

    def __init__(self) -> None:
        self._values: dict[str, str] = {}
        self._arrays: dict[str, list[str]] = {}
        self._uncertain: set[str] = set()

    def assign(self, assignments: Sequence[re.Match[str]], certain: bool) -> None:
        """`NAME=value`, `NAME+=value` and the same with an array in parentheses."""
        for name, plus, array, text in (match.groups() for match in assignments):
            if not certain:
                self._uncertain.add(name)
                continue
            if not plus:
                self._uncertain.discard(name)
            if array:
                items = self.words([token for token in _tokens(text[:-1], name) if token not in _SIGNS])
                self._arrays[name] = (self._arrays.get(name, []) if plus else []) + items
            else:
                self._values[name] = (self._values.get(name, "") if plus else "") + self._expanded(_unquoted(text))

    def words(self, raw: Sequence[str]) -> list[str]:
        """What a command gets for its words."""
        return [word for text in map(_unquoted, raw) for word in self._split(text)]

    def _split(self, text: str) -> list[str]:
        if elements := _ELEMENTS.fullmatch(text):
            name = elements[1]
            known = name in self._arrays and name not in self._uncertain
            return self._arrays.get(name, []) + ([] if known else [text])
        expanded = self._expanded(text)
        return expanded.split() if _VARIABLE.fullmatch(text) else [expanded]

    def _expanded(self, text: str) -> str:
        return _VARIABLE.sub(self._value, _ARITHMETIC.sub(self._result, text))

    def _value(self, match: re.Match[str]) -> str:
        name, default = match[1] or match[2], match[3]
        if name in self._uncertain or (name not in self._values and default is None):
            return match[0]
        return self._values.get(name) or self._expanded(default or "")

    def _result(self, match: re.Match[str]) -> str:
        """Of sums of products of whole numbers; other arithmetic stays as it is."""
        numbers = re.sub(r"\$?\{?([A-Za-z_]\w*)\}?", lambda name: self._expanded(f"${name[1]}"), match[1])
        try:
            return str(sum(math.prod(map(int, term.split("*"))) for term in numbers.split("+")))
        except ValueError:
            return match[0]


def _unquoted(word: str) -> str:
    try:
        return " ".join(shlex.split(word))
    except ValueError:  # quotation marks inside $(…)
        return word
