"""The model that a tree of MaxText is of, found from its leaves and the same model as published."""

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from maxconv.errors import UserError
from maxconv.models import tree_sizes
from maxconv.models.parameters import parameters
from maxconv.models.resolve import Model, resolve
from maxconv.models.tree_sizes import Leaves
from maxconv.sources import Source

LAYERS = "base_num_decoder_layers"
HEAD_LEAF = "decoder.logits_dense.kernel"
_SIZES = (LAYERS, "vocab_size")  # those that may differ from the published model's


def tree_model(
    leaves: Leaves,
    root: str,
    plain: Source,
    keeps_fp8: bool,
    name: str | None,
    facts: Mapping[str, Any],
    sizes: Mapping[str, Any],
    scan_axis: int,
) -> tuple[Model, int | None]:
    """The model of a tree, and the axis along which its layers are stacked; None if they are not.

    Args:
        leaves: of the tree.
        root: the path of the tree, for messages.
        plain: the same model at Hugging Face, as it is stored if fp8 is kept, else unpacked.
        keeps_fp8: whether the tree has fp8 weights, with their scales.
        name, facts, sizes: MaxText's model_name, its configuration, and sizes given as arguments,
            see `resolve`.
        scan_axis: MaxText's param_scan_axis, if layers are stacked.

    Raises:
        UserError: with all that the tree, the published model and the arguments contradict.
    """
    shown = {**tree_sizes.parts(leaves), **sizes}

    def resolved(name: str | None, facts: Mapping[str, Any], given: Mapping[str, Any]) -> Model:
        return resolve(plain, name, facts, given, keeps_fp8, head_differs=HEAD_LEAF in leaves)

    try:
        model = resolved(name, facts, shown)
        count, axis = tree_sizes.layout(leaves, model, scan_axis)
        if count < model.dims.layers and LAYERS not in sizes:
            shown[LAYERS] = count // model.family.layers_per_block
            model = resolved(name, facts, shown)
        return model, axis
    except UserError as error:
        found = error.problems
    contradictions: list[str] = []
    try:  # without the tree, then without the arguments: each contradiction by itself
        resolved(name, facts, sizes)
    except UserError as error:
        contradictions += error.problems
    with suppress(UserError):
        model = resolved(None, {}, {key: shown[key] for key in shown if key not in _SIZES})
        _, axis = tree_sizes.layout(leaves, model, scan_axis)
        bound = parameters(model, plain.root, axis)
        contradictions += tree_sizes.differences(leaves, bound, root, plain.root)
    raise UserError(contradictions or found)
