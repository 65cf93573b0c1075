"""What Orbax and MaxText read beside the arrays is read by verify; a flipped bit is named."""

import json
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from etils import epath
from jax.sharding import Mesh, NamedSharding
from jobs import tiny_job
from test_verify import WINDOW, Case, flip

from maxconv.errors import UserError
from maxconv.execution.engine import Engine
from maxconv.jobs import metadata
from maxconv.jobs.metadata import metadata_problems
from maxconv.sources.orbax import open_item

FILES = {  # from the directory of the step
    "items/_METADATA",
    "items/_sharding",
    "items/array_metadatas/process_0",
    "_CHECKPOINT_METADATA",
}
TIMES = ("init_timestamp_nsecs", "commit_timestamp_nsecs")


@pytest.fixture(scope="module", params=["zarr3", "files, zarr2"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    directory = tmp_path_factory.mktemp("case")
    with ExitStack() as opened:
        job = opened.enter_context(tiny_job(directory))
        engine = opened.enter_context(Engine(job.plan, job.source, WINDOW))
        yield Case(directory, job, engine, request.param)


@pytest.fixture
def case(made: Case) -> Iterator[Case]:
    made.reset()
    yield made


def says(raw: bytes) -> object:
    """What a file says to who reads it: JSON but for times, which nobody can check."""
    try:
        document = json.loads(raw)
        return {key: value for key, value in document.items() if key not in TIMES}
    except (AttributeError, ValueError):
        return raw


def problems(case: Case) -> dict[str, str]:
    item = open_item(epath.Path(case.items))
    return metadata_problems(item, case.plan, {"scan_layers": case.scan})


@pytest.mark.parametrize("file", sorted(FILES))
def test_a_flipped_bit_of_any_byte_is_named(
    case: Case, file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metadata, "_load_problems", lambda *_: {})  # found without Orbax, too
    item = open_item(epath.Path(case.items))
    path, random = case.items.parent / file, np.random.default_rng(len(file))
    raw = path.read_bytes()
    step = max(1, len(raw) // 80)  # bytes, from one flip to the next
    for byte in range(int(random.integers(step)), len(raw), step):
        flip(path, 8 * byte + int(random.integers(8)))
        found = metadata_problems(item, case.plan, {"scan_layers": case.scan})
        changed = says(path.read_bytes()) != says(raw)
        assert not changed or any(Path(file).name in p for p in found.values()), byte
        path.write_bytes(raw)
    assert not metadata_problems(item, case.plan, {"scan_layers": case.scan})


@pytest.mark.parametrize("file", sorted(FILES))
def test_verify_names_a_file_that_is_gone_empty_or_cut(case: Case, file: str) -> None:
    path = case.items.parent / file
    raw = path.read_bytes()
    for content in (None, b"", raw[: len(raw) // 2], b"{}", b"[]"):
        path.unlink() if content is None else path.write_bytes(content)
        if file == "items/_METADATA" and content is None:  # there is no checkpoint
            with pytest.raises(UserError, match="is not a MaxText checkpoint"):
                case.verify("sample")
        else:
            found = case.verify("sample").problems
            said = "is damaged" if file == "items/_METADATA" else Path(file).name
            assert any(said in problem for problem in found), content
        path.write_bytes(raw)
    assert case.verify("sample").ok


def test_other_metadata_than_maxtext_should_find(case: Case) -> None:
    path = case.items.parent / "_CHECKPOINT_METADATA"
    path.write_text(path.read_text().replace('"scan_layers": true', '"scan_layers": false'))
    assert list(problems(case).values()) == [
        "_CHECKPOINT_METADATA is damaged: custom_metadata, scan_layers is False, "
        "but should be True."
    ]


def test_a_process_that_left_no_array_metadata(case: Case) -> None:
    files = case.items / "array_metadatas"
    shutil.move(files / "process_0", files / "process_1")
    assert "array_metadatas/process_0" in problems(case)


def test_a_checkpoint_from_another_mesh_is_right_if_all_of_it_is(case: Case) -> None:
    mesh = case.plan.mesh
    devices = mesh.devices.reshape(-1)[::-1].reshape(mesh.devices.shape)
    here = Mesh(devices, mesh.axis_names, axis_types=mesh.axis_types)
    leaves = [
        replace(p, leaf=replace(p.leaf, sharding=NamedSharding(here, p.sharding.spec)))
        for p in case.plan.leaves
    ]
    item = open_item(epath.Path(case.items))
    elsewhere = replace(case.plan, leaves=tuple(leaves))
    assert not metadata_problems(item, elsewhere, None)
    path = case.items / "_sharding"
    document = json.loads(path.read_text())
    key = next(iter(document))
    document[key] = document[key].replace('"shape": [1, 1, 1, 4', '"shape": [1, 1, 1, 8')
    path.write_text(json.dumps(document))
    assert "_sharding" in metadata_problems(item, elsewhere, None)
