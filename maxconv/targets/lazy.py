"""Arrays that are computed only when they are written."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from maxconv.algebra import Box


class LazyTensor:
    """A leaf that has not been computed yet: its shape, dtype and sharding, and how to make it.

    Attributes:
        shape, dtype, name, sharding: of the array. The default sharding is a single device.
        parts: the parts in which it is made and written, each with a function that maps a box of
            the part to a box of the whole.
        group: id of the parts that are made together, when the first of them is loaded; or None.
    """

    def __init__(
        self,
        load_fn: Callable[[], Any],
        shape: Sequence[int],
        dtype: Any,
        name: str = "unknown",
        sharding: jax.sharding.Sharding | None = None,
        parts: Sequence["Part"] = (),
        group: int | None = None,
    ):
        self._load_fn = load_fn
        self.group = group
        self.parts = parts or [(lambda box: box, self)]
        self.shape = tuple(shape)
        self.dtype = np.dtype(dtype)
        self.name = name
        self.sharding = sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def itemsize(self) -> int:
        """Bytes of an element."""
        return self.dtype.itemsize

    @property
    def nbytes(self) -> int:
        """Bytes of the whole array, over all devices."""
        return self.size * self.itemsize

    @property
    def local_nbytes(self) -> int:
        """Bytes of the array on the devices of this process."""
        shard = math.prod(self.sharding.shard_shape(self.shape)) * self.itemsize
        return shard * len(self.sharding.addressable_devices)

    def load(self) -> jax.Array:
        """Makes the array; ValueError if its shape, dtype or sharding is not as declared."""
        array = self._load_fn()
        if not isinstance(array, jax.Array):
            array = jax.device_put(array, self.sharding)
        if (array.shape, array.dtype) != (self.shape, self.dtype):
            raise ValueError(
                f"{self.name} is declared as {self.shape} {self.dtype}, "
                f"but is {array.shape} {array.dtype}"
            )
        if not array.sharding.is_equivalent_to(self.sharding, self.ndim):
            raise ValueError(f"{self.name} has {array.sharding} instead of {self.sharding}")
        return array

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self.load(), dtype=dtype)

    def __repr__(self) -> str:
        return f"LazyTensor({self.name!r}, {self.shape}, {self.dtype})"


Part = tuple[Callable[[Box], Box], LazyTensor]
