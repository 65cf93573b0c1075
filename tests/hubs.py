"""A Hub on loopback, and conversions from it and to it: all of them processes."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SERVER = Path(__file__).parent / "servers" / "hub.py"
TOKEN = "hf_aSecretThatNobodyMaySee"


class Hub:
    """A Hub whose models are directories below `root`."""

    def __init__(self, directory: Path, *certificate: Path):
        self.directory, self.root = directory, directory / "hub"
        self.root.mkdir()
        self.settings()
        command = [sys.executable, SERVER, self.root, self.root / "settings.json", *certificate]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        assert self.process.stdout is not None
        self.url = self.process.stdout.readline().strip()

    def settings(self, **entries: Any) -> None:
        said = {"tokens": [TOKEN], "writers": [TOKEN], "allowed": [TOKEN]} | entries
        (self.root / "settings.json").write_text(json.dumps(said))

    @property
    def log(self) -> list[dict[str, Any]]:
        """Every request so far."""
        log = self.root / "log.jsonl"
        lines = log.read_text().splitlines() if log.exists() else ()
        return [json.loads(line) for line in lines]

    def environ(self, **more: str) -> dict[str, str]:
        """The environment of a process that asks this Hub."""
        env = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
        env |= {"HF_ENDPOINT": self.url, "HF_HOME": str(self.directory / "home")}
        return env | {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1"} | more

    def run(self, *command: str | Path, **environ: str) -> subprocess.CompletedProcess[str]:
        """A command of Python's, with this Hub as the Hub."""
        env = self.environ(**environ)
        return subprocess.run([sys.executable, *command], env=env, capture_output=True, text=True)

    def convert(self, *words: str, **environ: str) -> subprocess.CompletedProcess[str]:
        return self.run("-m", "maxconv.cli", "convert", *words, **environ)

    def assert_secret(self, *said: str) -> None:
        """The token, and what signs addresses, is nowhere; the token went to the Hub's own host."""
        own = {self.root / "settings.json", self.root / "log.jsonl"}
        files = {path for path in self.directory.rglob("*") if path.is_file()} - own
        told = [*map(str.encode, said), *(path.read_bytes() for path in files)]
        for secret in (TOKEN.encode(), b"signature=secret"):
            assert files and not [text for text in told if secret in text]
        hosts = {e["host"].partition(":")[0] for e in self.log if TOKEN in str(e["authorization"])}
        assert hosts == {"127.0.0.1"}


@contextmanager
def hub_in(directory: Path, *certificate: Path) -> Iterator[Hub]:
    hub = Hub(directory, *certificate)
    try:
        yield hub
    finally:
        hub.process.terminate()
        hub.process.communicate()
