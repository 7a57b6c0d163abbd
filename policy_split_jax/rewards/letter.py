r"""The letter of a multiple-choice answer: `\boxed{B}`, however it is dressed, and nothing else."""

import re

from policy_split_jax.rewards.answers import after_think, last_boxed

_FONT = re.compile(r"\\(?:text|textbf|mathrm|mathbf)\s*\{([^{}]*)\}")
# A letter alone, in parentheses, or before a full stop or parenthesis, behind which the choice may be repeated. Another
# letter, or a word that leads to one, is no such choice: `(B) and (C)` answers nothing.
_OTHERS = r"(?:and|or|maybe)\b|[,;/&]|\(\s*[a-z]\s*\)|[a-z]\)|(?:[a-z][.)]?(?:\s+|$))+$"
_LETTER = re.compile(
    rf"(?:\(\s*([a-z])\s*\)|([a-z])(?:[.)]|$))(?:\s+(?!{_OTHERS})\S.*)?", re.IGNORECASE | re.ASCII | re.DOTALL
)


def score(response: str, ground_truth: str) -> float:
    r"""1.0 for a response whose last box after the thinking holds the ground truth's letter, else 0.0.

    Raises:
        ValueError: the ground truth is no letter.
    """
    return float(canonical(response, ground_truth) is not None)


def canonical(response: str, ground_truth: str) -> str | None:
    """The letter where it is correct, else None."""
    expected = _letter(str(ground_truth))
    if expected is None:
        raise ValueError(f"the ground truth {str(ground_truth)[:80]!r} is no letter")
    return expected if answered(response, ground_truth) == expected else None


def answered(response: str, ground_truth: str) -> str | None:
    """The letter that was answered, in capitals, right or wrong; None where there is none."""
    return _letter(last_boxed(after_think(response)) or "")


def _letter(text: str) -> str | None:
    plain = _FONT.sub(r"\1", text.strip()).strip()
    found = _LETTER.fullmatch(plain)
    return (found[1] or found[2]).upper() if found else None
