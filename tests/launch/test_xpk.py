"""The JobSet that launch/xpk.sh applies, as the real xpk writes it: no cloud is needed."""

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
CLUSTER = "--project=p --project-number=1 --zone=us-east5-a --cluster=c --image=eu.gcr.io/p/maxconv"
CONVERT = ["model_name=llama3.1-8b-Instruct", "base_output_directory=gs://b/a b"]


def job_set(tmp_path: Path, *options: str) -> dict[str, Any]:
    """The manifest that the script leaves; it holds no token."""
    manifest = tmp_path / "manifest.yaml"
    command = [ROOT / "launch/xpk.sh", *CLUSTER.split(), *options, f"--manifest={manifest}"]
    environ = {**os.environ, "HF_TOKEN": "hf_secret", "HOME": str(tmp_path)}
    subprocess.run(
        [*command, "--dry-run", "--", *CONVERT], env=environ, check=True, capture_output=True
    )
    assert "hf_secret" not in manifest.read_text()
    return yaml.safe_load(manifest.read_text())


@pytest.mark.parametrize(
    ("tpu_type", "slices", "hosts", "topology"),
    [
        ("v5p-64", 2, 8, "2x4x4"),
        ("v5litepod-16", 1, 4, "4x4"),
        ("v6e-256", 4, 64, "16x16"),
    ],
)
def test_slices(tmp_path: Path, tpu_type: str, slices: int, hosts: int, topology: str) -> None:
    options = (f"--tpu-type={tpu_type}", f"--num-slices={slices}", "--secret=hf")
    manifest = job_set(tmp_path, *options)
    assert manifest["metadata"]["name"].startswith("maxconv-llama3-1-8b-instruct-")
    assert len(manifest["metadata"]["name"]) < 40
    assert manifest["spec"]["failurePolicy"]["maxRestarts"] == 3
    (job,) = manifest["spec"]["replicatedJobs"]
    assert job["replicas"] == slices
    assert job["template"]["spec"]["parallelism"] == hosts
    assert job["template"]["spec"]["completions"] == hosts
    pod = job["template"]["spec"]["template"]["spec"]
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == topology
    (container,) = pod["containers"]
    assert container["image"] == "eu.gcr.io/p/maxconv"
    assert container["resources"]["limits"] == {"google.com/tpu": 4}
    assert container["env"] == [
        {"name": "HF_TOKEN", "valueFrom": {"secretKeyRef": {"name": "hf", "key": "HF_TOKEN"}}}
    ]
    (line,) = [line for line in container["command"][2].splitlines() if "maxconv convert" in line]
    assert line.strip() == (
        "(maxconv convert model_name=llama3.1-8b-Instruct "
        "base_output_directory=gs://b/a\\ b --resume) & PID=$!;"
    )


def test_a_pool_of_cpu_nodes(tmp_path: Path) -> None:
    options = ("--device-type=n2-standard-32-2", "--num-nodes=2", "--secret=hf")
    (job,) = job_set(tmp_path, *options)["spec"]["replicatedJobs"]
    assert job["template"]["spec"]["completions"] == 2
    (container,) = job["template"]["spec"]["template"]["spec"]["containers"]
    names = {entry["name"] for entry in container["env"]}
    assert {"HF_TOKEN", "JAX_COORDINATOR_ADDRESS", "JAX_PROCESS_COUNT", "JOB_INDEX"} <= names
    assert "--resume hardware=cpu) &" in container["command"][2]


def test_without_a_secret(tmp_path: Path) -> None:
    (job,) = job_set(tmp_path, "--tpu-type=v5p-8")["spec"]["replicatedJobs"]
    (container,) = job["template"]["spec"]["template"]["spec"]["containers"]
    assert container["env"] is None
