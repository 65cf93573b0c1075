"""JAX's coordination service in a process of its own, beside process 0.

JAX runs it inside process 0, and aborts all others with a stack trace when that one is killed. Here
it outlives process 0 for long enough that they find out who is gone, say so, and end in order.
"""

import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

LINGER = 25  # seconds for the others to notice that process 0 is gone
LEAVE = 3  # seconds for those to leave that know that the job has ended


class Service:
    """What JAX takes for its service: the process in which it runs.

    Args:
        address: `HOST:PORT` to listen on.
        num_nodes: number of processes.
        options: of JAX's service; none that it waits for is in our interest.
    """

    def __init__(self, address: str, num_nodes: int, **options: Any):
        command = [sys.executable, "-P", __file__, address, str(num_nodes)]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, start_new_session=True
        )
        assert self._process.stdout is not None
        if self._process.stdout.readline() != b"ready\n":
            port = address.rpartition(":")[2]
            raise OSError(f"JAX's coordination service cannot listen on port {port}")

    def shutdown(self) -> None:
        """Ends the service soon; all processes are done with it."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # it is gone already
            self._process.stdin.write(b"done")
            self._process.stdin.close()


def serve(address: str, num_nodes: int) -> None:
    """Runs the service until some time after the process at the other end of stdin is gone."""
    from maxconv.private.jaxlib import _jax

    service = _jax.get_distributed_runtime_service(address, num_nodes)
    print("ready", flush=True)
    sys.stdout.close()
    time.sleep(LEAVE if sys.stdin.buffer.read() else LINGER)
    del service
    os._exit(0)


if __name__ == "__main__":  # where the package may be on no path; behind all others, it hides none
    sys.path.append(str(Path(__file__).parents[2]))
    serve(sys.argv[1], int(sys.argv[2]))
