"""Equality of the final answer with the ground truth, as numbers where both are numbers, else as text."""

import re

from policy_split_jax.rewards.answers import after_hashes, after_think, last_boxed, last_line

_NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)", re.ASCII)
_THOUSANDS = re.compile(r"[+-]?\d{1,3}(,\d{3})+(\.\d*)?", re.ASCII)


def score(response: str, ground_truth: str | int | float) -> float:
    """1.0 for a response whose answer equals the ground truth, else 0.0.

    The answer is the content of the last box, else what follows the last `####`, else the last line that
    is not blank, all after the thinking.

    Raises:
        ValueError: the ground truth holds no answer.
    """
    return float(canonical(response, ground_truth) is not None)


def canonical(response: str, ground_truth: str | int | float) -> str | None:
    """The normalised answer where it is correct (18, 18.0 and $18 are one), else None."""
    expected = _answer(str(ground_truth))
    if not expected:
        raise ValueError("the ground truth is empty")
    answer = _answer(after_think(response))
    return answer if answer == expected else None


def answered(response: str, ground_truth: str | int | float) -> str | None:
    """The normalised answer, right or wrong; None where there is none."""
    return _answer(after_think(response)) or None


def _answer(text: str) -> str:
    answer = last_boxed(text)
    if answer is None:
        answer = after_hashes(text)
    return _normalise(last_line(text) if answer is None else answer)


def _normalise(answer: str) -> str:
    bare = answer.strip().replace("\\$", "$").strip("$").strip()
    number = bare.replace(",", "") if _THOUSANDS.fullmatch(bare) else bare
    return _shortest(number) if _NUMBER.fullmatch(number) else bare


def _shortest(number: str) -> str:
    """The decimal without a plus sign, leading zeros or trailing zeros; made from text, so of any length."""
    whole, _, decimals = number.lstrip("+-").partition(".")
    whole, decimals = whole.lstrip("0") or "0", decimals.rstrip("0")
    size = f"{whole}.{decimals}" if decimals else whole
    return f"-{size}" if number.startswith("-") and size != "0" else size
