"""Small pieces for tests of the asynchronous engine."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

from prometheus_client import generate_latest
from torch import Tensor

from server.core.request import Request, RequestOutput
from server.engine.async_engine import AsyncEngine
from server.engine.engine import Engine
from tests.support.engine_tools import (
    NUM_HEADS,
    NUM_RANKS,
    make_engine,
    make_request,
    random_prompt,
)

DEADLINE_S = 30.0


def run(test: Coroutine[Any, Any, None]) -> None:
    """Run a test's coroutine; a hang fails it."""
    asyncio.run(asyncio.wait_for(test, 2 * DEADLINE_S))


@asynccontextmanager
async def running(engine: Engine | None = None, max_queue: int = 64) -> AsyncIterator[AsyncEngine]:
    async_engine = AsyncEngine(engine or slow_engine(), max_queue)
    await async_engine.start()
    try:
        yield async_engine
    finally:
        await async_engine.stop()


def without_drafts(request_id: str, so_far: tuple[int, ...], hidden_D: Tensor) -> list[list[int]]:
    return [[-1] * NUM_RANKS] * NUM_HEADS


def slow_engine(**options: Any) -> Engine:
    """An engine that takes at least 10 ms for each token of each sequence."""

    def wait(request_id: str, so_far: tuple[int, ...], hidden_D: Tensor) -> list[list[int]]:
        time.sleep(0.01)
        return without_drafts(request_id, so_far, hidden_D)

    return make_engine(script=wait, num_blocks=256, **options)


def endless(seed: int = 0) -> Request:
    """On a slow engine, a request that outlives every test."""
    return make_request(random_prompt(seed, 6), max_tokens=500, ignore_eos=True, seed=seed)


async def collect(async_engine: AsyncEngine, request: Request) -> list[RequestOutput]:
    return [output async for _, output in async_engine.generate([request])]


async def first_output(stream: AsyncIterator[tuple[int, RequestOutput]]) -> RequestOutput:
    return (await anext(stream))[1]


async def drain(stream: AsyncIterator[tuple[int, RequestOutput]]) -> None:
    async for _ in stream:
        pass


async def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, "the condition never came true"
        await asyncio.sleep(0.005)


def is_empty(async_engine: AsyncEngine) -> Callable[[], bool]:
    """Whether the engine holds no request and no block."""

    def check() -> bool:
        totals = async_engine.engine.totals()
        names = ("num_running", "num_waiting", "num_blocks_in_use")
        return not any(totals[name] for name in names)

    return check


def samples(async_engine: AsyncEngine) -> dict[str, float]:
    lines = generate_latest(async_engine.metrics.registry).decode().splitlines()
    pairs = [line.rsplit(" ", 1) for line in lines if not line.startswith("#")]
    return {name: float(value) for name, value in pairs}
