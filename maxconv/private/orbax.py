"""Private parts of Orbax: a save of leaves that are made while it runs.

Its public saves want arrays that are all there, or write each group of them as a checkpoint of its
own, to be merged (targets/partial_save.py has what that costs).
"""

from collections.abc import Sequence
from typing import Any

from maxconv.private import private_parts

with private_parts("orbax-checkpoint"):
    # Writes begin in the background, once Orbax has made their directory.
    from orbax.checkpoint._src.futures import future

    # The journal has metadata in the form in which Orbax wants it back.
    from orbax.checkpoint._src.metadata import array_metadata_store

    # The index of a process as Orbax names files by it.
    from orbax.checkpoint._src.multihost import multihost

    # The writer of arrays, which takes them from host memory one by one, and what it is told.
    from orbax.checkpoint._src.serialization import jax_array_handlers, replica_slices
    from orbax.checkpoint._src.serialization import types as types_v0

    # A type of leaf of our own, and the handler of trees, whose set of leaf types is no option.
    from orbax.checkpoint.experimental.v1._src.handlers import pytree_handler
    from orbax.checkpoint.experimental.v1._src.serialization import array_leaf_handler
    from orbax.checkpoint.experimental.v1._src.serialization import registry as leaf_registry

__all__ = [
    "array_leaf_handler",
    "array_metadata_store",
    "future",
    "jax_array_handlers",
    "leaf_registry",
    "multihost",
    "pytree_handler",
    "replica_slices",
    "serialize",
    "types_v0",
]


class _Taken:
    """Takes the place of a metadata store: Orbax before 0.12.5 tells nobody else."""

    def __init__(self) -> None:
        self.metadata: Sequence[Any] = ()

    async def write(self, *, array_metadatas: Sequence[Any], **_: Any) -> None:
        self.metadata = array_metadatas


async def serialize(
    arrays: Sequence[replica_slices.ReplicaSlices],
    infos: Sequence[types_v0.ParamInfo],
    args: Sequence[types_v0.SaveArgs],
    **options: Any,
) -> Sequence[Any]:
    """Writes arrays that are in host memory; returns the metadata of each, which is not written."""
    taken: Any = _Taken()
    await jax_array_handlers._async_serialize_replica_slices(
        arrays, infos, args, array_metadata_store=taken, ext_metadata={}, **options
    )
    return taken.metadata
