"""Answers by chance and mutations of right ones, and what the graders that need no process make of them.

    python tests/faults/many_answers.py countdown 1000000

prints how many were right and how many were graded in a second; it ends with code 0 if none broke a check.
"""

import json
import random
import re
import sys
import time
from collections.abc import Iterator
from itertools import islice

import answer_checks

from policy_split_jax.rewards import GradeItem, GraderPool

INLINE = {"countdown": answer_checks.COUNTDOWN, "walk": answer_checks.WALK, "exact": "18", "letter": "B"}
CHECKS = {
    "countdown": lambda text: answer_checks.check_countdown(text, answer_checks.COUNTDOWN),
    "walk": lambda text: answer_checks.check_walk(text, answer_checks.WALK),
    "exact": answer_checks.check_exact,
    "letter": answer_checks.check_letter,
}
SYMBOLS = "345+-*/() =17×÷−"
# What mutations put in: digits of other scripts, what Python, LaTeX or the graders read as something, and commands.
PIECES = [
    *"０١２३⁴₅⑥",
    *"()[]{}+-*/=×÷−^_,.$%\\\n\t\r\0 \u00a0\u200b\u202e\u0301\ud800",
    "e0",
    "**",
    "//",
    "0x",
    "1_",
    "00",
]
PIECES += ["</think>", "<think>", r"\boxed{", "####", "=17", "= 18", r"\frac", r"\sqrt{", r"\text{ ", "^{", "B)", "UD"]
PIECES += ["__import__('os').system('touch executed')", "open('executed','w')", " or ", " million", "∞", "π", "I", "j"]
ALPHABETS = [
    SYMBOLS,
    "UDLRudlr \n",
    r"0123456789.,+-$\% eEAaBb()[]{}" + "\n",
    r"0123456789xyπ^_{}()[]\fracsqtexinmlog+-*/=,.&!| ",
    "".join(map(chr, range(32, 127))),
    "".join(map(chr, [*range(0x20), *range(0x80, 0x300), *range(0x660, 0x670), *range(0x1D7CE, 0x1D800), 0x10FFFF])),
]
MATH = [
    r"\frac{x+1}{2}",
    r"2\sqrt{3}",
    "(1, 2]",
    r"7\frac{3}{4}",
    r"\{1, 2\}",
    "x^{2}+1",
    r"\ln(2x)",
    "1,234.50",
    "0.75",
]
MATH += [
    r"\begin{pmatrix}1 & 2 \\ 3 & 4\end{pmatrix}",
    r"90^\circ",
    r"5\text{ cm}",
    r"x \in [0, \infty)",
    "1+x",
    r"50\%",
]


def texts(count: int, seeds: list[str], seed: int = 0) -> Iterator[str]:
    """One text in four by chance, the others from mutations of the seeds; always the same."""
    chance = random.Random(seed)
    for _ in range(count):
        if chance.random() < 0.25:
            yield "".join(chance.choices(chance.choice(ALPHABETS), k=chance.randrange(60)))
            continue
        text = chance.choice(seeds)
        for _ in range(chance.randrange(1, 4)):
            text = mutated(chance, text, seeds)
        yield text[:2_000]


def mutated(chance: random.Random, text: str, seeds: list[str]) -> str:
    start = chance.randrange(len(text) + 1)
    end = min(len(text), start + chance.randrange(1, 6))
    match chance.randrange(7):
        case 0:  # a byte
            data = bytearray(text.encode(errors="replace") or b"0")
            data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
            return data.decode(errors="replace")
        case 1:  # a part is gone
            return text[:start] + text[end:]
        case 2:  # a part is repeated
            return text[:start] + text[start:end] * chance.randrange(2, 30) + text[end:]
        case 3:  # a digit of another script
            return re.sub("[0-9]", lambda match: chance.choice([match[0], chr(0x660 + int(match[0]))]), text)
        case 4:  # another answer's part
            other = chance.choice(seeds)
            return text[:start] + other[chance.randrange(len(other)) :]
        case 5:  # the same in capitals, or not
            return text.swapcase()
    return text[:start] + chance.choice(PIECES) + text[start:]


def boxed(answers: list[str]) -> list[str]:
    return [*answers, *(rf"<think>so</think> \boxed{{{answer}}}" for answer in answers)]


SEEDS = {
    "countdown": boxed(["3*4+5", "5+3×4 = 17", "(3*4)+5", "-(-5-4*3)", "5-3*(-4)", "17e0+0e0*(3+4+5)", "1_7"]),
    "walk": boxed(["DDRR", "d d r r", "DDDRUR", "DDDRRU", "DDDDRRUU"]),  # the last is too long
    "exact": boxed(["18", "1,234.5", "$-0.5", "Paris", "#### 18.0"]),
    "letter": boxed(["B", "(B)", "B. seven", r"\text{B}", r"\textbf{(B) } 7"]),
}


def graded(grader: str, count: int) -> tuple[int, float]:
    """How many of so many texts are right, and how many were graded in a second."""
    stream, seconds, right = texts(count, SEEDS[grader]), 0.0, 0
    with GraderPool(grader) as pool:
        while batch := list(islice(stream, 10_000)):
            items = [GradeItem(text, INLINE[grader]) for text in batch]
            start = time.perf_counter()
            grades = pool.grade(items)
            seconds += time.perf_counter() - start
            assert all(grade.error is None and grade.score in (0.0, 1.0) for grade in grades)
            right += sum(grade.score == 1.0 for grade in grades)
            for text in batch:
                CHECKS[grader](text)
    return right, count / seconds


if __name__ == "__main__":
    print(json.dumps(graded(sys.argv[1], int(sys.argv[2]))))
