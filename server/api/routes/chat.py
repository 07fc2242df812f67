"""`/v1/chat/completions`."""

from collections.abc import Iterator, Sequence

from fastapi import APIRouter, Request
from starlette.responses import Response

from server.api.context import Context
from server.api.generation import Heading, respond
from server.api.logprobs import chat_logprobs
from server.api.schemas.chat import (
    ChatAnswer,
    ChatChoice,
    ChatChunkChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatDelta,
    ChatLogprobs,
    ChatRequest,
)
from server.api.schemas.usage import Usage
from server.api.token_texts import TokenTexts
from server.core.completion import Completion
from server.core.request import RequestOutput, TokenLogprob

router = APIRouter(tags=["chat"])


@router.post("/v1/chat/completions", response_model=ChatCompletion)
async def create_chat_completion(body: ChatRequest, request: Request, context: Context) -> Response:
    """Answer a conversation."""
    return await respond(body, request, context, ChatFormat)


class ChatFormat:
    """Writes answers; a stream has for each the role, then text, then the reason."""

    def __init__(self, heading: Heading, texts: TokenTexts) -> None:
        self._heading = heading
        self._texts = texts
        self._begun: set[int] = set()

    def reply(self, completions: Sequence[Completion], usage: Usage) -> ChatCompletion:
        """The whole response; one completion per choice, in order of index."""
        choices = [
            ChatChoice(
                index=index,
                message=ChatAnswer(content=completion.text),
                logprobs=self._logprobs(completion.logprobs),
                finish_reason=completion.finish_reason,
            )
            for index, completion in enumerate(completions)
        ]
        return ChatCompletion(**self._heading, choices=choices, usage=usage)

    def chunks(self, index: int, output: RequestOutput) -> Iterator[ChatCompletionChunk]:
        """Up to three chunks; none while a character is incomplete."""
        if index not in self._begun:
            self._begun.add(index)
            delta = ChatDelta(role="assistant", content="")
            yield self._chunk(ChatChunkChoice(index=index, delta=delta))
        if output.text or output.logprobs:
            delta = ChatDelta(content=output.text)
            logprobs = self._logprobs(output.logprobs)
            yield self._chunk(ChatChunkChoice(index=index, delta=delta, logprobs=logprobs))
        reason = output.finish_reason
        if reason is not None:
            yield self._chunk(ChatChunkChoice(index=index, delta=ChatDelta(), finish_reason=reason))

    def usage_chunk(self, usage: Usage) -> ChatCompletionChunk:
        """The chunk without choices that carries the usage."""
        return ChatCompletionChunk(**self._heading, choices=[], usage=usage)

    def _chunk(self, choice: ChatChunkChoice) -> ChatCompletionChunk:
        return ChatCompletionChunk(**self._heading, choices=[choice])

    def _logprobs(self, entries: Sequence[TokenLogprob] | None) -> ChatLogprobs | None:
        return None if entries is None else chat_logprobs(entries, self._texts)
