"""`/v1/completions`."""

from collections import defaultdict
from collections.abc import Iterator, Sequence

from fastapi import APIRouter, Request
from starlette.responses import Response

from server.api.context import Context
from server.api.generation import Heading, respond
from server.api.logprobs import completion_logprobs
from server.api.schemas.completions import (
    CompletionBody,
    CompletionChoice,
    CompletionRequest,
)
from server.api.schemas.usage import Usage
from server.api.token_texts import TokenTexts
from server.core.completion import Completion
from server.core.request import RequestOutput

router = APIRouter(tags=["completions"])


@router.post("/v1/completions", response_model=CompletionBody)
async def create_completion(
    body: CompletionRequest, request: Request, context: Context
) -> Response:
    """Continue one or several prompts."""
    return await respond(body, request, context, CompletionFormat)


class CompletionFormat:
    """Writes completions; a stream has text as it comes, and the reason with the last of it."""

    def __init__(self, heading: Heading, texts: TokenTexts) -> None:
        self._heading = heading
        self._texts = texts
        self._offsets: defaultdict[int, int] = defaultdict(int)

    def reply(self, completions: Sequence[Completion], usage: Usage) -> CompletionBody:
        """The whole response; one completion per choice, in order of index."""
        choices = [self._choice(index, item) for index, item in enumerate(completions)]
        return CompletionBody(**self._heading, choices=choices, usage=usage)

    def chunks(self, index: int, output: RequestOutput) -> Iterator[CompletionBody]:
        """At most one chunk; none while a character is incomplete."""
        choice = self._choice(index, output)
        if choice.text or choice.logprobs is not None or choice.finish_reason is not None:
            yield CompletionBody(**self._heading, choices=[choice])

    def usage_chunk(self, usage: Usage) -> CompletionBody:
        """The chunk without choices that carries the usage."""
        return CompletionBody(**self._heading, choices=[], usage=usage)

    def _choice(self, index: int, piece: Completion | RequestOutput) -> CompletionChoice:
        """The next piece of a choice, or the whole of it."""
        logprobs = None
        if piece.logprobs is not None:
            logprobs = completion_logprobs(
                piece.logprobs, piece.token_texts, self._offsets[index], self._texts
            )
            self._offsets[index] += sum(map(len, piece.token_texts))
        return CompletionChoice(
            index=index, text=piece.text, logprobs=logprobs, finish_reason=piece.finish_reason
        )
