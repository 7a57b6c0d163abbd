import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policy_split_jax.data import walk
from policy_split_jax.rewards.walk import MAX_LENGTH, answered, canonical, score

# Row by row, start S, goal G, walls #:  S . # . . .
#                                        . # . . . .
#                                        . . G . . .
TRUTH = {"start": 11, "goal": 33, "walls": [13, 22], "most": 6}
PUZZLES = walk.puzzles("train", walls=(1, 4, 8), count=60, seed=11)


def simulated(truth, moves):
    """1.0 for a right answer, on a board of characters with a border of walls around it."""
    board = ["#" * 8] + ["#" + "." * 6 + "#" for _ in range(6)] + ["#" * 8]
    board = [list(line) for line in board]
    for wall in truth["walls"]:
        board[wall // 10][wall % 10] = "#"
    row, column = truth["start"] // 10, truth["start"] % 10
    for move in moves:
        board[row][column] = "#"
        row += {"U": -1, "D": 1}.get(move, 0)
        column += {"L": -1, "R": 1}.get(move, 0)
        if board[row][column] == "#":
            return 0.0
    return float(len(moves) <= truth["most"] and 10 * row + column == truth["goal"])


@pytest.mark.parametrize(
    "response",
    [
        "DDRR",
        "ddrr",
        " D D\tRR ",
        "I walk.\n\nDDRR\n\n",
        "<think>RRDD</think>\nDDRR",
        r"\boxed{RRDD} no, \boxed{DDRR}",
        r"\boxed{D D R R} it is",
        "DDDRUR",
        "DDDRRU",
    ],
)
def test_a_right_answer_scores_one(response: str):
    assert score(response, TRUTH) == 1.0


@pytest.mark.parametrize(
    ("response", "why"),
    [
        ("", "no moves"),
        ("RRDD", "a wall"),
        ("RDDR", "a wall"),
        ("DDR", "not there"),
        ("DDRRR", "beyond"),
        ("DDRRRL", "the goal entered twice"),
        ("DUDDRR", "a cell entered twice"),
        ("LDDRR", "off the grid"),
        ("UDDDRR", "off the grid"),
        ("DDDDRRUU", "eight moves"),
        ("DDRR.", "more than moves"),
        ("D,D,R,R", "more than moves"),
        ("DDRRX", "another letter"),
        ("DDRR\nThat is it.", "the last line has no moves"),
        ("DDRR</think>", "nothing after the thinking"),
        (r"DDRR \boxed{}", "an empty box"),
        (r"\boxed{DDRR} but rather \boxed{RRDD}", "the last box"),
    ],
)
def test_anything_else_scores_zero(response: str, why: str):
    assert score(response, TRUTH) == 0.0, why


@pytest.mark.parametrize(
    "response",
    [
        "11213233",  # the cells themselves
        "２ＤＤＲＲ",
        "ＤＤＲＲ",  # full width
        "ⅮⅮRR",  # Roman numeral five hundred
        "DDℛℛ",
        "ⅾⅾrr",
        "ddʀʀ",
        "↓↓→→",
        "DD\u0301RR",
        "DD\u200bRR",
        "DD\0RR",
        "DDRR" + "\u202e",
        "2D2R",
        r"\boxed{2}" * 50_000,
        r"\boxed{" * 50_000 + "DDRR",
        "DDRR" * 1_000_000,
        "__import__('os')",
    ],
)
def test_hostile_text_is_no_answer(response: str):
    assert answered(response, TRUTH) is None
    assert score(response, TRUTH) == 0.0


def test_length_is_bounded():
    assert answered("D" * MAX_LENGTH, TRUTH) == "D" * MAX_LENGTH
    assert answered("D" * (MAX_LENGTH + 1), TRUTH) is None
    assert answered("D" + " " * (MAX_LENGTH - 2) + "D", TRUTH) == "DD"
    assert answered("D" + " " * (MAX_LENGTH - 1) + "D", TRUTH) is None


def test_the_form_is_the_moves():
    assert canonical("so: \n d d r r", TRUTH) == answered(r"\boxed{DDRR}", TRUTH) == "DDRR"
    assert canonical("rrdd", TRUTH) is None
    assert answered("rrdd", TRUTH) == "RRDD"  # a wrong answer has a vote too
    assert answered("no", TRUTH) is answered("", TRUTH) is None


def test_a_broken_ground_truth_is_an_error_and_not_a_zero():
    for key in TRUTH:
        with pytest.raises(KeyError, match=key):
            score("no", {name: value for name, value in TRUTH.items() if name != key})


@settings(deadline=None)
@given(st.sampled_from(PUZZLES), st.data())
def test_every_enumerated_answer_is_right_and_any_mutation_is_what_a_simulation_says(puzzle, data):
    truth = walk.ground_truth(puzzle)
    moves = data.draw(st.sampled_from(walk.solutions(puzzle)))
    assert score(moves, truth) == simulated(truth, moves) == 1.0
    at = data.draw(st.integers(0, len(moves)))
    gone = data.draw(st.integers(0, 2))
    put = data.draw(st.text("UDLR", max_size=3))
    mutated = moves[:at] + put + moves[at + gone :]
    expected = simulated(truth, mutated)
    assert score(mutated, truth) == expected
    assert (mutated in walk.solutions(puzzle)) == (expected == 1.0)


@settings(deadline=None)
@given(st.sampled_from(PUZZLES), st.text("UDLR", max_size=12))
def test_any_moves_are_what_a_simulation_says(puzzle, moves):
    truth = walk.ground_truth(puzzle)
    assert score(moves, truth) == simulated(truth, moves)


@settings(deadline=None)
@given(st.text() | st.text(alphabet="UDLRudlr{}\\boxed \n</think>"))
def test_arbitrary_text_never_raises(text: str):
    assert score(text, TRUTH) in (0.0, 1.0)
    assert score(r"\boxed{" + text, TRUTH) in (0.0, 1.0)
