"""Finds the answer inside a model's response. Every search takes time linear in the text."""

import re

# An escaped brace groups nothing. `\\boxed` (over-escaped by some models) still counts as a box.
_BRACES = re.compile(r"(?P<box>\\boxed\s*\{)|\\[{}]|(?P<open>\{)|(?P<close>\})")


def after_think(text: str) -> str:
    """The text after the last `</think>`, without a thought that begins there and never ends."""
    return text.rpartition("</think>")[2].partition("<think>")[0]


def last_boxed(text: str) -> str | None:
    r"""The content of the `\boxed{...}` that opens last, braces balanced; None without a closed box."""
    found: tuple[int, int] | None = None
    open_boxes: list[int | None] = []  # the start of a box's content; None for an ordinary brace
    for match in _BRACES.finditer(text):
        if match["box"]:
            open_boxes.append(match.end())
        elif match["open"]:
            open_boxes.append(None)
        elif match["close"] and open_boxes:
            start = open_boxes.pop()
            if start is not None and (found is None or start > found[0]):
                found = (start, match.start())
    return None if found is None else text[found[0] : found[1]].strip()


def after_hashes(text: str) -> str | None:
    """The rest of the line after the last `####` (how GSM8K marks its answers); None without one."""
    _, mark, rest = text.rpartition("####")
    return rest.strip().partition("\n")[0].strip() if mark else None


def marked(text: str) -> str | None:
    """The content of the last closed box, else what follows the last `####`; None without either."""
    boxed = last_boxed(text)
    return after_hashes(text) if boxed is None else boxed


def reference(ground_truth: str | int | float) -> str:
    """The answer in a ground truth, which is a bare answer or a text that marks one."""
    text = str(ground_truth)
    answer = marked(text)
    return text.strip() if answer is None else answer


def last_line(text: str) -> str:
    """The last line that is not blank, stripped; empty where all are."""
    return text.rstrip().rpartition("\n")[2].strip()
