"""Times nested parts of a program, each without the parts inside it."""

import functools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


class Stopwatch:
    """Self-seconds by part, since the last `lap`.

    Args:
        wait_for_device: Called at the end of the parts that hand work to the device, so that the
            work is counted where it was asked for.
    """

    def __init__(self, wait_for_device: Callable[[], None]) -> None:
        self._wait_for_device = wait_for_device
        self._self_s: dict[str, float] = {}
        self._inner_s: list[float] = [0.0]

    @contextmanager
    def part(self, name: str, on_device: bool = False) -> Iterator[None]:
        """Time a stretch of code."""
        start = time.perf_counter()
        self._inner_s.append(0.0)
        try:
            yield
        finally:
            if on_device:
                self._wait_for_device()
            elapsed_s = time.perf_counter() - start
            inner_s = self._inner_s.pop()
            self._inner_s[-1] += elapsed_s
            self._self_s[name] = self._self_s.get(name, 0.0) + elapsed_s - inner_s

    def timed(self, name: str, function: Callable[P, R], on_device: bool = False) -> Callable[P, R]:
        """Wrap a function so that its calls are timed."""

        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            with self.part(name, on_device):
                return function(*args, **kwargs)

        return call

    def lap(self) -> dict[str, float]:
        """Seconds by part since the last lap; call it outside of all parts."""
        laps, self._self_s, self._inner_s = self._self_s, {}, [0.0]
        return laps


def device_waiter(device: torch.device) -> Callable[[], None]:
    """A function that waits until the device has done all its work."""
    if device.type == "cuda":
        return functools.partial(torch.cuda.synchronize, device)
    return lambda: None
