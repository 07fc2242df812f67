import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import euryale
from euryale import (
    LLM,
    ConfigError,
    HeadsMismatchError,
    InvalidRequestError,
    SamplingParams,
    SpeculationParams,
)
from server.config import EngineConfig
from server.core.request import Request
from server.engine.engine import Engine
from tests.support.tiny_heads import save_tiny_heads
from tests.support.tiny_models import save_tiny_model

pytestmark = pytest.mark.slow

OPTIONS: dict[str, Any] = {
    "device": "cpu",
    "dtype": "float32",
    "num_threads": 1,
    "num_blocks": 64,
    "tree_size": 8,
}
GREEDY = SamplingParams(max_tokens=24, temperature=0.0)
HELLO = [{"role": "user", "content": "hello there"}]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model("llama", tmp_path_factory.mktemp("tiny-model"))


@pytest.fixture(scope="module")
def heads_dir(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_heads(model_dir, tmp_path_factory.mktemp("tiny-heads"))


@pytest.fixture(scope="module")
def llm(model_dir: Path, heads_dir: Path) -> LLM:
    return LLM(str(model_dir), str(heads_dir), **OPTIONS)


@pytest.fixture(scope="module")
def plain(model_dir: Path) -> Engine:
    """An engine without drafts, which says what greedy texts have to be."""
    return Engine.from_config(EngineConfig(str(model_dir), "none", lookup=False, **OPTIONS))


def expected(plain: Engine, prompt: str | list[dict[str, str]]) -> str:
    tokenizer = plain.tokenizer
    if isinstance(prompt, str):
        token_ids = tokenizer.encode(prompt)
    else:
        token_ids = tokenizer.apply_chat_template(prompt)
    return plain.generate([Request("oracle", tuple(token_ids), GREEDY)])[0].text


def test_the_public_names_are_these() -> None:
    assert euryale.__all__ == [
        "LLM",
        "Completion",
        "ConfigError",
        "Conversation",
        "EuryaleError",
        "HeadsCheckpointError",
        "HeadsMismatchError",
        "InvalidRequestError",
        "ModelError",
        "RequestOutput",
        "RequestStats",
        "SamplingParams",
        "SpeculationParams",
        "TokenLogprob",
    ]
    assert all(hasattr(euryale, name) for name in euryale.__all__)


def test_a_prompt_is_continued(llm: LLM, plain: Engine) -> None:
    [completion] = llm.generate("hello there", GREEDY)
    assert completion.text == expected(plain, "hello there")
    assert completion.finish_reason == "length"
    assert completion.stats.method == "medusa+lookup"
    assert len(completion.token_ids) == 24


def test_prompts_are_answered_together_and_in_order(llm: LLM, plain: Engine) -> None:
    prompts = ["one", "two and some more", "three"]
    texts = [completion.text for completion in llm.generate(prompts, GREEDY)]
    assert texts == [expected(plain, prompt) for prompt in prompts]
    assert llm.generate([], GREEDY) == []


def test_conversations_are_answered(llm: LLM, plain: Engine) -> None:
    [completion] = llm.chat(HELLO, GREEDY)
    assert completion.text == expected(plain, HELLO)
    other = [{"role": "user", "content": "bye"}]
    texts = [completion.text for completion in llm.chat([other, HELLO], GREEDY)]
    assert texts == [expected(plain, other), completion.text]


@pytest.mark.parametrize("prompt", ["hello there", HELLO])
def test_a_stream_has_the_text_piece_by_piece(llm: LLM, plain: Engine, prompt: Any) -> None:
    outputs = [*llm.stream(prompt, GREEDY)]
    assert len(outputs) > 1
    assert "".join(output.text for output in outputs) == expected(plain, prompt)
    assert outputs[-1].finish_reason == "length"
    assert outputs[-1].stats is not None
    assert outputs[-1].stats.num_output_tokens == 24


def test_streams_and_calls_may_overlap(llm: LLM, plain: Engine) -> None:
    first, second = llm.stream("one", GREEDY), llm.stream("two", GREEDY)
    texts = [next(first).text, next(second).text]
    assert llm.generate("three", GREEDY)[0].text == expected(plain, "three")
    texts[1] += "".join(output.text for output in second)
    texts[0] += "".join(output.text for output in first)
    assert texts == [expected(plain, "one"), expected(plain, "two")]


def test_a_closed_stream_ends_its_request(llm: LLM) -> None:
    stream = llm.stream("hello", SamplingParams(max_tokens=200))
    next(stream)
    assert llm._engine.has_unfinished
    stream.close()  # type: ignore[attr-defined]
    assert not llm._engine.has_unfinished


def test_speculation_can_be_chosen(llm: LLM) -> None:
    [completion] = llm.generate("hello", GREEDY, SpeculationParams(method="none"))
    assert completion.stats.method == "none"


def test_one_wrong_prompt_answers_none(llm: LLM) -> None:
    with pytest.raises(InvalidRequestError, match="token"):
        llm.generate(["hello", "word " * 2000], GREEDY)
    assert not llm._engine.has_unfinished
    with pytest.raises(InvalidRequestError, match="unknown role nobody"):
        llm.chat([{"role": "nobody", "content": "hi"}], GREEDY)
    with pytest.raises(InvalidRequestError, match="token"):
        next(llm.stream("word " * 2000, GREEDY))


def test_wrong_options_are_errors(model_dir: Path, heads_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="max_nodes is 0"):
        LLM(str(model_dir), max_nodes=0)
    with pytest.raises(TypeError, match="max_noodles"):
        LLM(str(model_dir), max_noodles=1)
    other = save_tiny_model("llama", tmp_path, seed=1)
    with pytest.raises(HeadsMismatchError):
        LLM(str(other), str(heads_dir), **OPTIONS)


@pytest.mark.slow
def test_logging_is_left_to_the_program(model_dir: Path) -> None:
    code = (
        "import logging\nfrom euryale import LLM\n"
        f"LLM({str(model_dir)!r}, 'none', num_blocks=64)\n"
        "assert not logging.getLogger().handlers and not logging.getLogger('euryale').handlers"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
