"""launch/gpu.sh with stubs of SLURM's commands."""

import os
import shlex
import shutil
import subprocess
import sys

import pytest

OVERLAP = "--xla_gpu_enable_latency_hiding_scheduler=true"
SBATCH = ["--job-name=policy-split", "--nodes=4", "--ntasks-per-node=1", "--exclusive", "--mem=0"]
SBATCH += ["--requeue", "--open-mode=append"]
SRUN = ["--nodes=4", "--ntasks=4", "--ntasks-per-node=1", "--cpu-bind=none", "--kill-on-bad-exit=1"]


def test_one_node_installs_and_runs_one_process(place):
    done = place.run("gpu.sh", "configs/tiny.yaml", "name=a b")
    assert done.returncode == 0
    installs = [call.arguments for call in place.calls("python")]
    assert installs[-1] == ["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--editable", ".[cuda]"]
    (trained,) = place.calls("policy-split")
    assert trained.arguments == ["train", "configs/tiny.yaml", "name=a b"]
    assert trained.environment == {"XLA_FLAGS": OVERLAP, "XLA_CLIENT_MEM_FRACTION": "0.92"}
    assert place.run("gpu.sh", "configs/tiny.yaml").returncode == 0
    assert [call.arguments for call in place.calls("python")] == installs


def test_the_exit_code_is_that_of_the_run(place):
    place.plan(p0=[{"code": 2}])
    assert place.run("gpu.sh", "configs/tiny.yaml", POLICY_SPLIT=str(place.stubs / "policy-split")).returncode == 2
    assert not place.calls("python3")


@pytest.mark.parametrize(
    ("given", "seen"),
    [
        (
            {"XLA_FLAGS": "--xla_dump_to=x"},
            {"XLA_FLAGS": f"--xla_dump_to=x {OVERLAP}", "XLA_CLIENT_MEM_FRACTION": "0.92"},
        ),
        (
            {"XLA_FLAGS": "--xla_gpu_enable_latency_hiding_scheduler=false", "XLA_CLIENT_MEM_FRACTION": "0.5"},
            {"XLA_FLAGS": "--xla_gpu_enable_latency_hiding_scheduler=false", "XLA_CLIENT_MEM_FRACTION": "0.5"},
        ),
        # JAX refuses to see both names.
        ({"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.5"}, {"XLA_FLAGS": OVERLAP}),
    ],
)
def test_what_the_user_has_set_wins(given, seen, place):
    policy_split = str(place.stubs / "policy-split")
    assert place.run("gpu.sh", "configs/tiny.yaml", POLICY_SPLIT=policy_split, **given).returncode == 0
    assert place.calls("policy-split")[0].environment == seen


def test_xla_knows_the_flag():
    """XLA ends a process that is given a flag it does not know."""
    code = "import jax; print(jax.numpy.ones(3).sum())"
    environment = {**os.environ, "XLA_FLAGS": OVERLAP, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "3.0\n"), done.stderr


def test_outside_an_allocation_a_job_is_submitted(place):
    options = ["--slurm", "4", "--slurm-args", "--partition=gpu --time=2-00:00:00"]
    assert place.run("gpu.sh", *options, "configs/tiny.yaml", "name=a b").returncode == 0
    (submitted,) = place.calls("sbatch")
    assert submitted.arguments == [
        *SBATCH,
        f"--chdir={place.project}",
        *("--partition=gpu", "--time=2-00:00:00"),
        *("launch/gpu.sh", "--slurm", "4", "configs/tiny.yaml", "name=a b"),
    ]
    assert not place.calls("srun", "policy-split")
    # What the job installs must be there before it starts.
    assert place.calls("python")[-1].arguments[-1] == ".[cuda]"


def test_within_an_allocation_srun_starts_a_process_on_each_node(place):
    options = ["--slurm", "4", "--slurm-args", "--gpus-per-node=8"]
    assert place.run("gpu.sh", *options, "configs/tiny.yaml", "name=a b", SLURM_JOB_ID="7").returncode == 0
    (started,) = place.calls("srun")
    assert started.arguments == [
        *(*SRUN, "--gpus-per-node=8"),
        *(".venv/bin/policy-split", "train", "configs/tiny.yaml", "name=a b"),
    ]
    assert started.environment == {"XLA_FLAGS": OVERLAP, "XLA_CLIENT_MEM_FRACTION": "0.92"}
    assert not place.calls("sbatch", "policy-split")


def test_the_copy_that_sbatch_runs_finds_the_project(place, tmp_path):
    script = tmp_path / "spool/slurm_script"
    script.parent.mkdir()
    shutil.copy(place.project / "launch/gpu.sh", script)
    done = subprocess.run(
        ["bash", str(script), "--slurm", "4", "configs/tiny.yaml"],
        cwd=place.project,
        env=place.environment | {"SLURM_JOB_ID": "7"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert place.calls("srun")[0].arguments == [*SRUN, ".venv/bin/policy-split", "train", "configs/tiny.yaml"]


def test_explicit_processes_are_passed_on(place):
    cluster = ["--coordinator", "10.0.0.2:1234", "--processes", "2", "--process-id", "1"]
    policy_split = str(place.stubs / "policy-split")
    assert place.run("gpu.sh", *cluster, "configs/tiny.yaml", "name=x", POLICY_SPLIT=policy_split).returncode == 0
    (trained,) = place.calls("policy-split")
    assert trained.arguments == ["train", *cluster, "configs/tiny.yaml", "name=x"]


@pytest.mark.parametrize(
    ("options", "environment", "expected"),
    [
        ([], {}, [".venv/bin/policy-split", "train"]),
        (["--slurm", "4"], {"SLURM_JOB_ID": "7"}, ["srun", *SRUN, ".venv/bin/policy-split", "train"]),
        (["--slurm", "4"], {}, ["sbatch", *SBATCH, "--chdir=PROJECT", "launch/gpu.sh", "--slurm", "4"]),
    ],
)
def test_a_dry_run_prints_and_runs_nothing(options, environment, expected, place):
    done = place.run("gpu.sh", *options, "--dry-run", "configs/tiny.yaml", "name=a b", **environment)
    assert done.returncode == 0
    assert place.calls() == []
    *settings, command = [shlex.split(line) for line in done.stdout.splitlines()]
    expected = [word.replace("PROJECT", str(place.project)) for word in expected]
    assert command == [*expected, "configs/tiny.yaml", "name=a b"]
    wanted = [["export", f"XLA_FLAGS={OVERLAP}"], ["export", "XLA_CLIENT_MEM_FRACTION=0.92"]]
    assert settings == ([] if command[0] == "sbatch" else wanted)
    assert not (place.project / ".venv").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "CONFIG is missing"),
        (["--slrum", "2", "configs/tiny.yaml"], "unknown option --slrum"),
        (["--slurm", "two", "configs/tiny.yaml"], "--slurm two"),
        (["--coordinator", "a:1", "--processes", "2", "configs/tiny.yaml"], "give all three"),
        (["--slurm", "2", "--coordinator", "a:1", "configs/tiny.yaml"], "leave out --coordinator"),
        (["--slurm"], "--slurm needs a value"),
    ],
)
def test_wrong_options_are_one_line_and_exit_code_2(arguments, message, place):
    done = place.run("gpu.sh", *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert place.calls() == []


def test_help_tells_the_ways_to_call_it(place):
    assert "--slurm NODES" in place.run("gpu.sh", "--help").stdout
