"""Euryale for use from Python, without HTTP.

    from euryale import LLM, SamplingParams

    llm = LLM("smollm2")
    [completion] = llm.chat([{"role": "user", "content": "Hi!"}], SamplingParams(max_tokens=50))
    print(completion.text, completion.stats.mean_acceptance_length)

All other packages are internal: their modules may change between releases.
"""

from euryale.llm import LLM, Conversation
from server.config import SamplingParams, SpeculationParams
from server.core.completion import Completion
from server.core.request import RequestOutput, RequestStats, TokenLogprob
from server.errors import (
    ConfigError,
    EuryaleError,
    HeadsCheckpointError,
    HeadsMismatchError,
    InvalidRequestError,
    ModelError,
)

__all__ = [
    "LLM",
    "Completion",
    "ConfigError",
    "Conversation",
    "EuryaleError",
    "HeadsCheckpointError",
    "HeadsMismatchError",
    "InvalidRequestError",
    "ModelError",
    "RequestOutput",
    "RequestStats",
    "SamplingParams",
    "SpeculationParams",
    "TokenLogprob",
]
