"""What of samples.jsonl the page lets one read."""

from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policy_split_jax.report import samples as samples_module
from policy_split_jax.report.frame import embedded_json
from policy_split_jax.report.groups import RunGroup
from policy_split_jax.report.runs import Run
from policy_split_jax.report.samples import ANSWERS_SHOWN, CHARACTERS_SHOWN, QUESTIONS_SHOWN, rollout_data


def sample(step=0, kind="eval", **changes):
    row = {"step": step, "kind": kind, "question": "What is 6 × 7?", "mode": "normal", "index": 0}
    return row | {"text": "It is 42.", "reward": 1.0, "finish_reason": "stop", "entropy": 0.25} | changes


def shown(*rows, evaluations=0):
    [run] = rollout_data([RunGroup("tiny", (Run("tiny", [], [{}] * evaluations, rows, None, None),))])["runs"]
    return run


def answers(run, mode=0):
    return run["steps"][0]["questions"][0]["sides"][mode]["answers"]


TOKENS = {"text": ["It ", "is", "", "€"], "entropy": [0.5, 1.0, 0.0, 0.25], "kl": [0.1, 0.2, 0.3, 0.4], "left_out": 0}


def test_answers_stand_on_the_side_of_their_mode():
    run = shown(sample(mode="high_entropy", text="HE"), sample(text="one"), sample(index=1, text="two", reward=None))
    assert answers(run) == [
        {"reward": 1.0, "entropy": 0.25, "cut_off": False, "text": "one"},
        {"reward": None, "entropy": 0.25, "cut_off": False, "text": "two"},
    ]
    assert [answer["text"] for answer in answers(run, 1)] == ["HE"]


def test_figures_of_tokens_stand_for_the_text():
    [answer] = answers(shown(sample(tokens=TOKENS, finish_reason="length")))
    assert answer == {"reward": 1.0, "entropy": 0.25, "cut_off": True, "tokens": TOKENS}


@pytest.mark.parametrize(
    "broken",
    [None, [], {}, TOKENS | {"kl": [0.1]}, TOKENS | {"text": "It is"}, {"text": ["a"], "entropy": [1.0]}],
)
def test_tokens_that_do_not_fit_together_give_way_to_the_text(broken):
    [answer] = answers(shown(sample(tokens=broken)))
    assert answer["text"] == "It is 42."
    assert "tokens" not in answer


def test_a_figure_that_is_no_number_is_none():
    [answer] = answers(shown(sample(tokens=TOKENS | {"kl": [float("nan"), None, "x", 0.5]}, entropy=float("inf"))))
    assert answer["tokens"]["kl"] == [None, None, None, 0.5]
    assert answer["entropy"] is None


def test_a_mode_is_right_where_one_of_its_answers_is():
    rows = [sample(reward=0.0), sample(index=1, reward=0.5), sample(mode="high_entropy", reward=None)]
    rows.append(sample(mode="high_entropy", index=1, reward=1.0))
    sides = shown(*rows)["steps"][0]["questions"][0]["sides"]
    assert [side["right"] for side in sides] == [False, True]


def test_steps_are_in_order_and_named():
    run = shown(sample(1200), sample(5, kind="train"), sample(0), sample(5))
    assert [(step["label"], step["evaluation"]) for step in run["steps"]] == [
        ("step 0 · evaluation", True),
        ("step 5 · evaluation", True),
        ("step 5 · training", False),
        ("step 1,200 · evaluation", True),
    ]


def test_samples_written_again_after_a_resume_replace_the_old_ones():
    assert [answer["text"] for answer in answers(shown(sample(text="first"), sample(text="second")))] == ["second"]


def test_many_questions_and_answers_are_counted_instead_of_shown():
    rows = [sample(question=f"question {at}") for at in range(QUESTIONS_SHOWN + 3)]
    rows += [sample(question="question 0", index=at) for at in range(1, ANSWERS_SHOWN + 2)]
    [step] = shown(*rows)["steps"]
    assert [len(step["questions"]), step["left_out"]] == [QUESTIONS_SHOWN, 3]
    side = step["questions"][0]["sides"][0]
    assert [len(side["answers"]), side["left_out"]] == [ANSWERS_SHOWN, 2]


def test_a_long_text_keeps_its_beginning_and_its_end():
    [answer] = answers(shown(sample(text="begin" + "x" * 2 * CHARACTERS_SHOWN + "the end")))
    assert answer["text"].startswith("begin")
    assert answer["text"].endswith("the end")
    assert f"[… {CHARACTERS_SHOWN + 12:,} characters left out …]" in answer["text"]


def size_of(*groups):
    return len(embedded_json(rollout_data(groups)))


def group_of(*rows, evaluations=0):
    return RunGroup("tiny", (Run("tiny", [], [{}] * evaluations, rows, None, None),))


def test_evaluations_between_give_way_where_the_page_would_grow_too_large(monkeypatch):
    # A "<" takes six characters of the page.
    rows = [sample(step, text="<" * 200) for step in range(9)]
    size, step = size_of(group_of(*rows)), size_of(group_of(*rows)) - size_of(group_of(*rows[1:]))
    for budget, steps in ((size, range(9)), (size - 1, (0, 1, 2, 3, 5, 6, 7, 8)), (size - 6 * step, (0, 4, 8))):
        monkeypatch.setattr(samples_module, "CHARACTERS_OF_PAGE", budget)
        run = shown(*rows, evaluations=9)
        assert [step["label"] for step in run["steps"]] == [f"step {step} · evaluation" for step in steps]
        assert run["left_out"] == 9 - len(steps)


def test_then_questions_give_way_and_answers_last(monkeypatch):
    """Of three evaluations and a step of training, each with three questions, and three answers in either mode."""
    places = [("eval", 0), ("train", 5), ("eval", 5), ("eval", 9)]
    each = [(f"question {q}", mode, at) for q in range(3) for mode in ("normal", "high_entropy") for at in range(3)]
    texts = [{"question": q, "mode": mode, "index": at, "text": "x" * 1000} for q, mode, at in each]
    rows = [sample(step, kind, **text) for kind, step in places for text in texts]
    found = []
    for thousands in (80, 65, 50, 28, 16, 9, 1):
        monkeypatch.setattr(samples_module, "CHARACTERS_OF_PAGE", 1000 * thousands)
        run = shown(*rows, evaluations=3)
        assert {step["left_out"] + len(step["questions"]) for step in run["steps"]} == {3}
        sides = [side for step in run["steps"] for question in step["questions"] for side in question["sides"]]
        assert {side["left_out"] + len(side["answers"]) for side in sides} <= {3}
        counts = [len(step["questions"]) for step in run["steps"]]
        assert run["left_out"] + len(counts) == 4
        found.append((len(counts), set(counts), {len(side["answers"]) for side in sides}))
    assert found == [
        (4, {3}, {3}),
        (3, {3}, {3}),
        (3, {2}, {3}),
        (3, {1}, {3}),
        (3, {1}, {2}),
        (3, {1}, {1}),
        (3, {0}, set()),
    ]


TEXTS = st.text(alphabet="ax<é€𝄞\n", max_size=300)
SIZES = st.tuples(st.integers(0, 4), st.integers(1, 4), st.integers(1, 3), st.integers(1, 40))


@given(st.lists(st.tuples(TEXTS, SIZES), min_size=1, max_size=4), st.integers(800, 20_000), st.booleans())
@settings(max_examples=30, deadline=None)
def test_the_rollouts_never_exceed_their_share_of_the_page(runs, share, scored):
    def rows(text, steps, questions, answers, times):
        tokens = {key: value * times for key, value in TOKENS.items()} if scored else None
        for kind, step, question, index in product(("train", "eval"), range(steps), range(questions), range(answers)):
            if kind == "eval" or step < 2:
                yield sample(step, kind, question=f"{question}{text}", index=index, text=text * times, tokens=tokens)

    groups = [group_of(*rows(text, *sizes), evaluations=sizes[0]) for text, sizes in runs]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(samples_module, "CHARACTERS_OF_PAGE", share * len(groups))
        assert size_of(*groups) <= share * len(groups)


def test_a_run_beside_another_keeps_its_own_scale():
    each = [sample(tokens={"text": ["a"], "entropy": [top], "kl": [0.0]}) for top in (0.5, 8.0)]
    data = rollout_data([RunGroup("tiny", (Run("tiny", [], [], [row], None, None),)) for row in each])
    assert [run["scale"]["entropy"] for run in data["runs"]] == [0.5, 8.0]


def test_the_scale_leaves_the_highest_two_per_cent_out():
    many = {"text": ["a"] * 101, "entropy": [at / 100 for at in range(101)], "kl": [0.0] * 101}
    run = Run("tiny", [], [], [sample(tokens=many)], None, None)
    # A KL that is nearly 0 everywhere is not blown up.
    assert rollout_data([RunGroup("tiny", (run,))])["runs"][0]["scale"] == {"entropy": 0.98, "kl": 0.05}


def test_runs_without_samples_are_left_out():
    assert rollout_data([RunGroup("tiny", (Run("tiny", [], [], [], None, None),))])["runs"] == []
