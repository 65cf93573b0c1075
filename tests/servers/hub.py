"""A Hugging Face Hub on loopback, as a process of its own: what models take to read and to write.

    python hub.py DIR [SETTINGS [CERTIFICATE]]

serves every DIR/org/name as a model, prints its address, and appends a JSON line for each request
to DIR/log.jsonl. Large files come from, and go to, another host: the one name is 127.0.0.1, the
other localhost. SETTINGS is a JSON file, read again at every request:

    commits: {model: commit}; gated, private: models that only tokens of `allowed` may read
    tokens: those that are valid; writers: those of them that may write in every organisation
    large: bytes from which on a file that is not .safetensors lies at the other host
    ignored: a pattern of paths that a .gitignore keeps out of commits
    faults: see faults.py
    seconds: that an upload of a large file takes
    renamed: {old name of a model: new name}, to which everything about it is redirected

With a third argument, a file of a certificate and its key, it speaks https.
"""

import base64
import fnmatch
import hashlib
import json
import re
import shutil
import ssl
import sys
import threading
import time
from collections.abc import Iterator
from functools import cache
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import faults

ROOT = Path(sys.argv[1] if len(sys.argv) > 1 else ".")
BLOBS = ROOT / "blobs"
LOCK = threading.Lock()
COMMITS: dict[str, int] = {}  # how many were made here
PRIVATE: set[str] = set()  # models that were made so here


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # headers and body are sent one after the other

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.settings = json.loads(Path(sys.argv[2]).read_text()) if len(sys.argv) > 2 else {}
        self.token = (self.headers["Authorization"] or "").removeprefix("Bearer ") or None
        self.entry = {
            "method": self.command,
            "path": path,
            "host": self.headers["Host"],
            "range": self.headers["Range"],
            "authorization": self.headers["Authorization"],
        }
        body = b"" if path.startswith("/blobs/") else b"".join(self.body())
        fault = faults.fault(self.settings.get("faults", ()), path)
        if fault[:1].isdigit() and path.startswith("/blobs/"):
            for _ in self.body():
                pass
        if faults.fails(fault, self, self.answer):
            return
        for old, new in self.settings.get("renamed", {}).items():
            if old in path:
                return self.answer(307, b"", {"Location": self.path.replace(old, new)})
        if path == "/api/whoami-v2":
            return self.whoami()
        if path == "/api/repos/create":
            return self.create(json.loads(body))
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(/.*)?", path):
            return self.api(found[1], found[2] or "", body)
        if found := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            return self.batch(found[1], json.loads(body))
        if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self.resolve(*found.groups())
        if path.startswith("/store/"):
            return self.file(ROOT / path.removeprefix("/store/"), fault)
        if path.startswith("/blobs/"):
            return self.blob(path.removeprefix("/blobs/"))
        self.answer(404, b"{}", {"X-Error-Code": "NotFound"})

    do_HEAD = do_POST = do_PUT = do_GET

    def body(self) -> Iterator[bytes]:
        if self.headers["Transfer-Encoding"] == "chunked":
            while nbytes := int(self.rfile.readline(), 16):
                yield self.rfile.read(nbytes)
                self.rfile.readline()
            self.rfile.readline()
        left = int(self.headers["Content-Length"] or 0)
        while left:
            yield self.rfile.read(min(left, 1 << 20))
            left -= min(left, 1 << 20)

    # -- who may do what ------------------------------------------------------------------------

    def is_valid(self) -> bool:
        """Whether the token is; else answers as the Hub does."""
        if self.token is not None and self.token not in self.settings.get("tokens", []):
            said = "Invalid credentials in Authorization header"
            self.answer(401, b"{}", {"X-Error-Message": said})
            return False
        return True

    def may_see(self, model: str, content: bool) -> bool:
        """Whether the caller may see a model; else answers as the Hub does."""
        if not self.is_valid():
            return False
        allowed = self.token in self.settings.get("allowed", [])
        hidden = model in self.settings.get("private", []) and not allowed
        hidden |= model in PRIVATE and not self.writes()
        if hidden or not (ROOT / model).is_dir():
            self.answer(404 if self.token else 401, b"{}", {"X-Error-Code": "RepoNotFound"})
            return False
        if content and model in self.settings.get("gated", []) and not allowed:
            self.answer(403 if self.token else 401, b"{}", {"X-Error-Code": "GatedRepo"})
            return False
        return True

    def writes(self) -> bool:
        return self.token in self.settings.get("writers", [])

    def whoami(self) -> None:
        if not self.is_valid():
            return
        role = "write" if self.writes() else "read"
        orgs = [{"name": "org", "roleInOrg": "write"}]
        me = {"type": "user", "name": "me", "orgs": orgs, "auth": {"accessToken": {"role": role}}}
        self.answer(200, json.dumps(me).encode())

    # -- models ---------------------------------------------------------------------------------

    def commit(self, model: str) -> str:
        made_up = hashlib.sha1(f"{model}{COMMITS.get(model, '')}".encode()).hexdigest()
        return self.settings.get("commits", {}).get(model, made_up)

    def create(self, wanted: dict[str, Any]) -> None:
        model = f"{wanted['organization']}/{wanted['name']}"
        if not self.is_valid():
            return
        if (ROOT / model).is_dir():
            return self.answer(409, json.dumps({"url": f"{self.here()}/{model}"}).encode())
        if not self.writes():
            return self.answer(403, b"{}", {"X-Error-Message": "You don't have the rights"})
        (ROOT / model).mkdir(parents=True)
        (ROOT / model / ".gitattributes").write_text("*.safetensors filter=lfs\n")
        if wanted.get("private") or wanted.get("visibility") == "private":
            PRIVATE.add(model)
        self.answer(200, json.dumps({"url": f"{self.here()}/{model}"}).encode())

    def api(self, model: str, verb: str, body: bytes) -> None:
        if not self.may_see(model, content=verb == "/auth-check"):
            return
        if verb.startswith(("/preupload/", "/commit/")):
            if not self.writes():
                said = "Forbidden: pass `create_pr=1` as a query parameter"
                return self.answer(403, b"{}", {"X-Error-Message": said})
            return self.preupload(body) if verb[1] == "p" else self.change(model, body)
        commit = self.commit(model)
        if verb.startswith("/revision/") and verb[10:] not in ("main", commit):
            return self.answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        files = sorted(p for p in (ROOT / model).rglob("*") if p.is_file())
        names = {str(p.relative_to(ROOT / model)): p.stat().st_size for p in files}
        if verb.startswith("/tree/"):
            tree = [{"type": "file", "path": p, "size": n, "oid": commit} for p, n in names.items()]
            return self.answer(200, json.dumps(tree).encode())
        found = [{"rfilename": name, "size": size} for name, size in names.items()]
        private = model in PRIVATE or model in self.settings.get("private", [])
        about = {"id": model, "sha": commit, "private": private, "siblings": found}
        self.answer(200, json.dumps(about).encode())

    def is_large(self, name: str, size: int) -> bool:
        return name.endswith(".safetensors") or size >= self.settings.get("large", 1 << 12)

    def preupload(self, body: bytes) -> None:
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if self.is_large(file["path"], file["size"]) else "regular",
                "shouldIgnore": fnmatch.fnmatch(file["path"], self.settings.get("ignored", "")),
            }
            for file in json.loads(body)["files"]
        ]
        self.answer(200, json.dumps({"files": files}).encode())

    def change(self, model: str, body: bytes) -> None:
        """A commit: lines of what is added and what is deleted."""
        for line in map(json.loads, body.splitlines()):
            kind, value = line["key"], line["value"]
            if value.get("parentCommit") not in (None, self.commit(model)):
                said = "The repository has moved on"
                return self.answer(412, b"{}", {"X-Error-Message": said})
            path = ROOT / model / value.get("path", "")
            if kind == "deletedFile":
                path.unlink()
            elif kind in ("file", "lfsFile"):
                path.parent.mkdir(parents=True, exist_ok=True)
                if kind == "file":
                    path.write_bytes(base64.b64decode(value["content"]))
                else:
                    shutil.copyfile(BLOBS / value["oid"], path)
        COMMITS[model] = COMMITS.get(model, 0) + 1
        commit = self.commit(model)
        made = {"commitOid": commit, "commitUrl": f"{self.here()}/{model}/commit/{commit}"}
        self.answer(200, json.dumps(made).encode())

    def batch(self, model: str, wanted: dict[str, Any]) -> None:
        if not self.may_see(model, content=True):
            return
        if not self.writes():
            return self.answer(403, b"{}")
        objects = []
        for blob in wanted["objects"]:
            upload = {"href": f"{self.elsewhere()}/blobs/{blob['oid']}?signature=secret"}
            known = (BLOBS / blob["oid"]).exists()
            objects.append(blob | ({} if known else {"actions": {"upload": upload}}))
        self.answer(200, json.dumps({"transfer": "basic", "objects": objects}).encode())

    # -- files ----------------------------------------------------------------------------------

    def here(self) -> str:
        return f"http://127.0.0.1:{self.headers['Host'].rpartition(':')[2]}"

    def elsewhere(self) -> str:
        return f"http://localhost:{self.headers['Host'].rpartition(':')[2]}"

    def resolve(self, model: str, revision: str, name: str) -> None:
        if not self.may_see(model, content=True):
            return
        if revision not in ("main", self.commit(model)):
            return self.answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        path = ROOT / model / name
        if not path.is_file():
            return self.answer(404, b"{}", {"X-Error-Code": "EntryNotFound"})
        about, size = path.stat(), path.stat().st_size
        etag = digest(path, about.st_mtime_ns, size)
        headers = {"X-Repo-Commit": revision, "ETag": f'"{etag}"'}
        if not self.is_large(name, size):
            return self.file(path, "", headers)
        # Large files come from another host, under an address that holds for a while.
        there = f"{self.elsewhere()}/store/{model}/{name}?signature=secret"
        headers |= {"X-Linked-Size": str(size), "X-Linked-ETag": f'"{etag}"'}
        self.answer(302, b"", {"Location": there, **headers})

    def file(self, path: Path, fault: str, about: dict[str, str] | None = None) -> None:
        size = path.stat().st_size
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers["Range"] or "")
        with path.open("rb") as data:
            if found is None or fault == "whole":
                return self.answer(200, data, about, nbytes=size)
            first, last = int(found[1]), min(int(found[2]), size - 1)
            if fault == "other":
                first, last = first + 1, last + 1
            there = {"Content-Range": f"bytes {first}-{last}/{size}"}
            data.seek(first)
            self.answer(206, data, there | (about or {}), fault, last + 1 - first)

    def blob(self, oid: str) -> None:
        """An upload, which is signed: it brings no token, and is what its name says."""
        time.sleep(self.settings.get("seconds", 0))
        BLOBS.mkdir(exist_ok=True)
        new, sha256 = BLOBS / f"{oid}.{threading.get_ident()}", hashlib.sha256()
        with new.open("wb") as file:
            for part in self.body():
                file.write(part)
                sha256.update(part)
        if sha256.hexdigest() != oid:
            return self.answer(400, b"{}")
        new.replace(BLOBS / oid)
        self.answer(200, b"")

    def answer(
        self,
        status: int,
        body: Any,
        headers: dict[str, str] | None = None,
        fault: str = "",
        nbytes: int | None = None,
    ) -> None:
        """`body`: bytes, or a file of which the next `nbytes` are sent."""
        nbytes = len(body) if nbytes is None else nbytes
        with LOCK, (ROOT / "log.jsonl").open("a") as log:
            log.write(json.dumps({**self.entry, "status": status, "bytes": nbytes}) + "\n")
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(nbytes)}.items():
            self.send_header(name, value)
        self.end_headers()
        if fault == "cut":
            nbytes //= 2
        if self.command == "HEAD" or not nbytes:
            pass
        elif isinstance(body, bytes):
            self.wfile.write(body[:nbytes])
        else:
            self.connection.sendfile(body, body.tell(), nbytes)
        self.close_connection = self.close_connection or fault == "cut"


@cache
def digest(path: Path, mtime: int, size: int) -> str:
    with path.open("rb") as data:
        return hashlib.file_digest(data, "sha256").hexdigest()


if __name__ == "__main__":
    server = faults.Server(("127.0.0.1", 0), Handler)
    scheme = "http"
    if len(sys.argv) > 3:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(sys.argv[3])
        server.socket = context.wrap_socket(server.socket, server_side=True)
        scheme = "https"
    print(f"{scheme}://127.0.0.1:{server.server_address[1]}", flush=True)
    server.serve_forever()
