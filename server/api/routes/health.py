"""`/health`, `/ready` and `/version`, for orchestrators."""

from fastapi import APIRouter
from starlette.responses import Response

from server.api.config import installed_version
from server.api.context import Context
from server.api.schemas.base import ResponseBody

router = APIRouter(tags=["health"])


class Status(ResponseBody):
    """The server's state in one word."""

    status: str


class Version(ResponseBody):
    """The server's version."""

    version: str


@router.get("/health", response_model=Status)
async def health(context: Context) -> Response:
    """200 while the engine runs; 503 means that only a restart helps."""
    is_alive = context.engine.is_alive
    return Status(status="ok" if is_alive else "failed").response(200 if is_alive else 503)


@router.get("/ready", response_model=Status)
async def ready(context: Context) -> Response:
    """200 while new requests are admitted; 503 while the server drains or has failed."""
    is_ready = context.engine.is_ready
    return Status(status="ready" if is_ready else "not ready").response(200 if is_ready else 503)


@router.get("/version", response_model=Version)
async def version() -> Response:
    """Version of the server."""
    return Version(version=installed_version()).response()
