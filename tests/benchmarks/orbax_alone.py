"""Orbax by itself: its safetensors loader, then its save, of the tensors as they are.

    python tests/benchmarks/orbax_alone.py SOURCE OUT

Eight simulated devices, each tensor sharded along its first axis that they divide; uncompressed, in
the format of MaxText's checkpoints. Nothing is transformed or stacked, and all of it is held.
"""

import sys
from collections.abc import Sequence

import jax
from jax.sharding import NamedSharding, PartitionSpec
from orbax.checkpoint import v1 as ocp

from maxconv.targets import orbax

DEVICES = 8


def spec(shape: Sequence[int]) -> PartitionSpec:
    even = [i for i, size in enumerate(shape) if size % DEVICES == 0]
    return PartitionSpec(*[None] * even[0], "fsdp") if even else PartitionSpec()


def main(source: str, out: str) -> None:
    jax.config.update("jax_num_cpu_devices", DEVICES)
    mesh = jax.make_mesh((DEVICES,), ("fsdp",))
    with ocp.Context(checkpoint_layout=ocp.options.CheckpointLayout.SAFETENSORS):
        wanted = {
            name: jax.ShapeDtypeStruct(
                tensor.shape, tensor.dtype, sharding=NamedSharding(mesh, spec(tensor.shape))
            )
            for name, tensor in ocp.metadata(source).metadata.items()
        }
        arrays = ocp.load(source, wanted)
    with orbax.context():
        ocp.save(out, arrays)


if __name__ == "__main__":
    main(*sys.argv[1:])
