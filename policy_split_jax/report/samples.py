"""The rollouts that the page lets one read, as the plain values that its script shows."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from policy_split_jax.evaluation.evaluate import CORRECT
from policy_split_jax.modes import MODE_NAMES
from policy_split_jax.report.groups import RunGroup
from policy_split_jax.report.runs import Row, Run, number, spread

QUESTIONS_SHOWN = 12
ANSWERS_SHOWN = 8
CHARACTERS_SHOWN = 6000
CHARACTERS_OF_PAGE = 4_000_000
"""What the rollouts of all runs may take of the page: evaluations between the first and the last give way."""

KINDS = {"train": "training", "eval": "evaluation"}
Step = dict[str, Any]


def rollout_data(groups: Sequence[RunGroup]) -> dict[str, Any]:
    """`runs`, each with its sampled steps, and `scale`, where the shading of tokens ends (nats)."""
    runs = [run for group in groups for run in group.seeds if run.samples]
    shown = [_run(run, CHARACTERS_OF_PAGE // len(runs)) for run in runs]
    return {"runs": shown, "scale": {measure: _scale(shown, measure) for measure in ("entropy", "kl")}}


def _run(run: Run, most: int) -> dict[str, Any]:
    rows: dict[tuple[int, str], list[Row]] = {}
    for row in run.samples:
        rows.setdefault((row["step"], row["kind"]), []).append(row)
    steps = {place: _step(*place, rows[place]) for place in sorted(rows)}
    sizes = {place: len(json.dumps(step)) for place, step in steps.items()}
    evaluations = [place for place in steps if place[1] == "eval"]
    rest = [place for place in steps if place[1] != "eval"]
    for count in range(len(evaluations), 1, -1):
        if sum(sizes[place] for place in (*rest, *spread(evaluations, count))) <= most:
            break
    else:
        count = 2
    kept = sorted((*rest, *spread(evaluations, count)))
    left_out = len(run.evaluation) - min(count, len(evaluations))
    return {"name": run.name, "steps": [steps[place] for place in kept], "left_out": max(0, left_out)}


def _step(step: int, kind: str, rows: Sequence[Row]) -> Step:
    questions: dict[str, dict[str, dict[str, Row]]] = {}
    for row in rows:
        if row.get("mode") in MODE_NAMES:
            sides = questions.setdefault(str(row.get("question", "")), {mode: {} for mode in MODE_NAMES})
            side = sides[row["mode"]]
            # A resumed run writes the samples after its checkpoint again; the later one counts.
            side[str(row.get("index", f"unnumbered {len(side)}"))] = row
    shown = list(questions.items())[:QUESTIONS_SHOWN]
    return {
        "label": f"step {step:,} · {KINDS.get(kind, kind)}",
        "evaluation": kind == "eval",
        "questions": [_question(text, sides) for text, sides in shown],
        "left_out": len(questions) - len(shown),
    }


def _question(text: str, sides: Mapping[str, Mapping[str, Row]]) -> dict[str, Any]:
    return {
        "text": shortened(text),
        "sides": [
            {
                "answers": [_answer(row) for row in list(sides[mode].values())[:ANSWERS_SHOWN]],
                "left_out": max(0, len(sides[mode]) - ANSWERS_SHOWN),
                # Of all answers, those that are left out too.
                "right": any((number(row, "reward") or 0.0) > CORRECT for row in sides[mode].values()),
            }
            for mode in MODE_NAMES
        ],
    }


def _answer(row: Row) -> dict[str, Any]:
    answer = {
        "reward": number(row, "reward"),
        "entropy": number(row, "entropy"),
        "cut_off": row.get("finish_reason") == "length",
    }
    tokens = _tokens(row.get("tokens"))
    return answer | ({"tokens": tokens} if tokens else {"text": shortened(str(row.get("text", "")))})


def _tokens(given: Any) -> dict[str, Any] | None:
    """A sample's tokens; None where there are none, as in training and in older runs, or they do not fit together."""
    if not isinstance(given, dict) or not all(isinstance(given.get(key), list) for key in ("text", "entropy", "kl")):
        return None
    columns = {measure: [number({"": value}, "") for value in given[measure]] for measure in ("entropy", "kl")}
    texts = [str(text) for text in given["text"]]
    if {len(texts)} != {len(values) for values in columns.values()}:
        return None
    return {"text": texts, **columns, "left_out": int(number(given, "left_out") or 0)}


def shortened(text: str) -> str:
    """The middle of a very long text is left out, since the answer stands at the end."""
    if len(text) <= CHARACTERS_SHOWN:
        return text
    half, cut = CHARACTERS_SHOWN // 2, len(text) - CHARACTERS_SHOWN
    return f"{text[:half]}\n\n[… {cut:,} characters left out …]\n\n{text[-half:]}"


def _scale(runs: Sequence[Mapping[str, Any]], measure: str) -> float:
    """Where the shading is deepest: the 98th percentile of all tokens, so that a few do not make all others pale."""
    values = [value for run in runs for value in _values(run, measure)]
    return float(f"{max(np.quantile(values, 0.98), 0.05):.2g}") if values else 1.0


def _values(run: Mapping[str, Any], measure: str) -> Iterator[float]:
    for step in run["steps"]:
        for question in step["questions"]:
            for side in question["sides"]:
                for answer in side["answers"]:
                    yield from (value for value in answer.get("tokens", {}).get(measure, ()) if value is not None)
