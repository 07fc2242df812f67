"""`/v1/completions`."""

from collections import defaultdict
from collections.abc import Iterator

from fastapi import APIRouter, Request
from starlette.responses import Response

from server.api.context import ApiContext, Context
from server.api.disconnect import until_disconnect
from server.api.generation import (
    Job,
    check_num_choices,
    collect,
    finish_reason,
    prepare_job,
    stream_events,
    tokenized,
)
from server.api.logprobs import completion_logprobs
from server.api.responses import json_response
from server.api.schemas.completions import Completion, CompletionChoice, CompletionRequest
from server.api.schemas.usage import Usage
from server.api.sse import EventStream
from server.api.token_texts import TokenTexts
from server.api.usage import usage_of
from server.core.completion import join_outputs
from server.core.request import RequestOutput
from server.tokenizer import Tokenizer

_DEFAULT_MAX_TOKENS = 16

router = APIRouter(tags=["completions"])


@router.post("/v1/completions", response_model=Completion)
async def create_completion(
    body: CompletionRequest, request: Request, context: Context
) -> Response:
    """Continue one or several prompts."""
    context.check_model(body.model)
    context.engine.check_admission(check_num_choices(len(body.prompt), body.n))
    texts = await tokenized(context, body, lambda: _token_ids(context.tokenizer, body.prompt))
    job = prepare_job(context, body, texts, "cmpl", body.logprobs, _DEFAULT_MAX_TOKENS)
    if body.stream:
        chunks = CompletionChunks(job, context.token_texts)
        return EventStream(stream_events(context.engine, job, chunks))
    completion = await until_disconnect(request.receive, _complete(context, job))
    return json_response(completion)


def _token_ids(tokenizer: Tokenizer, prompts: list[str] | list[list[int]]) -> list[list[int]]:
    return [tokenizer.encode(p) if isinstance(p, str) else p for p in prompts]


async def _complete(context: ApiContext, job: Job) -> Completion:
    collected = await collect(context.engine, job)
    choices = []
    for item in collected:
        entries = item.logprobs
        choices.append(
            CompletionChoice(
                index=item.index,
                text=item.text,
                logprobs=None
                if entries is None
                else completion_logprobs(entries, item.token_texts, 0, context.token_texts),
                finish_reason=item.finish_reason,
            )
        )
    usage = usage_of([join_outputs(item.outputs).stats for item in collected], job.num_choices)
    return Completion(
        id=job.job_id, created=job.created_s, model=job.model, choices=choices, usage=usage
    )


class CompletionChunks:
    """Chunks of a stream of completions: text as it comes, the reason in the last one."""

    def __init__(self, job: Job, texts: TokenTexts) -> None:
        self._job = job
        self._texts = texts
        self._offsets: defaultdict[int, int] = defaultdict(int)

    def chunks(self, index: int, output: RequestOutput) -> Iterator[Completion]:
        """At most one chunk; none while a character is incomplete."""
        reason = finish_reason(output)
        logprobs = None
        if output.logprobs is not None:
            logprobs = completion_logprobs(
                output.logprobs, output.token_texts, self._offsets[index], self._texts
            )
            self._offsets[index] += sum(map(len, output.token_texts))
        if output.text or logprobs is not None or reason is not None:
            yield self._chunk(
                CompletionChoice(
                    index=index, text=output.text, logprobs=logprobs, finish_reason=reason
                )
            )

    def usage_chunk(self, usage: Usage) -> Completion:
        """The chunk without choices that carries the usage."""
        return self._chunk(usage=usage)

    def _chunk(self, *choices: CompletionChoice, usage: Usage | None = None) -> Completion:
        return Completion(
            id=self._job.job_id,
            created=self._job.created_s,
            model=self._job.model,
            choices=list(choices),
            usage=usage,
        )
