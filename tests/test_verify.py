"""Every flipped bit of a checkpoint is found, and named; what is right is not complained about."""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorstore as ts
from etils import epath
from jobs import tiny_job
from plans import make_leaf

from maxconv.errors import UserError
from maxconv.execution.engine import Engine
from maxconv.jobs.prepare import Job
from maxconv.jobs.verify import Report, _difference, leaves_to_check, verify
from maxconv.sources.ocdbt import value_spans
from maxconv.targets import orbax

WINDOW = 64 << 10  # bytes: a few leaves at a time
FORMATS = {  # use_ocdbt, use_zarr3, compression, scan_layers
    "zarr3": (True, True, False, True),
    "unscanned": (True, True, False, False),
    "zarr2": (True, False, False, True),
    "files": (False, True, False, True),
    "files, zarr2": (False, False, False, True),
    "zstd": (True, True, True, True),
}


class Case:
    """A checkpoint, with what it was made from."""

    def __init__(self, directory: Path, job: Job, engine: Engine, format: str):
        ocdbt, zarr3, compression, self.scan = FORMATS[format]
        self.plan, self.source, self.engine = (
            job.plan,
            job.source,
            engine,
        )  # one engine: it compiles once
        self.pristine = directory / "pristine"
        self.out = directory / "out"
        orbax.save(
            str(self.pristine),
            orbax.train_state({p.name: make_leaf(engine, p) for p in self.plan.leaves}),
            self.scan,
            WINDOW << 8,
            orbax.Progress(),
            orbax.context(ocdbt, zarr3, compression),
        )
        self.reset()

    @property
    def items(self) -> Path:
        return self.out / "0" / "items"

    def reset(self) -> None:
        shutil.rmtree(self.out, ignore_errors=True)
        shutil.copytree(self.pristine, self.out)

    def verify(self, mode: str = "full", at: Path | None = None) -> Report:
        custom = {"scan_layers": self.scan}
        arguments = (self.plan, self.engine, self.source, mode, WINDOW)
        return verify(at or self.out, *arguments, custom=custom)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Case]]:
    """Makes the case of a format, or mends it if it was made before."""
    cases: dict[str, Case] = {}
    with ExitStack() as opened:

        def make(format: str) -> Case:
            if format not in cases:
                directory = tmp_path_factory.mktemp("case")
                job = opened.enter_context(tiny_job(directory, scan=FORMATS[format][-1]))
                engine = opened.enter_context(Engine(job.plan, job.source, WINDOW))
                cases[format] = Case(directory, job, engine, format)
            cases[format].reset()
            return cases[format]

        yield make


@pytest.fixture
def case(made: Callable[[str], Case]) -> Case:
    return made("zarr3")


def data_files(items: Path) -> Iterator[str]:
    """Files that are neither JSON nor marks."""
    plain = {"zarr.json", ".zarray", "_METADATA", "_sharding", "commit_success.txt"}
    for file in sorted(items.rglob("*")):
        if file.is_file() and file.name not in plain and file.parent.name != "array_metadatas":
            yield str(file.relative_to(items))


def owners(items: Path, file: str) -> list[tuple[int, int, str]]:
    """The spans of a file that hold a leaf's bytes, and the leaf."""
    if not (items / "manifest.ocdbt").exists():
        return [(0, (items / file).stat().st_size, file.split("/")[0])]
    store = ts.KvStore.open({"driver": "file", "path": f"{items}/"}).result()
    root = ts.ocdbt.dump(store).result()["versions"][-1]["root"]["location"]
    spans = []
    for entry in ts.ocdbt.dump(store, root).result()["entries"]:
        _, name, start, length = entry.get("indirect_value", ":::").replace("/:", "/").split(":")
        if name == file:
            leaf = entry["key"].decode().split("/")[0]
            spans.append((int(start), int(start) + int(length), leaf))
    return spans


def flip(path: Path, bit: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[bit // 8] ^= 1 << bit % 8
    path.write_bytes(raw)


@pytest.mark.parametrize("format", FORMATS)
def test_what_was_saved_is_right(made: Callable[[str], Case], format: str) -> None:
    case = made(format)
    report = case.verify()
    assert report.ok, report.problems
    assert report.leaves == report.total == len(case.plan.leaves)
    assert report.nbytes == sum(leaf.nbytes for leaf in case.plan.leaves)


def test_any_directory_of_the_checkpoint_will_do(case: Case) -> None:
    assert case.verify("sample", case.out / "0").ok
    assert case.verify("sample", case.items).ok


@pytest.mark.parametrize("format", [f for f in FORMATS if f != "zstd"])
def test_a_flipped_bit_in_any_file_is_named(made: Callable[[str], Case], format: str) -> None:
    case = made(format)
    random = np.random.default_rng(len(format))
    flipped = []
    for file in data_files(case.items):
        spans = owners(case.items, file)
        for bit in random.integers((case.items / file).stat().st_size * 8, size=8).tolist():
            leaves = [leaf for begin, end, leaf in spans if begin <= bit // 8 < end]
            # Without the root there is no checkpoint; it has a test of its own.
            if leaves or file.startswith("ocdbt."):
                flip(case.items / file, bit)
                flipped.append((leaves[0] if leaves else file, file, bit))
    problems = case.verify().problems
    assert len(flipped) > 16
    for name, file, bit in flipped:
        assert any(name in problem for problem in problems), (name, file, bit)


def test_a_flipped_bit_in_the_root_is_named(case: Case) -> None:
    random = np.random.default_rng(0)
    (node,) = (case.items / "d").iterdir()
    for file in (case.items / "manifest.ocdbt", node):
        for bit in random.integers(file.stat().st_size * 8, size=20).tolist():
            flip(file, bit)
            report = case.verify()
            flip(file, bit)
            assert report.leaves == 0
            assert any(str(file.relative_to(case.items)) in p for p in report.problems), bit
    assert case.verify().ok


def test_one_bit_of_one_leaf(case: Case) -> None:
    leaf = next(leaf for leaf in case.plan.leaves if leaf.name.endswith("embedding"))
    for file in data_files(case.items):
        for start, _, name in owners(case.items, file):
            if name == leaf.name:
                flip(case.items / file, 8 * (start + 2 * 43))  # the 43rd of rows of 42
                (problem,) = case.verify().problems
                assert problem.startswith(f"{leaf.name}[1, 1] is ")
                assert problem.endswith(f"; 1 of {259 * 42:,} elements differ.")
                return
    pytest.fail("the embedding lies nowhere")


def test_a_leaf_that_does_not_decode_does_not_hide_the_others(case: Case) -> None:
    values = value_spans(epath.Path(case.items))
    file, spans = next((f, sorted(s)) for f, s in values.items())
    flip(case.items / file, 8 * (spans[0][1] - 1))  # the end of a shard is its index's CRC
    (name,) = {leaf for a, _, leaf in owners(case.items, file) if a == spans[0][0]}
    report = case.verify()
    assert [p for p in report.problems if p.startswith(f"{name} cannot be read: ")]
    assert report.leaves == len(case.plan.leaves) and len(report.problems) == 1


@pytest.mark.parametrize("format", ["zarr3", "files, zarr2"])
def test_an_empty_file(made: Callable[[str], Case], format: str) -> None:
    case = made(format)
    file = next(f for f in data_files(case.items) if owners(case.items, f) and "step" not in f)
    (case.items / file).write_bytes(b"")
    names = {leaf for _, _, leaf in owners(case.pristine / "0" / "items", file)}
    problems = case.verify().problems
    assert all(any(p.startswith(f"{n} cannot be read: ") for p in problems) for n in names)


def test_bytes_that_belong_to_nothing(case: Case) -> None:
    file = sorted(f for f in data_files(case.items) if f.startswith("ocdbt.process_0/d/"))[0]
    size = (case.items / file).stat().st_size
    with (case.items / file).open("ab") as data:
        data.write(b"more")
    assert case.verify().problems == [
        f"{file} is damaged: bytes {size} to {size + 4} belong to no value or node."
    ]


def test_leaves_of_another_model(case: Case) -> None:
    first, second, *rest = case.plan.leaves
    other = replace(second, leaf=replace(second.leaf, dtype=np.dtype(np.float32)))
    added = replace(first, leaf=replace(first.leaf, name="params.params.new"))
    plan = replace(case.plan, leaves=(other, *rest, added))
    report = verify(case.out, plan, case.engine, case.source, "full", WINDOW)
    assert report.problems == [
        f"{second.name} is {second.shape} bfloat16, but should be {second.shape} float32.",
        "params.params.new is missing.",
        f"{first.name} is in the checkpoint, but not in the plan.",
    ]
    assert report.leaves == report.total == len(rest)


def test_another_source(case: Case, tmp_path: Path) -> None:
    with tiny_job(tmp_path, dtype="float16") as job:  # rounded once more
        with Engine(job.plan, job.source, WINDOW) as engine:
            report = verify(case.out, job.plan, engine, job.source, "full", WINDOW)
    assert len(report.problems) == len(job.plan.leaves)
    assert all(problem.endswith("elements differ.") for problem in report.problems)


def test_another_step(case: Case) -> None:
    store = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{case.items}/"}}
    ts.open({"driver": "zarr3", "kvstore": {**store, "path": "step/"}}).result()[()] = 3
    assert "step is 3, but should be 0." in case.verify().problems


def test_a_broken_metadata_file(case: Case) -> None:
    path = case.items / "_METADATA"
    path.write_text(json.dumps(json.loads(path.read_text()))[:-9])
    (problem,) = case.verify("sample").problems
    assert "_METADATA is not a JSON object" in problem


def test_no_checkpoint(case: Case, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a MaxText checkpoint"):
        case.verify(at=tmp_path)


def test_nan_payloads_count(case: Case) -> None:
    leaf = next(leaf for leaf in case.plan.leaves if len(leaf.shape) == 2)
    raw = np.full(leaf.shape, 0x7FC0, np.uint16)
    other = raw.copy()
    other[3, 1] ^= 1
    a, b = (jax.device_put(x.view(jnp.bfloat16), leaf.sharding) for x in (raw, other))
    (slab,) = leaf.slabs
    assert _difference(leaf, slab, a, a) is None
    assert _difference(leaf, slab, a, b) == (
        f"{leaf.name}[3, 1] is nan (0x7fc1), but should be nan (0x7fc0) according to the source; "
        f"1 of {raw.size:,} elements differ."
    )


def test_a_sample_has_every_recipe_and_is_bounded(
    made: Callable[[str], Case], monkeypatch: pytest.MonkeyPatch
) -> None:
    case = made("unscanned")
    assert leaves_to_check(case.plan, "sample") == list(case.plan.leaves)  # all are small
    monkeypatch.setattr("maxconv.jobs.verify.SMALL_BYTES", 100)
    sample = leaves_to_check(case.plan, "sample")
    recipes = {step.recipe for leaf in sample for step in leaf.steps}
    assert recipes == {step.recipe for leaf in case.plan.leaves for step in leaf.steps}
    assert len(sample) < len(case.plan.leaves)
    assert all(leaf in sample for leaf in case.plan.leaves if leaf.nbytes <= 100)
    said = []
    arguments = (case.plan, case.engine, case.source, "sample", WINDOW)
    verify(case.out, *arguments, lambda r: said.append(r.leaves))
    assert said == list(range(1, len(sample) + 1))
    monkeypatch.setattr("maxconv.jobs.verify.SAMPLE_BYTES", 0)
    assert all(leaf.nbytes <= 100 for leaf in leaves_to_check(case.plan, "sample"))
