"""PRM800K's rule and math-verify on GSM8K's reference answers, and on other ways to write them, right and wrong."""

import json
import re
from collections.abc import Callable
from itertools import cycle, islice
from pathlib import Path

import pytest

from policy_split_jax.rewards import maths, prm800k

PER_RULE = 5

# How the number n of a reference is written (n is at least 1000 and a multiple of 10), and whether a person would
# take it for n. Units count as right: the references have none.
RULES: dict[str, tuple[Callable[[int], str], bool]] = {
    "decimal zero": (lambda n: f"{n}.0", True),
    "trailing point": (lambda n: f"{n}.", True),
    "cents": (lambda n: f"{n}.00", True),
    "leading zero": (lambda n: f"0{n}", True),
    "plus sign": (lambda n: f"+{n}", True),
    "thousands comma": (lambda n: f"{n:,}", True),
    "thousands in LaTeX": (lambda n: f"{n:,}".replace(",", r"{,}"), True),
    "thousands space": (lambda n: f"{n:,}".replace(",", " "), True),
    "thin space": (lambda n: f"{n:,}".replace(",", r"\,"), True),
    "dollar sign": (lambda n: f"${n}", True),
    "escaped dollar sign": (lambda n: rf"\${n:,}.00", True),
    "text unit after a space": (lambda n: rf"{n}\text{{ apples}}", True),
    "text unit without a space": (lambda n: rf"{n}\ \text{{apples}}", True),
    "currency in words": (lambda n: f"{n} dollars", True),
    "unit in words": (lambda n: f"{n} apples", True),
    "unit of the rule": (lambda n: f"{n} hours", True),
    "degrees": (lambda n: rf"{n}^{{\circ}}", True),
    "percent": (lambda n: rf"{n}\%", True),
    "bold": (lambda n: rf"\mathbf{{{n}}}", True),
    "letter equals": (lambda n: f"x = {n}", True),
    "word equals": (lambda n: rf"\text{{Total}} = {n}", True),
    "parentheses": (lambda n: f"({n})", True),
    "box in the box": (lambda n: rf"\boxed{{{n}}}", True),
    "over one": (lambda n: f"{n}/1", True),
    "fraction": (lambda n: rf"\frac{{{2 * n}}}{{2}}", True),
    "sum": (lambda n: f"{n - 1} + 1", True),
    "product": (lambda n: rf"2 \times {n // 2}", True),
    "root": (lambda n: rf"\sqrt{{{n * n}}}", True),
    "first power": (lambda n: f"{n}^1", True),
    "scientific notation": (lambda n: f"{n // 10}e1", True),
    "scientific notation in LaTeX": (lambda n: rf"{n // 10} \times 10^1", True),
    "minus sign": (lambda n: f"-{n}", False),
    "half more": (lambda n: f"{n}.5", False),
    "mixed number": (lambda n: rf"{n}\frac{{1}}{{2}}", False),
    "one more": (lambda n: str(n + 1), False),
    "tenfold": (lambda n: f"{n}0", False),
    "thousandth": (lambda n: f"{n / 1000}", False),
    "comma at the wrong place": (lambda n: f"{str(n)[:-2]},{str(n)[-2:]}", False),
    "times a letter": (lambda n: f"{n}x", False),
    "two answers": (lambda n: f"{n}, {n + 1}", False),
    "or in words": (lambda n: f"{n} or {n + 1}", False),
    "or as text": (lambda n: rf"{n}\text{{ or }}{n + 1}", False),
    "plus or minus": (lambda n: rf"{n} \pm 1", False),
    "nearly": (lambda n: f"{n}.00000001", False),
    "in pieces": (lambda n: f"{str(n)[:-2]} {str(n)[-2:]}", False),
}

# Whether prm800k and whether math-verify takes it for n.
DISAGREEMENTS = {
    # An integer must be written as one, and few units are known.
    "text unit without a space": (False, True),
    "unit in words": (False, True),
    "word equals": (False, True),
    "over one": (False, True),
    "fraction": (False, True),
    "sum": (False, True),
    "product": (False, True),
    "root": (False, True),
    "first power": (False, True),
    "scientific notation in LaTeX": (False, True),
    # Not read by math-verify as a person would.
    "thousands space": (True, False),
    "thin space": (True, False),
    "scientific notation": (True, False),
    # Taken for right by the letter of the rule: `\text{ ` begins a unit, spaces go, floats are integers but for 1e-7.
    "or as text": (True, False),
    "in pieces": (True, False),
    "nearly": (True, False),
}

# Where both say the same and a person would not.
BOTH_WRONG = {"currency in words"}


@pytest.fixture(scope="module")
def references(shared: Path) -> dict[str, str]:
    """Of each reference, its worked solution and the final number in it, as it is written."""
    lines = (shared / "data" / "gsm8k" / "test.jsonl").read_text().splitlines()
    solutions = [json.loads(line)["answer"] for line in lines]
    return {solution: solution.rpartition("####")[2].strip() for solution in solutions}


def test_both_accept_every_reference(references: dict[str, str]):
    assert len(references) == 1319
    for solution, number in references.items():
        assert _verdicts(number, solution) == (True, True), number


def test_they_differ_only_where_the_table_says(references: dict[str, str]):
    chosen = [(solution, int(number)) for solution, number in references.items() if re.fullmatch(r"\d{3,}0", number)]
    numbers, answers = cycle(chosen), 0
    for rule, (write, person) in RULES.items():
        agreed = person != (rule in BOTH_WRONG)
        for solution, n in islice(numbers, PER_RULE):
            assert _verdicts(write(n), solution) == DISAGREEMENTS.get(rule, (agreed, agreed)), (rule, write(n))
            answers += 1
    assert answers >= 200
    assert DISAGREEMENTS.keys() | BOTH_WRONG <= RULES.keys()


def test_a_reference_with_a_comma_costs_prm800k_what_only_its_first_normalisation_reads(references: dict[str, str]):
    with_comma = [(solution, number) for solution, number in references.items() if "," in number]
    assert len(with_comma) == 14
    for solution, number in with_comma:
        plain = number.replace(",", "")
        assert _verdicts(plain, solution) == (True, True), plain
        assert _verdicts(f"x = {plain}", solution) == (False, True), plain
        assert _verdicts(rf"{plain}\text{{ apples}}", solution) == (False, True), plain


def _verdicts(answer: str, solution: str) -> tuple[bool, bool]:
    response = rf"So it is \boxed{{{answer}}}."
    return prm800k.score(response, solution) == 1.0, maths.score(response, solution) == 1.0
