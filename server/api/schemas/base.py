"""What all request bodies share: strict types, and no option that is silently ignored.

A field is one of four kinds. Declared ones are used. Options that other servers have and this one
does not support are errors that name them, unless they carry a value that changes nothing.
Harmless ones (`user`, `metadata`, ...) are dropped. Everything else is an unknown field, an error.
An explicit null counts as left out.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, BaseModel, ConfigDict, model_validator
from pydantic_core import PydanticCustomError
from starlette.responses import Response

_MAX_SHOWN = 80
# A field that holds fields of the body around it, and that clients never write.
GATHERED = "acceptance_options"
_UNSUPPORTED = "unsupported_option"
_UNSUPPORTED_VALUE = "unsupported_value"


class RequestBody(BaseModel):
    """Base of all request bodies and of the objects inside them.

    Attributes:
        unsupported: Options that are rejected, each with the values that change nothing.
        harmless: Names of fields that are accepted and dropped.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    unsupported: ClassVar[Mapping[str, tuple[object, ...]]] = {}
    harmless: ClassVar[frozenset[str]] = frozenset()

    @model_validator(mode="before")
    @classmethod
    def _sort_fields(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        kept = {}
        for name, value in data.items():
            if name in cls.unsupported:
                if value is not None and value not in cls.unsupported[name]:
                    raise unsupported_option(str(name), value)
            elif name in cls.model_fields:
                if value is not None:
                    kept[name] = value
            elif name not in cls.harmless:
                kept[name] = value
        return kept


class ResponseBody(BaseModel):
    """Base of all response bodies; built from our own values, so nothing is coerced."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    def response(self, status: int = 200) -> Response:
        """The body as a whole HTTP response, without validating it again."""
        return Response(self.model_dump_json(), status, media_type="application/json")


@dataclass(frozen=True, slots=True)
class Problem:
    """A validation error in OpenAI's terms."""

    message: str
    param: str | None
    code: str | None


def unsupported_option(name: str, value: object) -> PydanticCustomError:
    """Build the error for a known option that is not supported; `name` is its last part."""
    return PydanticCustomError(_UNSUPPORTED, "unsupported", {"option": name, "value": value})


def unsupported_value(remedy: str) -> PydanticCustomError:
    """Build the error for a value that other servers support and this one does not."""
    return PydanticCustomError(_UNSUPPORTED_VALUE, "{remedy}", {"remedy": remedy})


def invalid_value(remedy: str) -> PydanticCustomError:
    """Build the error for a value of the wrong form."""
    return PydanticCustomError("invalid_type", "{remedy}", {"remedy": remedy})


def describe_validation_error(error: Mapping[str, Any]) -> Problem:
    """Describe what is wrong with a request body.

    Args:
        error: One entry of pydantic's `ValidationError.errors()`.
    """
    kind, context = error["type"], error.get("ctx", {})
    param = _path(error["loc"][1:])
    if kind == "json_invalid":
        reason = context.get("error", "unreadable")
        return Problem(f"the request body is not valid JSON: {reason}", None, "invalid_json")
    if kind == _UNSUPPORTED:
        param = f"{param}.{context['option']}" if param else context["option"]
        shown = _shown(context["value"])
        message = f"{param} is not supported (given: {shown}); leave it out"
        return Problem(message, param, _UNSUPPORTED)
    if kind == _UNSUPPORTED_VALUE:
        return Problem(f"{param}: {error['msg']}", param, _UNSUPPORTED)
    # An empty body and null are a missing value without a name.
    if kind in ("missing", "model_type", "model_attributes_type") and not param:
        return Problem(
            "the request body is not a JSON object; send one with the header "
            "Content-Type: application/json",
            None,
            "invalid_json",
        )
    if kind == "extra_forbidden":
        return Problem(f"unknown field {param!r}; leave it out", param, "unknown_parameter")
    if kind == "missing":
        return Problem(f"{param} is missing; give it", param, "missing_required_parameter")
    remedy = error["msg"][0].lower() + error["msg"][1:]
    place = param or "the request body"
    return Problem(f"{place} is {_shown(error['input'])}; {remedy}", param or None, "invalid_value")


def _without_surrogates(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise invalid_value(
            f"character {error.start} is a lone surrogate, give valid Unicode"
        ) from error
    return text


# JSON can escape half a surrogate pair, which is no text and would break tokenizers.
UnicodeText = Annotated[str, AfterValidator(_without_surrogates)]


def _path(loc: tuple[str | int, ...]) -> str:
    """A place in the body as OpenAI writes it: `messages[0].content`."""
    path = ""
    for part in loc:
        if part == GATHERED:
            continue
        path += f"[{part}]" if isinstance(part, int) else f".{part}"
    return path.removeprefix(".")


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}..."
