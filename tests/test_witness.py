"""A checkpoint that is wrong just as the engine makes it is found out by numpy."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
import tiny
from etils import epath
from jobs import job_words, tiny_job
from safetensors.numpy import load_file
from test_verify import WINDOW, Case

from maxconv.algebra import full
from maxconv.config import parse
from maxconv.execution.engine import Engine
from maxconv.jobs import witness as module
from maxconv.jobs.prepare import prepared
from maxconv.jobs.witness import plainly_read, witness
from maxconv.sources.orbax import open_item


class Wrong(Engine):
    """An engine that takes the last rows for the first, of every leaf, whenever it is asked."""

    def make_slabs(self, slabs: Sequence[Any]) -> list[jax.Array]:
        made = super().make_slabs(slabs)
        return [jax.device_put(np.asarray(x)[::-1], x.sharding) for x in made]


@pytest.mark.parametrize("mode", ["sample", "full"])
def test_what_the_engine_makes_wrong_twice_is_found(mode: str, tmp_path: Path) -> None:
    with tiny_job(tmp_path) as job, Wrong(job.plan, job.source, WINDOW) as engine:
        case = Case(tmp_path, job, engine, "zarr3")
        report = case.verify(mode)
    assert report.leaves == report.total == len(job.plan.leaves)
    assert {problem.partition("[")[0] for problem in report.problems} == {
        leaf.name for leaf in job.plan.leaves
    }
    assert all("according to numpy" in problem for problem in report.problems)


@pytest.mark.parametrize("work", [module.WORK_BYTES, 1 << 10])
def test_a_full_check_compares_every_element_once(
    work: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "WORK_BYTES", work)
    with tiny_job(tmp_path) as job, Engine(job.plan, job.source, WINDOW) as engine:
        case = Case(tmp_path, job, engine, "zarr3")
        item = open_item(epath.Path(case.items))
        for mode in ("full", "sample"):
            seen, problems = witness(item, job.plan.leaves, job.source, mode)
            assert not problems
            if mode == "full":
                assert seen.compared == job.plan.output_nbytes
        monkeypatch.setattr(module, "SAMPLE_BYTES", 20_000)
        seen, _ = witness(item, job.plan.leaves, job.source, "sample")
        assert 0 < seen.compared < 20_000


@pytest.mark.slow
def test_packed_weights_and_merged_adapters_compare_right(tmp_path: Path) -> None:
    packed = min((len(c.tensors), name) for name, c in tiny.CASES.items() if c.is_packed)[1]
    for name, more in [(packed, []), ("llama3.1-8b", ["hf_lora_adapter_path"])]:
        directory = tmp_path / name
        model = tiny.write(name, directory / "hf")
        if more:
            more = [f"{more[0]}={tiny.write_adapter(name, 'linear', directory / 'lora')}"]
        words = tiny.maxtext_words(name, tiny.CASES[name].scans)
        with prepared(parse(job_words(directory, model, words, "fsdp8", more))) as job:
            with Engine(job.plan, job.source, WINDOW) as engine:
                saved = Case(directory, job, engine, "zarr3")
            item = open_item(epath.Path(saved.items))
            seen, problems = witness(item, job.plan.leaves, job.source, "full")
            assert not problems and seen.compared == job.plan.output_nbytes


def test_plain_reads_are_what_safetensors_says(tmp_path: Path) -> None:
    model = tiny.write("llama3.1-8b", tmp_path / "hf", shard_bytes=None)
    want = load_file(model / "model.safetensors")
    with tiny_job(tmp_path) as job:
        for remote in (False, True):
            if remote:
                job.source.path = lambda info: None  # type: ignore[method-assign]
            for name, array in want.items():
                box = tuple((n // 3, n) for n in array.shape)
                info = job.source.tensors[name]
                for b in (box, full(array.shape)):
                    got = plainly_read(job.source, info, b)
                    part = array[tuple(slice(*of) for of in b)]
                    assert got.dtype == ml_dtypes.bfloat16
                    np.testing.assert_array_equal(got, part)
