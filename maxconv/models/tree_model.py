"""The model that a tree of MaxText is of, found from its leaves and the same model as published."""

from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any

from maxconv.errors import UserError
from maxconv.models import tree_sizes
from maxconv.models.parameters import parameters
from maxconv.models.resolve import Model, resolve
from maxconv.models.tree_sizes import Leaves
from maxconv.models.views import as_stored, unpacked
from maxconv.sources import Source
from maxconv.sources.trees import TreeSource, is_factor, is_fp8

_LAYERS = "base_num_decoder_layers"
_HEAD = "decoder.logits_dense.kernel"
_AXES = (1, 0, 2, 3)  # that layers may be stacked along, the usual one first
_SIZES = (_LAYERS, "vocab_size")  # those that may differ from the published model's


class TreeModel:
    """What tells the model of a tree: its leaves, the published model, and the arguments."""

    def __init__(
        self,
        tree: TreeSource,
        published: Source,
        name: str | None = None,
        facts: Mapping[str, Any] | None = None,
        sizes: Mapping[str, Any] | None = None,
    ):
        """`name`, `facts`, `sizes`: see `resolve`; the layers in `sizes` are those of `shorter`.

        Raises:
            UserError: the tree has an adapter.
        """
        self._root, self._published = tree.root, published
        self._name, self._facts, self._sizes = name, facts or {}, sizes or {}
        self._leaves = {n: info for n, info in tree.tensors.items() if n not in tree.beside}
        self._keeps_fp8 = any(map(is_fp8, self._leaves.values()))
        self._plain = as_stored(published) if self._keeps_fp8 else unpacked(published)
        if any(map(is_factor, self._leaves)):
            raise UserError(
                f"{tree.root} has a LoRA adapter, which is not laid out anew; convert the adapter "
                "again with the other arguments."
            )

    def model(self, axes: Iterable[int] = ()) -> tuple[Model, int | None]:
        """The model, and the axis along which its layers are stacked, if they are.

        `axes`: where layers may be stacked, the likeliest first; the usual ones are tried as well.

        Raises:
            UserError: with everything in which the tree differs from the model.
        """
        facts, sizes = dict(self._facts), dict(self._sizes)
        if sizes.pop(_LAYERS, None) is not None:
            facts.pop(_LAYERS, None)  # the tree itself says how many it has
        arguments, problems = (self._name, facts, sizes), list[str]()
        for axis in dict.fromkeys((*axes, *_AXES)):
            try:
                model, found = tree_model(
                    *(self._leaves, self._root, self._plain, self._keeps_fp8, *arguments), axis
                )
                bound = parameters(model, self._published.root, found)
            except UserError as error:
                problems = problems or error.problems
                continue
            of_both = self._root, self._published.root
            if not (seen := [*tree_sizes.differences(self._leaves, bound, *of_both)]):
                return model, found
            problems = problems or seen
        raise UserError(problems)

    def shorter(self, model: Model) -> Model:
        """The model with as many layers as the arguments ask for.

        Raises:
            UserError: it has fewer.
        """
        wanted = self._sizes.get(_LAYERS)
        if wanted is None:
            return model
        there = model.dims.layers // model.family.layers_per_block
        if wanted > there:
            raise UserError(f"{_LAYERS}={wanted}, but {self._root} has {there}; ask for fewer.")
        sizes, differs = {**tree_sizes.parts(self._leaves), **self._sizes}, _HEAD in self._leaves
        return resolve(self._plain, self._name, self._facts, sizes, self._keeps_fp8, differs)


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
        return resolve(plain, name, facts, given, keeps_fp8, head_differs=_HEAD in leaves)

    try:
        model = resolved(name, facts, shown)
        count, axis = tree_sizes.layout(leaves, model, scan_axis)
        if count < model.dims.layers and _LAYERS not in sizes:
            shown[_LAYERS] = count // model.family.layers_per_block
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
