"""Where an export can go: directories, buckets and the Hub, on real servers that can fail."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import quote

import fsspec
import pytest
from buckets import Bucket, serving
from hubs import TOKEN, Hub, hub_in
from jobs import CPU
from test_export import converted, read
from test_processes import processes, said

from maxconv import cli
from maxconv.sources.trees import TreeSource
from maxconv.targets.export_journal import Journal, recorded
from maxconv.targets.ownership import Ownership

SMALL_FILES = "--max_shard_size=40KB"
PROGRAM = "from maxconv import cli; cli.script()"
WORDS = ("hardware=cpu", "--simulated_cpu_devices_count=8", "--verify=full")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model, and the checkpoint of MaxText that is exported."""
    return converted("qwen3-0.6b", True, tmp_path_factory.mktemp("made"))


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    """A bucket that this process finds, too."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "home"))
    with serving(tmp_path / "gcs") as bucket:
        for name, value in bucket.environ.items():
            monkeypatch.setenv(name, value)
        fsspec.get_filesystem_class("gs").clear_instance_cache()
        yield bucket
        fsspec.get_filesystem_class("gs").clear_instance_cache()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A Hub that this process finds, too."""
    with hub_in(tmp_path) as hub:
        constants = "huggingface_hub.constants"
        monkeypatch.setattr(f"{constants}.ENDPOINT", hub.url)
        template = f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(f"{constants}.HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(f"{constants}.HF_HOME", str(tmp_path / "home"))
        monkeypatch.setattr(f"{constants}.HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub


def export(made: tuple[Path, Path], to: str | Path, *words: str) -> int:
    model, out = made
    given = [f"--hf_model_path={model}", f"base_output_directory={to}", *words]
    return cli.main(["export", str(out), *CPU, *given])


def same_tensors(there: Path, model: Path) -> None:
    assert read(there) == read(model)
    for file in ("config.json", "tokenizer.json", "chat_template.jinja"):
        assert (there / file).read_bytes() == (model / file).read_bytes()


def left(names: Iterable[str]) -> list[str]:
    """What an export should not leave: anything of its own but its record."""
    return [name for name in names if "maxconv" in name and not name.endswith("maxconv.json")]


def is_clean(home: Path) -> bool:
    """Whether nothing is staged there any more."""
    return not [*(home / "maxconv").glob("*")]


def put_tree(bucket: Bucket, directory: Path, prefix: str) -> str:
    for path in directory.rglob("*"):
        if path.is_file():
            name = quote(f"{prefix}/{path.relative_to(directory)}", safe="")
            upload = f"/upload/storage/v1/b/bucket/o?uploadType=media&name={name}"
            bucket._ask("POST", upload, path.read_bytes())
    return f"gs://bucket/{prefix}"


def test_a_bucket(
    bucket: Bucket, made: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, to = made[0], "gs://bucket/deep/back"
    notes = tmp_path / "notes"
    notes.mkdir()
    (notes / "notes.txt").write_text("mine")
    bucket.put(notes, "deep/back")
    bucket.settings(faults=[["/upload/*", "503", 1], ["*/rewriteTo/*", "503", 1]])
    assert export(made, to, SMALL_FILES, "--verify=full") == 0
    there = bucket.get("deep/back", tmp_path / "there")
    same_tensors(there, model)
    files = sorted(path.name for path in there.glob("*.safetensors"))
    index = json.loads((there / "model.safetensors.index.json").read_text())
    assert len(files) > 2 and sorted(set(index["weight_map"].values())) == files
    assert is_clean(tmp_path / "home")
    names = bucket.names()
    assert left(names) == []

    capsys.readouterr()
    assert export(made, to) == 2
    assert f"{to} holds {files[0]}; add --overwrite to replace it" in capsys.readouterr().err
    assert bucket.names() == names
    assert export(made, to, "--overwrite", "--verify=full") == 0
    now = {name.removeprefix("deep/back/") for name in bucket.names("deep/back/")}
    assert now == {
        "maxconv.json",
        "notes.txt",
        "model.safetensors",
        *(p.name for p in model.iterdir()),
    } - {*(p.name for p in model.glob("*.safetensors*") if p.name != "model.safetensors")}
    same_tensors(bucket.get("deep/back", tmp_path / "again"), model)


def keys(names: Sequence[str]) -> list[str]:
    """Files without which nothing is a checkpoint."""
    ours = ("model.safetensors", "model.safetensors.index.json")
    return [name for name in names if name.rpartition("/")[2] in ours and "unfinished" not in name]


def words(made: tuple[str | Path, str | Path], to: str | Path, *more: str) -> list[str]:
    """The command line of an export in a process of its own."""
    model, out = made
    given = [f"--hf_model_path={model}", f"base_output_directory={to}", "--verify=none"]
    return ["export", str(out), *given, *WORDS[:2], *more]


@pytest.mark.parametrize(
    "fault",
    [
        ["/upload/*", "403", 9, 4],  # after probes, the lock, and a file
        pytest.param(["*/rewriteTo/*", "403", 9, 1], marks=pytest.mark.slow),
    ],
)
def test_a_write_to_a_bucket_that_fails_leaves_no_checkpoint(
    bucket: Bucket, made: tuple[Path, Path], tmp_path: Path, fault: list[Any]
) -> None:
    """The same command then needs no --overwrite. Also what is read lies in the bucket."""
    places = put_tree(bucket, made[0], "hf"), put_tree(bucket, made[1], "out")
    bucket.environ["HF_HOME"] = str(tmp_path / "home")
    bucket.settings(faults=[fault])
    done = bucket.run(*words(places, "gs://bucket/back", SMALL_FILES, *CPU))
    assert done.returncode == 1, done.stderr
    assert "gs://bucket/back cannot be written to (Forbidden" in done.stderr
    assert done.stderr.endswith("nothing was saved\n") and "Traceback" not in done.stderr
    names = bucket.names("back/")
    assert keys(names) == [] and is_clean(tmp_path / "home")
    assert any("unfinished" in name for name in names) and "back/maxconv.lock" not in names
    bucket.settings()
    assert export(made, "gs://bucket/back", SMALL_FILES, "--verify=full") == 0
    assert left(bucket.names("back/")) == []
    same_tensors(bucket.get("back", tmp_path / "there"), made[0])


def commits(hub: Hub) -> list[int]:
    return [entry["status"] for entry in hub.log if "/commit/" in entry["path"]]


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # huggingface_hub's own
def test_the_hub(
    hub: Hub, made: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    to, there, commit = "hf://org/back", hub.root / "org/back", "/api/*/commit/main"
    hub.settings(faults=[["/blobs/*", "503", 1], [commit, "503", 1], [commit, "412", 1]])
    assert export(made, to, SMALL_FILES, "--verify=full") == 0
    same_tensors(there, made[0])
    files = sorted(path.name for path in there.glob("*.safetensors"))
    assert len(files) > 2 and commits(hub) == [503, 412, 200]
    assert (there / ".gitattributes").exists() and is_clean(tmp_path / "home")
    out, err = capsys.readouterr()
    assert "verified 35 of 35" in out and f"saved: {to}, {len(files)} file(s)" in out
    hub.assert_secret(out, err)

    assert export(made, to) == 2
    assert f"{to}/chat_template.jinja exists; add --overwrite" in capsys.readouterr().err
    (there / "notes.txt").write_text("mine")
    assert export(made, to, "--overwrite", "--verify=full") == 0
    assert [path.name for path in there.glob("*.safetensors*")] == ["model.safetensors"]
    same_tensors(there, made[0])
    assert (there / "notes.txt").exists() and len(commits(hub)) == 4


def test_what_keeps_an_export_from_a_place_is_said_before_any_work(
    hub: Hub, made: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path
) -> None:
    for to, token, sentence in (
        ("hf://org/back", "", "needs a token; set HF_TOKEN"),
        ("hf://others/back", TOKEN, "The token has no write access to hf://others"),
        ("hf://org/back/deeper", TOKEN, "deeper is not of the form hf://org/name"),
        ("s3://bucket/back", TOKEN, "s3://bucket/back is not supported; give a directory, gs://"),
    ):
        monkeypatch.setenv("HF_TOKEN", token)
        assert export(made, to) == 2
        assert sentence in capsys.readouterr().err
    full = tmp_path / "full"
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    assert export(made, full) == 2
    assert "has 1000 B free, but the export needs 1" in capsys.readouterr().err
    assert export(made, "hf://org/back") == 2
    assert "KiB to stage the files; free some space, or set HF_HOME" in capsys.readouterr().err
    assert not full.exists() and not (hub.root / "org").exists()


@pytest.mark.slow
def test_an_upload_that_fails_leaves_nothing_in_the_repository(
    hub: Hub, made: tuple[Path, Path], tmp_path: Path
) -> None:
    hub.settings(faults=[["/blobs/*", "400", 1]])
    command = ["-m", "maxconv.cli", *words(made, "hf://org/back", SMALL_FILES, *CPU)]
    done = hub.run(*command, "--max_retries=0", HF_TOKEN=TOKEN)
    assert done.returncode == 42 and "The Hub answered 400 about org/back" in done.stderr
    assert "Traceback" not in done.stderr and not commits(hub) and is_clean(tmp_path / "home")


@pytest.mark.slow
def test_processes_commit_together(hub: Hub, made: tuple[Path, Path], tmp_path: Path) -> None:
    """And fail together."""
    given = [*words(made, "hf://org/back"), "--verify=full"]
    environ = hub.environ(HF_TOKEN=TOKEN)
    hub.settings(faults=[["/blobs/*", "400", 1]])
    with processes(2, [*given, "--max_retries=0"], tmp_path / "one", PROGRAM, environ) as running:
        assert [process.wait(120) for process in running] == [42, 42], said(tmp_path / "one")
    log = "\n".join(said(tmp_path / "one"))
    assert log.count("The Hub answered 400 about org/back") == 1 and not commits(hub)
    with processes(2, given, tmp_path / "two", PROGRAM, environ) as running:
        assert [process.wait(120) for process in running] == [0, 0], said(tmp_path / "two")
    same_tensors(hub.root / "org/back", made[0])
    assert len([*(hub.root / "org/back").glob("*.safetensors")]) == 2 and commits(hub) == [200]
    assert is_clean(tmp_path / "home")


@pytest.mark.slow
def test_from_a_bucket_to_a_bucket(bucket: Bucket, made: tuple[Path, Path], tmp_path: Path) -> None:
    """Two processes; also the checkpoint and the model lie there."""
    model, out = made
    places = put_tree(bucket, model, "hf"), put_tree(bucket, out, "out")
    given = [*words(places, "gs://bucket/back"), "--verify=full"]
    environ = bucket.environ | {"HF_HOME": str(tmp_path / "home")}
    with processes(2, given, tmp_path / "logs", PROGRAM, environ) as running:
        assert [process.wait(120) for process in running] == [0, 0], said(tmp_path / "logs")
    assert "verified 35 of 35" in said(tmp_path / "logs")[0]
    there = bucket.get("back", tmp_path / "there")
    same_tensors(there, model)
    assert len([*there.glob("*.safetensors")]) == 2 and is_clean(tmp_path / "home")
    assert left(bucket.names("back/")) == []


def test_a_finished_export_is_only_verified_again(
    made: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A host may be preempted after the last rename; the same command is then run again."""
    back = tmp_path / "back"
    assert export(made, back, SMALL_FILES, "--resume") == 0
    times = {path: path.stat().st_mtime_ns for path in back.iterdir()}
    assert export(made, back, SMALL_FILES, "--resume", "--verify=full") == 0
    assert "an earlier attempt has written everything" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in back.iterdir()} == times
    for words in ([SMALL_FILES], ["--resume"]):  # not told to; or another export
        assert export(made, back, *words) == 2
        assert "add --overwrite to replace it" in capsys.readouterr().err
    (back / "config.json").unlink()
    assert export(made, back, SMALL_FILES, "--resume") == 2


def test_a_place_has_one_owner(
    made: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = Ownership(str(tmp_path / "back/maxconv.lock"), "back")
    other.acquire()
    assert export(made, tmp_path / "back") == 2
    other.release()
    assert f"{tmp_path}/back is being written to by another" in capsys.readouterr().err
    assert [*(tmp_path / "back").iterdir()] == []


SLOW = """
import os, time
from maxconv import cli
from maxconv.sources.trees import TreeSource
from maxconv.targets import export_journal

read, export_journal.INTERVAL = TreeSource.read, 0.05

def slow(source, *what):
    time.sleep(float(os.environ["SLOW"]))
    read(source, *what)

TreeSource.read = slow
cli.script()
"""


def finished(back: Path, process: int = 0) -> dict[str, int]:
    """The parts that a process has made durable."""
    path = back / f"maxconv.unfinished/finished.{process}"
    return json.loads(path.read_text()) if path.exists() else {}


def wait_until(done: Callable[[], object], process: "subprocess.Popen[Any]") -> None:
    while not done():
        assert process.poll() is None
        time.sleep(0.01)


def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The tensors that are read from checkpoints from now on."""
    seen, read = list[str](), TreeSource.read

    def noted(source: TreeSource, info: Any, parts: Any) -> None:
        seen.append(info.name)
        read(source, info, parts)

    monkeypatch.setattr(TreeSource, "read", noted)
    return seen


def test_a_killed_export_goes_on(
    made: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """With the same bits; another one starts over, and says why."""
    back, other = tmp_path / "back", tmp_path / "other"
    command = [sys.executable, "-c", SLOW, *words(made, back, SMALL_FILES, *CPU)]
    with subprocess.Popen(command, env=os.environ | {"SLOW": "0.3"}) as process:
        wait_until(lambda: len(finished(back)) >= 3, process)
        process.kill()
    assert keys([path.name for path in back.iterdir()]) == []
    kept = finished(back)
    shutil.copytree(back, other)
    seen = reads(monkeypatch)
    page = tmp_path / "time.json"
    given = [SMALL_FILES, *WORDS[1:], "--resume", f"--trace={page}"]
    assert export(made, back, *given) == 0
    resumed = len(seen)
    assert "are already written" in capsys.readouterr().err
    same_tensors(back, made[0])
    assert left(path.name for path in back.iterdir()) == []
    kinds = {event["cat"] for event in json.loads(page.read_text())["traceEvents"]}
    assert {"read", "compute", "to host", "write"} <= kinds

    seen.clear()
    assert export(made, other, *given, "--save_dtype=float32") == 0
    assert len(seen) - resumed == len(kept)
    err = capsys.readouterr().err
    assert "starts over, because save_dtype was not given and is float32" in err
    assert {dtype for dtype, *_ in read(other).values()} == {"F32"}


@pytest.mark.slow
def test_a_process_that_dies_ends_the_others(made: tuple[Path, Path], tmp_path: Path) -> None:
    """Both then go on where they were."""
    back, logs = tmp_path / "back", tmp_path / "logs"
    given = [*words(made, back), "--resume"]
    with processes(2, given, logs, SLOW, {"SLOW": "0.5"}) as running:
        wait_until(lambda: min(len(finished(back, i)) for i in range(2)) >= 2, running[0])
        running[1].kill()
        assert running[0].wait(60) == 42
    assert "process 1 disappeared" in said(logs)[0]
    assert keys([path.name for path in back.iterdir()]) == []
    with processes(2, [*given, "--verify=full"], tmp_path / "again", PROGRAM) as running:
        assert [process.wait(120) for process in running] == [0, 0], said(tmp_path / "again")
    assert "are already written" in said(tmp_path / "again")[0]
    same_tensors(back, made[0])


def test_what_is_recorded_was_made_durable_before(tmp_path: Path) -> None:
    path, synced = tmp_path / "finished.0", list[bool]()
    journal = Journal(path, lambda: synced.append(path.exists()), {})
    journal.close()
    journal.add("a part", 3)
    journal._record()
    assert synced == [False] and recorded(path) == {"a part": 3}
    for damaged in ("", "[1]", '{"a part": null}', "[" * 9999):
        path.write_text(damaged)
        assert recorded(path) == {}
