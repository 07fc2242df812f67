"""Bodies of `/v1/chat/completions`."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, SerializerFunctionWrapHandler, field_validator, model_serializer
from typing_extensions import override

from server.api.schemas.base import (
    RequestBody,
    ResponseBody,
    UnicodeText,
    unsupported_value,
)
from server.api.schemas.generation import GenerationRequest
from server.api.schemas.text_parts import TextPart, joined_text
from server.api.schemas.usage import Usage
from server.config import MAX_LOGPROBS
from server.core.request import FinishReason
from server.errors import InvalidRequestError
from server.tokenizer import Tokenizer

_ROLES = ("system", "developer", "user", "assistant")


class ChatMessage(RequestBody):
    """A turn of the conversation; text parts are joined as they stand."""

    unsupported: ClassVar[Mapping[str, tuple[object, ...]]] = {
        "audio": (),
        "function_call": (),
        "reasoning_content": ("",),
        "refusal": ("",),
        "tool_call_id": (),
        "tool_calls": ([],),
    }
    harmless: ClassVar[frozenset[str]] = frozenset({"annotations"})

    role: Literal["system", "developer", "user", "assistant"]
    content: UnicodeText
    name: UnicodeText | None = None

    @field_validator("role", mode="before")
    @classmethod
    def _is_no_tool(cls, value: Any) -> Any:
        if value in ("tool", "function"):
            raise unsupported_value(f"tools are not supported; give one of {_ROLES} as role")
        return value

    @field_validator("content", mode="before", json_schema_input_type=str | list[TextPart])
    @classmethod
    def _join_text_parts(cls, value: Any) -> Any:
        return joined_text(value)

    def for_template(self) -> dict[str, str]:
        """The message as chat templates expect it; they know `developer` as `system`."""
        role = "system" if self.role == "developer" else self.role
        message = {"role": role, "content": self.content}
        return message if self.name is None else {**message, "name": self.name}


class ChatRequest(GenerationRequest):
    """Ask for the next turn of a conversation."""

    unsupported: ClassVar[Mapping[str, tuple[object, ...]]] = {
        **GenerationRequest.unsupported,
        "add_generation_prompt": (True,),
        "audio": (),
        "best_of": (1,),
        "chat_template": (),
        "chat_template_kwargs": ({},),
        "continue_final_message": (False,),
        "documents": ([],),
        "echo": (False,),
        "function_call": ("none",),
        "functions": ([],),
        "mm_processor_kwargs": ({},),
        "modalities": (["text"],),
        "moderation": (),
        "reasoning_effort": ("none",),
        "tool_choice": ("none",),
        "tools": ([],),
        "verbosity": ("medium",),
        "web_search_options": (),
    }
    # Without tools, which are refused, this one decides nothing.
    harmless: ClassVar[frozenset[str]] = GenerationRequest.harmless | {"parallel_tool_calls"}

    id_prefix: ClassVar[str] = "chatcmpl"
    # The rest of the context.
    default_max_tokens: ClassVar[int | None] = None

    messages: list[ChatMessage] = Field(min_length=1)
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None

    @property
    @override
    def num_prompts(self) -> int:
        return 1

    @property
    @override
    def num_logprobs(self) -> int | None:
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidRequestError(
                f"top_logprobs is {self.top_logprobs}; give logprobs: true with it",
                param="top_logprobs",
            )
        return (self.top_logprobs or 0) if self.logprobs else None

    @override
    def prompts(self, tokenizer: Tokenizer) -> list[list[int]]:
        return [tokenizer.apply_chat_template([turn.for_template() for turn in self.messages])]


class TokenAlternative(ResponseBody):
    """A token that could stand at a position.

    Attributes:
        token: Its text.
        logprob: Its log-probability.
        bytes: UTF-8 of the text; None if the token holds only part of a character.
    """

    token: str
    logprob: float
    bytes: list[int] | None


class ChatTokenLogprob(TokenAlternative):
    """An emitted token and the most probable ones at its position."""

    top_logprobs: list[TokenAlternative]


class ChatLogprobs(ResponseBody):
    """Log-probabilities in the form of the chat API."""

    content: list[ChatTokenLogprob]
    refusal: None = None


class ChatAnswer(ResponseBody):
    """The assistant's turn."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(ResponseBody):
    """One answer."""

    index: int
    message: ChatAnswer
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason


class ChatCompletion(ResponseBody):
    """The response when it does not stream."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class ChatDelta(ResponseBody):
    """What a chunk adds to an answer."""

    role: Literal["assistant"] | None = None
    content: str | None = None

    @model_serializer(mode="wrap")
    def _leave_out_nulls(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {name: value for name, value in serialize(self).items() if value is not None}


class ChatChunkChoice(ResponseBody):
    """A piece of one answer."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason | None = None


class ChatCompletionChunk(ResponseBody):
    """One event of a stream."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None
