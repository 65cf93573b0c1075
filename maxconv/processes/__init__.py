"""The processes of `jax.distributed`: they start, agree and end together."""
