"""`python -m maxconv.to_maxtext`: a drop-in for MaxText's checkpoint_conversion.to_maxtext.

The same words, the same result; see the README for what is better.
"""

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from maxconv import cli
from maxconv.checkpoint import LazyTensor, LazyTensorHandler
from maxconv.config import Config, model_facts
from maxconv.sources import Source, open_source

__all__ = ["LazyHFLoader", "LazyTensor", "LazyTensorHandler", "get_maxtext_model_info", "main"]


def main(
    args: Sequence[str],
    lazy_load_tensors: bool = True,
    eager_load_method: str = "safetensors",
    hf_model_path: str | None = None,
    revision: str | None = None,
    save_dtype: str = "bfloat16",
    simulated_cpu_devices_count: int = 16,
) -> None:
    """Converts a checkpoint.

    Args:
        args: a program's name, then MaxText's words: `base.yml key=value ...`.
        lazy_load_tensors: make each leaf when it is written, or all before the save.
        eager_load_method: "safetensors".
        hf_model_path: directory of the checkpoint; else that of MaxText's table for model_name.
        revision: of a model on the Hub.
        save_dtype: "bfloat16" or "float32".
        simulated_cpu_devices_count: with hardware=cpu.

    Raises:
        UserError: the words or the files are wrong; nothing was written.
    """
    flags = {
        "lazy_load_tensors": lazy_load_tensors,
        "eager_load_method": eager_load_method,
        "hf_model_path": hf_model_path,
        "revision": revision,
        "save_dtype": save_dtype,
        "simulated_cpu_devices_count": simulated_cpu_devices_count,
    }
    words = [f"--{name}={value}" for name, value in flags.items() if value is not None]
    cli.convert([*args[1:], *words])


class LazyHFLoader:
    """Reads tensors of a checkpoint one by one, on this host.

    Args:
        model_id: a directory.
        token, revision: for the Hub.
    """

    def __init__(self, model_id: str, token: str | None = None, revision: str | None = None):
        self.source: Source = open_source(model_id, revision, token)

    def get_tensor(self, key: str) -> np.ndarray:
        """The whole tensor, in its own dtype; KeyError when there is none of that name."""
        return self.source.tensor(key)


def get_maxtext_model_info(config: Config) -> dict[str, Any]:
    """placeholder"""
    return dict(model_facts(config.model_name) or {})


if __name__ == "__main__":
    sys.exit(cli.run(lambda: cli.convert(sys.argv[1:])))
