"""Which device, and which process, holds which box of an array."""

import math
from typing import Any

import numpy as np
from jax.sharding import Mesh, NamedSharding

from maxconv.algebra import Box, Shape
from maxconv.planning.remembered import remembered

Device = Any  # jax.Device, which type checkers do not accept as a type


def mesh_axes(sharding: NamedSharding, axis: int) -> tuple[str, ...]:
    """The mesh axes larger than 1 over which an axis of an array is sharded, outermost first."""
    entry = sharding.spec[axis] if axis < len(sharding.spec) else None
    names = entry if isinstance(entry, tuple) else (entry,)
    return tuple(n for n in names if n is not None and sharding.mesh.shape[n] > 1)


def shards(sharding: NamedSharding, axis: int) -> int:
    """Number of shards along an axis of an array."""
    return math.prod(sharding.mesh.shape[name] for name in mesh_axes(sharding, axis))


@remembered
def crossing(sharding: NamedSharding) -> tuple[str, ...]:
    """The axes of a mesh along which devices belong to different processes."""
    mesh = sharding.mesh
    assert isinstance(mesh, Mesh)
    owners = np.vectorize(lambda device: device.process_index, otypes=[int])(mesh.devices)
    return tuple(
        name
        for axis, name in enumerate(mesh.axis_names)
        if (owners != owners.take([0], axis)).any()
    )


def shard_nbytes(sharding: NamedSharding, shape: Shape, dtype: np.dtype) -> int:
    """Bytes of an array per device."""
    return math.prod(sharding.shard_shape(shape)) * dtype.itemsize


@remembered
def local_devices(sharding: NamedSharding) -> int:
    """Number of devices per process in the mesh; equal for all processes."""
    processes = {device.process_index for device in sharding.device_set}
    return len(sharding.device_set) // len(processes)


@remembered
def device_boxes(sharding: NamedSharding, shape: Shape) -> dict[Device, Box]:
    """The box of an array that each device holds."""
    return {
        device: tuple(s.indices(n)[:2] for s, n in zip(index, shape, strict=True))
        for device, index in sharding.devices_indices_map(shape).items()
    }


@remembered
def local_boxes(sharding: NamedSharding, shape: Shape) -> dict[Device, Box]:
    """`device_boxes` of this process' devices."""
    mine = sharding.addressable_devices
    return {device: box for device, box in device_boxes(sharding, shape).items() if device in mine}


@remembered
def boxes_by_process(sharding: NamedSharding, shape: Shape) -> dict[int, frozenset[Box]]:
    """The distinct boxes of an array that the devices of each process hold."""
    boxes: dict[int, set[Box]] = {}
    for device, box in device_boxes(sharding, shape).items():
        boxes.setdefault(device.process_index, set()).add(box)
    return {process: frozenset(of) for process, of in boxes.items()}
