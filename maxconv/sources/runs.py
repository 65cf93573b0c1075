"""Which tree of a training run holds its weights, and which arrays of the tree they are.

Found out from names alone, for all that trains MaxText's models:

* MaxText's trainer and converter save `<step>/items`, with the weights in `params.params`, and what
  is no `nnx.Param` (a routed bias) in `nnx_aux.model`, or in a collection such as
  `params.MoEBiasVar` (maxtext/common/train_state_nnx.py); with DiLoCo, those of each replica in
  `inner_state`, too.
* Tunix, for SFT, DPO, distillation and RL, and MaxText's training_engine save
  `<step>/model_params`, an `nnx.State` whose leaves are `value`; RL has the model in `base`, and
  its steps in `actor/` (tunix/sft/checkpoint_manager.py, tunix/rl/rl_cluster.py).
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from etils import epath

from maxconv.errors import UserError
from maxconv.sources.orbax import METADATA, find_items

# Where MaxText's tree begins in the name of a leaf (layers/models.py, layers/decoders.py).
_ROOTS = {"audio_encoder", "decoder", "mtp_block", "token_embedder", "vision_encoder"}
_NOT_WEIGHTS = {"optimizer", "mu", "nu", "rngs", "dropout", "cache", "batch_stats"}
_LEAVES = ("value", "raw_value")  # the arrays of variables of NNX
_OPTIMIZER = "opt_state"  # at the end of a part
_RUNS = ("", "checkpoints", "actor", "checkpoints/actor")  # where steps are, in a run's directory
_WEIGHTS = ("items", "model_params")  # the trees of weights, among those of a step

Parts = tuple[str, ...]


class Parameters(NamedTuple):
    """The parameters of a model.

    Attributes:
        stored: the name of each in the checkpoint, by that in MaxText's tree.
        others: what other models are in the checkpoint, by what their names begin with.
    """

    stored: dict[str, str]
    others: tuple[str, ...]


def tree_at(path: str, step: int | None) -> tuple[epath.Path, Parts]:
    """The tree of weights at a path: of a run, of a step, or the tree itself.

    Args:
        path: may go on within the tree, to one of several models in it.
        step: of a run; None for its last one.

    Returns:
        The directory of the tree, and the parts of the path within it.

    Raises:
        UserError: there is none, or there are several.
    """
    place = epath.Path(path)
    for run in (place / part for part in _RUNS):
        if trees := find_items(run if step is None else run / str(step)):
            return _of_weights(trees), ()
    for parent in place.parents if step is None else ():
        if (parent / METADATA).exists():
            return parent, place.relative_to(parent).parts
    what = f"step {step} of a checkpoint" if step is not None else "a checkpoint"
    raise UserError(
        f"{path} is not {what} that Orbax saved (there is no _METADATA); give the directory that "
        "holds 0/items, or a run's checkpoints."
    )


def has_tree(path: str) -> bool:
    """Whether there is a checkpoint that Orbax saved, in a directory or a bucket."""
    if path.startswith("hf://") or ("://" not in path and not epath.Path(path).exists()):
        return False
    return any(find_items(epath.Path(path) / part) for part in _RUNS)


def _of_weights(trees: Sequence[epath.Path]) -> epath.Path:
    named = {tree.name: tree for tree in trees}
    for name in _WEIGHTS:
        if name in named:
            return named[name]
    if len(trees) > 1:
        names = " or ".join(map(str, trees))
        raise UserError(f"{trees[0].parent} holds several trees; give one of them: {names}.")
    return trees[0]


def parameters(arrays: Iterable[str], within: Parts, root: str) -> Parameters:
    """The parameters among the arrays of a tree.

    Args:
        arrays: their names.
        within: the parts that the names of the model begin with, if it is not the only one.
        root: the path of the tree, for messages.

    Raises:
        UserError: there are several models, and none of them is that of a trainer's state.
    """
    groups: dict[Parts, dict[str, str]] = {}
    for stored in arrays:
        parts = tuple(stored.split("."))
        at = next((i for i, part in enumerate(parts) if part in _ROOTS), None)
        if at is not None and parts[: len(within)] == within and _is_weight(parts):
            inner = parts[at:-1] if parts[-1] in _LEAVES else parts[at:]
            groups.setdefault(parts[:at], {})[".".join(_joined(inner))] = stored
    if not groups:
        return Parameters({}, ())
    # The model is what most names have in common; of a trainer's state, its field `params`.
    first, *rest = sorted(groups, key=lambda g: (g[:1] != ("params",), -len(groups[g])))
    model = groups[first]
    others = [g for g in rest if 2 * len(model.keys() & groups[g].keys()) > len(model)]
    if others and first[:1] != ("params",):
        names = " or ".join("/".join((root, *group)) for group in (first, *others))
        raise UserError(f"{root} holds several models; give one of them: {names}.")
    found: dict[str, str] = {}
    for group in (first, *(g for g in rest if g not in others)):
        found = groups[group] | found
    return Parameters(found, tuple(".".join(group) for group in others))


class Located(NamedTuple):
    """A stored name: what is before the path in MaxText's tree, the path, and what is after it.

    `path` is empty for what has none, such as the number of steps.
    """

    before: str
    path: str
    after: str


def located(stored: str) -> Located:
    """The parts of a stored name."""
    parts = stored.split(".")
    at = next((i for i, part in enumerate(parts) if part in _ROOTS), len(parts))
    end = len(parts) - (at < len(parts) and parts[-1] in _LEAVES)
    before, path, after = (".".join(of) for of in (parts[:at], parts[at:end], parts[end:]))
    return Located(before, path, after)


def _is_weight(parts: Parts) -> bool:
    return _NOT_WEIGHTS.isdisjoint(parts) and not any(part.endswith(_OPTIMIZER) for part in parts)


def _joined(parts: Sequence[str]) -> Iterator[str]:
    """The parts of a name, where a list of layers (`layers`, `0`) is `layers_0`."""
    before = None
    for part in parts:
        if before is not None and part.isdecimal():
            before = f"{before}_{part}"
            continue
        if before is not None:
            yield before
        before = part
    if before is not None:
        yield before
