from collections import Counter
from itertools import product

import pytest

from policy_split_jax.data import walk
from policy_split_jax.errors import UserError
from policy_split_jax.rewards.walk import score

STEPS = {"U": (-1, 0), "D": (1, 0), "L": (0, -1), "R": (0, 1)}
# Row by row, start S, goal G, walls #:  . S . . . .
#                                        . # # . . .
#                                        # . G . . .
CORNER = walk.Puzzle(12, 33, (22, 23, 31))


def leads(puzzle, moves):
    """Whether the moves lead to the goal, by coordinates and without the package's arithmetic."""
    place = divmod(puzzle.start, 10)
    entered = [place]
    for move in moves:
        place = (place[0] + STEPS[move][0], place[1] + STEPS[move][1])
        entered.append(place)
    inside = all(1 <= row <= 6 and 1 <= column <= 6 for row, column in entered)
    free = not {divmod(wall, 10) for wall in puzzle.walls} & set(entered)
    return inside and free and len(set(entered)) == len(entered) and place == divmod(puzzle.goal, 10)


def brute_force(puzzle, longest):
    """Right answers by trying every string of moves up to a length, shortest first; `SLACK` moves over the first."""
    found = []
    for length in range(longest + 1):
        found += ["".join(moves) for moves in product("DLRU", repeat=length) if leads(puzzle, moves)]
    return [moves for moves in found if len(moves) <= len(found[0]) + 2]


def identity(puzzle):
    return puzzle.start, puzzle.goal, tuple(sorted(puzzle.walls))


def test_solutions_written_out():
    # The left way round ends at the wall 31; the right way takes 5 moves, with detours 7.
    assert walk.distances(33, CORNER.walls)[12] == 5
    assert CORNER.most == 7
    assert walk.solutions(CORNER) == ["RRDDL", "RRDDDLU", "RRDRDLL", "RRRDDLL", "RRRDLDL"]


@pytest.mark.parametrize(
    "puzzle", [walk.Puzzle(11, 33, (12,)), walk.Puzzle(66, 44, (55, 64)), walk.Puzzle(35, 26, (36, 25))]
)
def test_solutions_are_those_of_brute_force(puzzle):
    assert walk.solutions(puzzle) == brute_force(puzzle, puzzle.most)
    assert puzzle.most <= 8  # 4^8 strings: no more can be tried here


def test_no_cell_lies_beyond_the_edge():
    # A move to the right of 16 would be 17, and to the left of 21 would be 20.
    assert walk.end_of(16, (), "R") is walk.end_of(21, (), "L") is walk.end_of(11, (), "U") is None
    assert walk.end_of(66, (), "D") is None
    assert walk.end_of(65, (), "R") == 66
    assert walk.end_of(11, (), "") == 11


def test_puzzles_are_unique_solvable_and_deterministic():
    puzzles = walk.puzzles("train", walls=(2, 5), count=200, seed=3)
    assert puzzles == walk.puzzles("train", walls=(2, 5), count=200, seed=3)
    assert puzzles[:50] == walk.puzzles("train", walls=(2, 5), count=50, seed=3)
    others = walk.puzzles("train", walls=(2, 5), count=200, seed=4)
    assert {identity(p) for p in puzzles} != {identity(p) for p in others}
    assert len({identity(p) for p in puzzles}) == 200
    assert Counter(len(p.walls) for p in puzzles) == {2: 100, 5: 100}
    assert any(p.walls != tuple(sorted(p.walls)) for p in puzzles)
    assert {p.most - walk.SLACK for p in puzzles} == set(walk.DISTANCES)
    for puzzle in puzzles:
        assert len({puzzle.start, puzzle.goal, *puzzle.walls}) == 2 + len(puzzle.walls)
        assert all(leads(puzzle, moves) for moves in walk.solutions(puzzle))
        assert len(walk.solutions(puzzle)[0]) == puzzle.most - walk.SLACK


def test_puzzles_exhaust_exactly_what_exists():
    # Without walls the distance is that of rows plus columns.
    ends = [
        (a, b) for a in walk.CELLS for b in walk.CELLS if abs(a // 10 - b // 10) + abs(a % 10 - b % 10) in (4, 5, 6, 7)
    ]
    for split in ("train", "test"):
        size = sum(walk.split_of(walk.Puzzle(*pair, ())) == split for pair in ends)
        puzzles = walk.puzzles(split, walls=(0,), count=size, seed=1)
        assert len({identity(p) for p in puzzles}) == size
        with pytest.raises(UserError, match=f"only {size} exist"):
            walk.puzzles(split, walls=(0,), count=size + 1, seed=1)


def test_splits_are_disjoint_and_the_test_share_is_five_percent():
    train = walk.puzzles("train", walls=(1,), count=4000, seed=0)
    test = walk.puzzles("test", walls=(1,), count=200, seed=0)
    assert not {identity(puzzle) for puzzle in train} & {identity(puzzle) for puzzle in test}
    every = [
        walk.Puzzle(start, goal, (wall,)) for start in walk.CELLS[:20] for goal in walk.CELLS for wall in walk.CELLS
    ]
    share = sum(walk.split_of(puzzle) == "test" for puzzle in every) / len(every)
    assert share == pytest.approx(0.05, abs=0.005)  # 25,920 draws: three standard deviations and more


def test_split_never_changes():
    # First 16 hexadecimal digits of `printf 11,45,23,34,42 | sha256sum`, and of 11,45,22, modulo 100: 90 and 2.
    # A changed rule would put old test puzzles into the training set of an older checkpoint.
    assert walk.split_of(walk.Puzzle(11, 45, (23, 34, 42))) == "train"
    assert walk.split_of(walk.Puzzle(11, 45, (42, 23, 34))) == "train"
    assert walk.split_of(walk.Puzzle(11, 45, (22,))) == "test"


def test_question_and_ground_truth():
    puzzle = walk.Puzzle(11, 45, (23, 34, 42))
    assert walk.render(puzzle) == "Walk 11 to 45 around 23, 34, 42."
    assert walk.ground_truth(puzzle) == {"start": 11, "goal": 45, "walls": [23, 34, 42], "most": 9}
    assert walk.render(walk.Puzzle(11, 45, ())) == "Walk 11 to 45."


def test_what_the_warm_up_teaches_is_right_or_wrong_as_it_says():
    for puzzle in walk.puzzles("train", count=50, seed=2):
        truth = walk.ground_truth(puzzle)
        right, wrong = walk.right_answers(puzzle), walk.wrong_answers(puzzle, 8)
        assert len(set(right)) == len(right) == min(walk.TAUGHT, len(walk.solutions(puzzle)))
        assert {score(moves, truth) for moves in right} == {1.0}
        assert {score(moves, truth) for moves in wrong} == {0.0}
        assert len(wrong) == 8
        for moves in wrong:
            near = [other for other in walk.solutions(puzzle) if len(other) == len(moves)]
            assert min(sum(a != b for a, b in zip(moves, other, strict=True)) for other in near) == 1
        assert (right, wrong) == (walk.right_answers(puzzle), walk.wrong_answers(puzzle, 8))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"split": "validation"}, "split is 'validation'"),
        ({"walls": ()}, r"walls is \(\)"),
        ({"walls": (3, 11)}, r"walls is \(3, 11\)"),
        ({"walls": (-1,)}, r"walls is \(-1,\)"),
        ({"count": 0}, "count is 0"),
    ],
)
def test_bad_settings_are_named(settings, message):
    defaults = {"split": "train", "walls": (3,), "count": 1, "seed": 0}
    with pytest.raises(UserError, match=message):
        walk.puzzles(**(defaults | settings))
