"""How the servers of the tests fail, by a list of [pattern of the path, kind, times, after].

`times` requests fail, once `after` of them (0 if left out) have not. A kind is

    a status, with an optional Retry-After, which may be a date: "429:1"
    "to": a status and where it sends the caller: "to:302:http://elsewhere/path"
    "forever": a status line and headers that never end, one byte each 0.1 seconds; "continue":
        100 Continue without end, as fast as it is read; "trickle": a body so, of whatever length
    "reset": the connection breaks; "mute:3": nothing comes for 3 seconds, then it breaks
    "whole" (200 for a range), "cut" (half a body), "other" (the range beside), and what a server
    has of its own: these it does itself
"""

import fnmatch
import re
import socket
import struct
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

# What is sent at first, what then again and again, and how many seconds lie between.
ENDLESS = {
    "forever": (b"HTTP/1.1 206 OK\r\nX-Long: ", b"x", 0.1),
    "continue": (b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 100, 0.0),
    "trickle": (b"HTTP/1.1 206 OK\r\nABOUT\r\n", b"x", 0.1),
}
LOCK = threading.Lock()
MET: Counter[int] = Counter()  # how often each fault was met

Answer = Callable[[int, bytes, dict[str, str]], None]


def fault(faults: Sequence[Sequence[Any]], path: str) -> str:
    """The kind of fault that a request meets; empty for none."""
    with LOCK:
        for i, (pattern, kind, times, *rest) in enumerate(faults):
            if fnmatch.fnmatch(path, pattern) and MET[i] < times + sum(rest):
                MET[i] += 1
                if MET[i] > sum(rest):
                    return kind
    return ""


def fails(kind: str, handler: BaseHTTPRequestHandler, answer: Answer) -> bool:
    """Lets a request fail, if it is a fault that all servers have in common."""
    name, _, number = kind.partition(":")
    if name.isdigit():
        answer(int(name), b"{}", {"Retry-After": number} if number else {})
        return True
    if name == "to":
        status, _, there = number.partition(":")
        answer(int(status), b"", {"Location": there})
        return True
    if name in ENDLESS:
        try:
            send_without_end(name, handler)
        except OSError:
            handler.close_connection = True
        return True
    if name not in ("reset", "mute"):
        return False
    time.sleep(float(number or 0))
    linger = struct.pack("ii", 1, 0)
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    handler.close_connection = True
    handler.connection.close()
    return True


def send_without_end(kind: str, handler: BaseHTTPRequestHandler) -> None:
    """Sends what never ends, until the caller goes."""
    first, again, pause = ENDLESS[kind]
    found = re.fullmatch(r"bytes=(\d+)-(\d+)", handler.headers["Range"] or "")
    start, stop = (int(found[1]), int(found[2]) + 1) if found else (0, 1000)
    about = f"Content-Range: bytes {start}-{stop - 1}/*\r\nContent-Length: {stop - start}\r\n"
    handler.connection.sendall(first.replace(b"ABOUT", about.encode()))
    while True:
        handler.connection.sendall(again)
        time.sleep(pause)


class Server(ThreadingHTTPServer):
    """One that does not mind when its callers go."""

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)
