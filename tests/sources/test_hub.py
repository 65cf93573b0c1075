"""Models on a Hub, read by range: a real server, another process, that can also fail."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from jobs import job_words

from maxconv.sources.remote import GAP, SPAN, spans

SERVER = Path(__file__).parents[1] / "servers" / "hub.py"
CASE, MODEL, TOKEN = "qwen3-30b-a3b", "org/qwen", "hf_aSecretThatNobodyMaySee"


class Hub:
    """A Hub that serves a tiny model; conversions from it are processes, too."""

    def __init__(self, directory):
        self.root = directory / "hub"
        tiny.write(CASE, self.root / MODEL)
        self.settings(tokens=[TOKEN])
        command = [sys.executable, SERVER, self.root, self.root / "settings.json"]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.url = self.process.stdout.readline().strip()

    def settings(self, **entries):
        (self.root / "settings.json").write_text(json.dumps({"tokens": [TOKEN]} | entries))

    @property
    def log(self):
        lines = (self.root / "log.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    def convert(self, directory, path, *more, **environ):
        words = job_words(directory, path, tiny.maxtext_words(CASE, True), "fsdp8", more)
        command = ["-m", "maxconv.cli", "convert", *words, "--verify=none"]
        return self.run(directory, *command, **environ)

    def run(self, directory, *command, **environ):
        env = {k: v for k, v in os.environ.items() if not k.startswith("HF_")} | environ
        env |= {"HF_ENDPOINT": self.url, "HF_HOME": str(directory / "home")}
        env |= {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1"}
        command = [sys.executable, *command]
        return subprocess.run(command, env=env, capture_output=True, text=True)


@pytest.fixture
def hub(tmp_path):
    hub = Hub(tmp_path)
    yield hub
    hub.process.terminate()
    hub.process.communicate()


def leaves(directory):
    """The bytes of a checkpoint's data files, whatever their names."""
    files = (directory / "out/0/items").glob("**/c/**/*")
    return sorted(path.read_bytes() for path in files if path.is_file())


PLAIN = ("checkpoint_storage_use_ocdbt=false",)


def test_a_model_of_the_hub_converts_like_its_files(hub, tmp_path):
    kinds = ("429:1", "503", "whole", "cut", "reset", "other", "403")
    faults = [[f"/store/*-0000{i % 5 + 1}-of-*", kind, 1] for i, kind in enumerate(kinds)]
    hub.settings(faults=faults, gated=[MODEL], allowed=[TOKEN])
    here, there = tmp_path / "here", tmp_path / "there"
    done = hub.convert(there, f"hf://{MODEL}", *PLAIN, "--max_retries=9", HF_AUTH_TOKEN=TOKEN)
    assert done.returncode == 0, done.stderr
    assert hub.convert(here, hub.root / MODEL, *PLAIN).returncode == 0
    assert leaves(there) == leaves(here) != []

    ours = [entry for entry in hub.log if entry["authorization"]]
    assert {entry["host"].partition(":")[0] for entry in ours} == {"127.0.0.1"}
    shards = list((hub.root / MODEL).glob("*.safetensors"))
    asked = [entry for entry in hub.log if "/resolve/" in entry["path"]]
    assert len(asked) <= len(shards) + len(faults) + 4
    assert len(shards) == 5
    data = sum(p.stat().st_size for p in shards)
    good = [e for e in hub.log if e["path"].startswith("/store/") and e["status"] == 206]
    assert data <= sum(entry["bytes"] for entry in good) <= 3 * data  # headers, and what was cut
    written = [p for p in (tmp_path / "there").rglob("*") if p.is_file()]
    assert not any(TOKEN.encode() in p.read_bytes() for p in written)
    assert TOKEN not in done.stdout + done.stderr and "secret" not in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("settings", "path", "environ", "code", "said"),
    [
        ({"gated": [MODEL]}, MODEL, {}, 2, "is gated: ask for access at"),
        ({"gated": [MODEL]}, MODEL, {"HF_TOKEN": TOKEN}, 2, "this token has no access"),
        ({}, "org/other", {"HF_TOKEN": TOKEN}, 2, "not on the Hub, or private and not for this"),
        ({"private": [MODEL]}, MODEL, {}, 2, "not on the Hub, or private: check it, or set HF"),
        ({}, MODEL, {"HF_TOKEN": "hf_bad"}, 2, "The Hub does not accept the token"),
        ({}, f"hf://{MODEL}@v9", {}, 2, "has no revision v9"),
        ({}, MODEL, {"HF_HUB_OFFLINE": "1"}, 2, "is not in the Hugging Face cache"),
        ({"faults": [["/store/*", "503", 99]]}, MODEL, {}, 42, "the server answered 503, 2 times"),
    ],
)
def test_what_keeps_us_from_a_model_is_said(hub, tmp_path, settings, path, environ, code, said):
    hub.settings(**settings)
    done = hub.convert(tmp_path, path, "--max_retries=1", **environ)
    assert (done.returncode, done.stdout) == (code, "")
    assert said in done.stderr.splitlines()[-2 if code == 42 else -1] and TOKEN not in done.stderr
    assert not (tmp_path / "out").exists()


REPLACED = """
import sys
from maxconv.sources import open_source

source = open_source(sys.argv[1])
info = next(iter(source.tensors.values()))
with open(f"{sys.argv[2]}/{info.file}", "r+b") as file:
    file.seek(info.offset)
    file.write(b"other")
source.tensor(info.name)
"""


def test_a_file_that_changes_at_a_commit_ends_the_reading(hub, tmp_path):
    """The Hub is asked again when an address is out of date, and then says so."""
    shards = len(list((hub.root / MODEL).glob("*.safetensors")))
    hub.settings(faults=[["/store/*", "403", 1, shards]])
    done = hub.run(tmp_path, "-c", REPLACED, MODEL, str(hub.root / MODEL))
    assert f"in hf://{MODEL} was replaced or removed while it was read" in done.stderr


def test_the_cache_of_hugging_face_serves_offline(hub, tmp_path):
    assert hub.convert(tmp_path, MODEL, "--cache").returncode == 0
    done = hub.convert(tmp_path, MODEL, "--overwrite", HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stderr


def test_runs_are_asked_for_together_when_they_are_near():
    assert [*spans([0, 10, 30], 5)] == [(0, 35, [(0, 0), (10, 5), (30, 10)])]
    far = GAP + 6
    assert [*spans([0, far], 5)] == [(0, 5, [(0, 0)]), (far, far + 5, [(far, 5)])]
    long = SPAN + 7
    assert [*spans([3], long)] == [
        (3, SPAN + 3, [(3, 0)]),
        (SPAN + 3, long + 3, [(SPAN + 3, SPAN)]),
    ]
