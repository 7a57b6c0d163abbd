"""launch/tpu.sh against a small cloud of stub programs, with launch/tpu_worker.sh on its workers."""

import os
import re
import shlex
import shutil
import signal
import time

import pytest

COMMON = ["--zone=us-east5-b", "--quiet"]
TPU = ["--name", "lab", "--zone", "us-east5-b"]
RUN = [*TPU, "--type", "v5litepod-16"]
SSH = ["compute", "tpus", "tpu-vm", "ssh", "lab"]
ALIVE = "--ssh-flag=-oServerAliveInterval=30"
WORKER = "bash policy-split/launch/tpu_worker.sh"
UNPACK = "mkdir -p policy-split && cd policy-split && rm -rf policy_split_jax && tar -xzf ../policy-split.tgz && cd"
STATUS = f"if [ -f policy-split/launch/tpu_worker.sh ]; then {WORKER} status; else echo idle; fi"
DESCRIBE = ["compute", "tpus", "tpu-vm", "describe", "lab", "--format=value(state)", *COMMON]
DESCRIBE_QUEUE = ["compute", "tpus", "queued-resources", "describe", "lab", "--format=value(state.state)", *COMMON]
CREATE = [
    *("compute", "tpus", "tpu-vm", "create", "lab", "--accelerator-type=v5litepod-16"),
    *("--version=v2-alpha-tpuv5-lite", *COMMON),
]
DELETE = ["compute", "tpus", "tpu-vm", "delete", "lab", *COMMON]
COPY = ["compute", "tpus", "tpu-vm", "scp", "ARCHIVE", "lab:policy-split.tgz", "--worker=all", *COMMON]


def ssh(worker, command):
    return [*SSH, f"--worker={worker}", f"--command={command}", ALIVE, *COMMON]


def train(*arguments):
    """What is done on a TPU that is ready."""
    return [
        COPY,
        ssh("all", f"{UNPACK} && {WORKER} install tpu"),
        ssh("all", f"{WORKER} start train {' '.join(arguments)}"),
        ssh("0", f"{WORKER} follow +1"),
        ssh("all", f"{WORKER} result 120"),
    ]


def without_archive(arguments):
    return ["ARCHIVE" if argument.endswith("/policy-split.tgz") else argument for argument in arguments]


def gcloud(place):
    """The commands so far."""
    return [without_archive(call.arguments) for call in place.calls("gcloud")]


def verbs(place):
    """The commands so far, each as a word or two, without the looks at the TPU's state."""
    found = []
    for call in place.calls("gcloud"):
        verb = call.arguments[3]
        if verb == "ssh":
            command = next(argument for argument in call.arguments if argument.startswith("--command="))
            verb += " " + re.search(r"tpu_worker\.sh (\w+)", command)[1]
        if verb != "describe":
            found.append(verb)
    return found


AGAIN = ["scp", "ssh install", "ssh start", "ssh follow", "ssh result"]


def wait_until(condition):
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_run_creates_copies_installs_and_trains_in_this_order(place):
    done = place.run("tpu.sh", *RUN, "configs/tiny.yaml", "output=/nfs/runs")
    assert (done.returncode, done.stdout) == (
        0,
        "Installing into .venv with Python 3.12.0 ...\n" * 2 + "process 0, start 0\n",
    )
    assert gcloud(place) == [
        DESCRIBE,
        DESCRIBE_QUEUE,
        CREATE,
        DESCRIBE,
        *train("configs/tiny.yaml", "output=/nfs/runs"),
    ]
    trained = place.calls("policy-split")
    assert sorted(call.worker for call in trained) == ["0", "1"]
    assert {tuple(call.arguments) for call in trained} == {("train", "configs/tiny.yaml", "output=/nfs/runs")}
    assert ["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--editable", ".[tpu]"] in [
        call.arguments for call in place.calls("python") if call.worker == "1"
    ]
    assert "costs money" in done.stderr


def test_the_workers_get_the_code_and_nothing_else(place):
    (place.stubs / "tpu").write_text("READY")
    for worker in "01":
        module = place.stubs / "workers" / worker / "policy-split/policy_split_jax/removed_since.py"
        module.parent.mkdir(parents=True)
        module.write_text("")
    assert place.run("tpu.sh", *RUN, "configs/tiny.yaml").returncode == 0
    for worker in "01":
        there = place.stubs / "workers" / worker / "policy-split"
        assert {path.name for path in there.iterdir()} == {
            *("launch", "pyproject.toml", "configs", "policy_split_jax"),
            *(".venv", ".launch"),
        }
        assert [path.name for path in (there / "policy_split_jax").iterdir()] == ["cli.py"]


def test_a_tpu_that_is_ready_is_taken_and_installed_once(place):
    command = ["tpu.sh", *RUN, "--project", "physics", "configs/tiny.yaml", "output=/nfs/runs"]
    assert place.run(*command).returncode == 0
    (place.stubs / "calls.jsonl").unlink()
    assert place.run(*command).returncode == 0
    assert verbs(place) == ["ssh status", *AGAIN]
    assert all("--project=physics" in call.arguments for call in place.calls("gcloud"))
    assert not place.calls("python")


@pytest.mark.parametrize(("option", "more"), [("--spot", ["--spot"]), ("--queued", [])])
def test_a_queued_tpu_is_waited_for(option, more, place):
    done = place.run("tpu.sh", *RUN, option, "configs/tiny.yaml", "output=/nfs/runs")
    assert done.returncode == 0
    assert "lab is WAITING_FOR_RESOURCES; waiting" in done.stderr
    created = [arguments for arguments in gcloud(place) if arguments[3] == "create"]
    assert created == [
        [
            *("compute", "tpus", "queued-resources", "create", "lab", "--node-id=lab"),
            *("--accelerator-type=v5litepod-16", "--runtime-version=v2-alpha-tpuv5-lite", *more, *COMMON),
        ]
    ]
    assert verbs(place) == ["create", *AGAIN]


@pytest.mark.parametrize("code", [1, 143])
def test_a_preempted_tpu_is_created_anew_and_the_run_goes_on(place, code):
    place.plan(p0=[{"code": code, "tpu": "PREEMPTED"}, {}], p1=[{"wait": True}, {}])
    done = place.run("tpu.sh", *RUN, "configs/tiny.yaml", "output=/nfs/runs")
    assert done.returncode == 0
    assert "lab is PREEMPTED; deleting it" in done.stderr
    assert done.stdout.endswith("process 0, start 1\n")
    # The preemption may come before all workers have started.
    seen = [verb for verb in verbs(place) if verb not in ("ssh follow", "ssh result")]
    assert seen == ["create", *AGAIN[:3], "delete", "create", *AGAIN[:3]]
    assert DELETE in gcloud(place)
    mine = [call.arguments for call in place.calls("policy-split") if call.worker == "0"]
    assert mine == [["train", "configs/tiny.yaml", "output=/nfs/runs"]] * 2


def test_a_preempted_spot_tpu_leaves_the_queue_before_it_enters_it_again(place):
    place.plan(p0=[{"code": 1, "tpu": "PREEMPTED", "queue": "SUSPENDED"}, {}])
    assert place.run("tpu.sh", *RUN, "--spot", "configs/tiny.yaml", "output=/nfs/runs").returncode == 0
    changes = [arguments[2:4] for arguments in gcloud(place) if arguments[3] in ("create", "delete")]
    assert changes == [["queued-resources", verb] for verb in ("create", "delete", "create")]
    assert ["compute", "tpus", "queued-resources", "delete", "lab", "--force", *COMMON] in gcloud(place)


@pytest.mark.parametrize("plan", [{"p0": [{"code": 2}]}, {"p0": [{"code": 134}], "p1": [{"code": 2}]}])
def test_bad_input_is_not_tried_again(plan, place):
    place.plan(**plan)
    done = place.run("tpu.sh", *RUN, "configs/tiny.yaml", "output=/nfs/runs")
    assert done.returncode == 2
    assert verbs(place) == ["create", *AGAIN]


def test_a_crash_is_tried_again_on_the_same_tpu_but_not_for_ever(place):
    place.plan(p0=[{"code": 3}], p1=[{"code": 134}])
    done = place.run("tpu.sh", *RUN, "configs/tiny.yaml", "output=/nfs/runs")
    assert done.returncode == 3
    assert "failed 5 times in a row" in done.stderr
    assert verbs(place) == ["create", *AGAIN * 5]


def test_a_worker_that_waits_for_a_crashed_one_is_stopped(place):
    place.plan(p0=[{"code": 1}, {}], p1=[{"wait": True}, {}])
    done = place.run("tpu.sh", *RUN, "configs/tiny.yaml", "output=/nfs/runs")
    assert done.returncode == 0
    assert verbs(place) == ["create", *AGAIN * 2]
    assert len(place.calls("interrupted")) == 1


def test_retries_limit_the_new_starts(place):
    place.plan(p0=[{"code": 1, "tpu": "PREEMPTED"}])
    done = place.run("tpu.sh", *RUN, "--retries", "1", "configs/tiny.yaml", "output=/nfs/runs")
    assert done.returncode == 1
    assert "started anew 1 times" in done.stderr
    assert verbs(place).count("create") == 2


def test_a_lost_connection_is_taken_up_again(place):
    (place.stubs / "dropped").write_text("2")
    place.plan(p0=[{"seconds": 1}])
    done = place.run("tpu.sh", *RUN, "configs/tiny.yaml", "output=/nfs/runs")
    assert done.returncode == 0
    assert verbs(place) == ["create", *AGAIN[:3], *["ssh follow"] * 3, "ssh result"]
    assert done.stdout.endswith("process 0, start 0\n")


def test_a_tpu_that_can_no_longer_be_reached_is_replaced(place):
    place.plan(p0=[{"code": 1, "unreachable": "3"}, {}])
    done = place.run("tpu.sh", *RUN, "configs/tiny.yaml", "output=/nfs/runs")
    assert done.returncode == 0
    assert verbs(place) == ["create", *AGAIN, *["scp"] * 3, "delete", "create", *AGAIN]


def test_a_tpu_that_was_never_reached_is_kept(place):
    (place.stubs / "unreachable").write_text("9")
    done = place.run("tpu.sh", *RUN, "configs/tiny.yaml", "output=/nfs/runs")
    assert done.returncode == 1
    assert "ssh-add" in done.stderr
    assert verbs(place) == ["create", "scp"]


def test_a_new_start_has_the_code_of_the_first(place):
    place.plan(p0=[{"code": 1, "tpu": "PREEMPTED"}, {}])
    module = place.project / "policy_split_jax/cli.py"
    module.write_text("first")
    process = place.start("tpu.sh", *RUN, "configs/tiny.yaml", "output=/nfs/runs")
    wait_until(lambda: place.calls("policy-split"))
    module.write_text("edited")
    process.communicate(timeout=30)
    assert process.returncode == 0
    assert verbs(place).count("create") == 2
    assert (place.stubs / "workers/0/policy-split/policy_split_jax/cli.py").read_text() == "first"


def test_a_zone_without_capacity_is_not_asked_for_ever(place):
    (place.stubs / "full").touch()
    done = place.run("tpu.sh", *RUN, "configs/tiny.yaml", "output=/nfs/runs")
    assert done.returncode == 1
    assert "no more capacity" in done.stderr
    assert "--queued" in done.stderr
    assert verbs(place) == ["create"]


def test_paths_and_settings_arrive_as_they_are(place):
    config = "configs/my run.yaml"
    (place.project / config).write_text("")
    settings = ["name=a  b", 'prompt.high_entropy=It\'s "here": $HOME `x` \\ *;', "data.train=", "output=/nfs/my runs"]
    assert place.run("tpu.sh", *RUN, config, *settings).returncode == 0
    trained = place.calls("policy-split")
    assert len(trained) == 2
    assert all(call.arguments == ["train", config, *settings] for call in trained)


def test_a_dry_run_prints_each_command_and_runs_none(place):
    done = place.run("tpu.sh", *RUN, "--dry-run", "configs/tiny.yaml", "output=/nfs/my runs")
    assert done.returncode == 0
    assert place.calls() == []
    printed = [shlex.split(line) for line in done.stdout.splitlines()]
    assert [words[0] for words in printed].count("tar") == 1
    assert [without_archive(words[1:]) for words in printed if words[0] == "gcloud"] == [
        DESCRIBE,
        DESCRIBE_QUEUE,
        CREATE,
        *train("configs/tiny.yaml", "output=/nfs/my\\ runs"),
    ]


@pytest.mark.parametrize(
    ("kind", "version"),
    [
        ("v4-32", "tpu-ubuntu2204-base"),
        ("v5litepod-8", "v2-alpha-tpuv5-lite"),
        ("v5p-64", "v2-alpha-tpuv5"),
        ("v6e-16", "v2-alpha-tpuv6e"),
    ],
)
def test_the_runtime_version_follows_from_the_type(kind, version, place):
    for options, expected in (([], version), (["--version", "mine"], "mine")):
        done = place.run("tpu.sh", *TPU, "--type", kind, *options, "--dry-run", "configs/tiny.yaml")
        assert f"--accelerator-type={kind} --version={expected} " in done.stdout


def test_a_bucket_is_mounted_on_every_worker_and_holds_the_runs(place):
    done = place.run("tpu.sh", *RUN, "--bucket", "gs://big/lab one/", "configs/tiny.yaml", "name=x")
    assert done.returncode == 0
    mounted = place.calls("gcsfuse")
    assert [call.worker for call in mounted] == ["0", "1"]
    assert all(
        call.arguments
        == [
            *("--implicit-dirs", "--metadata-cache-ttl-secs=0", "--metadata-cache-negative-ttl-secs=0"),
            *("--only-dir", "lab one", "big", "/mnt/bucket"),
        ]
        for call in mounted
    )
    assert place.calls("policy-split")[0].arguments == [
        "train",
        "configs/tiny.yaml",
        "name=x",
        "output=/mnt/bucket/runs",
    ]


def test_a_bucket_is_mounted_anew_for_each_run(place):
    for bucket in ("one", "two"):
        assert place.run("tpu.sh", *RUN, "--bucket", f"gs://{bucket}", "configs/tiny.yaml").returncode == 0
    first = [call for call in place.calls("fusermount", "gcsfuse") if call.worker == "0"]
    assert [(call.program, call.arguments[-2:]) for call in first] == [
        ("gcsfuse", ["one", "/mnt/bucket"]),
        ("fusermount", ["-uz", "/mnt/bucket"]),
        ("gcsfuse", ["two", "/mnt/bucket"]),
    ]


def test_a_bucket_without_a_hierarchical_namespace_is_refused(place):
    done = place.run("tpu.sh", *RUN, "--bucket", "gs://flat", "configs/tiny.yaml")
    assert done.returncode == 2
    assert "hierarchical namespace" in done.stderr
    assert len(place.calls()) == 1


def test_a_worker_with_an_old_python_gets_another(place):
    (place.stubs / "old-python").touch()
    assert place.run("tpu.sh", *RUN, "configs/tiny.yaml", EXTRAS="tpu,wandb").returncode == 0
    first = [call for call in place.calls() if call.worker == "0"]
    assert ["-m", "uv", "python", "install", "--quiet", "3.12"] in [call.arguments for call in first]
    assert ["-m", "venv", ".venv"] in [call.arguments for call in first if call.program == "uv-python"]
    assert any(call.arguments[-1] == ".[tpu,wandb]" for call in first if call.program == "python")


def test_ctrl_c_ends_the_watching_and_stop_ends_the_run(place):
    place.plan(p0=[{"wait": True}], p1=[{"wait": True}])
    command = ["tpu.sh", *RUN, "configs/tiny.yaml", "output=/nfs/my runs"]

    def watch():
        process = place.start(*command)
        assert process.stdout is not None
        lines = iter(process.stdout.readline, "")
        seen = []
        while "process 0, start 0\n" not in seen:
            seen.append(next(lines))
        return process, "".join(seen)

    watching, _ = watch()
    wait_until(lambda: len(place.calls("policy-split")) == 2)
    os.killpg(watching.pid, signal.SIGINT)
    assert "the run goes on" in watching.communicate(timeout=30)[0]
    assert watching.returncode == 130
    status = place.run("tpu.sh", *TPU, "--status")
    assert status.stdout.startswith("lab: READY\nrunning ")
    assert status.stdout.count(" train configs/tiny.yaml output=/nfs/my\\ runs") == 2

    other = place.run("tpu.sh", *RUN, "configs/tiny.yaml", "output=/nfs/other")
    assert other.returncode == 2
    assert "busy with another run (policy-split train configs/tiny.yaml output=/nfs/my\\ runs" in other.stderr

    # A connection that fails is no reason to start it anew.
    (place.stubs / "silent").write_text("2")
    watching, seen = watch()
    assert "goes on there already" in seen
    assert place.run("tpu.sh", *TPU, "--stop").returncode == 0
    watching.communicate(timeout=30)
    assert watching.returncode == 130
    assert sorted(call.arguments[0] for call in place.calls("interrupted")) == ["0", "1"]
    assert verbs(place).count("ssh start") == 1
    assert place.run("tpu.sh", *TPU, "--status").stdout == "lab: READY\nended with 130\nended with 130\n"
    logs = place.run("tpu.sh", *TPU, "--logs")
    assert (logs.returncode, logs.stdout) == (0, "process 0, start 0\n")


def test_a_start_on_a_worker_ends_what_ran_there_before(place):
    program = place.project / ".venv/bin/policy-split"
    program.parent.mkdir(parents=True)
    shutil.copy(place.stubs / "stub", program)
    place.plan(p0=[{"wait": True}, {"code": 7}])
    assert place.run("tpu_worker.sh", "start", "train", "a").returncode == 0
    wait_until((place.stubs / "starts-0").exists)
    assert place.run("tpu_worker.sh", "start", "train", "b").returncode == 0
    assert place.run("tpu_worker.sh", "result", "100").stdout == "ended with 7\n"
    assert [call.program for call in place.calls()] == ["policy-split", "interrupted", "policy-split"]


def test_delete_deletes_what_there_is(place):
    (place.stubs / "tpu").write_text("READY")
    assert place.run("tpu.sh", *TPU, "--delete").returncode == 0
    assert gcloud(place) == [DESCRIBE_QUEUE, DELETE]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--name and --zone"),
        (["--nmae", "x"], "unknown option --nmae"),
        ([*TPU, "--type"], "--type needs a value"),
        ([*TPU, "configs/tiny.yaml"], "--type says what TPU to create"),
        (RUN, "CONFIG is missing"),
        ([*RUN, "configs/tiny.yaml", "--spot"], "--spot belongs before CONFIG"),
        ([*RUN, "nowhere.yaml"], "nowhere.yaml: no such file"),
        ([*RUN, "--retries", "many", "configs/tiny.yaml"], "--retries many"),
        ([*TPU, "--type", "v9-8", "configs/tiny.yaml"], "give it as --version"),
    ],
)
def test_wrong_options_are_one_line_and_exit_code_2(arguments, message, place):
    done = place.run("tpu.sh", *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert place.calls() == []


def test_help_needs_no_gcloud(place):
    programs = place.stubs / "few"
    programs.mkdir()
    for name in ("dirname", "cat"):
        (programs / name).symlink_to(shutil.which(name))
    assert "--spot" in place.run("tpu.sh", "--help", PATH=str(programs)).stdout
    refused = place.run("tpu.sh", *RUN, "configs/tiny.yaml", PATH=str(programs))
    assert refused.returncode == 2
    assert "gcloud is needed" in refused.stderr
