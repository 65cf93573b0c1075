"""With an Orbax that was not tested, a save through its public API is the same checkpoint."""

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import tiny
from buckets import serving
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jobs import MESHES, tiny_job
from orbax.checkpoint import v1 as ocp
from test_checkpoint import files, lazy_save, stored
from test_processes import processes, said

from maxconv import private
from maxconv.planning.slabs import Slab
from maxconv.targets import orbax
from maxconv.targets.base import Progress
from maxconv.targets.lazy import LazyTensor


@pytest.fixture
def another_orbax(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(private.TESTED, "orbax-checkpoint", ("0.1.0", "0.1.1"))
    yield


def content(name: str, text: bytes) -> Any:
    """What a file of metadata says, whatever its order."""
    found = json.loads(text)
    if "array_metadatas" in name:
        return sorted(found["array_metadatas"], key=json.dumps)
    return found


def load(directory: Path) -> Any:
    """Everything, as MaxText asks Orbax for it."""
    return ocp.load(str(directory / "0"), checkpointable_name="items")


@pytest.mark.filterwarnings("ignore:Sharding info not provided")
@pytest.mark.parametrize("format", ["ocdbt, zarr3", "files, zarr2, zstd"])
def test_it_is_what_a_streamed_save_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: str
) -> None:
    with tiny_job(tmp_path, "qwen3-8b", scan=format != "files, zarr2, zstd") as job:
        lazy_save(tmp_path / "streamed", job, format)
        monkeypatch.setitem(private.TESTED, "orbax-checkpoint", ("0.1.0", "0.1.1"))
        progress = lazy_save(tmp_path / "partial", job, format, window=10_000)
        largest = max(leaf.local_nbytes for leaf in job.plan.leaves)
    assert progress.written == progress.total and progress.held == 0
    assert progress.peak_held <= max(10_000, largest) < progress.total
    assert progress.leaves == len(job.plan.leaves)
    streamed, saved = files(tmp_path / "streamed"), files(tmp_path / "partial")
    for name, text in streamed.items():
        if "commit_success" in name:
            continue
        if name.rpartition("/")[2] in ("_METADATA", "_sharding", "_CHECKPOINT_METADATA") or (
            "array_metadatas" in name
        ):
            assert content(name, saved[name]) == content(name, text), name
        else:
            assert saved[name] == text, name
    if format.startswith("ocdbt"):
        assert stored(tmp_path / "partial/0/items") == stored(tmp_path / "streamed/0/items")
    assert saved.keys() == streamed.keys() - {"0/items/commit_success.txt"}
    loaded, wanted = (load(tmp_path / name) for name in ("partial", "streamed"))
    assert jax.tree.structure(loaded) == jax.tree.structure(wanted)
    for ours, theirs in zip(jax.tree.leaves(loaded), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.filterwarnings("ignore:Sharding info not provided")
def test_a_leaf_of_slabs_is_put_together(tmp_path: Path, another_orbax: None) -> None:
    """Slabs along an axis that is sharded and one that is not, as plans have them."""
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"))
    sharding = NamedSharding(mesh, P(None, "fsdp"))
    whole = np.arange(6 * 16 * 2, dtype=np.int32).reshape(6, 16, 2)
    parts = []
    for layer in range(0, 6, 3):
        for row in range(0, 4, 2):
            slab = Slab((3, 8, 2), whole.dtype, sharding, (layer, row, 0), whole.shape, ())
            rows = [r for shard in range(4) for r in range(4 * shard + row, 4 * shard + row + 2)]
            value = whole[layer : layer + 3, rows]
            make = partial(jax.device_put, value, sharding)
            part = LazyTensor(make, slab.shape, slab.dtype, "a", sharding)
            parts.append((slab.in_leaf, part))
    lazy = LazyTensor(lambda: 1 / 0, whole.shape, whole.dtype, "a", sharding, parts)
    state = orbax.train_state({"params.params.a": lazy})
    orbax.save(str(tmp_path), state, True, 1 << 20, Progress())
    assert np.array_equal(load(tmp_path)["params"]["params"]["a"], whole)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0"]


def test_a_failure_leaves_no_checkpoint(tmp_path: Path, another_orbax: None) -> None:
    loads = {"a": lambda: np.zeros((2, 3), np.float32), "b": lambda: 1 / 0}
    state = orbax.train_state(
        {
            f"params.params.{name}": LazyTensor(load, (2, 3), np.float32, name)
            for name, load in loads.items()
        }
    )
    with pytest.raises(ZeroDivisionError):
        orbax.save(str(tmp_path), state, True, 1, Progress())
    left = [path.name for path in tmp_path.iterdir()]
    assert left and all(name.startswith("0.orbax-checkpoint-tmp") for name in left)


def test_it_is_said(another_orbax: None) -> None:
    (notice,) = orbax.notices()
    assert "orbax-checkpoint" in notice and "tested with 0.1.0 to 0.1.1" in notice


def test_nothing_is_said_of_a_tested_orbax() -> None:
    assert orbax.notices() == ()


BUCKET_FAILS = """
import os, sys
from orbax.checkpoint._src.path import atomicity
from maxconv import cli, private

private.TESTED["orbax-checkpoint"] = ("0.1.0", "0.1.1")
if os.environ.get("FAILS"):
    async def finalize(self, *args, **kwargs):
        raise OSError(28, "No space left on device", "bucket")
    atomicity.CommitFileTemporaryPath.finalize = finalize
sys.exit(cli.main(["convert", *sys.argv[1:]]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("fails", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_two_processes_and_a_bucket(tmp_path: Path, fails: bool) -> None:
    """An error of the commit, which is in the background of one of them, ends both."""
    words = [*tiny.maxtext_words("llama3.1-8b", True), *MESHES["fsdp8"], "hardware=cpu"]
    words += [f"--hf_model_path={tiny.write('llama3.1-8b', tmp_path / 'hf')}"]
    words += ["base_output_directory=gs://bucket/out"]
    with serving(tmp_path / "gcs") as bucket:
        environ = {**bucket.environ, "FAILS": "1" * fails}
        with processes(2, words, tmp_path / "logs", BUCKET_FAILS, environ) as running:
            codes = [process.wait(timeout=100) for process in running]
        logs = "\n".join(said(tmp_path / "logs"))
        assert codes == ([1, 1] if fails else [0, 0]), logs
        is_committed = "out/0/commit_success.txt" in bucket.names("out/")
    assert is_committed != fails and logs.count("No space left on device") == fails
