import json
from collections import Counter
from itertools import chain

import pytest

from policy_split_jax.data import countdown, walk
from policy_split_jax.data.dataset import load_rows, make_iterator, restore_state, state_to_json
from policy_split_jax.data.embedded import PuzzleConfig
from policy_split_jax.data.formats import Row
from policy_split_jax.errors import UserError

ROWS = [Row(f"question {i}", i, "test") for i in range(10)]


def take(iterator, count):
    """The row indices of the next batches, each question checked against its row."""
    batches = [next(iterator) for _ in range(count)]
    assert all(question.row is ROWS[question.index] for batch in batches for question in batch)
    return [[question.index for question in batch] for batch in batches]


def test_resuming_equals_not_stopping():
    whole = take(make_iterator(ROWS, batch_size=4, seed=1), 20)
    for stop in (0, 1, 7):  # before the first batch, within an epoch, in a later epoch
        iterator = make_iterator(ROWS, batch_size=4, seed=1)
        take(iterator, stop)
        saved = json.dumps(state_to_json(iterator))
        take(iterator, 3)  # a state must not follow the iterator it was taken from
        resumed = make_iterator(ROWS, batch_size=4, seed=1)
        restore_state(resumed, json.loads(saved))
        assert take(resumed, 20 - stop) == whole[stop:]
        restore_state(iterator, json.loads(saved))
        assert take(iterator, 20 - stop) == whole[stop:]


def test_every_row_once_an_epoch_and_epochs_differ():
    stream = list(chain(*take(make_iterator(ROWS, batch_size=4, seed=3), 25)))
    epochs = [stream[i : i + 10] for i in range(0, 100, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 10  # chance of a repeat: 45 / 10!


def test_seeds_differ_and_repeat():
    first = take(make_iterator(ROWS, batch_size=5, seed=0), 4)
    assert first == take(make_iterator(ROWS, batch_size=5, seed=0), 4)
    assert first != take(make_iterator(ROWS, batch_size=5, seed=1), 4)


def test_without_shuffle_the_order_is_the_files():
    batches = take(make_iterator(ROWS, batch_size=4, seed=0, shuffle=False), 6)
    assert batches == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 0, 1], [2, 3, 4, 5], [6, 7, 8, 9], [0, 1, 2, 3]]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 11}, "batch size 11 does not fit 10 rows"),
        ({"batch_size": 0}, "batch size 0 does not fit 10 rows"),
        ({"batch_size": 4, "seed": -1}, "seed -1 must lie in"),
    ],
)
def test_sizes_that_do_not_fit(settings, message):
    with pytest.raises(UserError, match=message):
        make_iterator(ROWS, **({"seed": 0} | settings))


def test_a_batch_of_all_rows_is_an_epoch():
    (batch,) = take(make_iterator(ROWS, batch_size=10, seed=0), 1)
    assert Counter(batch) == Counter(range(10))


def test_batches_of_one_row():
    assert take(make_iterator(ROWS, batch_size=1, seed=0, shuffle=False), 12) == [[at % 10] for at in range(12)]


def test_embedded_rows():
    rows = load_rows("embedded", PuzzleConfig(numbers=(3, 4)), split="test", count=20, seed=7)
    puzzles = countdown.puzzles("test", numbers=(3, 4), count=20, seed=7)
    assert [row.question for row in rows] == [countdown.render(puzzle) for puzzle in puzzles]
    for row, puzzle in zip(rows, puzzles, strict=True):
        assert row.ground_truth == {"numbers": list(puzzle.numbers), "target": puzzle.target}
        assert (row.data_source, row.extra_info) == ("countdown", {"split": "test"})


def test_embedded_rows_of_the_other_task():
    rows = load_rows("embedded", PuzzleConfig("walk", walls=(2, 5)), split="test", count=20, seed=7)
    puzzles = walk.puzzles("test", walls=(2, 5), count=20, seed=7)
    assert [row.question for row in rows] == [walk.render(puzzle) for puzzle in puzzles]
    assert [row.ground_truth for row in rows] == [walk.ground_truth(puzzle) for puzzle in puzzles]
    assert {row.data_source for row in rows} == {"walk"}


def test_rows_of_a_file(tmp_path):
    path = tmp_path / "sums.jsonl"
    path.write_text('{"problem": "1+1?", "final": 2}\n')
    assert load_rows(path, question_column="problem", answer_column="final") == [Row("1+1?", 2, "sums")]
    assert load_rows(str(path), question_column="problem", answer_column="final")[0].ground_truth == 2
