"""Which process makes and writes which tensors of an export.

Tensors that lie in one array, such as the layers of a stack, are divided among the processes: each
reads an equal part of the array, and is sent the rest of its own tensors by the others. What cannot
be divided, or is small, one process reads, makes and writes by itself.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
from jax.sharding import Mesh

from maxconv.algebra import tensors
from maxconv.algebra.together import Stack
from maxconv.jobs.export_arrays import Made, made_by_all, made_by_one, made_for_all, padded
from maxconv.planning.owners import Unit, divided
from maxconv.planning.plan import Leaf, Plan, make_plan
from maxconv.sources import TensorInfo
from maxconv.sources.narrow import narrow


@dataclass(frozen=True)
class Shares:
    """What is made, and the process that writes each tensor.

    Attributes:
        mesh: of all devices, (processes, devices of each).
        made: the arrays, by the names of their leaves.
        by_all: leaves that all processes make together.
        by_one: leaves that one process makes.
        owners: the process that writes each tensor, by name.
    """

    mesh: Mesh
    made: Mapping[str, Made]
    by_all: Sequence[Leaf]
    by_one: Sequence[Leaf]
    owners: Mapping[str, int]


def shares(
    stacks: Sequence[Stack],
    dtypes: Mapping[str, np.dtype],
    copied: Mapping[str, int],
    stored: Mapping[str, TensorInfo],
    devices: Iterable[Any],
    owners: Mapping[str, int] = MappingProxyType({}),
) -> Shares:
    """Divides tensors among processes, so that each has about equally many bytes of them.

    With `owners`, each process is sent all tensors of a stack instead, unless they are its own.

    Args:
        stacks: the tensors to make.
        dtypes: of the tensors, as they are written.
        copied: the bytes of tensors that are only copied, by name.
        stored: the arrays that the others are made of.
        devices: of all processes, equally many of each.
        owners: the process that writes each tensor, if that is settled.
    """
    ordered = sorted(devices, key=lambda device: (device.process_index, device.id))
    count = len({device.process_index for device in ordered})
    mesh = Mesh(np.array(ordered).reshape(count, -1), ("process", "local"))
    if owners:
        return _as_owned(stacks, dtypes, mesh, owners)
    together = [*_from_the_same_bytes(stacks)]
    units = [_unit(of, dtypes) for of in together] + [Unit(nbytes) for nbytes in copied.values()]
    divisions = divided(units, count)
    ways = [(s, way) for of, way in zip(together, divisions, strict=False) for s in of]
    owners = {
        name: way.owner(0) for name, way in zip(copied, divisions[len(together) :], strict=True)
    }
    found, by_all, by_one = dict[str, Made](), list[Leaf](), list[Leaf]()
    for stack, way in ways:
        if way.axis is None:
            made, sharding = made_by_one(stack, way.order[0], mesh)
        else:
            made, sharding = made_by_all(stack, way, mesh, stored)
        name = stack.names[0]
        leaf = Leaf(name, made.expr, narrow(dtypes[name]), sharding, made.apart)
        (by_one if way.axis is None else by_all).append(leaf)
        found[name] = made
        for tensor, place in zip(stack.names, np.ndindex(*stack.leading), strict=True):
            owners[tensor] = way.owner(0 if way.axis is None else place[way.axis])
    return Shares(mesh, found, by_all, by_one, owners)


def _as_owned(
    stacks: Sequence[Stack], dtypes: Mapping[str, np.dtype], mesh: Mesh, owners: Mapping[str, int]
) -> Shares:
    found, by_all, by_one = dict[str, Made](), list[Leaf](), list[Leaf]()
    for stack in stacks:
        name, (owner, *others) = stack.names[0], {owners[name] for name in stack.names}
        if others:
            made, sharding = made_for_all(stack, mesh)
        else:
            made, sharding = made_by_one(stack, owner, mesh)
        leaf = Leaf(name, made.expr, narrow(dtypes[name]), sharding)
        (by_all if others else by_one).append(leaf)
        found[name] = made
    return Shares(mesh, found, by_all, by_one, owners)


def planned(shares: Shares, stored: Mapping[str, TensorInfo], budget: int, slab: int) -> Plan:
    """The plan that makes the tensors.

    A step of all processes is at least a chunk for each of them, so that none is read twice.

    Args:
        shares: the arrays.
        stored: what they are made of.
        budget: of a step, in bytes per process, as far as chunks allow.
        slab: most bytes of a slab, per process.
    """
    alike: dict[frozenset[str], list[Leaf]] = {}
    for leaf in shares.by_all:
        alike.setdefault(frozenset(leaf.tensors), []).append(leaf)
    made = make_plan(shares.by_one, stored, shares.mesh, budget, slab).leaves
    for leaves in reversed(alike.values()):
        most = max([budget, *(_chunk_nbytes(leaf, stored) for leaf in leaves)])
        made = make_plan(leaves, stored, shares.mesh, most, slab).leaves + made
    return Plan(shares.mesh, made, stored)


def _chunk_nbytes(leaf: Leaf, stored: Mapping[str, TensorInfo]) -> int:
    """Bytes of a chunk of each tensor that an array is made of, with what is added to the array."""
    names = {*leaf.tensors}
    size = sum(stored[name].size for name in names)
    chunks = sum(stored[name].chunk_nbytes for name in names)
    return -(-chunks * max(size, math.prod(leaf.shape)) // max(size, 1))


def _from_the_same_bytes(stacks: Iterable[Stack]) -> Iterator[list[Stack]]:
    """Stacks with those that are made of the same arrays."""
    found: dict[frozenset[str], list[Stack]] = {}
    by_tensor: dict[str, frozenset[str]] = {}
    for stack in stacks:
        names = frozenset(tensor.name for tensor in tensors(stack.first))
        alike = [stack]
        for key in {by_tensor[name] for name in names if name in by_tensor}:
            alike, names = found.pop(key) + alike, names | key
        found[names] = alike
        by_tensor.update(dict.fromkeys(names, names))
    yield from found.values()


def _unit(stacks: Sequence[Stack], dtypes: Mapping[str, np.dtype]) -> Unit:
    def nbytes(stack: Stack) -> int:
        return len(stack.names) * math.prod(stack.shape) * dtypes[stack.names[0]].itemsize

    axes: list[tuple[int, int, bool]] = []
    if len({stack.leading for stack in stacks}) == 1:
        for axis, n in enumerate(stacks[0].leading):
            can_pad = all(padded(stack, axis, n + 1) is not None for stack in stacks)
            axes.append((axis, n, can_pad))
    return Unit(sum(map(nbytes, stacks)), tuple(axes))
