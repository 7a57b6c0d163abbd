"""Countdown: reach the target from the given numbers, each used exactly once, with + - * / and parentheses.

A ground truth is `{"numbers": [int, ...], "target": int}`. Expressions are parsed,
never run as code, and are short enough to be graded without a process of their own.
"""

import ast
import re
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

from policy_split_jax.rewards.answers import after_think, last_boxed, last_line

MAX_LENGTH = 200
MAX_DEPTH = 64

_SYMBOLS = str.maketrans({"×": "*", "÷": "/", "−": "-"})
_ALLOWED = re.compile(r"[0-9+\-*/()\s]+", re.ASCII)


def evaluate(expression: str) -> Fraction:
    """The exact value of an arithmetic expression of integers.

    Allowed are decimal integer literals, + - * /, unary minus, parentheses, and × ÷ − for * / -.

    Raises:
        ValueError: the text is anything else, too long or too deep, or divides by zero.
    """
    return _value(_parse(expression))


def score(response: str, ground_truth: Mapping[str, Any]) -> float:
    """1.0 for a response whose expression is a correct solution, else 0.0."""
    return float(canonical(response, ground_truth) is not None)


def canonical(response: str, ground_truth: Mapping[str, Any]) -> str | None:
    """One text for all orderings and bracketings of the same correct solution; None where it is not correct.

    Sums and products are flattened and sorted (a difference is a negative term, a quotient an inverse factor)
    and signs are moved outwards, so that `a-(b-c)`, `c+a-b` and `(a-b)+c` coincide. Nothing is expanded.
    """
    numbers, target = sorted(ground_truth["numbers"]), ground_truth["target"]
    try:
        node = _parse(_final_expression(response, target))
        correct = sorted(_literals(node)) == numbers and _value(node) == target
    except ValueError:
        return None
    return _form(node) if correct else None


def answered(response: str, ground_truth: Mapping[str, Any]) -> str | None:
    """The canonical text of the expression answered, right or wrong; None where there is none."""
    try:
        return _form(_parse(_final_expression(response, ground_truth["target"])))
    except ValueError:
        return None


def _form(node: ast.expr) -> str:
    sign, text = _signed(node)
    return text if sign > 0 else f"-{text}"


def _final_expression(response: str, target: int) -> str:
    answer = after_think(response)
    boxed = last_boxed(answer)
    expression = last_line(answer) if boxed is None else boxed
    # Only "= <target>" may follow; a wrong result stays in and fails to parse.
    before, equals, result = expression.translate(_SYMBOLS).rpartition("=")
    return before.strip() if equals and result.strip() == str(target) else expression


def _parse(expression: str) -> ast.expr:
    text = expression.translate(_SYMBOLS)
    if len(text) > MAX_LENGTH or not _ALLOWED.fullmatch(text):
        raise ValueError(f"not an expression of at most {MAX_LENGTH} digits, + - * / and parentheses")
    try:
        node = ast.parse(" ".join(text.split()), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError("not an arithmetic expression") from error
    _check(node, MAX_DEPTH)
    return node


def _check(node: ast.expr, depth: int) -> None:
    if depth == 0:
        raise ValueError(f"nested deeper than {MAX_DEPTH}")
    match node:
        case ast.Constant(value=value) if type(value) is int:
            return
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            _check(operand, depth - 1)
        case ast.BinOp(left=left, op=ast.Add() | ast.Sub() | ast.Mult() | ast.Div(), right=right):
            _check(left, depth - 1)
            _check(right, depth - 1)
        case _:
            raise ValueError(f"{type(node).__name__} is not allowed")


def _value(node: ast.expr) -> Fraction:
    match node:
        case ast.Constant(value=int(value)):
            return Fraction(value)
        case ast.UnaryOp(operand=operand):
            return -_value(operand)
        case ast.BinOp(left=left, op=op, right=right):
            return _apply(op, _value(left), _value(right))
    raise ValueError(f"{type(node).__name__} is not allowed")


def _apply(op: ast.operator, left: Fraction, right: Fraction) -> Fraction:
    match op:
        case ast.Add():
            return left + right
        case ast.Sub():
            return left - right
        case ast.Mult():
            return left * right
        case ast.Div() if right != 0:
            return left / right
        case ast.Div():
            raise ValueError("division by zero")
    raise ValueError(f"{type(op).__name__} is not allowed")


def _literals(node: ast.expr) -> list[int]:
    constants = (leaf.value for leaf in ast.walk(node) if isinstance(leaf, ast.Constant))
    return [value for value in constants if isinstance(value, int)]


def _signed(node: ast.expr) -> tuple[int, str]:
    """The sign and the canonical text of the rest."""
    match node:
        case ast.Constant(value=value):
            return 1, str(value)
        case ast.BinOp(op=ast.Add() | ast.Sub()):
            terms = sorted(_terms(node, 1), key=lambda term: (term[1], -term[0]))
            lead = terms[0][0]  # the first term is made positive, so that a-b and -(b-a) coincide
            body = "".join(("+" if sign == lead else "-") + text for sign, text in terms)
            return lead, f"({body[1:]})"
        case _:
            factors = _factors(node, "*")
            sign = -1 if sum(factor[0] < 0 for factor in factors) % 2 else 1
            # "*" sorts before "/" and some factor is not inverse, so the text dropped is a "*".
            return sign, "".join(sorted(operator + text for _, operator, text in factors))[1:]


def _terms(node: ast.expr, sign: int) -> list[tuple[int, str]]:
    match node:
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return _terms(left, sign) + _terms(right, sign)
        case ast.BinOp(left=left, op=ast.Sub(), right=right):
            return _terms(left, sign) + _terms(right, -sign)
        case ast.UnaryOp(operand=operand):
            return _terms(operand, -sign)
    inner, text = _signed(node)
    return [(sign * inner, text)]


def _factors(node: ast.expr, operator: str) -> list[tuple[int, str, str]]:
    match node:
        case ast.BinOp(left=left, op=ast.Mult(), right=right):
            return _factors(left, operator) + _factors(right, operator)
        case ast.BinOp(left=left, op=ast.Div(), right=right):
            return _factors(left, operator) + _factors(right, "*" if operator == "/" else "/")
        case ast.UnaryOp(operand=operand):
            (sign, first_operator, text), *others = _factors(operand, operator)
            return [(-sign, first_operator, text), *others]
    sign, text = _signed(node)
    return [(sign, operator, text)]
