import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from policy_split_jax.errors import UserError
from policy_split_jax.rewards import Grade, GradeItem, GraderPool

# What the response asks for happens; a number is its own score.
REWARD = """
import json, math, os, signal, subprocess, sys, time

def compute_score(data_source, solution_str, ground_truth, extra_info):
    if solution_str == "sleep":
        time.sleep(1000)
    if solution_str == "child":
        child = subprocess.Popen(["sleep", "1000"])
        open(extra_info["file"], "w").write(str(child.pid))
        time.sleep(1000)
    if solution_str == "spin":
        while True:
            pass
    if solution_str == "raise":
        raise KeyError("lost")
    if solution_str == "library":
        json.loads("{")
    if solution_str == "exit":
        os._exit(3)
    if solution_str == "segfault":
        os.kill(os.getpid(), signal.SIGSEGV)
    if solution_str == "sys.exit":
        sys.exit("bye")
    if solution_str == "memory":
        return float(len(bytearray(10 * 2**30)))
    if solution_str == "modules":
        return float(any(name in sys.modules for name in ("jax", "jaxlib", "torch", "numpy")))
    if solution_str == "arguments":
        return float((data_source, ground_truth, extra_info) == ("where", {"a": [1]}, {"b": None}))
    if solution_str == "interrupt":
        os.kill(os.getpid(), signal.SIGINT)
        return 1.0
    if solution_str == "fork":
        os.fork()
        return 2.0
    if solution_str == "print":
        print("a reward's print")
        os.system("echo a child")
        return 1.0
    if solution_str == "write":
        for name in os.listdir("/proc/self/fd"):
            if os.path.exists(f"/proc/self/fd/{name}") and "socket" in os.readlink(f"/proc/self/fd/{name}"):
                os.write(int(name), extra_info["text"].encode())
        time.sleep(extra_info.get("seconds", 0))
    if solution_str == "new session":
        child = subprocess.Popen(["sleep", "1000"], start_new_session=True, env={})
        return child.pid
    if solution_str == "pid":
        return os.getpid()
    return {"nan": math.nan, "str": "1.0", "none": None, "dict": {"score": 0.75}}.get(solution_str) \\
        if solution_str in ("nan", "str", "none", "dict") else float(solution_str)
"""


@pytest.fixture(scope="module")
def reward(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("reward") / "my_reward.py"
    file.write_text(REWARD)
    return f"{file}:compute_score"


def items(*responses: str) -> list[GradeItem]:
    return [GradeItem(response, None) for response in responses]


def line(text: str) -> int:
    (number,) = [number for number, line in enumerate(REWARD.splitlines(), 1) if text in line]
    return number


def test_failures_have_no_score_and_neighbours_keep_theirs(reward: str):
    bad = {
        "raise": rf"KeyError: 'lost' \(.*my_reward.py:{line('raise KeyError')}\)",
        "library": rf"JSONDecodeError: .* \(.*my_reward.py:{line('json.loads')}\)",
        "exit": r"the grader process died \(exit code 3\)",
        "segfault": r"the grader process died \(signal 11\)",
        "sys.exit": rf"SystemExit: bye \(.*my_reward.py:{line('sys.exit(')}\)",
        "memory": rf"MemoryError \(.*my_reward.py:{line('bytearray')}\)",
        "nan": rf"returned nan, not a number between -1e\+09 and 1e\+09 \(.*my_reward.py:{line('def compute_score')}\)",
        "str": rf"returned str, not a number \(.*my_reward.py:{line('def compute_score')}\)",
        "none": rf"returned NoneType, not a number \(.*my_reward.py:{line('def compute_score')}\)",
        "text": "could not convert string to float",
    }
    responses = []
    for index, name in enumerate(bad):
        responses += [str(index), name, str(index + 0.5)]
    with GraderPool(reward, workers=2, time_limit=30.0, memory_limit_mb=1024) as pool:
        grades = pool.grade(items(*responses))
    for index, (name, pattern) in enumerate(bad.items()):
        before, failed, after = grades[3 * index : 3 * index + 3]
        assert before == Grade(float(index), str(index))
        assert after == Grade(index + 0.5, str(index + 0.5))
        assert failed.score is None, name
        assert re.search(pattern, failed.error or ""), (name, failed.error)
        assert "\n" not in (failed.error or "")


def test_a_hanging_answer_is_killed_at_its_limit_and_delays_no_other(reward: str):
    with GraderPool(reward, workers=2, time_limit=1.0) as pool:
        start = time.monotonic()
        grades = pool.grade(items("1", "sleep", "2", "3", "spin", "4"))
        took = time.monotonic() - start
        assert [grade.score for grade in grades] == [1.0, None, 2.0, 3.0, None, 4.0]
        assert grades[1].error == grades[4].error == "no result within 1 s"
        # The two hang side by side: 1 s, then a worker starts for what is left (8 s allow for a busy one).
        assert 1.0 <= took < 9.0
        assert pool.grade(items("5", "6")) == [Grade(5.0, "5"), Grade(6.0, "6")]


def test_idle_time_does_not_count_against_the_next_answer(reward: str):
    with GraderPool(reward, workers=1, time_limit=2.0) as pool:
        time.sleep(2.1)
        assert pool.grade(items("1")) == [Grade(1.0, "1")]


def test_a_killed_worker_takes_its_children_along(reward: str, tmp_path: Path):
    file = tmp_path / "pid"
    with GraderPool(reward, workers=1, time_limit=1.0) as pool:
        grade = pool.grade([GradeItem("child", None, extra_info={"file": str(file)})])[0]
    assert grade.score is None
    assert _gone(int(file.read_text()))


def test_order_is_kept_over_many_chunks_and_calls(reward: str):
    numbers = [float(number) for number in range(200)]
    with GraderPool(reward, workers=3) as pool:
        for _ in range(2):
            assert [grade.score for grade in pool.grade(items(*map(str, numbers)))] == numbers
        assert pool.grade([]) == []


def test_workers_are_light_and_get_all_arguments(reward: str):
    with GraderPool(reward, workers=1) as pool:
        full = GradeItem("arguments", {"a": [1]}, "where", {"b": None})
        assert pool.grade([*items("modules", "dict", "interrupt"), full]) == [
            Grade(0.0, "modules"),
            Grade(0.75, "dict"),
            Grade(1.0, "interrupt"),
            Grade(1.0, "arguments"),
        ]


def test_a_worker_that_dies_while_idle_costs_no_answer(reward: str):
    with GraderPool(reward, workers=1) as pool:
        pid = pool.grade(items("pid"))[0].score
        assert pid is not None
        os.kill(int(pid), signal.SIGKILL)
        assert _gone(int(pid))
        assert pool.grade(items("1", "2")) == [Grade(1.0, "1"), Grade(2.0, "2")]


def test_a_worker_that_dies_before_it_reads_its_answers_costs_none(reward: str):
    with GraderPool(reward, workers=1) as pool:
        pid = pool._workers[0].process.pid
        os.kill(pid, signal.SIGSTOP)  # so that the answers wait in the socket
        killer = threading.Timer(0.3, os.kill, (pid, signal.SIGKILL))
        killer.start()
        assert pool.grade(items("1", "2")) == [Grade(1.0, "1"), Grade(2.0, "2")]
        killer.join()
        assert pool._workers[0].process.pid != pid


def test_a_worker_that_reads_nothing_is_replaced_however_much_it_was_sent(reward: str):
    with GraderPool(reward, workers=1, time_limit=1.0) as pool:
        os.kill(pool._workers[0].process.pid, signal.SIGSTOP)
        start = time.monotonic()
        long = " " * 2_000_000  # more than a socket holds
        assert [grade.score for grade in pool.grade(items("1" + long, "2"))] == [1.0, 2.0]
        assert 1.0 <= time.monotonic() - start < 9.0


def test_answers_that_are_never_read_are_given_up(reward: str, monkeypatch: pytest.MonkeyPatch):
    with GraderPool(reward, workers=1) as pool:
        dead = "import sys, os; from policy_split_jax.rewards.worker import _send; import socket; "
        dead += "stream = socket.socket(fileno=int(sys.argv[1])).makefile('rwb'); stream.readline(); "
        dead += "_send(stream, {'error': None}); stream.readline(); os._exit(7)"
        os.kill(pool._workers[0].process.pid, signal.SIGKILL)
        monkeypatch.setattr("policy_split_jax.rewards.pool._START", dead)
        grades = pool.grade(items("1", "2"))
    assert grades == [Grade(None, error="the grader process died (exit code 7)")] * 2


def test_a_replacement_that_dies_while_it_loads_is_started_again(tmp_path: Path):
    count = tmp_path / "count"
    count.touch()
    (tmp_path / "module.py").write_text(
        "import os\n"
        f"open({str(count)!r}, 'a').write('x')\n"
        f"number = os.path.getsize({str(count)!r})\n"
        "if number in (2, 4, 5, 6): os._exit(5)\n"
        "def f(data_source, solution_str, ground_truth, extra_info):\n"
        "    return os._exit(3) if solution_str == 'exit' else number\n"
    )
    died = Grade(None, error="the grader process died (exit code 3)")
    with GraderPool(f"{tmp_path / 'module.py'}:f", workers=1) as pool:
        assert pool.grade(items("exit", "a")) == [died, Grade(3.0, "a")]
        with pytest.raises(UserError, match=r"died \(exit code 5\) while loading"):
            pool.grade(items("exit", "a"))
    assert count.read_text() == "x" * 6


def test_the_child_of_a_reward_that_forks_sends_no_grade(reward: str):
    with GraderPool(reward, workers=1) as pool:
        assert [grade.score for grade in pool.grade(items("fork", "1", "fork", "3"))] == [2.0, 1.0, 2.0, 3.0]


@pytest.mark.parametrize("text", ["no json\n", "[1]\n", "7\n", '{"score": 1, "what": 2}\n', '{"sco'])
def test_what_is_no_grade_ends_the_worker_and_not_the_run(reward: str, text: str):
    with GraderPool(reward, workers=1) as pool:
        grades = pool.grade([GradeItem("write", None, extra_info={"text": text}), *items("1")])
        assert grades == [Grade(None, error="the grader process sent what is no grade"), Grade(1.0, "1")]
        assert pool.grade(items("2")) == [Grade(2.0, "2")]


def test_half_a_message_is_waited_for_no_longer_than_the_limit(reward: str):
    half = GradeItem("write", None, extra_info={"text": '{"sco', "seconds": 1000})
    with GraderPool(reward, workers=1, time_limit=1.0) as pool:
        assert pool.grade([half, *items("1")]) == [Grade(None, error="no result within 1 s"), Grade(1.0, "1")]


def test_what_a_reward_prints_is_no_output_of_the_command(reward: str):
    script = (
        "from policy_split_jax.rewards import *\n"
        f"with GraderPool({reward!r}, workers=1) as pool: print(pool.grade([GradeItem('print', None)])[0].score)"
    )
    project = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=project, check=True)
    assert done.stdout == "1.0\n"
    assert done.stderr.splitlines() == ["a reward's print", "a child"]


def test_a_child_in_a_session_of_its_own_ends_with_its_worker(reward: str):
    with GraderPool(reward, workers=1) as pool:
        pid = pool.grade(items("new session"))[0].score
        assert pid is not None
        assert Path(f"/proc/{int(pid)}").exists()
    assert _gone(int(pid))


def test_what_is_not_json_fails_alone(reward: str):
    with GraderPool(reward, workers=1) as pool:
        grades = pool.grade([GradeItem("1", {1, 2}), GradeItem("2", None)])
    assert grades[0].score is None
    assert "must be JSON" in (grades[0].error or "")
    assert grades[1] == Grade(2.0, "2")


def test_workers_end_with_the_pool_and_with_the_parent(reward: str):
    with GraderPool(reward, workers=1) as pool:
        pid = pool.grade(items("pid"))[0].score
    assert pid is not None
    assert _gone(int(pid))
    with pytest.raises(ValueError, match="closed"):
        pool.grade(items("1"))

    script = (
        "import os, signal; from policy_split_jax.rewards import *; "
        f"pool = GraderPool({reward!r}, workers=1); "
        "print(int(pool.grade([GradeItem('pid', None)])[0].score), flush=True); "
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    project = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=project, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert _gone(int(done.stdout))


def test_a_parent_that_dies_ends_a_hanging_worker(reward: str, tmp_path: Path):
    hang = tmp_path / "hang.py"
    hang.write_text(
        "import os, time\n"
        "def f(data_source, solution_str, ground_truth, extra_info):\n"
        "    open(solution_str, 'w').write(str(os.getpid()))\n"
        "    time.sleep(1000)\n"
    )
    file = tmp_path / "pid"
    script = (
        "import os, signal, threading, time; from pathlib import Path\n"
        "from policy_split_jax.rewards import *\n"
        f"pool = GraderPool({f'{hang}:f'!r}, workers=1, time_limit=1000)\n"
        "def die():\n"
        f"    while not Path({str(file)!r}).exists(): time.sleep(0.05)\n"
        "    time.sleep(0.2); os.kill(os.getpid(), signal.SIGKILL)\n"
        "threading.Thread(target=die, daemon=True).start()\n"
        f"pool.grade([GradeItem({str(file)!r}, None)])\n"
    )
    project = Path(__file__).resolve().parents[2]
    subprocess.run([sys.executable, "-c", script], cwd=project, check=False, timeout=60)
    assert _gone(int(file.read_text()))


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        ("countdwn", "unknown reward 'countdwn': use countdown, exact, letter, math"),
        ("missing.py:f", "no file missing.py"),
        ("no_such_module:f", "ModuleNotFoundError"),
    ],
)
def test_a_bad_reward_is_a_user_error_at_construction(reward: str, message: str):
    with pytest.raises(UserError, match=message):
        GraderPool(reward, workers=1)


def test_a_module_that_dies_on_import_is_a_user_error(tmp_path: Path):
    (tmp_path / "dies.py").write_text("import os\nos._exit(1)\n")
    with pytest.raises(UserError, match=r"died \(exit code 1\) while loading"):
        GraderPool(f"{tmp_path / 'dies.py'}:f", workers=2)


@pytest.mark.parametrize("setting", [{"workers": 0}, {"time_limit": 0.0}, {"memory_limit_mb": -1}])
def test_limits_must_be_positive(setting: dict):
    with pytest.raises(UserError, match="must be positive"):
        GraderPool("exact", **setting)


def test_countdown_and_exact_are_graded_without_processes():
    truth = {"numbers": [1, 2], "target": 3}
    with GraderPool("countdown") as pool:
        grades = pool.grade(
            [GradeItem("2+1", truth), GradeItem("2-1", truth), GradeItem("1+2", {}), GradeItem("1+2", truth)]
        )
        assert pool._workers == []
    assert grades[0] == grades[3] == Grade(1.0, "(1+2)")
    assert grades[1] == Grade(0.0, "-(1-2)")  # a wrong answer has a vote too
    assert grades[2].score is None
    assert "KeyError" in (grades[2].error or "")
    with GraderPool("exact") as pool:
        assert pool.grade([GradeItem("a", "a"), GradeItem("b", "a")]) == [Grade(1.0, "a"), Grade(0.0, "b")]


def test_walks_are_graded_without_processes():
    truth = {"start": 11, "goal": 22, "walls": [12], "most": 4}
    with GraderPool("walk") as pool:
        grades = pool.grade([GradeItem("DR", truth), GradeItem("rd", truth), GradeItem("DR", {}), GradeItem("", truth)])
        assert pool._workers == []
    assert grades[:2] == [Grade(1.0, "DR"), Grade(0.0, "RD")]
    assert "KeyError" in (grades[2].error or "")
    assert grades[3] == Grade(0.0, None)


def test_math_is_graded_in_workers_and_a_bomb_is_stopped():
    bomb = r"\boxed{\sum_{n=1}^{\infty} \frac{1}{n^{9^{9^{9}}}} + 9^{9^{9^{9}}}}"
    with GraderPool("math", workers=1, time_limit=2.0) as pool:
        grades = pool.grade(
            [
                GradeItem(r"\boxed{0.5}", r"\frac{1}{2}"),
                GradeItem(r"\boxed{2}", r"\frac{1}{2}"),
                GradeItem(r"\boxed{2}", ""),
                GradeItem(bomb, "18"),
            ]
        )
    assert grades[0] == Grade(1.0, r"\frac{1}{2}")
    assert grades[1] == Grade(0.0, "2")
    assert grades[2].score is None
    assert "no mathematical answer" in (grades[2].error or "")
    assert grades[3] == Grade(None, error="no result within 2 s")


def _gone(pid: int) -> bool:
    """Whether the process ends within 10 s (a zombie, which only its parent can remove, has ended)."""
    for _ in range(200):
        stat = Path(f"/proc/{pid}/stat")
        try:
            ended = stat.read_text().rpartition(")")[2].split()[0] == "Z"
            # Its pipes are open as long as any other of its threads is ending.
            if ended and len(list(stat.parent.joinpath("task").iterdir())) == 1:
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.05)
    return False
