"""The rollouts that the page lets one read, as the plain values that its script shows."""

from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from policy_split_jax.evaluation.evaluate import CORRECT
from policy_split_jax.modes import MODE_NAMES
from policy_split_jax.report.frame import embedded_json
from policy_split_jax.report.groups import RunGroup
from policy_split_jax.report.runs import Row, Run, number, spread

QUESTIONS_SHOWN = 12
ANSWERS_SHOWN = 8
CHARACTERS_SHOWN = 6000
CHARACTERS_OF_PAGE = 4_000_000
"""What the rollouts of all runs may take of the page; each has an equal share."""

KINDS = {"train": "training", "eval": "evaluation"}
Place = tuple[int, str]
"""A step and its kind."""


class Most(NamedTuple):
    """How much of a run is shown."""

    evaluations: int
    questions: int
    """Of a step."""
    answers: int
    """Of a mode to a question."""


def rollout_data(groups: Sequence[RunGroup]) -> dict[str, Any]:
    """`runs`, each with its sampled steps, and `scale`, where the shading of its tokens ends (nats)."""
    runs = [run for group in groups for run in group.seeds if run.samples]
    return {"runs": [_run(run, CHARACTERS_OF_PAGE // len(runs)) for run in runs]}


def _run(run: Run, characters: int) -> dict[str, Any]:
    """As much of a run as fits into so many characters of the page."""
    rows: dict[Place, list[Row]] = {}
    for row in run.samples:
        rows.setdefault((row["step"], row["kind"]), []).append(row)
    ladder = _ladder(sum(kind == "eval" for _, kind in rows))

    def fits(most: Most) -> bool:
        return len(embedded_json({"runs": [_shown(run, rows, most)]})) <= characters

    return _shown(run, rows, ladder[bisect_left(ladder, True, hi=len(ladder) - 1, key=fits)])


def _ladder(evaluations: int) -> list[Most]:
    """From all that may be shown to the names of steps alone: evaluations give way first, questions next."""
    return [
        *(Most(count, QUESTIONS_SHOWN, ANSWERS_SHOWN) for count in range(evaluations, 2, -1)),
        *(Most(2, count, ANSWERS_SHOWN) for count in range(QUESTIONS_SHOWN, 1, -1)),
        *(Most(2, 1, count) for count in range(ANSWERS_SHOWN, 0, -1)),
        Most(2, 0, 0),
    ]


def _shown(run: Run, rows: Mapping[Place, Sequence[Row]], most: Most) -> dict[str, Any]:
    evaluations = sorted(place for place in rows if place[1] == "eval")
    kept = spread(evaluations, most.evaluations)
    places = sorted(place for place in rows if place in kept or place not in evaluations)
    steps = [_step(*place, rows[place], most) for place in places]
    scale = {measure: _scale(steps, measure) for measure in ("entropy", "kl")}
    return {"name": run.name, "steps": steps, "left_out": max(0, len(run.evaluation) - len(kept)), "scale": scale}


def _step(step: int, kind: str, rows: Sequence[Row], most: Most) -> dict[str, Any]:
    questions: dict[str, dict[str, dict[str, Row]]] = {}
    for row in rows:
        if row.get("mode") in MODE_NAMES:
            sides = questions.setdefault(str(row.get("question", "")), {mode: {} for mode in MODE_NAMES})
            side = sides[row["mode"]]
            # A resumed run writes the samples after its checkpoint again; the later one counts.
            side[str(row.get("index", f"unnumbered {len(side)}"))] = row
    shown = list(questions.items())[: most.questions]
    return {
        "label": f"step {step:,} · {KINDS.get(kind, kind)}",
        "evaluation": kind == "eval",
        "questions": [_question(text, sides, most.answers) for text, sides in shown],
        "left_out": len(questions) - len(shown),
    }


def _question(text: str, sides: Mapping[str, Mapping[str, Row]], most: int) -> dict[str, Any]:
    return {
        "text": shortened(text),
        "sides": [
            {
                "answers": [_answer(row) for row in list(sides[mode].values())[:most]],
                "left_out": max(0, len(sides[mode]) - most),
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


def _scale(steps: Sequence[Mapping[str, Any]], measure: str) -> float:
    """Where the shading is deepest: the 98th percentile of all tokens, so that a few do not make all others pale."""
    values = list(_values(steps, measure))
    return float(f"{max(np.quantile(values, 0.98), 0.05):.2g}") if values else 1.0


def _values(steps: Sequence[Mapping[str, Any]], measure: str) -> Iterator[float]:
    for step in steps:
        for question in step["questions"]:
            for side in question["sides"]:
                for answer in side["answers"]:
                    yield from (value for value in answer.get("tokens", {}).get(measure, ()) if value is not None)
