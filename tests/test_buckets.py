"""From a bucket to a bucket: real Orbax, real TensorStore, a server in another process."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
import tiny
from buckets import Bucket, serving
from hubs import TOKEN, hub_in
from jobs import MESHES, job_words
from test_processes import processes, said, stored

from maxconv import cli

CASE = "qwen3-30b-a3b"
WORDS = (*tiny.maxtext_words(CASE, True), *MESHES["fsdp4_tp2"], "hardware=cpu")
ALONE = ("skip_jax_distributed_system=true",)


@pytest.fixture
def bucket(tmp_path: Path) -> Iterator[Bucket]:
    with serving(tmp_path / "gcs") as bucket:
        bucket.put(tiny.write(CASE, tmp_path / "hf"), "hf")
        yield bucket


def converted(directory: Path) -> dict[bytes, bytes]:
    """The arrays of a conversion from disk to disk."""
    words = job_words(directory, directory / "hf", tiny.maxtext_words(CASE, True), "fsdp4_tp2")
    assert cli.main(["convert", *words, "--verify=none"]) == 0
    return stored(directory / "out")


def places(to: str) -> tuple[str, ...]:
    return "--hf_model_path=gs://bucket/hf", f"base_output_directory=gs://bucket/{to}"


@pytest.mark.slow
@pytest.mark.parametrize("n", [1, 2])
def test_from_a_bucket_to_a_bucket(bucket: Bucket, tmp_path: Path, n: int) -> None:
    """Everything that may pass happens once on the way."""
    kinds = ("429:1", "503", "500", "reset", "cut", "whole", "other")
    bucket.settings(
        faults=[[f"*/o/hf/model-0000{i % 5 + 1}-*", kind, 1] for i, kind in enumerate(kinds)]
    )
    logs, alone = tmp_path / "logs", ALONE if n == 1 else ()
    words = [*WORDS, *alone, *places("out"), "--verify=full", "--max_retries=9"]
    with processes(n, words, logs, environ=bucket.environ.items()) as running:
        codes = [process.wait(timeout=200) for process in running]
    log = said(logs)
    assert codes == [0] * n, "\n".join(log)
    assert "saved: gs://bucket/out/0/items" in log[0] and "verified" in log[0]
    assert re.search(r"this process read .*, transferred .* in \d+ requests;", log[0])
    names = bucket.names("out/")
    assert "out/0/commit_success.txt" in names and "out/0/items/commit_success.txt" in names
    assert "out/maxconv.unfinished.json" not in names
    assert stored(bucket.get("out", tmp_path / "got")) == converted(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("n", [1, 2])
def test_from_the_hub_to_a_bucket(bucket: Bucket, tmp_path: Path, n: int) -> None:
    (tmp_path / "home").mkdir()
    with hub_in(tmp_path / "home") as hub:
        tiny.write(CASE, hub.root / "org/qwen")
        environ = hub.environ(**bucket.environ, HF_TOKEN=TOKEN)
        words = [*WORDS, *(ALONE if n == 1 else ()), "--verify=none"]
        words += ["--hf_model_path=hf://org/qwen", "base_output_directory=gs://bucket/out"]
        with processes(n, words, tmp_path / "logs", environ=environ.items()) as running:
            codes = [process.wait(timeout=200) for process in running]
        log = said(tmp_path / "logs")
        assert codes == [0] * n, "\n".join(log)
        hub.assert_secret(*log)
    assert stored(bucket.get("out", tmp_path / "got")) == converted(tmp_path)


COUNTED = """
import json, sys
import jax
from maxconv import cli
from maxconv.jobs import convert
from maxconv.planning import overread
from maxconv.cli.commands import start

def command():
    job = convert.run(start(sys.argv[1:]))
    process = jax.process_index()
    planned = job.plan.read_nbytes(process), overread.between(job.plan, job.source, process)
    print(json.dumps([*planned, *job.source.traffic]), flush=True)

sys.exit(cli.run(command))
"""


@pytest.mark.slow
def test_bytes_that_are_served_are_those_that_were_planned(bucket: Bucket, tmp_path: Path) -> None:
    logs = tmp_path / "logs"
    mesh = ("ici_fsdp_parallelism=2", "ici_tensor_parallelism=4")  # both read parts of all rows
    words = [*tiny.maxtext_words(CASE, True), *mesh, "hardware=cpu", *places("out")]
    words.append("--verify=none")
    with processes(2, words, logs, COUNTED, bucket.environ.items()) as running:
        codes = [process.wait(timeout=200) for process in running]
    log = said(logs)
    assert codes == [0, 0], "\n".join(log)
    counts = [json.loads(lines.splitlines()[-1]) for lines in log]
    for planned, at_most, _, came, between, headers in counts:
        assert came == planned + between + headers and between <= at_most
    served = bucket.served
    assert sum(entry["bytes"] for entry in served) == sum(came for *_, came, _, _ in counts)
    assert len(served) == sum(requests for _, _, requests, *_ in counts)


def test_it_is_planned(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in bucket.environ.items():
        monkeypatch.setenv(name, value)
    assert cli.main(["plan", *WORDS, *ALONE, "--hf_model_path=gs://bucket/hf"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"(?m)^network  process 0 requests .* in ranges of up to 64.0 MiB", said)


@pytest.mark.slow
def test_a_checkpoint_is_replaced_only_when_told(bucket: Bucket, tmp_path: Path) -> None:
    """Nor is a half one in the way, or taken for one."""
    words = ("convert", *WORDS, *ALONE, *places("out"), "--verify=none", "--max_retries=0")
    bucket.settings(faults=[["*/o/hf/model-*", "503", 99, 30]])
    done = bucket.run(*words)
    assert done.returncode == 42 and "the server answered 503, 1 times" in done.stderr
    assert any("/items/" in name for name in bucket.names("out/0/"))
    assert bucket.run(program=LATEST).stdout == "None\n"
    bucket.settings()

    done = bucket.run(*words)
    assert done.returncode == 0, done.stderr
    before = bucket.names()
    done = bucket.run(*words)
    assert done.returncode == 2 and bucket.names() == before
    assert done.stderr.splitlines()[-1] == (
        "maxconv: gs://bucket/out/0 exists; add --overwrite to replace it, or name another "
        "directory."
    )
    done = bucket.run(*words, "--overwrite", "scan_layers=false", "--verify=full")
    assert done.returncode == 0 and "verified" in done.stdout
    assert bucket.names("out/0/items/_M") and not {*bucket.names("out/0/items/d/")} & {*before}


LATEST = """
from orbax.checkpoint import v1 as ocp

with ocp.training.Checkpointer("gs://bucket/out") as checkpointer:
    print(checkpointer.latest)
"""


@pytest.mark.parametrize(
    ("place", "fault", "said"),
    [
        ("gs://nobucket/out", None, "There is no bucket gs://nobucket; check its name, or create"),
        (
            "gs://bucket/out",
            "/storage/v1/b/bucket",
            "lacks storage.buckets.get on gs://bucket; grant it roles/storag",
        ),
        (
            "gs://bucket/out",
            "/upload/*",
            "lacks storage.objects.create on gs://bucket; grant it roles/s",
        ),
        (
            "gs://bucket/out",
            "*/o/out/maxconv.*",
            "lacks storage.objects.delete on gs://bucket; grant it roles/s",
        ),
    ],
)
def test_where_nothing_can_be_written_is_said_before(
    bucket: Bucket,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    place: str,
    fault: str | None,
    said: str,
) -> None:
    for name, value in bucket.environ.items():
        monkeypatch.setenv(name, value)
    fsspec.get_filesystem_class("gs").clear_instance_cache()  # which know another server
    bucket.settings(faults=[[fault, "403", 9]] if fault else [])
    source = f"--hf_model_path={tmp_path / 'hf'}"
    assert cli.main(["convert", *WORDS, *ALONE, source, f"base_output_directory={place}"]) == 2
    out, err = capsys.readouterr()
    assert not out and said in err.splitlines()[-1]
    fsspec.get_filesystem_class("gs").clear_instance_cache()
    assert all("/maxconv." in name for name in bucket.names("out"))  # could not be deleted


def test_an_object_that_changes_ends_the_conversion(bucket: Bucket) -> None:
    bucket.settings(faults=[["*/o/hf/model-00003-*", "replace", 1, 3]])
    done = bucket.run("convert", *WORDS, *ALONE, *places("out"))
    assert done.returncode == 1
    assert (
        "was replaced or removed while it was being read; a checkpoint must not change"
        in done.stderr
    )
    assert "out/0/commit_success.txt" not in bucket.names()


DIFFERING = """
import sys
import jax
from maxconv import cli
from maxconv.sources.gcs import GcsSource

GcsSource.versions = lambda source: {"one of the files": f"generation {jax.process_index()}"}
sys.exit(cli.main(["convert", *sys.argv[1:]]))
"""


@pytest.mark.slow
def test_processes_that_saw_different_objects_do_not_begin(bucket: Bucket, tmp_path: Path) -> None:
    words, logs = [*WORDS, *places("out")], tmp_path / "logs"
    with processes(2, words, logs, DIFFERING, bucket.environ.items()) as running:
        codes = [process.wait(timeout=100) for process in running]
    assert codes == [42, 42]
    assert "gs://bucket/hf changed while it was being opened; try again" in "\n".join(said(logs))
    assert bucket.names("out") == []


@pytest.mark.slow
def test_what_others_put_there_is_left_alone(bucket: Bucket, tmp_path: Path) -> None:
    """Also without a finished step, and beside what a conversion left that was cut off."""
    notes = tmp_path / "notes"
    notes.mkdir()
    (notes / "notes.txt").write_text("mine")
    words = ("convert", *WORDS, *ALONE, *places("out"), "--verify=none", "--max_retries=0")
    bucket.put(notes, "out/0")
    for more in ((), ("--overwrite",), ("--resume",)):
        done = bucket.run(*words, *more)
        assert done.returncode == 2, done.stderr
        assert done.stderr.splitlines()[-1] == (
            "maxconv: gs://bucket/out/0 was not written by maxconv, which does not delete it; "
            "remove it, or name another directory."
        )
    assert bucket.names("out") == ["out/0/notes.txt"]

    bucket.settings(faults=[["*/o/hf/model-*", "503", 99, 30]])
    cut = tuple(word.replace("bucket/out", "bucket/cut") for word in words)
    assert bucket.run(*cut).returncode == 42
    assert "cut/maxconv.lock" not in bucket.names("cut")
    bucket.put(notes, "cut/0/items")
    bucket.settings()
    done = bucket.run(*cut)
    assert done.returncode == 2 and "cut/0/items/notes.txt was not written by" in done.stderr
    assert "cut/0/items/notes.txt" in bucket.names("cut")
