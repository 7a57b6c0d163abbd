"""Stands in for gcloud, srun, python3, policy-split and other programs: notes each call, and plays a small cloud.

Everything it knows lies in the folder $STUBS: `tpu` and `queue` hold the states of a TPU and of its place in the queue,
`workers/0` and `workers/1` are the homes of its workers, `plan.json` says what each process of a run shall do.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

ROOT = Path(os.environ["STUBS"])
WORKERS = 2


def note(program: str, arguments: list[str], **more: object) -> None:
    """One line in the log of calls."""
    row = {"program": program, "arguments": arguments, "worker": os.environ.get("WORKER"), **more}
    with (ROOT / "calls.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")


def fail(message: str, code: int = 1) -> None:
    print(f"ERROR: {message}", file=sys.stderr)
    sys.exit(code)


def state(name: str) -> str | None:
    path = ROOT / name
    return path.read_text().split()[0] if path.exists() else None


def make_tpu() -> None:
    (ROOT / "tpu").write_text("READY")
    for worker in range(WORKERS):
        (ROOT / "workers" / str(worker)).mkdir(parents=True)


def gcloud(arguments: list[str]) -> None:
    # Ctrl-C ends it at once; what it started on a worker hears nothing of that.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    words = [argument for argument in arguments if not argument.startswith("-")]
    options = dict(
        argument[2:].split("=", 1) for argument in arguments if argument.startswith("--") and "=" in argument
    )
    match words:
        case ["storage", "buckets", "describe", bucket]:
            print("" if "flat" in bucket else "True")
        case ["compute", "tpus", "tpu-vm", "describe", name]:
            print(state("tpu") or fail(f"NOT_FOUND: no node {name}"))
        case ["compute", "tpus", "queued-resources", "describe", name]:
            print(state("queue") or fail(f"NOT_FOUND: no queued resource {name}"))
            first, *others = (ROOT / "queue").read_text().split()
            (ROOT / "queue").write_text(" ".join(others or [first]))
            if first == "ACTIVE" and state("tpu") is None:
                make_tpu()
        case ["compute", "tpus", "tpu-vm", "create", _]:
            if (ROOT / "full").exists():
                fail("no more capacity in the zone")
            make_tpu()
        case ["compute", "tpus", "queued-resources", "create", _]:
            (ROOT / "queue").write_text("WAITING_FOR_RESOURCES ACTIVE")
        case ["compute", "tpus", "tpu-vm" | "queued-resources", "delete", _]:
            for group in ROOT.glob("workers/*/policy-split/.launch/pid"):
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(int(group.read_text()), signal.SIGKILL)
            (ROOT / "tpu").unlink(missing_ok=True)
            (ROOT / "queue").unlink(missing_ok=True)
            shutil.rmtree(ROOT / "workers", ignore_errors=True)
        case ["compute", "tpus", "tpu-vm", "scp", source, target]:
            if take("unreachable"):
                fail("Connection timed out", 255)
            for worker in range(WORKERS):
                shutil.copy(source, ROOT / "workers" / str(worker) / target.partition(":")[2])
        case ["compute", "tpus", "tpu-vm", "ssh", name]:
            ssh(name, options)
        case _:
            fail(f"unknown command {words}", 2)


def ssh(name: str, options: dict[str, str]) -> None:
    """Runs the command as a login shell does there: in the worker's home, with the programs that it has."""
    if state("tpu") != "READY":
        fail(f"{name} is not ready")
    lost = {"follow": "dropped", "status": "silent"}
    if any(word in options["command"] and take(name) for word, name in lost.items()):
        fail("Connection reset by peer", 255)
    codes = []
    for worker in range(WORKERS) if options["worker"] == "all" else [int(options["worker"])]:
        home = ROOT / "workers" / str(worker)
        there = {
            "HOME": str(home),
            "PATH": f"{ROOT / 'far'}:/usr/bin:/bin",
            "STUBS": str(ROOT),
            "WORKER": str(worker),
            "POLL_SECONDS": "0.02",
        }
        codes.append(relay(["bash", "-c", options["command"]], home, there))
    # A TPU that went meanwhile took the connection with it.
    sys.exit(255 if state("tpu") != "READY" else next((code for code in codes if code), 0))


def relay(command: list[str], home: Path, there: dict[str, str]) -> int:
    """Runs it so that it neither hears of this end's interrupts nor keeps this end's output open."""
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=home, env=there, stdout=pipe, stderr=pipe, start_new_session=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        errors = threading.Thread(target=shutil.copyfileobj, args=(process.stderr, sys.stderr.buffer))
        errors.start()
        for line in process.stdout:
            sys.stdout.buffer.write(line)
            sys.stdout.buffer.flush()
        errors.join()
    return process.returncode


def take(name: str) -> bool:
    """Whether the file of this name promises another such event; counts it down."""
    path = ROOT / name
    left = int(path.read_text()) if path.exists() else 0
    if left:
        path.write_text(str(left - 1))
    return left > 0


def python(program: str, arguments: list[str]) -> None:
    match arguments:
        case ["-c", *_] if program != "uv-python" and (ROOT / "old-python").exists():
            sys.exit(1)
        case ["--version"]:
            print("Python 3.12.0")
        case ["-m", "venv", folder]:
            (Path(folder) / "bin").mkdir(parents=True)
            for name in ("python", "policy-split"):
                shutil.copy(ROOT / "stub", Path(folder) / "bin" / name)
        case ["-m", "uv", "python", "find", _]:
            print(ROOT / "far/uv-python")


def policy_split(arguments: list[str]) -> None:
    who = (
        arguments[arguments.index("--process-id") + 1] if "--process-id" in arguments else os.environ.get("WORKER", "0")
    )
    try:
        run(who)
    except KeyboardInterrupt:
        note("interrupted", [who])
        sys.exit(130)


def run(who: str) -> None:
    """What the plan says of this start of this process."""
    starts = ROOT / f"starts-{who}"
    start = int(starts.read_text()) if starts.exists() else 0
    starts.write_text(str(start + 1))
    plan = json.loads((ROOT / "plan.json").read_text()).get(who, [])
    step = plan[min(start, len(plan) - 1)] if plan else {}
    print(f"process {who}, start {start}", flush=True)
    time.sleep(60 if step.get("wait") else step.get("seconds", 0))
    for name in ("tpu", "queue", "unreachable"):
        if name in step:
            (ROOT / name).write_text(step[name])
    sys.exit(step.get("code", 0))


def main(program: str, arguments: list[str]) -> None:
    names = ("XLA_FLAGS", "XLA_CLIENT_MEM_FRACTION", "JAX_PLATFORMS")
    note(program, arguments, environment={name: os.environ[name] for name in names if name in os.environ})
    if program == "gcloud":
        gcloud(arguments)
    elif program == "policy-split":
        policy_split(arguments)
    elif program.endswith("python") or program.startswith("python"):
        python(program, arguments)
    elif program == "mountpoint":
        sys.exit(0 if Path("mounted").exists() else 1)
    elif program == "gcsfuse":
        Path("mounted").touch()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
