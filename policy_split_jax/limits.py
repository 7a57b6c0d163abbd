"""Which numbers are allowed wherever they are given: in a file, on the command line, by a client."""

MAX_SEED = 2**32 - 1

SMALLEST_TEMPERATURE = 1e-6
"""Logits divided by less are no float32 any more, and their log-probabilities no numbers."""
TEMPERATURES = f"0 (greedy) or at least {SMALLEST_TEMPERATURE:g}"


def is_temperature(value: float) -> bool:
    return value == 0 or value >= SMALLEST_TEMPERATURE
