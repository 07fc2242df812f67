"""OpenAI's predicted outputs, through the official client."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import OpenAI

from server.config import EngineConfig
from server.engine.engine import Engine
from tests.support.serving import RunningServer, chat, complete, running_server

pytestmark = pytest.mark.slow

NUM_TOKENS = 60
# Characters that the tiny tokenizer never joins, so that an answer's tokens are those of its text.
LETTERS = "BCDFGHJKLMNOPQRSUVXYZ0123456789"


def only_letters(server: RunningServer) -> dict[str, int]:
    """A bias under which the random model writes text that can be given back as a prediction."""
    tokenizer = server.engine.engine.tokenizer
    ids = [tokenizer.encode(letter, add_special_tokens=False) for letter in LETTERS]
    return {str(token_id): 100 for [token_id] in ids}


def content(text: object) -> dict[str, object]:
    return {"type": "content", "content": text}


def accepted_and_rejected(answer: Any) -> tuple[int, int]:
    details = answer.usage.completion_tokens_details
    return details.accepted_prediction_tokens, details.rejected_prediction_tokens


def acceptance_length(answer: Any) -> float:
    return float(answer.usage.model_extra["speculation"]["mean_acceptance_length"])


@pytest.fixture(scope="module")
def lookup_server(model_dir: Path) -> Iterator[RunningServer]:
    """Prompt lookup alone, trees of a fixed size: nothing hangs on time."""
    config = EngineConfig(
        model=str(model_dir),
        heads="none",
        device="cpu",
        dtype="float32",
        num_blocks=1024,
        max_nodes=16,
        tree_size=16,
        num_threads=1,
    )
    with running_server(Engine.from_config(config)) as running:
        yield running


def options(server: RunningServer, **more: object) -> dict[str, object]:
    return {
        "model": server.model,
        "messages": [{"role": "user", "content": "Hello, who are you?"}],
        "max_completion_tokens": NUM_TOKENS,
        "temperature": 0,
        "logit_bias": only_letters(server),
        "frequency_penalty": 2,
        "extra_body": {"ignore_eos": True},
        **more,
    }


@pytest.fixture
def lookup_client(lookup_server: RunningServer) -> Iterator[OpenAI]:
    with lookup_server.openai() as client:
        yield client


def test_a_predicted_answer_takes_far_fewer_steps(
    lookup_client: OpenAI, lookup_server: RunningServer
) -> None:
    asked = options(lookup_server)
    plain = chat(lookup_client, **asked)
    text = plain.choices[0].message.content
    assert accepted_and_rejected(plain) == (0, 0)
    predicted = chat(lookup_client, **asked, prediction=content(text))
    assert predicted.choices[0].message.content == text
    accepted, rejected = accepted_and_rejected(predicted)
    # All tokens of a step but the last are drafted; the first token of all is not.
    assert 50 <= accepted < NUM_TOKENS
    assert rejected <= NUM_TOKENS - accepted
    assert acceptance_length(predicted) > 8.0
    assert acceptance_length(predicted) > 3.0 * acceptance_length(plain)


def test_an_edited_text_is_found_again_behind_the_edit(
    lookup_client: OpenAI, lookup_server: RunningServer
) -> None:
    asked = options(lookup_server)
    plain = chat(lookup_client, **asked)
    text = plain.choices[0].message.content
    edited = f"{text[:20]}the edit{text[22:]}"
    parts = [{"type": "text", "text": edited[:30]}, {"type": "text", "text": edited[30:]}]
    predicted = chat(lookup_client, **asked, prediction=content(parts))
    assert predicted.choices[0].message.content == text
    accepted, rejected = accepted_and_rejected(predicted)
    assert accepted > 30
    assert rejected > 0
    assert acceptance_length(predicted) > 2.0 * acceptance_length(plain)


def test_a_stream_reports_them_with_the_usage(
    lookup_client: OpenAI, lookup_server: RunningServer
) -> None:
    asked = options(lookup_server)
    prediction = content(chat(lookup_client, **asked).choices[0].message.content)
    whole = chat(lookup_client, **asked, prediction=prediction)
    *_, last = chat(
        lookup_client,
        **asked,
        prediction=prediction,
        stream=True,
        stream_options={"include_usage": True},
    )
    assert accepted_and_rejected(last) == accepted_and_rejected(whole)


def test_completions_take_predictions_too(
    lookup_client: OpenAI, lookup_server: RunningServer
) -> None:
    asked: dict[str, Any] = {
        "model": lookup_server.model,
        "prompt": "Hello",
        "max_tokens": NUM_TOKENS,
        "temperature": 0,
        "logit_bias": only_letters(lookup_server),
        "n": 2,
    }
    text = complete(lookup_client, **asked).choices[0].text
    answer = complete(lookup_client, **asked, extra_body={"prediction": content(text)})
    assert [choice.text for choice in answer.choices] == [text] * 2
    assert accepted_and_rejected(answer)[0] > 0


def test_a_sampled_answer_with_a_seed_does_not_depend_on_its_prediction(
    lookup_client: OpenAI, lookup_server: RunningServer
) -> None:
    asked = options(lookup_server, temperature=1, seed=5)
    text = chat(lookup_client, **asked).choices[0].message.content
    predicted = chat(lookup_client, **asked, prediction=content(text))
    assert predicted.choices[0].message.content == text
    assert accepted_and_rejected(predicted)[0] > 40


@pytest.mark.parametrize("speculation", [{"method": "none"}, {"max_nodes": 1}])
def test_a_request_that_forbids_drafts_may_not_predict(
    lookup_client: OpenAI, lookup_server: RunningServer, speculation: dict[str, object]
) -> None:
    asked = options(lookup_server, extra_body={"speculation": speculation})
    with pytest.raises(openai.BadRequestError) as caught:
        chat(lookup_client, **asked, prediction=content("B"))
    assert caught.value.param == "prediction"


def test_a_prediction_longer_than_the_context_is_refused(
    lookup_client: OpenAI, lookup_server: RunningServer
) -> None:
    limit = lookup_server.engine.engine.max_model_len
    with pytest.raises(openai.BadRequestError, match="shorten the prediction") as caught:
        chat(lookup_client, **options(lookup_server), prediction=content("B" * (limit + 1)))
    assert caught.value.code == "context_length_exceeded"


def test_a_server_without_lookup_refuses_predictions(client: OpenAI, server: RunningServer) -> None:
    with pytest.raises(openai.BadRequestError, match=r"prompt lookup, .* is off") as caught:
        chat(client, **options(server), prediction=content("B"))
    assert caught.value.param == "prediction"
