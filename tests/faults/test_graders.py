"""Graders under hostile answers and rewards under their own faults: no crash, no hang, nothing run, nothing leaked."""

import json
import os
import random
import re
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from itertools import chain
from pathlib import Path

import answer_checks
import pytest
from bombs import BOMBS
from hypothesis import given, settings
from hypothesis import strategies as st
from many_answers import INLINE, MATH, SEEDS, SYMBOLS, boxed, texts

from policy_split_jax.cli import main
from policy_split_jax.data import countdown as countdown_data
from policy_split_jax.data import walk as walk_data
from policy_split_jax.rewards import GradeItem, GraderPool

FAULTS = Path(__file__).resolve().parent
IN_WORKERS = {"prm800k": "x+1", "released": "x+1", "math": "18"}
RIGHT = {
    "countdown": "3*4+5",
    "walk": "DDRR",
    "exact": "18",
    "letter": r"\boxed{B}",
    "prm800k": r"</think> \boxed{1+x}",
    "released": r"</think> \boxed{1+x}",
    "math": r"</think> \boxed{18}",
}
MEMORY_MB = 1024
TIME_LIMIT = 2.0
MARGIN = 4.0
"""Seconds that ending a worker may take when other work has the cores."""


@contextmanager
def peak_of_workers(pool: GraderPool) -> Iterator[Callable[[], float]]:
    """How many MB the largest worker has had in memory, whichever workers come and go."""
    peaks: list[int] = [0]
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.01):
            for worker in tuple(pool._workers):
                try:
                    status = Path(f"/proc/{worker.process.pid}/status").read_text()
                except OSError:
                    continue
                peaks.extend(int(kilobytes) for kilobytes in re.findall(r"VmHWM:\s+(\d+)", status))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield lambda: max(peaks) / 1024
    finally:
        over.set()
        thread.join()


@pytest.fixture
def canary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory with one file, which must be as it was."""
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "canary"
    file.write_text("alive")
    before = file.stat()
    yield file
    assert [path.name for path in tmp_path.iterdir()] == ["canary"]
    assert file.read_text() == "alive"
    assert file.stat().st_mtime_ns == before.st_mtime_ns


def forms(bomb: str) -> tuple[str, str]:
    return f"<think>so</think>\n{bomb}", rf"<think>so</think> \boxed{{{bomb}}}"


@pytest.mark.parametrize("grader", INLINE)
def test_bombs_in_this_process(grader: str, canary: Path, figure: Callable[[str], None]):
    slowest, name = 0.0, ""
    with GraderPool(grader) as pool:
        for bomb, text in BOMBS.items():
            for response in forms(text):
                start = time.perf_counter()
                (grade,) = pool.grade([GradeItem(response, INLINE[grader])])
                slowest, name = max((slowest, name), (time.perf_counter() - start, bomb))
                right = grader == "countdown" and bomb == "parentheses that Python parses"
                assert (grade.score, grade.error) == (float(right), None), bomb
        tracemalloc.start()
        pool.grade([GradeItem(forms(text)[1], INLINE[grader]) for text in BOMBS.values()])
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert pool.grade([GradeItem(RIGHT[grader], INLINE[grader])])[0].score == 1.0
    assert slowest < 1.0, name
    assert peak < 64 * 2**20
    figure(
        f"{grader}: {2 * len(BOMBS)} bombs, the slowest {1e3 * slowest:.1f} ms ({name}), {peak / 2**20:.1f} MB at most"
    )


@pytest.mark.parametrize("grader", ["prm800k", "released", pytest.param("math", marks=pytest.mark.slow)])
def test_bombs_in_workers(grader: str, canary: Path, figure: Callable[[str], None]):
    reasons: dict[str, str] = {}
    slowest = 0.0
    truth = IN_WORKERS[grader]
    with (
        GraderPool(grader, workers=1, time_limit=TIME_LIMIT, memory_limit_mb=MEMORY_MB) as pool,
        peak_of_workers(pool) as peak,
    ):
        for bomb, text in BOMBS.items():
            start = time.monotonic()
            (grade,) = pool.grade([GradeItem(forms(text)[1], truth)])
            slowest = max(slowest, time.monotonic() - start)
            assert grade.score in (0.0, None), bomb
            if grade.score is None:
                reasons[bomb] = re.sub(r" \(/.*", "", grade.error or "")
            # This also waits for a new worker, which is no part of the next bomb's time.
            assert pool.grade([GradeItem(RIGHT[grader], truth)])[0].score == 1.0
        megabytes = peak()
    assert slowest < TIME_LIMIT + MARGIN
    assert megabytes < MEMORY_MB
    assert grader == "math" or reasons == {}
    figure(
        f"{grader}: {len(BOMBS)} bombs, {len(reasons)} without a grade, the slowest {slowest:.1f} s of {TIME_LIMIT:g}, "
        f"workers {megabytes:.0f} MB at most of {MEMORY_MB}"
    )
    for reason in sorted({*reasons.values()}):
        figure(f"{grader}: {reason}: {', '.join(bomb for bomb, own in reasons.items() if own == reason)}")


EXPRESSIONS = st.recursive(
    st.sampled_from(["3", "4", "5", "17", "34", "0"]),
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from(["+", "-", "*", "/", "×", "÷", "−", "", "**", "//", " "]), inner).map("".join),
        inner.map("({})".format),
        inner.map("-{}".format),
    ),
    max_leaves=5,
)
WRAPPERS = st.sampled_from(
    ["{}", "{} = 17", "so\n\n{}\n", "<think>3*4+5</think>{}", r"\boxed{{{}}} it is", "{}</think>"]
)
ANSWERS = st.one_of(
    st.text(),
    st.text(SYMBOLS, max_size=30),
    st.text("UDLRudlr ", max_size=12),
    st.text(r"0123456789.,+-$\% eEAaBb()[]{}" + "\n", max_size=20),
    st.sampled_from([*RIGHT.values(), *answer_checks.EXACT, *chain(*SEEDS.values())]),
    EXPRESSIONS,
)


@settings(deadline=None, max_examples=500)
@given(ANSWERS, WRAPPERS)
def test_any_answer_is_judged_as_the_oracles_judge_it(answer: str, wrapper: str):
    answer_checks.check(wrapper.format(answer))


CHEATS = {
    "17e0+0e0*(3+4+5)": [3, 4, 5],
    "17.+0.*(3+4+5)": [3, 4, 5],
    "17e0": [],
    "17j*-1j": [],
    "1_7": [17],
    "0x11": [17],
    "34/2": [3, 4, 2],
    "3.0*4+5": [3, 4, 5],
    "12+5": [1, 2, 5],
    "1 2+5": [1, 2, 5],
    "1\n2+5": [1, 2, 5],
    "1\u00a02+5": [12, 5],
    "3*4+５": [3, 4, 5],
    "3*4+٥": [3, 4, 5],
    "3*4+⑤": [3, 4, 5],
    "3*4+5²": [3, 4, 5],
    "3*4+5*5/5": [3, 4, 5],
    "3*4+5+0": [3, 4, 5],
    "3*4": [3, 4, 5],
    "17": [3, 4, 5],
    "17=17": [3, 4, 5],
    "3+4+5=17": [3, 4, 5],
    "3*4+5=17=17": [3, 4, 5],
    "3+4+5+5": [3, 4, 5],
    "4**2+1": [4, 2, 1],
    "35//2": [35, 2],
    "3*4+5 if 1 else 0": [3, 4, 5],
    "3*4+5#": [3, 4, 5],
    "3*4+5,": [3, 4, 5],
    "(3*4+5,)[0]": [3, 4, 5],
    "~-18": [18],
    "+17": [17],
    "017": [17],
    "100/6+1/3": [100, 6, 1],
    "int('17')": [17],
    "3*4+5/(4-4)": [3, 4, 5, 4, 4],
    "3(4)+5": [3, 4, 5],
    "3*4\u200b+5": [3, 4, 5],
    "3*4+5\u0301": [3, 4, 5],
    "3∗4+5": [3, 4, 5],
}


@pytest.mark.parametrize("cheat", CHEATS)
def test_countdown_is_not_cheated(cheat: str):
    truth = {"numbers": CHEATS[cheat], "target": 17}
    for text in (cheat, rf"\boxed{{{cheat}}}", f"{cheat} = 17"):
        answer_checks.check_countdown(text, truth)
        assert not answer_checks.solves(text, truth)


def test_the_oracle_finds_what_is_right():
    """Every answer that the generator of puzzles holds right is right to the oracles and to the graders."""
    for puzzle in countdown_data.puzzles("train", count=100, seed=5):
        truth = countdown_data.ground_truth(puzzle)
        for answer in countdown_data.right_answers(puzzle):
            assert answer_checks.solves(answer, truth)
            answer_checks.check_countdown(answer, truth)
    for puzzle in walk_data.puzzles("train", count=100, seed=5):
        truth = walk_data.ground_truth(puzzle)
        for answer in walk_data.right_answers(puzzle):
            assert answer_checks.walks(answer, truth)
            answer_checks.check_walk(answer, truth)


@pytest.mark.slow
@pytest.mark.parametrize("grader", INLINE)
def test_a_million_texts_without_processes(grader: str, canary: Path, figure: Callable[[str], None]):
    """In an interpreter of its own, for the tests' checks of types cost more than the graders."""
    total = 1_000_000
    done = subprocess.run(
        [sys.executable, FAULTS / "many_answers.py", grader, str(total)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(FAULTS.parents[1])},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    right, rate = json.loads(done.stdout)
    assert 0.01 * total < right < 0.9 * total  # both kinds are well among them
    figure(f"{grader}: {total:,} texts, {right:,.0f} right, {rate:,.0f} a second")


@pytest.mark.slow
@pytest.mark.parametrize(("grader", "total"), [("prm800k", 100_000), ("released", 100_000), ("math", 30_000)])
def test_many_texts_in_workers(grader: str, total: int, canary: Path, figure: Callable[[str], None]):
    truth = IN_WORKERS[grader]
    seeds = [rf"<think>so</think> \boxed{{{answer}}}" for answer in MATH] + [RIGHT[grader]] * 5
    items = [GradeItem(text, truth) for text in texts(total, seeds, seed=1)]
    grades = []
    with (
        GraderPool(grader, workers=1, time_limit=TIME_LIMIT, memory_limit_mb=MEMORY_MB) as pool,
        peak_of_workers(pool) as peak,
    ):
        start = time.perf_counter()
        for first in range(0, total, 1_000):
            grades += pool.grade(items[first : first + 1_000])
        seconds = time.perf_counter() - start
        megabytes = peak()
        assert pool.grade([GradeItem(RIGHT[grader], truth)])[0].score == 1.0
    scores = [grade.score for grade in grades]
    assert {*scores} <= {0.0, 1.0, None}
    assert 0.01 * total < scores.count(1.0) < 0.9 * total
    assert megabytes < MEMORY_MB
    errors = [grade.error or "" for grade in grades if grade.score is None]
    ended = sum(error.startswith(("no result", "the grader process died")) for error in errors)
    right = scores.count(1.0)
    figure(
        f"{grader}: {total:,} texts, {right:,} right, {len(errors):,} without a grade, {ended} of them with a worker "
        f"that was replaced, {total / seconds:,.0f} a second, {megabytes:.0f} MB at most"
    )


@pytest.mark.slow
def test_fuzzing_finds_nothing(tmp_path: Path, figure: Callable[[str], None]):
    if find_spec("atheris") is None:
        pytest.skip("atheris is not installed (the [fuzz] extra)")
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for number, text in enumerate([*chain(*SEEDS.values()), *boxed(MATH)]):
        (corpus / str(number)).write_text(text)
    runs = 300_000
    done = subprocess.run(
        [sys.executable, FAULTS / "fuzz_answers.py", corpus, f"-runs={runs}", "-max_len=400", "-seed=1", "-timeout=10"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(FAULTS.parents[1])},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    ran, seconds = map(int, re.findall(r"Done (\d+) runs in (\d+) second", done.stderr)[0])
    assert ran >= runs
    figure(f"{ran:,} runs, {ran / max(seconds, 1):,.0f} a second, {len(list(corpus.iterdir()))} texts kept")


REWARD = """
import math, os, signal, subprocess, sys, time

def compute_score(data_source, solution_str, ground_truth, extra_info):
    match solution_str:
        case "raise": return {}["lost"]
        case "nan": return math.nan
        case "inf": return -math.inf
        case "string": return "1.0"
        case "none": return None
        case "dict": return {"points": 1.0}
        case "huge": return 10**400
        case "recursion": return compute_score(data_source, solution_str, ground_truth, extra_info)
        case "sys.exit": sys.exit(3)
        case "memory": return len(bytearray(10 * 2**30))
        case "interrupt": raise KeyboardInterrupt
        case "os._exit": os._exit(3)
        case "abort": os.abort()
        case "suicide": os.kill(os.getpid(), signal.SIGKILL)
        case "closed": os.closerange(3, 1000)
        case "spin":
            while True: pass
        case "sleep": time.sleep(1000)
        case "stop": os.kill(os.getpid(), signal.SIGSTOP)
        case "flood":
            while True: print("noise" * 1000)
        case "children" | "sessions":
            for _ in range(200):
                if os.fork() == 0:
                    if solution_str == "sessions": os.setsid()
                    time.sleep(1000)
                    os._exit(0)
            return 0.25
        case "bomb":  # 255 processes at most
            for _ in range(8): os.fork()
            time.sleep(1000)
    return float(solution_str)
"""

NAMED = {
    "raise": "KeyError: 'lost'",
    "nan": "returned nan, not a number between -1e+09 and 1e+09",
    "inf": "returned -inf, not a number between -1e+09 and 1e+09",
    "string": "returned str, not a number",
    "none": "returned NoneType, not a number",
    "dict": 'returned a dict without the key "score"',
    "huge": "returned inf, not a number between -1e+09 and 1e+09",
    "recursion": "RecursionError: maximum recursion depth exceeded",
    "sys.exit": "SystemExit: 3",
    "memory": "MemoryError",
}
DEAD = {
    "interrupt": "the grader process died (signal 2)",
    "os._exit": "the grader process died (exit code 3)",
    "abort": "the grader process died (signal 6)",
    "suicide": "the grader process died (signal 9)",
    "closed": "the grader process died (exit code 1)",
    "spin": "no result within 2 s",
    "sleep": "no result within 2 s",
    "stop": "no result within 2 s",
    "flood": "no result within 2 s",
    "bomb": "no result within 2 s",
}


@pytest.fixture
def reward(tmp_path: Path) -> Path:
    file = tmp_path / "my_reward.py"
    file.write_text(REWARD)
    return file


def line_of(text: str) -> int:
    return next(number for number, line in enumerate(REWARD.splitlines(), 1) if text in line)


def running(reward: Path) -> int:
    """Processes with the reward's path in their environment, which ours and what they start have."""
    mark, count = str(reward).encode(), 0
    for file in Path("/proc").glob("[0-9]*/environ"):
        try:
            count += mark in file.read_bytes()
        except OSError:
            continue
    return count


@contextmanager
def nobody_left(reward: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What was started inside is gone 5 s after the end."""
    monkeypatch.setenv("REWARD_UNDER_TEST", str(reward))
    yield
    end = time.monotonic() + 5.0
    while (left := running(reward)) and time.monotonic() < end:
        time.sleep(0.05)
    assert left == 0


@contextmanager
def nothing_on_stderr() -> Iterator[None]:
    """What workers write there is lost."""
    kept = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def test_faults_of_a_reward_are_named_with_file_and_line(reward: Path):
    with GraderPool(f"{reward}:compute_score", workers=1, memory_limit_mb=MEMORY_MB) as pool:
        worker = pool._workers[0].process.pid
        grades = pool.grade([GradeItem(name, None) for name in [*NAMED, "0.5"]])
        assert pool._workers[0].process.pid == worker  # none of these costs a worker
    for (name, reason), grade in zip(NAMED.items(), grades, strict=False):
        returned = reason.startswith("returned")
        line = line_of("def compute_score" if returned else f'case "{name}"')
        assert grade.score is None
        assert grade.error == f"{reason} ({reward}:{line})"
    assert grades[-1].score == 0.5


@pytest.mark.slow
def test_a_reward_that_ends_or_hangs_its_process_costs_its_own_rollout(
    reward: Path, monkeypatch: pytest.MonkeyPatch, figure: Callable[[str], None]
):
    with nobody_left(reward, monkeypatch), nothing_on_stderr():
        names = [name for fault in DEAD for name in (fault, "0.5")]
        pool = GraderPool(f"{reward}:compute_score", workers=2, time_limit=TIME_LIMIT, memory_limit_mb=MEMORY_MB)
        with pool, peak_of_workers(pool) as peak:
            start = time.monotonic()
            grades = pool.grade([GradeItem(name, None) for name in names])
            seconds = time.monotonic() - start
            megabytes = peak()
        assert [grade.error for grade in grades[::2]] == [*DEAD.values()]
        assert [grade.score for grade in grades[1::2]] == [0.5] * len(DEAD)
        assert megabytes < MEMORY_MB
    figure(f"{len(DEAD)} faults among {len(names)} answers, {seconds:.1f} s, workers {megabytes:.0f} MB at most")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["children", "sessions"])
def test_two_hundred_children_end_with_the_pool(name: str, reward: Path, monkeypatch: pytest.MonkeyPatch):
    with nobody_left(reward, monkeypatch):
        with GraderPool(f"{reward}:compute_score", workers=1, memory_limit_mb=MEMORY_MB) as pool:
            assert [grade.score for grade in pool.grade([GradeItem(name, None), GradeItem("1", None)])] == [0.25, 1.0]
            assert running(reward) == 201
            start = time.monotonic()
        assert time.monotonic() - start < 5.0


@pytest.mark.slow
def test_workers_that_are_killed_again_and_again_cost_only_what_they_were_at(
    reward: Path, figure: Callable[[str], None]
):
    """A killer takes a worker every 0.4 s, loading, idle or at work."""
    over = threading.Event()
    kills = 0

    def killer() -> None:
        nonlocal kills
        chance = random.Random(0)
        while not over.wait(0.4):
            chance.choice(pool._workers).process.kill()
            kills += 1

    with GraderPool(f"{reward}:compute_score", workers=2) as pool:
        thread = threading.Thread(target=killer)
        thread.start()
        try:
            calls = []
            while kills < 30:
                calls.append(pool.grade([GradeItem(str(float(n)), None) for n in range(200)]))
        finally:
            over.set()
            thread.join()
    grades = [grade for call in calls for grade in call]
    failed = [grade.error for grade in grades if grade.score is None]
    assert all(grade.score in (None, float(n)) for call in calls for n, grade in enumerate(call))
    assert {*failed} <= {"the grader process died (signal 9)"}
    assert len(failed) <= kills
    figure(f"{kills} kills, {len(grades):,} answers, {len(failed)} without a grade")


@pytest.mark.slow
def test_a_worker_whose_parent_is_killed_ends_though_it_never_leaves_a_call_of_c(tmp_path: Path):
    file = tmp_path / "pid"
    script = (
        "import os, threading; from pathlib import Path; from policy_split_jax.rewards import *\n"
        "pool = GraderPool('math', workers=1, time_limit=3.0)\n"
        f"Path({str(file)!r}).write_text(str(pool._workers[0].process.pid))\n"
        "threading.Timer(1.5, os.kill, (os.getpid(), 9)).start()\n"
        r"pool.grade([GradeItem(r'\boxed{9^{9^{9^{9}}}}', '18')])"
    )
    subprocess.run([sys.executable, "-c", script], cwd=FAULTS.parents[1], check=False, timeout=120)
    stat = Path(f"/proc/{file.read_text()}/stat")
    assert stat.exists()  # it is at it
    end = time.monotonic() + 60.0  # 13 s of processor time, on a machine that may be busy
    while stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z" and time.monotonic() < end:
        time.sleep(0.2)
    assert not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_run_counts_the_rollouts_that_a_reward_fails_and_goes_on(reward: Path, tmp_path: Path):
    """Half of the calls fail, by turns, in each of their ways; all steps and evaluations have eight rollouts."""
    turns = ["raise", "0.5", "os._exit", "1", "nan", "0", "suicide", "0.25"]
    (tmp_path / "by_turns.py").write_text(
        "from my_reward import compute_score as fault\n"
        "def compute_score(data_source, solution_str, ground_truth, extra_info):\n"
        f"    with open({str(tmp_path / 'turns')!r}, 'a+') as file:\n"
        "        file.write('x')\n"
        "        turn = file.tell() - 1\n"
        f"    return fault(data_source, {turns}[turn % 8], ground_truth, extra_info)\n"
    )
    small = ["data.train_size=64", "data.test_size=4", "data.max_number=30", "eval.questions=2", "eval.k=2"]
    small += ["rollout.questions_per_step=2", "rollout.rollouts_per_mode=2", "rollout.slots=8"]
    small += ["reward.workers=1", "train.steps=2", "train.microbatch_questions=2"]
    main(
        [
            "train",
            "configs/tiny.yaml",
            f"output={tmp_path}",
            f"reward.grader={tmp_path}/by_turns.py:compute_score",
            *small,
        ]
    )
    (folder,) = [file.parent for file in tmp_path.glob("*/metrics.jsonl")]
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [(row["kind"], row["step"], row["grader/failed"]) for row in rows] == [
        ("eval", 0, 4),
        ("train", 1, 4),
        ("train", 2, 4),
        ("eval", 2, 4),
    ]
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    errors = {row["grader_error"] for row in samples}
    assert f"KeyError: 'lost' ({tmp_path / 'by_turns.py'}:6)" in errors
    assert f"returned nan, not a number between -1e+09 and 1e+09 ({tmp_path / 'by_turns.py'}:2)" in errors
    assert {"the grader process died (exit code 3)", "the grader process died (signal 9)", None} <= errors
