"""`/tokenize` and `/detokenize`: the model's tokenizer, for clients that count tokens."""

import asyncio

from fastapi import APIRouter
from starlette.responses import Response

from server.api.context import ApiContext, Context
from server.api.schemas.tokenize import (
    DetokenizeRequest,
    DetokenizeResponse,
    TokenizeRequest,
    TokenizeResponse,
)
from server.errors import InvalidRequestError
from server.tokenizer import Tokenizer

router = APIRouter(tags=["tokenize"])


@router.post("/tokenize", response_model=TokenizeResponse)
async def tokenize(body: TokenizeRequest, context: Context) -> Response:
    """Tokenize a text or a conversation."""
    _check_model(context, body.model)
    tokens = await asyncio.to_thread(_encode, context.tokenizer, body)
    answer = TokenizeResponse(count=len(tokens), max_model_len=context.max_model_len, tokens=tokens)
    return answer.response()


@router.post("/detokenize", response_model=DetokenizeResponse)
async def detokenize(body: DetokenizeRequest, context: Context) -> Response:
    """Turn tokens back into text."""
    _check_model(context, body.model)
    vocab_size = context.tokenizer.vocab_size
    for token_id in body.tokens:
        if not 0 <= token_id < vocab_size:
            raise InvalidRequestError(
                f"token id {token_id} is outside the vocabulary; give 0 to {vocab_size - 1}",
                param="tokens",
            )
    text = await asyncio.to_thread(context.tokenizer.decode, body.tokens, body.skip_special_tokens)
    return DetokenizeResponse(prompt=text).response()


def _encode(tokenizer: Tokenizer, body: TokenizeRequest) -> list[int]:
    if body.prompt is not None:
        return tokenizer.encode(body.prompt, body.add_special_tokens)
    messages = [message.for_template() for message in body.messages]
    return tokenizer.apply_chat_template(messages, body.add_generation_prompt)


def _check_model(context: ApiContext, name: str | None) -> None:
    if name is not None:
        context.check_model(name)
