"""New members from outside: each is a class and one line in a table, and nobody else knows it.

The lines are set here as a change to the table would set them; nothing below `server/` is edited.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from heads.acceptance import AcceptedPaths
from heads.candidates import TreeBatch
from heads.proposals import Child, Proposal
from server.attention.backend import AttentionBackend
from server.attention.sdpa import SDPABackend
from server.cache import CACHE_VARIABLE
from server.config import EngineConfig, SamplingParams, SpeculationParams, require
from server.core.processor import LogitProcessor
from server.core.request import Request
from server.core.sequence import Sequence as RequestSequence
from server.core.step import Step
from server.engine.engine import Engine
from server.errors import InvalidRequestError
from server.executor import EXECUTORS
from server.executor.executor import Drafter, Executor
from server.executor.host import HostExecutor, HostFlight
from server.executor.model_runner import ModelRunner
from server.kv.kv_cache import KVCache, KVLayout
from server.sampling.acceptance import RULES
from server.sampling.acceptance.rule import AcceptanceRule
from server.sampling.processors import PROCESSORS
from server.sampling.processors.making import ProcessorContext
from server.sampling.sampler import TargetSampler
from server.speculation.source import DraftSource, SourceContext
from server.speculation.sources import SOURCES
from tests.support.engine_tools import make_request, random_prompt
from tests.support.tiny_heads import save_tiny_heads
from tests.support.tiny_models import save_tiny_model

PROMPT = random_prompt(5, 9)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model("llama", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def heads_dir(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_heads(model_dir, tmp_path_factory.mktemp("heads") / "tiny-medusa")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))


def build(model_dir: Path, **options: Any) -> Engine:
    sizes: dict[str, Any] = {"heads": "none", "device": "cpu", "num_blocks": 64, "tree_size": 8}
    return Engine.from_config(EngineConfig(model=str(model_dir), **(sizes | options)))


def ask(
    speculation: SpeculationParams | None = None, max_tokens: int = 16, **sampling: Any
) -> Request:
    return make_request(PROMPT, speculation, max_tokens=max_tokens, ignore_eos=True, **sampling)


class RepeatedToken(Proposal):
    """Proposes one token again and again."""

    source = "toy"

    def __init__(self, token_id: int) -> None:
        self._child = Child(token_id, 0.9, 0, cell=0)

    def children(self, state: int) -> Sequence[Child]:
        return (self._child,)

    def state_after_other(self, state: int) -> int | None:
        return state


class ToySource(DraftSource):
    """Drafts that the last token comes again."""

    name = "toy"

    def propose(self, sequence: RequestSequence) -> Proposal | None:
        return RepeatedToken(sequence.token_ids[-1])


def make_toy_source(context: SourceContext) -> DraftSource:
    return ToySource()


def test_a_draft_source(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = build(model_dir).generate([ask(SpeculationParams(method="none"))])[0]
    monkeypatch.setitem(SOURCES, "toy", make_toy_source)
    engine = build(model_dir, lookup=False)
    assert engine.speculator.methods == {"auto", "none", "toy"}
    # A bias makes the model repeat itself, so that the drafts are right.
    drafted, repeating = engine.generate(
        [ask(SpeculationParams(method="toy")), ask(logit_bias={7: 100.0})]
    )
    assert drafted.token_ids == plain.token_ids
    assert (drafted.stats.method, repeating.stats.method) == ("toy", "toy")
    assert drafted.stats.num_draft_tokens > 0
    assert repeating.stats.mean_acceptance_length > 2.0


def test_a_draft_source_beside_heads_and_lookup(
    model_dir: Path, heads_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SOURCES, "toy", make_toy_source)
    engine = build(model_dir, heads=str(heads_dir))
    found = engine.generate([ask()])[0]
    assert found.stats.method == "medusa+lookup+toy"
    assert found.token_ids == build(model_dir).generate([ask()])[0].token_ids


@dataclass(frozen=True, slots=True)
class AtMost:
    """Parameters of the toy rule."""

    limit: int = 1

    def __post_init__(self) -> None:
        require(self.limit >= 0, "speculation.limit", self.limit, "give 0 or more")


class ImpatientRule(AcceptanceRule):
    """Never accepts a draft, and draws after the root."""

    parameters = AtMost

    def accept(self, trees: TreeBatch, sampler: TargetSampler) -> AcceptedPaths:
        num_sequences = trees.token_ids_BN.shape[0]
        root_B = torch.zeros(num_sequences, dtype=torch.int64)
        return AcceptedPaths(root_B.unsqueeze(1), root_B + 1, sampler.draw_next(root_B))


def test_an_acceptance_rule(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RULES, "impatient", ImpatientRule())
    engine = build(model_dir)
    sampling: dict[str, Any] = {"temperature": 0.8, "seed": 3}
    impatient = SpeculationParams(acceptance="impatient", acceptance_options={"limit": 0})
    exact, refusing = engine.generate([ask(**sampling), ask(impatient, **sampling)])
    assert refusing.token_ids == exact.token_ids
    assert refusing.stats.acceptance == "impatient"
    assert refusing.stats.num_accepted_tokens == 0
    wrong = SpeculationParams(acceptance="impatient", acceptance_options={"limit": -1})
    with pytest.raises(InvalidRequestError, match=r"speculation\.limit is -1; give 0 or more"):
        engine.add_request(ask(wrong))


class OnlyEven(LogitProcessor):
    """Lets tokens of even ids through."""

    restricts = True

    def apply(self, logits_V: Tensor, path: Sequence[int]) -> Tensor:
        odd_V = torch.arange(len(logits_V)) % 2 == 1
        return logits_V.masked_fill(odd_V, float("-inf"))

    def allows(self, path: Sequence[int], token_id: int) -> bool:
        return token_id % 2 == 0

    def commit(self, token_ids: Sequence[int]) -> None:
        assert all(token_id % 2 == 0 for token_id in token_ids)


def make_only_even(context: ProcessorContext) -> OnlyEven | None:
    return OnlyEven() if context.request.sampling.processor_options.get("even") else None


def test_a_logit_processor(
    model_dir: Path, heads_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(PROCESSORS, "even", make_only_even)
    engine = build(model_dir, heads=str(heads_dir))
    asked = SamplingParams(
        max_tokens=20, temperature=0.9, seed=1, ignore_eos=True, processor_options={"even": True}
    )
    bound, plain = engine.generate(
        [
            Request("bound", PROMPT, asked),
            Request("plain", PROMPT, asked, SpeculationParams(method="none")),
        ]
    )
    assert all(token_id % 2 == 0 for token_id in bound.token_ids)
    assert bound.token_ids == plain.token_ids
    assert bound.stats.num_draft_tokens > 0


class CountingBackend(SDPABackend):
    """Counts the steps that it prepares."""

    num_steps = 0

    def prepare(self, batch: Any) -> Any:
        type(self).num_steps += 1
        return super().prepare(batch)


def make_counting(kv_cache: KVCache) -> AttentionBackend:
    return CountingBackend(kv_cache)


def test_an_attention_backend(model_dir: Path) -> None:
    engine = build(model_dir, attention=f"{__name__}:make_counting")
    engine.generate([ask()])
    assert CountingBackend.num_steps == engine.counters.num_steps > 0


class CountingExecutor(HostExecutor):
    """Counts launches."""

    num_launches = 0

    def launch(self, step: Step) -> HostFlight:
        type(self).num_launches += 1
        return super().launch(step)


def make_counting_executor(
    runner: ModelRunner, layout: KVLayout, drafters: Mapping[str, Drafter]
) -> Executor:
    return CountingExecutor(runner, layout, drafters)


def test_an_executor(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(EXECUTORS, "cpu", make_counting_executor)
    engine = build(model_dir)
    engine.generate([ask()])
    assert isinstance(engine.executor, CountingExecutor)
    assert CountingExecutor.num_launches == engine.counters.num_steps
