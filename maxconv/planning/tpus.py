"""TPU slices that are not here: enough of their chips for MaxText's mesh and a plan over it.

Sizes are those of Google's pages cloud.google.com/tpu/docs/{v5e,v5p,v6e} and of their machine
types with four chips a host, of which slices of several hosts are made.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

from maxconv.errors import UserError


@dataclass(frozen=True)
class Kind:
    """A generation of TPUs.

    Attributes:
        device_kind: JAX's name of its chips.
        named_by: what the number in a type counts, per chip: 2 TensorCores, or 1.
        axes: of the torus, or mesh, that the chips of a slice are.
        largest: chips in a slice.
        hbm: bytes of a chip.
        host_ram: bytes of a host with four chips.
        network: bytes a second between such a host and the data center.
    """

    device_kind: str
    named_by: int
    axes: int
    largest: int
    hbm: int
    host_ram: int
    network: float


_GIB = 1 << 30
_GBIT = 1e9 / 8
KINDS = {
    "v5litepod": Kind("TPU v5 lite", 1, 2, 256, 16 * _GIB, 192 * _GIB, 4 * 25 * _GBIT),
    "v5p": Kind("TPU v5", 2, 3, 4096, 95 * _GIB, 448 * _GIB, 4 * 50 * _GBIT),
    "v6e": Kind("TPU v6 lite", 1, 2, 256, 32 * _GIB, 720 * _GIB, 4 * 100 * _GBIT),
}
CHIPS_PER_HOST = 4


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
    """A type of slice, such as v5p-64: `shape` is how its chips are wired, x first."""

    name: str
    kind: Kind
    shape: tuple[int, ...]

    @property
    def hosts(self) -> int:
        return math.prod(self.shape) // CHIPS_PER_HOST

    def chips(self, num_slices: int = 1) -> Sequence[Chip]:
        """The chips of so many slices, host by host: a host has a square of four of them."""
        x, y, z = (*self.shape, 1)[:3]
        chips = [
            Chip(
                s * x * y * z + i,
                s * self.hosts + (c * (y // 2) + b // 2) * (x // 2) + a // 2,
                s,
                (a, b, c),
                self.kind.device_kind,
            )
            for s in range(num_slices)
            for i, (c, b, a) in enumerate(product(range(z), range(y), range(x)))
        ]
        return sorted(chips, key=lambda chip: chip.process_index)


def slice_of(name: str) -> Slice:
    """The slice that gcloud and xpk call so.

    Raises:
        UserError: there is none of that name.
    """
    kinds = ", ".join(KINDS)
    match = re.fullmatch(r"(\w+)-(\d+)", name.replace("v5e-", "v5litepod-"))
    if match is None or match[1] not in KINDS:
        raise UserError(f"tpu_type={name} is no type of slice; say KIND-N, of {kinds}.")
    kind = KINDS[match[1]]
    chips, left = divmod(int(match[2]), kind.named_by)
    if left or chips & (chips - 1) or not CHIPS_PER_HOST <= chips <= kind.largest:
        least, most = (n * kind.named_by for n in (CHIPS_PER_HOST, kind.largest))
        raise UserError(
            f"tpu_type={name}: a plan can be made for powers of two, {match[1]}-{least} to "
            f"{match[1]}-{most}."
        )
    # As near to a square or cube as it goes; the longest axis last, but flat if it can be.
    bits, rest = divmod(chips.bit_length() - 1, kind.axes)
    shape = [1 << (bits + (axis >= kind.axes - rest)) for axis in range(kind.axes)]
    return Slice(name, kind, (2, 2, 1) if shape == [1, 2, 2] else tuple(shape))
