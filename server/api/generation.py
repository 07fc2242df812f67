"""Runs the choices of one HTTP request: submits, merges and collects them.

A choice is one completion of one prompt; the choices of prompt p have the indices p * n to
p * n + n - 1, as OpenAI numbers them. Knows nothing of chat or completions, which plug in as
`ChunkFormat`.
"""

import asyncio
import hashlib
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Protocol

from server.api.context import ApiContext
from server.api.schemas.base import ResponseBody
from server.api.schemas.generation import MAX_CHOICES, FinishReasonName, GenerationRequest
from server.api.schemas.usage import Usage
from server.api.sse import DONE, event
from server.api.usage import usage_of
from server.core.request import Request, RequestOutput, RequestStats, TokenLogprob
from server.engine.async_engine import AsyncEngine
from server.errors import InvalidRequestError


@dataclass(frozen=True, slots=True)
class Job:
    """An HTTP request, ready to run.

    Attributes:
        job_id: The response's id.
        created_s: Unix time of arrival.
        model: The name that the client asked for.
        requests: One per choice, in order of index.
        num_choices: Choices per prompt.
        include_usage: Whether a stream ends in a chunk with the usage.
    """

    job_id: str
    created_s: int
    model: str
    requests: tuple[Request, ...]
    num_choices: int
    include_usage: bool


@dataclass(frozen=True, slots=True)
class ChoiceOutput:
    """What one engine step brought for one choice."""

    index: int
    output: RequestOutput


@dataclass(slots=True)
class CollectedChoice:
    """A whole choice."""

    index: int
    outputs: list[RequestOutput] = field(default_factory=list)

    @property
    def text(self) -> str:
        """The whole text."""
        return "".join(output.text for output in self.outputs)

    @property
    def token_texts(self) -> list[str]:
        """Each token's piece of the text."""
        return [text for output in self.outputs for text in output.token_texts]

    @property
    def logprobs(self) -> list[TokenLogprob] | None:
        """One entry per token, if asked for."""
        if self.outputs[0].logprobs is None:
            return None
        return [entry for output in self.outputs for entry in output.logprobs or ()]

    @property
    def finish_reason(self) -> FinishReasonName:
        """Why it ended."""
        reason = finish_reason(self.outputs[-1])
        assert reason is not None
        return reason


class ChunkFormat(Protocol):
    """Turns outputs into the chunks of one kind of stream; has state, one per stream."""

    def chunks(self, index: int, output: RequestOutput) -> Iterator[ResponseBody]:
        """Chunks for one output of the choice `index`; may be none."""
        ...

    def usage_chunk(self, usage: Usage) -> ResponseBody:
        """The chunk without choices that carries the usage."""
        ...


@dataclass(frozen=True, slots=True)
class TokenizedTexts:
    """The texts of a request, as token ids.

    Attributes:
        prompts: At least one.
        prediction: Empty if the request has none.
    """

    prompts: Sequence[Sequence[int]]
    prediction: tuple[int, ...]


async def tokenized(
    context: ApiContext, body: GenerationRequest, prompts: Callable[[], Sequence[Sequence[int]]]
) -> TokenizedTexts:
    """Tokenize a request's texts beside the event loop.

    Args:
        context: The application's parts.
        body: The validated body, of which the prediction is tokenized; like an answer it has
            neither template nor special tokens around it.
        prompts: Tokenizes the prompts.
    """

    def tokenize() -> TokenizedTexts:
        text = "" if body.prediction is None else body.prediction.content
        prediction = context.tokenizer.encode(text, add_special_tokens=False)
        return TokenizedTexts(prompts(), tuple(prediction))

    return await asyncio.to_thread(tokenize)


def prepare_job(
    context: ApiContext,
    body: GenerationRequest,
    texts: TokenizedTexts,
    id_prefix: str,
    logprobs: int | None,
    default_max_tokens: int | None,
) -> Job:
    """Check everything that can be checked before the engine sees the request.

    Args:
        context: The application's parts.
        body: The validated body.
        texts: The prompts and the prediction.
        id_prefix: Begins the response's id.
        logprobs: Number of most probable tokens to report, or None.
        default_max_tokens: Longest output if the client gives none; None is the rest of the
            context.

    Raises:
        InvalidRequestError: If a parameter is wrong or a prompt does not fit.
    """
    job_id = f"{id_prefix}-{uuid.uuid4().hex}"
    speculation = body.speculation.params()
    requests: list[Request] = []
    for prompt in map(tuple, texts.prompts):
        room = max(1, context.max_model_len - len(prompt))
        max_tokens = body.token_limit or min(default_max_tokens or room, room)
        for choice in range(body.n):
            request = Request(
                request_id=f"{job_id}-{len(requests)}",
                prompt_token_ids=prompt,
                sampling=body.sampling(max_tokens, logprobs, choice_seed(body.seed, choice)),
                speculation=speculation,
                prediction_token_ids=texts.prediction,
            )
            if choice == 0:
                # The other choices differ in the seed only; a long prompt is read just once.
                context.engine.engine.limits.check(request)
            requests.append(request)
    return Job(
        job_id=job_id,
        created_s=int(time.time()),
        model=body.model,
        requests=tuple(requests),
        num_choices=body.n,
        include_usage=body.stream_options.include_usage,
    )


def check_num_choices(num_prompts: int, num_choices: int) -> int:
    """Return the number of choices of all prompts together.

    Raises:
        InvalidRequestError: If they are too many for one request.
    """
    total = num_prompts * num_choices
    if total > MAX_CHOICES:
        raise InvalidRequestError(
            f"{num_prompts} prompts with n = {num_choices} make {total} choices; give at most "
            f"{MAX_CHOICES} in one request",
            param="n",
        )
    return total


def choice_seed(seed: int | None, choice: int) -> int | None:
    """Derive the seed of one of n choices; the first choice has the request's own seed."""
    if seed is None or choice == 0:
        return seed
    digest = hashlib.blake2b(f"{seed}/{choice}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def finish_reason(output: RequestOutput) -> FinishReasonName | None:
    """The reason as clients know it."""
    return output.finish_reason


async def run_choices(
    engine: AsyncEngine, requests: Sequence[Request]
) -> AsyncGenerator[ChoiceOutput, None]:
    """Run requests side by side and yield their outputs as they come.

    Closing the generator, and an error of any request, aborts them all.
    """
    merged: asyncio.Queue[ChoiceOutput | asyncio.Task[None]] = asyncio.Queue()

    # NOTE: It awaits only inside the engine's generator, so cancelling it ends that generator too.
    async def pump(index: int, request: Request) -> None:
        async for output in engine.generate(request):
            merged.put_nowait(ChoiceOutput(index, output))

    tasks = [asyncio.create_task(pump(index, request)) for index, request in enumerate(requests)]
    for task in tasks:
        task.add_done_callback(merged.put_nowait)
    try:
        num_running = len(tasks)
        while num_running:
            item = await merged.get()
            if isinstance(item, ChoiceOutput):
                yield item
            else:
                item.result()
                num_running -= 1
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def collect(engine: AsyncEngine, job: Job) -> list[CollectedChoice]:
    """Run a job to its end."""
    choices = [CollectedChoice(index) for index in range(len(job.requests))]
    async with aclosing(run_choices(engine, job.requests)) as outputs:
        async for item in outputs:
            choices[item.index].outputs.append(item.output)
    return choices


async def stream_events(
    engine: AsyncEngine, job: Job, chunk_format: ChunkFormat
) -> AsyncGenerator[bytes, None]:
    """Run a job and yield framed events, `[DONE]` last."""
    hidden = None if job.include_usage else {"usage"}
    stats: dict[int, RequestStats] = {}
    async with aclosing(run_choices(engine, job.requests)) as outputs:
        async for item in outputs:
            if item.output.stats is not None:
                stats[item.index] = item.output.stats
            for chunk in chunk_format.chunks(item.index, item.output):
                yield event(chunk.model_dump_json(exclude=hidden).encode())
    if job.include_usage:
        usage = usage_of([stats[index] for index in sorted(stats)], job.num_choices)
        yield event(chunk_format.usage_chunk(usage).model_dump_json().encode())
    yield DONE
