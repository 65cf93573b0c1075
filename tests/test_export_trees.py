"""What trainers save of a model, and where: whatever it is, the same tensors are exported.

Checkpoints are saved as the trainers do it, with Orbax from real modules of Flax NNX.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp_v0
import pytest
from flax import nnx
from orbax.checkpoint import v1 as ocp
from test_export import converted, export, read

from maxconv.errors import UserError
from maxconv.sources.trees import TreeSource

pytestmark = pytest.mark.filterwarnings("ignore:Sharding info")


class Node(nnx.Module):
    """A module with the arrays of a nested dictionary; `layers_0` and so on as a list of layers."""

    def __init__(self, tree: dict[str, Any], rngs: nnx.Rngs):
        layers = [name for name in tree if name.startswith("layers_")]
        for name, value in tree.items():
            if isinstance(value, dict) and name not in layers:
                setattr(self, name, Node(value, rngs))
            elif name not in layers:
                setattr(self, name, nnx.Param(jnp.asarray(value)))
        if layers:
            self.layers = nnx.List(Node(tree[f"layers_{i}"], rngs) for i in range(len(layers)))
        self.dropout = nnx.Dropout(0.1, rngs=rngs)


class Wrapped(nnx.Module):
    """As Tunix wraps MaxText's model for RL (maxtext/integration/tunix/tunix_adapter.py)."""

    def __init__(self, base: nnx.Module):
        self.base = base


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory):
    """The original, its conversion, and the arrays of that."""
    model, out = converted("qwen3-0.6b", False, tmp_path_factory.mktemp("plain"))
    return model, out, ocp_v0.PyTreeCheckpointer().restore(out / "0/items")["params"]["params"]


def tunix(directory: Path, step: int, model: nnx.Module) -> None:
    """As tunix/sft/checkpoint_manager.py saves a model and its optimizer."""
    moments = {"0": {"mu": nnx.to_pure_dict(nnx.state(model, nnx.Param)), "count": jnp.zeros(())}}
    with ocp.training.Checkpointer(str(directory)) as checkpointer:
        trees = {"model_params": nnx.state(model), "optimizer_state": moments}
        checkpointer.save_checkpointables(step, trees)


def sft(run: Path, arrays: dict[str, Any]) -> None:
    half = Node({"decoder": {"decoder_norm": {"scale": np.ones(3, np.float32)}}}, nnx.Rngs(0))
    tunix(run / "checkpoints", 2, half)
    tunix(run / "checkpoints", 10, Node(arrays, nnx.Rngs(0)))


def rl(run: Path, arrays: dict[str, Any]) -> None:
    tunix(run / "checkpoints/actor", 4, Wrapped(Node(arrays, nnx.Rngs(0))))
    critic = {"decoder": {**arrays["decoder"], "value_head": {"kernel": np.ones((4, 1))}}}
    tunix(run / "checkpoints/critic", 4, Wrapped(Node(critic, nnx.Rngs(0))))


def engine(run: Path, arrays: dict[str, Any]) -> None:
    """As maxtext/training_engine/checkpointing.py saves within a step: with gradients."""
    state = nnx.state(Node(arrays, nnx.Rngs(0)))
    items = {"model_params": state, "accumulated_grads": state, "optimizer_state": {"x": 1}}
    handler = lambda: ocp_v0.PyTreeCheckpointHandler(use_ocdbt=False, use_zarr3=False)  # noqa: E731
    handlers = {name: handler() for name in items}
    with ocp_v0.CheckpointManager(run, item_handlers=handlers) as manager:
        saved = {name: ocp_v0.args.PyTreeSave(item) for name, item in items.items()}
        manager.save(3, args=ocp_v0.args.Composite(**saved))


def orbax_alone(run: Path, arrays: dict[str, Any]) -> None:
    ocp.save(str(run), nnx.state(Node(arrays, nnx.Rngs(0)), nnx.Param))


def diloco(run: Path, arrays: dict[str, Any]) -> None:
    """As maxtext/trainers/diloco/utils/spmd_diloco_checkpointing.py packs its state."""
    twice = {"params": jax.tree.map(lambda x: np.stack([x, x]), arrays)}
    trace = {"0": {"trace": arrays}}
    state = {"inner_state": {"params": twice}, "params": {"params": arrays}}
    state |= {"outer_opt_state": trace, "step": 5}
    ocp_v0.PyTreeCheckpointer().save(run / "5/items", state)


@pytest.mark.parametrize("save", [sft, rl, engine, orbax_alone, diloco])
def test_the_parameters_are_found(
    save: Callable[[Path, dict[str, Any]], None], plain: Any, tmp_path: Path
) -> None:
    _, out, arrays = plain
    save(tmp_path / "run", arrays)
    with TreeSource(str(out)) as ours, TreeSource(str(tmp_path / "run")) as theirs:
        assert theirs.tensors.keys() == ours.tensors.keys()
        for name, info in ours.tensors.items():
            found = theirs.tensors[name]
            assert (found.dtype, found.shape) == (info.dtype, info.shape)
            np.testing.assert_array_equal(theirs.tensor(name), ours.tensor(name), name)
        said = "inner_state.params.params in the checkpoint is not read"
        assert theirs.notices == ((said,) if save is diloco else ())


def test_a_run_of_rl_is_exported(plain: Any, tmp_path: Path) -> None:
    model, _, arrays = plain
    rl(tmp_path / "run", arrays)
    assert export(tmp_path / "run", model, tmp_path / "back", "--step=4") == 0
    assert read(tmp_path / "back") == read(model)


def test_of_several_models_one_is_to_be_given(plain: Any, tmp_path: Path) -> None:
    _, _, arrays = plain
    run = tmp_path / "run"
    both = {"actor": {"base": arrays}, "reference": {"base": arrays}}
    ocp_v0.PyTreeCheckpointer().save(run / "3/items", both)
    items = run / "3/items"
    with pytest.raises(UserError, match=f"give one of them: {items}/actor/base or {items}/ref"):
        TreeSource(str(run))
    with TreeSource(str(items / "reference")) as one:
        assert set(one.stored.values()) == {f"reference.base.{name}" for name in one.tensors}

    steps = {name: {"decoder": arrays["decoder"]} for name in ("one", "two")}
    with ocp.training.Checkpointer(str(tmp_path / "named")) as checkpointer:
        checkpointer.save_checkpointables(1, steps)
    with pytest.raises(UserError, match="several trees; give one of them: .*/1/one or .*/1/two"):
        TreeSource(str(tmp_path / "named"))
