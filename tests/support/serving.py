"""A real server on a free port, run in a thread of the test's process."""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import httpx
from openai import OpenAI

from server.api.app import create_app
from server.api.config import ApiConfig, ServerConfig
from server.api.serving import Server, listen
from server.engine.async_engine import AsyncEngine
from server.engine.engine import Engine

# Generous, because other work may slow the machine; nothing waits this long when all is well.
DEADLINE_S = 120.0


@dataclass(frozen=True, slots=True)
class RunningServer:
    """A server that answers requests.

    Attributes:
        begin_stop: What a SIGTERM calls.
        thread: Ends when the server has ended.
    """

    url: str
    model: str
    engine: AsyncEngine
    begin_stop: Callable[[], None]
    thread: threading.Thread

    def openai(self, api_key: str = "none") -> OpenAI:
        """The official client, without retries that would hide errors."""
        return OpenAI(base_url=f"{self.url}/v1", api_key=api_key, max_retries=0, timeout=DEADLINE_S)

    def http(self) -> httpx.Client:
        """A plain client."""
        return httpx.Client(base_url=self.url, timeout=DEADLINE_S)


@contextmanager
def running_server(
    engine: Engine, api: ApiConfig | None = None, config: ServerConfig | None = None
) -> Iterator[RunningServer]:
    """Serve an engine until the block ends."""
    api = api or ApiConfig()
    config = config or ServerConfig(port=0, log_level="warning")
    async_engine = AsyncEngine(engine, config.max_queue)
    app = create_app(async_engine, api)
    server = Server(app, async_engine, config)
    taken = listen(config)
    host, port = taken.getsockname()[:2]
    loop = asyncio.new_event_loop()

    def run() -> None:
        try:
            loop.run_until_complete(server.serve(sockets=[taken]))
        finally:
            loop.close()

    def begin_stop() -> None:
        loop.call_soon_threadsafe(server.begin_stop)

    thread = threading.Thread(target=run, name="test-server")
    thread.start()
    wait_until(lambda: server.started or not thread.is_alive())
    try:
        yield RunningServer(
            url=f"http://{host}:{port}",
            model=api.served_model_name or engine.model_name,
            engine=async_engine,
            begin_stop=begin_stop,
            thread=thread,
        )
    finally:
        server.should_exit = True
        thread.join(DEADLINE_S)
        assert not thread.is_alive()


def complete(client: OpenAI, **options: object) -> Any:
    """Call `/v1/completions`; options of any type, as a test's table has them."""
    return cast(Any, client.completions).create(**options)


def chat(client: OpenAI, **options: object) -> Any:
    """Call `/v1/chat/completions`."""
    return cast(Any, client.chat.completions).create(**options)


def wait_until(condition: Callable[[], bool]) -> None:
    """Wait for something that happens soon."""
    deadline_s = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline_s, "it did not happen in time"
        time.sleep(0.005)
