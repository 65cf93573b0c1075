"""A bucket for tests: a server of Google Cloud Storage in a process of its own."""

import json
import os
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

SERVER = Path(__file__).parent / "servers" / "gcs.py"


class Bucket:
    """`gs://bucket` at `url`; `log` has what was asked, `environ` lets every client find it."""

    def __init__(self, directory: Path, url: str):
        self.directory, self.url = directory, url
        self.environ = {
            "STORAGE_EMULATOR_HOST": url,
            "TENSORSTORE_GCS_HTTP_URL": url,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",
            "GOOGLE_CLOUD_PROJECT": "none",
            "NO_GCE_CHECK": "true",
            "FSSPEC_GS": '{"token": "anon"}',
            "FSSPEC_GCS": '{"token": "anon"}',
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # asks over gRPC, where nobody answers
        }
        self._ask("POST", "/storage/v1/b?project=none", b'{"name": "bucket"}')

    def _ask(self, method: str, path: str, body: bytes | None = None) -> bytes:
        asked = urllib.request.Request(self.url + path, body, method=method)
        with urllib.request.urlopen(asked) as answer:
            return answer.read()

    def settings(self, **entries: Any) -> None:
        (self.directory / "settings.json").write_text(json.dumps(entries))

    @property
    def log(self) -> list[dict[str, Any]]:
        lines = (self.directory / "log.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    @property
    def served(self) -> list[dict[str, Any]]:
        """Answers with parts of objects below hf/."""
        media = [entry for entry in self.log if entry["media"] and entry["status"] == 206]
        return [entry for entry in media if "/o/hf/" in entry["path"]]

    def names(self, prefix: str = "") -> list[str]:
        listing = json.loads(self._ask("GET", f"/storage/v1/b/bucket/o?prefix={quote(prefix)}"))
        return [item["name"] for item in listing.get("items", ())]

    def put(self, directory: Path, prefix: str) -> str:
        """Copies files to the bucket; returns where they are."""
        for path in directory.iterdir():
            name = quote(f"{prefix}/{path.name}", safe="")
            upload = f"/upload/storage/v1/b/bucket/o?uploadType=media&name={name}"
            self._ask("POST", upload, path.read_bytes())
        return f"gs://bucket/{prefix}"

    def get(self, prefix: str, directory: Path) -> Path:
        """Copies objects to a directory, and returns it."""
        for name in self.names(f"{prefix}/"):
            path = directory / name.removeprefix(f"{prefix}/")
            path.parent.mkdir(parents=True, exist_ok=True)
            content = f"/storage/v1/b/bucket/o/{quote(name, safe='')}?alt=media"
            path.write_bytes(self._ask("GET", content))
        return directory

    def run(self, *words: str, program: str = "") -> "subprocess.CompletedProcess[str]":
        """A command of maxconv, in a process of its own."""
        command = ["-c", program] if program else ["-m", "maxconv.cli"]
        environ = os.environ | self.environ
        return subprocess.run(
            [sys.executable, *command, *words], env=environ, capture_output=True, text=True
        )


@contextmanager
def serving(directory: Path) -> Iterator[Bucket]:
    directory.mkdir()
    (directory / "settings.json").write_text("{}")
    command = [sys.executable, SERVER, directory, directory / "settings.json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield Bucket(directory, process.stdout.readline().strip())
    finally:
        process.terminate()
        process.communicate()
