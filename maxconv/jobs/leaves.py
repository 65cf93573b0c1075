"""The leaves of a conversion: a model's parameters, with dtype and training sharding."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh, NamedSharding

from maxconv.config.mesh import partition_spec
from maxconv.errors import UserError
from maxconv.models.canonical_names import misfit, saved_dtype
from maxconv.models.parameters import Expressions, parameters
from maxconv.models.resolve import Model
from maxconv.planning.plan import Leaf
from maxconv.sources import Source


def conversion_leaves(
    source: Source,
    model: Model,
    mesh: Mesh,
    rules: Sequence[Any],
    scan_axis: int | None = 1,
    save_dtype: np.dtype | str = "bfloat16",
) -> tuple[list[Leaf], list[str]]:
    """The leaves of a MaxText checkpoint, and notices about axes that stay replicated.

    Args:
        source: the checkpoint.
        model: its model.
        mesh: MaxText's training mesh.
        rules: MaxText's logical axis rules.
        scan_axis: param_scan_axis, or None for unscanned layers.
        save_dtype: of the leaves.

    Raises:
        UserError: with everything that does not match.
    """
    expressions, to_save = Expressions(model, source), np.dtype(save_dtype)
    dtypes = expressions.dtypes
    leaves, notices, problems = list[Leaf](), dict[str, None](), dict[str, None]()
    for parameter in parameters(model, source.root, scan_axis):
        expr = expressions.of(parameter, to_save)
        spec, dropped = partition_spec(parameter.logical, expr.shape, dict(mesh.shape), rules)
        dtype = np.dtype(parameter.dtype or saved_dtype(expr, dtypes, to_save))
        if (problem := misfit(expr, dtypes, dtype)) is not None:
            problems[f"{source.root}: {problem}."] = None
        leaves.append(Leaf(parameter.name, expr, dtype, NamedSharding(mesh, spec)))
        is_kv = parameter.path[-2:-1] in (("key",), ("value",))
        notices |= {_undivided(why, is_kv): None for why in dropped}
    if problems:
        raise UserError(list(problems))
    return leaves, list(notices)


def _undivided(why: str, is_kv: bool) -> str:
    """What comes of an axis that a mesh axis does not divide; `is_kv`: of keys or values."""
    if is_kv and why.startswith("kv_heads "):  # layers/attentions.py, _validate_kv_head_sharding
        return f"{why}: MaxText refuses to train on this mesh; convert and train with another"
    return f"{why}, so this axis is replicated there"
