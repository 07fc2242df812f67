"""`/metrics` in Prometheus' text format."""

from fastapi import APIRouter
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.responses import Response

from server.api.context import Context

router = APIRouter(tags=["metrics"])


@router.get("/metrics", response_class=Response)
async def metrics(context: Context) -> Response:
    """Render the engine's metrics."""
    body = generate_latest(context.engine.metrics.registry)
    return Response(body, headers={"Content-Type": CONTENT_TYPE_LATEST})
