"""The way back, computed: `{leaf: expr over tensors}` -> `{tensor: expr over leaves}`."""

from collections.abc import Mapping, Sequence

from maxconv.algebra.boxes import Shape
from maxconv.algebra.expr import Apply, Combine, Concat, Expr, Fill, Tensor, apply, tensors
from maxconv.algebra.ops import Slice
from maxconv.algebra.rearrange import AlgebraError, rearrange
from maxconv.algebra.together import stacks

_Step = tuple[object, Shape]  # an op, or the _Place of a part; and the shape before it
_Path = tuple[tuple[_Step, ...], Tensor]  # from a tensor up to the leaf


def invert(rules: Mapping[str, Expr]) -> dict[str, Expr]:
    """The rules of the opposite direction, in the same algebra.

    Constants have no source and are dropped. Where several leaves take the same thing from a
    tensor, the first one gives it back.

    Raises:
        AlgebraError: naming every tensor, axis and rows that no leaf takes, or two leaves take.
    """
    return _inverse(_all_paths(rules))


def check_covered(rules: Mapping[str, Expr]) -> None:
    """Whether `rules` can be inverted, without doing it: only slices can leave something out.

    Raises:
        AlgebraError: as `invert` does.
    """
    sliced = {
        tensor: paths
        for tensor, paths in _all_paths(rules).items()
        if any(type(op) is Slice for steps, _ in paths for op, _ in steps)
    }
    _inverse(sliced)


def _all_paths(rules: Mapping[str, Expr]) -> dict[Tensor, list[_Path]]:
    found: dict[Tensor, list[_Path]] = {}
    for leaf, expr in rules.items():
        to = Tensor(leaf, expr.shape)
        for tensor, steps in _paths(expr, ()):
            found.setdefault(tensor, []).append((steps, to))
    return found


def _inverse(paths: Mapping[Tensor, list[_Path]]) -> dict[str, Expr]:
    inverse, problems = {}, []
    for tensor, found in paths.items():
        try:
            inverse[tensor.name] = _give_back(found, tensor.shape)
        except AlgebraError as error:
            problems.append(f"tensor {tensor.name}: {error}")
    if problems:
        raise AlgebraError("\n".join(problems))
    return inverse


class _Place(Slice):
    """Where a part lies in its Concat. Going back, it is a slice of the leaf."""


def _paths(expr: Expr, above: tuple[_Step, ...]) -> list[tuple[Tensor, tuple[_Step, ...]]]:
    match expr:
        case Tensor():
            return [(expr, above)]
        case Fill():
            return []
        case Apply(op, x):
            return _paths(x, ((op, x.shape), *above))
        case Combine():
            raise AlgebraError(f"{expr.op} of {expr.parts} cannot be undone")
        case Concat(axis):
            return [
                path
                for part, start, stop in expr.placed()
                for path in _paths(part, ((_Place(axis, start, stop - start), part.shape), *above))
            ]


def _give_back(paths: Sequence[_Path], shape: Shape) -> Expr:
    """The expression over leaves of the thing that all `paths` start from."""
    whole = [leaf for steps, leaf in paths if not steps]
    if whole:
        return whole[0]
    groups: dict[object, list[_Path]] = {}
    for steps, leaf in paths:
        groups.setdefault(steps[0][0], []).append((steps[1:], leaf))
    slices = {op: rest for op, rest in groups.items() if type(op) is Slice}
    if len(slices) < len(groups):  # something takes it whole: that alone gives it back
        op, rest = next((op, rest) for op, rest in groups.items() if type(op) is not Slice)
        if isinstance(op, _Place):
            after = _give_back(rest, _leaf_side(rest))
            return apply(Slice(op.axis, op.start, op.n), after)
        after_shape = op.shape(shape)  # type: ignore[attr-defined]
        return apply(op.inverse(shape), _give_back(rest, after_shape))  # type: ignore[attr-defined]
    return _join_slices(slices, shape)


def _leaf_side(paths: Sequence[_Path]) -> Shape:
    """Shape of the Concat that the rest of these paths starts from."""
    steps, leaf = paths[0]
    return steps[0][1] if steps else leaf.shape


def _join_slices(slices: Mapping[Slice, list[_Path]], shape: Shape) -> Expr:
    axis = next(iter(slices)).axis
    at, parts, problems = 0, [], []
    for op in sorted(slices, key=lambda s: (s.axis != axis, s.start, s.n)):
        if op.axis != axis:
            problems.append(f"is sliced on axis {axis} and on axis {op.axis}")
        elif op.start > at:
            problems.append(f"no leaf takes [{at}, {op.start}) of axis {axis}")
        elif op.start < at:
            problems.append(
                f"two leaves take [{op.start}, {min(at, op.start + op.n)}) of axis {axis}"
            )
        else:
            parts.append(_give_back(slices[op], op.shape(shape)))
        at = max(at, op.start + op.n)
    if at < shape[axis]:
        problems.append(f"no leaf takes [{at}, {shape[axis]}) of axis {axis}")
    if problems:
        raise AlgebraError("; ".join(problems))
    return _joined(axis, parts)


def _joined(axis: int, parts: Sequence[Expr]) -> Expr:
    """Parts side by side; as one expression if they are the places of one axis, such as experts."""
    if len(parts) == 1:
        return parts[0]
    if all(part.shape[axis] == 1 for part in parts):
        found = stacks({str(i): part for i, part in enumerate(parts)})
        if len(found) == 1 and found[0].names == tuple(map(str, range(len(parts)))):
            names = [f"x{i}" for i in range(len(parts[0].shape))]
            before, after = ([*names[:axis], new, *names[axis + 1 :]] for new in ("1", "n"))
            return apply(rearrange(f"n {' '.join(before)} -> {' '.join(after)}"), found[0].expr)
    return Concat(axis, tuple(parts))


def unused(rules: Mapping[str, Expr], names: Sequence[str]) -> list[str]:
    """The tensors of `names` that no rule reads."""
    read = {t.name for expr in rules.values() for t in tensors(expr)}
    return [name for name in names if name not in read]
