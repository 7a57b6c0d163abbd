"""What an evaluation reports, from groups made by hand."""

import math

import numpy as np
import pytest

from policy_split_jax.data.formats import Row
from policy_split_jax.evaluation import evaluate
from policy_split_jax.modes import HIGH_ENTROPY, NORMAL
from policy_split_jax.rewards import Grade
from policy_split_jax.rollouts import Group
from policy_split_jax.sampler.batcher import Rollout


def group(normal, high_entropy):
    """A question whose rollouts are (score, answer) or (score, answer, "length")."""
    given = [*normal, *high_entropy]
    rollouts = [
        Rollout(np.zeros(2 + at, np.int32), np.zeros(2 + at, np.float32), rest[0] if rest else "stop")
        for at, (_, _, *rest) in enumerate(given)
    ]
    modes = [NORMAL] * len(normal) + [HIGH_ENTROPY] * len(high_entropy)
    grades = [Grade(score, answer) for score, answer, *_ in given]
    return Group(Row("q", None, "test"), ([1], [2]), rollouts, modes, lambda tokens: "", grades)


def test_equal_wrong_answers_vote_together():
    wrong = [(0.0, "7"), (0.0, "7"), (1.0, "8")]
    row = evaluate.pass_metrics([group(wrong, [(0.0, "7"), (1.0, "8"), (1.0, "8")])], 3)
    assert row["maj@3/normal"] == 0.0
    assert row["maj@3/high_entropy"] == 1.0


def test_what_was_cut_off_has_no_vote_but_is_a_solution():
    """Were the right one alone to vote, it would win against two equal wrong ones."""
    cut = [(0.0, "7", "length"), (0.0, "7", "length"), (1.0, "8", "length")]
    row = evaluate.pass_metrics([group(cut, [*cut[:2], (0.0, "9")])], 3)
    assert (row["maj@3/normal"], row["maj@3/high_entropy"]) == (0.0, 0.0)
    assert evaluate.outcome_metrics([group(cut, cut)])["distinct_correct/normal"] == 1.0


@pytest.mark.parametrize(("k", "sizes", "even"), [(1, [1], []), (3, [1, 2, 3], [2]), (6, [1, 2, 4, 6], [2, 4, 6])])
def test_k_itself_is_among_the_sizes_and_both_modes_share_even_ones(k, sizes, even):
    rows = [group([(1.0, "8")] + [(0.0, "7")] * (k - 1), [(0.0, "7")] * k)]
    row = evaluate.pass_metrics(rows, k)
    assert [key for key in row if key.startswith("pass") and key.endswith("/normal")] == [
        f"pass@{size}/normal" for size in sizes
    ]
    assert [key for key in row if key.startswith("pass") and key.endswith("/both")] == [
        f"pass@{size}/both" for size in even
    ]
    assert (f"maj@{k}/both" in row) == (k % 2 == 0)
    # One of k samples is right: a draw of `size` of them holds it with probability size/k.
    for size in sizes:
        assert row[f"pass@{size}/normal"] == pytest.approx(size / k)


def test_both_modes_together():
    rows = [group([(1.0, "8"), (0.0, "7")], [(0.0, "7"), (1.0, "9")]), group([(0.0, "1")] * 2, [(1.0, "2")] * 2)]
    row = evaluate.outcome_metrics(rows)
    assert (row["accuracy/normal"], row["accuracy/high_entropy"], row["accuracy/both"]) == (0.25, 0.75, 0.5)
    # Lengths are 2, 3 (normal) and 4, 5 (high-entropy) in each question.
    assert (row["response_length/normal"], row["response_length/both"]) == (2.5, 3.5)
    assert (row["best_of_k/normal"], row["best_of_k/both"]) == (0.5, 1.0)
    assert (row["distinct_correct/high_entropy"], row["distinct_correct/both"]) == (1.0, 1.5)
    assert row["only_high_entropy_solved"] == 0.5


def test_rewards_need_not_be_zero_or_one():
    row = evaluate.outcome_metrics([group([(0.75, "8"), (None, None)], [(-1.0, "7"), (0.5, "7")])])
    assert (row["reward/normal"], row["reward/high_entropy"], row["grader/failed"]) == (0.75, -0.25, 1)
    assert row["reward/both"] == pytest.approx(0.25 / 3)
    assert (row["accuracy/normal"], row["accuracy/high_entropy"]) == (1.0, 0.0)
    assert (row["best_of_k/normal"], row["best_of_k/high_entropy"]) == (0.75, 0.5)


@pytest.mark.parametrize(("normal", "name"), [(True, "normal"), (False, "high_entropy")])
def test_what_one_mode_sampled_has_its_figures_alone(normal, name):
    """Those of the baselines, of which the other mode has none: not its share, and not that of both."""
    first, second = [(1.0, "8"), (0.0, "7"), (None, None)], [(1.0, "3"), (1.0, "4", "length"), (0.0, "5")]
    rows = [group(answers, []) if normal else group([], answers) for answers in (first, second)]
    row = evaluate.outcome_metrics(rows)
    assert row == {
        # (1/2 + 2/3) / 2: what was not graded counts nowhere.
        f"reward/{name}": pytest.approx(7 / 12),
        f"accuracy/{name}": pytest.approx(7 / 12),
        f"response_length/{name}": 3.0,
        f"truncated/{name}": pytest.approx(1 / 6),
        f"best_of_k/{name}": 1.0,
        f"distinct_correct/{name}": 1.5,
        "grader/failed": 1,
    }


def test_long_answers_are_scored_fewer_at_a_time(monkeypatch):
    """8 rollouts a question, of 10 tokens each."""
    expected = {1000: (4, 8), 330: (4, 8), 200: (2, 8), 80: (1, 8), 79: (1, 4), 39: (1, 2), 19: (1, 1), 3: (1, 1)}
    for budget, parts in expected.items():
        monkeypatch.setattr(evaluate, "_SCORED_TOKENS", budget)
        assert evaluate.scored_at_once(8, 10, shards=1) == parts


def test_parts_of_a_question_have_one_size(monkeypatch):
    monkeypatch.setattr(evaluate, "_SCORED_TOKENS", 50)
    assert [evaluate.scored_at_once(group, 10, shards=1)[1] for group in (4, 6, 7, 10)] == [4, 3, 1, 5]


def test_so_many_are_scored_that_devices_share_them():
    for group, shards, expected in ((16, 32, (32, 1)), (16, 8, (8, 1)), (6, 4, (4, 1)), (3, 1, (1, 1))):
        assert evaluate.scored_at_once(group, 1 << 20, shards) == expected
    # Short ones: as many as one device would score, evenly.
    assert evaluate.scored_at_once(2, 16, shards=4) == (4, 2)
    for group, shards, expected in ((16, 32, (4, 16)), (6, 4, (4, 6)), (3, 8, (8, 3))):
        assert evaluate.scored_at_once(group, 8, shards) == expected


@pytest.mark.parametrize(("budget", "calls"), [(32, [(2, 2)] * 5), (8, [(1, 1)] * 18)])
def test_what_is_scored_is_as_long_as_the_longest(budget, calls, monkeypatch):
    """Two rollouts of at most 3 tokens after a prompt of 1, under two modes: 16 tokens a question, two in 32."""
    rows = [group([(0.0, "1")], [(0.0, "1")])] * 9
    sizes = []

    def run(params, batch):
        sizes.append(batch.rewards.shape)
        lengths = np.broadcast_to(batch.response_lengths[..., None], batch.responses.shape).astype(np.float32)
        values = np.stack([lengths, 10 + lengths])
        return evaluate.TokenScores(100 + values, values, 200 + values)

    monkeypatch.setattr(evaluate, "_SCORED_TOKENS", budget)
    checks = []
    scored = evaluate.score_groups(
        evaluate.Scorer(run, 1), {}, rows, max_prompt_tokens=4, max_new_tokens=4, progress=checks.append
    )
    assert (sizes, len(scored)) == (calls, 9)
    # A stop can be asked for before each.
    assert checks == [0] * len(calls)
    for one in scored:
        # The rollouts have 2 and 3 tokens: each is where it belongs.
        assert one.entropy[:, :, 0].tolist() == [[2, 3], [12, 13]]
        assert one.logprobs[:, :, 0].tolist() == [[102, 103], [112, 113]]
        assert one.kl[:, :, 0].tolist() == [[202, 203], [212, 213]]


def test_means_over_tokens():
    """Sums over rollouts say the same as values of tokens."""
    # Lengths are 2, 3 (normal) and 4, 5 (high-entropy).
    own = group([(1.0, "8"), (0.0, "7")], [(0.0, "7"), (1.0, "9")])
    entropy = np.arange(2 * 4 * 6, dtype=np.float32).reshape(2, 4, 6)
    scores = evaluate.GroupScores(entropy, entropy, entropy / 16)
    tokens = [evaluate.token_sums([own], [scores], mode) for mode in (NORMAL, HIGH_ENTROPY)]
    row = evaluate.distribution_metrics(*tokens)
    # 0, 1 | 6, 7, 8 under the normal mode; 36..39 | 42..46 under the high-entropy mode.
    assert row["entropy/normal"] == 22 / 5
    assert row["entropy/high_entropy"] == 370 / 9
    assert row["entropy/both"] == 392 / 14
    assert row["entropy_bits/normal"] == pytest.approx(22 / 5 / math.log(2))
    assert row["kl/normal_to_high_entropy"] == pytest.approx(22 / 5 / 16)
    assert row["kl/high_entropy_to_normal"] == pytest.approx(370 / 9 / 16)
    rollouts = [
        evaluate.TokenSums(np.array([1.0, 21.0]), np.array([1.0, 21.0]) / 16, 5),
        evaluate.TokenSums(np.array([150.0, 220.0]), np.array([150.0, 220.0]) / 16, 9),
    ]
    assert evaluate.distribution_metrics(*rollouts) == pytest.approx(row)


def tokens_of(rows, sizes, bits):
    """Token sums of each mode and question: `sizes` tokens of `bits` bits each, by question."""
    one = [
        evaluate.TokenSums(np.array([size * bit * math.log(2)]), np.zeros(1), size)
        for size, bit in zip(sizes, bits, strict=True)
    ]
    return [[one, one]]


def test_intervals_of_accuracy_are_paired_by_question():
    """Each question's difference is 1/2, whatever its difficulty: that interval is a point, the modes' are not."""
    hard, easy = (0.0, "7"), (1.0, "8")
    rows = [group([hard, hard], [hard, easy]), group([hard, easy], [easy, easy])] * 3
    row = evaluate.intervals([rows], tokens_of(rows, [1] * 6, [1.0] * 6), 2)
    assert (row["accuracy_difference"], row["accuracy_difference/low"], row["accuracy_difference/high"]) == (0.5,) * 3
    # Six questions, half of them 0 and half 1/2: the mean of six draws is a multiple of 1/12, B(6, 1/2)/12. Its
    # quantiles at 2.5 and 97.5 % are 1/12 and 5/12 (P(B=0) = 1.6 %, P(B<=1) = 10.9 %).
    assert (row["accuracy/normal/low"], row["accuracy/normal/high"]) == pytest.approx((1 / 12, 5 / 12))
    assert (row["accuracy/high_entropy/low"], row["accuracy/high_entropy/high"]) == pytest.approx((7 / 12, 11 / 12))
    # One right of two is found by two samples: 0 or 1 a question, B(6, 1/2)/6. A tie is half a vote, as accuracy is.
    assert (row["pass@2/normal/low"], row["pass@2/normal/high"]) == pytest.approx((1 / 6, 5 / 6))
    assert (row["pass@2/high_entropy/low"], row["pass@2/high_entropy/high"]) == (1.0, 1.0)
    assert (row["maj@2/normal/low"], row["maj@2/normal/high"]) == pytest.approx((1 / 12, 5 / 12))


def test_intervals_of_entropy_weigh_tokens():
    """Half of the questions have 3 tokens of 1 bit, half 1 token of 2 bits."""
    rows = [group([(1.0, "8")], [(1.0, "8")])] * 6
    row = evaluate.intervals([rows], tokens_of(rows, [3, 1] * 3, [1.0, 2.0] * 3), 1)
    # With b of six draws the long ones: (3 b + 2 (6 - b)) / (3 b + 6 - b); b is 1 to 5 within the interval.
    ends = (row["entropy_bits/normal/low"], row["entropy_bits/normal/high"])
    assert ends == pytest.approx(((3 * 5 + 2) / (3 * 5 + 1), (3 + 2 * 5) / (3 + 5)))


def test_questions_with_failed_grades_are_counted():
    rows = [group([(None, None)], [(1.0, "8")]), group([(1.0, "8")], [(1.0, "8")]), group([(1.0, "8")], [(None, None)])]
    assert evaluate.left_out([rows], 1) == 2
    assert evaluate.left_out([rows[:1], rows[1:2]], 1) == 1


def scored(group, tokens):
    """Scores in which the entropy of token t of rollout g in mode m is 10m + g + t/1000, and its KL that plus 100."""
    modes, rollouts, places = np.meshgrid((0, 1), range(len(group.rollouts)), range(tokens), indexing="ij")
    entropy = (10 * modes + rollouts + places / 1000).astype(np.float32)
    return evaluate.GroupScores(entropy, np.zeros_like(entropy), entropy + 100)


def pieces(tokens):
    return [f"<{token}>" for token in tokens]


def test_training_samples_have_no_figures():
    rows = evaluate.sample_rows([group([(1.0, "8"), (0.0, "7")], [(0.0, "1")])])
    assert [(row["mode"], row["index"], row["reward"]) for row in rows] == [
        ("normal", 0, 1.0),
        ("normal", 1, 0.0),
        ("high_entropy", 0, 0.0),
    ]
    assert all(row["entropy"] is None and "tokens" not in row for row in rows)


def test_scored_samples_have_the_figures_of_the_mode_that_sampled():
    given = group([(1.0, "8")], [(0.0, "7")])
    given.rollouts[1] = Rollout(np.array([5, 6, 7], np.int32), np.zeros(3, np.float32), "stop")
    first, second = evaluate.scored_sample_rows([given], [scored(given, 3)], pieces)
    assert first["tokens"] == {"text": ["<0>", "<0>"], "entropy": [0.0, 0.001], "kl": [100.0, 100.001], "left_out": 0}
    assert second["tokens"] == {
        "text": ["<5>", "<6>", "<7>"],
        "entropy": [11.0, 11.001, 11.002],
        "kl": [111.0, 111.001, 111.002],
        "left_out": 0,
    }
    assert second["entropy"] == pytest.approx(11.001, rel=1e-6)


@pytest.mark.parametrize(("length", "left_out"), [(6, 0), (7, 1), (1000, 994)])
def test_of_a_long_sample_both_ends_are_kept(monkeypatch, length, left_out):
    monkeypatch.setattr(evaluate, "TOKENS_KEPT", 6)
    given = group([(1.0, "8")], [])
    given.rollouts[0] = Rollout(np.arange(length, dtype=np.int32), np.zeros(length, np.float32), "stop")
    [row] = evaluate.scored_sample_rows([given], [scored(given, length)], pieces)
    kept = [0, 1, 2, length - 3, length - 2, length - 1]
    assert row["tokens"]["text"] == [f"<{at}>" for at in kept]
    assert row["tokens"]["entropy"] == [at / 1000 for at in kept]
    assert row["tokens"]["left_out"] == left_out
