"""A checkpoint as transformers loads it: the whole model in memory, with the names of its classes.

For checkpoints that only transformers can read. Needs torch and transformers, and RAM for the whole
model on each host.
"""

import hashlib
from collections.abc import Mapping, Sequence
from importlib import import_module  # neither torch nor transformers is a dependency
from typing import Any

import ml_dtypes
import numpy as np

from maxconv.algebra.boxes import slices
from maxconv.errors import UserError
from maxconv.sources.base import Part, Source, TensorInfo, bit_views
from maxconv.sources.narrow import narrow, narrowed

SAMPLE = 64 << 10  # bytes of a tensor that its fingerprint covers

_NUMPY = {"torch.bfloat16": ml_dtypes.bfloat16, "torch.float8_e4m3fn": ml_dtypes.float8_e4m3fn}


class TransformersSource(Source):
    """The state dict of a model that transformers loads from a directory or the Hub.

    Raises:
        UserError: the libraries are not installed, or transformers cannot load the model.
    """

    def __init__(self, path: str, revision: str | None = None, token: str | None = None):
        super().__init__()
        self.root, self.revision, self.notices = path, revision, ()
        model = _loaded(path, revision, token)
        self.config = model.config.to_dict()
        self._arrays = {name: _array(tensor) for name, tensor in model.state_dict().items()}
        self.tensors = {
            name: TensorInfo(name, narrow(array.dtype), array.shape)
            for name, array in self._arrays.items()
        }

    def read(self, info: TensorInfo, parts: Sequence[Part]) -> None:
        for box, array in bit_views(info, parts):
            array[...] = narrowed(self._arrays[info.name][slices(box)], info.name).view(array.dtype)
            self.stats.add(array.nbytes, 1)

    def fingerprints(self) -> Mapping[str, str]:
        """A digest of the first bytes of each tensor."""
        arrays = self._arrays.items()
        return {
            name: hashlib.sha256(array.reshape(-1).view(np.uint8)[:SAMPLE].data).hexdigest()
            for name, array in arrays
        }

    def close(self) -> None:
        pass


def _loaded(path: str, revision: str | None, token: str | None) -> Any:
    try:
        import_module("torch")
        transformers: Any = import_module("transformers")
    except ImportError as error:
        raise UserError(
            f"--eager_load_method=transformers needs {error.name}: pip install "
            "'maxconv[transformers]', or remove the option to read the safetensors files directly."
        ) from None
    options: Mapping[str, Any] = {"revision": revision, "token": token, "dtype": "auto"}
    try:
        config = transformers.AutoConfig.from_pretrained(path, revision=revision, token=token)
        kind = getattr(transformers, (config.architectures or ["AutoModelForCausalLM"])[0])
        return kind.from_pretrained(path, **options)
    except (AttributeError, OSError, ValueError) as error:
        why = str(error).partition("\n")[0]
        raise UserError(f"transformers cannot load {path}: {why}") from None


def _array(tensor: Any) -> np.ndarray:
    """A torch tensor's memory as an array, without a copy."""
    torch: Any = import_module("torch")
    flat = tensor.detach().cpu().contiguous()
    dtype = np.dtype(_NUMPY.get(str(flat.dtype)) or str(flat.dtype).removeprefix("torch."))
    return flat.view(torch.uint8).numpy().reshape(-1).view(dtype).reshape(tuple(tensor.shape))
