"""What must hold for every text that a model may write, whoever thinks of the text: hypothesis, chance, or atheris.

The oracles here share no code with the graders but the search for the answer inside a text.
"""

from fractions import Fraction

from policy_split_jax.rewards import countdown, exact, letter, prm800k, walk
from policy_split_jax.rewards.answers import after_think, last_boxed

COUNTDOWN = {"numbers": [3, 4, 5], "target": 17}
# Row by row, start S, goal G, walls #:  S . # . . .
#                                        . # . . . .
#                                        . . G . . .
WALK = {"start": 11, "goal": 33, "walls": [13, 22], "most": 6}
EXACT = ("18", "1,234.5", "-0.5", "Paris")


def check(text: str) -> None:
    """All that is below."""
    check_countdown(text, COUNTDOWN)
    check_walk(text, WALK)
    check_exact(text)
    check_letter(text)
    check_normalisation(text)


def check_countdown(text: str, truth: dict) -> None:
    """The grader agrees with the oracle."""
    assert countdown.score(text, truth) == float(solves(text, truth)), (text, truth)


def check_walk(text: str, truth: dict) -> None:
    """The grader agrees with a walk over a board."""
    assert walk.score(text, truth) == float(walks(text, truth)), (text, truth)


def check_exact(text: str) -> None:
    """At most one of several truths is answered; where the answer is a number, it is the one of that size."""
    scores = {truth: exact.score(text, truth) for truth in EXACT}
    right = [truth for truth, score in scores.items() if score == 1.0]
    assert set(scores.values()) <= {0.0, 1.0}
    assert len(right) <= 1, text
    answer = exact.answered(text, "") or ""
    if set(answer) <= set("0123456789.-"):
        try:
            number = Fraction(answer)
        except ValueError:
            return
        assert right == [truth for truth in EXACT[:3] if Fraction(truth.replace(",", "")) == number], text


def check_letter(text: str) -> None:
    """The letter answered is right, is in the text, and no other letter is right."""
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    answer = letter.answered(text, "A")
    assert letter.score(text, answer or "A") == float(answer is not None), text
    if answer is not None:
        assert answer in letters, text
        assert answer in text.upper(), text
        assert letter.score(text, letters[letters.index(answer) - 1]) == 0.0, text


def check_normalisation(text: str) -> None:
    """PRM800K's two normalisations and its translation into Python's grammar raise nothing else than they say."""
    prm800k.answered(text, "")
    prm800k._math_text(text)
    plain = prm800k._plain(text[: prm800k.MAX_LENGTH])
    try:
        python = prm800k._python(plain)
    except ValueError:
        return
    assert set(python) <= set("0123456789+-*/()abcdefghijklmnopqrstuvwxyzαβγδεζηθικλμνξοπρςστυφχψω"), text


def walks(text: str, truth: dict) -> bool:
    """Whether the moves lead to the goal, on a board of characters with a border of walls around it."""
    moves = "".join(_answer(text).split())
    board = [["#"] * 8, *(["#", *"......", "#"] for _ in range(6)), ["#"] * 8]
    for wall in truth["walls"]:
        board[wall // 10][wall % 10] = "#"
    row, column = divmod(truth["start"], 10)
    for move in moves:
        board[row][column] = "#"
        if move not in "UDLRudlr":
            return False
        row += {"U": -1, "D": 1}.get(move.upper(), 0)
        column += {"L": -1, "R": 1}.get(move.upper(), 0)
        if board[row][column] == "#":
            return False
    return 0 < len(moves) <= truth["most"] and (row, column) == divmod(truth["goal"], 10) and len(_answer(text)) <= 200


def solves(text: str, truth: dict) -> bool:
    """Whether the answer is an expression of exactly the numbers that is worth the target."""
    expression = _answer(text)
    left, equals, right = expression.replace("−", "-").rpartition("=")
    if equals and right.strip() == str(truth["target"]):
        expression = left.strip()
    if len(expression) > countdown.MAX_LENGTH:
        return False
    try:
        parser = _Parser(expression)
        value, depth = parser.sum()
    except (_Wrong, ZeroDivisionError):
        return False
    fits = parser.end() and sorted(parser.numbers) == sorted(truth["numbers"]) and depth <= countdown.MAX_DEPTH
    return fits and value == truth["target"]


def _answer(text: str) -> str:
    after = after_think(text)
    lines = [line for line in after.split("\n") if line.strip()]
    box = last_boxed(after)
    return (lines[-1].strip() if lines else "") if box is None else box


class _Wrong(Exception):
    pass


class _Parser:
    """By recursive descent; each rule gives the value and the depth of its tree, and `numbers` are those read."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0
        self.numbers: list[int] = []

    def sum(self) -> tuple[Fraction, int]:
        value, depth = self.product()
        while (sign := self.peek()) in ("+", "-", "−"):
            self.at += 1
            other, below = self.product()
            value, depth = value + other if sign == "+" else value - other, 1 + max(depth, below)
        return value, depth

    def product(self) -> tuple[Fraction, int]:
        value, depth = self.factor()
        while (sign := self.peek()) in ("*", "×", "/", "÷"):
            self.at += 1
            other, below = self.factor()
            value, depth = value * other if sign in "*×" else value / other, 1 + max(depth, below)
        return value, depth

    def factor(self) -> tuple[Fraction, int]:
        match self.peek():
            case "-" | "−":
                self.at += 1
                value, depth = self.factor()
                return -value, depth + 1
            case "(":
                self.at += 1
                inner = self.sum()
                if self.peek() != ")":
                    raise _Wrong
                self.at += 1
                return inner
        return Fraction(self.number()), 1

    def number(self) -> int:
        start = self.at
        while self.at < len(self.text) and self.text[self.at] in "0123456789":
            self.at += 1
        digits = self.text[start : self.at]
        if not digits or (digits[0] == "0" and digits.strip("0")):
            raise _Wrong
        self.numbers.append(int(digits))
        return self.numbers[-1]

    def peek(self) -> str:
        while self.at < len(self.text) and self.text[self.at] in " \t\n\r\f\v":
            self.at += 1
        return self.text[self.at] if self.at < len(self.text) else ""

    def end(self) -> bool:
        return self.peek() == ""
