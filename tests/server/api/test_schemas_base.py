from collections.abc import Mapping
from typing import Any, ClassVar

import pytest
from pydantic import Field, ValidationError

from server.api.schemas.base import (
    Problem,
    RequestBody,
    UnicodeText,
    describe_validation_error,
    invalid_value,
    unsupported_option,
    unsupported_value,
)


class Inner(RequestBody):
    unsupported: ClassVar[Mapping[str, tuple[object, ...]]] = {"tool_calls": ([],)}

    text: UnicodeText


class Body(RequestBody):
    unsupported: ClassVar[Mapping[str, tuple[object, ...]]] = {
        "echo": (False,),
        "format": ({"type": "text"},),
        "suffix": (),
    }
    harmless: ClassVar[frozenset[str]] = frozenset({"user"})

    size: int = 1
    ratio: float = 0.5
    items: list[Inner] = Field(default_factory=list)


def problem(data: object) -> Problem:
    with pytest.raises(ValidationError) as caught:
        Body.model_validate(data)
    error: dict[str, Any] = dict(caught.value.errors()[0])
    # FastAPI puts the place of the body before the place in the body.
    return describe_validation_error({**error, "loc": ("body", *error["loc"])})


def test_an_unsupported_option_is_named_with_its_value() -> None:
    found = problem({"echo": True})
    assert found == Problem(
        "echo is not supported (given: True); leave it out", "echo", "unsupported_option"
    )


@pytest.mark.parametrize("value", [False, None])
def test_an_unsupported_option_that_changes_nothing_is_accepted(value: object) -> None:
    assert Body.model_validate({"echo": value, "suffix": None}) == Body()


def test_a_trivial_object_is_accepted_and_another_one_refused() -> None:
    assert Body.model_validate({"format": {"type": "text"}}) == Body()
    assert problem({"format": {"type": "json_object"}}).param == "format"


def test_a_harmless_field_is_dropped() -> None:
    assert Body.model_validate({"user": "u1"}) == Body()


def test_an_unknown_field_is_named() -> None:
    assert problem({"tempratur": 1}) == Problem(
        "unknown field 'tempratur'; leave it out", "tempratur", "unknown_parameter"
    )


def test_an_unknown_field_is_refused_even_if_it_is_null() -> None:
    assert problem({"tempratur": None}).param == "tempratur"


def test_null_counts_as_left_out() -> None:
    assert Body.model_validate({"size": None, "ratio": None}) == Body()


def test_null_for_a_required_field_is_a_missing_field() -> None:
    found = problem({"items": [{"text": None}]})
    assert found == Problem(
        "items[0].text is missing; give it", "items[0].text", "missing_required_parameter"
    )


def test_an_unsupported_option_inside_a_list_has_its_whole_path() -> None:
    found = problem({"items": [{"text": "a"}, {"text": "b", "tool_calls": [1]}]})
    assert found.param == "items[1].tool_calls"
    assert found.code == "unsupported_option"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"size": "4"}, "size is '4'; input should be a valid integer"),
        ({"size": True}, "size is True; input should be a valid integer"),
        ({"size": 4.0}, "size is 4.0; input should be a valid integer"),
        ({"ratio": "0.1"}, "ratio is '0.1'; input should be a valid number"),
        ({"items": {}}, "items is {}; input should be a valid list"),
    ],
)
def test_types_are_not_coerced(data: object, message: str) -> None:
    assert problem(data).message == message


def test_an_integer_is_a_number() -> None:
    assert Body.model_validate({"ratio": 1}).ratio == 1.0


@pytest.mark.parametrize("data", [[], "text", 3])
def test_a_body_that_is_no_object_is_told_what_to_send(data: object) -> None:
    found = problem(data)
    assert "not a JSON object" in found.message
    assert "Content-Type" in found.message


@pytest.mark.parametrize("kind", ["missing", "model_attributes_type"])
def test_no_body_at_all_is_invalid_json(kind: str) -> None:
    found = describe_validation_error({"type": kind, "loc": ("body",), "msg": "m", "input": None})
    assert (found.param, found.code) == (None, "invalid_json")
    assert "not a JSON object" in found.message


def test_long_values_are_cut_in_messages() -> None:
    assert len(problem({"size": "x" * 10_000}).message) < 200


def test_lone_surrogates_in_values_and_names_are_described() -> None:
    assert "lone surrogate" in problem({"items": [{"text": "a\ud800"}]}).message
    assert "\\ud800" in problem({"\ud800": 1}).message


def test_builders_keep_their_texts() -> None:
    assert unsupported_value("no images").message() == "no images"
    assert invalid_value("give {1}").message() == "give {1}"
    assert unsupported_option("echo", 1).context == {"option": "echo", "value": 1}
