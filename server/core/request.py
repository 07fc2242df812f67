"""What a client asks of the engine and what it gets back: plain immutable values."""

from dataclasses import dataclass, field
from typing import Literal

from server.config import SamplingParams, SpeculationParams

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class Request:
    """One completion to generate.

    Attributes:
        request_id: Unique among the requests in flight.
        prompt_token_ids: At least one token.
        prediction_token_ids: Text that the output may consist of; a source of drafts and no more.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    speculation: SpeculationParams = field(default_factory=SpeculationParams)
    prediction_token_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class RequestStats:
    """What a request took and what speculation did for it, counted after stop truncation.

    The token that ends the prefill is drawn without a draft; neither it nor its step counts as
    speculation.

    Attributes:
        num_prompt_tokens: Tokens of the prompt.
        num_cached_tokens: Prompt tokens whose KV came from the prefix cache.
        num_output_tokens: Tokens generated, those of the prefill included.
        method: Draft sources: `none`, `medusa`, `mtp`, `lookup`, `medusa+lookup`, `mtp+lookup`.
        acceptance: Rule that ran, such as `exact` or `typical`.
        num_steps: Verify steps.
        num_draft_tokens: Tree nodes below the roots.
        num_accepted_tokens: Draft tokens that were accepted and emitted.
        num_emitted_tokens: Tokens emitted by verify steps, bonus tokens included.
        accepted_per_depth: Entry d - 1 counts the accepted tokens at depth d.
        num_accepted_prediction_tokens: Tokens of the prediction that were drafted from it and
            accepted at least once.
        num_rejected_prediction_tokens: Those that were drafted but never accepted.
    """

    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_output_tokens: int = 0
    method: str = "none"
    acceptance: str = "exact"
    num_steps: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    num_emitted_tokens: int = 0
    accepted_per_depth: tuple[int, ...] = ()
    num_accepted_prediction_tokens: int = 0
    num_rejected_prediction_tokens: int = 0

    @property
    def mean_acceptance_length(self) -> float:
        """Tokens emitted per verify step, bonus included; 0.0 before the first step."""
        return self.num_emitted_tokens / self.num_steps if self.num_steps else 0.0


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Log-probability of an emitted token and of the most probable ones at its position.

    Both are of the model's raw distribution: before temperature, penalties and filters.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """What one engine step brought for one request.

    Attributes:
        token_ids: New tokens; a token that ends the text (end of sequence, or the one that
            completes a stop string) is included.
        depths: For each new token, its depth in the draft tree, or 0 if the target drew it.
        text: New text: whole characters only, never part of a stop string.
        token_texts: For each new token, its own piece of the decoded text, before stop strings
            are cut ('' while a character is incomplete).
        logprobs: One entry per new token if the request asked for them, else None.
        is_verify_step: Whether the step verified a draft tree, the one-node tree of plain decoding
            included, below the last token; the step that ends a prompt does not.
        finish_reason: None while the request runs.
        stats: The whole request's counts, in its last output; None while it runs.
    """

    request_id: str
    token_ids: tuple[int, ...]
    depths: tuple[int, ...]
    text: str
    token_texts: tuple[str, ...]
    logprobs: tuple[TokenLogprob, ...] | None
    is_verify_step: bool
    finish_reason: FinishReason | None
    stats: RequestStats | None
