import json
from typing import Any

import pytest
from pydantic import ValidationError

from server.api.schemas.chat import ChatDelta, ChatMessage, ChatRequest
from server.errors import InvalidRequestError

USER = {"role": "user", "content": "hi"}


def body(**fields: object) -> ChatRequest:
    return ChatRequest.model_validate({"model": "m", "messages": [USER], **fields})


def first_error(**fields: object) -> Any:
    with pytest.raises(ValidationError) as caught:
        body(**fields)
    return caught.value.errors()[0]


def test_text_parts_are_joined_as_they_stand() -> None:
    parts = [{"type": "text", "text": "a "}, {"type": "text", "text": "b"}]
    assert ChatMessage.model_validate({"role": "user", "content": parts}).content == "a b"


@pytest.mark.parametrize("kind", ["image_url", "input_audio", "file", "refusal"])
def test_parts_of_other_types_are_refused_by_name(kind: str) -> None:
    error = first_error(messages=[{"role": "user", "content": [{"type": kind, kind: {}}]}])
    assert error["type"] == "unsupported_value"
    assert kind in error["msg"]
    assert error["loc"] == ("messages", 0, "content")


@pytest.mark.parametrize(
    "content", [[{"type": "text"}], ["a"], [{"type": "text", "text": 1}], [{"text": "a"}], 5, {}]
)
def test_malformed_content_is_refused(content: object) -> None:
    assert first_error(messages=[{"role": "user", "content": content}])["loc"] == (
        "messages",
        0,
        "content",
    )


def test_a_text_part_with_unknown_fields_is_refused() -> None:
    part = {"type": "text", "text": "a", "cache_control": {}}
    assert "give a string" in first_error(messages=[{"role": "user", "content": [part]}])["msg"]


@pytest.mark.parametrize("role", ["tool", "function"])
def test_roles_of_tools_are_refused_as_unsupported(role: str) -> None:
    error = first_error(messages=[{"role": role, "content": "x"}])
    assert error["type"] == "unsupported_value"
    assert "tools are not supported" in error["msg"]


def test_an_unknown_role_is_refused() -> None:
    assert first_error(messages=[{"role": "wizard", "content": "x"}])["type"] == "literal_error"


def test_no_messages_are_refused() -> None:
    assert first_error(messages=[])["loc"] == ("messages",)


def test_an_answer_of_openai_can_be_sent_back_as_it_came() -> None:
    answer: dict[str, object] = {
        "role": "assistant",
        "content": "yes",
        "refusal": None,
        "annotations": [],
        "audio": None,
        "function_call": None,
        "tool_calls": None,
    }
    assert body(messages=[USER, answer, USER]).messages[1].content == "yes"


def test_an_answer_that_called_a_tool_is_refused() -> None:
    answer = {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}
    error = first_error(messages=[USER, answer])
    assert error["loc"] == ("messages", 1)
    assert error["ctx"]["option"] == "tool_calls"


def test_the_template_gets_role_content_and_name() -> None:
    named = ChatMessage(role="user", content="a", name="bob")
    assert named.for_template() == {"role": "user", "content": "a", "name": "bob"}
    developer = ChatMessage(role="developer", content="a")
    assert developer.for_template() == {"role": "system", "content": "a"}


@pytest.mark.parametrize(
    ("fields", "number"),
    [
        ({}, None),
        ({"logprobs": False}, None),
        ({"logprobs": True}, 0),
        ({"logprobs": True, "top_logprobs": 4}, 4),
    ],
)
def test_logprobs_and_top_logprobs_make_one_number(
    fields: dict[str, object], number: int | None
) -> None:
    assert body(**fields).num_logprobs == number


def test_top_logprobs_need_logprobs() -> None:
    with pytest.raises(InvalidRequestError, match="give logprobs: true") as caught:
        _ = body(top_logprobs=2).num_logprobs
    assert caught.value.param == "top_logprobs"


@pytest.mark.parametrize("value", [-1, 21, 2.0])
def test_top_logprobs_out_of_range_are_refused(value: object) -> None:
    assert first_error(logprobs=True, top_logprobs=value)["loc"] == ("top_logprobs",)


UNSUPPORTED = {
    "tools": [{"type": "function"}],
    "tool_choice": "auto",
    "functions": [{}],
    "function_call": "auto",
    "response_format": {"type": "json_schema"},
    "audio": {"voice": "x"},
    "modalities": ["text", "audio"],
    "guided_choice": ["a"],
    "web_search_options": {},
    "reasoning_effort": "low",
    "verbosity": "low",
    "echo": True,
    "store": True,
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_unsupported_options_are_refused_by_name(name: str) -> None:
    assert first_error(**{name: UNSUPPORTED[name]})["ctx"]["option"] == name


TRIVIAL = {
    "tools": [],
    "tool_choice": "none",
    "parallel_tool_calls": True,
    "response_format": {"type": "text"},
    "modalities": ["text"],
    "reasoning_effort": None,
    "audio": None,
}


@pytest.mark.parametrize("name", TRIVIAL)
def test_options_that_ask_for_nothing_are_accepted(name: str) -> None:
    body(**{name: TRIVIAL[name]})


def test_a_delta_leaves_out_what_it_does_not_add() -> None:
    assert json.loads(ChatDelta().model_dump_json()) == {}
    assert json.loads(ChatDelta(content="").model_dump_json()) == {"content": ""}


def test_content_with_a_lone_surrogate_is_refused() -> None:
    assert "lone surrogate" in first_error(messages=[{"role": "user", "content": "\ud83d"}])["msg"]
