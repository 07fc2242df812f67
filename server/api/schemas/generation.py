"""The options that completions and chat completions share."""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import fields
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from server.api.schemas.base import (
    RequestBody,
    UnicodeText,
    invalid_value,
    unsupported_option,
)
from server.api.schemas.text_parts import TextPart, joined_text
from server.config import SamplingParams, SpeculationParams
from server.errors import InvalidRequestError
from server.sampling.acceptance import acceptance_options
from server.tokenizer import Tokenizer

MAX_CHOICES = 128

# NOTE: Options of OpenAI's API and of other servers' extensions that a client could rely on. Each
# is an error that names it, unless its value is among those listed, which change nothing.
_UNSUPPORTED: Mapping[str, tuple[object, ...]] = {
    "allowed_token_ids": ([],),
    "bad_words": ([],),
    "guided_choice": (),
    "guided_decoding_backend": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_whitespace_pattern": (),
    "include_stop_str_in_output": (False,),
    "json_schema": (),
    "length_penalty": (1.0,),
    "min_tokens": (0,),
    "priority": (0,),
    "prompt_logprobs": (),
    "regex": (),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "skip_special_tokens": (True,),
    "stop_token_ids": ([],),
    "store": (False,),
    "structured_outputs": (),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
}
_SAMPLING_OPTIONS = {option.name for option in fields(SamplingParams)}
_HARMLESS = frozenset(
    {"metadata", "prompt_cache_key", "prompt_cache_retention", "safety_identifier", "user"}
)


class StreamOptions(RequestBody):
    """What a stream carries besides the text."""

    unsupported: ClassVar[Mapping[str, tuple[object, ...]]] = {
        "continuous_usage_stats": (False,),
        "include_obfuscation": (False,),
    }

    include_usage: bool = False


class SpeculationOptions(RequestBody):
    """Euryale's extension: how this request is speculated on."""

    method: str = "auto"
    acceptance: str = "auto"
    max_nodes: int | None = None
    # The rules' own parameters, each a field of the body.
    acceptance_options: dict[str, float] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _gather_acceptance_options(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        if "acceptance_options" in data:
            raise unsupported_option("acceptance_options", data["acceptance_options"])
        names = acceptance_options()
        kept = {name: value for name, value in data.items() if name not in names}
        given = {name: data[name] for name in names if data.get(name) is not None}
        return kept | ({"acceptance_options": given} if given else {})

    def params(self) -> SpeculationParams:
        """Check the ranges.

        Raises:
            InvalidRequestError: If a value is out of range.
        """
        return SpeculationParams(**self.model_dump())


class Prediction(RequestBody):
    """Text that the output will largely consist of; OpenAI's predicted outputs."""

    type: Literal["content"]
    content: UnicodeText

    @field_validator("content", mode="before", json_schema_input_type=str | list[TextPart])
    @classmethod
    def _join_text_parts(cls, value: Any) -> Any:
        return joined_text(value)


class GenerationRequest(RequestBody):
    """Base of the bodies that ask for text.

    Attributes:
        id_prefix: Begins the ids of responses.
        default_max_tokens: Longest output if the client gives none; None is the rest of the
            context.
    """

    unsupported: ClassVar[Mapping[str, tuple[object, ...]]] = _UNSUPPORTED
    harmless: ClassVar[frozenset[str]] = _HARMLESS
    id_prefix: ClassVar[str]
    default_max_tokens: ClassVar[int | None]

    model: str
    stream: bool = False
    stream_options: StreamOptions = Field(default_factory=StreamOptions)
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[str, float] = Field(default_factory=dict)
    seed: int | None = None
    stop: list[UnicodeText] = Field(default_factory=list)
    n: int = Field(default=1, ge=1, le=MAX_CHOICES)
    ignore_eos: bool = False
    prediction: Prediction | None = None
    speculation: SpeculationOptions = Field(default_factory=SpeculationOptions)

    @field_validator("stream_options")
    @classmethod
    def _only_in_streams(cls, value: StreamOptions, info: ValidationInfo) -> StreamOptions:
        # A stream of the wrong type is missing here and an error of its own.
        if not info.data.get("stream", True):
            raise invalid_value("give it only with stream: true")
        return value

    @field_validator("stop", mode="before", json_schema_input_type=str | list[str])
    @classmethod
    def _one_stop_is_a_list(cls, value: Any) -> Any:
        if isinstance(value, str):
            return [value]
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise invalid_value("give a string or a list of strings")
        return value

    @property
    def token_limit(self) -> int | None:
        """The longest output asked for, by whichever of its two names.

        Raises:
            InvalidRequestError: If both names are used.
        """
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise InvalidRequestError(
                f"max_tokens is {self.max_tokens} and max_completion_tokens is "
                f"{self.max_completion_tokens}; give only one of them",
                param="max_tokens",
            )
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    def sampling(self, max_tokens: int, seed: int | None) -> SamplingParams:
        """Check the ranges.

        Args:
            max_tokens: Longest output.
            seed: Of one of the choices.

        Raises:
            InvalidRequestError: If a value is out of range.
        """
        options = self.model_dump(include=_SAMPLING_OPTIONS)
        options |= {
            "max_tokens": max_tokens,
            "logit_bias": {_token_id(key): bias for key, bias in self.logit_bias.items()},
            "seed": seed,
            "stop": tuple(self.stop),
            "logprobs": self.num_logprobs,
        }
        return SamplingParams(**options)

    def prediction_token_ids(self, tokenizer: Tokenizer) -> tuple[int, ...]:
        """Tokens of the prediction, which like an answer stands without special tokens."""
        text = "" if self.prediction is None else self.prediction.content
        return tuple(tokenizer.encode(text, add_special_tokens=False))

    @property
    @abstractmethod
    def num_prompts(self) -> int:
        """Number of prompts, each of which gets `n` choices."""

    @property
    @abstractmethod
    def num_logprobs(self) -> int | None:
        """Number of most probable tokens to report, or None for no log-probabilities.

        Raises:
            InvalidRequestError: If the options for it contradict each other.
        """

    @abstractmethod
    def prompts(self, tokenizer: Tokenizer) -> list[list[int]]:
        """Tokenize the prompts.

        Raises:
            InvalidRequestError: If the model's chat template rejects a conversation.
        """


def _token_id(key: str) -> int:
    if not (key.isascii() and key.isdigit() and len(key) < 20):
        raise InvalidRequestError(
            f"logit_bias has the key {key[:80]!r}; give token ids", param="logit_bias"
        )
    return int(key)
