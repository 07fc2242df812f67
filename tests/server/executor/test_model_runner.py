"""Whole models through the engine against transformers' own greedy `generate`, float32.

Every family runs with chunked prompts, several sequences in a batch, a sliding window shorter than
the prompts where the family has one, and drafts that are never, sometimes or always right.
"""

from collections.abc import Callable
from copy import deepcopy
from functools import cache
from typing import cast

import pytest
import torch
from torch import Tensor

from server.attention.backend import AttentionBatch, AttentionSpan
from server.attention.create import create_attention
from server.config import SpeculationParams
from server.core.completion import Completion
from server.core.request import Request
from server.executor.batch import StepBatch
from server.executor.model_runner import ModelRunner
from server.kv.kv_cache import KVCache, KVLayout
from tests.support.engine_tools import (
    known_continuation,
    make_engine,
    make_request,
    random_prompt,
    tiny_loaded,
    tiny_reference,
)
from tests.support.tiny_models import SLIDING_WINDOW, TINY_KINDS, TinyKind

pytestmark = pytest.mark.slow

MAX_NEW_TOKENS = 24
PROMPTS = tuple(random_prompt(seed, length) for seed, length in enumerate((1, 7, 19, 30)))
assert max(map(len, PROMPTS)) > 2 * SLIDING_WINDOW


@cache
def generate_by_transformers(kind: TinyKind, prompt: tuple[int, ...]) -> tuple[int, ...]:
    """Greedy tokens after the prompt, a token that ends the text included."""
    ids = torch.tensor([prompt])
    # Without the cast `generate` has the type of a submodule.
    generate = cast(Callable[..., Tensor], tiny_reference(kind).generate)
    output = generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=MAX_NEW_TOKENS,
    )
    return tuple(output[0, len(prompt) :].tolist())


def requests() -> list[Request]:
    return [make_request(prompt, max_tokens=MAX_NEW_TOKENS) for prompt in PROMPTS]


def assert_equals_transformers(kind: TinyKind, completions: list[Completion]) -> None:
    expected = [generate_by_transformers(kind, prompt) for prompt in PROMPTS]
    assert [completion.token_ids for completion in completions] == expected


@pytest.fixture(params=TINY_KINDS)
def kind(request: pytest.FixtureRequest) -> TinyKind:
    param: TinyKind = request.param
    return param


class TestWholeModels:
    def test_plain_decoding_equals_generate(self, kind: TinyKind) -> None:
        engine = make_engine(kind, heads="none", max_tokens_per_step=9)
        assert_equals_transformers(kind, engine.generate(requests()))

    def test_trees_of_untrained_heads_equal_generate(self, kind: TinyKind) -> None:
        engine = make_engine(kind, max_tokens_per_step=40, max_nodes=12)
        completions = engine.generate(requests())
        assert_equals_transformers(kind, completions)
        assert sum(completion.stats.num_draft_tokens for completion in completions) > 100

    @pytest.mark.parametrize("right_share", [0.0, 0.6, 1.0])
    def test_drafts_of_any_quality_equal_generate(self, kind: TinyKind, right_share: float) -> None:
        asked = requests()
        texts = {
            request.request_id: prompt + generate_by_transformers(kind, prompt)
            for request, prompt in zip(asked, PROMPTS, strict=True)
        }
        script = known_continuation(texts, right_share)
        engine = make_engine(kind, script, max_tokens_per_step=24, max_nodes=10)
        completions = engine.generate(asked)
        assert_equals_transformers(kind, completions)
        accepted = sum(completion.stats.num_accepted_tokens for completion in completions)
        assert (accepted > 0) == (right_share > 0)
        engine.blocks.check()
        assert engine.blocks.num_in_use == 0

    def test_scattered_blocks_and_preemption_equal_generate(self, kind: TinyKind) -> None:
        engine = make_engine(kind, num_blocks=28, block_size=2, max_tokens_per_step=16)
        assert_equals_transformers(kind, engine.generate(requests()))
        assert engine.counters.num_preemptions > 0

    def test_reused_prefixes_equal_generate(self, kind: TinyKind) -> None:
        engine = make_engine(kind)
        engine.generate(requests())
        assert_equals_transformers(kind, engine.generate(requests()))
        assert engine.counters.num_cached_tokens > 0

    def test_the_best_two_logits_are_so_far_apart_that_noise_cannot_swap_them(
        self, kind: TinyKind
    ) -> None:
        for prompt in PROMPTS:
            text = torch.tensor([prompt + generate_by_transformers(kind, prompt)])
            with torch.inference_mode():
                logits_TV = tiny_reference(kind)(text, use_cache=False).logits[0]
            best = logits_TV[len(prompt) - 1 : -1].topk(2).values
            assert (best[:, 0] - best[:, 1]).min() > 1e-3

    @pytest.mark.parametrize("kind", ["mistral", "gemma3"])
    def test_the_sliding_window_shows_in_the_outputs_that_are_compared(
        self, kind: TinyKind
    ) -> None:
        unlimited = deepcopy(tiny_reference(kind))
        unlimited.config.sliding_window = 1000
        text = torch.tensor([PROMPTS[3]])
        with torch.inference_mode():
            limited = tiny_reference(kind)(text, use_cache=False).logits[0]
            full = unlimited(text, use_cache=False).logits[0]
        torch.testing.assert_close(limited[:SLIDING_WINDOW], full[:SLIDING_WINDOW])
        assert (limited[-1] - full[-1]).abs().max() > 0.1


class TestModelRunner:
    def test_logits_and_hidden_states_are_those_of_the_rows_asked_for(self) -> None:
        loaded, prompt = tiny_loaded(), random_prompt(5, 11)
        layout = KVLayout(
            loaded.num_layers,
            loaded.num_kv_heads,
            loaded.head_dim,
            4,
            loaded.dtype,
            loaded.device,
        )
        cache = KVCache(layout, 3)
        runner = ModelRunner(loaded, cache, create_attention("sdpa", cache))
        positions = torch.arange(11)
        span = AttentionSpan(0, 11, 0, [0, 1, 2], None, None)
        rows = torch.tensor([3, 10, 4])
        output = runner.run(
            StepBatch(
                torch.tensor(prompt), positions, rows, AttentionBatch((span,), positions), (0,)
            )
        )
        with torch.inference_mode():
            expected = tiny_reference()(torch.tensor([prompt]), output_hidden_states=True)
        torch.testing.assert_close(output.logits_SV, expected.logits[0, rows], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(
            output.hidden_SD, expected.hidden_states[-1][0, rows], rtol=1e-4, atol=1e-4
        )

    def test_a_cache_with_room_for_them_gets_the_hidden_states_of_all_tokens(self) -> None:
        loaded, prompt = tiny_loaded(), random_prompt(5, 6)
        layout = KVLayout(
            loaded.num_layers,
            loaded.num_kv_heads,
            loaded.head_dim,
            4,
            loaded.dtype,
            loaded.device,
            loaded.hidden_size,
        )
        cache = KVCache(layout, 3)
        positions, slots = torch.arange(6), torch.tensor([8, 9, 10, 11, 0, 1])
        span = AttentionSpan(0, 6, 0, [2, 0], None, None)
        batch = AttentionBatch((span,), slots)
        ModelRunner(loaded, cache, create_attention("sdpa", cache)).run(
            StepBatch(torch.tensor(prompt), positions, torch.tensor([5]), batch, (0,))
        )
        with torch.inference_mode():
            expected = tiny_reference()(torch.tensor([prompt]), output_hidden_states=True)
        torch.testing.assert_close(
            cache.hidden_SD[slots], expected.hidden_states[-1][0], rtol=1e-4, atol=1e-4
        )

    def test_max_nodes_of_a_request_limits_its_trees(self) -> None:
        request = make_request(PROMPTS[2], SpeculationParams(max_nodes=3), max_tokens=10)
        completion = make_engine(max_nodes=12).generate([request])[0]
        assert completion.stats.num_draft_tokens <= 2 * completion.stats.num_steps
