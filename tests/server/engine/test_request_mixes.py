"""200 random request mixes: every output equals that of a slow oracle that never saw the engine.

The oracle runs plain transformers over the whole text for every token of one request at a time and
samples in plain Python. The engine gets the requests at different steps, in batches, with tiny
caches that force preemption, shared beginnings, drafts of any quality, and aborts in between.

A difference is let pass only where the oracle proves a tie: the lead of the argmax, the distance
of the uniform number to a border of the cumulative distribution, or that of a filter to its limit
is below 1e-4.
"""

from collections import Counter
from dataclasses import dataclass, replace
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.config import SamplingParams, SpeculationParams
from server.core.completion import Completion, join_outputs
from server.core.request import Request, RequestOutput
from server.engine.engine import Engine
from server.tokenizer import Tokenizer
from tests.support.engine_tools import (
    SlowCompletion,
    SlowModel,
    assert_as_expected,
    assert_same_tokens,
    byte_tokenizer,
    known_continuation,
    make_engine,
    random_prompt,
)

pytestmark = pytest.mark.slow

NUM_MIXES = 200
MAX_STEPS = 2000
ORACLE = SlowModel()
# Beginnings that requests share, so that prefix reuse has something to find.
BEGINNINGS = tuple(random_prompt(seed, 12) for seed in (71, 72))


@dataclass(frozen=True)
class Arrival:
    """A request, the step at which it comes, and the step at which its client leaves, if any."""

    request: Request
    at_step: int
    abort_after: int | None


@dataclass(frozen=True)
class Mix:
    """A whole scenario."""

    arrivals: list[Arrival]
    num_blocks: int
    block_size: int
    max_num_seqs: int
    extra_budget: int
    max_prefill_tokens: int | None
    max_nodes: int
    prefix_caching: bool
    right_share: float | None
    seed: int


def random_sampling(rng: Random) -> SamplingParams:
    text_of = byte_tokenizer().decode
    stops: list[tuple[str, ...]] = [(), (), (), ("e",), (text_of([300]), "th"), ("t ", "\n")]
    biases: list[dict[int, float]] = [{}, {}, {}, {2: 12.0}, {5: 6.0, 6: -9.0}]
    return SamplingParams(
        max_tokens=rng.choice([1, 5, 12, 20]),
        temperature=rng.choice([0.0, 0.0, 0.5, 1.0, 2.0]),
        top_p=rng.choice([1.0, 0.9]),
        top_k=rng.choice([0, 0, 20]),
        min_p=rng.choice([0.0, 0.0, 0.02]),
        presence_penalty=rng.choice([0.0, 0.0, 1.5]),
        frequency_penalty=rng.choice([0.0, 0.0, 0.7]),
        repetition_penalty=rng.choice([1.0, 1.0, 1.3]),
        logit_bias=rng.choice(biases),
        seed=rng.randint(0, 50),
        stop=rng.choice(stops),
        ignore_eos=rng.random() < 0.5,
    )


def random_arrival(rng: Random, index: int) -> Arrival:
    beginning = rng.choice([(), *BEGINNINGS])
    tail = random_prompt(rng.randint(0, 5), rng.randint(1, 6))
    prompt = beginning[: rng.choice([5, 12, 12])] + tail
    methods: list[str] = ["auto", "auto", "medusa", "none"]
    speculation = SpeculationParams(
        method=rng.choice(methods), max_nodes=rng.choice([None, None, None, 1, 2, 5])
    )
    request = Request(f"mix-{index}", prompt, random_sampling(rng), speculation)
    abort_after = rng.randint(0, 8) if rng.random() < 0.15 else None
    return Arrival(request, rng.randint(0, 4), abort_after)


def random_mix(seed: int) -> Mix:
    rng = Random(seed)
    block_size = rng.choice([2, 4, 8])
    arrivals = [random_arrival(rng, index) for index in range(rng.randint(1, 7))]
    longest = max(len(a.request.prompt_token_ids) + a.request.sampling.max_tokens for a in arrivals)
    return Mix(
        arrivals=arrivals,
        num_blocks=-(-longest // block_size) + rng.randint(0, 1),
        block_size=block_size,
        max_num_seqs=rng.choice([1, 4, 4, 5]),
        extra_budget=rng.randint(0, 12),
        max_prefill_tokens=rng.choice([None, None, 1, 3]),
        max_nodes=rng.choice([2, 4, 8]),
        prefix_caching=rng.random() < 0.7,
        right_share=rng.choice([None, 0.0, 0.5, 1.0, 1.0]),
        seed=seed,
    )


def expect(mix: Mix) -> dict[str, SlowCompletion]:
    return {a.request.request_id: ORACLE.complete(a.request) for a in mix.arrivals}


def build(mix: Mix, expected: dict[str, SlowCompletion]) -> Engine:
    script = None
    if mix.right_share is not None:
        texts = {
            arrival.request.request_id: arrival.request.prompt_token_ids
            + expected[arrival.request.request_id].token_ids
            for arrival in mix.arrivals
        }
        script = known_continuation(texts, mix.right_share, mix.seed)
    return make_engine(
        script=script,
        num_blocks=mix.num_blocks,
        block_size=mix.block_size,
        max_num_seqs=mix.max_num_seqs,
        max_nodes=mix.max_nodes,
        max_tokens_per_step=max(mix.max_num_seqs, mix.max_nodes) + mix.extra_budget,
        prefix_caching=mix.prefix_caching,
        max_prefill_tokens=mix.max_prefill_tokens,
    )


def run(engine: Engine, arrivals: list[Arrival]) -> dict[str, list[RequestOutput]]:
    """Step by step, with the block books checked after each; outputs by request."""
    outputs: dict[str, list[RequestOutput]] = {a.request.request_id: [] for a in arrivals}
    last_step = max(arrival.at_step for arrival in arrivals)
    step = 0
    while engine.has_unfinished or step <= last_step:
        for arrival in arrivals:
            if arrival.at_step == step:
                engine.add_request(arrival.request)
            if arrival.abort_after is not None and arrival.at_step + arrival.abort_after == step:
                engine.abort(arrival.request.request_id)
                engine.blocks.check()
        for output in engine.step():
            outputs[output.request_id].append(output)
        engine.blocks.check()
        step += 1
        assert step < MAX_STEPS, "the engine makes no progress"
    return outputs


def joined(outputs: list[RequestOutput]) -> Completion:
    last = outputs[-1]
    assert last.finish_reason is not None
    assert all(output.finish_reason is None for output in outputs[:-1])
    assert all(output.stats is None for output in outputs[:-1])
    return join_outputs(outputs)


def assert_counts_add_up(request: Request, outputs: list[RequestOutput]) -> None:
    stats = joined(outputs).stats
    depths = [depth for output in outputs for depth in output.depths]
    assert stats.num_accepted_tokens == sum(depth > 0 for depth in depths)
    assert stats.num_accepted_tokens == sum(stats.accepted_per_depth)
    assert stats.num_accepted_tokens <= stats.num_draft_tokens
    assert stats.num_output_tokens == len(depths)
    assert stats.num_prompt_tokens == len(request.prompt_token_ids)
    assert 0 <= stats.num_cached_tokens < len(request.prompt_token_ids)
    # The token that ends a prefill (again after a preemption) belongs to no verify step.
    assert stats.num_emitted_tokens < len(depths) or not depths


class TestRequestMixes:
    @settings(max_examples=NUM_MIXES, deadline=None, derandomize=True)
    @given(seed=st.integers(0, 2**32 - 1))
    def test_every_output_is_that_of_the_oracle_and_no_block_leaks(self, seed: int) -> None:
        mix = random_mix(seed)
        expected = expect(mix)
        engine = build(mix, expected)
        outputs = run(engine, mix.arrivals)
        assert engine.blocks.num_in_use == 0
        for arrival in mix.arrivals:
            request = arrival.request
            got, wanted = outputs[request.request_id], expected[request.request_id]
            if got and got[-1].finish_reason is not None:
                assert_as_expected(joined(got), wanted)
                assert_counts_add_up(request, got)
            else:
                assert arrival.abort_after is not None, "a request never ended"
                tokens = tuple(token for output in got for token in output.token_ids)
                assert_same_tokens(
                    tokens, replace(wanted, token_ids=wanted.token_ids[: len(tokens)])
                )


class TestTheMixesThemselves:
    def test_they_use_every_mechanism_of_the_engine(self) -> None:
        totals: Counter[str] = Counter()
        for seed in range(40):
            mix = random_mix(seed)
            engine = build(mix, expect(mix))
            for outputs in run(engine, mix.arrivals).values():
                reason = outputs[-1].finish_reason if outputs else None
                totals[reason or "aborted"] += 1
            totals.update(engine.totals())
        assert totals["num_preemptions"] >= 5
        assert totals["num_cached_tokens"] >= 50
        assert totals["num_accepted_tokens"] >= 100
        assert totals["num_draft_tokens"] >= 500
        assert min(totals[reason] for reason in ("stop", "length", "aborted")) >= 10

    def test_unseeded_samples_run_beside_seeded_ones_without_disturbing_them(self) -> None:
        prompt = random_prompt(1, 9)
        seeded = Request("seeded", prompt, SamplingParams(max_tokens=20, seed=5, ignore_eos=True))
        noise = [
            Request(f"noise-{i}", prompt[:i], SamplingParams(max_tokens=20, temperature=1.5))
            for i in range(1, 4)
        ]
        completion = make_engine().generate([noise[0], seeded, *noise[1:]])[1]
        assert_as_expected(completion, ORACLE.complete(seeded))

    def test_the_oracle_reaches_every_way_to_end(self) -> None:
        prompt, tokenizer = random_prompt(3, 8), byte_tokenizer()
        free = ORACLE.complete(
            Request("a", prompt, SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True))
        )
        assert free.finish_reason == "length"
        stopped = SamplingParams(max_tokens=12, temperature=0.0, stop=(middle(tokenizer, free),))
        assert ORACLE.complete(Request("b", prompt, stopped)).finish_reason == "stop"
        ended = SamplingParams(max_tokens=12, temperature=0.0, logit_bias={2: 100.0})
        completion = ORACLE.complete(Request("c", prompt, ended))
        assert (completion.token_ids, completion.text) == ((2,), "")


def middle(tokenizer: Tokenizer, completion: SlowCompletion) -> str:
    """A piece of text from the middle of a completion."""
    return tokenizer.decode(completion.token_ids[4:7])
