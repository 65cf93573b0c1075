"""Published models at their full shapes, with random weights: `python checkpoints.py MODEL DIR`."""

import json
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

sys.path.insert(0, str(Path(__file__).parents[1]))
from headers import published  # noqa: E402

SHARD_BYTES = 2 << 30


def write(model_name: str, directory: Path, layers: int | None = None) -> int:
    """Writes the checkpoint unless it is there; returns the bytes of its tensors."""
    source = published(model_name, layers=layers)
    total = sum(info.nbytes for info in source.tensors.values())
    index = directory / "model.safetensors.index.json"
    if index.exists():
        return total
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(source.config))
    random = np.random.default_rng(0)
    shards: list[list[str]] = [[]]
    held = 0
    for name, info in source.tensors.items():
        if held and held + info.nbytes > SHARD_BYTES:
            shards.append([])
            held = 0
        shards[-1].append(name)
        held += info.nbytes
    weight_map = {}
    for i, names in enumerate(shards, 1):
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        tensors = {n: _weights(random, source.tensors[n].shape) for n in names}
        save_file(tensors, directory / file)
        weight_map.update(dict.fromkeys(names, file))
    index.write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}))
    return total


def _weights(random: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """bfloat16 of either sign between 1/4 and 2: random bits are quicker to make than a bell."""
    bits = random.integers(0, 1 << 16, size=shape, dtype=np.uint16)
    return ((bits & 0x80FF) | 0x3E80).view(ml_dtypes.bfloat16)


if __name__ == "__main__":
    print(write(sys.argv[1], Path(sys.argv[2])))
