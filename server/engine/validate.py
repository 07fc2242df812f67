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
        for param, token_ids in (("prompt", prompt), ("logit_bias", request.sampling.logit_bias)):
            for token_id in token_ids:
                if not 0 <= token_id < self.vocab_size:
                    raise InvalidRequestError(
                        f"{param} has token id {token_id}, which is outside the model's "
                        f"vocabulary; give 0 to {self.vocab_size - 1}",
                        param,
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
                f"the prompt has {len(prompt)} tokens and up to {request.sampling.max_tokens} are "
                f"to be generated, but together they may be {limit}; ask for fewer new tokens or "
                "shorten the prompt",
                "max_tokens",
                "context_length_exceeded",
            )
        if request.speculation.method == "medusa" and not self.has_heads:
            raise InvalidRequestError(
                "speculation.method is 'medusa', but this server has no draft heads; give 'auto' "
                "or 'none', or start the server with --heads",
                "speculation.method",
            )
