"""Loads a converted model with MaxText and computes its logits.

    python load_logits.py ITEMS --tokens NPZ --loader pretrain --scan --out FILE KEY=VALUE ...

ITEMS is the directory `0/items` of the checkpoint, NPZ has sequences of `tokens`, and the words
make MaxText's config that of the model. `pretrain` loads it as a training run does
(`load_parameters_path`, Orbax's version 1 API); `from_pretrained` as fine-tuning, RL and decoding
do (Orbax's old API). In both cases the model lies in shards on eight simulated devices and computes
in float32. FILE gets the logits at every position of the sequences. Runs in the environment that
`environment.sh` makes.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

DEVICES = 8
XLA_FLAGS = f"--xla_force_host_platform_device_count={DEVICES}"
LOADERS = ("pretrain", "from_pretrained")

# Before jax is imported. Nothing below needs the network, and libraries must not try.
os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "JAX_DEFAULT_PRNG_IMPL": "unsafe_rbg",  # as MaxText's training does; it compiles much faster
    "JAX_PLATFORMS": "cpu",
    "TRANSFORMERS_VERBOSITY": "error",
    "XLA_FLAGS": XLA_FLAGS,
}

RUN_WORDS = [
    "run_name=load",
    "hardware=cpu",
    "skip_jax_distributed_system=True",
    "enable_checkpointing=false",  # of the run itself: it saves nothing
    "jax_cache_dir=",  # else MaxText keeps compiled programs in the home directory
    "opt_type=sgd",  # has no state to keep in memory
    "dataset_type=synthetic",
    "steps=1",
    "per_device_batch_size=1",
    # Few heads can't be split over eight devices: every weight is, over its embedding axis, and so
    # is the batch.
    f"ici_fsdp_parallelism={DEVICES}",
    "attention=dot_product",
    "dtype=float32",
    "weight_dtype=float32",
    "matmul_precision=highest",
    "float32_qk_product=true",
    "float32_logits=true",
]


def load(config: Any, loader: str) -> tuple[Any, Any]:
    """The model with the weights of the checkpoint, and its mesh."""
    from maxtext.utils import maxtext_utils, model_creation_utils, train_utils

    if loader == "pretrain":
        _, _, _, model, mesh, *_ = train_utils.setup_train_loop(config, recorder=None)
        return model, mesh
    mesh = maxtext_utils.get_mesh_from_config(config)
    return model_creation_utils.from_pretrained(config, mesh=mesh), mesh


def compute(config: Any, model: Any, mesh: Any, tokens: np.ndarray) -> np.ndarray:
    """The logits at all positions of some sequences."""
    import jax
    from flax import nnx
    from flax.linen import partitioning

    batch = np.zeros((config.global_batch_size_to_load, config.max_target_length), np.int32)
    batch[: len(tokens)] = tokens
    positions = np.broadcast_to(np.arange(config.max_target_length), batch.shape)
    segments = np.ones_like(batch)

    @nnx.jit
    def forward(model: Any) -> jax.Array:
        return model(batch, positions, segments, enable_dropout=False)

    with jax.set_mesh(mesh), partitioning.axis_rules(config.logical_axis_rules):
        return np.asarray(forward(model))[: len(tokens)]


def main() -> None:
    parser = argparse.ArgumentParser(description="Computes logits with MaxText.")
    parser.add_argument("items", type=Path)
    parser.add_argument("words", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--tokens", type=Path, required=True)
    parser.add_argument("--loader", choices=LOADERS, required=True)
    parser.add_argument("--scan", action=argparse.BooleanOptionalAction, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_intermixed_args()

    import maxtext
    from maxtext.configs import pyconfig

    tokens = np.load(args.tokens)["tokens"]
    scratch = tempfile.TemporaryDirectory()
    base = Path(next(iter(maxtext.__path__)), "configs", "base.yml")
    config = pyconfig.initialize(
        ["load_logits", str(base), *RUN_WORDS]
        + [f"scan_layers={args.scan}", f"max_target_length={tokens.shape[1]}"]
        + [f"load_parameters_path={args.items.resolve()}", f"base_output_directory={scratch.name}"]
        + args.words
    )
    np.save(args.out, compute(config, *load(config, args.loader), tokens))


if __name__ == "__main__":
    main()
