import math
from dataclasses import replace

import pytest

from bench.benches.exactness import (
    Outputs,
    RequestMaker,
    make_pairs,
    pooled_acceptance,
    produce,
    summarise,
)
from bench.measure.judge import Judge
from bench.measure.reference import ReferenceModel
from bench.workload.conversations import load_workload
from bench.workload.dialogues import answer_turns
from bench.workload.tracing import Trace
from server.config import SamplingParams, SpeculationParams
from server.engine.engine import Engine
from tests.bench.traces import make_trace, make_turn

pytestmark = pytest.mark.slow

GREEDY = SamplingParams(max_tokens=24, temperature=0.0)
CONVERSATIONS = load_workload(None, limit=4).conversations


def requests_of(max_nodes: int) -> RequestMaker:
    return RequestMaker(GREEDY, SpeculationParams(), max_nodes)


REQUESTS = requests_of(6)


@pytest.fixture(scope="module")
def reference(engine: Engine) -> ReferenceModel:
    return ReferenceModel(engine.loaded)


@pytest.fixture(scope="module")
def outputs(engine: Engine, reference: ReferenceModel) -> Outputs:
    return produce(engine, reference, CONVERSATIONS, REQUESTS)[0]


def altered(trace: Trace, position: int) -> Trace:
    token_ids = list(trace.token_ids)
    token_ids[position] = (token_ids[position] + 1) % 300
    return replace(trace, token_ids=tuple(token_ids))


def test_neighbouring_turns_have_trees_of_different_sizes() -> None:
    requests = requests_of(32)
    turns = [make_turn((1,), line=line, index=index) for line in range(4) for index in range(2)]
    assert [requests.tree_size(turn) for turn in turns] == [32, 16, 16, 8, 8, 4, 4, 32]
    small = requests_of(2)
    assert {small.tree_size(turn) for turn in turns} == {2}
    plain = requests_of(1)
    assert {plain.tree_size(turn) for turn in turns} == {1}


def test_every_turn_has_its_own_seed_and_the_checks_their_own_parameters() -> None:
    requests = REQUESTS
    turns = [make_turn((1,), line=line, index=index) for line in range(3) for index in range(3)]
    assert len({requests.sampled_params(turn).seed for turn in turns}) == 9
    assert requests.sampled_params(turns[0]).temperature == 0.8
    assert requests.greedy_params.is_greedy
    assert requests.greedy_off(turns[0]).speculation.method == "none"
    assert requests.sampled_off(turns[0]).speculation.method == "none"
    assert requests.sampled_on(turns[0]).speculation.method == "auto"
    assert requests.sampled_on(turns[0]).sampling == requests.sampled_off(turns[0]).sampling


def test_all_five_ways_agree_on_a_tiny_model(outputs: Outputs, reference: ReferenceModel) -> None:
    result = summarise(make_pairs(outputs, REQUESTS), Judge(reference))
    num_turns = len(outputs.turns)
    assert num_turns >= 4
    assert (result.num_outputs, result.num_mismatches) == (3 * num_turns, 0)
    assert (result.num_unexplained, result.largest_gap, result.mismatches) == (0, None, ())
    assert {count.num_outputs for count in result.checks.values()} == {num_turns}
    assert result.num_tokens > 0


def test_samples_are_not_the_greedy_outputs(outputs: Outputs) -> None:
    pairs = zip(outputs.greedy_on, outputs.sampled_on, strict=True)
    assert all(greedy.token_ids != sampled.token_ids for greedy, sampled in pairs)


def test_a_wrong_token_is_found_and_not_explained(
    outputs: Outputs, reference: ReferenceModel
) -> None:
    wrong = replace(outputs, greedy_on=(altered(outputs.greedy_on[0], 5), *outputs.greedy_on[1:]))
    result = summarise(make_pairs(wrong, REQUESTS), Judge(reference))
    assert (result.num_mismatches, result.num_unexplained) == (2, 2)
    assert [mismatch.check for mismatch in result.mismatches] == [
        "greedy_vs_transformers",
        "greedy_on_vs_off",
    ]
    assert all(mismatch.position == 5 for mismatch in result.mismatches)
    assert result.checks["sampled_on_vs_off"].num_mismatches == 0


def test_a_wrong_sample_is_found_and_not_explained(
    outputs: Outputs, reference: ReferenceModel
) -> None:
    wrong = altered(outputs.sampled_off[1], 3)
    samples = (outputs.sampled_off[0], wrong, *outputs.sampled_off[2:])
    pairs = make_pairs(replace(outputs, sampled_off=samples), REQUESTS)
    result = summarise(pairs, Judge(reference))
    assert result.checks["sampled_on_vs_off"].num_unexplained == 1
    mismatch = result.mismatches[0]
    assert mismatch.gap is not None
    assert mismatch.margin is not None
    assert mismatch.gap > 0.0
    assert not math.isnan(mismatch.margin)


def test_the_traces_answer_the_turns(engine: Engine, outputs: Outputs) -> None:
    again = answer_turns(engine, CONVERSATIONS, REQUESTS.greedy_on, lambda: None)
    assert again.turns == outputs.turns
    assert [t.token_ids for t in again.traces] == [t.token_ids for t in outputs.greedy_on]


def test_acceptance_pools_all_steps() -> None:
    assert pooled_acceptance([make_trace("p", "abcdefg", (3, 3))]) == 3.0
    assert pooled_acceptance([]) == 0.0
