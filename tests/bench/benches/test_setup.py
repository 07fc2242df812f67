from pathlib import Path
from typing import Literal

import pytest

from bench.benches.setup import PLAIN, BatchOptions, PromptOptions, prepare, with_room
from bench.workload.dialogues import SkippedTurn
from server.config import EngineConfig, SpeculationParams
from server.engine.engine import Engine
from server.errors import ConfigError
from training.errors import DataError


def test_a_step_has_room_for_full_trees_of_all_requests() -> None:
    config = with_room(EngineConfig(max_nodes=32), 8)
    room_for_trees = config.max_tokens_per_step * 3 // 4
    assert room_for_trees // 8 >= 32
    assert config.max_num_seqs == 8
    assert with_room(EngineConfig(max_nodes=32), 100).max_tokens_per_step >= 100 * 32
    assert with_room(EngineConfig(max_nodes=32), 1).max_tokens_per_step == 512


def test_trees_of_batched_benches_are_as_large_as_they_may_be() -> None:
    applied = BatchOptions(concurrency=2).applied(EngineConfig(max_nodes=16))
    assert (applied.tree_size, applied.max_num_seqs) == (16, 2)


@pytest.mark.parametrize("tree_size", ["auto", 8])
def test_a_tree_size_that_was_asked_for_comes_before_the_benchs_own(
    tree_size: Literal["auto"] | int,
) -> None:
    applied = BatchOptions(tree_size=tree_size).applied(EngineConfig(max_nodes=16))
    assert applied.tree_size == tree_size


def test_a_tree_size_is_at_most_the_largest_tree() -> None:
    with pytest.raises(ConfigError, match="tree_size is 32"):
        BatchOptions(tree_size=32).applied(EngineConfig(max_nodes=16))


def test_prompts_are_read_before_the_engine_is_loaded(tmp_path: Path) -> None:
    missing = PromptOptions(data=tmp_path / "none")
    with pytest.raises(DataError, match="cannot be read"):
        prepare(missing, EngineConfig(model="/nowhere"), SpeculationParams())


def test_requests_are_greedy_and_speculate_as_asked(engine: Engine) -> None:
    prompts = PromptOptions(limit=2, max_new_tokens=9)
    asked = SpeculationParams(method="lookup")
    setup = prepare(prompts, engine.config, asked, lambda config: engine)
    assert (setup.greedy.is_greedy, setup.greedy.max_tokens) == (True, 9)
    assert setup.speculation == SpeculationParams(
        method="lookup", max_nodes=engine.config.max_nodes
    )
    assert PLAIN.method == "none"
    assert len(setup.workload.conversations) == 2


def test_the_report_says_what_ran_on_which_data(engine: Engine) -> None:
    setup = prepare(PromptOptions(), engine.config, SpeculationParams(), lambda config: engine)
    outcome = setup.outcome("result", [SkippedTurn(1, 2, "too long")], {"seed": 3}, passed=False)
    assert (outcome.result, outcome.passed) == ("result", False)
    assert (outcome.device, outcome.dtype) == (engine.loaded.device, engine.loaded.dtype)
    extra = outcome.extra
    assert extra["skipped"] == [{"line": 1, "turn": 2, "reason": "too long"}]
    assert (extra["seed"], extra["data"], extra["num_prompts"]) == (3, "sample.jsonl", 24)
    assert (extra["max_nodes"], extra["tree_size"], extra["is_compiled"]) == (6, 6, False)
    assert (extra["model"], extra["heads"]) == (engine.model_name, engine.heads_name)
