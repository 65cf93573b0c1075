"""MaxText's mesh, and its sharding of a weight by the names of the weight's axes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np

from maxconv.config import Config
from maxconv.errors import UserError

if TYPE_CHECKING:
    from jax.sharding import Mesh, PartitionSpec

# Mesh axes whose size has another name than ici_<axis>_parallelism.
_PARALLELISM_NAMES = {"stage": "pipeline", "model": "tensor"}

Rules = Iterable[tuple[str, Sequence[str]]]


def make_mesh(config: Config, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh that MaxText makes of `devices` (all of them if None), its axes all Auto."""
    import jax
    from jax.sharding import AxisType, Mesh

    axes = config.mesh_axes
    array = device_array(config, jax.devices() if devices is None else devices)
    return Mesh(array, axes, axis_types=(AxisType.Auto,) * len(axes))


def device_array(config: Config, devices: Sequence[Any]) -> np.ndarray:
    """`devices` in the order of MaxText's mesh, one dimension for each mesh axis."""
    from jax.experimental import mesh_utils

    num_slices = len({getattr(device, "slice_index", 0) for device in devices})
    if config.num_slices not in (-1, num_slices):
        raise UserError(
            f"num_slices={config.num_slices}, but there are {num_slices} slice(s); remove it."
        )
    ici, dcn = (list(sizes.values()) for sizes in parallelism(config, len(devices), num_slices))
    split = config.allow_split_physical_axes
    try:
        if num_slices == 1:
            return mesh_utils.create_device_mesh(ici, devices, allow_split_physical_axes=split)
        return mesh_utils.create_hybrid_device_mesh(
            ici, dcn, devices, allow_split_physical_axes=split
        )
    except (NotImplementedError, AssertionError, ValueError) as error:
        used = [f"{a}={n * m}" for a, n, m in zip(config.mesh_axes, ici, dcn, strict=True)]
        sizes = " x ".join(size for size in used if not size.endswith("=1"))
        raise UserError(
            f"The mesh {sizes} cannot be laid out along the physical axes of these chips; choose "
            "sizes that are products of those axes, or add allow_split_physical_axes=true"
        ) from error


def partition_spec(
    logical: Sequence[str | None],
    shape: Sequence[int],
    mesh_axis_sizes: Mapping[str, int],
    rules: Rules,
) -> tuple[PartitionSpec, tuple[str, ...]]:
    """The PartitionSpec of a weight, and a phrase for each mesh axis that does not divide it.

    Rules are tried in order: a rule takes its named axis if that has none yet and no other axis
    took one of the rule's mesh axes (whatever their sizes: that is decided before sizes are known).
    A mesh axis of size 1 is left out, and so is one that does not divide the dimension.
    """
    from jax.sharding import PartitionSpec

    dropped: list[str] = []
    entries: list[str | tuple[str, ...] | None] = []
    for name, axes, size in zip(logical, _match(logical, rules), shape, strict=False):
        kept: list[str] = []
        for axis in axes:
            axis_size = mesh_axis_sizes.get(axis, 1)
            if axis_size == 1:
                continue
            if size % (axis_size * prod(mesh_axis_sizes[k] for k in kept)):
                factors = " * ".join(f"{a}={mesh_axis_sizes[a]}" for a in (*kept, axis))
                dropped.append(f"{name} {size} is not divisible by {factors}")
            else:
                kept.append(axis)
        entries.append(kept[0] if len(kept) == 1 else tuple(kept) or None)
    return PartitionSpec(*entries), tuple(dropped)


def _match(logical: Sequence[str | None], rules: Rules) -> list[tuple[str, ...]]:
    """The mesh axes of each named axis, by the rules alone."""
    # flax.linen.spmd.logical_to_mesh_axes finds the same, as tests show, but importing it takes
    # 0.14 to 0.28 s of each start: more than these lines are worth.
    names = [name for name in logical if name is not None]
    if len(set(names)) < len(names):
        raise ValueError(f"A name occurs twice among the axes {tuple(logical)}.")
    found: dict[str, tuple[str, ...]] = {}
    taken: set[str] = set()
    for name, axes in rules:
        if name in names and name not in found and taken.isdisjoint(axes):
            found[name] = tuple(axes)
            taken.update(axes)
    return [found.get(name, ()) if name is not None else () for name in logical]


def parallelism(
    config: Config, num_devices: int, num_slices: int
) -> tuple[dict[str, int], dict[str, int]]:
    """The sizes of the mesh axes within a slice and across slices."""
    if num_devices % num_slices:
        raise UserError(f"{num_devices} devices are not divisible by num_slices={num_slices}.")
    ici = _sizes(config, "ici", num_devices // num_slices)
    # As in MaxText, one slice has no dcn: its values are not even looked at.
    dcn = _sizes(config, "dcn", num_slices) if num_slices > 1 else dict.fromkeys(ici, 1)
    return ici, dcn


def _sizes(config: Config, kind: str, total: int) -> dict[str, int]:
    """The sizes of one `kind`, `ici` or `dcn`, with -1 filled in."""
    keys = {a: f"{kind}_{_PARALLELISM_NAMES.get(a, a)}_parallelism" for a in config.mesh_axes}
    sizes = {axis: config.parallelism.get(key, 1) for axis, key in keys.items()}
    open_axes = [axis for axis, size in sizes.items() if size == -1]
    fixed = prod(size for size in sizes.values() if size != -1)
    if len(open_axes) == 1 and total % fixed == 0:
        sizes[open_axes[0]] = total // fixed
    elif open_axes or fixed != total:
        raise UserError(_misfit(keys, sizes, kind, total))
    return sizes


def _misfit(keys: Mapping[str, str], sizes: Mapping[str, int], kind: str, total: int) -> str:
    """The error for sizes that do not fit the devices; it suggests sizes that do."""
    what = {"ici": "devices (of a slice)", "dcn": "slices"}[kind]
    given = {keys[axis]: size for axis, size in sizes.items() if size != 1}
    fill = keys.get({"ici": "fsdp", "dcn": "data"}[kind]) or next(iter(keys.values()))
    others = prod(size for key, size in given.items() if key != fill and size != -1)
    words = [f"{key}={size}" for key, size in given.items()]
    if list(given.values()).count(-1) > 1:
        fault = "more than one is -1"
    else:
        fault = f"the product does not fit the {total} {what}"
    if others > 0 and total % others == 0:
        kept = [f"{key}={size}" for key, size in given.items() if key != fill and size != -1]
        fitting = " ".join([*kept, f"{fill}={total // others}"])
    else:
        fitting = f"{fill}={total} alone"
    return f"{' '.join(words) or 'All sizes 1'}: {fault}; {fitting} would fit."
