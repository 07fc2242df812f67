"""`/v1/models`."""

from fastapi import APIRouter
from starlette.responses import Response

from server.api.context import ApiContext, Context
from server.api.responses import json_response
from server.api.schemas.models import Model, ModelList

router = APIRouter(prefix="/v1/models", tags=["models"])


@router.get("", response_model=ModelList)
async def list_models(context: Context) -> Response:
    """List the one model that this server serves."""
    return json_response(ModelList(data=[_model(context)]))


@router.get("/{name:path}", response_model=Model)
async def retrieve_model(name: str, context: Context) -> Response:
    """Describe a model; its name may contain slashes."""
    context.check_model(name)
    return json_response(_model(context))


def _model(context: ApiContext) -> Model:
    return Model(
        id=context.model_name,
        created=context.created_s,
        max_model_len=context.max_model_len,
        heads=context.engine.engine.heads_name,
        adapter_sha256=context.engine.engine.loaded.adapter_sha256,
    )
