import pytest
from pydantic import ValidationError

from server.api.schemas.completions import CompletionRequest


def body(**fields: object) -> CompletionRequest:
    return CompletionRequest.model_validate({"model": "m", "prompt": "p", **fields})


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("a", ["a"]),
        ("", [""]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [[1, 2]]),
        ([[1, 2], [3]], [[1, 2], [3]]),
    ],
)
def test_a_prompt_has_one_of_four_forms(prompt: object, prompts: object) -> None:
    assert body(prompt=prompt).prompt == prompts


@pytest.mark.parametrize(
    "prompt", [[], [[]], [[1], []], ["a", 1], [[1], "a"], [True], [1.0], {"a": 1}, 5, [None]]
)
def test_a_prompt_of_another_form_is_refused_in_one_message(prompt: object) -> None:
    with pytest.raises(ValidationError, match="give a string, a list of strings") as caught:
        body(prompt=prompt)
    assert [error["loc"] for error in caught.value.errors()] == [("prompt",)]


def test_the_prompt_is_required() -> None:
    with pytest.raises(ValidationError, match="Field required"):
        CompletionRequest.model_validate({"model": "m"})


@pytest.mark.parametrize(("best_of", "n"), [(1, 1), (3, 3), (None, 2)])
def test_a_best_of_that_selects_nothing_is_accepted(best_of: int | None, n: int) -> None:
    assert body(best_of=best_of, n=n).n == n


@pytest.mark.parametrize(("best_of", "n"), [(2, 1), (1, 2)])
def test_a_best_of_that_selects_is_refused(best_of: int, n: int) -> None:
    with pytest.raises(ValidationError) as caught:
        body(best_of=best_of, n=n)
    assert caught.value.errors()[0]["ctx"]["option"] == "best_of"


@pytest.mark.parametrize("name", ["echo", "suffix"])
def test_echo_and_suffix_are_refused_unless_they_ask_for_nothing(name: str) -> None:
    nothing, something = {"echo": (False, True), "suffix": ("", "end")}[name]
    body(**{name: nothing})
    with pytest.raises(ValidationError) as caught:
        body(**{name: something})
    assert caught.value.errors()[0]["ctx"]["option"] == name


def test_a_prompt_with_a_lone_surrogate_is_refused() -> None:
    with pytest.raises(ValidationError, match="lone surrogate"):
        body(prompt="a\ud800")
