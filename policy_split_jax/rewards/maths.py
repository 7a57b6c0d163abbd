r"""Mathematical equality of the final answer with the ground truth, judged by math-verify.

Sympy works on the model's text here, so time and memory are bounded only by a worker process of `GraderPool`.
"""

from typing import Any

from policy_split_jax.rewards.answers import after_think, marked, reference


def score(response: str, ground_truth: str | int | float) -> float:
    r"""1.0 for a response whose answer equals the ground truth mathematically, else 0.0.

    The answer is the content of the last `\boxed{}`, else what follows the last `####`, after the thinking; a
    response without either scores 0.0. The ground truth is a bare answer, or a text with a box or `####`.

    Raises:
        ValueError: the ground truth holds no answer.
        Exception: whatever sympy raises when it fails to compare the two.
    """
    return float(canonical(response, ground_truth) is not None)


def canonical(response: str, ground_truth: str | int | float) -> str | None:
    """The ground truth's answer where the response is correct (all correct answers are one), else None."""
    from math_verify import verify

    expected = reference(ground_truth)
    gold = _parse(expected)
    if not gold:
        raise ValueError(f"the ground truth {expected[:80]!r} holds no mathematical answer")
    answer = marked(after_think(response))
    if not answer:
        return None
    # No timeouts: math-verify's use signals, and the pool's limits also hold inside one long call.
    correct = verify(gold, _parse(answer), timeout_seconds=None, raise_on_error=True)
    return expected if correct else None


def answered(response: str, ground_truth: str | int | float) -> str | None:
    """The answer, right or wrong, in the form that sympy gives it, decimals as fractions; None where there is none.

    So that equal wrong answers mostly have one form, as all right ones have: 0.25, 1/4 and \\frac14.
    """
    answer = marked(after_think(response))
    return _form(answer) if answer else None


def _form(answer: str) -> str:
    """As it is written where sympy does not read it."""
    from sympy import Number, nsimplify

    try:
        value = _parse(answer)[0]
        return str(nsimplify(value, rational=True) if isinstance(value, Number) else value)
    except Exception:
        return answer


def _parse(answer: str) -> list[Any]:
    from math_verify import LatexExtractionConfig, parse

    # parsing_timeout: annotated as int, but None is its documented way to switch the signals off.
    return parse(
        r"\boxed{" + answer.strip().removesuffix(".") + "}",
        [LatexExtractionConfig(boxed_match_priority=0)],
        parsing_timeout=None,  # pyright: ignore[reportArgumentType]
        raise_on_error=True,
    )
