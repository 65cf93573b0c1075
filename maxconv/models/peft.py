"""A LoRA adapter that MaxText trained, as PEFT saves it: the inverse of `adapters.py`."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from maxconv.algebra import AlgebraError, Expr, Shape, Tensor, invert, substitute, tensors
from maxconv.errors import UserError
from maxconv.families import Parameter, Row, bind_rows, flat
from maxconv.models.adapters import IN, OUT, Adaptable
from maxconv.models.factors import Found, adapted, scaling_of
from maxconv.models.resolve import Model, resolve
from maxconv.models.stored_names import renamer
from maxconv.models.tree_sizes import ROOT, is_stacked, parts
from maxconv.models.views import unpacked
from maxconv.sources import Source
from maxconv.sources.safetensors import some
from maxconv.sources.trees import Tree, factors

_EXPERT = re.compile(r"\.experts\.\d+\.")


@dataclass(frozen=True)
class PeftAdapter:
    """An adapter as PEFT saves it.

    Attributes:
        model: that it adapts.
        rules: its tensors, over the leaves of the tree.
        dtypes: of these.
        config: the contents of adapter_config.json.
        scan_axis: along which kernels are stacked in the tree; None if they are not.
        notices: sentences for the user.
    """

    model: Model
    rules: Mapping[str, Expr]
    dtypes: Mapping[str, np.dtype]
    config: Mapping[str, Any]
    scan_axis: int | None
    notices: tuple[str, ...]


def peft_adapter(
    tree: Tree,
    published: Source,
    base: str,
    said: Mapping[str, float | None],
    name: str | None = None,
    facts: Mapping[str, Any] | None = None,
    sizes: Mapping[str, Any] | None = None,
    scan_axis: int = 1,
) -> PeftAdapter:
    """How the factors in a tree become the tensors of PEFT.

    Args:
        tree: the checkpoint of MaxText.
        published: the model that it adapts, at Hugging Face.
        base: the path or name of that, to be written.
        said: lora_rank and lora_alpha, see `scaling_of`.
        name, facts, sizes, scan_axis: see `way_back`.

    Raises:
        UserError: with every factor that does not fit the model.
    """
    rank, alpha = scaling_of(tree, said)
    model = resolve(unpacked(published), name, facts, {**parts(tree.tensors), **(sizes or {})})
    paths = factors(tree.tensors)
    axis = (
        scan_axis if is_stacked({*paths, *(f"{at}.kernel" for at in paths)}, model.rows) else None
    )
    weights = _weights(model)
    rules = _rules(tree, model.rows, weights, axis)
    dtypes = {name: tree.tensors[next(tensors(x)).name].dtype for name, x in rules.items()}
    modules = {name.partition(".lora_")[0].removeprefix(_BASE) for name in rules}
    config = {
        "base_model_name_or_path": base,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": 0.0,
        "peft_type": "LORA",
        "r": rank,
        "target_modules": _targets(modules, [name for name, _ in weights.values()]),
        "task_type": "CAUSAL_LM",
    }
    notices = ["only an adapter is exported; to merge it, add load_parameters_path= of its model"]
    if any(map(_EXPERT.search, modules)):
        notices.append(
            "it adapts single experts, which are modules in transformers 4; transformers 5 has the "
            "experts of a layer in one tensor"
        )
    return PeftAdapter(model, rules, dtypes, config, axis, tuple(notices))


_BASE = "base_model.model."


def _weights(model: Model) -> dict[str, tuple[str, Shape]]:
    """The names and shapes of weights by canonical name: as transformers has them in memory, whose
    modules PEFT adapts; those of single experts, which it has not, as they are published."""
    rename = renamer(model.family.in_memory or ())
    found: dict[str, tuple[str, Shape]] = {}
    for canonical, expr in model.tensors.items():
        name = expr.name if isinstance(expr, Tensor) else canonical
        found[canonical] = (name if _EXPERT.search(name) else rename(name)[0], expr.shape)
    return found


def _targets(modules: set[str], weights: Sequence[str]) -> list[str]:
    """Names that PEFT finds just these modules by: their last part if that says it, else all."""
    every = {name.removesuffix(".weight") for name in weights if name.endswith(".weight")}
    found: set[str] = set()
    for module in modules:
        last = module.rpartition(".")[2]
        alike = {other for other in every if other.rpartition(".")[2] == last}
        found.add(last if alike <= modules else module)
    return sorted(found)


def _rules(
    tree: Tree,
    rows: Sequence[Row],
    weights: Mapping[str, tuple[str, Shape]],
    scan_axis: int | None,
) -> dict[str, Expr]:
    """The tensors of an adapter as PEFT names them, over the leaves of the tree."""
    stacked = scan_axis is not None
    kernels, found = adapted(tree, rows, stacked)
    rank = tree.tensors[found[kernels[0].at][IN]].shape[-1]
    names = {w for kernel in kernels for w in kernel.of.row.names(flat(kernel.numbers))}
    parts = {weight: _peft(*weights[weight], rank) for weight in names}
    rules: dict[str, Expr] = {}
    problems: list[str] = []
    every = (a.restricted(names, stacked) for a in map(Adaptable.of, rows) if a)
    for one in filter(None, every):
        of = one.tensors(parts)
        shapes = {name: part.shape for name, part in of.items()}
        for row in one.rows:
            for leaf, parameter in _fitting(tree, row, shapes, scan_axis, found, problems):
                rules[leaf] = substitute(parameter.expr, of)
    try:
        back = invert(rules)
    except AlgebraError as error:
        problems += [f"{tree.root}: {line}." for line in str(error).splitlines()]
        raise UserError(problems) from None
    used = {tensor.name for expr in back.values() for tensor in tensors(expr)}
    if lost := sorted(rules.keys() - used):
        problems.append(
            f"{some(lost)} in {tree.root} are of kernels that Hugging Face has in one weight with "
            "others, of which PEFT has a single factor; add load_parameters_path= to merge them."
        )
    if problems:
        raise UserError(problems)
    return back


def _peft(name: str, shape: Shape, rank: int) -> dict[str, Expr]:
    at, (outputs, inputs) = f"{_BASE}{name.removesuffix('.weight')}", shape
    return {
        IN: Tensor(f"{at}.lora_A.weight", (rank, inputs)),
        OUT: Tensor(f"{at}.lora_B.weight", (outputs, rank)),
    }


def _fitting(
    tree: Tree,
    row: Row,
    shapes: Mapping[str, Shape],
    scan_axis: int | None,
    found: Found,
    problems: list[str],
) -> Iterator[tuple[str, Parameter]]:
    """The leaves of a row of factors, each stacked along the axis that its shape shows."""
    tried: dict[str, list[Parameter]] = {}
    for stack in dict.fromkeys((row.stack, 0)):
        bound, errors = bind_rows([replace(row, stack=stack)], shapes, scan_axis)
        problems += [f"{tree.root}: {error}." for error in errors]
        for parameter in bound:
            ((at, pair),) = factors([_in_tree(parameter)]).items()
            leaf = found.get(at, {}).get(next(iter(pair)))
            if leaf is None:
                problems.append(f"{tree.root} has no factors of {at}, but of kernels beside it.")
            else:
                tried.setdefault(leaf, []).append(parameter)
    for leaf, parameters in tried.items():
        shape = tree.tensors[leaf].shape
        fitting = next((p for p in parameters if p.shape == shape), None)
        if fitting is not None:
            yield leaf, fitting
        else:
            wanted = parameters[0].shape
            problems.append(f"{leaf} in {tree.root} has shape {shape}, but should have {wanted}.")


def _in_tree(parameter: Parameter) -> str:
    return parameter.name.removeprefix(ROOT).removesuffix(".value")
