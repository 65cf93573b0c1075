"""Private parts of Orbax: what a save writes beside the arrays, for verify to compare."""

from maxconv.private import private_parts

with private_parts("orbax-checkpoint"):
    # How a sharding is written down.
    from orbax.checkpoint._src.metadata import sharding

    # The handler that a checkpoint says it was saved with.
    from orbax.checkpoint.experimental.v1._src.handlers.pytree_handler import PyTreeHandler

__all__ = ["PyTreeHandler", "sharding"]
