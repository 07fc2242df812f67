"""`/v1/models`."""

from fastapi import APIRouter
from starlette.responses import Response

from server.api.context import ApiContext, Context
from server.api.schemas.models import Model, ModelList

router = APIRouter(prefix="/v1/models", tags=["models"])


@router.get("", response_model=ModelList)
async def list_models(context: Context) -> Response:
    """List the one model that this server serves."""
    return ModelList(data=[_model(context)]).response()


@router.get("/{name:path}", response_model=Model)
async def retrieve_model(name: str, context: Context) -> Response:
    """Describe a model; its name may contain slashes."""
    context.check_model(name)
    return _model(context).response()


def _model(context: ApiContext) -> Model:
    return Model(
        id=context.model_name,
        created=context.created_s,
        max_model_len=context.max_model_len,
        heads=context.engine.info.heads_name,
        adapter_sha256=context.engine.info.adapter_sha256,
    )
