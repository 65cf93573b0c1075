"""A streamed save of leaves that were not there yet is what Orbax saves of ordinary arrays."""

import json
import re
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import tensorstore as ts
from jobs import tiny_job
from orbax.checkpoint import v1 as ocp
from orbax.checkpoint.experimental.v1._src.handlers import pytree_handler
from orbax.checkpoint.experimental.v1._src.serialization import registry as leaf_registry
from plans import make_leaf

from maxconv.execution.engine import Engine
from maxconv.jobs.prepare import Job
from maxconv.planning.plan import LeafPlan
from maxconv.targets import orbax
from maxconv.targets.lazy import LazyTensor
from maxconv.to_maxtext import LazyTensorHandler

FORMATS = {  # use_ocdbt, use_zarr3, compression, scan_layers
    "ocdbt, zarr3": (True, True, False, True),
    "ocdbt, zarr3, unscanned": (True, True, False, False),
    "ocdbt, zarr2": (True, False, False, True),
    "files, zarr3": (False, True, False, False),
    "files, zarr2": (False, False, False, True),
    "ocdbt, zarr3, zstd": (True, True, True, True),
    "files, zarr2, zstd": (False, False, True, False),
}


def plain_save(directory: Path, job: Job, format: str) -> None:
    """As MaxText saves: Orbax's own handlers, and arrays that are all there."""
    with Engine(job.plan, job.source, 1 << 20) as engine:
        state = orbax.train_state({p.name: make_leaf(engine, p) for p in job.plan.leaves})
    *storage, scan_layers = FORMATS[format]
    context = orbax.context(*storage)
    with ocp.training.Checkpointer(str(directory), context=context) as checkpointer:
        checkpointer.save_checkpointables(
            0, {"items": state}, custom_metadata={"scan_layers": scan_layers}
        )


def lazy_leaf(engine: Engine, leaf: LeafPlan) -> LazyTensor:
    make = partial(make_leaf, engine, leaf)
    return LazyTensor(make, leaf.shape, leaf.dtype, leaf.name, leaf.sharding)


def lazy_save(directory: Path, job: Job, format: str, window: int = 1 << 20) -> orbax.Progress:
    *storage, scan_layers = FORMATS[format]
    progress = orbax.Progress(total=sum(leaf.local_nbytes for leaf in job.plan.leaves))
    with Engine(job.plan, job.source, window) as engine:
        state = orbax.train_state({p.name: lazy_leaf(engine, p) for p in job.plan.leaves})
        context = orbax.context(*storage)
        orbax.save(str(directory), state, scan_layers, window, progress, context)
    return progress


def files(directory: Path) -> dict[str, bytes]:
    """The files of a checkpoint, without its own path, time stamps and OCDBT's own files."""

    def content(path: Path) -> bytes:
        text = path.read_bytes().replace(bytes(directory), b"<directory>")
        return re.sub(rb'(_timestamp_nsecs": )\d+', rb"\g<1>0", text)

    return {
        str(path.relative_to(directory)): content(path)
        for path in sorted((directory / "0").rglob("*"))
        if path.is_file() and path.name != "manifest.ocdbt" and path.parent.name != "d"
    }


def stored(items: Path) -> dict[bytes, bytes]:
    """All keys and values of an OCDBT store: the chunks, and the zarr metadata of each leaf."""
    base = {"driver": "file", "path": f"{items}/"}
    store = ts.KvStore.open({"driver": "ocdbt", "base": base}).result()
    return {key: store.read(key).result().value for key in store.list().result()}


@pytest.mark.parametrize("format", FORMATS)
def test_it_is_what_orbax_saves(tmp_path: Path, format: str) -> None:
    with tiny_job(tmp_path, "qwen3-8b", scan=FORMATS[format][-1]) as job:
        plain_save(tmp_path / "plain", job, format)
        lazy_save(tmp_path / "lazy", job, format)
    plain, lazy = files(tmp_path / "plain"), files(tmp_path / "lazy")
    assert lazy.keys() == plain.keys()
    for name, content in plain.items():
        assert lazy[name] == content, name
    assert {"0/_CHECKPOINT_METADATA", "0/items/_METADATA", "0/items/_sharding"} <= lazy.keys()
    custom = json.loads(lazy["0/_CHECKPOINT_METADATA"])["custom_metadata"]
    assert custom == {"scan_layers": FORMATS[format][-1]}
    if format.startswith("ocdbt"):
        kept = stored(tmp_path / "lazy/0/items")
        assert kept == stored(tmp_path / "plain/0/items")
        assert len(kept) > len(job.plan.leaves)


def test_it_streams(tmp_path: Path) -> None:
    with tiny_job(tmp_path, "qwen3-8b", scan=False) as job:
        largest = max(leaf.local_nbytes for leaf in job.plan.leaves)
        progress = lazy_save(tmp_path / "lazy", job, "ocdbt, zarr3, unscanned", window=largest)
    assert progress.peak_held == largest
    assert progress.written == progress.total and progress.held == 0
    assert progress.leaves == len(job.plan.leaves)


def lazy(load: Callable[[], Any], shape: Any = (2, 3), dtype: Any = np.float32) -> LazyTensor:
    return LazyTensor(load, shape, dtype, "a.b")


def test_a_lazy_tensor_is_like_an_array() -> None:
    loads = []
    array = np.arange(6, dtype=np.float32).reshape(2, 3)

    def load() -> np.ndarray:
        loads.append(1)
        return array

    tensor = lazy(load, [2, 3], "float32")
    assert (tensor.shape, tensor.ndim, tensor.size) == ((2, 3), 2, 6)
    assert (tensor.dtype, tensor.itemsize, tensor.nbytes) == (np.float32, 4, 24)
    assert (tensor.name, LazyTensor(load, (), "int8").name) == ("a.b", "unknown")
    assert repr(tensor) == "LazyTensor('a.b', (2, 3), float32)"
    assert not loads
    np.testing.assert_array_equal(np.asarray(tensor), array)
    assert np.asarray(tensor, dtype=np.float16).dtype == np.float16
    assert len(loads) == 2


def test_a_lazy_tensor_must_be_what_it_says() -> None:
    with pytest.raises(ValueError, match=r"a\.b is declared as \(2, 3\) float32, but is \(3,"):
        np.asarray(lazy(lambda: np.zeros((3, 2), np.float32)))
    with pytest.raises(ValueError, match="but is .* int32"):
        np.asarray(lazy(lambda: np.zeros((2, 3), np.int32)))
    elsewhere = jax.device_put(np.zeros((2, 3), np.float32), jax.devices()[1])
    with pytest.raises(ValueError, match="a.b has SingleDevice"):
        np.asarray(lazy(lambda: elsewhere))
    with pytest.raises(ZeroDivisionError):
        np.asarray(lazy(lambda: 1 / 0))


def test_a_leaf_that_cannot_be_made_ends_the_save(tmp_path: Path) -> None:
    state = orbax.train_state({"params.params.x": lazy(lambda: 1 / 0)})
    with pytest.raises(BaseExceptionGroup) as failed:
        orbax.save(str(tmp_path), state, True, 1 << 20, orbax.Progress())
    assert failed.group_contains(ZeroDivisionError)
    assert not (tmp_path / "0").exists()


@pytest.mark.parametrize("use_ocdbt", [True, False])
@pytest.mark.filterwarnings("ignore::UserWarning")  # it is read without shardings
def test_the_leaf_handler_by_itself(tmp_path: Path, use_ocdbt: bool) -> None:
    """As a user of Orbax registers it: arrays that are made while they are saved."""
    mesh = jax.make_mesh((8,), ("x",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    arrays = {
        "kernel": np.arange(48, dtype=np.float32).reshape(16, 3),
        "bias": np.arange(8, dtype=np.int32),
    }
    tree = {
        name: LazyTensor(partial(jax.device_put, a, sharding), a.shape, a.dtype, name, sharding)
        for name, a in arrays.items()
    }
    context = ocp.Context()
    context.array.saving.use_ocdbt = use_ocdbt

    class AbstractTensor:  # what it would be loaded as; Orbax wants one
        of_a_test: bool

    class TreeHandler(pytree_handler.PyTreeHandler):  # type: ignore[misc]
        def __init__(self, **kwargs: Any):
            leaves = leaf_registry.StandardLeafHandlerRegistry()
            leaves.add(
                LazyTensor,
                AbstractTensor,
                LazyTensorHandler,
                secondary_typestrs=["jax.Array"],
            )
            super().__init__(leaf_handler_registry=leaves, **kwargs)

    stock = pytree_handler.PyTreeHandler  # which reads what it saves
    TreeHandler.__module__, TreeHandler.__qualname__ = stock.__module__, stock.__qualname__
    handlers = ocp.handlers.local_registry()
    handlers.add(TreeHandler, checkpointable_name="mine")
    context.checkpointables.registry = handlers
    done: list[bool] = []

    def save() -> None:
        with context:
            ocp.save_checkpointables(str(tmp_path / "saved"), {"mine": tree})
        done.append(True)

    thread = threading.Thread(target=save, daemon=True)
    thread.start()
    thread.join(60)
    assert done, "it does not end"
    loaded = ocp.load(str(tmp_path / "saved"), checkpointable_name="mine")
    for name, array in arrays.items():
        np.testing.assert_array_equal(loaded[name], array)
