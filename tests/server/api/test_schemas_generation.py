import math

import pytest
from pydantic import ValidationError

from server.api.schemas.base import describe_validation_error
from server.api.schemas.completions import CompletionRequest
from server.api.schemas.generation import GenerationRequest, SpeculationOptions
from server.config import SamplingParams, SpeculationParams
from server.errors import InvalidRequestError


def body(**fields: object) -> GenerationRequest:
    return CompletionRequest.model_validate({"model": "m", "prompt": "a", **fields})


def test_defaults_are_those_of_openai() -> None:
    sampling = body().sampling(max_tokens=16, seed=None)
    assert sampling == SamplingParams(max_tokens=16, temperature=1.0, top_p=1.0)
    assert body().n == 1
    assert not body().stream


def test_every_sampling_option_arrives() -> None:
    sampling = body(
        temperature=0.5,
        top_p=0.9,
        top_k=7,
        min_p=0.1,
        presence_penalty=0.2,
        frequency_penalty=-0.3,
        repetition_penalty=1.1,
        logit_bias={"5": -100, "7": 1.5},
        stop=["a", "b"],
        ignore_eos=True,
        logprobs=3,
    ).sampling(max_tokens=9, seed=11)
    assert sampling == SamplingParams(
        max_tokens=9,
        temperature=0.5,
        top_p=0.9,
        top_k=7,
        min_p=0.1,
        presence_penalty=0.2,
        frequency_penalty=-0.3,
        repetition_penalty=1.1,
        logit_bias={5: -100.0, 7: 1.5},
        seed=11,
        stop=("a", "b"),
        logprobs=3,
        ignore_eos=True,
    )


@pytest.mark.parametrize(
    "content", ["one two", [{"type": "text", "text": "one"}, {"type": "text", "text": " two"}]]
)
def test_a_prediction_is_one_text(content: object) -> None:
    found = body(prediction={"type": "content", "content": content}).prediction
    assert found is not None
    assert found.content == "one two"
    assert body(prediction=None).prediction is None


@pytest.mark.parametrize(
    ("prediction", "place"),
    [
        ({"type": "content"}, ("prediction", "content")),
        ({"type": "content", "content": 3}, ("prediction", "content")),
        ({"type": "content", "content": "\ud83d"}, ("prediction", "content")),
        ({"type": "content", "content": [{"type": "image_url"}]}, ("prediction", "content")),
        ({"type": "diff", "content": "a"}, ("prediction", "type")),
        ({"type": "content", "content": "a", "more": 1}, ("prediction", "more")),
        ("text", ("prediction",)),
    ],
)
def test_a_prediction_of_another_form_is_refused(
    prediction: object, place: tuple[str, ...]
) -> None:
    with pytest.raises(ValidationError) as caught:
        body(prediction=prediction)
    assert caught.value.errors()[0]["loc"] == place


def test_one_stop_string_is_a_list_of_one() -> None:
    assert body(stop="end").stop == ["end"]


@pytest.mark.parametrize("stop", [3, [3], ["a", None], {"a": 1}])
def test_a_stop_of_another_form_is_refused(stop: object) -> None:
    with pytest.raises(ValidationError, match="give a string or a list of strings"):
        body(stop=stop)


@pytest.mark.parametrize("key", ["x", "-1", "1.0", " 5", "", "²", "9" * 30])
def test_a_logit_bias_key_that_is_no_token_id_is_refused(key: str) -> None:
    with pytest.raises(InvalidRequestError, match="give token ids") as caught:
        body(logit_bias={key: 1}).sampling(16, None)
    assert caught.value.param == "logit_bias"


@pytest.mark.parametrize("name", ["temperature", "top_p", "min_p", "presence_penalty"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e9, -7.0])
def test_numbers_out_of_range_are_refused(name: str, value: float) -> None:
    with pytest.raises(InvalidRequestError, match=name) as caught:
        body(**{name: value}).sampling(16, None)
    assert caught.value.param == name


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_the_token_limit_has_two_names(name: str) -> None:
    assert body(**{name: 5}).token_limit == 5
    assert body().token_limit is None
    with pytest.raises(ValidationError, match="greater than or equal to 1"):
        body(**{name: 0})


def test_both_names_of_the_token_limit_at_once_are_refused() -> None:
    with pytest.raises(InvalidRequestError, match="only one of them"):
        _ = body(max_tokens=5, max_completion_tokens=5).token_limit


@pytest.mark.parametrize("n", [0, -1, 129, True, "2"])
def test_n_out_of_range_is_refused(n: object) -> None:
    with pytest.raises(ValidationError):
        body(n=n)


def test_speculation_is_checked_and_passed_on() -> None:
    asked = {
        "method": "medusa",
        "acceptance": "typical",
        "epsilon": 0.1,
        "delta": 0.2,
        "max_nodes": 8,
    }
    assert body(speculation=asked).speculation.params() == SpeculationParams(
        method="medusa",
        acceptance="typical",
        max_nodes=8,
        acceptance_options={"epsilon": 0.1, "delta": 0.2},
    )
    assert body().speculation.params() == SpeculationParams()


def test_a_wrong_speculation_value_is_named_with_its_path() -> None:
    with pytest.raises(InvalidRequestError, match=r"speculation\.max_nodes is 99") as caught:
        SpeculationOptions(max_nodes=99).params()
    assert caught.value.param == "speculation.max_nodes"
    with pytest.raises(ValidationError) as refused:
        body(speculation={"epsilon": "much"})
    (error,) = refused.value.errors()
    problem = describe_validation_error({**error, "loc": ("body", *error["loc"])})
    assert problem.param == "speculation.epsilon"
    with pytest.raises(ValidationError) as refused:
        body(speculation={"acceptance_options": {"epsilon": 0.1}})
    (error,) = refused.value.errors()
    problem = describe_validation_error({**error, "loc": ("body", *error["loc"])})
    assert problem.code == "unsupported_option"
    with pytest.raises(ValidationError, match="Extra inputs"):
        body(speculation={"metod": "none"})


HARMLESS = {
    "user": "u",
    "metadata": {"a": "b"},
    "safety_identifier": "s",
    "prompt_cache_key": "k",
    "service_tier": "auto",
    "store": False,
    "stream_options": {"include_usage": True, "include_obfuscation": False},
    "response_format": {"type": "text"},
}


@pytest.mark.parametrize("name", HARMLESS)
def test_fields_that_openai_clients_send_anyway_are_accepted(name: str) -> None:
    body(stream=True, **{name: HARMLESS[name]})


UNSUPPORTED = {
    "store": True,
    "service_tier": "flex",
    "response_format": {"type": "json_object"},
    "guided_json": {},
    "guided_regex": "a*",
    "stop_token_ids": [1],
    "min_tokens": 3,
    "use_beam_search": True,
    "prompt_logprobs": 1,
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_unsupported_options_are_refused_by_name(name: str) -> None:
    with pytest.raises(ValidationError) as caught:
        body(**{name: UNSUPPORTED[name]})
    assert caught.value.errors()[0]["ctx"]["option"] == name


def test_an_unknown_stream_option_is_refused() -> None:
    with pytest.raises(ValidationError, match="Extra inputs"):
        body(stream=True, stream_options={"include_usge": True})


@pytest.mark.parametrize("fields", [{}, {"stream": False}, {"stream": None}])
def test_stream_options_need_a_stream(fields: dict[str, object]) -> None:
    for options in ({}, {"include_usage": False}, {"include_usage": True}):
        with pytest.raises(ValidationError, match="only with stream: true") as caught:
            body(stream_options=options, **fields)
        assert [error["loc"] for error in caught.value.errors()] == [("stream_options",)]
    body(stream_options=None, **fields)


def test_a_stream_of_the_wrong_type_is_the_only_error_beside_stream_options() -> None:
    with pytest.raises(ValidationError) as caught:
        body(stream="yes", stream_options={})
    assert [error["loc"] for error in caught.value.errors()] == [("stream",)]


def test_all_sampling_params_can_be_set_over_http() -> None:
    taken_from_elsewhere = {"max_tokens", "logprobs", "processor_options"}
    declared = set(GenerationRequest.model_fields) | taken_from_elsewhere
    assert set(SamplingParams.__dataclass_fields__) <= declared
    assert set(SpeculationParams.__dataclass_fields__) == set(SpeculationOptions.model_fields)


def test_a_stop_string_with_a_lone_surrogate_is_refused() -> None:
    with pytest.raises(ValidationError, match="lone surrogate"):
        body(stop="\udfff")
