"""Private parts of JAX."""

from maxconv.private import private_parts

with private_parts("jax"):
    # Detects the cluster before joining it, to be able to report which processes are awaited:
    # jax.distributed.initialize() does both in one call.
    from jax._src import clusters

    # Its client has barriers with a timeout and a key-value store, without a public API. They let
    # all processes exit together, whatever their devices are doing.
    from jax._src.distributed import global_state

__all__ = ["clusters", "global_state"]
