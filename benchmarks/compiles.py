"""Counts what XLA compiles during a run of the embedded default, and how long it takes.

    python benchmarks/compiles.py [--steps 3]

The first step and the first evaluation compile everything; a later step that compiled something would show.
"""

import argparse
import logging
import re
import tempfile
from collections import defaultdict
from pathlib import Path

import jax

from policy_split_jax import config as settings
from policy_split_jax.training.loop import train

_FINISHED = re.compile(r"Finished XLA compilation of (\S+) in ([\d.e-]+) sec")
# Below this a program is a small operation on the host's side, such as a conversion.
_PROGRAM_SECONDS = 0.1


class Compilations(logging.Handler):
    """Seconds of each compilation, by the function's name."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: dict[str, list[float]] = defaultdict(list)

    def emit(self, record: logging.LogRecord) -> None:
        found = _FINISHED.search(record.getMessage())
        if found:
            self.seconds[found[1]].append(float(found[2]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=3)
    steps = parser.parse_args().steps
    compilations = Compilations()
    logger = logging.getLogger("jax")
    logger.addHandler(compilations)
    logger.propagate = False
    jax.config.update("jax_log_compiles", True)
    tiny = Path(__file__).resolve().parents[1] / "configs" / "tiny.yaml"
    with tempfile.TemporaryDirectory() as folder:
        train(settings.load(settings.RunConfig, str(tiny), [f"output={folder}", f"train.steps={steps}"]))
    large = {
        name: [second for second in each if second >= _PROGRAM_SECONDS] for name, each in compilations.seconds.items()
    }
    print("\n| program | compilations | s |\n|---|---|---|")
    for name, each in sorted(large.items(), key=lambda item: -sum(item[1])):
        if each:
            print(f"| {name} | {len(each)} | {sum(each):.1f} |")
    small = [second for each in compilations.seconds.values() for second in each if second < _PROGRAM_SECONDS]
    print(f"| {len(small)} of less than {_PROGRAM_SECONDS} s | {len(small)} | {sum(small):.1f} |")


if __name__ == "__main__":
    main()
