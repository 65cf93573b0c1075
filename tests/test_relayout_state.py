"""What trainers leave, in another layout: states of optimizers, variables that are no weights."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flax import nnx
from orbax.checkpoint import v1 as ocp
from test_export import BF16, converted
from test_export_trees import Node
from test_relayout import (
    Leaves,
    assert_same,
    layers_of,
    nested,
    refused,
    relayout,
    restored,
    save,
    state,
)

pytestmark = pytest.mark.filterwarnings("ignore:Sharding info")

ROOT = "params.params."


def weights_of(directory: Path) -> Leaves:
    return {name: leaf for name, leaf in restored(directory).items() if name != "step"}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model of Hugging Face, and its conversion with stacked layers."""
    return converted("llama3.1-8b", True, tmp_path_factory.mktemp("plain"))


def test_what_only_some_layers_have_is_named(plain: tuple[Path, Path], tmp_path: Path) -> None:
    """And --save_dtype changes weights, not moments."""
    model, out = plain
    wide = {name: np.asarray(x, np.float32) / np.float32(3) for name, x in weights_of(out).items()}
    rngs = {"layers_0": {"rngs": {"key": np.arange(4, dtype=np.uint32)}}}
    run = save(state(layers_of(3, 1, wide), rngs), tmp_path / "run")
    given = ["scan_layers=true", "--train_state", f"--hf_model_path={model}"]
    job = relayout(run, tmp_path / "new", *given, "--save_dtype=bfloat16")
    name = "nnx_aux.model.decoder.layers_0.rngs.key"
    assert f"left out, as not every layer has it: '{name}'" in job.notices
    save(state(wide, {}), tmp_path / "wanted")
    wanted = restored(tmp_path / "wanted")
    wanted |= {n: x.astype(BF16) for n, x in wanted.items() if n.startswith(ROOT)}
    assert_same(restored(tmp_path / "new"), wanted)


def test_an_optimizer_of_other_shapes_is_refused(
    plain: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, out = plain
    tree = state(weights_of(out), {})
    rows = {n: np.float32(x).mean(-1) for n, x in weights_of(out).items()}
    tree["opt_state"][0] = {"v_row": {"params": nested(rows)}}
    run = save(tree, tmp_path / "run")
    given = ["scan_layers=false", f"--hf_model_path={model}", "--train_state"]
    line = refused(capsys, str(run), *given, f"base_output_directory={tmp_path / 'new'}")
    assert "opt_state.0.v_row.params.decoder" in line and "remove --train_state" in line
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_a_routed_bias_in_a_collection_of_its_own(tmp_path: Path) -> None:
    """It is no weight to the optimizer, but one of the model."""
    model, out = converted("deepseek3-671b", True, tmp_path / "out")
    apart = weights_of(converted("deepseek3-671b", False, tmp_path / "apart")[1])

    def parted(weights: Leaves, *, in_params: bool) -> dict[str, Any]:
        bias = {name: leaf for name, leaf in weights.items() if name.endswith("gate.bias")}
        assert bias
        others = {name: leaf for name, leaf in weights.items() if name not in bias}
        tree = state(others, {})
        if in_params:
            tree["params"]["MoEBiasVar"] = nested(bias)
            return tree
        aux = tree["nnx_aux"]["model"]["decoder"]
        for name, leaf in bias.items():
            *path, last = name.removeprefix(f"{ROOT}decoder.").split(".")
            node = aux
            for key in path:
                node = node.setdefault(key, {})
            node[last] = leaf
        return tree

    for in_params in (False, True):
        run = save(parted(weights_of(out), in_params=in_params), tmp_path / f"run{in_params}")
        given = ["scan_layers=false", f"--hf_model_path={model}"]
        relayout(run, tmp_path / "alone", *given, "--overwrite")
        assert_same(weights_of(tmp_path / "alone"), apart)
        relayout(run, tmp_path / "whole", *given, "--train_state", "--overwrite")
        wanted = save(parted(apart, in_params=in_params), tmp_path / f"wanted{in_params}")
        assert_same(restored(tmp_path / "whole"), restored(wanted))


@pytest.mark.slow
@pytest.mark.parametrize("form", [True, False])
def test_a_list_of_layers_of_nnx(
    form: bool, plain: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As trainers other than MaxText's save a model: leaves named `value`, layers by number."""
    model, out = plain
    weights = weights_of(out)
    module = nnx.state(Node(nested(layers_of(3, 1, weights)), nnx.Rngs(0)))
    if form:
        ocp.save(str(tmp_path / "run"), module)
    else:
        tree = {"model_params": nnx.to_pure_dict(module), "opt_state": [{"count": np.int32(1)}]}
        save(tree, tmp_path / "run", False)
    given = ["scan_layers=true", f"--hf_model_path={model}"]
    relayout(tmp_path / "run", tmp_path / "new", *given)
    assert_same(weights_of(tmp_path / "new"), weights)
    if not form:
        to = f"base_output_directory={tmp_path / 'state'}"
        line = refused(capsys, str(tmp_path / "run"), *given, "--train_state", to)
        assert "was not saved by MaxText's trainer" in line
