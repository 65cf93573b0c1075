"""Several processes under jax.distributed write what one process writes."""

import json
import os
import re
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import tensorstore
import tiny
from jobs import MESHES, job_words

from maxconv import cli


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@contextmanager
def processes(n, words, log_directory, program=None, environ=()):
    """`n` processes of one conversion; killed if they are still there at the end."""
    command = ["-c", program] if program else ["-m", "maxconv.to_maxtext"]
    address = f"127.0.0.1:{free_port()}"
    log_directory.mkdir(parents=True, exist_ok=True)
    running = []
    for i in range(n):
        flags = [f"--coordinator_address={address}", f"--num_processes={n}", f"--process_id={i}"]
        with (log_directory / f"{i}.log").open("w") as log:
            running.append(
                subprocess.Popen(
                    [sys.executable, *command, *words, *flags],
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env={**os.environ, "JAX_PLATFORMS": "cpu", **dict(environ)},
                )
            )
    try:
        yield running
    finally:
        for process in running:
            process.kill()
            process.wait()


def said(log_directory):
    """What each process printed, apart from gloo's greetings and whom it waited for."""
    logs = (path.read_text().splitlines() for path in sorted(log_directory.iterdir()))
    # Gloo's threads write into each other's lines.
    greetings = re.compile(r"^note: process|\[Gloo\]|connected peer ranks|^\s*$")
    return ["\n".join(line for line in log if not greetings.search(line)) for log in logs]


def stored(out: Path):
    """Every array of a checkpoint: the keys and values of its OCDBT store."""
    base = {"driver": "file", "path": f"{out / '0' / 'items'}/"}
    store = tensorstore.KvStore.open({"driver": "ocdbt", "base": base}).result()
    return {key: store.read(key).result().value for key in store.list().result()}


@pytest.mark.parametrize(
    ("n", "case", "mesh", "scan"),
    [
        (2, "qwen3-8b", "fsdp4_tp2", True),
        pytest.param(4, "mistral-7b", "fsdp8", False, marks=pytest.mark.slow),
        pytest.param(2, "gemma3-4b+vision", "fsdp8", True, marks=pytest.mark.slow),
    ],
)
def test_processes_write_what_one_writes(n, case, mesh, scan, tmp_path):
    model = tiny.write(case, tmp_path / "hf")
    words = tiny.maxtext_words(case, scan)
    alone, together = tmp_path / "alone", tmp_path / "together"
    assert cli.main(["convert", *job_words(alone, model, words, mesh)]) == 0
    shared = [
        *words,
        *MESHES[mesh],
        "hardware=cpu",
        f"--hf_model_path={model}",
        f"base_output_directory={together / 'out'}",
        "--verify=full",
    ]
    with processes(n, shared, tmp_path / "logs") as running:
        codes = [process.wait(timeout=240) for process in running]
    logs = said(tmp_path / "logs")
    assert codes == [0] * n, "\n".join(logs)
    assert "verified" in logs[0] and not logs[1].strip()  # one speaks for all
    one, several = stored(alone / "out"), stored(together / "out")
    assert one.keys() == several.keys()
    assert [key for key in one if one[key] != several[key]] == []
    metadata = [(d / "out/0/items/_METADATA").read_text() for d in (alone, together)]
    assert json.loads(metadata[0]) == json.loads(metadata[1])


def test_all_processes_stop_with_the_words_of_the_one_that_cannot_go_on(tmp_path):
    words = [*MESHES["fsdp8"], "hardware=cpu", f"--hf_model_path={tmp_path / 'none'}"]
    started = time.monotonic()
    with processes(2, [*words, f"base_output_directory={tmp_path}/out"], tmp_path / "logs") as ps:
        codes = [process.wait(timeout=60) for process in ps]
    logs = said(tmp_path / "logs")
    assert codes == [2, 2], "\n".join(logs)
    assert all("none" in log and "Traceback" not in log for log in logs)
    assert not (tmp_path / "out").exists() and time.monotonic() - started < 60
