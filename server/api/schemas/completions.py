"""Bodies of `/v1/completions`."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self

from pydantic import field_validator, model_validator
from typing_extensions import override

from server.api.schemas.base import (
    ResponseBody,
    UnicodeText,
    invalid_value,
    unsupported_option,
)
from server.api.schemas.generation import GenerationRequest
from server.api.schemas.usage import Usage
from server.core.request import FinishReason
from server.tokenizer import Tokenizer

Prompt = str | list[str] | list[int] | list[list[int]]


class CompletionRequest(GenerationRequest):
    """Ask for continuations of one or several prompts."""

    unsupported: ClassVar[Mapping[str, tuple[object, ...]]] = {
        **GenerationRequest.unsupported,
        "echo": (False,),
        "suffix": ("",),
    }

    id_prefix: ClassVar[str] = "cmpl"
    default_max_tokens: ClassVar[int | None] = 16

    prompt: list[UnicodeText] | list[list[int]]
    logprobs: int | None = None
    best_of: int | None = None

    @field_validator("prompt", mode="before", json_schema_input_type=Prompt)
    @classmethod
    def _several_prompts(cls, value: Any) -> Any:
        if isinstance(value, str) or _is_token_ids(value):
            return [value]
        if not isinstance(value, list) or not (_are_texts(value) or _are_prompts(value)):
            raise invalid_value(
                "give a string, a list of strings, a list of token ids or a list of such lists, "
                "none of the lists empty"
            )
        return value

    @model_validator(mode="after")
    def _no_best_of(self) -> Self:
        if self.best_of is not None and self.best_of != self.n:
            raise unsupported_option("best_of", self.best_of)
        return self

    @property
    @override
    def num_prompts(self) -> int:
        return len(self.prompt)

    @property
    @override
    def num_logprobs(self) -> int | None:
        return self.logprobs

    @override
    def prompts(self, tokenizer: Tokenizer) -> list[list[int]]:
        return [tokenizer.encode(p) if isinstance(p, str) else p for p in self.prompt]


def _are_texts(value: list[object]) -> bool:
    return bool(value) and all(isinstance(item, str) for item in value)


def _are_prompts(value: list[object]) -> bool:
    return bool(value) and all(_is_token_ids(item) for item in value)


def _is_token_ids(value: object) -> bool:
    # NOTE: bool is an int in Python, but true is no token id.
    return isinstance(value, list) and bool(value) and all(type(item) is int for item in value)


class CompletionLogprobs(ResponseBody):
    """Log-probabilities in the form of the completions API; one entry per token in each list.

    Attributes:
        text_offset: Where the token's text begins in the choice's text.
        token_logprobs: Log-probability of the token.
        tokens: The token's text.
        top_logprobs: The most probable tokens and the token itself, by text.
    """

    text_offset: list[int]
    token_logprobs: list[float]
    tokens: list[str]
    top_logprobs: list[dict[str, float]]


class CompletionChoice(ResponseBody):
    """A continuation, or a piece of one in a stream."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: FinishReason | None = None


class CompletionBody(ResponseBody):
    """The response, and each chunk of a stream."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None
