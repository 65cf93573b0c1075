"""Checkpoints that go to the Hub: a real server, another process, that can also fail."""

import json
import re
import shutil
from pathlib import Path

import pytest
import tiny
from hubs import TOKEN, hub_in
from jobs import CPU, MESHES
from test_processes import processes, said, stored

from maxconv import cli
from maxconv.errors import ConversionError
from maxconv.targets import publication

CASE, MODEL, OUT = "qwen3-30b-a3b", "org/qwen", "hf://org/out"
WORDS = [*tiny.maxtext_words(CASE, True), *MESHES["fsdp4_tp2"], "hardware=cpu"]
FROM_THE_HUB = [*WORDS, f"--hf_model_path=hf://{MODEL}"]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A conversion from a directory to another."""
    directory = tmp_path_factory.mktemp("alone")
    model = tiny.write(CASE, directory / "hf")
    words = [*WORDS, *CPU, f"--hf_model_path={model}", f"base_output_directory={directory}/out"]
    assert cli.main(["convert", *words, "--verify=none"]) == 0
    return directory


@pytest.fixture
def hub(tmp_path, alone):
    with hub_in(tmp_path) as hub:
        shutil.copytree(alone / "hf", hub.root / MODEL)
        yield hub


def published(hub) -> Path:
    return hub.root / "org/out"


def same(hub, alone) -> bool:
    """Whether the repository holds what a conversion to a directory writes, and nothing else."""
    there, here = published(hub), alone / "out"
    one, other = (
        {re.sub("[0-9a-f]{32}", "*", str(p.relative_to(d))) for p in (d / "0").rglob("*")}
        for d in (there, here)
    )
    files = {re.sub(r"process_\d+", "process_0", name) for name in one}
    assert files == other
    return stored(there) == stored(here)


def commits(hub):
    return [entry for entry in hub.log if "/commit/" in entry["path"]]


def test_from_the_hub_to_the_hub(hub, alone, tmp_path):
    commit = "/api/*/commit/main"
    faults = [["/blobs/*", "503", 1], ["/blobs/*", "reset", 1], [commit, "503", 1]]
    faults += [[commit, "412", 1]]  # somebody else's commit came between
    hub.settings(private=[MODEL], faults=faults)
    words = [*FROM_THE_HUB, f"base_output_directory={OUT}", f"hf_access_token={TOKEN}"]
    done = hub.convert(*words, "--verify=full")
    assert done.returncode == 0, done.stderr
    assert (
        "a token on the command line is visible" in done.stderr and "is public" not in done.stderr
    )
    assert "verified" in done.stdout and "hf download org/out --local-dir DIR" in done.stdout
    assert same(hub, alone)
    assert [entry["status"] for entry in commits(hub)] == [503, 412, 200]
    uploads = [entry for entry in hub.log if entry["path"].startswith("/blobs/")]
    assert {entry["host"].partition(":")[0] for entry in uploads} == {"localhost"}
    assert json.loads((published(hub) / "maxconv.json").read_text())["maxconv"]
    page = tmp_path / "plan.html"
    plan = hub.run("-m", "maxconv.cli", "plan", *words, f"--report={page}")
    assert plan.returncode == 0 and page.exists(), plan.stderr
    hub.assert_secret(done.stdout, done.stderr, plan.stdout, plan.stderr)
    assert not list((tmp_path / "home/maxconv").iterdir())
    again = hub.run("-m", "maxconv.cli", "verify", OUT, HF_TOKEN=TOKEN)
    assert again.returncode == 2 and "download it first: `hf download" in again.stderr
    shown = hub.run("-m", "maxconv.cli", "inspect", f"hf://{MODEL}", HF_TOKEN=TOKEN)
    assert shown.returncode == 0 and "Qwen3MoeForCausalLM" in shown.stdout, shown.stderr
    # What is private is so for others, too.
    assert hub.convert(*FROM_THE_HUB[:-1], f"--hf_model_path={OUT}").returncode == 2


@pytest.mark.slow
def test_two_processes_from_the_hub_to_a_directory(hub, alone, tmp_path):
    words = [*FROM_THE_HUB, f"base_output_directory={tmp_path / 'out'}", "--verify=none"]
    with processes(2, words, tmp_path / "logs", environ=hub.environ(HF_TOKEN=TOKEN)) as running:
        codes = [process.wait(timeout=240) for process in running]
    assert codes == [0, 0], "\n".join(said(tmp_path / "logs"))
    assert stored(tmp_path / "out") == stored(alone / "out")
    asked = [entry["path"] for entry in hub.log if entry["path"].startswith("/api/models/")]
    asked = [path for path in asked if not path.endswith("/auth-check")]
    main, commit = sorted(asked)  # one process finds out which commit it is, the other takes that
    assert main == f"/api/models/{MODEL}" and commit.startswith(f"{main}/revision/")


@pytest.mark.slow
def test_two_processes(hub, alone, tmp_path):
    words = [*FROM_THE_HUB, f"base_output_directory={OUT}", "--public"]
    with processes(2, words, tmp_path / "logs", environ=hub.environ(HF_TOKEN=TOKEN)) as running:
        codes = [process.wait(timeout=240) for process in running]
    logs = said(tmp_path / "logs")
    assert codes == [0, 0], "\n".join(logs)
    assert "verified" in logs[0] and not logs[1].strip()
    assert same(hub, alone) and len(commits(hub)) == 1
    hub.assert_secret(*logs)


APART = """
import os, sys
os.environ["HF_HOME"] += sys.argv[-1]
from maxconv import cli
sys.exit(cli.main(["convert", *sys.argv[1:]]))
"""


@pytest.mark.slow
def test_processes_that_share_no_disk_are_told_so(hub, tmp_path):
    words = [*FROM_THE_HUB, f"base_output_directory={OUT}"]
    environ = hub.environ(HF_TOKEN=TOKEN)
    with processes(2, words, tmp_path / "logs", APART, environ) as running:
        codes = [process.wait(timeout=120) for process in running]
    logs = said(tmp_path / "logs")
    assert codes == [2, 2] and any("The processes do not share" in log for log in logs), logs
    assert not published(hub).exists()


@pytest.fixture
def here(hub, monkeypatch, tmp_path):
    """A conversion to the Hub in this process."""
    constants = "huggingface_hub.constants"
    monkeypatch.setattr(f"{constants}.ENDPOINT", hub.url)
    monkeypatch.setattr(f"{constants}.HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(f"{constants}.HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    model = f"--hf_model_path={hub.root / MODEL}"
    words = [*WORDS, *CPU, model, "--verify=none"]
    return lambda place=OUT, *more: cli.main(
        ["convert", *words, f"base_output_directory={place}", *more]
    )


MEASURED = """
import os, sys
from pathlib import Path
from maxconv import cli
from maxconv.jobs import prepare as job
from maxconv.targets import publication as publish, place as target
from maxconv.sources.ocdbt import value_spans

job.window_of = lambda config: 32 << 10
publish.LARGE, publish.INTERVAL = 256, 0.01
make_hollow, scratch_problems = publish.make_hollow, target.scratch_problems

def measured(*what):
    (store,) = Path(os.environ["HF_HOME"]).rglob("ocdbt.process_0")
    whole = [v for f, v in value_spans(store).items() if (store / f).stat().st_mode & 0o200]
    print("on disk", sum(stop - start for values in whole for start, stop in values))
    make_hollow(*what)

def heard(directory, nbytes):
    print("claimed", nbytes)
    return scratch_problems(directory, nbytes)

publish.make_hollow, target.scratch_problems = measured, heard
sys.exit(cli.main(["convert", *sys.argv[1:]]))
"""


@pytest.mark.slow
def test_the_disk_holds_no_more_than_its_bound(hub, tmp_path):
    hub.settings(seconds=0.02, large=100)
    case = "deepseek4-284b"  # of many leaves
    tiny.write(case, hub.root / MODEL)
    words = [*tiny.maxtext_words(case, False), "ici_fsdp_parallelism=1", *CPU, "--verify=full"]
    words += [f"--hf_model_path={hub.root / MODEL}", f"base_output_directory={OUT}"]
    done = hub.run("-c", MEASURED, *words, HF_TOKEN=TOKEN)
    assert done.returncode == 0, done.stderr
    on_disk, claimed = (
        max(map(int, re.findall(rf"{what} (\d+)", done.stdout))) for what in ("on disk", "claimed")
    )
    total = sum(len(value) for value in stored(published(hub)).values())
    # Without the nodes of the tree, which weigh something beside values so small.
    assert on_disk <= claimed < total / 4, (on_disk, claimed, total)


@pytest.mark.slow
def test_an_upload_that_fails_leaves_nothing_in_the_repository(hub, alone):
    words = [*FROM_THE_HUB, f"base_output_directory={OUT}", "--max_retries=0", "--verify=none"]
    hub.settings(faults=[["/blobs/*", "400", 1]])
    done = hub.convert(*words, HF_TOKEN=TOKEN)
    assert done.returncode == 42 and "The Hub answered 400 about org/out" in done.stderr
    assert [path.name for path in published(hub).iterdir()] == [".gitattributes"]
    assert hub.convert(*words, HF_TOKEN=TOKEN).returncode == 0
    assert same(hub, alone)
    done = hub.convert(*words, HF_TOKEN=TOKEN)
    assert done.returncode == 2 and "0 exists; add --overwrite" in done.stderr
    before = {path: path.stat().st_mtime_ns for path in published(hub).rglob("*")}
    assert hub.convert(*words, "--overwrite", "scan_layers=False", HF_TOKEN=TOKEN).returncode == 0
    now = {path.name for path in published(hub).rglob("d/*")}
    assert now.isdisjoint(path.name for path in before if path.parent.name == "d")
    assert stored(published(hub)).keys() != stored(alone / "out").keys()


MEANWHILE = """
import os, sys
from pathlib import Path
from maxconv import cli
from maxconv.targets.publication import Publication

commit = Publication.commit

def later(self):
    (step := Path(os.environ["REPOSITORY"], "0")).mkdir()
    (step / "notes.txt").write_text("of mine")
    commit(self)

Publication.commit = later
sys.exit(cli.main(["convert", *sys.argv[1:]]))
"""


def test_what_came_meanwhile_is_left_alone(hub, here, monkeypatch, capsys):
    words = [*WORDS, *CPU, f"--hf_model_path={hub.root / MODEL}", "--verify=none", "--overwrite"]
    words += [f"base_output_directory={OUT}"]
    done = hub.run("-c", MEANWHILE, *words, HF_TOKEN=TOKEN, REPOSITORY=str(published(hub)))
    assert done.returncode == 1, done.stderr
    assert f"{OUT}/0/notes.txt and 0 more files were added" in done.stderr
    assert (published(hub) / "0/notes.txt").exists() and not commits(hub)

    monkeypatch.setattr("maxconv.targets.publication.problems", lambda *_: [])  # it was not there
    assert here() == 2
    assert f"{OUT}/0 exists; add --overwrite" in capsys.readouterr().err
    assert (published(hub) / "0/notes.txt").exists() and not commits(hub)


def test_what_no_index_explains_ends_the_wait_for_room(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path))
    monkeypatch.setattr(publication, "PATIENCE", 0.5)
    going = publication.Publication(OUT, TOKEN, 0, public=False, overwrite=False)
    data = going.scratch / "0.orbax-checkpoint-tmp/items.orbax-checkpoint-tmp/ocdbt.process_1/d"
    data.mkdir(parents=True)
    (data / ("0" * 32)).write_bytes(b"x" * publication.LARGE)
    going.wait_for_room(0, 0)
    going.wait_for_room(1, publication.LARGE)
    with pytest.raises(
        ConversionError,
        match="0{32} cannot be uploaded: after .* the index of its store does not refer",
    ):
        going.wait_for_room(1, 0)


@pytest.mark.parametrize(
    ("settings", "words", "token", "told"),
    [
        ({}, (), "", "needs a token; set HF_TOKEN, or run `hf auth login`"),
        ({}, (), "hf_bad", "The Hub does not accept the token"),
        ({"writers": []}, (), TOKEN, "The token has no write access to hf://org; create one"),
        (
            {"writers": []},
            (f"hf://{MODEL}",),
            TOKEN,
            f"The token has no write access to hf://{MODEL};",
        ),
        (
            {},
            ("hf://others/out",),
            TOKEN,
            "The token has no write access to hf://others; create one",
        ),
        ({}, ("hf://org/out/deeper",), TOKEN, "deeper is not of the form hf://org/name"),
        ({"private": [MODEL]}, (f"hf://{MODEL}", "--public"), TOKEN, "exists and is private;"),
        (
            {"faults": [["/api/repos/create", "403", 1]]},
            (),
            TOKEN,
            "no write access to hf://org/out",
        ),
        ({}, (OUT, "checkpoint_storage_use_ocdbt=False"), TOKEN, "is not supported on the Hub"),
        ({}, ("out", "--public"), TOKEN, "public=True is only for the Hub"),
    ],
)
def test_what_keeps_us_from_a_repository_is_said_before_any_work(
    hub, here, monkeypatch, capsys, settings, words, token, told
):
    hub.settings(**settings)
    monkeypatch.setenv("HF_TOKEN", token)
    place, *more = words or (OUT,)
    assert here(place, *more) == 2
    assert told in capsys.readouterr().err
    assert not published(hub).exists() and not commits(hub)


def test_offline_nothing_is_written(here, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert here() == 2
    assert f"HF_HUB_OFFLINE forbids writing to {OUT}" in capsys.readouterr().err


def test_a_repository_that_keeps_files_out_is_told(hub):
    hub.settings(ignored="*/_sharding")
    done = hub.convert(*FROM_THE_HUB, f"base_output_directory={OUT}", HF_TOKEN=TOKEN)
    assert (
        done.returncode == 1 and "has 0/items/_sharding and 0 more files that differ" in done.stderr
    )
