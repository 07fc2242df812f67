"""What goes in and out of the engine: values that nobody can change afterwards."""

from dataclasses import FrozenInstanceError

import pytest

from server.config import SamplingParams, SpeculationParams
from server.core.request import Request, RequestStats


class TestRequest:
    def test_defaults_to_plain_sampling_and_automatic_speculation(self) -> None:
        request = Request("r", (1, 2))
        assert request.sampling == SamplingParams()
        assert request.speculation == SpeculationParams()

    def test_is_immutable(self) -> None:
        request = Request("r", (1, 2))
        with pytest.raises(FrozenInstanceError):
            request.request_id = "other"  # type: ignore[misc]  # exactly what must fail


class TestRequestStats:
    def test_mean_acceptance_length_is_tokens_per_verify_step_bonus_included(self) -> None:
        stats = RequestStats(num_steps=4, num_accepted_tokens=6, num_emitted_tokens=10)
        assert stats.mean_acceptance_length == 2.5

    def test_before_the_first_step_it_is_zero(self) -> None:
        assert RequestStats().mean_acceptance_length == 0.0
