"""Bodies of `/v1/models`."""

from typing import Literal

from server.api.schemas.base import ResponseBody


class Model(ResponseBody):
    """A served model.

    Attributes:
        max_model_len: Longest prompt plus output.
        heads: Draft heads that it speculates with, or None.
        adapter_sha256: Digest of the adapter that came with the heads and is merged into the
            model, or None.
    """

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "euryale"
    max_model_len: int
    heads: str | None
    adapter_sha256: str | None


class ModelList(ResponseBody):
    """All served models."""

    object: Literal["list"] = "list"
    data: list[Model]
