r"""The final answer as the published trainer of Policy Split reads it, judged by the rule of PRM800K's grader.

A response must end its thinking and box its answer (https://github.com/BITHLP/PolicySplit,
`verl/utils/reward_score/openai_math_grade.py`). The box is matched greedily within a line: its content ends before the
line's last closing brace, so a second box, or braces behind the box, on the same line make a wrong answer, and a box
that holds a line break is none.
"""

from policy_split_jax.rewards.prm800k import matched


def score(response: str, ground_truth: str | int | float) -> float:
    r"""1.0 for a response whose answer equals the ground truth, else 0.0.

    The answer is what stands between the first `\boxed{` and the last `}` of the last line behind `</think>` that
    has them; a response without these scores 0.0. The ground truth is a bare answer, or a text with a box or `####`.

    Raises:
        ValueError: the ground truth holds no answer.
    """
    return float(canonical(response, ground_truth) is not None)


def canonical(response: str, ground_truth: str | int | float) -> str | None:
    """The ground truth's answer where the response is correct (all correct answers are one), else None."""
    return matched(answered(response, ground_truth), ground_truth)


def answered(response: str, ground_truth: str | int | float) -> str | None:
    """The answer as it is written, right or wrong; None where there is none."""
    _, ended, behind = response.rpartition("</think>")
    for line in reversed(behind.split("\n") if ended else []):
        content, brace, _ = line.partition(r"\boxed{")[2].rpartition("}")
        if brace:
            return content.strip() or None
    return None
