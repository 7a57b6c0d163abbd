"""The fault harness: what it measured is printed at the end, and docs/reliability.md quotes it."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

_FIGURE = "figure"

sys.path.append(str(Path(__file__).parent))  # for what tests share, and scripts here


@pytest.fixture
def figure(record_property: Callable[[str, object], None]) -> Callable[[str], None]:
    """Keeps a line for the end of the run, whichever process the test runs in."""
    return lambda line: record_property(_FIGURE, line)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    lines = [
        f"{report.nodeid.partition('::')[2]}: {value}"
        for report in terminalreporter.getreports("passed")
        for name, value in report.user_properties
        if name == _FIGURE
    ]
    if lines:
        terminalreporter.section("figures")
        for line in lines:
            terminalreporter.line(line)
