"""The application factory."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI

from server.api.config import ApiConfig, installed_version
from server.api.context import ApiContext
from server.api.errors import install_error_handlers
from server.api.middleware import ApiKeyMiddleware, BodyLimitMiddleware
from server.api.routes import chat, completions, health, metrics, models, tokenize
from server.engine.async_engine import AsyncEngine


def create_app(engine: AsyncEngine, config: ApiConfig) -> FastAPI:
    """Build the HTTP application around an engine, which starts and stops with it.

    Args:
        engine: Not started yet.
        config: Validated options.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await engine.start()
        yield
        await engine.stop()

    app = FastAPI(
        title="Euryale",
        version=installed_version(),
        lifespan=lifespan,
        redirect_slashes=False,
    )
    app.state.context = ApiContext.of(engine, config)
    for resource in (completions, chat, models, tokenize, health, metrics):
        app.include_router(resource.router)
    install_error_handlers(app)
    app.add_middleware(BodyLimitMiddleware, max_bytes=config.max_request_bytes)
    app.add_middleware(ApiKeyMiddleware, api_key=config.api_key)
    return app
