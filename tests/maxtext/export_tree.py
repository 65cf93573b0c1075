"""Writes MaxText's own parameter trees, as those of `tests/data/trees`.

    python export_tree.py --out DIR MODEL ...

makes DIR/MODEL.scan.json.gz and DIR/MODEL.unscan.json.gz: path, shape, logical axes, and
PartitionSpec on two meshes, of a dense model of text that is only traced: it has no weights. Runs
in the environment that `environment.sh` makes.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
from pathlib import Path
from typing import Any

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
}

MESHES = {
    "fsdp8": ["ici_fsdp_parallelism=8"],
    "fsdp4_tp2": ["ici_fsdp_parallelism=4", "ici_tensor_parallelism=2"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Exports MaxText's parameter trees.")
    parser.add_argument("models", nargs="+", metavar="MODEL")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for model in args.models:
        for scan in (True, False):
            text = json.dumps(tree(model, scan), separators=(",", ":"))
            path = args.out / f"{model}.{'scan' if scan else 'unscan'}.json.gz"
            path.write_bytes(gzip.compress(text.encode(), mtime=0))
            print(path)


def tree(model: str, scan: bool) -> dict[str, Any]:
    import maxtext

    found: dict[str, Any] = {"maxtext": "0.2.5", "model": model, "scan_layers": scan, "meshes": {}}
    leaves: dict[tuple[str, ...], dict[str, Any]] = {}
    base = str(Path(next(iter(maxtext.__path__)), "configs", "base.yml"))
    for mesh, words in MESHES.items():
        more = [f"model_name={model}", f"scan_layers={scan}", *words]
        found["meshes"][mesh], specs = traced([base, *more], leaves)
        for path, spec in specs.items():
            leaves[path].setdefault("spec", {})[mesh] = spec
    return found | {"leaves": [leaves[path] for path in sorted(leaves)]}


def traced(
    words: list[str], leaves: dict[tuple[str, ...], dict[str, Any]]
) -> tuple[dict[str, int], dict[tuple[str, ...], list[Any]]]:
    """The sizes of a mesh, and the spec of each leaf; what does not depend on it, into `leaves`."""
    from flax import nnx
    from flax.linen import partitioning
    from maxtext.configs import pyconfig
    from maxtext.utils import maxtext_utils, model_creation_utils, sharding

    run = ["hardware=cpu", "skip_jax_distributed_system=True", "base_output_directory=out"]
    config = pyconfig.initialize(["export_tree", *words, *run, "run_name=export"])
    mesh = maxtext_utils.get_mesh_from_config(config)
    with partitioning.axis_rules(config.logical_axis_rules):
        create = model_creation_utils.get_nnx_create_model_fn(config, mesh)
        _, state = nnx.split(nnx.eval_shape(create))
        shardings = sharding.nnx_construct_named_sharding(state, mesh)
    specs = {}
    placed = dict(nnx.to_flat_state(shardings))
    for path, variable in nnx.to_flat_state(state):
        if isinstance(variable, nnx.RngState):
            continue
        names, shape = tuple(map(str, path)), list(variable.get_value().shape)
        logical = list(variable.get_metadata()["out_sharding"])
        leaves.setdefault(names, {"path": list(names), "shape": shape, "logical": logical})
        spec = placed[path].get_value().spec
        specs[names] = [list(e) if isinstance(e, tuple) else e for e in spec]
    return dict(mesh.shape), specs


if __name__ == "__main__":
    main()
