"""`exactness`: whether speculation and our engine change any output.

Three checks over the same turns: greedy outputs against transformers' greedy `generate`, greedy
outputs with speculation on against off, and seeded samples at temperature 0.8 on against off.
Where two outputs differ, the first difference is judged from the logits that the plain
transformers model gives for the tokens before it. Fails if a difference is no proven tie.

The engine keeps several requests in flight, and their trees have different sizes: `--max-nodes`,
a half, a quarter and an eighth of it, or less with `--tree-size auto`, where the planner chooses
the sizes. So mixed batches are part of what is checked.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from bench.benches.setup import (
    BATCH_ENGINE_OPTIONS,
    PLAIN,
    BatchOptions,
    PromptOptions,
    common_settings,
    prepare,
)
from bench.errors import BenchError
from bench.measure.judge import CheckName, Judge, Mismatch, Pair
from bench.measure.reference import ReferenceModel
from bench.measure.report import Outcome
from bench.measure.ties import TIE_GAP
from bench.workload.conversations import Conversation
from bench.workload.dialogues import MakeRequest, SkippedTurn, Turn, answer_again, answer_turns
from bench.workload.tracing import NO_STEPS, Trace, count_steps
from server.cli.console import progress_bar
from server.cli.options import Command, Settings
from server.config import EngineConfig, SamplingParams, SpeculationParams
from server.core.request import Request
from server.engine.engine import Engine

TEMPERATURE = 0.8
_SEEDS_PER_LINE = 1000
_NUM_TREE_SIZES = 4


@dataclass(frozen=True, slots=True)
class Outputs:
    """What each way of running made of the same turns; all in the turns' order."""

    turns: tuple[Turn, ...]
    greedy_on: tuple[Trace, ...]
    greedy_off: tuple[Trace, ...]
    sampled_on: tuple[Trace, ...]
    sampled_off: tuple[Trace, ...]
    transformers: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class CheckCount:
    """Outcome of one of the three checks."""

    num_outputs: int
    num_mismatches: int
    num_unexplained: int


@dataclass(frozen=True, slots=True)
class ExactnessResult:
    """What the bench reports.

    Attributes:
        num_outputs: Pairs of outputs that were compared, over all checks.
        num_mismatches: Pairs that differ.
        num_unexplained: Pairs whose first difference is no proven tie.
        largest_gap: Largest gap of a proven tie; None without one.
    """

    num_outputs: int
    num_mismatches: int
    num_unexplained: int
    largest_gap: float | None
    checks: dict[CheckName, CheckCount]
    mismatches: tuple[Mismatch, ...]
    num_tokens: int
    tie_gap: float = TIE_GAP


def summarise(pairs: Sequence[Pair], judge: Judge) -> ExactnessResult:
    """Compare all pairs."""
    mismatches: list[Mismatch] = []
    counts: dict[CheckName, CheckCount] = {}
    for pair in pairs:
        found = judge.compare(pair)
        count = counts.get(pair.check, CheckCount(0, 0, 0))
        counts[pair.check] = CheckCount(
            count.num_outputs + 1,
            count.num_mismatches + (found is not None),
            count.num_unexplained + (found is not None and not found.is_tie),
        )
        if found is not None:
            mismatches.append(found)
    gaps = [m.gap for m in mismatches if m.is_tie and m.gap is not None]
    return ExactnessResult(
        num_outputs=len(pairs),
        num_mismatches=len(mismatches),
        num_unexplained=sum(not mismatch.is_tie for mismatch in mismatches),
        largest_gap=max(gaps, default=None),
        checks=counts,
        mismatches=tuple(mismatches),
        num_tokens=sum(len(pair.outputs[0]) for pair in pairs),
    )


class RequestMaker:
    """Makes the requests of the ways in which the engine answers a turn.

    Args:
        greedy: How greedy outputs are drawn.
        speculation: Request parameters of the ways with drafts.
        max_nodes: Largest tree of all.
    """

    def __init__(
        self, greedy: SamplingParams, speculation: SpeculationParams, max_nodes: int
    ) -> None:
        self.greedy_params = greedy
        self._speculation = speculation
        self._max_nodes = max_nodes

    def sampled_params(self, turn: Turn) -> SamplingParams:
        """How a turn's samples are drawn; each turn has its own seed."""
        seed = turn.conversation.line * _SEEDS_PER_LINE + turn.index
        return replace(self.greedy_params, temperature=TEMPERATURE, seed=seed)

    def tree_size(self, turn: Turn) -> int:
        """Largest tree of a turn: neighbouring turns have different ones."""
        halvings = (turn.conversation.line + turn.index) % _NUM_TREE_SIZES
        return max(self._max_nodes >> halvings, min(2, self._max_nodes))

    def greedy_on(self, turn: Turn) -> Request:
        """Greedy, with speculation."""
        return turn.request(self.greedy_params, self._on(turn))

    def greedy_off(self, turn: Turn) -> Request:
        """Greedy, plainly decoded."""
        return turn.request(self.greedy_params, PLAIN)

    def sampled_on(self, turn: Turn) -> Request:
        """Sampled, with speculation."""
        return turn.request(self.sampled_params(turn), self._on(turn))

    def sampled_off(self, turn: Turn) -> Request:
        """Sampled, plainly decoded."""
        return turn.request(self.sampled_params(turn), PLAIN)

    def _on(self, turn: Turn) -> SpeculationParams:
        return replace(self._speculation, max_nodes=self.tree_size(turn))


def produce(
    engine: Engine,
    reference: ReferenceModel,
    conversations: Sequence[Conversation],
    requests: RequestMaker,
) -> tuple[Outputs, tuple[SkippedTurn, ...]]:
    """Answer every turn in all five ways; greedy answers with speculation form the contexts."""
    with progress_bar("greedy, speculation on", len(conversations)) as bar:
        answered = answer_turns(engine, conversations, requests.greedy_on, bar.advance)
    turns = answered.turns

    def again(label: str, make_request: MakeRequest) -> tuple[Trace, ...]:
        with progress_bar(label, len(turns)) as bar:
            return tuple(answer_again(engine, turns, make_request, bar.advance))

    outputs = Outputs(
        turns=turns,
        greedy_on=answered.traces,
        greedy_off=again("greedy, speculation off", requests.greedy_off),
        sampled_on=again("sampled, speculation on", requests.sampled_on),
        sampled_off=again("sampled, speculation off", requests.sampled_off),
        transformers=_generate_all(reference, turns, requests.greedy_params.max_tokens),
    )
    return outputs, answered.skipped


def _generate_all(
    reference: ReferenceModel, turns: Sequence[Turn], max_new_tokens: int
) -> tuple[tuple[int, ...], ...]:
    outputs: list[tuple[int, ...]] = []
    with progress_bar("greedy, transformers", len(turns)) as bar:
        for turn in turns:
            outputs.append(reference.generate(turn.prompt_token_ids, max_new_tokens)[1])
            bar.advance()
    return tuple(outputs)


def make_pairs(outputs: Outputs, requests: RequestMaker) -> list[Pair]:
    """Pair the outputs that must be equal."""
    pairs: list[Pair] = []
    for rank, turn in enumerate(outputs.turns):
        ours, plain = outputs.greedy_on[rank].token_ids, outputs.greedy_off[rank].token_ids
        samples = outputs.sampled_on[rank].token_ids, outputs.sampled_off[rank].token_ids
        greedily, randomly = requests.greedy_params, requests.sampled_params(turn)
        pairs += [
            Pair("greedy_vs_transformers", turn, (ours, outputs.transformers[rank]), greedily),
            Pair("greedy_on_vs_off", turn, (ours, plain), greedily),
            Pair("sampled_on_vs_off", turn, samples, randomly),
        ]
    return pairs


def pooled_acceptance(traces: Sequence[Trace]) -> float:
    """Tokens per verify step: above 1, the drafts that were checked were accepted at times."""
    return sum((count_steps(trace) for trace in traces), NO_STEPS).mean


def run(
    prompts: PromptOptions,
    config: EngineConfig,
    speculation: SpeculationParams,
    batch: BatchOptions,
) -> Outcome:
    """Produce the outputs and compare them; in float32 unless the options name another type.

    Raises:
        BenchError: If no prompt fits the context, or the weights are quantized.
        EuryaleError: If the prompts are wrong, or the engine cannot be built or rejects a request.
    """
    if config.quantization != "none":
        raise BenchError(
            f"quantization is {config.quantization!r}, but exactness compares with transformers' "
            "model, whose weights are plain; give 'none'"
        )
    config = replace(config, dtype="float32" if config.dtype == "auto" else config.dtype)
    setup = prepare(prompts, batch.applied(config), speculation)
    reference = ReferenceModel(setup.engine.loaded)
    requests = RequestMaker(setup.greedy, setup.speculation, config.max_nodes)
    outputs, skipped = produce(setup.engine, reference, setup.workload.conversations, requests)
    result = summarise(make_pairs(outputs, requests), Judge(reference))
    acceptance_lengths = {
        "greedy": pooled_acceptance(outputs.greedy_on),
        "sampled": pooled_acceptance(outputs.sampled_on),
    }
    extra = {"mean_acceptance_lengths": acceptance_lengths}
    return setup.outcome(result, skipped, extra, passed=result.num_unexplained == 0)


COMMAND = Command(
    "exactness",
    "Token equality against transformers and between speculation on and off.",
    run,
    {**common_settings(BATCH_ENGINE_OPTIONS), "batch": Settings(BatchOptions)},
)
