"""Runs the application under uvicorn, with signals of its own.

The first SIGTERM or SIGINT drains: new requests get 503 while running ones may end within
`drain_s`. A second one ends them at once. uvicorn's own handlers, which would close the port first,
are not installed.
"""

import asyncio
import logging
import signal
import socket
from collections.abc import Generator
from contextlib import contextmanager

import uvicorn
from starlette.types import ASGIApp

from server.api.app import create_app
from server.api.config import ApiConfig, ServerConfig
from server.engine.async_engine import AsyncEngine
from server.errors import ConfigError

_LOG = logging.getLogger("euryale.api")
# Connections get this long to take the last bytes of responses that are complete.
_FLUSH_S = 2
_KEEP_ALIVE_S = 75
_BACKLOG = 2048


class Server(uvicorn.Server):
    """uvicorn that drains its engine before it closes the port."""

    def __init__(self, app: ASGIApp, engine: AsyncEngine, config: ServerConfig) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                log_config=None,
                log_level=config.log_level,
                lifespan="on",
                ws="none",
                backlog=_BACKLOG,
                server_header=False,
                timeout_keep_alive=_KEEP_ALIVE_S,
                timeout_graceful_shutdown=_FLUSH_S,
            )
        )
        self._engine = engine
        self._drain_s = config.drain_s
        self._stops: set[asyncio.Task[None]] = set()

    @contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Leave signals alone; `serve` connects them to `begin_stop`."""
        yield

    def begin_stop(self) -> None:
        """Drain, then close; called again, close at once. Belongs to the server's event loop."""
        if self._stops:
            _LOG.warning("stopping at once")
        else:
            _LOG.info("draining for at most %g s; signal again to stop at once", self._drain_s)
        self._stops.add(asyncio.create_task(self._stop()))

    async def _stop(self) -> None:
        try:
            await self._engine.stop(self._drain_s)
        finally:
            self.should_exit = True


def listen(config: ServerConfig) -> socket.socket:
    """Bind the address, so that a port in use is an error before a model is loaded.

    Raises:
        ConfigError: If the address cannot be taken.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            config.host, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        taken = socket.socket(family, kind, protocol)
    except OSError as error:
        raise _cannot_listen(config, error) from error
    try:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(address)
    except OSError as error:
        taken.close()
        raise _cannot_listen(config, error) from error
    return taken


def _cannot_listen(config: ServerConfig, error: OSError) -> ConfigError:
    return ConfigError(
        f"cannot listen on {config.host} port {config.port}: {error.strerror}; choose another "
        "--host or --port"
    )


async def serve(
    engine: AsyncEngine, api: ApiConfig, config: ServerConfig, taken: socket.socket
) -> None:
    """Serve until a signal ends it.

    Args:
        engine: Not started yet.
        api: Options of the application.
        config: Options of the process.
        taken: From `listen`; closed at the end.
    """
    server = Server(create_app(engine, api), engine, config)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, server.begin_stop)
    host, port = taken.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    _LOG.info("serving %s on http://%s:%d", engine.info.model_name, shown, port)
    await server.serve(sockets=[taken])
