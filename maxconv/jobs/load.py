"""Loads a checkpoint into arrays of the caller's process, in the shardings that the caller wants.

A library: it starts and ends nothing, prints nothing, and raises its errors, the same on all
processes.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, TypeGuard

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from maxconv.algebra import Shape
from maxconv.config.paths import read_path
from maxconv.errors import UserError
from maxconv.execution.engine import Engine
from maxconv.execution.memory import machine_memory
from maxconv.jobs.kept_chunks import keep_shared
from maxconv.jobs.loadable import Layout, Maker, Path, Wanted, maker, model_of, open_at
from maxconv.jobs.memory import STEP_MOST, usual_window
from maxconv.jobs.opening import check_same_everywhere, opened_by_all
from maxconv.models.canonical_names import misfit
from maxconv.planning.plan import Leaf, Plan, make_plan
from maxconv.planning.remembered import forgetting
from maxconv.processes.agreement import agree, gathered, same_error_everywhere
from maxconv.sources import Source
from maxconv.sources.runs import parameters as parameters_among
from maxconv.sources.safetensors import some
from maxconv.sources.trees import TreeSource


def load(source: str, abstract: Any, **options: Any) -> Any:
    """Loads a checkpoint as `abstract` describes it.

    Args:
        source: a checkpoint of Hugging Face (a directory, gs://bucket/path, or org/name on the
            Hub) or of MaxText (what `maxconv convert` or a trainer wrote).
        abstract: a pytree of `jax.ShapeDtypeStruct` or of arrays: dictionaries, a flax TrainState's
            params, an `nnx.State`. Which parameters are loaded, their dtypes and their shardings
            are taken from it; a mesh may have any axes, Auto or Explicit.
        options: see `stream`.

    Returns:
        The same pytree, of `jax.Array`.

    Raises:
        UserError: with everything that does not match; nothing was loaded.
        RetryableError: a server fails.
    """
    leaves, tree = jax.tree_util.tree_flatten_with_path(abstract)
    order = {_plain(path): i for i, (path, _) in enumerate(leaves)}
    loaded: list[Any] = [None] * len(leaves)
    for path, array in stream(source, abstract, **options):
        loaded[order[path]] = array
    return jax.tree_util.tree_unflatten(tree, loaded)


def stream(
    source: str,
    abstract: Any,
    *,
    layout: Layout = "maxtext",
    hf_model_path: str | None = None,
    param_scan_axis: int = 1,
    rope_type: str | None = None,
    donate: bool = False,
    progress: Callable[[int, int], None] | None = None,
    window: int | None = None,
    token: str | None = None,
    revision: str | None = None,
) -> Iterator[tuple[Path, jax.Array]]:
    """Loads a checkpoint array by array, in the order in which it is read best.

    All processes must take the same arrays. An array lives as long as the caller keeps it; what is
    read ahead is at most half of the window.

    Args:
        source, abstract: see `load`.
        layout: "maxtext", or "hf" for tensors under the names and with the shapes that they have
            in the checkpoint of Hugging Face.
        hf_model_path: for a checkpoint of MaxText in another layout than `abstract`, the same model
            at Hugging Face, of which headers are read. Default: what it was converted from.
        param_scan_axis: as in MaxText: where layers are stacked in `abstract`, if they are.
        rope_type: as in MaxText; "default" has another order of a llama's queries and keys than
            "llama3.1", which is what is loaded by default.
        donate: `abstract` holds arrays to be replaced; each is deleted before its successor is
            made.
        progress: is called with the bytes that were made so far and those of all.
        window: bytes of host memory that this process may use; default: as in a conversion.
        token, revision: for the Hub.

    Yields:
        The path of each leaf of `abstract`, such as `("params", "decoder", ...)`, and its array.
    """
    leaves = [(_plain(path), leaf) for path, leaf in _flat(abstract)]
    opening = partial(open_at, read_path(source), token, revision)
    with forgetting(), opened_by_all(opening) as opened:
        check_same_everywhere(opened)
        most = min(gathered(window or usual_window()))
        with same_error_everywhere():
            wanted = _wanted(leaves, layout)
        at = partial(model_of, path=hf_model_path, token=token, revision=revision)
        made = maker(opened, wanted, layout, param_scan_axis, at, rope_type)
        with same_error_everywhere():
            plans = [*_plans(opened, wanted, made, most)]
            if isinstance(opened, TreeSource):
                keep_shared(opened, plans, most // 2, machine_memory())
        agree({"the plan": [plan.digest for plan in plans]}, "load the same on all of them")
        total, done = sum(plan.output_nbytes for plan in plans), 0
        for name, array in _made(plans, opened, most, wanted if donate else {}):
            one, done = wanted[name], done + array.nbytes
            yield one.path, _with_sharding(array, one.sharding)
            if progress is not None:
                progress(done, total)


def _made(
    plans: Iterable[Plan], source: Source, window: int, replaced: Mapping[str, "Wanted"]
) -> Iterator[tuple[str, jax.Array]]:
    """The leaves of plans with their names; those that they replace are deleted before."""
    together = same_error_everywhere if jax.process_count() > 1 else nullcontext
    for plan in plans:
        with Engine(plan, source, window, together=together) as engine:
            for group in plan.groups:
                names = [planned.name for planned, _ in group]
                for old in (replaced[name].leaf for name in names if name in replaced):
                    if isinstance(old, jax.Array):
                        old.delete()
                arrays = engine.make_slabs([slab for _, slab in group])
                while names:
                    yield names.pop(0), arrays.pop(0)


def _flat(abstract: Any) -> list[tuple[Any, Any]]:
    return jax.tree_util.tree_flatten_with_path(abstract)[0]


def _plain(path: Iterable[Any]) -> Path:
    """A path without the types of JAX' keys."""
    return tuple(
        getattr(key, "key", getattr(key, "name", getattr(key, "idx", key))) for key in path
    )


def _wanted(leaves: Sequence[tuple[Path, Any]], layout: Layout) -> dict[str, Wanted]:
    """What is to be loaded, by its name in the checkpoint.

    Raises:
        UserError: with every leaf that has no name there, or no sharding.
    """
    dotted = {".".join(map(str, path)): (path, leaf) for path, leaf in leaves}
    names = (
        {name: name for name in dotted}
        if layout == "hf"
        else parameters_among(dotted, (), "abstract").stored
    )
    if lost := sorted(dotted.keys() - names.values()):
        raise UserError(
            f"abstract has {some(lost)}, which are no parameters of MaxText; give its parameters "
            "alone."
        )
    found: dict[str, Wanted] = {}
    problems: list[str] = []
    for name, at in names.items():
        path, leaf = dotted[at]
        sharding = getattr(leaf, "sharding", None)
        if sharding is None and jax.process_count() == 1:
            sharding = SingleDeviceSharding(jax.devices()[0])
        if not _has_devices(sharding):
            problems.append(
                f"{at} has the sharding {sharding}; give it a NamedSharding over devices."
            )
        elif not _divides(sharding, leaf.shape):
            problems.append(
                f"{at} of shape {tuple(leaf.shape)} cannot be divided evenly as its sharding "
                f"{sharding} says; give it another one."
            )
        else:
            found[name] = Wanted(path, leaf, sharding)
    if problems:
        raise UserError(problems)
    return found


def _divides(sharding: jax.sharding.Sharding, shape: Shape) -> bool:
    try:
        sharding.shard_shape(tuple(shape))
    except ValueError:
        return False
    return True


def _has_devices(sharding: Any) -> TypeGuard[NamedSharding | SingleDeviceSharding]:
    if isinstance(sharding, NamedSharding):
        return isinstance(sharding.mesh, Mesh)
    return isinstance(sharding, SingleDeviceSharding)


def _plans(
    source: Source,
    wanted: Mapping[str, Wanted],
    made: Maker,
    window: int,
) -> Iterator[Plan]:
    """A plan for each mesh.

    Raises:
        UserError: with every leaf that has another shape, or a dtype that does not fit.
    """
    problems: list[str] = []
    meshes: dict[Mesh, list[Leaf]] = {}
    dtypes = {name: info.dtype for name, info in source.tensors.items()}
    for name, one in wanted.items():
        expr, (mesh, sharding) = made(name, one.dtype), _named(one.sharding)
        if expr.shape != tuple(one.leaf.shape):
            problems.append(
                f"{name} has shape {tuple(one.leaf.shape)} in abstract, but {expr.shape} in "
                f"{source.root}."
            )
        if (problem := misfit(expr, dtypes, one.dtype)) is not None:
            problems.append(f"{name} is to be {one.dtype}: {problem}.")
        meshes.setdefault(mesh, []).append(Leaf(name, expr, one.dtype, sharding))
    if problems:
        raise UserError(problems)
    budget = min(window // 8, STEP_MOST)
    for mesh, leaves in meshes.items():
        yield make_plan(leaves, source.tensors, mesh, budget, math.inf)


def _named(sharding: NamedSharding | SingleDeviceSharding) -> tuple[Mesh, NamedSharding]:
    """The sharding as the engine takes it, over a mesh whose axes are Auto; and that mesh."""
    if isinstance(sharding, NamedSharding):
        assert isinstance(sharding.mesh, Mesh)
        mesh, spec = Mesh(sharding.mesh.devices, sharding.mesh.axis_names), sharding.spec
    else:
        mesh, spec = Mesh(np.array([*sharding.device_set]), ("device",)), PartitionSpec()
    return mesh, NamedSharding(mesh, spec)


def _with_sharding(array: jax.Array, sharding: NamedSharding | SingleDeviceSharding) -> jax.Array:
    """The array with the caller's own sharding, which divides it alike; nothing is copied."""
    shards = [shard.data for shard in array.addressable_shards]
    same = jax.make_array_from_single_device_arrays(array.shape, _on_devices(sharding), shards)
    return same if same.sharding == sharding else jax.device_put(same, sharding)


def _on_devices(sharding: NamedSharding | SingleDeviceSharding) -> jax.sharding.Sharding:
    """The sharding in the devices' default memory, where arrays are made."""
    if isinstance(sharding, NamedSharding):
        return NamedSharding(sharding.mesh, sharding.spec)
    (device,) = sharding.device_set
    return SingleDeviceSharding(device)
