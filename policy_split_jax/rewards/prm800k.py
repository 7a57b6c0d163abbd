r"""Equality of the final answer with the ground truth by the rule of PRM800K's grader.

The rule is that of https://github.com/openai/prm800k (`prm800k/grading`, arXiv 2305.20050): equal after one of two
normalisations of the text, or else, part by part, a difference that sympy simplifies to zero. There, sympy runs the
text as code. Here it is parsed into a tree of arithmetic, and what is no arithmetic is not equal. Other differences:
`\frac{x+1}{2}` keeps its parentheses, -7 3/4 is -7.75, roots keep their index, decimals are exact, numbers may have
any count of thousands separators, parts of tuples may hold parentheses and are equal where their texts are, and
texts of which nothing is left are not equal.

Powers, lengths and depths are bounded. How long sympy may take is bounded only by a worker process of `GraderPool`.
"""

import ast
import operator
import re
from fractions import Fraction
from itertools import accumulate
from typing import Any

from policy_split_jax.rewards.answers import after_think, last_boxed, reference

MAX_LENGTH = 500
MAX_DEPTH = 64
MAX_DEGREE = 99
MAX_LETTERS = 2

_TEXT = re.compile(r"\\text\{([^{}]+)\}")
_FIRST_ARGUMENT = re.compile(r"\\(frac|sqrt) ?(\\(?!frac|sqrt)[a-zA-Z]+|[^\s{}\[(\\])")
_SECOND_ARGUMENT = re.compile(r"\\frac(\{[^{}]*\}) ?(\\[a-zA-Z]+|[^\s{}\\])")
_INTEGERS = re.compile(r"^(-?(?:0|[1-9][0-9]*))/(-?(?:0|[1-9][0-9]*))$")
_MATH_REPLACEMENTS = (
    ("\n", ""),
    (r"\!", ""),
    (r"\\", "\\"),
    ("tfrac", "frac"),
    ("dfrac", "frac"),
    (r"\left", ""),
    (r"\right", ""),
    (r"^{\circ}", ""),
    (r"^\circ", ""),
    (r"\$", ""),
    (r"\%", ""),
)

_POWERS = {"million": "*10^6", "billion": "*10^9", "trillion": "*10^12"}
_UNITS = re.compile(
    r"(?:degree|cm|centimeter|meter|mile|second|minute|hour|day|week|month|year|foot|feet|inch|yard)"
    r"(?:es)?s? *(?:\^[0-9]+)?"
)
_DEGREES = re.compile(r"\^ *(?:\\circ|\{ *\\circ *\})")
_MIXED = re.compile(r"(-?)(?<![0-9])([0-9]+) +(?=[0-9])")
_THOUSANDS = re.compile(r"(?<=[0-9]),(?=[0-9]{3}(?![0-9]))")
_NUMBER = r"(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:e[+-]?[0-9]{1,2})?"
_SIGNED_NUMBER = re.compile(rf"[+-]?{_NUMBER}", re.IGNORECASE)

# Before a name, two backslashes are one that was escaped.
_ROW_END = re.compile(r"(?:\\\\){1,2}(?![a-zA-Z]{2})")
_MATRIX_START = re.compile(r"\\{1,2}begin\{[bp]?matrix\}")
_MATRIX_END = re.compile(r"\\{1,2}end\{[bp]?matrix\}")
_FRACTION = re.compile(r"(\\sqrt ?|[/^] ?)?\\frac ?\{([^{}]*)\} ?\{([^{}]*)\}")
_ROOT = re.compile(r"\\sqrt ?(?:\[([^\[\]{}]*)\])? ?\{([^{}]*)\}")
_RADICAL = re.compile(r"√ *([0-9]+|[a-zA-Z])")
_POWER = re.compile(r"\^ ?\{([^{}]*)\}")
_WORDS = re.compile(r"\\(?:text|textbf|textit|textrm|mbox|mathrm|mathbf|mathit|operatorname) ?\{([^{}]*)\}")
_GROUP = re.compile(r"\{([^{}]*)\}")
_ONE_TERM = re.compile(r"-?[^-+]*")
_FACTOR = re.compile(r"[0-9.]+|pi|[a-zA-Zα-ω]|sqrt\([^()]*\)")
_EXPONENT = re.compile(r"-?(?:[0-9.]+|pi|[a-zA-Zα-ω])")
_SYMBOLS = str.maketrans(
    {"√": r"\sqrt", "π": "pi", "∞": "inf", "∪": "U", "·": "*", "×": "*", "÷": "/", "−": "-", "~": " "}
)
_NAMES = {
    "left": "",
    "right": "",
    "infty": "inf",
    "cup": "U",
    "cdot": "*",
    "times": "*",
    "div": "/",
    "displaystyle": "",
    "quad": " ",
    "pi": "pi",
    "alpha": "α",
    "beta": "β",
    "gamma": "γ",
    "theta": "θ",
    "lambda": "λ",
    "mu": "μ",
    "phi": "φ",
    "omega": "ω",
}

# One character may follow each of the two, as in 3x/2.
_REDUCIBLE = re.compile(r"-?[0-9]+.?/0*[1-9][0-9]*.?")
_FORBIDDEN = re.compile(r"\^[({]|\^[0-9]+\^|\^[0-9]{2}")
_TOKEN = re.compile(
    rf"(?P<number>{_NUMBER})|(?P<function>sqrt|ln)|(?P<letter>pi|[a-zα-ω])|(?P<open>\()|(?P<close>\))|(?P<sign>[-+*/^])"
)
_OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


def score(response: str, ground_truth: str | int | float) -> float:
    r"""1.0 for a response whose answer equals the ground truth by PRM800K's rule, else 0.0.

    The answer is the content of the last `\boxed{}` after the thinking; a response without one scores 0.0. The
    ground truth is a bare answer, or a text with a box or `####`.

    Raises:
        ValueError: the ground truth holds no answer.
    """
    return float(canonical(response, ground_truth) is not None)


def canonical(response: str, ground_truth: str | int | float) -> str | None:
    """The ground truth's answer where the response is correct (all correct answers are one), else None."""
    return matched(answered(response, ground_truth), ground_truth)


def answered(response: str, ground_truth: str | int | float) -> str | None:
    """The answer as it is written, right or wrong; None where there is none."""
    return last_boxed(after_think(response)) or None


def matched(answer: str | None, ground_truth: str | int | float) -> str | None:
    """The ground truth's answer where this one equals it, else None.

    Raises:
        ValueError: the ground truth holds no answer.
    """
    expected = reference(ground_truth)
    if not expected:
        raise ValueError("the ground truth holds no answer")
    return expected if answer is not None and equal(answer, expected) else None


def equal(answer: str, expected: str) -> bool:
    """Whether the answer is right where the other is expected."""
    text = _math_text(expected)
    if text and _math_text(answer) == text:
        return True
    if max(len(answer), len(expected)) > MAX_LENGTH:
        return False
    given, text = _plain(answer), _plain(expected)
    return bool(given) and bool(text) and (given == text or _equal_parts(given, text))


def _inside_text(answer: str) -> str:
    whole = _TEXT.fullmatch(answer.strip())
    return whole[1].strip() if whole else answer.strip()


def _with_braces(text: str) -> str:
    r"""`\frac12` as `\frac{1}{2}` and `\sqrt2` as `\sqrt{2}`."""
    return _SECOND_ARGUMENT.sub(r"\\frac\1{\2}", _FIRST_ARGUMENT.sub(r"\\\1{\2}", text))


def _math_text(answer: str) -> str:
    """The text that the checker of the MATH data set compares (https://github.com/hendrycks/math)."""
    text = _inside_text(answer)
    for old, new in _MATH_REPLACEMENTS:
        text = text.replace(old, new)
    if text.count(r"\text{ ") == 1:  # a unit
        text = text.partition(r"\text{ ")[0]
    text = re.sub(r"(^|[ {])\.", r"\g<1>0.", text)
    left, equals, right = text.partition("=")
    if equals and len(left) <= 2 and "=" not in right:
        text = right
    text = _with_braces(text).replace(" ", "")
    return _INTEGERS.sub(r"\\frac{\1}{\2}", r"\frac{1}{2}" if text == "0.5" else text)


def _plain(answer: str) -> str:
    """The answer without LaTeX, units, currency, percent signs, thousands separators, spaces and capitals."""
    text = re.sub(r"\\?[$%]", "", " ".join(_inside_text(answer).split()))
    text = re.sub(r" (?:or|and) ", ",", text)
    for word, power in _POWERS.items():
        text = text.replace(word, power)
    text = re.sub("- *", "-", _plain_latex(_DEGREES.sub("", _UNITS.sub("", text))))
    text = _MIXED.sub(lambda match: f"{match[1]}{match[2]}{match[1] or '+'}", text)
    text = re.sub(r"[ {}\\]", "", text).replace("**", "^").lower()
    text = _THOUSANDS.sub("", text)
    whole = _whole(text)
    return text if whole is None else str(whole)


def _whole(text: str) -> int | None:
    """The integer that the text is, but for 1e-7; None where it is none."""
    if not _SIGNED_NUMBER.fullmatch(text):
        return None
    value = Fraction(text)
    return round(value) if abs(value - round(value)) <= Fraction(1, 10**7) else None


def _plain_latex(text: str) -> str:
    r"""LaTeX as a plain expression: `2\frac{x+1}{3}\pi` as `2*(x+1)/3pi`, `x^{n+1}` as `x^(n+1)`."""
    text = _ROW_END.sub(";", _MATRIX_END.sub("]", _MATRIX_START.sub("[", text))).replace(r"\\", "\\")
    text = _RADICAL.sub(r"\\sqrt{\1}", text).translate(_SYMBOLS)
    text = re.sub(r"\\[;: ]", " ", re.sub(r"\\[,!{}]", "", text))
    text = _with_braces(re.sub(r"\\[dtc]frac", r"\\frac", text))
    text = re.sub(r"\\([a-zA-Z]+)", lambda match: _NAMES.get(match[1], match[0]), text)
    for _ in range(MAX_DEPTH):
        before, text = text, _without_innermost(text)
        if text == before:
            break
    return text


def _without_innermost(text: str) -> str:
    """The text with those of its macros resolved whose arguments hold no others; without any, braces go."""
    text = _with_braces(text)
    resolved = _WORDS.sub(r"\1", _POWER.sub(_power, _ROOT.sub(_root, _FRACTION.sub(_quotient, text))))
    return _GROUP.sub(r"\1", text) if resolved == text else resolved


def _quotient(match: re.Match[str]) -> str:
    prefix, top, bottom = match[1], match[2].strip(), match[3].strip()
    quotient = f"{_grouped(top, _ONE_TERM)}/{_grouped(bottom, _FACTOR)}"
    if prefix:
        return f"{prefix}({quotient})" if prefix.startswith("/") else f"{prefix}{{{quotient}}}"
    before = match.string[: match.start()].rstrip()
    previous, lead = before[-1:], before.rstrip("0123456789")[-1:]  # the lead stands before the whole number
    mixed = previous.isdigit() and lead not in ("^", ".", "/") and top.isdigit() and bottom.isdigit()
    return f"*{quotient}" if not mixed and re.fullmatch("[0-9})]", previous) else f" {quotient}"


def _root(match: re.Match[str]) -> str:
    index, radicand = match.groups()
    return f" ({radicand})^(1/{_grouped(index, _FACTOR)})" if index else f" sqrt({radicand.strip()})"


def _power(match: re.Match[str]) -> str:
    return f"^{_grouped(match[1].strip(), _EXPONENT)}"


def _grouped(text: str, bare: re.Pattern[str]) -> str:
    return text if bare.fullmatch(text) else f"({text})"


def _equal_parts(given: str, expected: str) -> bool:
    """Whether two plain answers are equal part by part; an answer that is no tuple or interval is one part."""
    ours, theirs = _parts(given), _parts(expected)
    if len(ours) != len(theirs):
        return False
    if len(theirs) > 1 and (given[0], given[-1]) != (expected[0], expected[-1]):
        return False
    return all(_equal_part(our, their) for our, their in zip(ours, theirs, strict=True))


def _parts(text: str) -> list[str]:
    """What the outer brackets hold, cut at its commas; the text itself where no pair of brackets encloses it."""
    inner = text[1:-1]
    depths = accumulate((character in "([") - (character in ")]") for character in inner)
    enclosed = inner and text[0] in "([" and text[-1] in ")]" and min(depths) >= 0
    return inner.split(",") if enclosed else [text]


def _equal_part(given: str, expected: str) -> bool:
    if given == expected:
        return True
    if _REDUCIBLE.fullmatch(given) and _REDUCIBLE.fullmatch(expected):
        return False  # a fraction must be reduced
    if (_whole(given) is None) != (_whole(expected) is None):
        return False  # 4/2 is no answer where 2 is expected
    return _harmless(f"({expected})-({given})") and _equal_expressions(given, expected)


def _harmless(text: str) -> bool:
    letters = {character for character in text.replace("sqrt", "").replace("frac", "") if character.isalpha()}
    return len(letters) <= MAX_LETTERS and not _FORBIDDEN.search(text)


def _equal_expressions(given: str, expected: str) -> bool:
    try:
        one, other = _expression(given), _expression(expected)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return _equal_at_a_point(one, other) and (one - other).simplify() == 0


def _equal_at_a_point(one: Any, other: Any) -> bool:
    """Whether the expressions differ little where each letter has some value: quicker than to simplify, and safer."""
    import sympy

    letters = sorted(one.free_symbols | other.free_symbols, key=str)
    values = {letter: sympy.Rational(1618 + 715 * index, 1000) for index, letter in enumerate(letters)}
    a, b = one.evalf(30, subs=values), other.evalf(30, subs=values)
    difference = abs(a - b)
    return bool(difference.is_finite) and bool(difference <= 1e-9 * (1 + abs(a) + abs(b)))


def _expression(text: str) -> Any:
    """The sympy expression of a plain text. Raises ValueError or SyntaxError for what is no finite arithmetic."""
    import sympy

    expression = _build(ast.parse(_python(text), mode="eval").body, MAX_DEPTH, MAX_DEGREE)
    if expression.has(sympy.zoo, sympy.nan):
        raise ValueError("not finite")
    return expression


def _python(text: str) -> str:
    """The text as Python's grammar wants it: `2sqrt3^x` as `(2)*sqrt(3)**x`, `0.5` as `(1/2)`."""
    tokens = list(_TOKEN.finditer(text))
    if "".join(token[0] for token in tokens) != text:
        raise ValueError("not an arithmetic expression")
    parts, previous = [], ""
    for token in tokens:
        kind = token.lastgroup or ""
        if previous in ("number", "letter", "close") and kind in ("number", "function", "letter", "open"):
            if previous == kind == "number":
                raise ValueError("two numbers side by side")
            parts.append("*")
        value = f"({Fraction(token[0])})" if kind == "number" else token[0]
        parts.append("**" if value == "^" else value)
        previous = kind
    return "".join(parts)


def _build(node: ast.expr, depth: int, degree: int) -> Any:
    """The sympy expression of a syntax tree, whose powers within powers multiply to at most `degree`.

    Raises:
        ValueError: it is nested deeper than `depth`, its powers are higher, or it holds anything but arithmetic.
    """
    import sympy

    if depth == 0:
        raise ValueError(f"nested deeper than {MAX_DEPTH}")
    match node:
        case ast.Constant(value=int(value)):
            return sympy.Integer(value)
        case ast.Name(id="pi"):
            return sympy.pi
        case ast.Name(id=name) if len(name) == 1:
            return sympy.Symbol(name)
        case ast.Call(func=ast.Name(id="sqrt"), args=[argument], keywords=[]):
            return sympy.sqrt(_build(argument, depth - 1, degree))
        case ast.Call(func=ast.Name(id="ln"), args=[argument], keywords=[]):
            return sympy.log(_build(argument, depth - 1, degree))
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_build(operand, depth - 1, degree)
        case ast.UnaryOp(op=ast.UAdd(), operand=operand):
            return _build(operand, depth - 1, degree)
        case ast.BinOp(left=left, op=ast.Pow(), right=right):
            numbers = [leaf.value for leaf in ast.walk(right) if isinstance(leaf, ast.Constant)]
            highest = max((number for number in numbers if isinstance(number, int)), default=1)
            if max(highest, 1) > degree:
                raise ValueError("powers too high")
            base = _build(left, depth - 1, degree // max(highest, 1))
            return base ** _build(right, depth - 1, 0)  # which allows no powers in a power
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            return _OPERATORS[type(op)](_build(left, depth - 1, degree), _build(right, depth - 1, degree))
    raise ValueError(f"{type(node).__name__} is not allowed")
