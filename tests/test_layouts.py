"""Every layout of every model from every other one, evaluated with numpy."""

from functools import cache
from pathlib import Path

import numpy as np
import pytest
import tiny

from maxconv.algebra import Apply, Expr, Rearrange, Tensor, evaluate, nodes
from maxconv.config import parse
from maxconv.jobs.prepare import opened, resolved
from maxconv.models.parameters import Expressions, parameters
from maxconv.models.relayout import Moved, moved
from maxconv.models.resolve import Model
from maxconv.models.tree_sizes import ROOT

LAYOUTS = (None, 0, 1, 2)
FAST = ("llama3.1-8b", "gemma3-4b", "deepseek3-671b")
PLAIN = [case for case in tiny.CASES if not tiny.CASES[case].is_packed]
SCANNED = [case for case in PLAIN if tiny.CASES[case].scans]


@cache
def converted(case: str, directory: Path) -> tuple[Model, dict[int | None, dict[str, np.ndarray]]]:
    """The leaves of a conversion in each layout, by that and their names in MaxText's tree."""
    hf = tiny.write(case, directory / case)
    save = tiny.CASES[case].save_dtypes[0]
    words = [*tiny.maxtext_words(case, False), f"--hf_model_path={hf}", f"--save_dtype={save}"]
    config = parse([*words, "base_output_directory=/nowhere"])
    with opened(config) as source:
        model = resolved(config, source)
        arrays = {name: source.tensor(name) for name in source.tensors}
        exprs, dtype = Expressions(model, source), np.dtype(config.save_dtype)
        found = dict[int | None, dict[str, np.ndarray]]()
        for axis in LAYOUTS if model.family.scans else (None,):
            found[axis] = {
                p.name.removeprefix(ROOT): evaluate(exprs.of(p, dtype), arrays)
                for p in parameters(model, source.root, axis)
            }
    return model, found


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hf")


def to(model: Model, old: dict[str, np.ndarray], was: int | None, becomes: int | None) -> Moved:
    shapes = {name: leaf.shape for name, leaf in old.items()}
    return moved(model.rows, model.rows, shapes, was, becomes)


def operations(expr: Expr) -> list[type]:
    return [type(node.op) if isinstance(node, Apply) else type(node) for node in nodes(expr)]


def marked(cases: list[str]) -> list[object]:
    return [pytest.param(c, marks=() if c in FAST else pytest.mark.slow) for c in cases]


@pytest.mark.parametrize("case", marked(PLAIN))
def test_each_layout_comes_from_each_other_bit_for_bit(case: str, directory: Path) -> None:
    model, leaves = converted(case, directory)
    for was, old in leaves.items():
        for becomes, wanted in leaves.items():
            found = to(model, old, was, becomes)
            made = {leaf.path: evaluate(leaf.expr, old) for leaf in found.leaves}
            assert made.keys() == wanted.keys() and not found.lost
            for name, want in wanted.items():
                got = made[name]
                assert (got.shape, got.dtype) == (want.shape, want.dtype), (was, becomes, name)
                assert got.tobytes() == want.tobytes(), (was, becomes, name)


@pytest.mark.parametrize("case", marked(SCANNED))
def test_stacks_are_moved_whole(case: str, directory: Path) -> None:
    """One rearrangement of each leaf, and none where nothing changes."""
    model, leaves = converted(case, directory)
    for was, old in leaves.items():
        for leaf in to(model, old, was, was).leaves:
            assert leaf.expr == Tensor(leaf.path, old[leaf.path].shape)
    for was in (0, 1, 2):
        for becomes in (0, 1, 2):
            for leaf in to(model, leaves[was], was, becomes).leaves:
                assert operations(leaf.expr) in ([Tensor], [Rearrange, Tensor], [Tensor, Rearrange])
