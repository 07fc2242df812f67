"""Load on a server, and what its clients see of it.

A *closed loop* has so many clients, each of which sends its next request when its last has ended.
An *open loop* sends requests at random times (Poisson arrivals), whether earlier ones have ended or
not.

Latencies. A stream comes in *chunks*: what the client gets at once, which is one step's tokens and
so one token in plain decoding, several with speculation. `ttft` runs from a request's arrival to
its first chunk. A chunk that brings k tokens after a gap of g seconds counts

    itl          k times as g / k: the time per token
    chunk_gap    once as g: the time in which nothing comes

Percentiles are over all tokens, or chunks, of all requests. The ratios that are called `itl` use
the time per token.
"""

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from time import perf_counter

import numpy as np

from bench.workload.dialogues import Turn

NAN = float("nan")


@dataclass(frozen=True, slots=True)
class Ask:
    """A request to send.

    Attributes:
        max_tokens: Longest output.
    """

    turn: Turn
    max_tokens: int


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens that came at once, at least one; `at_s` is on the clock of `perf_counter`."""

    at_s: float
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back for a request.

    Attributes:
        arrived_s: When it was sent.
        ended_s: When its stream had ended.
        chunks: When tokens came, and how many.
        num_output_tokens: Tokens of the output as the server counts them.
        num_steps: Verify steps.
        num_draft_tokens: Tree nodes below the roots of these steps.
        num_emitted_tokens: Tokens that these steps emitted.
    """

    arrived_s: float
    ended_s: float
    chunks: tuple[Chunk, ...]
    num_output_tokens: int
    num_steps: int
    num_draft_tokens: int
    num_emitted_tokens: float


Send = Callable[[Ask], Awaitable[Answer]]


@dataclass(frozen=True, slots=True)
class Percentiles:
    """Percentiles of milliseconds; not a number where there is no sample."""

    p50: float
    p95: float
    p99: float


@dataclass(frozen=True, slots=True)
class GapFigures:
    """Time per token and time between chunks."""

    itl_ms: Percentiles
    chunk_gap_ms: Percentiles


@dataclass(frozen=True, slots=True)
class LoadFigures:
    """What the clients of one run saw.

    Attributes:
        seconds: From the first request to the end of the last.
        tokens_per_s: Output tokens of all requests by these seconds.
        itl_ms: Time per token.
        chunk_gap_ms: Time between chunks.
        mean_acceptance_length: Tokens per verify step, bonus token included.
        nodes_per_step: Nodes that a verify step checks for a sequence, root included.
    """

    num_requests: int
    num_output_tokens: int
    seconds: float
    tokens_per_s: float
    ttft_ms: Percentiles
    itl_ms: Percentiles
    chunk_gap_ms: Percentiles
    mean_acceptance_length: float
    nodes_per_step: float


async def closed_loop(
    send: Send, asks: Sequence[Ask], concurrency: int, max_seconds: float | None = None
) -> list[Answer]:
    """Let so many clients send the requests, which are begun in order.

    Args:
        send: Sends one request.
        asks: In order.
        concurrency: Number of clients.
        max_seconds: Time after which no further request is begun; None sets no limit.

    Returns:
        The answers to those that were begun: the first ones of `asks`, in any order.
    """
    start = perf_counter()
    waiting = iter(asks)
    answers: list[Answer] = []

    async def client() -> None:
        while max_seconds is None or perf_counter() - start < max_seconds:
            ask = next(waiting, None)
            if ask is None:
                return
            answers.append(await send(ask))

    await _together([client() for _ in range(min(concurrency, len(asks)))])
    return answers


async def open_loop(send: Send, asks: Sequence[Ask], rate: float, seed: int) -> list[Answer]:
    """Send the requests at random times.

    Args:
        send: Sends one request.
        asks: In order.
        rate: Mean number of requests per second.
        seed: Seed of the times.
    """
    start = perf_counter()
    gaps = random.Random(seed)
    answers: list[Answer] = []

    async def client(ask: Ask, after_s: float) -> None:
        await asyncio.sleep(start + after_s - perf_counter())
        answers.append(await send(ask))

    clients, after_s = [], 0.0
    for ask in asks:
        clients.append(client(ask, after_s))
        after_s += gaps.expovariate(rate)
    await _together(clients)
    return answers


async def _together(clients: Sequence[Awaitable[None]]) -> None:
    """Run clients to their end; the first failure ends all of them."""
    tasks = [asyncio.ensure_future(client) for client in clients]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def load_figures(answers: Sequence[Answer]) -> LoadFigures:
    """Pool the answers of a run, of which there is at least one."""
    gaps = gap_figures([answer.chunks for answer in answers])
    num_output_tokens = sum(answer.num_output_tokens for answer in answers)
    seconds = max(a.ended_s for a in answers) - min(a.arrived_s for a in answers)
    num_steps = sum(answer.num_steps for answer in answers)
    num_draft_tokens = sum(answer.num_draft_tokens for answer in answers)
    num_emitted_tokens = sum(answer.num_emitted_tokens for answer in answers)
    return LoadFigures(
        num_requests=len(answers),
        num_output_tokens=num_output_tokens,
        seconds=seconds,
        tokens_per_s=num_output_tokens / seconds,
        ttft_ms=percentiles_ms([a.chunks[0].at_s - a.arrived_s for a in answers if a.chunks]),
        itl_ms=gaps.itl_ms,
        chunk_gap_ms=gaps.chunk_gap_ms,
        mean_acceptance_length=num_emitted_tokens / num_steps if num_steps else NAN,
        nodes_per_step=1 + num_draft_tokens / num_steps if num_steps else NAN,
    )


def gap_figures(streams: Sequence[Sequence[Chunk]]) -> GapFigures:
    """Pool the gaps between the chunks of each stream."""
    gaps = [
        (later.at_s - earlier.at_s, later.num_tokens)
        for chunks in streams
        for earlier, later in pairwise(chunks)
    ]
    return GapFigures(
        itl_ms=percentiles_ms([gap / count for gap, count in gaps for _ in range(count)]),
        chunk_gap_ms=percentiles_ms([gap for gap, _ in gaps]),
    )


def percentiles_ms(seconds: Sequence[float]) -> Percentiles:
    """Percentiles of seconds, in milliseconds."""
    if not seconds:
        return Percentiles(NAN, NAN, NAN)
    return Percentiles(*(1e3 * np.percentile(seconds, (50, 95, 99))).tolist())
