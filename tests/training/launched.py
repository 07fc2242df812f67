"""Training commands in several processes on this machine, without a launcher's start-up time.

They are forked from a server that has imported everything already. Imports nothing of ours itself.
"""

import multiprocessing
import os
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path

_TIMEOUT_S = 300
_context = multiprocessing.get_context("forkserver")
# torch imports its compiler for the first optimiser and wrapper.
_context.set_forkserver_preload(
    ["training.__main__", "transformers.models.llama.modeling_llama", "torch._dynamo"]
)


@dataclass(frozen=True)
class Launched:
    """Processes that run the same command together."""

    processes: Sequence[ForkServerProcess]
    logs: Sequence[Path]

    def kill(self) -> None:
        """SIGKILL for all of them."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join(_TIMEOUT_S)

    def wait(self) -> list[int | None]:
        """Return the exit statuses when all have ended."""
        for process in self.processes:
            process.join(_TIMEOUT_S)
        return [process.exitcode for process in self.processes]

    def text(self, rank: int) -> str:
        """What a process has written to stdout and stderr, without line breaks."""
        return " ".join(self.logs[rank].read_text().split())


def launch(argv: Sequence[str], directory: Path, count: int = 2) -> Launched:
    """Start `python -m training` with `argv`; the directory gets what they print."""
    directory.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    logs = [directory / f"{rank}.log" for rank in range(count)]
    processes = [
        _context.Process(target=_run, args=(list(argv), rank, count, port, log))
        for rank, log in enumerate(logs)
    ]
    for process in processes:
        process.start()
    return Launched(processes, logs)


def _run(argv: list[str], rank: int, count: int, port: int, log: Path) -> None:
    # What torchrun sets.
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    from training.__main__ import main

    sys.exit(main(argv))
