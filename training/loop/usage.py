"""What a training run takes: time by stage, throughput and memory, of this process alone."""

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from training.data.dataset import Corpus

_STATUS_FILE = Path("/proc/self/status")


class Usage:
    """Adds up the times of a run's stages; a stage may come several times."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._num_examples = 0

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Count the wall time of the context to a stage."""
        started_s = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[name] = self.seconds(name) + time.perf_counter() - started_s

    def seconds(self, stage: str) -> float:
        """Return what a stage took so far."""
        return self._seconds.get(stage, 0.0)

    def add_examples(self, count: int) -> None:
        """Count examples that the stage `steps` went through, on all processes together."""
        self._num_examples += count

    def summary(self, train: Corpus, device: torch.device) -> dict[str, Any]:
        """Return what is printed.

        Args:
            train: Answers that the examples are of; their lengths give the rates of tokens.
            device: Device that training ran on.
        """
        rate = self._num_examples / max(self.seconds("steps"), 1e-9)
        seen = Corpus(tuple(doc for doc in train.documents if doc.num_examples))
        per_example = rate / max(1, seen.num_examples)
        num_tokens = sum(len(document.token_ids_T) for document in seen.documents)
        return {
            "seconds": {name: round(taken, 3) for name, taken in self._seconds.items()},
            "examples_per_s": round(rate, 1),
            "answer_tokens_per_s": round(per_example * seen.num_answer_tokens, 1),
            "document_tokens_per_s": round(per_example * num_tokens, 1),
            "peak_memory_bytes": peak_memory_bytes(),
            "peak_cuda_memory_bytes": peak_cuda_memory_bytes(device),
        }


def peak_cuda_memory_bytes(device: torch.device) -> int:
    """Return the most that torch had on a CUDA device; 0 for another one."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def peak_memory_bytes() -> int:
    """Return the most main memory that this process has had."""
    # NOTE: on Linux, ru_maxrss of a process is never less than that of the one that started it.
    if _STATUS_FILE.exists():
        for line in _STATUS_FILE.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if sys.platform == "darwin" else largest * 1024
