"""Private parts of jaxlib, which has the same version as JAX.

Does not import JAX: the coordinator process needs jaxlib only.
"""

from typing import Any

from maxconv.private import private_parts

with private_parts("jax"):
    # JAX's coordination service, from `get_distributed_runtime_service`, runs in a process of its
    # own, because all processes abort when the service ends; JAX has no option for that.
    from jaxlib import _jax as module  # pyright: ignore[reportAttributeAccessIssue]

_jax: Any = module

__all__ = ["_jax"]
