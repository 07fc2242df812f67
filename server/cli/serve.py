"""`euryale serve`: serves a model over HTTP."""

import asyncio

from server.api.config import ApiConfig, ServerConfig
from server.cli.console import log_to_stderr
from server.cli.options import Command, Settings
from server.config import EngineConfig

ENVIRONMENT = "EURYALE"
# A server has the time to compile its model once; a program that builds an engine may not.
ENGINE = Settings(EngineConfig, defaults={"compile": "auto"})


def serve(server_config: ServerConfig, api_config: ApiConfig, engine_config: EngineConfig) -> None:
    """Serve until a signal ends the process.

    Raises:
        EuryaleError: If the address is taken, or the model or its heads cannot be loaded.
    """
    # NOTE: Imported here because torch takes seconds, which --help should not.
    from server.api.serving import listen
    from server.api.serving import serve as serve_http
    from server.engine.async_engine import AsyncEngine
    from server.engine.engine import Engine
    from server.engine.own_thread import in_own_thread

    log_to_stderr(server_config.log_level, has_times=True)
    with listen(server_config) as taken:
        engine = in_own_thread(lambda: Engine.from_config(engine_config))
        async_engine = AsyncEngine(engine, server_config.max_queue)
        asyncio.run(serve_http(async_engine, api_config, server_config, taken))


SERVE = Command(
    "serve",
    "Serve a model over an OpenAI-compatible HTTP API.",
    serve,
    {
        "server_config": Settings(ServerConfig),
        "api_config": Settings(ApiConfig),
        "engine_config": ENGINE,
    },
    ENVIRONMENT,
)
