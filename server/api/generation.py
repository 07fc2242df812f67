"""Answers an HTTP request for text: prepares its choices, runs them, writes the response.

A choice is one completion of one prompt; the choices of prompt p have the indices p * n to
p * n + n - 1, as OpenAI numbers them. Knows nothing of chat or completions: a body says what is
asked, and a `ReplyFormat` writes what comes back.
"""

import asyncio
import hashlib
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Protocol, TypedDict

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from server.api.context import ApiContext
from server.api.disconnect import until_disconnect
from server.api.schemas.base import ResponseBody
from server.api.schemas.generation import MAX_CHOICES, GenerationRequest
from server.api.schemas.usage import Usage
from server.api.sse import DONE, EventStream, event
from server.api.token_texts import TokenTexts
from server.api.usage import usage_of
from server.core.completion import Completion, join_outputs
from server.core.request import Request, RequestOutput, RequestStats
from server.engine.async_engine import AsyncEngine
from server.errors import InvalidRequestError


class Heading(TypedDict):
    """Fields with which a response and each chunk of a stream begin.

    Attributes:
        id: The response's id.
        created: Unix time of arrival.
        model: The name that the client asked for.
    """

    id: str
    created: int
    model: str


@dataclass(frozen=True, slots=True)
class Generation:
    """An HTTP request for text, ready to run.

    Attributes:
        heading: Of its response.
        requests: One per choice, in order of index.
        num_choices: Choices per prompt.
        include_usage: Whether a stream ends in a chunk with the usage.
    """

    heading: Heading
    requests: tuple[Request, ...]
    num_choices: int
    include_usage: bool


class ReplyFormat(Protocol):
    """Writes what the engine generated as one API has it; has state, one per response."""

    def reply(self, completions: Sequence[Completion], usage: Usage) -> ResponseBody:
        """The whole response; one completion per choice, in order of index."""
        ...

    def chunks(self, index: int, output: RequestOutput) -> Iterator[ResponseBody]:
        """Chunks of a stream for one output of the choice `index`; may be none."""
        ...

    def usage_chunk(self, usage: Usage) -> ResponseBody:
        """The chunk without choices that carries the usage."""
        ...


async def respond(
    body: GenerationRequest,
    request: HttpRequest,
    context: ApiContext,
    make_format: Callable[[Heading, TokenTexts], ReplyFormat],
) -> Response:
    """Answer a request whole or as a stream, whichever it asks for.

    Args:
        body: The validated body.
        request: Says when the client hangs up, which aborts all choices.
        context: The application's parts.
        make_format: Called with the response's heading and the texts of single tokens.

    Raises:
        ModelNotFoundError: If the body names another model.
        InvalidRequestError: If a parameter is wrong or a prompt does not fit.
        QueueFullError: If the engine has no room for all choices.
        EngineStoppedError: If the engine takes no requests, or ends before them.
    """
    context.check_model(body.model)
    check_num_choices(body.num_prompts, body.n)
    # Long texts would hold up the event loop.
    generation = await asyncio.to_thread(prepare, body, context)
    reply_format = make_format(generation.heading, context.token_texts)
    if body.stream:
        return EventStream(_events(context.engine, generation, reply_format))
    reply = _reply(context.engine, generation, reply_format)
    return (await until_disconnect(request.receive, reply)).response()


def prepare(body: GenerationRequest, context: ApiContext) -> Generation:
    """Tokenize a body's texts and build the requests of its choices.

    Raises:
        InvalidRequestError: If a parameter is wrong.
    """
    heading = Heading(
        id=f"{body.id_prefix}-{uuid.uuid4().hex}", created=int(time.time()), model=body.model
    )
    prediction = body.prediction_token_ids(context.tokenizer)
    speculation = body.speculation.params()
    requests: list[Request] = []
    for prompt in map(tuple, body.prompts(context.tokenizer)):
        room = max(1, context.max_model_len - len(prompt))
        max_tokens = body.token_limit or min(body.default_max_tokens or room, room)
        for choice in range(body.n):
            request = Request(
                request_id=f"{heading['id']}-{len(requests)}",
                prompt_token_ids=prompt,
                sampling=body.sampling(max_tokens, choice_seed(body.seed, choice)),
                speculation=speculation,
                prediction_token_ids=prediction,
            )
            requests.append(request)
    return Generation(heading, tuple(requests), body.n, body.stream_options.include_usage)


def check_num_choices(num_prompts: int, num_choices: int) -> None:
    """Refuse more choices than one request may have.

    Args:
        num_prompts: Prompts of the request.
        num_choices: Choices per prompt.

    Raises:
        InvalidRequestError: If they are too many together.
    """
    total = num_prompts * num_choices
    if total > MAX_CHOICES:
        raise InvalidRequestError(
            f"{num_prompts} prompts with n = {num_choices} make {total} choices; give at most "
            f"{MAX_CHOICES} in one request",
            param="n",
        )


def choice_seed(seed: int | None, choice: int) -> int | None:
    """Derive the seed of one of n choices; the first choice has the request's own seed."""
    if seed is None or choice == 0:
        return seed
    digest = hashlib.blake2b(f"{seed}/{choice}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


async def _reply(
    engine: AsyncEngine, generation: Generation, reply_format: ReplyFormat
) -> ResponseBody:
    choices: list[list[RequestOutput]] = [[] for _ in generation.requests]
    async with aclosing(engine.generate(generation.requests)) as stream:
        async for index, output in stream:
            choices[index].append(output)
    completions = [join_outputs(outputs) for outputs in choices]
    stats = [completion.stats for completion in completions]
    return reply_format.reply(completions, usage_of(stats, generation.num_choices))


async def _events(
    engine: AsyncEngine, generation: Generation, reply_format: ReplyFormat
) -> AsyncGenerator[bytes, None]:
    """Framed events, `[DONE]` last."""
    hidden = None if generation.include_usage else {"usage"}
    stats: dict[int, RequestStats] = {}
    async with aclosing(engine.generate(generation.requests)) as stream:
        async for index, output in stream:
            if output.stats is not None:
                stats[index] = output.stats
            for chunk in reply_format.chunks(index, output):
                yield event(chunk.model_dump_json(exclude=hidden).encode())
    if generation.include_usage:
        usage = usage_of([stats[index] for index in sorted(stats)], generation.num_choices)
        yield event(reply_format.usage_chunk(usage).model_dump_json().encode())
    yield DONE
