"""Tiny engines with chosen sizes and draft sources, and an oracle that never saw the engine.

The oracle generates one request at a time: a plain transformers forward over the whole text for
every token, no cache, no batch, then sampling in plain Python.
"""

import tempfile
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from functools import cache
from itertools import count
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from heads.medusa import MedusaConfig, MedusaHeads
from heads.proposals import MedusaProposal, Proposal
from heads.tree_search import AcceptanceProfile
from server.attention.create import create_attention
from server.config import EngineConfig, SamplingParams, SpeculationParams
from server.core.completion import Completion
from server.core.limits import RequestLimits
from server.core.request import Request
from server.core.sequence import Sequence, request_seed
from server.core.text import TextStream
from server.cpu.accelerate import draft_products
from server.device.base import DraftProducts
from server.device.create import create_device
from server.engine.build import EngineParts, kv_layout
from server.engine.engine import Engine, OnHidden
from server.executor.executor import Drafting
from server.executor.host import HostExecutor
from server.executor.model_runner import ModelRunner
from server.kv.block_manager import BlockManager
from server.kv.kv_cache import KVCache, KVLayout
from server.model.draft_heads import DraftHeads
from server.model.loading import LoadedModel, load_model
from server.sampling.acceptance import check_acceptance, choose_rule
from server.sampling.processors import make_processors
from server.sampling.uniform import uniform
from server.speculation.cost_model import CostModel, StepCosts
from server.speculation.source import SourceContext
from server.speculation.sources import make_sources
from server.speculation.sources.medusa import MedusaDrafter, MedusaSource
from server.speculation.speculator import Speculator
from server.speculation.tree_sizes import FixedSizes, PlannedSizes
from server.tokenizer import Tokenizer
from tests.support.slow_sampling import adjust_slowly, draw_slowly, filter_slowly, greedy_slowly
from tests.support.tiny_models import VOCAB_SIZE, TinyKind, save_tiny_model, tiny_tokenizer

NUM_HEADS = 3
NUM_RANKS = 3
# Names of the device draft sources.
HEADS = frozenset(("medusa", "mtp"))
# Differences below these are floating-point ties between two ways to compute the same number.
TIE_MARGIN = 1e-4
_CACHE_SLOTS = 2048
_request_ids = count()

# What follows a request's text, root last, by depth and rank; gets the root's hidden state too.
DraftScript = Callable[[str, tuple[int, ...], Tensor], list[list[int]]]


@cache
def byte_tokenizer() -> Tokenizer:
    """A byte-level tokenizer of 320 tokens whose end of sequence is token 2."""
    return Tokenizer(tiny_tokenizer(), [2])


@cache
def tiny_loaded(kind: TinyKind = "llama") -> LoadedModel:
    """A tiny model as the server runs it uncompiled."""
    with tempfile.TemporaryDirectory() as directory:
        loaded = load_model(str(save_tiny_model(kind, Path(directory))), "cpu", "float32")
    create_device(loaded.device).pack(loaded.model)
    return loaded


@cache
def tiny_reference(kind: TinyKind = "llama") -> PreTrainedModel:
    """The same weights in plain transformers."""
    with tempfile.TemporaryDirectory() as directory:
        save_tiny_model(kind, Path(directory))
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.float32, attn_implementation="eager"
        )
    model.eval()
    return model


@cache
def _tiny_runner(kind: TinyKind, layout: KVLayout) -> tuple[ModelRunner, KVCache]:
    """Shared by all engines of a test run; what earlier ones left in its cache is never read."""
    loaded, block_size = tiny_loaded(kind), layout.block_size
    cache = KVCache(layout, -(-_CACHE_SLOTS // block_size))
    return ModelRunner(loaded, cache, create_attention("sdpa", cache)), cache


def random_heads(vocab_size: int, num_heads: int = NUM_HEADS, hidden_size: int = 8) -> MedusaHeads:
    """Heads over random matrices; good enough where their drafts are replaced or ignored."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(vocab_size, hidden_size, generator=generator)
    config = MedusaConfig(hidden_size, vocab_size, num_heads=num_heads)
    return MedusaHeads(config, rows, rows)


def heads_for(loaded: LoadedModel, num_heads: int = NUM_HEADS) -> MedusaHeads:
    """Untrained heads of a model: they propose what follows the hidden state itself."""
    config = MedusaConfig(loaded.hidden_size, loaded.vocab_size, num_heads=num_heads)
    heads = MedusaHeads(config, loaded.unembedding(), loaded.input_embedding())
    generator = torch.Generator().manual_seed(1)
    for parameter in heads.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    return heads


def wide_profile(num_heads: int = NUM_HEADS, num_ranks: int = NUM_RANKS) -> AcceptanceProfile:
    """Rates that make bushy trees: every head and rank takes part."""
    rates = tuple(0.5 / (rank + 1) for rank in range(num_ranks))
    return AcceptanceProfile((rates,) * num_heads)


class ScriptedDrafter(MedusaDrafter):
    """Drafts what a script says instead of what heads propose."""

    def __init__(self, heads: MedusaHeads, script: DraftScript) -> None:
        super().__init__(heads, NUM_RANKS)
        self._script = script

    def draft(
        self,
        rooted: Seq[Drafting],
        hidden_BD: Tensor,
        following: Seq[Drafting],
        min_value: float,
    ) -> list[Proposal | None]:
        proposals: list[Proposal | None] = []
        for drafting, hidden_D in zip(rooted, hidden_BD, strict=True):
            text = tuple(drafting.tokens(0, drafting.num_tokens))
            candidates = self._script(drafting.sequence.request.request_id, text, hidden_D)
            rates_KR = [list(wide_profile().accept_rates_KR[0])] * len(candidates)
            proposals.append(MedusaProposal(candidates, rates_KR))
        return proposals


class ScriptedSource(MedusaSource):
    """Medusa heads as a source, whose drafter follows a script."""

    def __init__(self, heads: MedusaHeads, script: DraftScript) -> None:
        super().__init__(heads, wide_profile(), max_nodes=8)
        self.drafter = ScriptedDrafter(heads, script)


def make_engine(
    kind: TinyKind = "llama",
    script: DraftScript | None = None,
    costs: CostModel | None = None,
    draft: DraftHeads | None = None,
    on_hidden: OnHidden | None = None,
    products: DraftProducts | None = None,
    **options: Any,
) -> Engine:
    """An engine over a tiny model with small sizes.

    Args:
        script: Where drafts come from; None takes untrained heads, which are mostly wrong.
        costs: Chooses the tree sizes; without it trees are as large as the options allow.
        draft: Heads instead of untrained Medusa heads.
        on_hidden: As `Engine` takes it.
        products: What the heads multiply with; None takes those of an uncompiled server.
        options: Of `EngineConfig`; `heads="none"` serves without drafts.
    """
    sizes: dict[str, Any] = {
        "model": f"tiny-{kind}",
        "heads": "random",
        "block_size": 4,
        "num_blocks": 64,
        "max_num_seqs": 4,
        "max_tokens_per_step": 32,
        "max_nodes": 8,
        "lookup": False,
    }
    config = EngineConfig(**(sizes | options))
    if config.num_blocks is None:
        raise ValueError("give num_blocks")
    loaded = tiny_loaded(kind)
    if draft is None and config.heads != "none":
        draft = DraftHeads(heads_for(loaded), None, wide_profile(), "tiny")
    layout = kv_layout(loaded, config.block_size, draft, on_hidden is not None)
    runner, cache = _tiny_runner(kind, layout)
    blocks = BlockManager(config.num_blocks, config.block_size, config.prefix_caching)
    made = products or draft_products(None)
    sources = make_sources(SourceContext(config, draft, cache, blocks, made))
    if script is not None:
        sources = [
            ScriptedSource(heads_for(loaded), script) if source.name == "medusa" else source
            for source in sources
        ]
    tree_size = config.max_nodes if config.tree_size == "auto" else config.tree_size
    speculator = Speculator(
        sources,
        FixedSizes(tree_size) if costs is None else PlannedSizes(StepCosts(costs), HEADS),
        config.max_nodes,
    )
    max_len = min(config.num_blocks * config.block_size, loaded.max_model_len)
    return Engine(
        EngineParts(
            config=config,
            loaded=loaded,
            executor=HostExecutor(runner, layout, speculator.drafters),
            blocks=blocks,
            speculator=speculator,
            limits=RequestLimits(max_len, loaded.vocab_size, speculator.methods, check_acceptance),
            heads_name=None if draft is None else "random",
            is_compiled=False,
        ),
        on_hidden,
    )


def make_request(
    prompt: Seq[int], speculation: SpeculationParams | None = None, **sampling: Any
) -> Request:
    """A request with a fresh id; greedy unless told otherwise."""
    return Request(
        f"request-{next(_request_ids)}",
        tuple(prompt),
        SamplingParams(**({"temperature": 0.0} | sampling)),
        speculation or SpeculationParams(),
    )


def random_prompt(seed: int, length: int) -> tuple[int, ...]:
    """Ordinary tokens only."""
    return tuple(Random(seed).choices(range(3, VOCAB_SIZE), k=length))


def make_sequence(
    prompt: Seq[int],
    generated: Seq[int],
    sampling: SamplingParams,
    speculation: SpeculationParams | None = None,
    vocab_size: int = VOCAB_SIZE,
) -> Sequence:
    """A sequence as the engine holds it after some tokens, without an engine."""
    request = Request("r", tuple(prompt), sampling, speculation or SpeculationParams())
    processors = make_processors(request, vocab_size, torch.device("cpu"))
    for processor in processors:
        processor.commit(generated)
    return Sequence(
        request=request,
        text=TextStream(byte_tokenizer().detokenizer(), sampling.stop),
        seed=request_seed(request),
        acceptance=choose_rule(sampling, request.speculation, "auto"),
        drafts_allowed=1,
        end_ids=frozenset() if sampling.ignore_eos else byte_tokenizer().eos_token_ids,
        processors=processors,
        token_ids=[*prompt, *generated],
    )


@dataclass(frozen=True)
class SlowCompletion:
    """What the oracle generated.

    Attributes:
        margins: For each token, how far the decision was from going another way.
    """

    token_ids: tuple[int, ...]
    text: str
    finish_reason: str
    margins: tuple[float, ...]


@dataclass
class SlowModel:
    """Next-token logits of a whole text, remembered by text."""

    kind: TinyKind = "llama"
    _rows: dict[tuple[int, ...], list[float]] = field(default_factory=dict)

    def logits(self, token_ids: Seq[int]) -> list[float]:
        key = tuple(token_ids)
        if key not in self._rows:
            with torch.inference_mode():
                output = tiny_reference(self.kind)(torch.tensor([key]), use_cache=False)
            self._rows[key] = output.logits[0, -1].tolist()
        return self._rows[key]

    def complete(self, request: Request) -> SlowCompletion:
        """Generate a greedy or seeded request."""
        sampling, tokenizer = request.sampling, byte_tokenizer()
        prompt = request.prompt_token_ids
        output: list[int] = []
        margins: list[float] = []
        while True:
            logits = self.logits((*prompt, *output))
            adjusted = adjust_slowly(sampling, logits, prompt, output)
            if sampling.is_greedy:
                draw = greedy_slowly(adjusted)
            else:
                assert sampling.seed is not None, "only seeded samples can be foretold"
                number = uniform(sampling.seed, len(prompt) + len(output))
                draw = draw_slowly(filter_slowly(adjusted, sampling), number)
            output.append(draw.token_id)
            margins.append(draw.margin)
            is_eos = draw.token_id in tokenizer.eos_token_ids and not sampling.ignore_eos
            text = tokenizer.decode(output[:-1] if is_eos else output)
            stops = [at for stop in sampling.stop if (at := text.find(stop)) >= 0]
            if is_eos or stops or len(output) == sampling.max_tokens:
                return SlowCompletion(
                    token_ids=tuple(output),
                    text=text[: min(stops)] if stops else text,
                    finish_reason="stop" if is_eos or stops else "length",
                    margins=tuple(margins),
                )


def assert_same_tokens(token_ids: tuple[int, ...], expected: SlowCompletion) -> bool:
    """Equal tokens, or the first difference is a proven tie; False for the latter."""
    pairs = zip(token_ids, expected.token_ids, strict=False)
    for index, (ours, theirs) in enumerate(pairs):
        if ours != theirs:
            assert expected.margins[index] < TIE_MARGIN, f"token {index} is {ours}, not {theirs}"
            return False
    assert token_ids == expected.token_ids
    return True


def assert_as_expected(completion: Completion, expected: SlowCompletion) -> None:
    """Equal in tokens, text and reason, up to the first proven tie."""
    if assert_same_tokens(completion.token_ids, expected):
        assert completion.text == expected.text
        assert completion.finish_reason == expected.finish_reason


def known_continuation(
    texts: dict[str, tuple[int, ...]], right_share: float, seed: int = 0
) -> DraftScript:
    """Drafts from known outputs: right with probability `right_share` at each depth.

    With a share of 1 the right token is the best candidate; otherwise it may be a sibling of it.

    Args:
        texts: Prompt and output of every request, by request id; others are drafted wrongly.
    """
    rng = Random(seed)

    def script(request_id: str, so_far: tuple[int, ...], hidden_D: Tensor) -> list[list[int]]:
        text = texts.get(request_id, ())
        candidates = []
        for depth in range(1, NUM_HEADS + 1):
            position = len(so_far) - 1 + depth
            right = text[position] if position < len(text) else -1
            wrong = rng.sample([t for t in range(VOCAB_SIZE) if t != right], NUM_RANKS)
            if right >= 0 and rng.random() < right_share:
                wrong[0 if right_share == 1.0 else rng.choice((0, NUM_RANKS - 1))] = right
            candidates.append(wrong)
        return candidates

    return script
