"""Run a command line in several processes, the ranks of a sharded model, as torchrun does for one machine."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence

_POLL_SECONDS = 0.05
_END_SECONDS = 5


def launch(count: int, command: Sequence[str] | None = None) -> int:
    """Run a command in `count` processes on this machine, and return the exit code of the first that fails.

    command: None stands for this process's own command line. The code is 0 if all succeed. The first failure ends the
    other processes. Only rank 0 has this process's input and output; all share its stderr. If a signal ended a process,
    a line on stderr says so, and the exit code is 2.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    children: list[subprocess.Popen[bytes]] = []
    try:
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
        threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // count))}
        for rank in range(count):
            places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
            environment = threads | dict(os.environ) | address | {name: str(x) for name, x in places.items()}
            other = None if rank == 0 else subprocess.DEVNULL
            run = [sys.executable, "-m", "kvfloor", *sys.argv[1:]] if command is None else list(command)
            children.append(subprocess.Popen(run, env=environment, stdin=other, stdout=other))
        return _first_failure(children)
    finally:
        _end(children)


def _first_failure(children: list[subprocess.Popen[bytes]]) -> int:
    while True:
        codes = [child.poll() for child in children]
        for rank, code in enumerate(codes):
            if code is not None and code < 0:
                name = signal.Signals(-code).name
                print(f"kvfloor: rank {rank} was ended by {name}: is there memory for its part?", file=sys.stderr)
                return 2
            if code:
                return code
        if all(code == 0 for code in codes):
            return 0
        time.sleep(_POLL_SECONDS)


def _end(children: list[subprocess.Popen[bytes]]) -> None:
    for child in children:
        if child.poll() is None:
            child.terminate()
    for child in children:
        try:
            child.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            child.kill()


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
