"""Dtypes of 64 bits, which JAX truncates unless its 64-bit mode is on: converted as they are read.

Everything above the sources sees the dtype of 32 bits. numpy (ml_dtypes) rounds float64 to bfloat16
and to float8 by way of float32 as well, so what is made of the result is bit for bit what
`array.astype(save_dtype)` gives.
"""

import numpy as np

from maxconv.errors import ConversionError

# complex64 has 64 bits, too, but no weight is complex: the plan refuses it.
_NARROW = {np.dtype(f"{kind}8"): np.dtype(f"{kind}4") for kind in "fiu"}


def narrow(dtype: np.dtype) -> np.dtype:
    """The dtype in which tensors of a stored dtype are read."""
    return _NARROW.get(dtype, dtype)


def narrowed(array: np.ndarray, name: str) -> np.ndarray:
    """An array of a tensor in the dtype in which it is read: floats are rounded to nearest.

    Raises:
        ConversionError: integers that do not fit in 32 bits, naming the tensor.
    """
    dtype = narrow(array.dtype)
    if dtype == array.dtype:
        return array
    if dtype.kind in "iu" and array.size:
        limits, low, high = np.iinfo(dtype), int(array.min()), int(array.max())
        if low < limits.min or high > limits.max:
            value = low if low < limits.min else high
            raise ConversionError(
                f"Tensor {name!r} holds {value}, which does not fit in {dtype}, the widest integer "
                f"of JAX's default mode; store it as {dtype} with values in range"
            )
    with np.errstate(all="ignore"):  # too large is infinite, as in numpy
        return array.astype(dtype)
