"""What `policy-split compare` and `policy-split from-verl` do."""

import argparse
import sys
from dataclasses import asdict
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from policy_split_jax.commands import load_chosen, table_console
from policy_split_jax.errors import UserError
from policy_split_jax.files import check_output, whole_file, write_json
from policy_split_jax.model.qwen3 import Params
from policy_split_jax.modes import HIGH_ENTROPY, NORMAL
from policy_split_jax.parity.dumps import read_dump
from policy_split_jax.parity.rollouts import ScoreOptions, compare_rollouts, show
from policy_split_jax.parity.step import UPDATES, VARIANTS, Comparison
from policy_split_jax.parity.step import compare as compare_step
from policy_split_jax.policy import Policy, load_model
from policy_split_jax.rollouts import Group

ROLLOUTS = 4
"""Of a question, where rollouts are sampled for a comparison."""


def compare(options: argparse.Namespace) -> int:
    """`policy-split compare step | rollouts | curves`; 1 where a step differs."""
    return {"step": _step, "rollouts": _rollouts, "curves": _curves}[options.what](options)


def _step(options: argparse.Namespace) -> int:
    if find_spec("torch") is None:
        raise UserError("compare step needs PyTorch; install 'policy-split-jax[torch]'")
    from transformers.utils import logging

    for variant in options.variant or ():
        if variant not in VARIANTS:
            raise UserError(f"--variant {variant}: there is none of that name; known are {', '.join(VARIANTS)}")
    if options.questions % UPDATES:
        raise UserError(f"--questions {options.questions}: must be a multiple of {UPDATES}, the updates of released")
    output = check_output(Path(options.output))
    if options.model is None:
        import torch

        # On so small a model threads cost more than they bring.
        torch.set_num_threads(1)
    # Each of the models that PyTorch loads would show bars of its own.
    logging.disable_progress_bar()
    policy, params, groups = _inputs(options)
    found: list[Comparison] = []
    console = table_console()
    with Console(stderr=True).status("") as status:
        for variant in options.variant or VARIANTS:
            for dtype in options.dtype or ("float32", "bfloat16"):
                status.update(f"{variant}, {dtype} ...")
                found.append(compare_step(policy, params, groups, variant, dtype, options.steps))
                console.print(_table(found[-1]))
    write_json(output, [asdict(comparison) | {"passes": comparison.passes} for comparison in found])
    failed = [f"{comparison.variant} in {comparison.dtype}" for comparison in found if not comparison.passes]
    verdict = f"{len(failed)} of {len(found)} differ: {', '.join(failed)}" if failed else f"all {len(found)} agree"
    console.print(f"{verdict}; every row is in {output}")
    return 1 if failed else 0


def _inputs(options: argparse.Namespace) -> tuple[Policy, Params, list[Group]]:
    """A model, and rollouts of half either mode."""
    from policy_split_jax.parity.inputs import random_model, sampled_groups

    policy, params = load_model(options.model) if options.model else random_model(options.seed)
    if options.rollouts is None:
        modes = (NORMAL, HIGH_ENTROPY)
        return policy, params, sampled_groups(policy, params, modes, options.questions, ROLLOUTS, options.seed)
    dump = read_dump(Path(options.rollouts), policy)[0]
    if len(dump.groups) < options.questions:
        raise UserError(f"{options.rollouts}: step {dump.step} has {len(dump.groups)} questions; lower --questions")
    return dump.policy, params, dump.groups[: options.questions]


def _table(comparison: Comparison) -> Table:
    """What was compared; of the many parameters, that which comes closest to its tolerance."""
    table = Table(title=f"{comparison.variant}, {comparison.dtype}", title_justify="left")
    for heading in ("", "max difference", "mean difference", "tolerance", ""):
        table.add_column(heading, justify="right" if "e" in heading else "left")
    for name, rows in groupby(comparison.differences, lambda row: row.name):
        row = max(rows, key=lambda row: row.largest / row.tolerance)
        figures = (f"{value:.1e}" for value in (row.largest, row.mean, row.tolerance))
        label = f"{name}: {row.part}" if row.part else name
        table.add_row(label, *figures, "pass" if row.passes else "[bold red]FAIL[/]")
    return table


def _rollouts(options: argparse.Namespace) -> int:
    output = check_output(Path(options.output), Path(options.file))
    chosen = ScoreOptions(
        preset=options.preset,
        max_new_tokens=options.max_new_tokens,
        remove_padding=not options.padding,
        dtype=options.dtype,
    )
    policy, params = load_chosen(options)
    with Console(stderr=True).status("scoring ..."):
        found = compare_rollouts(Path(options.file), policy, params, chosen)
    show(found, table_console())
    write_json(output, asdict(found))
    print(f"written to {output}")
    return 0


def _curves(options: argparse.Namespace) -> int:
    from policy_split_jax.parity.curves import parse_group, write_curves
    from policy_split_jax.parity.names import read_names

    output = check_output(Path(options.output))
    names = read_names(Path(options.names)) if options.names else None
    print(write_curves([parse_group(run, names) for run in options.runs], output))
    return 0


def from_verl(options: argparse.Namespace) -> None:
    """`policy-split from-verl SOURCE [SOURCE …]`."""
    from policy_split_jax.parity.verl import convert, read_overrides, to_yaml

    files = [source for source in options.sources if source.endswith((".sh", ".bash", ".yaml", ".yml"))]
    words = [source for source in options.sources if source not in files]
    given: dict[str, Any] = {}
    for source in files:
        given |= read_overrides(Path(source))
    conversion = convert(given | read_overrides(words))
    text = to_yaml(conversion)
    if options.output is None:
        sys.stdout.write(text)
        return
    with whole_file(check_output(Path(options.output), *map(Path, files))) as file:
        file.write(text)
    counts = f"{len(conversion.converted)} settings, {len(conversion.without_effect)} keys without effect here"
    open_ends = f"{len(conversion.unsupported)} unsupported and {len(conversion.unknown)} unknown, listed there"
    print(f"written to {options.output}: {counts}, {open_ends}")
