"""The `usage` object of responses."""

from server.api.schemas.base import ResponseBody


class PromptTokensDetails(ResponseBody):
    """Where the prompt's KV came from."""

    cached_tokens: int


class CompletionTokensDetails(ResponseBody):
    """What became of the request's `prediction`, summed over the choices; 0 without one.

    Attributes:
        accepted_prediction_tokens: Its tokens that were drafted and accepted, each counted once.
        rejected_prediction_tokens: Its tokens that were drafted but never accepted.
    """

    accepted_prediction_tokens: int
    rejected_prediction_tokens: int


class SpeculationUsage(ResponseBody):
    """Euryale's extension: what speculation did, summed over the choices.

    Attributes:
        method: Draft source that ran.
        acceptance: Acceptance rule that ran.
        num_steps: Verify steps.
        num_draft_tokens: Draft tokens verified.
        num_accepted_tokens: Draft tokens accepted and emitted.
        mean_acceptance_length: Tokens emitted per verify step, bonus included.
        accepted_per_depth: Entry d - 1 counts the accepted tokens at depth d.
    """

    method: str
    acceptance: str
    num_steps: int
    num_draft_tokens: int
    num_accepted_tokens: int
    mean_acceptance_length: float
    accepted_per_depth: list[int]


class Usage(ResponseBody):
    """Token counts of a response; a prompt counts once, however many choices it has."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails
    speculation: SpeculationUsage
