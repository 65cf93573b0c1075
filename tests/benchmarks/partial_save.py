"""Ways of saving leaves that are made one by one: what they take, and what they leave.

    python tests/benchmarks/partial_save.py [GIB [PROCESSES [RUNS [gs]]]]

`streamed` is how maxconv saves with a release of Orbax that was tested; `in groups` is
`ocp.partial`, its fallback on disks; `at once` its fallback in buckets. Eight simulated devices; 32
leaves of random bits; a window of an eighth of them. Runs alternate. Checked: all ways store the
same keys and values, and have metadata that are equal as JSON. With `gs`, a bucket of a server on
this machine.
"""

import json
import os
import resource
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

DEVICES, LEAVES = 8, 32
WAYS = ("streamed", "in groups", "at once")
MIB = 1 << 20


def save_one(way: str, directory: str, gib: float, processes: int, mine: int, address: str) -> None:
    """Saves in this process, and prints what it took as JSON. `MAXCONV_DIE_AT`: leaf to die at."""
    import jax

    jax.config.update("jax_num_cpu_devices", DEVICES // processes)
    if processes > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(address, processes, mine, cluster_detection_method="deactivate")
    from maxconv.targets import orbax, partial_save, streaming
    from maxconv.targets.base import Progress

    state, nbytes = _state(gib)
    progress = Progress(total=nbytes // processes)
    window = nbytes // processes // 8
    context = orbax.context(file_bytes=window // 16)  # as in conversions
    custom = {"scan_layers": True}
    root, saved = partial_save.epath.Path(directory), (progress, context, custom, _ready)
    ways: dict[str, Callable[[], None]] = {
        "streamed": lambda: streaming.save(
            directory, state, window, progress, context, {}, custom, _ready
        ),
        "in groups": lambda: partial_save._save_in_groups(root, state, window, *saved),
        "at once": lambda: partial_save._save_at_once(directory, state, *saved),
    }
    made = list[float]()
    threading.Thread(target=_watch, args=(progress, made), daemon=True).start()
    before, began = _peak(), time.monotonic()
    ways[way]()
    ended = time.monotonic()
    merge = ended - made[0] if made else 0
    print(json.dumps({"wall": ended - began, "merge": merge, "peak": _peak() - before}), flush=True)
    os._exit(0)


def _ready() -> None:
    """There is always room."""


def _watch(progress: Any, made: list[float]) -> None:
    """Notes when all leaves are written: what follows is Orbax' merge and commit."""
    while progress.written < progress.total:
        time.sleep(0.01)
    made.append(time.monotonic())


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _state(gib: float) -> tuple[Any, int]:
    import jax
    import ml_dtypes
    import numpy as np
    from jax.sharding import NamedSharding, PartitionSpec

    from maxconv.targets import orbax
    from maxconv.targets.lazy import LazyTensor

    sharding = NamedSharding(jax.make_mesh((DEVICES,), ("fsdp",)), PartitionSpec("fsdp"))
    shape = (1024, int(gib * 2**30) // LEAVES // 2048)
    die_at = int(os.environ.get("MAXCONV_DIE_AT", -1))

    def make(number: int) -> jax.Array:
        if number == die_at:
            os.kill(os.getpid(), signal.SIGKILL)

        def shard(index: Any) -> np.ndarray:
            start, stop, _ = index[0].indices(shape[0])
            bits = np.random.default_rng([number, start]).bytes(2 * (stop - start) * shape[1])
            return np.frombuffer(bits, ml_dtypes.bfloat16).reshape(-1, shape[1])

        return jax.make_array_from_callback(shape, sharding, shard)

    names = [f"params.params.decoder.layer_{i:02}.kernel" for i in range(LEAVES)]
    leaves = [
        LazyTensor(partial(make, i), shape, ml_dtypes.bfloat16, name, sharding)
        for i, name in enumerate(names)
    ]
    state = orbax.train_state(dict(zip(names, leaves, strict=True)))
    return state, sum(leaf.nbytes for leaf in leaves)


def run(way: str, directory: str, gib: float, processes: int, **environ: str) -> dict[str, float]:
    """One save by so many processes; the most that any took. Nothing if one was killed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command = [sys.executable, __file__, "one", way, directory, str(gib), str(processes)]
    started = [
        subprocess.Popen(
            [*command, str(i), address],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"JAX_PLATFORMS": "cpu"} | environ,
        )
        for i in range(processes)
    ]
    said = [process.communicate(timeout=900) for process in started]
    if any(process.returncode for process in started):
        errors = [line for _, err in said for line in err.splitlines() if "Error" in line]
        print(f"{way}: {'; '.join(errors[-1:]) or 'killed'}")
        return {}
    each = [json.loads(out.splitlines()[-1]) for out, _ in said]
    return {name: max(one[name] for one in each) for name in each[0]}


def compare(ours: str, theirs: str) -> None:
    """Exits unless two checkpoints have the same values, and metadata that say the same."""
    from etils import epath

    from maxconv.sources.orbax import open_store

    a, b = (epath.Path(path) / "0/items" for path in (ours, theirs))
    mine, other = open_store(a, True), open_store(b, True)
    keys = sorted(mine.list().result())
    if keys != sorted(other.list().result()) or any(mine[key] != other[key] for key in keys):
        sys.exit(f"{theirs} has other values than {ours}")
    names = ["_METADATA", "_sharding", *(f"array_metadatas/{p.name}" for p in _metadatas(a))]
    for name in names:
        if _json(a / name) != _json(b / name):
            sys.exit(f"{theirs} has another {name} than {ours}")
    print(f"{len(keys)} keys and values of {theirs} equal; so do {', '.join(names)} as JSON")


def _metadatas(items: Any) -> list[Any]:
    return sorted((items / "array_metadatas").iterdir())


def _json(path: Any) -> Any:
    found = json.loads(path.read_text())
    arrays = found.get("array_metadatas")
    by_name = lambda entry: entry["array_metadata"]["param_name"]  # noqa: E731
    return sorted(arrays, key=by_name) if arrays else found


def main(gib: float, processes: int, runs: int, place: str) -> None:
    sys.path.append(str(Path(__file__).parents[1]))
    from buckets import serving

    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        with serving(root / "server") if place == "gs" else nullcontext() as bucket:
            os.environ |= bucket.environ if bucket else {}
            where = "gs://bucket" if bucket else str(root)
            figures: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
            for number in range(runs):
                for way in WAYS:
                    out = f"{where}/{way.replace(' ', '_')}_{number}"
                    if took := run(way, out, gib, processes):
                        figures[way].append(took)
                        if number == 0 and way != WAYS[0]:
                            compare(f"{where}/{WAYS[0]}_0", out)
                if not bucket:
                    subprocess.run(["sh", "-c", f"rm -rf {root}/*_{number}"], check=True)
            _print(figures)
            for way in WAYS:
                out = f"{where}/killed_{way.replace(' ', '_')}"
                run(way, out, gib / 8, 1, MAXCONV_DIE_AT=str(LEAVES // 2))
                print(f"left by {way}, killed half-way: {_left(out)}")


def _left(out: str) -> Sequence[str]:
    from etils import epath

    root = epath.Path(out)
    return sorted(path.name for path in root.iterdir()) if root.exists() else []


def _print(figures: dict[str, list[dict[str, float]]]) -> None:
    print("| | wall s | of it after the last leaf s | peak MiB |\n|-|-|-|-|")
    for way, runs in figures.items():
        if runs:
            cells = [_spread([one[name] for one in runs]) for name in ("wall", "merge", "peak")]
            print(f"| {way} | {' | '.join(cells)} |")


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.1f} [{min(values):.1f}..{max(values):.1f}]"


if __name__ == "__main__":
    if sys.argv[1:2] == ["one"]:
        way, directory, gib, processes, mine, address = sys.argv[2:]
        save_one(way, directory, float(gib), int(processes), int(mine), address)
    else:
        gib, processes, runs, place = (sys.argv[1:] + ["1", "1", "3", ""][len(sys.argv) - 1 :])[:4]
        main(float(gib), int(processes), int(runs), place)
