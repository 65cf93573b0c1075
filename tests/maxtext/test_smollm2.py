"""A real model through maxconv, then through both of MaxText's loaders.

Runs in the environment that `environment.sh` makes, with maxconv installed in it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import load_logits  # noqa: E402
import smollm2  # noqa: E402

REFERENCE = HERE.parent / "data" / "smollm2_reference.npz"


def run(*command: str | Path, env: Mapping[str, str] | None = None) -> str:
    """Runs a Python program in a process of its own: each needs another set of devices."""
    result = subprocess.run(
        [sys.executable, *map(str, command)],
        capture_output=True,
        text=True,
        env={**os.environ, **(env or {})},
    )
    output = result.stdout[-2000:] + result.stderr[-4000:]
    assert not result.returncode, f"{command[:3]} failed:\n{output}"
    return result.stdout


@pytest.fixture(scope="module")
def hf_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return smollm2.write(tmp_path_factory.mktemp("hf"))


@pytest.fixture(scope="module", params=[True, False], ids=["scan", "unscan"])
def converted(
    request: pytest.FixtureRequest, hf_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, bool]:
    """The item directory of a checkpoint that maxconv wrote, and whether its layers are stacked."""
    out = tmp_path_factory.mktemp("maxtext")
    run(
        *("-m", "maxconv.to_maxtext", *smollm2.MAXTEXT_WORDS),
        *("hardware=cpu", "skip_jax_distributed_system=True"),
        f"scan_layers={str(request.param).lower()}",
        f"base_output_directory={out}",
        f"--hf_model_path={hf_checkpoint}",
        f"--simulated_cpu_devices_count={load_logits.DEVICES}",
        "--save_dtype=bfloat16",
    )
    return out / "0" / "items", request.param


@pytest.mark.parametrize("loader", load_logits.LOADERS)
def test_maxtext_says_what_transformers_says(
    converted: tuple[Path, bool], loader: str, tmp_path: Path
) -> None:
    items, scan = converted
    out = tmp_path / "logits.npy"
    layers = "--scan" if scan else "--no-scan"
    run(
        *(HERE / "load_logits.py", items, *smollm2.MAXTEXT_WORDS, *smollm2.MAXTEXT_RUN_WORDS),
        *("--tokens", REFERENCE, "--loader", loader, layers, "--out", out),
    )

    made, reference = np.load(out), np.load(REFERENCE)
    columns = made[..., :: int(reference["column_stride"])]
    highest = made.max(axis=-1)
    logsumexp = highest + np.log(np.exp(made - highest[..., None]).sum(axis=-1))
    for row, start in enumerate(reference["prompt_lengths"]):
        # In the first prompt activations reach 4,000, where a step of float32 is 2.4e-4: relative
        # to the logits, which go up to 30, it is held to as much.
        tolerance = 1e-5 * abs(reference["logits"][row]).max() if row == 0 else 1e-4
        end = start + reference["steps"]
        for name, values in ("logits", columns), ("logsumexp", logsumexp):
            difference = abs(values[row, :end] - reference[name][row, :end]).max()
            assert difference <= tolerance, f"{name} of sequence {row} differ by {difference}"
        # Greedy decoding gives the stored text if and only if each stored token is the likeliest
        # after those before it: no decoding loop is needed to see that.
        chosen = made[row, start - 1 : end - 1].argmax(axis=-1)
        assert chosen.tolist() == reference["tokens"][row, start:end].tolist()
