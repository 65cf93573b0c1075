"""Files that vanish while they are written, or afterwards: it is said, and is no checkpoint."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from etils import epath
from jobs import tiny_job
from test_checkpoint import FORMATS, lazy_save, stored
from test_crash import Place
from test_resume import cut_off

from maxconv import cli
from maxconv.targets.completeness import problems


def largest(directory: Path) -> Path:
    return max((p for p in directory.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def contents(items: Path, format: str) -> Any:
    """What TensorStore reads of all arrays; None if it fails."""
    try:
        if format.startswith("ocdbt"):
            return stored(items)
        found = [p for p in items.rglob("*") if p.is_file() and p.parent != items]
        return {p: p.read_bytes() for p in found if p.parts[-2] != "array_metadatas"}
    except ValueError:
        return None


@pytest.mark.parametrize("format", ["ocdbt, zarr3", "ocdbt, zarr2", "files, zarr3", "files, zarr2"])
def test_every_file_is_missed(tmp_path: Path, format: str) -> None:
    """Each file that arrays are read from, one by one: gone, or cut in half."""
    with tiny_job(tmp_path, "qwen3-8b", scan=FORMATS[format][-1]) as job:
        lazy_save(tmp_path / "lazy", job, format)
        leaves = [leaf.name for leaf in job.plan.leaves]
    items = tmp_path / "lazy/0/items"
    assert problems(items, leaves) == []
    (problem,) = problems(items, [*leaves, "params.params.other"])
    assert problem == f"{items} lacks params.params.other."
    whole = contents(items, format)
    files = [p for p in sorted(items.rglob("*")) if p.is_file()]
    missed = 0
    some = {*files[:: max(1, len(files) // 12)], items / "_METADATA"}
    some.add(max(files, key=lambda path: path.stat().st_size))
    for path in sorted(some):
        content = path.read_bytes()
        for less in (None, content[: len(content) // 2]):
            path.unlink(missing_ok=True)
            if less is not None:
                path.write_bytes(less)
            if contents(items, format) != whole:
                missed += 1
                assert problems(items, leaves), path
        path.write_bytes(content)
    assert missed > 2
    assert problems(items, leaves) == []


VANISH = """
import shutil, sys
from pathlib import Path
from maxconv import cli
from maxconv.targets import orbax

save, how, out = orbax.save, sys.argv[1], Path(sys.argv[2])

def vanishing(*args, **kwargs):
    save(*args, **kwargs)
    items = out / "0/items"
    match how:
        case "rm": shutil.rmtree(out)
        case "mv": out.rename(out.with_name("elsewhere"))
        case "file": max(items.rglob("d/*"), key=lambda path: path.stat().st_size).unlink()

orbax.save = vanishing
sys.exit(cli.main(sys.argv[3:]))
"""


@pytest.mark.parametrize("how", ["rm", pytest.param("mv", marks=pytest.mark.slow), "file"])
def test_files_that_vanish_end_the_conversion(tmp_path: Path, how: str) -> None:
    place = Place(tmp_path)
    command = [sys.executable, "-c", VANISH, how, str(place.out), *place.words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 1 and "saved" not in done.stdout
    assert f"{place.out} lost files during the conversion; run it again." in done.stderr
    assert place.has_none() if place.out.exists() else how != "file"
    place.converts("--resume")


def test_what_lost_a_file_is_not_said_to_be_finished(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = Place(tmp_path)
    place.converts()
    largest(place.out).unlink()
    capsys.readouterr()
    assert cli.main([*place.words, "--resume"]) == 2
    said = capsys.readouterr().err
    assert "is missing" in said and "0 exists; add --overwrite to replace it" in said
    place.converts("--resume", "--overwrite")


def claim_more(store: Path) -> None:
    """The journal of one more leaf than there is, and of all there are to be."""
    journal = store / "finished.json"
    entries = json.loads(journal.read_text())
    metadatas = entries["array_metadatas"]
    names = {"params.params.decoder.decoder_norm.scale", "params.params.token_embedder.embedding"}
    known = {m["array_metadata"]["param_name"] for m in metadatas}
    for name in names - known:
        more = json.loads(json.dumps(metadatas[0]))
        more["array_metadata"]["param_name"] = name
        metadatas.append(more)
    journal.write_text(json.dumps(entries))


def lose_file(store: Path) -> None:
    largest(store / "d").unlink()


def lose_tree(store: Path) -> None:
    (store / "manifest.ocdbt").unlink()


def cut_file(store: Path) -> None:
    file = largest(store / "d")
    os.truncate(file, file.stat().st_size // 2)


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """A conversion that was cut off."""
    place = Place(tmp_path_factory.mktemp("half"))
    cut_off(place, 2)
    shutil.copytree(place.out, place.out.with_name("kept"))
    return place


@pytest.mark.parametrize("spoil", [claim_more, lose_file, lose_tree, cut_file])
def test_a_journal_that_claims_more_than_there_is(
    half: Place, spoil: Callable[[Path], None]
) -> None:
    shutil.rmtree(half.out)
    shutil.copytree(half.out.with_name("kept"), half.out)
    spoil(half.out / "0.orbax-checkpoint-tmp/items.orbax-checkpoint-tmp/ocdbt.process_0")
    half.converts("--resume")


BROKEN = [b"", b"no JSON", b"[]", b"3", b'{"identity": 3}', b'{"identity": {"a": 1}}', b"\0\xff"]
BROKEN += [b"[" * 100_000, b'{"array_metadatas": 3}', b'{"array_metadatas": [3]}', b'""', b"null"]


@pytest.mark.parametrize("file", ["finished.json", "maxconv.unfinished.json"])
def test_what_is_broken_is_not_used_and_said(
    half: Place, file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from maxconv.jobs import resume
    from maxconv.targets import journal, place

    shutil.rmtree(half.out)
    shutil.copytree(half.out.with_name("kept"), half.out)
    (path,) = half.out.rglob(file)
    for text in BROKEN:
        path.write_bytes(text)
        if file == "finished.json":
            kept, notices = journal._journal(epath.Path(path.parent)), ("damaged",)
            assert not kept
        else:
            kept, notices = resume.recorded(str(half.out))
            assert kept is None and place.problems(str(half.out), 0, overwrite=False) == []
        assert "damaged" in notices[0]
    path.write_bytes(b"[" * 100_000)
    capsys.readouterr()
    half.converts("--resume")
    assert "is damaged" in capsys.readouterr().err


def test_another_memory_budget_is_named(half: Place, capsys: pytest.CaptureFixture[str]) -> None:
    """When it changes the plan; else it does not matter."""
    from maxconv.jobs import resume

    was = {"the digest of the plan": "1", resume._MEMORY: "512 MiB"}
    assert resume.problem("out", was, {**was, resume._MEMORY: "64 MiB"}) is None
    now = {"the digest of the plan": "2", resume._MEMORY: "64 MiB"}
    assert resume.problem("out", was, now) == (
        "out holds another unfinished conversion: the memory for buffers (--max_host_memory_gb) "
        "was 512 MiB and is 64 MiB; give the same arguments, or remove --resume to start over."
    )
