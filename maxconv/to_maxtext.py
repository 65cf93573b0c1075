"""`python -m maxconv.to_maxtext`: a drop-in for MaxText's checkpoint_conversion.to_maxtext.

It takes the same arguments and gives the same result; the README says what is better.
"""

import os
import sys
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from maxconv import cli
from maxconv.config import Config
from maxconv.config.paths import checked_path
from maxconv.errors import UserError
from maxconv.families import bind_rows
from maxconv.jobs.opening import head_differs
from maxconv.jobs.prepare import opened, resolved
from maxconv.sources import open_source
from maxconv.targets.lazy import LazyTensor
from maxconv.targets.orbax import train_state

__all__ = [
    "LazyHFLoader",
    "LazyTensor",
    "LazyTensorHandler",  # noqa: F822  # pyright: ignore[reportUnsupportedDunderAll]
    "get_maxtext_model_info",
    "main",
]


def __getattr__(name: str) -> Any:
    if name != "LazyTensorHandler":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from maxconv.targets.streaming import LazyTensorHandler  # takes an Orbax that was tested

    return LazyTensorHandler


def main(
    args: Sequence[str],
    lazy_load_tensors: bool = True,
    eager_load_method: str = "safetensors",
    hf_model_path: str | None = None,
    revision: str | None = None,
    save_dtype: str = "bfloat16",
    simulated_cpu_devices_count: int | None = None,
) -> None:
    """Converts a checkpoint.

    Args:
        args: a program's name, then MaxText's arguments: `base.yml key=value ...`. They override
            the parameters below.
        lazy_load_tensors: make each leaf when it is written, or all before the save.
        eager_load_method: "safetensors".
        hf_model_path: directory of the checkpoint; else that of MaxText's table for model_name.
        revision: of a model on the Hub.
        save_dtype: "bfloat16", "float32" or "float8_e4m3fn".
        simulated_cpu_devices_count: with hardware=cpu; else as many as the mesh needs, or 16.

    Raises:
        UserError: the arguments or the files are wrong; nothing was written.
        VerificationError: what was written is not what it should be.
    """
    flags = {
        "lazy_load_tensors": lazy_load_tensors,
        "eager_load_method": eager_load_method,
        "hf_model_path": hf_model_path,
        "revision": revision,
        "save_dtype": save_dtype,
        "simulated_cpu_devices_count": simulated_cpu_devices_count,
    }
    given = [f"--{name}={value}" for name, value in flags.items() if value is not None]
    has_name = args and "=" not in args[0] and not args[0].endswith((".yml", ".yaml"))
    cli.convert([*given, *args[1 if has_name else 0 :]])


class LazyHFLoader:
    """Reads tensors of a checkpoint one by one, on this host.

    Args:
        model_id: a directory.
        token, revision: for the Hub.
        save_dtype: what the tensors are cast to.
    """

    def __init__(
        self,
        model_id: str,
        token: str | None,
        revision: str | None = None,
        save_dtype: str = "bfloat16",
    ):
        self.model_id, self.token, self.revision = model_id, token, revision
        self.save_dtype = save_dtype
        path = checked_path("model_id", model_id)
        self.is_local = os.path.isdir(path)
        # A directory has no revisions: MaxText ignores the word, too.
        self.source = open_source(path, None if self.is_local else revision, token)

    def get_tensor(self, key: str) -> np.ndarray:
        """The whole tensor; ValueError when there is none of that name."""
        if key not in self.source.tensors:
            raise ValueError(f"There is no tensor {key!r} in {self.source.root}.")
        return self.source.tensor(key).astype(np.dtype(self.save_dtype), copy=False)


def get_maxtext_model_info(
    config: Config,
) -> tuple[dict[str, tuple[int, tuple[int, ...]]], Any]:
    """MaxText's parameters, from the headers of the checkpoint; of a head that may be the embedding
    table, from both.

    Returns:
        For each parameter, such as `params-decoder-layers-mlp-wi_0-kernel`, its position among the
        leaves of the tree `{"params": ...}` and its shape; and the structure of that tree.

    Raises:
        UserError: with everything that is wrong with the checkpoint.
    """
    with opened(config) as source:
        differs = not config.adapter_alone and head_differs(source, config.model_name)
        model = resolved(config, source, differs)
        shapes = {name: tensor.shape for name, tensor in model.tensors.items()}
        leaves, problems = bind_rows(model.rows, shapes, config.scan_axis)
    if problems:
        raise UserError([f"{source.root}: {problem}." for problem in problems])
    tree = train_state({leaf.name: i for i, leaf in enumerate(leaves)}).params
    order, structure = jax.tree.flatten(tree)
    return {
        "-".join(leaves[i].path): (position, leaves[i].shape) for position, i in enumerate(order)
    }, structure


if __name__ == "__main__":
    cli.script(["convert", *sys.argv[1:]])
