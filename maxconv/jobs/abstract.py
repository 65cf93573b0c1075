"""MaxText's parameters as shapes, dtypes and shardings, for programs that load them."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from maxconv.algebra import tensors
from maxconv.config import model_facts, parse
from maxconv.config.mesh import partition_spec
from maxconv.config.paths import read_path
from maxconv.config.tables import known_models
from maxconv.jobs.leaves import conversion_leaves
from maxconv.jobs.loadable import identified, model_of, open_at
from maxconv.jobs.opening import head_differs, opened_by_all
from maxconv.models import relayout
from maxconv.models.canonical_names import FP8
from maxconv.models.resolve import resolve
from maxconv.models.tree_sizes import ROOT
from maxconv.planning.plan import Leaf
from maxconv.processes.agreement import same_error_everywhere
from maxconv.sources.trees import TreeSource


def abstract(
    model: str,
    *,
    mesh: Mesh,
    scan_layers: bool | None = None,
    param_scan_axis: int | None = None,
    dtype: Any = None,
    rules: Sequence[Any] | None = None,
    hf_model_path: str | None = None,
    token: str | None = None,
    revision: str | None = None,
    **sizes: Any,
) -> dict[str, Any]:
    """MaxText's parameters of a model as shapes, dtypes and shardings; no weights are read.

    Args:
        model: MaxText's model_name, such as "qwen3-4b", or a checkpoint of Hugging Face or of
            MaxText: a directory, gs://bucket/path, or org/name on the Hub, of which only headers
            are read; or the path of a config.json.
        mesh: over which the parameters are sharded.
        scan_layers, param_scan_axis: as in MaxText: whether layers are stacked, and where.
            Default: as in a checkpoint of MaxText, else True and 1.
        dtype: of weights; some parameters have one of their own. Default: as in a checkpoint of
            MaxText, else bfloat16.
        rules: MaxText's logical_axis_rules; default: those of its base.yml, and of the model of
            that name. Mesh axes that the mesh does not have are left out.
        hf_model_path: see `stream`.
        token, revision: for the Hub.
        sizes: MaxText's arguments that change the model, such as use_multimodal=True.

    Returns:
        The tree `{"params": {"decoder": ...}}` of `jax.ShapeDtypeStruct`.

    Raises:
        UserError: with everything that does not match.
    """
    name = model if model in known_models() else None
    facts = model_facts(name)
    path = facts["hf_id"] if facts else read_path(model)
    if rules is None:
        rules = parse([f"model_name={name}"] if name else ()).logical_axis_rules
    with opened_by_all(partial(open_at, path, token, revision)) as source:
        if isinstance(source, TreeSource):
            of = partial(model_of, path=hf_model_path, token=token, revision=revision)
            found, was = identified(source, of)
            axis = relayout.scan_axis(scan_layers, param_scan_axis, was)
            leaves = [*_of_tree(source, found.rows, was, axis, mesh, rules, dtype)]
        else:
            differs = head_differs(source, name)
            axis = relayout.scan_axis(scan_layers, param_scan_axis, 1)
            with same_error_everywhere():
                to = "bfloat16" if dtype is None else dtype
                found = resolve(source, name, facts, sizes, np.dtype(to) == FP8, differs)
                leaves, _ = conversion_leaves(source, found, mesh, rules, axis, to)
    tree: dict[str, Any] = {}
    for leaf in leaves:
        *above, last = leaf.name.split(".")[1:]
        inner = tree
        for part in above:
            inner = inner.setdefault(part, {})
        inner[last] = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
    return tree


def _of_tree(
    tree: TreeSource,
    rows: Sequence[Any],
    was: int | None,
    axis: int | None,
    mesh: Mesh,
    rules: Sequence[Any],
    dtype: Any,
) -> Iterator[Leaf]:
    """The parameters of a checkpoint of MaxText, stacked along another axis."""
    shapes = {name: info.shape for name, info in tree.tensors.items()}
    for path, logical, expr, own in relayout.moved(rows, rows, shapes, was, axis).leaves:
        stored = tree.tensors[next(tensors(expr)).name].dtype
        to = stored if dtype is None or stored.kind in "iub" else np.dtype(own or dtype)
        spec, _ = partition_spec(logical, expr.shape, dict(mesh.shape), rules)
        yield Leaf(f"{ROOT}{path}", expr, to, NamedSharding(mesh, spec))
