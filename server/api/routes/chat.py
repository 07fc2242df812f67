"""`/v1/chat/completions`."""

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
from server.api.logprobs import chat_logprobs
from server.api.responses import json_response
from server.api.schemas.chat import (
    ChatAnswer,
    ChatChoice,
    ChatChunkChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatDelta,
    ChatRequest,
)
from server.api.schemas.usage import Usage
from server.api.sse import EventStream
from server.api.token_texts import TokenTexts
from server.api.usage import usage_of
from server.core.completion import join_outputs
from server.core.request import RequestOutput

router = APIRouter(tags=["chat"])


@router.post("/v1/chat/completions", response_model=ChatCompletion)
async def create_chat_completion(body: ChatRequest, request: Request, context: Context) -> Response:
    """Answer a conversation."""
    context.check_model(body.model)
    context.engine.check_admission(check_num_choices(1, body.n))
    messages = [message.for_template() for message in body.messages]
    texts = await tokenized(
        context, body, lambda: [context.tokenizer.apply_chat_template(messages)]
    )
    job = prepare_job(context, body, texts, "chatcmpl", body.num_logprobs, None)
    if body.stream:
        chunks = ChatChunks(job, context.token_texts)
        return EventStream(stream_events(context.engine, job, chunks))
    completion = await until_disconnect(request.receive, _complete(context, job))
    return json_response(completion)


async def _complete(context: ApiContext, job: Job) -> ChatCompletion:
    collected = await collect(context.engine, job)
    choices = []
    for item in collected:
        entries = item.logprobs
        choices.append(
            ChatChoice(
                index=item.index,
                message=ChatAnswer(content=item.text),
                logprobs=None if entries is None else chat_logprobs(entries, context.token_texts),
                finish_reason=item.finish_reason,
            )
        )
    usage = usage_of([join_outputs(item.outputs).stats for item in collected], job.num_choices)
    return ChatCompletion(
        id=job.job_id, created=job.created_s, model=job.model, choices=choices, usage=usage
    )


class ChatChunks:
    """Chunks of a stream of answers: for each, the role, then text, then the reason."""

    def __init__(self, job: Job, texts: TokenTexts) -> None:
        self._job = job
        self._texts = texts
        self._begun: set[int] = set()

    def chunks(self, index: int, output: RequestOutput) -> Iterator[ChatCompletionChunk]:
        """Up to three chunks; none while a character is incomplete."""
        if index not in self._begun:
            self._begun.add(index)
            delta = ChatDelta(role="assistant", content="")
            yield self._chunk(ChatChunkChoice(index=index, delta=delta))
        if output.text or output.logprobs:
            logprobs = None
            if output.logprobs is not None:
                logprobs = chat_logprobs(output.logprobs, self._texts)
            delta = ChatDelta(content=output.text)
            yield self._chunk(ChatChunkChoice(index=index, delta=delta, logprobs=logprobs))
        reason = finish_reason(output)
        if reason is not None:
            yield self._chunk(ChatChunkChoice(index=index, delta=ChatDelta(), finish_reason=reason))

    def usage_chunk(self, usage: Usage) -> ChatCompletionChunk:
        """The chunk without choices that carries the usage."""
        return self._chunk(usage=usage)

    def _chunk(self, *choices: ChatChunkChoice, usage: Usage | None = None) -> ChatCompletionChunk:
        return ChatCompletionChunk(
            id=self._job.job_id,
            created=self._job.created_s,
            model=self._job.model,
            choices=list(choices),
            usage=usage,
        )
