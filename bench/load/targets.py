"""What a load is put on: a server over real HTTP, or the asynchronous engine without one."""

import asyncio
import itertools
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import asdict, replace
from time import perf_counter
from typing import Protocol

import httpx
from typing_extensions import override

from bench.load.http_events import http_client, post_events
from bench.load.loops import Answer, Ask, Chunk
from server.api.app import create_app
from server.api.config import ApiConfig, ServerConfig
from server.api.serving import Server, listen
from server.config import SamplingParams, SpeculationParams
from server.core.completion import join_outputs
from server.core.request import RequestOutput
from server.engine.async_engine import AsyncEngine
from server.engine.engine import Engine
from server.tokenizer import Tokenizer

_POLL_S = 0.01
# Requests of an open loop that is faster than the server wait here and are not turned away.
_MAX_QUEUE = 100_000


class Target(Protocol):
    """Answers requests."""

    async def answer(self, ask: Ask, speculation: SpeculationParams) -> Answer:
        """Send a greedy request and read its stream to the end."""


class EngineTarget(Target):
    """The asynchronous engine, without HTTP."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine
        self._numbers = itertools.count()

    @override
    async def answer(self, ask: Ask, speculation: SpeculationParams) -> Answer:
        sampling = SamplingParams(max_tokens=ask.max_tokens, temperature=0.0)
        request = ask.turn.request(sampling, speculation)
        # A prompt may be in flight twice.
        request = replace(request, request_id=f"{request.request_id}#{next(self._numbers)}")
        arrived_s = perf_counter()
        outputs: list[RequestOutput] = []
        chunks: list[Chunk] = []
        async with aclosing(self._engine.generate([request])) as stream:
            async for _, output in stream:
                chunks.append(Chunk(perf_counter(), len(output.token_ids)))
                outputs.append(output)
        stats = join_outputs(outputs).stats
        return Answer(
            arrived_s=arrived_s,
            ended_s=perf_counter(),
            chunks=tuple(chunks),
            num_output_tokens=stats.num_output_tokens,
            num_steps=stats.num_steps,
            num_draft_tokens=stats.num_draft_tokens,
            num_emitted_tokens=stats.num_emitted_tokens,
        )


class HttpTarget(Target):
    """`/v1/chat/completions` of a server, streamed.

    A chunk's tokens are counted by tokenizing its text, since the stream does not say how many
    they are.
    """

    def __init__(self, client: httpx.AsyncClient, model: str, tokenizer: Tokenizer) -> None:
        self._client = client
        self._model = model
        self._tokenizer = tokenizer

    @override
    async def answer(self, ask: Ask, speculation: SpeculationParams) -> Answer:
        body = {
            "model": self._model,
            "messages": ask.turn.messages,
            "max_tokens": ask.max_tokens,
            "temperature": 0.0,
            "stream": True,
            "stream_options": {"include_usage": True},
            "speculation": _body_of(speculation),
        }
        arrived_s = perf_counter()
        texts: list[tuple[float, str]] = []
        usage = None
        path = "/v1/chat/completions"
        async with aclosing(post_events(self._client, path, body)) as events:
            async for event in events:
                usage = event.get("usage") or usage
                text = "".join(c["delta"].get("content") or "" for c in event["choices"])
                if text:
                    texts.append((perf_counter(), text))
        ended_s = perf_counter()
        if usage is None:
            raise AssertionError("the server sent no usage")
        spoken = usage["speculation"]
        return Answer(
            arrived_s=arrived_s,
            ended_s=ended_s,
            chunks=tuple(Chunk(at_s, self._count(text)) for at_s, text in texts),
            num_output_tokens=usage["completion_tokens"],
            num_steps=spoken["num_steps"],
            num_draft_tokens=spoken["num_draft_tokens"],
            num_emitted_tokens=spoken["num_steps"] * spoken["mean_acceptance_length"],
        )

    def _count(self, text: str) -> int:
        return max(1, len(self._tokenizer.encode(text, add_special_tokens=False)))


@asynccontextmanager
async def engine_target(engine: Engine) -> AsyncIterator[Target]:
    """Run the engine on its thread until the block ends."""
    async_engine = AsyncEngine(engine, _MAX_QUEUE)
    await async_engine.start()
    try:
        yield EngineTarget(async_engine)
    finally:
        await async_engine.stop()


@asynccontextmanager
async def http_target(engine: Engine) -> AsyncIterator[Target]:
    """Serve the engine on a free port of 127.0.0.1, in this event loop, until the block ends."""
    config = ServerConfig(port=0, max_queue=_MAX_QUEUE, log_level="warning")
    async_engine = AsyncEngine(engine, config.max_queue)
    with listen(config) as taken:
        server = Server(create_app(async_engine, ApiConfig()), async_engine, config)
        serving = asyncio.ensure_future(server.serve(sockets=[taken]))
        try:
            while not server.started and not serving.done():
                await asyncio.sleep(_POLL_S)
            host, port = taken.getsockname()[:2]
            async with http_client(f"http://{host}:{port}") as client:
                yield HttpTarget(client, engine.model_name, engine.tokenizer)
        finally:
            server.should_exit = True
            await serving


def _body_of(speculation: SpeculationParams) -> dict[str, object]:
    """The `speculation` of a request's body, in which a rule's options are fields of their own."""
    body = asdict(speculation)
    options: dict[str, object] = body.pop("acceptance_options")
    return body | options
