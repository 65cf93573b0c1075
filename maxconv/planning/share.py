"""An array divided among processes along its rows, and how it gets to where it is needed."""

from collections.abc import Iterator
from dataclasses import dataclass

import jax
import numpy as np
from jax import lax
from jax.sharding import NamedSharding

from maxconv.algebra import Box, Interval, Shape


@dataclass(frozen=True)
class Share:
    """An array divided into equal shares along one axis, its rows.

    If the rows are sharded, each shard of them (a block) is divided separately. A share may have
    fewer rows than another; it is then padded with zeros when it is read.

    Attributes:
        axis: of the rows.
        inner: rows per lane when lanes and rows are flattened into one axis, (lanes * inner, ...);
            else 0.
        block: number of rows in a block.
        shares: number of shares of a block.
        rows: number of rows of the longest share.
        unit: number of rows that are not divided: those of a chunk.
        moves: pairs of a mesh axis and the array axis that it shards, in the order of their
            all-to-alls.
        copies: mesh axes over which the array is replicated.
        sharding: of the array as it is read, (..., blocks, shares * rows, ...).
    """

    axis: int
    inner: int
    block: int
    shares: int
    rows: int
    unit: int
    moves: tuple[tuple[str, int], ...]
    copies: tuple[str, ...]
    sharding: NamedSharding

    def shape(self, needed: Shape) -> Shape:
        """The shape of the array as it is read."""
        if self.inner:
            needed = (needed[0] * self.inner, *needed[2:])
        blocks, rows = needed[self.axis] // self.block, self.shares * self.rows
        return (*needed[: self.axis], blocks, rows, *needed[self.axis + 1 :])

    def needed(self, box: Box) -> Iterator[tuple[int, Box]]:
        """The contents of a share, given as a box of the array as it is read: pairs of the first
        row within the share and a box of the array."""
        (block, _), (lo, _) = box[self.axis : self.axis + 2]
        first, end = (block * self.block + at for at in self._rows(lo // self.rows))
        rest = box[self.axis + 2 :]
        if not self.inner:
            yield 0, (*box[: self.axis], (first, end), *rest)
            return
        at = first
        while at < end:
            lane, row = divmod(at, self.inner)
            lanes = 0 if row else (end - at) // self.inner
            rows = lanes * self.inner or min(self.inner - row, end - at)
            yield (
                at - first,
                ((lane, lane + max(lanes, 1)), (row, row + rows // max(lanes, 1)), *rest),
            )
            at += rows

    def _rows(self, share: int) -> Interval:
        """The rows of a block that belong to a share."""
        units = -(-self.block // self.unit)
        first, end = (i * units // self.shares * self.unit for i in (share, share + 1))
        return min(first, self.block), min(end, self.block)

    def exchanged(self, x: jax.Array, to: NamedSharding) -> jax.Array:
        """Redistributes shares to the array's own sharding, `to`; for use in a jitted function."""

        def on_device(x: jax.Array) -> jax.Array:
            x = lax.squeeze(x, [self.axis])
            for name, axis in self.moves:
                x = lax.all_to_all(x, name, axis, self.axis, tiled=True)
            if self.copies:
                x = lax.all_gather(x, self.copies, axis=self.axis, tiled=True)
            x = self._without_gaps(x)
            return x.reshape(-1, self.inner, *x.shape[1:]) if self.inner else x

        on_mesh = jax.shard_map(
            on_device,
            mesh=to.mesh,
            in_specs=self.sharding.spec,
            out_specs=to.spec,
            check_vma=False,  # it cannot infer that gathered values are equal on all devices
        )
        # Else XLA would exchange it in the layout of the next op, which is mostly padding.
        return lax.optimization_barrier(on_mesh(x))

    def _without_gaps(self, x: jax.Array) -> jax.Array:
        """The rows of a block, of shares one after another."""
        if self.block == self.shares * self.rows:
            return x
        at = (self.rows * i + np.arange(len(range(*self._rows(i)))) for i in range(self.shares))
        index = (*[slice(None)] * self.axis, np.concatenate([*at]))
        return x.at[index].get(
            mode="promise_in_bounds", unique_indices=True, indices_are_sorted=True
        )
