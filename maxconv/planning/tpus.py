"""TPU slices that are not here: enough of their chips for MaxText's mesh and a plan over it.

Chips and topologies are those of Google's pages docs.cloud.google.com/tpu/docs/{v5e,v5p,v6e}: HBM,
the chips of a pod, and the network of a physical host by its chips. Their tables of machine types
have the RAM. libtpu numbers the chips alike (see the tests).
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

from maxconv.errors import UserError

MAX_CHIPS = 1 << 14  # of all slices together, for which a plan is made: it takes about a minute


@dataclass(frozen=True)
class Machine:
    """A machine type with TPU chips, one host of a slice.

    Attributes:
        name: of Compute Engine and GKE.
        grid: chips along each axis.
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
        named_by: what the number in a slice's name counts, per chip: 2 TensorCores, or 1.
        axes: dimensions of the torus, or mesh, of chips.
        largest: chips in the largest slice.
        hbm: bytes of memory of a chip.
        network: bytes a second between a host and the data center, for each of its chips.
        machines: machine types with 4 chips, of which slices of several hosts are made, first.
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
    """What JAX asks a device's backend: it takes the first host for the one it runs on."""

    platform = "tpu"

    def process_index(self) -> int:
        return 0


@dataclass(frozen=True)
class Chip:
    """What JAX and MaxText's mesh ask of a device, of a chip that is only thought of."""

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

    `shape`: how its chips are wired, x first. `machine`: what each of its hosts is.
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
        """Bytes a second between a host and the data center."""
        return self.kind.network * self.machine.chips

    def chips(self, num_slices: int = 1) -> Sequence[Chip]:
        """The chips of `num_slices` such slices, host by host.

        Raises:
            UserError: they are more than MAX_CHIPS.
        """
        x, y, z = (*self.shape, 1)[:3]
        if num_slices * x * y * z > MAX_CHIPS:
            raise UserError(
                f"num_slices={num_slices}: a plan can be made for at most {MAX_CHIPS} chips, which "
                f"are {MAX_CHIPS // (x * y * z)} slices of {self.name}."
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
    """The slice that gcloud and xpk call so: v5p-64, v5litepod-8, v6e-256.

    A slice that one machine type holds is one host. Where GKE also makes it of several, a machine
    type after a colon says so: v5litepod-8:ct5lp-hightpu-4t has two hosts.

    Raises:
        UserError: there is no such slice.
    """
    match = re.fullmatch(r"(\w+)-([0-9]{1,9})(?::([\w-]+))?", name.replace("v5e-", "v5litepod-"))
    if match is None or match[1] not in KINDS:
        raise UserError(
            f"Unknown tpu_type={name}; expected one like v5p-64. Known are {', '.join(KINDS)}, "
            "each with a number."
        )
    kind = KINDS[match[1]]
    chips, left = divmod(int(match[2]), kind.named_by)
    machines = {m.name: m for m in kind.machines if _is_made_of(chips, m)}
    if left or chips & (chips - 1) or not machines or chips > kind.largest:
        least = min(m.chips for m in kind.machines)
        sizes = (1 << k for k in range(kind.largest.bit_length()) if 1 << k >= least)
        known = [n * kind.named_by for n in sizes if any(_is_made_of(n, m) for m in kind.machines)]
        raise UserError(
            f"Unknown tpu_type={name}; a plan can be made for {match[1]}-N, where N is one of "
            f"{', '.join(map(str, known))}."
        )
    if match[3] and match[3] not in machines:
        raise UserError(
            f"tpu_type={name}: {match[1]}-{match[2]} can be made of {' or '.join(machines)}."
        )
    machine = machines[match[3]] if match[3] else _usual(chips, list(machines.values()))
    return Slice(name, kind, _shape(chips, kind), machine)


def _is_made_of(chips: int, machine: Machine) -> bool:
    """Slices of several hosts are made of machines with four chips only."""
    return chips == machine.chips or (machine.chips == 4 and chips > 4)


def _usual(chips: int, machines: Sequence[Machine]) -> Machine:
    """One host if one machine holds all chips, as gcloud makes it."""
    return next((m for m in machines if m.chips == chips), machines[0])


def _shape(chips: int, kind: Kind) -> tuple[int, ...]:
    """As near to a square or cube as it goes; the longest axis last, but flat if it can be."""
    bits, rest = divmod(chips.bit_length() - 1, kind.axes)
    shape = tuple(1 << (bits + (axis >= kind.axes - rest)) for axis in range(kind.axes))
    return (2, 2, 1) if shape == (1, 2, 2) else shape
