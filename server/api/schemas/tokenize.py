"""Bodies of `/tokenize` and `/detokenize`."""

from typing import Self

from pydantic import Field, model_validator

from server.api.schemas.base import RequestBody, ResponseBody, UnicodeText
from server.api.schemas.chat import ChatMessage
from server.errors import InvalidRequestError


class TokenizeRequest(RequestBody):
    """Ask for the tokens of a text, or of a conversation with the chat template around it."""

    model: str | None = None
    prompt: UnicodeText | None = None
    messages: list[ChatMessage] = Field(default_factory=list)
    add_special_tokens: bool = True
    add_generation_prompt: bool = True

    @model_validator(mode="after")
    def _one_of_two(self) -> Self:
        if (self.prompt is None) == (not self.messages):
            raise InvalidRequestError("give either prompt or messages", param="prompt")
        return self


class TokenizeResponse(ResponseBody):
    """The tokens, their number and the longest sequence that the model takes."""

    count: int
    max_model_len: int
    tokens: list[int]


class DetokenizeRequest(RequestBody):
    """Ask for the text of tokens."""

    model: str | None = None
    tokens: list[int]
    skip_special_tokens: bool = False


class DetokenizeResponse(ResponseBody):
    """The text."""

    prompt: str
