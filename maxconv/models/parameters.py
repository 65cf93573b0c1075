"""The parameters of a MaxText model, bound to the tensors of a checkpoint."""

from collections.abc import Mapping

import numpy as np

from maxconv.algebra import AlgebraError, Expr, check_covered, substitute, unused
from maxconv.errors import UserError
from maxconv.families import Parameter, bind_rows
from maxconv.models.canonical_names import rounded
from maxconv.models.resolve import Model
from maxconv.models.unlike import without_counterpart
from maxconv.sources import Source


def parameters(model: Model, root: str, scan_axis: int | None) -> list[Parameter]:
    """Every parameter of a model, over its canonical tensors, in the order of MaxText's tree.

    Args:
        model: the model that was identified.
        root: the path or URL of the checkpoint, for messages.
        scan_axis: MaxText's param_scan_axis, or None for unscanned layers.

    Raises:
        UserError: with every row that does not match, and every tensor that is not used.
    """
    family = model.family
    check_scans(model, scan_axis)
    shapes = {name: tensor.shape for name, tensor in model.tensors.items()}
    bound, problems = bind_rows(model.rows, shapes, scan_axis)
    expressions = {parameter.name: parameter.expr for parameter in bound}
    if not problems:
        try:
            check_covered(expressions)  # a table can only be inverted if its slices tile tensors
        except AlgebraError as error:
            problems += str(error).splitlines()
        left = [n for n in unused(expressions, list(shapes)) if not model.is_dropped(n)]
        problems += without_counterpart(family, model.dims, model.tensors, left)
    if problems:
        raise UserError([f"{root}: {p}." for p in problems])
    return bound


def check_scans(model: Model, scan_axis: int | None) -> None:
    """Raises UserError if layers are to be stacked that MaxText cannot scan."""
    if scan_axis is not None and not model.family.scans:
        architecture = model.architecture or model.family.architectures[0]
        raise UserError(f"MaxText cannot scan the layers of {architecture}; add scan_layers=False.")


class Expressions:
    """What the parameters of a model are, over the tensors of its checkpoint."""

    def __init__(self, model: Model, source: Source):
        self._model = model
        self.dtypes = {name: info.dtype for name, info in source.tensors.items()}
        self._rounded: dict[np.dtype, Mapping[str, Expr]] = {}

    def of(self, parameter: Parameter, to: np.dtype) -> Expr:
        """The expression of a parameter; weights are rounded to a dtype before it is computed."""
        if parameter.dtype is not None and np.dtype(parameter.dtype).kind in "iu":  # a table
            return substitute(parameter.expr, self._model.tensors)
        return substitute(parameter.expr, self._weights(to))

    def _weights(self, to: np.dtype) -> Mapping[str, Expr]:
        stored = self._model.tensors
        if not self._model.rounds:
            return stored
        if to not in self._rounded:
            self._rounded[to] = {n: rounded(x, self.dtypes, to) for n, x in stored.items()}
        return self._rounded[to]
