"""Saves what MaxText loads for SFT, as Tunix does: plain, and wrapped as for RL.

    python save_states.py ITEMS DIRECTORY --hf MODEL [--scan] KEY=VALUE ...

First the state is loaded once more, by maxconv from the checkpoint MODEL that ITEMS were converted
from, and compared with what MaxText loaded. Then DIRECTORY gets `sft/3/model_params` and
`rl/actor/3/model_params`, saved as tunix/sft/checkpoint_manager.py and tunix/rl/rl_cluster.py do;
Tunix itself is not needed.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import load_logits


def compare(state: Any, checkpoint: str) -> None:
    """What maxconv loads into the state of MaxText's model, with what MaxText did."""
    import jax
    import numpy as np
    from flax import nnx

    import maxconv

    loaded = maxconv.load(checkpoint, state)
    assert isinstance(loaded, nnx.State)
    assert jax.tree.structure(loaded) == jax.tree.structure(state)
    for ours, theirs in zip(jax.tree.leaves(loaded), jax.tree.leaves(state), strict=True):
        assert (ours.dtype, ours.sharding) == (theirs.dtype, theirs.sharding)
        assert np.asarray(ours).tobytes() == np.asarray(theirs).tobytes()


def main() -> None:
    parser = argparse.ArgumentParser(description="Saves states of NNX.")
    parser.add_argument("items", type=Path)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--hf", required=True)
    parser.add_argument("words", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--scan", action=argparse.BooleanOptionalAction, required=True)
    args = parser.parse_intermixed_args()

    import maxtext
    from flax import nnx
    from maxtext.configs import pyconfig
    from orbax.checkpoint import v1 as ocp

    class Adapter(nnx.Module):
        """As maxtext/integration/tunix/tunix_adapter.py wraps a model."""

        def __init__(self, base: nnx.Module) -> None:
            self.base = base

    base = Path(next(iter(maxtext.__path__)), "configs", "base.yml")
    config = pyconfig.initialize(
        ["save_states", str(base), *load_logits.RUN_WORDS, f"scan_layers={args.scan}"]
        + [f"load_parameters_path={args.items.resolve()}", "max_target_length=32"]
        + [f"base_output_directory={args.directory}", *args.words]
    )
    model, _ = load_logits.load(config, "from_pretrained")
    compare(nnx.state(model, nnx.Param), args.hf)
    for place, module in (("sft", model), ("rl/actor", Adapter(model))):
        with ocp.training.Checkpointer(str(args.directory / place)) as checkpointer:
            checkpointer.save_checkpointables(3, {"model_params": nnx.state(module)})


if __name__ == "__main__":
    main()
