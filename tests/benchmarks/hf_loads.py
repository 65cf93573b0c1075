"""Loads the tensors of a Hugging Face checkpoint into arrays over 8 simulated devices.

    python hf_loads.py maxconv|orbax DIR

Each tensor is divided along its first axis that 8 divides. Run by load_beside.py.
"""

import os
import sys
from pathlib import Path
from typing import Any

DEVICES = 8
os.environ |= {
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": f"--xla_force_host_platform_device_count={DEVICES}",
}

import jax  # noqa: E402
import numpy as np  # noqa: E402
from jax.sharding import Mesh, NamedSharding, PartitionSpec  # noqa: E402
from safetensors import safe_open  # noqa: E402


def abstract(directory: Path) -> dict[str, jax.ShapeDtypeStruct]:
    """Every tensor, by name."""
    mesh = Mesh(np.array(jax.devices()), ("x",))
    found: dict[str, jax.ShapeDtypeStruct] = {}
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, "numpy") as opened:
            for name in opened.keys():
                shape = opened.get_slice(name).get_shape()
                at = next((i for i, n in enumerate(shape) if n % DEVICES == 0), None)
                spec = PartitionSpec(*("x" if i == at else None for i in range(len(shape))))
                sharding = NamedSharding(mesh, spec)
                found[name] = jax.ShapeDtypeStruct(tuple(shape), "bfloat16", sharding=sharding)
    return found


def loaded(side: str, directory: Path) -> Any:
    wanted = abstract(directory)
    if side == "maxconv":
        import maxconv

        return maxconv.load(str(directory), wanted, layout="hf")
    from orbax.checkpoint import v1 as ocp

    layout = ocp.options.CheckpointLayout.SAFETENSORS
    with ocp.Context(checkpoint_layout=layout):
        return ocp.load(str(directory), wanted)


if __name__ == "__main__":
    arrays = jax.block_until_ready(loaded(sys.argv[1], Path(sys.argv[2])))
    print(sum(array.nbytes for array in jax.tree.leaves(arrays)))
