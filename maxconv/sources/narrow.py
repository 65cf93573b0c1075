"""64-bit dtypes, which JAX truncates unless its 64-bit mode is on, are converted while reading.

Everything above the sources sees the 32-bit dtype. numpy (ml_dtypes) also rounds float64 to
bfloat16 and float8 by way of float32, so results are bit for bit those of
`array.astype(save_dtype)`.
"""

import numpy as np

from maxconv.errors import ConversionError

# complex64 has 64 bits too, but weights are not complex: planning rejects it.
_NARROW = {np.dtype(f"{kind}8"): np.dtype(f"{kind}4") for kind in "fiu"}


def narrow(dtype: np.dtype) -> np.dtype:
    """The dtype that tensors of a stored dtype are read as."""
    return _NARROW.get(dtype, dtype)


def narrowed(array: np.ndarray, name: str) -> np.ndarray:
    """Stored values of tensor `name`, in the dtype it is read as; floats are rounded to nearest.

    Raises:
        ConversionError: an integer does not fit in 32 bits.
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
    with np.errstate(all="ignore"):  # overflow gives infinity, as in numpy
        return array.astype(dtype)
