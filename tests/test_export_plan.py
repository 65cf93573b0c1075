"""Plans of exports, against exports that were run, and what `verify` finds in one later."""

import json
import re
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import tiny
from bare_trees import write_tree
from headers import published, write_headers
from jobs import CPU
from test_export import converted, export, read
from test_processes import processes, said
from test_tpu_compile import FOREIGN, check_memory, exchanges, names, uncached
from test_tpus import needs_libtpu
from test_verify import flip

from maxconv import cli, to_huggingface
from maxconv.cli.export_plan import short_names
from maxconv.config import parse
from maxconv.execution.program import compile_cell
from maxconv.jobs.export import run
from maxconv.jobs.export_record import record
from maxconv.jobs.prepare_export import prepared
from maxconv.jobs.reporter import Reporter

CASE = "gemma3-4b+vision"
SMALL = "--max_shard_size=40KB"


class Made(NamedTuple):
    """A model, its conversion, which has no vision encoder, and the export of that."""

    model: Path
    out: Path
    back: Path

    @property
    def words(self) -> list[str]:
        sizes = [w for w in tiny.maxtext_words(CASE, True) if not w.startswith("scan_layers")]
        sizes = [word for word in sizes if not word.startswith("use_multimodal")]
        return [*sizes, f"--hf_model_path={self.model}", *CPU]


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Made:
    directory = tmp_path_factory.mktemp("export")
    model, out = converted(CASE, True, directory, "use_multimodal=False")
    back = directory / "back"
    made = Made(model, out, back)
    assert export(out, model, back, *made.words, SMALL) == 0
    return made


@pytest.fixture
def made(pristine: Made, tmp_path: Path) -> Iterator[Made]:
    """An intact export; what a test does to it, no other test sees."""
    kept = shutil.copytree(pristine.back, tmp_path / "kept")
    yield pristine
    shutil.rmtree(pristine.back)
    shutil.copytree(kept, pristine.back)


def plan(made: Made, capsys: pytest.CaptureFixture[str], *words: str) -> str:
    capsys.readouterr()
    assert cli.main(["plan", "--export", str(made.out), *made.words, SMALL, *words]) == 0
    return capsys.readouterr().out


def sizes(directory: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in directory.glob("*.safetensors")}


def test_a_plan_is_what_is_done(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = parse([*made.words, SMALL, f"base_output_directory={tmp_path / 'again'}"])
    with prepared(config, str(made.out), writes=False) as job:
        assert not (tmp_path / "again").exists()
        assert job.tree.stats.bytes_read == job.published.stats.bytes_read == 0
        run(job, Reporter())
        counted = job.tree.stats.bytes_read + job.published.stats.bytes_read
        assert job.read_nbytes(0) == counted > 0
        assert {file.name: file.nbytes for file in job.files} == sizes(tmp_path / "again")
    text, after = plan(made, capsys), read(made.back)
    assert f"output   {len(after)} tensors, " in text
    rows = re.findall(r"^(model-\S+) +0 +(\d+) ", text, re.MULTILINE)
    assert [name for name, _ in rows] == sorted(sizes(made.back))
    assert sum(int(n) for _, n in rows) == len(after)
    assert re.search(r"^vision_tower\S* .* copied$", text, re.MULTILINE)
    assert f"not in the checkpoint, so copied from {made.model}: " in text
    assert "not read: step, 8 B" in text
    assert "config.json" not in text
    assert "torch_dtype is float32 instead of bfloat16" in plan(
        made, capsys, "weight_dtype=float32"
    )


def test_names_that_differ_in_numbers_alone_are_one() -> None:
    names = [f"a.{layer}.b.{expert}.c" for layer in (5, 11, 17) for expert in range(4)]
    assert short_names([*names, "d", "a.1.e", "a.2.e", "a.4.e", "d"]) == (
        "a.{5..17..6}.b.{0..3}.c, d, a.{1,2,4}.e"
    )


PLAN_AND_RUN = """
import json, sys
from maxconv.cli.commands import start
from maxconv.jobs.export import run
from maxconv.jobs.prepare_export import prepared
from maxconv.jobs.reporter import Reporter
import jax

config = start(sys.argv[2:], "export")
with prepared(config, sys.argv[1]) as job:
    run(job, Reporter())
    print(json.dumps([job.read_nbytes(jax.process_index()),
                      job.tree.stats.bytes_read + job.published.stats.bytes_read]))
"""
TWO_HOSTS = "--tpu_type=v5litepod-8:ct5lp-hightpu-4t"  # of four chips each


@pytest.mark.slow
def test_a_plan_for_hosts_that_are_not_here(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is that of as many processes, with as many devices, that are."""
    memory = "--max_host_memory_gb=0.9"
    words = [word for word in made.words if not word.startswith("skip_jax")]
    config = parse([*words, SMALL, memory, TWO_HOSTS])
    with prepared(config, str(made.out), writes=False) as job:
        files = {file.name: (file.process, file.nbytes) for file in job.files}
        reads = [job.read_nbytes(process) for process in job.plan.processes]
    assert f"{len(files)} file(s)" in plan(made, capsys, memory, TWO_HOSTS)
    given = [str(made.out), *words, SMALL, memory, "--simulated_cpu_devices_count=4"]
    given += [f"base_output_directory={tmp_path / 'two'}", "--verify=none"]
    logs = tmp_path / "logs"
    with processes(2, given, logs, PLAN_AND_RUN) as running:
        assert [process.wait(300) for process in running] == [0, 0], said(logs)
    counted = [json.loads(log.splitlines()[-1]) for log in said(logs)]
    assert counted == [[n, n] for n in reads]
    assert {process for process, _ in files.values()} == {0, 1}
    assert {name: n for name, (_, n) in files.items()} == sizes(tmp_path / "two")
    assert cli.main(["verify", str(tmp_path / "two"), "--simulated_cpu_devices_count=8"]) == 0


def test_a_model_that_no_disk_here_holds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From its metadata alone: there is nothing else of it."""
    write_headers(published("llama3.1-8b"), tmp_path / "hf")
    tree = write_tree("llama3.1-8b.scan", tmp_path / "tree")
    words = ["plan", "--tpu_type=v5p-64", f"--export={tree}", f"--hf_model_path={tmp_path / 'hf'}"]
    assert cli.main(words) == 0
    out = capsys.readouterr().out
    assert "mesh     8 processes of 4 devices" in out
    assert "output   291 tensors, 15.0 GiB, in 8 file(s) and their index" in out
    assert "not read: opt_state, 59.8 GiB" in out  # two moments of each weight
    (line,) = re.findall(r"^read     29.9 GiB in all, 0 B .* (\d\.\d+) times the mean", out, re.M)
    assert float(line) < 1.5  # the table and the head are one tensor each
    written = re.findall(r"^ +process \d: reads \S+ GiB, writes (\d\.\d) GiB$", out, re.M)
    assert len(written) == 8 and max(map(float, written)) < 1.05 * 15.0 / 8 + 0.1
    assert "model.layers.{0..31}.mlp.up_proj.weight" in out
    assert "slice    v5p-64: 2x4x4 chips, 8 hosts; a host uses" in out
    before = sorted(path.name for path in tmp_path.iterdir())
    assert before == ["hf", "tree"]
    for more, sentence in (
        (["--report=plan.html"], "--report draws conversions only"),
        (["--compile", "--tpu_type="], "--compile needs the type of slice"),
    ):
        assert cli.main([*words, *more]) == 2
        assert sentence in capsys.readouterr().err


@needs_libtpu
@pytest.mark.slow
@pytest.mark.usefixtures(uncached.__name__)
@pytest.mark.parametrize("model_name", ["qwen3-0.6b"])
def test_no_chip_gathers_a_leaf(model_name: str, tmp_path: Path) -> None:
    write_headers(published(model_name), tmp_path / "hf")
    tree = write_tree(f"{model_name}.scan", tmp_path / "tree")
    words = [TWO_HOSTS, "--compile", "--max_host_memory_gb=1"]
    config = parse([*words, f"--hf_model_path={tmp_path / 'hf'}"])
    with prepared(config, str(tree), writes=False) as job:
        recipes = names(job.plan)
        for leaf in job.plan.leaves:
            assert max(slab.local_nbytes for slab in leaf.slabs) <= job.window // 4, leaf.name
    with ThreadPoolExecutor(2) as pool:
        cells = [*pool.map(compile_cell, recipes)]
    for (recipe, name), compiled in zip(recipes.items(), cells, strict=True):
        check_memory(name, recipe, compiled.memory_analysis())
        assert {*FOREIGN.findall(compiled.as_text() or "")} <= exchanges(recipe), name


def damages(made: Made) -> Iterator[tuple[str, Any]]:
    """Ways to damage a file, each with the name of the file."""
    first, last = (sorted(sizes(made.back))[i] for i in (0, -1))
    data = 8 + int.from_bytes((made.back / first).read_bytes()[:8], "little")
    for bit in (0, 8 * 20, 8 * data + 3):
        yield first, lambda path, bit=bit: flip(path, bit)
    yield last, lambda path: flip(path, 8 * path.stat().st_size - 2)  # it was copied
    yield last, lambda path: path.write_bytes(path.read_bytes()[:-1])
    yield first, Path.unlink
    for name in ("model.safetensors.index.json", "config.json", "tokenizer.json"):
        yield name, lambda path: flip(path, 8 * (path.stat().st_size // 2) + 1)
        yield name, Path.unlink
        yield name, lambda path: path.write_bytes(path.read_bytes()[:-3])
    yield "model-00099-of-00100.safetensors", lambda path: path.write_bytes(b"")
    yield "model.safetensors", lambda path: shutil.copy(path.parent / first, path)


def test_any_damage_is_found_and_named(made: Made, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["verify", str(made.back)]) == 0
    after = read(made.back)
    assert f"verified {len(after)} of {len(after)} tensors" in capsys.readouterr().out
    where = json.loads((made.back / "model.safetensors.index.json").read_text())["weight_map"]
    for name, damage in damages(made):
        path = made.back / name
        intact = path.read_bytes() if path.exists() else None
        damage(path)
        assert cli.main(["verify", str(made.back)]) == 1, name
        told = capsys.readouterr().err
        assert f"{made.back} differs from its source" in told
        names = [name, *(tensor for tensor, file in where.items() if file == name)]
        assert any(f"maxconv: {text}" in told for text in names), (name, told)
        path.write_bytes(intact) if intact is not None else path.unlink()
    assert cli.main(["verify", str(made.back)]) == 0


def test_what_was_exported_may_have_moved(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    moved = shutil.copytree(made.out, tmp_path / "elsewhere")
    file = made.back / "maxconv.json"
    found = json.loads(file.read_text())
    given = [word for word in found["words"] if not word.startswith("load_parameters_path=")]
    assert f"load_parameters_path={made.out}/0/items" in found["words"]
    found["words"] = [*given, "load_parameters_path=/nowhere", "overwrite=true", "report=/x"]
    file.write_text(json.dumps(found))
    assert cli.main(["verify", str(made.back)]) == 2
    assert "/nowhere is not a checkpoint" in capsys.readouterr().err
    assert cli.main(["verify", str(made.back), f"load_parameters_path={moved}"]) == 0
    assert cli.main(["inspect", str(made.back)]) == 0
    assert f"{len(read(made.back))} tensors" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (None, "has no intact maxconv.json"),
        ('{"job": "expo', "has no intact maxconv.json"),
        ({"words": "many"}, "are not a list of strings"),
        ({"words": ["max_shard_size=much"]}, "max_shard_size=much is not a size such as 5GB"),
        ({"words": []}, "Give the checkpoint first"),
    ],
)
def test_a_record_is_not_trusted(
    text: Any, sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text("{}")
    if isinstance(text, dict):
        text = json.dumps(record([], "/x") | text)
    if text is not None:
        (tmp_path / "maxconv.json").write_text(text)
    assert cli.main(["verify", str(tmp_path), *CPU]) == 2
    assert sentence in capsys.readouterr().err


def test_an_export_says_where_it_goes(
    pristine: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """MaxText has a default, and so has the drop-in for it."""
    monkeypatch.chdir(tmp_path)
    assert cli.main(["export", str(pristine.out), *pristine.words]) == 2
    assert "goes: base_output_directory=DIR." in capsys.readouterr().err
    given = [*pristine.words, f"load_parameters_path={pristine.out}/0/items", "--verify=none"]
    to_huggingface.main(["to_huggingface", "base.yml", *given])
    assert read(tmp_path / "mt_output") == read(pristine.back)
    assert (
        cli.main(["export", str(pristine.out), *given, f"base_output_directory={pristine.out}"])
        == 2
    )
    assert "is for a MaxText checkpoint; name another" in capsys.readouterr().err
    for command in ("export", "convert"):
        arguments: Sequence[str] = [*pristine.words, f"--export={pristine.out}"]
        assert cli.main([command, *[str(pristine.out)] * (command == "export"), *arguments]) == 2
