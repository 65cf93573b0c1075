"""Private parts of jaxlib, which is of the same release as JAX.

Imports no more than that: the coordinator starts with it alone.
"""

from typing import Any

from maxconv.private import private_parts

with private_parts("jax"):
    # JAX's coordination service, made by `get_distributed_runtime_service`, runs in a process of
    # its own, as all others abort when that of process 0 ends; JAX has no option for it.
    from jaxlib import _jax as module  # pyright: ignore[reportAttributeAccessIssue]

_jax: Any = module

__all__ = ["_jax"]
