"""Training commands in several processes on this machine.

Most do without a launcher's start-up time: they are forked from a server that has imported
everything already. None outlasts its time limit; what they were doing then is in their output.
Imports nothing of ours itself.
"""

import faulthandler
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import psutil
from torch._C._distributed_c10d import TCPStore

_TIMEOUT_S = 300.0
# After its limit a process only has to write down where it stands.
_GRACE_S = 30.0
_TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
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
    store: TCPStore

    def kill(self) -> None:
        """SIGKILL for all of them."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join(_TIMEOUT_S)

    def wait(self) -> list[int | None]:
        """Return the exit statuses when all have ended; shows the output of those that failed."""
        for process in self.processes:
            process.join(_TIMEOUT_S + _GRACE_S)
        statuses = [process.exitcode for process in self.processes]
        for rank, status in enumerate(statuses):
            if status != 0:
                sys.stdout.write(f"process {rank}, status {status}:\n{self.logs[rank].read_text()}")
        self.kill()
        return statuses

    def text(self, rank: int) -> str:
        """What a process has written to stdout and stderr, without line breaks."""
        return " ".join(self.logs[rank].read_text().split())


def launch(argv: Sequence[str], directory: Path, count: int = 2) -> Launched:
    """Start `python -m training` with `argv`; the directory gets what they print."""
    return launch_function(_main, list(argv), directory, count)


def launch_function(
    function: Callable[[list[str]], int], argv: list[str], directory: Path, count: int = 2
) -> Launched:
    """Start a function of a module; its result is the exit status."""
    directory.mkdir(parents=True, exist_ok=True)
    # As torchrun does; a port that was free a moment ago may be another's when a process takes it.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    logs = [directory / f"{rank}.log" for rank in range(count)]
    processes = [
        _context.Process(
            target=_run, args=(function, argv, rank, count, store.port, log), daemon=True
        )
        for rank, log in enumerate(logs)
    ]
    for process in processes:
        process.start()
    return Launched(processes, logs, store)


def torchrun(argv: Sequence[str], count: int = 2) -> "subprocess.CompletedProcess[str]":
    """Run `python -m training` with `argv` as a user does, and wait for the end of all processes.

    Raises:
        AssertionError: If that takes too long; says where each process stood.
    """
    command = [sys.executable, *_TORCHRUN, str(count), "-m", "training", *argv]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"}
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    ) as process:
        try:
            output, errors = process.communicate(timeout=_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            for child in psutil.Process(process.pid).children(recursive=True):
                # It writes its stack and ends, and so does the launcher then.
                child.send_signal(signal.SIGABRT)
            output, errors = process.communicate(timeout=_GRACE_S)
            raise AssertionError(f"not done after {_TIMEOUT_S} s: {output}{errors}") from None
    return subprocess.CompletedProcess(command, process.returncode, output, errors)


def _main(argv: list[str]) -> int:
    from training.__main__ import main

    return main(argv)


def _run(
    function: Callable[[list[str]], int],
    argv: list[str],
    rank: int,
    count: int,
    port: int,
    log: Path,
) -> None:
    # What torchrun sets.
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "OMP_NUM_THREADS": "1",
    }
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    # By a thread of its own, which needs nothing of the interpreter.
    faulthandler.dump_traceback_later(_TIMEOUT_S, exit=True, file=2)
    sys.exit(function(argv))
