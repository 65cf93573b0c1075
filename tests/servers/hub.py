"""A Hugging Face Hub on loopback, as a process of its own: what reading a model needs of it.

    python hub.py DIR [SETTINGS]

serves every DIR/org/name as a model, prints its address, and appends a JSON line for each request
to DIR/log.jsonl. SETTINGS is a JSON file, read again at every request:

    commits: {model: commit}; gated, private: models that only tokens of `allowed` may read
    tokens: those that are valid
    faults: see faults.py
"""

import hashlib
import json
import re
import sys
import threading
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import faults

ROOT = Path(sys.argv[1] if len(sys.argv) > 1 else ".")
LOCK = threading.Lock()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = 1 << 16  # headers and body go together, else the client's kernel waits for more

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.settings = json.loads(Path(sys.argv[2]).read_text()) if len(sys.argv) > 2 else {}
        self.entry = {
            "method": self.command,
            "path": path,
            "host": self.headers["Host"],
            "range": self.headers["Range"],
            "authorization": self.headers["Authorization"],
        }
        fault = faults.fault(self.settings.get("faults", ()), path)
        if faults.fails(fault, self, self.answer):
            return
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(/.*)?", path):
            return self.api(found[1], found[2] or "")
        if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self.resolve(*found.groups())
        if path.startswith("/store/"):
            return self.file(ROOT / path.removeprefix("/store/"), fault)
        self.answer(404, b"{}", {"X-Error-Code": "NotFound"})

    do_HEAD = do_GET

    def may_see(self, model: str, content: bool) -> bool:
        """Whether the caller may see a model; else answers as the Hub does."""
        token = (self.headers["Authorization"] or "").removeprefix("Bearer ") or None
        if token is not None and token not in self.settings.get("tokens", []):
            self.answer(401, b"{}", {"X-Error-Message": "Invalid credentials"})
            return False
        allowed = token in self.settings.get("allowed", [])
        hidden = model in self.settings.get("private", []) and not allowed
        if hidden or not (ROOT / model).is_dir():
            self.answer(404 if token else 401, b"{}", {"X-Error-Code": "RepoNotFound"})
            return False
        if content and model in self.settings.get("gated", []) and not allowed:
            self.answer(403 if token else 401, b"{}", {"X-Error-Code": "GatedRepo"})
            return False
        return True

    def commit(self, model: str) -> str:
        made_up = hashlib.sha1(model.encode()).hexdigest()
        return self.settings.get("commits", {}).get(model, made_up)

    def api(self, model: str, verb: str) -> None:
        if not self.may_see(model, content=verb == "/auth-check"):
            return
        commit = self.commit(model)
        if verb.startswith("/revision/") and verb[10:] not in ("main", commit):
            return self.answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        files = sorted(p for p in (ROOT / model).iterdir() if p.is_file())
        if verb.startswith("/tree/"):
            tree = [
                {"type": "file", "path": p.name, "size": p.stat().st_size, "oid": commit}
                for p in files
            ]
            return self.answer(200, json.dumps(tree).encode())
        found = [{"rfilename": p.name, "size": p.stat().st_size} for p in files]
        self.answer(200, json.dumps({"id": model, "sha": commit, "siblings": found}).encode())

    def resolve(self, model: str, revision: str, name: str) -> None:
        if not self.may_see(model, content=True):
            return
        if revision != self.commit(model):
            return self.answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        path = ROOT / model / name
        if not path.is_file():
            return self.answer(404, b"{}", {"X-Error-Code": "EntryNotFound"})
        etag = hashlib.sha256(path.read_bytes()).hexdigest()
        about = {"X-Repo-Commit": revision, "ETag": f'"{etag}"'}
        if not name.endswith(".safetensors"):
            return self.file(path, "", about)
        # Large files come from another host, under an address that holds for a while.
        port = self.headers["Host"].rpartition(":")[2]
        there = f"http://localhost:{port}/store/{model}/{name}?signature=secret"
        about |= {"X-Linked-Size": str(path.stat().st_size), "X-Linked-ETag": f'"{etag}"'}
        self.answer(302, b"", {"Location": there, **about})

    def file(self, path: Path, fault: str, about: dict[str, str] | None = None) -> None:
        data = path.read_bytes()
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers["Range"] or "")
        if found is None or fault == "whole":
            return self.answer(200, data, about)
        first, last = int(found[1]), min(int(found[2]), len(data) - 1)
        if fault == "other":
            first, last = first + 1, last + 1
        body = data[first : last + 1]
        there = {"Content-Range": f"bytes {first}-{last}/{len(data)}"}
        self.answer(206, body, there | (about or {}), fault)

    def answer(
        self, status: int, body: bytes, headers: dict[str, str] | None = None, fault: str = ""
    ) -> None:
        with LOCK, (ROOT / "log.jsonl").open("a") as log:
            log.write(json.dumps({**self.entry, "status": status, "bytes": len(body)}) + "\n")
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: len(body) // 2] if fault == "cut" else body)
        self.close_connection = self.close_connection or fault == "cut"


if __name__ == "__main__":
    server = faults.Server(("127.0.0.1", 0), Handler)
    print(f"http://127.0.0.1:{server.server_address[1]}", flush=True)
    server.serve_forever()
