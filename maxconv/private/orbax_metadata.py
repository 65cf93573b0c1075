"""Private parts of Orbax: the metadata that a save writes with the arrays, for verification."""

from maxconv.private import private_parts

with private_parts("orbax-checkpoint"):
    # The serialized form of a sharding.
    from orbax.checkpoint._src.metadata import sharding

    # The handler that a checkpoint names as the one it was saved with.
    from orbax.checkpoint.experimental.v1._src.handlers.pytree_handler import PyTreeHandler

__all__ = ["PyTreeHandler", "sharding"]
