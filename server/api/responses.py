"""JSON responses from our own response bodies."""

from starlette.responses import Response

from server.api.schemas.base import ResponseBody


def json_response(body: ResponseBody, status: int = 200) -> Response:
    """Write a body as JSON; nothing is validated twice."""
    return Response(body.model_dump_json(), status, media_type="application/json")
