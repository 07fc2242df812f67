"""What a request may ask of this server; checked before it is queued, from any thread."""

from dataclasses import dataclass

from server.engine.request import Request
from server.errors import InvalidRequestError


@dataclass(frozen=True, slots=True)
class RequestLimits:
    """Limits that follow from the model, the heads and the KV cache.

    Attributes:
        max_model_len: Longest prompt plus output; the KV cache holds at least that many tokens.
        vocab_size: Token ids are below it.
        has_heads: Whether draft heads are loaded.
    """

    max_model_len: int
    vocab_size: int
    has_heads: bool

    def check(self, request: Request) -> None:
        """Refuse a request that can never run.

        Raises:
            InvalidRequestError: Names the value and the remedy.
        """
        prompt = request.prompt_token_ids
        if not prompt:
            raise InvalidRequestError("the prompt has no tokens; give at least one", "prompt")
        for token_id in (min(prompt), max(prompt), *request.sampling.logit_bias):
            if not 0 <= token_id < self.vocab_size:
                raise InvalidRequestError(
                    f"token id {token_id} is outside the model's vocabulary; give 0 to "
                    f"{self.vocab_size - 1}",
                    "logit_bias" if token_id in request.sampling.logit_bias else "prompt",
                )
        limit = self.max_model_len
        if len(prompt) >= limit:
            raise InvalidRequestError(
                f"the prompt has {len(prompt)} tokens, but prompt and output together may have "
                f"{limit}; shorten the prompt",
                "prompt",
                "context_length_exceeded",
            )
        if len(prompt) + request.sampling.max_tokens > limit:
            raise InvalidRequestError(
                f"the prompt has {len(prompt)} tokens and max_tokens is "
                f"{request.sampling.max_tokens}, but together they may be {limit}; lower "
                "max_tokens or shorten the prompt",
                "max_tokens",
                "context_length_exceeded",
            )
        if request.speculation.method == "medusa" and not self.has_heads:
            raise InvalidRequestError(
                "speculation.method is 'medusa', but this server has no draft heads; give 'auto' "
                "or 'none', or start the server with --heads",
                "speculation.method",
            )
