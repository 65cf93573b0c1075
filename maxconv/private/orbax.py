"""Private parts of Orbax: saving leaves that are computed during the save.

Its public API needs all arrays beforehand, or writes each group of them as a separate checkpoint to
be merged later (for the cost of that see targets/partial_save.py).
"""

from collections.abc import Sequence
from typing import Any

from maxconv.private import private_parts

with private_parts("orbax-checkpoint"):
    # Writes start in the background once Orbax has created their directory.
    from orbax.checkpoint._src.futures import future

    # The journal stores array metadata in Orbax' own format.
    from orbax.checkpoint._src.metadata import array_metadata_store

    # The process index that Orbax uses in file names.
    from orbax.checkpoint._src.multihost import multihost

    # The writer of arrays, which takes them from host memory one by one, and its arguments.
    from orbax.checkpoint._src.serialization import jax_array_handlers, replica_slices
    from orbax.checkpoint._src.serialization import types as types_v0

    # Registers our own leaf type with the tree handler, for which there is no public option.
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
    """Stands in for a metadata store: Orbax before 0.12.5 returns the metadata in no other way."""

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
    """Writes arrays from host memory; returns the metadata of each instead of writing it."""
    taken: Any = _Taken()
    await jax_array_handlers._async_serialize_replica_slices(
        arrays, infos, args, array_metadata_store=taken, ext_metadata={}, **options
    )
    return taken.metadata
