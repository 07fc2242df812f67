"""What a request may ask of this server, and messages that say what to change."""

import time
from collections.abc import Iterator
from dataclasses import replace

import pytest

from server.config import SamplingParams, SpeculationParams
from server.core.limits import RequestLimits
from server.core.request import Request
from server.errors import InvalidRequestError

PLAIN = frozenset({"auto", "none"})
LIMITS = RequestLimits(max_model_len=10, vocab_size=50, methods=PLAIN)


class UnreadablePrompt(tuple[int, ...]):
    """A prompt whose length is all that may be looked at."""

    __slots__ = ()

    def __iter__(self) -> Iterator[int]:
        raise AssertionError("the prompt was read")


def request(
    prompt: tuple[int, ...],
    max_tokens: int = 1,
    bias: dict[int, float] | None = None,
    speculation: SpeculationParams | None = None,
    prediction: tuple[int, ...] = (),
) -> Request:
    return Request(
        "r",
        prompt,
        SamplingParams(max_tokens=max_tokens, logit_bias=bias or {}),
        speculation or SpeculationParams(),
        prediction,
    )


class TestRequestLimits:
    @pytest.mark.parametrize(
        "allowed",
        [
            request((0,)),
            request((49,), bias={0: 1.0, 49: 1.0}),
            request((1,) * 9, max_tokens=1),
            request((1,), max_tokens=9),
            request((1,), speculation=SpeculationParams(method="none")),
            request((1,), speculation=SpeculationParams(method="auto", max_nodes=64)),
        ],
    )
    def test_what_fits_is_taken(self, allowed: Request) -> None:
        LIMITS.check(allowed)

    @pytest.mark.parametrize(
        ("refused", "param", "code", "says"),
        [
            (request(()), "prompt", None, "no tokens"),
            (request((1, 50)), "prompt", None, "prompt has token id 50, .* 0 to 49"),
            (request((-1, 3)), "prompt", None, "token id -1"),
            (request((1,), bias={50: 1.0}), "logit_bias", None, "logit_bias has token id 50"),
            (request((1,) * 10), "prompt", "context_length_exceeded", "10 tokens.* 10; shorten"),
            (request((1,) * 99), "prompt", "context_length_exceeded", "99 tokens"),
            (
                request((1,) * 5, max_tokens=6),
                "max_tokens",
                "context_length_exceeded",
                "5 tokens and up to 6 .* 10; ask",
            ),
            (
                request((1,), speculation=SpeculationParams(method="medusa")),
                "speculation.method",
                None,
                "this server has auto, none",
            ),
        ],
    )
    def test_what_can_never_run_is_refused_with_the_value_and_the_remedy(
        self, refused: Request, param: str, code: str | None, says: str
    ) -> None:
        with pytest.raises(InvalidRequestError, match=says) as caught:
            LIMITS.check(refused)
        assert caught.value.param == param
        assert caught.value.code == code

    @pytest.mark.parametrize("method", ["auto", "lookup"])
    def test_a_prediction_may_be_as_long_as_the_context(self, method: str) -> None:
        limits = replace(LIMITS, methods=PLAIN | {"lookup"})
        speculation = SpeculationParams(method=method)
        limits.check(request((1,), speculation=speculation, prediction=(7,) * 10))

    @pytest.mark.parametrize(
        ("refused", "methods", "says"),
        [
            (request((1,), prediction=(7,) * 11), {"lookup"}, "11 tokens.* 10; shorten the pred"),
            (request((1,), prediction=(7, 50)), {"lookup"}, "prediction has token id 50"),
            (request((1,), prediction=(7,)), {"medusa"}, "lookup.* is off; .*--no-lookup"),
            (
                request((1,), speculation=SpeculationParams(method="none"), prediction=(7,)),
                {"lookup"},
                "speculation.method 'none' makes no use",
            ),
            (
                request((1,), speculation=SpeculationParams(max_nodes=1), prediction=(7,)),
                {"lookup"},
                "max_nodes is 1",
            ),
        ],
    )
    def test_a_prediction_is_never_ignored(
        self, refused: Request, methods: set[str], says: str
    ) -> None:
        limits = replace(LIMITS, methods=PLAIN | methods)
        with pytest.raises(InvalidRequestError, match=says) as caught:
            limits.check(refused)
        assert caught.value.param == "prediction"

    @pytest.mark.parametrize("max_tokens", [1, 6])
    def test_a_prompt_that_is_too_long_is_refused_without_being_read(self, max_tokens: int) -> None:
        prompt = UnreadablePrompt((-1,) * (11 - max_tokens))
        with pytest.raises(InvalidRequestError, match="tokens") as caught:
            LIMITS.check(request(prompt, max_tokens))
        assert caught.value.code == "context_length_exceeded"

    def test_a_prompt_of_the_longest_length_is_read_in_milliseconds(self) -> None:
        limits = RequestLimits(
            max_model_len=200_001, vocab_size=50, methods=frozenset({"auto", "none"})
        )
        long = request((7,) * 200_000)
        started_s = time.perf_counter()
        limits.check(long)
        assert time.perf_counter() - started_s < 1.0

    def test_a_draft_source_that_the_server_has_may_be_asked_for(self) -> None:
        methods = frozenset({"auto", "none", "medusa"})
        limits = RequestLimits(max_model_len=10, vocab_size=50, methods=methods)
        limits.check(request((1,), speculation=SpeculationParams(method="medusa")))
        with pytest.raises(InvalidRequestError, match="'lookup', but this server has auto, medusa"):
            limits.check(request((1,), speculation=SpeculationParams(method="lookup")))
