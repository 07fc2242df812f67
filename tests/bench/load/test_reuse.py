from pathlib import Path
from typing import Any

import pytest

from bench.load.reuse import PromptTime, Reuse, measure_reuse
from bench.workload.conversations import UNCATEGORISED, Conversation
from server.config import EngineConfig, SamplingParams, SpeculationParams
from server.engine.engine import Engine

GREEDY = SamplingParams(max_tokens=8, temperature=0.0)


def test_times_to_the_first_token_are_compared_per_token_of_the_prompt() -> None:
    reuse = Reuse(PromptTime(2000, 0, 4000.0), PromptTime(2500, 2400, 500.0))
    assert reuse.first.ms_per_token == pytest.approx(2.0)
    assert reuse.second.ms_per_token == pytest.approx(0.2)
    assert reuse.ratio == pytest.approx(0.1)


@pytest.mark.parametrize("method", ["auto", "none"])
def test_a_second_turn_takes_the_first_from_the_cache(
    method: Any, model_dir: Path, heads_dir: Path
) -> None:
    config = EngineConfig(
        model=str(model_dir), heads=str(heads_dir), device="cpu", num_blocks=64, tree_size=6
    )
    engine = Engine.from_config(config)
    turns = ("The euryale is a jellyfish. " * 8, "Say the same in one sentence.")
    conversation = Conversation(1, UNCATEGORISED, turns)
    reuse = measure_reuse(engine, conversation, GREEDY, SpeculationParams(method=method))
    num_prompt = reuse.first.num_prompt_tokens
    assert reuse.first.num_cached_tokens == 0
    # Whole blocks of 16; the answer's first token may join the prompt's last one.
    assert reuse.second.num_cached_tokens >= num_prompt - 32
    assert reuse.second.num_prompt_tokens > num_prompt
    assert reuse.first.ttft_ms > 0.0
    assert reuse.second.ttft_ms > 0.0
    assert not engine.has_unfinished
    again = measure_reuse(engine, conversation, GREEDY, SpeculationParams(method=method))
    assert again.first.num_cached_tokens > 0
