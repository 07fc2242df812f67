"""The table of acceptance rules: which one a request gets, and what its options may be."""

import pytest

from server.config import SamplingParams, SpeculationParams
from server.errors import ConfigError, InvalidRequestError
from server.sampling.acceptance import (
    acceptance_options,
    check_acceptance,
    check_default,
    choose_rule,
)

GREEDY = SamplingParams(temperature=0.0)
SAMPLED = SamplingParams(temperature=0.7)
SEEDED = SamplingParams(temperature=0.7, seed=1)
LOGPROBS = SamplingParams(temperature=0.7, logprobs=0)


class TestChooseRule:
    @pytest.mark.parametrize(
        ("sampling", "asked", "server", "rule"),
        [
            (SAMPLED, "auto", "auto", "typical"),
            (GREEDY, "auto", "auto", "exact"),
            (SEEDED, "auto", "auto", "exact"),
            (LOGPROBS, "auto", "auto", "exact"),
            (SAMPLED, "exact", "auto", "exact"),
            (SAMPLED, "auto", "exact", "exact"),
            (SAMPLED, "exact", "typical", "exact"),
            (SEEDED, "typical", "auto", "typical"),
            (SEEDED, "typical", "exact", "typical"),
            (LOGPROBS, "typical", "auto", "typical"),
            (GREEDY, "typical", "typical", "exact"),
            (GREEDY, "auto", "typical", "exact"),
            (SAMPLED, "auto", "typical", "typical"),
            (SEEDED, "auto", "typical", "exact"),
            (LOGPROBS, "auto", "typical", "exact"),
            (SEEDED, "typical", "typical", "typical"),
        ],
    )
    def test_the_request_is_asked_first_then_the_sampling_then_the_server(
        self, sampling: SamplingParams, asked: str, server: str, rule: str
    ) -> None:
        speculation = SpeculationParams(acceptance=asked)
        assert choose_rule(sampling, speculation, server) == rule


class TestChecks:
    def test_an_unknown_rule_is_refused_by_name(self) -> None:
        with pytest.raises(InvalidRequestError, match=r"'lossy'; .*exact.*typical") as it:
            check_acceptance("lossy", {})
        assert it.value.param == "speculation.acceptance"
        with pytest.raises(ConfigError, match="acceptance is 'lossy'"):
            check_default("lossy")
        check_default("auto")

    @pytest.mark.parametrize(
        ("option", "value"),
        [("epsilon", -0.1), ("epsilon", 1.1), ("delta", -0.1), ("delta", float("nan"))],
    )
    def test_a_wrong_option_is_refused_under_the_name_that_the_client_wrote(
        self, option: str, value: float
    ) -> None:
        with pytest.raises(InvalidRequestError, match=f"{option} is {value}; give 0 to 1") as it:
            check_acceptance("auto", {option: value})
        assert it.value.param == f"speculation.{option}"

    def test_borders_are_taken(self) -> None:
        check_acceptance("typical", {"epsilon": 0.0, "delta": 1.0})
        check_acceptance("exact", {"epsilon": 1.0, "delta": 0.0})

    def test_an_option_that_no_rule_has_is_refused(self) -> None:
        assert acceptance_options() == ("epsilon", "delta")
        with pytest.raises(InvalidRequestError, match=r"speculation\.tau is no option"):
            check_acceptance("typical", {"tau": 0.5})
