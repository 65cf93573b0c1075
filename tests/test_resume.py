"""A conversion that was cut off goes on where it was, to the same bits; or says why it can't."""

import os
import re
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
from jobs import MESHES, job_words
from orbax.checkpoint._src.metadata.array_metadata_store import Serializer
from test_crash import PROGRAM, Place, ended, started, wait_until
from test_processes import processes, said, stored

from maxconv import cli
from maxconv.config import parse
from maxconv.jobs.convert import run
from maxconv.jobs.prepare import prepared

SLOW = 0.25  # seconds that each of some 30 reads takes; journals are a second apart


def finished(store: Path) -> set[str]:
    """The leaves that a process finished, by the journal in its store."""
    try:
        return {
            m.param_name for m in Serializer().deserialize((store / "finished.json").read_text())
        }
    except FileNotFoundError:
        return set()


def cut_off(place: Place, leaves: int, *words: str) -> None:
    """Kills a conversion when some leaves are finished; with --resume, by itself."""
    store = place.out / "0.orbax-checkpoint-tmp/items.orbax-checkpoint-tmp/ocdbt.process_0"
    before = store.with_name("ocdbt.process_0attempt0")

    def is_time() -> bool:
        has_begun = before.exists() or "--resume" not in words
        return has_begun and len(finished(store)) >= leaves

    with started([*place.words, *words], SLOW=SLOW) as process:
        wait_until(is_time, process)
        process.kill()
        ended(process)
    assert place.has_none()


def bytes_left(words: Sequence[str], items: Path) -> tuple[int, int]:
    """Bytes that the leaves take which are not finished, and that all take."""
    there = set().union(*map(finished, items.glob("ocdbt.*")))
    with prepared(parse(words), writes=False) as job:
        left = [leaf for leaf in job.plan.leaves if leaf.name not in there]
        return replace(job.plan, leaves=tuple(left)).read_nbytes(0), job.plan.read_nbytes(0)


def test_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place, alone = Place(tmp_path), tmp_path / "alone"
    words = [*place.words[1:], "--resume"]
    cut_off(place, 2)
    cut_off(place, 2, "--resume")
    store = place.out / "0.orbax-checkpoint-tmp/items.orbax-checkpoint-tmp/ocdbt.process_0"
    assert finished(store.with_name("ocdbt.process_0attempt0")).isdisjoint(finished(store))
    left, total = bytes_left(words, store.parent)

    file = sorted(place.hf.glob("*.safetensors"))[0]
    before = file.stat()
    os.utime(file, ns=(0, before.st_mtime_ns + 10**9))
    changes = [
        (
            place.words,
            f"{file.name} was {before.st_size} bytes, modified .* and is {before.st_size} bytes",
        ),
        ([*place.words, "scan_layers=false"], "scan_layers was .* and is"),
        ([*place.words, "--save_dtype=float32"], "save_dtype was not given and is float32"),
    ]
    for changed, difference in changes:
        capsys.readouterr()
        assert cli.main([*changed, "--resume"]) == 2
        (line,) = [li for li in capsys.readouterr().err.splitlines() if li[:5] != "note:"]
        assert re.search(f"another unfinished conversion: .*{difference}", line)
        os.utime(file, ns=(0, before.st_mtime_ns))

    # What was written when it was cut off, and that nothing points to yet.
    (store.with_name("ocdbt.process_0attempt0") / "d" / f"{1:032x}").write_bytes(b"half a value")
    job = run(parse(words))
    assert job.source.stats.bytes_read == left and 0 < left < total
    assert sorted(path.name for path in place.out.iterdir()) == ["0", "maxconv.json"]
    assert not list(place.out.rglob("finished.json*"))
    assert cli.main(["verify", str(place.out)]) == 0
    assert cli.main([*place.words, f"base_output_directory={alone}"]) == 0
    once, resumed = stored(alone), stored(place.out)
    assert once == resumed

    again = run(parse(words))  # as a job does that is started again once too often
    assert again.source.stats.bytes_read == 0 and again.there == "finished"


def test_without_resume_it_starts_again(tmp_path: Path) -> None:
    place = Place(tmp_path)
    cut_off(place, 2)
    with prepared(parse(place.words[1:]), writes=False) as job:
        total = job.plan.read_nbytes(0)
    assert run(parse(place.words[1:])).source.stats.bytes_read == total
    assert sorted(path.name for path in place.out.iterdir()) == ["0", "maxconv.json"]


@pytest.mark.slow
def test_processes_go_on(tmp_path: Path) -> None:
    """A leaf is there when all processes finished their parts of it."""
    model, out = tiny.write("llama3.1-8b", tmp_path / "hf"), tmp_path / "together"
    maxtext = tiny.maxtext_words("llama3.1-8b", True)
    words = [
        *maxtext,
        *MESHES["fsdp4_tp2"],
        "hardware=cpu",
        f"--hf_model_path={model}",
        f"base_output_directory={out}",
        "--verify=full",
        "--resume",
    ]
    stores = [
        out / f"0.orbax-checkpoint-tmp/items.orbax-checkpoint-tmp/ocdbt.process_{i}"
        for i in range(2)
    ]
    program = PROGRAM.replace("sys.argv[1:]", "['convert', *sys.argv[1:]]")
    with processes(2, words, tmp_path / "cut", program, {"SLOW": str(SLOW)}) as running:
        until = time.monotonic() + 100
        while min(len(finished(store)) for store in stores) < 3:
            assert time.monotonic() < until and running[1].poll() is None, said(tmp_path / "cut")
            time.sleep(0.02)
        for process in running:
            process.kill()
    both = set.intersection(*map(finished, stores))
    with processes(2, words, tmp_path / "logs") as running:
        codes = [process.wait(timeout=100) for process in running]
    logs = said(tmp_path / "logs")
    assert codes == [0, 0], "\n".join(logs)
    assert f"note: {len(both)} of " in logs[0] and "verified" in logs[0]
    alone = job_words(tmp_path / "alone", model, maxtext, "fsdp4_tp2", ["--verify=none"])
    assert cli.main(["convert", *alone]) == 0
    assert stored(out) == stored(tmp_path / "alone" / "out")
