"""What surrounds a relayout: plan, verify, resume and overwrite, several processes, buckets."""

import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import fsspec
import pytest
from buckets import Bucket, serving
from jobs import CPU, MESHES
from test_export import converted
from test_export_targets import PROGRAM, SLOW, put_tree, reads, wait_until
from test_processes import processes, said, stored
from test_relayout import assert_same, files, relayout, restored
from test_resume import finished
from test_verify import flip

from maxconv import cli
from maxconv.sources.ocdbt import value_spans

pytestmark = pytest.mark.filterwarnings("ignore:Sharding info")

EIGHT = ("hardware=cpu", "--simulated_cpu_devices_count=8")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A model, its conversion with stacked layers, and that laid out anew without."""
    directory = tmp_path_factory.mktemp("made")
    model, out = converted("llama3.1-8b", True, directory)
    relayout(out, directory / "apart", "scan_layers=false", *MESHES["fsdp4_tp2"])
    return model, out, directory / "apart"


def command(checkpoint: str | Path, to: str | Path, *more: str) -> list[str]:
    given = [f"base_output_directory={to}", "scan_layers=false", *MESHES["fsdp4_tp2"]]
    return ["relayout", str(checkpoint), *EIGHT, *given, "--verify=none", *more]


def test_a_flipped_bit_is_named(
    made: tuple[Path, Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where the source has moved since."""
    model, out, _ = made
    new, moved = tmp_path / "new", tmp_path / "moved"
    shutil.copytree(out, tmp_path / "out")
    relayout(tmp_path / "out", new, "scan_layers=false", f"--hf_model_path={model}")
    (tmp_path / "out").rename(moved)
    capsys.readouterr()
    assert cli.main(["verify", str(new)]) == 2
    assert f"{tmp_path / 'out'}/0/items is not a checkpoint" in capsys.readouterr().err
    verify = ["verify", str(new), f"load_parameters_path={moved}"]
    assert cli.main(verify) == 0
    assert "verified 30 of 30 leaves bit for bit" in capsys.readouterr().out
    items = new / "0/items"
    file, spans = max(value_spans(items).items(), key=lambda item: len(item[1]))
    start, _ = max(spans, key=lambda span: span[1] - span[0])
    flip(items / file, 8 * start + 5)
    assert cli.main(verify) == 1
    assert re.search(r"params\.params\.\S+\[.*\] is .*, but should be", capsys.readouterr().err)


@pytest.mark.parametrize("on", [(), ("--tpu_type=v5p-64",)])
def test_it_is_planned(
    on: Sequence[str],
    made: tuple[Path, Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen = reads(monkeypatch)
    page = tmp_path / "plan.html"
    given = ["scan_layers=false", f"base_output_directory={tmp_path / 'new'}", *CPU, *on]
    assert cli.main(["plan", "--relayout", str(made[1]), *given, f"--report={page}"]) == 0
    said = capsys.readouterr().out
    assert "decoder/layers_{0..2}/mlp/wi_0/kernel" in said and "30 leaves" in said
    assert "layers_{0..2}" in page.read_text() or "layers_0" in page.read_text()
    assert not seen and not (tmp_path / "new").exists()


@pytest.mark.slow
def test_a_killed_relayout_goes_on(
    made: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without making again what was finished; another result is replaced only when told."""
    _, out, apart = made
    new = tmp_path / "new"
    store = new / "0.orbax-checkpoint-tmp/items.orbax-checkpoint-tmp/ocdbt.process_0"
    program = [sys.executable, "-c", SLOW, *command(out, new)]
    with subprocess.Popen(program, env=os.environ | {"SLOW": "0.4"}) as process:
        wait_until(lambda: len(finished(store)) >= 4, process)
        process.kill()
    assert not (new / "0").exists()
    there = finished(store)
    seen = reads(monkeypatch)
    assert cli.main([*command(out, new), "--resume"]) == 0
    wanted = restored(apart)
    stacks = Counter(re.sub(r"layers_\d+", "layers", name) for name in there)
    done = {name.removeprefix("params.params.") for name, n in stacks.items() if n == 3}
    assert done and done.isdisjoint(seen)
    assert_same(restored(new), wanted)
    assert sorted(path.name for path in new.iterdir()) == ["0", "maxconv.json"]

    before = files(new)
    assert cli.main(command(out, new, "scan_layers=true")) == 2
    assert files(new) == before
    assert cli.main([*command(out, new), "scan_layers=true", "--overwrite"]) == 0
    assert_same(restored(new), restored(out))


@pytest.mark.slow
@pytest.mark.parametrize("scan", ["true", "false"])
def test_processes_write_what_one_writes(
    scan: str, made: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    """And read each byte once between them, chunks of the other mesh included."""
    model, out, apart = made
    source = apart if scan == "true" else out
    given = [f"scan_layers={scan}", *MESHES["fsdp8"], f"--hf_model_path={model}"]
    relayout(source, tmp_path / "alone", *given)
    shared = [f"base_output_directory={tmp_path / 'together'}", "hardware=cpu", "--verify=full"]
    words = ["relayout", str(source), *given, *shared]
    with processes(2, words, tmp_path / "logs", PROGRAM) as running:
        codes = [process.wait(timeout=240) for process in running]
    logs = said(tmp_path / "logs")
    assert codes == [0, 0], "\n".join(logs)
    assert "verified" in logs[0] and not logs[1].strip()
    assert stored(tmp_path / "together") == stored(tmp_path / "alone")


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    """A bucket that this process finds, too."""
    with serving(tmp_path / "gcs") as bucket:
        for name, value in bucket.environ.items():
            monkeypatch.setenv(name, value)
        fsspec.get_filesystem_class("gs").clear_instance_cache()
        yield bucket
        fsspec.get_filesystem_class("gs").clear_instance_cache()


@pytest.mark.slow
def test_from_a_bucket_to_a_bucket(
    bucket: Bucket,
    made: tuple[Path, Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model, out, apart = made
    source, hf = put_tree(bucket, out, "out"), put_tree(bucket, model, "hf")
    given = command(source, "gs://bucket/new", f"--hf_model_path={hf}")
    assert cli.main([*given, "--verify=full"]) == 0
    assert_same(restored(bucket.get("new", tmp_path / "new")), restored(apart))
    before = bucket.names("out/")
    for to in ("gs://bucket/out", "gs://bucket/out/0"):
        capsys.readouterr()
        assert cli.main([*command(source, to), f"--hf_model_path={hf}", "--overwrite"]) == 2
        assert "name another directory" in capsys.readouterr().err
    assert bucket.names("out/") == before
