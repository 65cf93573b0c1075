"""MaxText checkpoints of models at their full size without their bytes: only Orbax' metadata."""

import gzip
import json
from pathlib import Path
from typing import Any

from shapes import DATA


def write_tree(name: str, directory: Path, mesh: str = "fsdp8") -> Path:
    """A checkpoint of float32 weights, as a trainer saves them on a mesh, and its optimizer.

    Args:
        name: of a file in `data/trees`.
        directory: to make.
        mesh: one of those in the file. A chunk is what one device had.
    """
    content = json.loads(gzip.decompress((DATA / f"trees/{name}.json.gz").read_bytes()))
    sizes, leaves = content["meshes"][mesh], {}
    sizes = sizes.get("axes", sizes)
    for leaf in content["leaves"]:
        chunk = [n // _parts(axes, sizes) for n, axes in _axes(leaf, mesh)]
        for above in (("params", "params"), ("opt_state", "mu", "params"), ("opt_state", "nu")):
            path = (*above, *leaf["path"])
            array = directory / ".".join(path)
            array.mkdir(parents=True)
            (array / "zarr.json").write_text(json.dumps(_zarr(leaf["shape"], chunk)))
            leaves[str(path)] = {
                "key_metadata": [{"key": key, "key_type": 2} for key in path],
                "value_metadata": {"value_type": "jax.Array", "skip_deserialize": False},
            }
    metadata = {"tree_metadata": leaves, "use_zarr3": True, "use_ocdbt": False}
    (directory / "_METADATA").write_text(json.dumps(metadata))
    return directory


def _axes(leaf: dict[str, Any], mesh: str) -> list[tuple[int, Any]]:
    """Each axis of a leaf: its length, and the mesh axes that shard it."""
    spec = leaf["spec"][mesh]
    return [*zip(leaf["shape"], [*spec, *[None] * (len(leaf["shape"]) - len(spec))], strict=True)]


def _parts(axes: Any, sizes: dict[str, int]) -> int:
    count = 1
    for axis in axes if isinstance(axes, list) else [axes] if axes else []:
        count *= sizes[axis]
    return count


def _zarr(shape: list[int], chunk: list[int]) -> dict[str, Any]:
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": shape,
        "data_type": "float32",
        "fill_value": 0.0,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunk}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}],
    }
