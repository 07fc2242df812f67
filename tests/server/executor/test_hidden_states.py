"""Hidden states that an engine hands over, against one plain forward pass over the whole text."""

from collections.abc import Sequence as Seq
from typing import Any

import pytest
import torch
from torch import Tensor

from server.engine.engine import Engine
from server.model.draft_heads import DraftHeads
from tests.support.engine_tools import make_engine, make_request, tiny_loaded, tiny_reference
from tests.support.slow_drafting import tiny_mtp
from tests.support.tiny_models import TINY_KINDS, TinyKind

pytestmark = pytest.mark.slow

PROMPTS = [[1, *range(20, 20 + length)] for length in (3, 9, 9, 17, 30)]


class Recorder:
    """What was handed over, in order."""

    def __init__(self) -> None:
        self.taken: list[tuple[tuple[int, ...], Tensor]] = []

    def __call__(self, token_ids: Seq[int], hidden_XD: Tensor) -> None:
        self.taken.append((tuple(token_ids), hidden_XD))


def assert_as_slowly(recorder: Recorder, kind: TinyKind = "llama") -> None:
    for token_ids, hidden_XD in recorder.taken:
        with torch.no_grad():
            ids_1T = torch.tensor([token_ids[:-1]])
            expected_1TD = tiny_reference(kind).base_model(input_ids=ids_1T)[0]
        torch.testing.assert_close(hidden_XD, expected_1TD[0], rtol=1e-3, atol=1e-3)


def ask(engine: Engine, prompts: Seq[Seq[int]] = PROMPTS, **sampling: Any) -> list[tuple[int, ...]]:
    """Whole texts of requests that run together."""
    requests = [make_request(prompt, **{"max_tokens": 12} | sampling) for prompt in prompts]
    completions = engine.generate(requests)
    return [
        (*request.prompt_token_ids, *completion.token_ids)
        for request, completion in zip(requests, completions, strict=True)
    ]


@pytest.mark.parametrize("kind", TINY_KINDS)
def test_all_tokens_of_each_request_but_the_last_have_theirs(kind: TinyKind) -> None:
    recorder = Recorder()
    texts = ask(make_engine(kind=kind, heads="none", on_hidden=recorder))
    assert sorted(token_ids for token_ids, _ in recorder.taken) == sorted(texts)
    assert_as_slowly(recorder, kind)


@pytest.mark.parametrize("seed", [None, 7])
def test_drafts_and_what_is_accepted_of_them_change_nothing(seed: int | None) -> None:
    module, block = tiny_mtp(tiny_loaded())
    mtp = DraftHeads(module, block, None, "tiny")
    for draft in (None, mtp):
        recorder = Recorder()
        engine = make_engine(draft=draft, on_hidden=recorder)
        texts = ask(engine, temperature=0.0 if seed is None else 1.0, seed=seed)
        assert sorted(token_ids for token_ids, _ in recorder.taken) == sorted(texts)
        assert_as_slowly(recorder)


def test_a_beginning_that_was_computed_for_another_request_has_its_states() -> None:
    recorder = Recorder()
    engine = make_engine(heads="none", on_hidden=recorder)
    (first,) = ask(engine, [PROMPTS[3]])
    (second,) = ask(engine, [[*first, 40, 41, 42]])
    assert engine.counters.num_cached_tokens > len(PROMPTS[3])
    assert [token_ids for token_ids, _ in recorder.taken] == [first, second]
    assert_as_slowly(recorder)


@pytest.mark.parametrize(
    "options", [{"max_prefill_tokens": 3}, {"num_blocks": 14}, {"prefix_caching": False}]
)
def test_chunks_preemption_and_reuse_change_nothing(options: dict[str, Any]) -> None:
    recorder = Recorder()
    engine = make_engine(heads="none", on_hidden=recorder, **options)
    assert len(ask(engine, max_tokens=20, ignore_eos=True)) == len(recorder.taken)
    assert (engine.counters.num_preemptions > 0) == ("num_blocks" in options)
    assert_as_slowly(recorder)


def test_an_aborted_request_has_states_once_its_prompt_is_computed() -> None:
    recorder = Recorder()
    engine = make_engine(heads="none", on_hidden=recorder, max_tokens_per_step=8)
    early, late = (make_request(PROMPTS[4], max_tokens=9) for _ in range(2))
    engine.add_request(early)
    engine.step()
    engine.abort(early.request_id)
    assert recorder.taken == []
    engine.add_request(late)
    while not engine.step():
        pass
    engine.abort(late.request_id)
    engine.abort(late.request_id)
    ((token_ids, _),) = recorder.taken
    assert len(token_ids) == len(PROMPTS[4]) + 1
    assert_as_slowly(recorder)
    assert not engine.has_unfinished
