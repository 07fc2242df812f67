"""What a request may ask of this server; checked before it is queued, from any thread."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from server.core.request import Request
from server.errors import InvalidRequestError


def _allow(name: str, options: Mapping[str, float]) -> None:
    """Check nothing."""


@dataclass(frozen=True, slots=True)
class RequestLimits:
    """Limits that follow from the model, the heads and the KV cache.

    Attributes:
        max_model_len: Longest prompt plus output; the KV cache holds at least that many tokens.
        vocab_size: Token ids are below it.
        methods: Names of the draft sources that this server has, and `auto` and `none`.
        check_acceptance: Checks an acceptance rule's name and options; raises
            `InvalidRequestError`.
    """

    max_model_len: int
    vocab_size: int
    methods: frozenset[str]
    check_acceptance: Callable[[str, Mapping[str, float]], None] = _allow

    def check(self, request: Request) -> None:
        """Refuse a request that can never run.

        Raises:
            InvalidRequestError: Names the value and the remedy.
        """
        # Lengths come first, so that a huge prompt is refused without being read.
        self._check_lengths(len(request.prompt_token_ids), request.sampling.max_tokens)
        self._check_prediction(request)
        self._check_ids("prompt", request.prompt_token_ids)
        self._check_ids("logit_bias", request.sampling.logit_bias)
        speculation = request.speculation
        self.check_acceptance(speculation.acceptance, speculation.acceptance_options)
        method = speculation.method
        if method not in self.methods:
            raise InvalidRequestError(
                f"speculation.method is {method!r}, but this server has "
                f"{', '.join(sorted(self.methods))}; give one of them, or start the server with "
                "--heads of that kind, or with --lookup for lookup",
                "speculation.method",
            )

    def _check_lengths(self, num_prompt_tokens: int, max_tokens: int) -> None:
        limit = self.max_model_len
        if not num_prompt_tokens:
            raise InvalidRequestError("the prompt has no tokens; give at least one", "prompt")
        if num_prompt_tokens >= limit:
            raise InvalidRequestError(
                f"the prompt has {num_prompt_tokens} tokens, but prompt and output together may "
                f"have {limit}; shorten the prompt",
                "prompt",
                "context_length_exceeded",
            )
        if num_prompt_tokens + max_tokens > limit:
            raise InvalidRequestError(
                f"the prompt has {num_prompt_tokens} tokens and up to {max_tokens} are to be "
                f"generated, but together they may be {limit}; ask for fewer new tokens or "
                "shorten the prompt",
                "max_tokens",
                "context_length_exceeded",
            )

    def _check_prediction(self, request: Request) -> None:
        num_tokens = len(request.prediction_token_ids)
        if not num_tokens:
            return
        if num_tokens > self.max_model_len:
            raise InvalidRequestError(
                f"the prediction has {num_tokens} tokens, but prompt and output together may have "
                f"{self.max_model_len}; shorten the prediction",
                "prediction",
                "context_length_exceeded",
            )
        self._check_ids("prediction", request.prediction_token_ids)
        speculation = request.speculation
        if "lookup" not in self.methods:
            raise InvalidRequestError(
                "a prediction is given, but prompt lookup, which would use it, is off; leave it "
                "out, or start the server without --no-lookup",
                "prediction",
            )
        if speculation.method not in ("auto", "lookup"):
            raise InvalidRequestError(
                f"a prediction is given, but speculation.method {speculation.method!r} makes no "
                "use of it; leave the prediction out, or give 'auto' or 'lookup' as method",
                "prediction",
            )
        if speculation.max_nodes == 1:
            raise InvalidRequestError(
                "a prediction is given, but speculation.max_nodes is 1, which leaves no room for "
                "drafts; leave the prediction out, or allow more nodes",
                "prediction",
            )

    def _check_ids(self, param: str, token_ids: Collection[int]) -> None:
        if not token_ids:
            return
        for token_id in (min(token_ids), max(token_ids)):
            if not 0 <= token_id < self.vocab_size:
                raise InvalidRequestError(
                    f"{param} has token id {token_id}, which is outside the model's vocabulary; "
                    f"give 0 to {self.vocab_size - 1}",
                    param,
                )
