"""Tiny models through maxconv, then MaxText as the printed command has it: transformers' logits.

Runs in the environment that `environment.sh` makes, with maxconv installed in it. The reference is
stored by `reference_tiny.py`. Both compute in float32. Layers are scanned; MAXCONV_ALL_LOGITS=1
runs every model with its layers one by one, too.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import load_logits  # noqa: E402
import tiny  # noqa: E402
import told  # noqa: E402
from test_smollm2 import run  # noqa: E402

HALVES = ("ici_fsdp_parallelism=2", "ici_data_parallelism=4")  # of an embedding axis of 42
DENSE_EXPERTS = ("sparse_matmul=false", "megablox=false")  # the others are kernels for TPUs


@dataclass(frozen=True)
class Case:
    """The mesh, what only a run on CPUs must be told, and how much its logits may differ.

    Attributes:
        words: for MaxText alone; what the model needs is in the command that maxconv prints.
        tolerance: relative to the largest logit.
        table: the same, of a model whose head is the embedding table. MaxText rounds that to
            bfloat16 for the head; `tolerance` holds where the reference does so, too.
        unscanned: is run without being asked for, as well.
        named: is converted as the model of that name, which has an order of its own.
    """

    words: Sequence[str] = HALVES
    tolerance: float = 1e-5
    table: float | None = None
    unscanned: bool = False
    named: bool = False


CASES: dict[str, Case] = {
    "llama3.1-8b": Case(),
    "llama2-7b": Case(named=True),
    "llama2-7b,linear": Case(),
    "llama4-17b-16e": Case((*HALVES, *DENSE_EXPERTS)),
    "llama4-17b-128e+vision": Case((*HALVES, *DENSE_EXPERTS)),
    "gemma-2b": Case(table=2e-3),
    "gemma2-2b": Case(table=2e-3),
    "gemma3-4b+64": Case((), table=2e-3, unscanned=True),
    "qwen3-30b-a3b": Case((*HALVES, *DENSE_EXPERTS)),
    # In its recurrence float32 gives no more: transformers' own logits in float64 are as far away.
    "qwen3-next-80b-a3b": Case((*HALVES, *DENSE_EXPERTS), tolerance=4e-5),
    "gpt-oss-20b": Case((*HALVES, *DENSE_EXPERTS)),
    "gpt-oss-20b+mxfp4": Case((*HALVES, *DENSE_EXPERTS)),
    "mixtral-8x7b": Case((*HALVES, *DENSE_EXPERTS)),
    "deepseek2-236b": Case((*HALVES, *DENSE_EXPERTS)),
    "deepseek3-671b": Case((*HALVES, *DENSE_EXPERTS)),
    "kimi-k2-1t": Case((*HALVES, *DENSE_EXPERTS)),
    "olmo3-7b": Case(),
    "llama3.1-8b,plain": Case(),
    "llama3.1-8b,factor": Case(),
    "mistral-7b,theta": Case(("ici_fsdp_parallelism=8",)),
}
RUNS = [
    pytest.param(name, scan, id=f"{name}-{'scan' if scan else 'unscan'}")
    for name, case in CASES.items()
    for scan in (True, False)
    if scan or case.unscanned or os.environ.get("MAXCONV_ALL_LOGITS")
]


def converted(checkpoint: Path, out: Path, scan: bool, *words: str) -> list[str]:
    """Converts a checkpoint, `words` may tell its model; returns the training command's words."""
    printed = run(
        *("-m", "maxconv.to_maxtext", f"scan_layers={scan}", f"base_output_directory={out}"),
        *("hardware=cpu", "skip_jax_distributed_system=True", "--save_dtype=float32"),
        *(f"--hf_model_path={checkpoint}", f"--simulated_cpu_devices_count={load_logits.DEVICES}"),
        *words,
    )
    (line,) = (line for line in printed.splitlines() if line.startswith("to train"))
    return shlex.split(line.partition("maxtext.trainers.pre_train.train ")[2])


@pytest.mark.parametrize(("name", "scan"), RUNS)
def test_maxtext_says_what_transformers_says(name: str, scan: bool, tmp_path: Path) -> None:
    case = CASES[name]
    stored = HERE.parent / "data" / "logits" / f"{name}.npz"
    reference = np.load(stored)
    checkpoint = told.write(name, tmp_path / "hf", str(reference["dtype"]))
    words = tiny.maxtext_words(name.partition(",")[0], scan)[:-1] if case.named else ()
    command = converted(checkpoint, tmp_path / "out", scan, *words)
    out = tmp_path / "logits.npy"
    words = [word for word in command if not word.startswith("load_parameters_path=")]
    run(
        *(HERE / "load_logits.py", tmp_path / "out/0/items", *words, *case.words),
        *("--tokens", stored, "--out", out),
        *("--loader", "pretrain", "--scan" if scan else "--no-scan"),
    )
    made = np.load(out)[..., : reference["logits"].shape[-1]]  # without rows that MaxText adds
    allowed = {"logits": case.tolerance}
    if case.table is not None:
        allowed = {"logits": case.table, "rounded": case.tolerance}
    for kind, tolerance in allowed.items():
        difference = abs(made - reference[kind]).max() / abs(reference[kind]).max()
        print(f"{name}: {kind} differ by {difference:.1e} of the largest")
        assert difference <= tolerance, kind


FROM_HUGGING_FACE = """
import sys
from maxconv import maxtext
maxtext.install()
from absl import app
from maxtext.trainers.pre_train import train
app.run(train.main, argv=["train", *sys.argv[1:]])
"""


def test_the_printed_command_trains(tmp_path: Path) -> None:
    """The real trainer takes it; that its arguments give the right logits is tested above.

    From the checkpoint of Hugging Face itself it trains the same, without one on disk.
    """
    name = "gemma3-4b+64"
    model = told.write(name, tmp_path / "hf", "float32")
    command = converted(model, tmp_path / "out", True)
    here = [word for word in command if not word.startswith("load_parameters_path=")]
    here += [f"load_parameters_path={model}", "source_checkpoint_layout=safetensors_dynamic"]
    programs = {
        "converted": ("-m", "maxtext.trainers.pre_train.train", *command),
        "loaded": ("-c", FROM_HUGGING_FACE, *here),
    }
    losses = {}
    for kind, program in programs.items():
        metrics = tmp_path / f"{kind}.jsonl"
        run(
            *program,
            *("run_name=tiny", f"base_output_directory={tmp_path / kind}", "steps=2"),
            *("dataset_type=synthetic", "per_device_batch_size=1", "max_target_length=32"),
            *("hardware=cpu", "skip_jax_distributed_system=True", "attention=dot_product"),
            *("enable_checkpointing=false", "jax_cache_dir=", "opt_type=sgd"),
            f"metrics_file={metrics}",
            env={
                "JAX_DEFAULT_PRNG_IMPL": "unsafe_rbg",
                "XLA_FLAGS": load_logits.XLA_FLAGS,
                "JAX_PLATFORMS": "cpu",
                "HF_HUB_OFFLINE": "1",
            },
        )
        lines = map(json.loads, metrics.read_text().splitlines())
        losses[kind] = [line["learning/loss"] for line in lines]
    assert len(losses["converted"]) == 2
    assert losses["loaded"] == losses["converted"]
