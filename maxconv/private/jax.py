"""Private parts of JAX."""

from maxconv.private import private_parts

with private_parts("jax"):
    # The processes of a TPU job are found before joining them, so that a person can be told whom
    # this process waits for: jax.distributed.initialize() finds and joins at once.
    from jax._src import clusters

    # Its client has barriers with a timeout and a key-value store, which JAX offers to nobody:
    # processes end together through them, whatever their devices are doing.
    from jax._src.distributed import global_state

__all__ = ["clusters", "global_state"]
