"""Descriptions of TPU slices, sufficient for MaxText's mesh and for planning without a TPU.

Chips and topologies are from docs.cloud.google.com/tpu/docs/{v5e,v5p,v6e}: HBM, chips per pod, and
the network bandwidth per host, divided by its chips. RAM is from the tables of machine types. Chips
are numbered as libtpu numbers them (see the tests).
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

from maxconv.errors import UserError

MAX_CHIPS = 1 << 14  # in all slices together; planning for so many takes about a minute


@dataclass(frozen=True)
class Machine:
    """A machine type with TPU chips, one host of a slice.

    Attributes:
        name: in Compute Engine and GKE.
        grid: number of chips along each axis.
        ram: bytes of memory.
    """

    name: str
    grid: tuple[int, int, int]
    ram: int

    @property
    def chips(self) -> int:
        return math.prod(self.grid)


@dataclass(frozen=True)
class Kind:
    """A generation of TPUs.

    Attributes:
        device_kind: JAX's name of its chips.
        named_by: how much a chip adds to the number in a slice's name: 2 (TensorCores) or 1.
        axes: number of dimensions of the torus, or mesh, of chips.
        largest: number of chips in the largest slice.
        hbm: bytes of HBM per chip.
        network: bytes per second between a host and the data center, per chip of the host.
        machines: the machine types; first the one with 4 chips, which multi-host slices consist of.
    """

    device_kind: str
    named_by: int
    axes: int
    largest: int
    hbm: int
    network: float
    machines: tuple[Machine, ...]


_GIB = 1 << 30
_GBIT = 1e9 / 8
_1, _4, _8 = (1, 1, 1), (2, 2, 1), (2, 4, 1)
KINDS = {
    "v5litepod": Kind(
        "TPU v5 lite",
        1,
        2,
        256,
        16 * _GIB,
        25 * _GBIT,
        (
            Machine("ct5lp-hightpu-4t", _4, 192 * _GIB),
            Machine("ct5lp-hightpu-1t", _1, 48 * _GIB),
            Machine("ct5lp-hightpu-8t", _8, 384 * _GIB),
        ),
    ),
    "v5p": Kind(
        "TPU v5",
        2,
        3,
        4096,
        95 * _GIB,
        50 * _GBIT,
        (Machine("ct5p-hightpu-4t", _4, 448 * _GIB),),
    ),
    "v6e": Kind(
        "TPU v6 lite",
        1,
        2,
        256,
        32 * _GIB,
        100 * _GBIT,
        (
            Machine("ct6e-standard-4t", _4, 720 * _GIB),
            Machine("ct6e-standard-1t", _1, 176 * _GIB),
            Machine("ct6e-standard-8t", _8, 1440 * _GIB),
        ),
    ),
}


class _Client:
    """What JAX reads from the client of a device; pretends to run on the first host."""

    platform = "tpu"

    def process_index(self) -> int:
        return 0


@dataclass(frozen=True)
class Chip:
    """A stand-in for a TPU device, with the attributes that JAX and MaxText's mesh read."""

    id: int
    process_index: int
    slice_index: int
    coords: tuple[int, int, int]
    device_kind: str
    core_on_chip: int = 0
    platform: str = "tpu"
    client: Any = field(default=_Client(), repr=False, compare=False)


@dataclass(frozen=True)
class Slice:
    """A slice of TPU chips, such as v5p-64.

    `shape`: number of chips along each axis, x first. `machine`: the machine type of its hosts.
    """

    name: str
    kind: Kind
    shape: tuple[int, ...]
    machine: Machine

    @property
    def hosts(self) -> int:
        return math.prod(self.shape) // self.machine.chips

    @property
    def network(self) -> float:
        """Bytes per second between a host and the data center."""
        return self.kind.network * self.machine.chips

    def chips(self, num_slices: int = 1) -> Sequence[Chip]:
        """The chips of `num_slices` such slices, host by host.

        Raises:
            UserError: there are more than MAX_CHIPS.
        """
        x, y, z = (*self.shape, 1)[:3]
        if num_slices * x * y * z > MAX_CHIPS:
            raise UserError(
                f"num_slices={num_slices} is too large; plans are limited to {MAX_CHIPS} chips, "
                f"which are {MAX_CHIPS // (x * y * z)} slices of {self.name}."
            )
        m, n, _ = self.machine.grid
        chips = [
            Chip(
                s * x * y * z + i,
                s * self.hosts + (c * (y // n) + b // n) * (x // m) + a // m,
                s,
                (a, b, c),
                self.kind.device_kind,
            )
            for s in range(num_slices)
            for i, (c, b, a) in enumerate(product(range(z), range(y), range(x)))
        ]
        return sorted(chips, key=lambda chip: chip.process_index)


def slice_of(name: str) -> Slice:
    """The slice with a name as in gcloud and xpk: v5p-64, v5litepod-8, v6e-256.

    A slice that fits on one machine has one host. If GKE also offers it with several, append the
    machine type after a colon: v5litepod-8:ct5lp-hightpu-4t has two hosts.

    Raises:
        UserError: there is no such slice.
    """
    match = re.fullmatch(r"(\w+)-([0-9]{1,9})(?::([\w-]+))?", name.replace("v5e-", "v5litepod-"))
    if match is None or match[1] not in KINDS:
        raise UserError(
            f"Unknown tpu_type={name}; expected one like v5p-64. Known types: "
            f"{', '.join(f'{kind}-N' for kind in KINDS)}."
        )
    kind = KINDS[match[1]]
    chips, left = divmod(int(match[2]), kind.named_by)
    machines = {m.name: m for m in kind.machines if _is_made_of(chips, m)}
    if left or chips & (chips - 1) or not machines or chips > kind.largest:
        least = min(m.chips for m in kind.machines)
        sizes = (1 << k for k in range(kind.largest.bit_length()) if 1 << k >= least)
        known = [n * kind.named_by for n in sizes if any(_is_made_of(n, m) for m in kind.machines)]
        raise UserError(
            f"Unknown tpu_type={name}; {match[1]}-N exists for N in {', '.join(map(str, known))}."
        )
    if match[3] and match[3] not in machines:
        raise UserError(
            f"Unknown tpu_type={name}; the machine type of {match[1]}-{match[2]} is "
            f"{' or '.join(machines)}."
        )
    machine = machines[match[3]] if match[3] else _usual(chips, list(machines.values()))
    return Slice(name, kind, _shape(chips, kind), machine)


def _is_made_of(chips: int, machine: Machine) -> bool:
    """Whether a slice can consist of such machines; multi-host slices use those with 4 chips."""
    return chips == machine.chips or (machine.chips == 4 and chips > 4)


def _usual(chips: int, machines: Sequence[Machine]) -> Machine:
    """The machine with all chips if there is one, as in gcloud."""
    return next((m for m in machines if m.chips == chips), machines[0])


def _shape(chips: int, kind: Kind) -> tuple[int, ...]:
    """As close to a square or cube as possible, the longest axis last; 4 chips of v5p are flat."""
    bits, rest = divmod(chips.bit_length() - 1, kind.axes)
    shape = tuple(1 << (bits + (axis >= kind.axes - rest)) for axis in range(kind.axes))
    return (2, 2, 1) if shape == (1, 2, 2) else shape
