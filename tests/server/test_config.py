"""Validated options: every limit from both sides, and errors that name value and remedy."""

from dataclasses import FrozenInstanceError
from typing import Any

import pytest

from server.config import (
    MAX_LOGIT_BIAS,
    MAX_LOGPROBS,
    MAX_STOP_STRINGS,
    MAX_TREE_NODES,
    EngineConfig,
    SamplingParams,
    SpeculationParams,
)
from server.errors import ConfigError, InvalidRequestError
from server.sampling.acceptance.typical import TypicalParameters

NAN = float("nan")
INFINITY = float("inf")


class TestSamplingParams:
    @pytest.mark.parametrize(
        ("param", "value"),
        [
            ("max_tokens", 1),
            ("temperature", 0.0),
            ("temperature", 2.0),
            ("top_p", 1e-9),
            ("top_p", 1.0),
            ("top_k", 0),
            ("top_k", 10**9),
            ("min_p", 0.0),
            ("min_p", 1.0),
            ("presence_penalty", -2.0),
            ("presence_penalty", 2.0),
            ("frequency_penalty", -2.0),
            ("frequency_penalty", 2.0),
            ("repetition_penalty", 0.01),
            ("repetition_penalty", 10.0),
            ("logit_bias", {0: -100.0, 7: 100.0}),
            ("logit_bias", dict.fromkeys(range(MAX_LOGIT_BIAS), 1.0)),
            ("seed", -(2**63)),
            ("seed", 2**63 - 1),
            ("stop", ("x",) * MAX_STOP_STRINGS),
            ("logprobs", 0),
            ("logprobs", MAX_LOGPROBS),
        ],
    )
    def test_values_on_the_border_are_taken(self, param: str, value: object) -> None:
        arguments: dict[str, Any] = {param: value}
        assert getattr(SamplingParams(**arguments), param) == value

    @pytest.mark.parametrize(
        ("param", "value"),
        [
            ("max_tokens", 0),
            ("max_tokens", -5),
            ("temperature", -0.1),
            ("temperature", 2.1),
            ("temperature", NAN),
            ("top_p", 0.0),
            ("top_p", 1.01),
            ("top_p", NAN),
            ("top_k", -1),
            ("min_p", -0.1),
            ("min_p", 1.1),
            ("presence_penalty", -2.1),
            ("presence_penalty", 2.1),
            ("presence_penalty", NAN),
            ("frequency_penalty", -2.1),
            ("frequency_penalty", 2.1),
            ("repetition_penalty", 0.0),
            ("repetition_penalty", 1e-300),
            ("repetition_penalty", -1.0),
            ("repetition_penalty", 10.5),
            ("repetition_penalty", INFINITY),
            ("seed", 2**63),
            ("seed", -(2**63) - 1),
            ("stop", ("",)),
            ("logprobs", -1),
            ("logprobs", MAX_LOGPROBS + 1),
        ],
    )
    def test_values_beyond_the_border_are_refused_by_name_and_value(
        self, param: str, value: object
    ) -> None:
        arguments: dict[str, Any] = {param: value}
        with pytest.raises(InvalidRequestError) as caught:
            SamplingParams(**arguments)
        assert caught.value.param == param
        assert repr(value) in str(caught.value)
        assert "give" in str(caught.value)

    @pytest.mark.parametrize(
        ("bias", "value"),
        [({-1: 1.0}, "-1"), ({3: 100.5}, "100.5"), ({3: NAN}, "nan"), ({3: -INFINITY}, "-inf")],
    )
    def test_a_wrong_bias_names_the_entry(self, bias: dict[int, float], value: str) -> None:
        with pytest.raises(InvalidRequestError, match=value) as caught:
            SamplingParams(logit_bias=bias)
        assert caught.value.param == "logit_bias"

    def test_too_many_biases_are_counted_rather_than_printed(self) -> None:
        bias = dict.fromkeys(range(MAX_LOGIT_BIAS + 1), 1.0)
        with pytest.raises(InvalidRequestError, match=f"{MAX_LOGIT_BIAS + 1} entries"):
            SamplingParams(logit_bias=bias)

    def test_too_many_stop_strings_are_refused(self) -> None:
        with pytest.raises(InvalidRequestError, match=f"at most {MAX_STOP_STRINGS}"):
            SamplingParams(stop=tuple("abcde"))

    def test_greedy_is_temperature_zero(self) -> None:
        assert SamplingParams(temperature=0.0).is_greedy
        assert not SamplingParams(temperature=1e-9).is_greedy

    def test_each_penalty_counts_as_one_but_bias_does_not(self) -> None:
        assert SamplingParams(presence_penalty=-0.1).has_penalties
        assert SamplingParams(frequency_penalty=0.1).has_penalties
        assert SamplingParams(repetition_penalty=0.9).has_penalties
        assert not SamplingParams(logit_bias={1: 5.0}).has_penalties

    def test_two_requests_never_share_a_default_bias(self) -> None:
        assert SamplingParams().logit_bias is not SamplingParams().logit_bias

    def test_is_immutable(self) -> None:
        params = SamplingParams()
        with pytest.raises(FrozenInstanceError):
            params.temperature = 0.5  # type: ignore[misc]  # exactly what must fail


class TestSpeculationParams:
    def test_defaults_are_those_of_the_medusa_paper(self) -> None:
        params = SpeculationParams()
        typical = TypicalParameters()
        assert (typical.epsilon, typical.delta) == (0.09, 0.3)
        assert (params.method, params.acceptance, params.max_nodes) == ("auto", "auto", None)

    @pytest.mark.parametrize(
        ("param", "value"),
        [
            ("max_nodes", 0),
            ("max_nodes", MAX_TREE_NODES + 1),
        ],
    )
    def test_wrong_values_are_refused_under_the_name_that_the_client_wrote(
        self, param: str, value: object
    ) -> None:
        arguments: dict[str, Any] = {param: value}
        with pytest.raises(InvalidRequestError) as caught:
            SpeculationParams(**arguments)
        assert caught.value.param == f"speculation.{param}"
        assert repr(value) in str(caught.value)

    def test_borders_are_taken(self) -> None:
        SpeculationParams(max_nodes=1)
        SpeculationParams(max_nodes=MAX_TREE_NODES)


class TestEngineConfig:
    def test_defaults_are_valid(self) -> None:
        assert EngineConfig().model == "smollm2"

    @pytest.mark.parametrize(
        "param",
        [
            "block_size",
            "num_blocks",
            "kv_cache_bytes",
            "max_num_seqs",
            "max_prefill_tokens",
            "max_model_len",
            "num_threads",
        ],
    )
    def test_sizes_are_positive(self, param: str) -> None:
        arguments: dict[str, Any] = {param: 0}
        with pytest.raises(ConfigError, match=f"{param} is 0; give at least 1"):
            EngineConfig(**arguments)

    @pytest.mark.parametrize("max_nodes", [0, MAX_TREE_NODES + 1])
    def test_the_largest_tree_is_bounded(self, max_nodes: int) -> None:
        with pytest.raises(ConfigError, match=f"max_nodes is {max_nodes}"):
            EngineConfig(max_nodes=max_nodes)

    @pytest.mark.parametrize("size", [0, 9])
    def test_a_fixed_tree_is_at_most_the_largest(self, size: int) -> None:
        with pytest.raises(ConfigError, match=rf"tree_size is {size}; .*max_nodes \(8\)"):
            EngineConfig(max_nodes=8, tree_size=size)
        assert EngineConfig(max_nodes=8, tree_size=8).tree_size == 8

    def test_nothing_is_measured_again_where_nothing_is_measured(self) -> None:
        with pytest.raises(ConfigError, match="remeasure is set, but tree_size 4 needs no"):
            EngineConfig(remeasure=True, tree_size=4)
        assert EngineConfig(remeasure=True).remeasure

    @pytest.mark.parametrize("name", ["device", "dtype", "quantization", "compile"])
    def test_unknown_words_are_refused_with_those_that_are_known(self, name: str) -> None:
        arguments: dict[str, Any] = {name: "yes"}
        with pytest.raises(ConfigError, match=f"{name} is 'yes'; give one of .*'"):
            EngineConfig(**arguments)

    def test_compiling_is_off_unless_it_is_asked_for(self) -> None:
        assert EngineConfig().compile == "off"

    def test_a_step_has_room_for_every_sequence_and_for_one_whole_tree(self) -> None:
        with pytest.raises(ConfigError, match="give at least 64"):
            EngineConfig(max_num_seqs=64, max_nodes=4, max_tokens_per_step=63)
        with pytest.raises(ConfigError, match="give at least 32"):
            EngineConfig(max_num_seqs=4, max_nodes=32, max_tokens_per_step=31)
        EngineConfig(max_num_seqs=4, max_nodes=32, max_tokens_per_step=32)
