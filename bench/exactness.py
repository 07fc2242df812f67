"""`exactness`: whether speculation and our engine change any output.

Three checks over the same turns: greedy outputs against transformers' greedy `generate`, greedy
outputs with speculation on against off, and seeded samples at temperature 0.8 on against off.
Where two outputs differ, the first difference is judged from the logits that the plain
transformers model gives for the tokens before it. Fails if a difference is no proven tie.

The engine keeps several requests in flight and chooses its tree sizes by itself, as a server
does, so changing batch neighbours and trees are part of what is checked.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from bench.dialogues import SkippedTurn, Turn, answer_again, answer_turns
from bench.judge import CheckName, Judge, Mismatch, Output, Pair
from bench.options import BenchOptions
from bench.outcome import Outcome
from bench.progress import progress
from bench.reference import ReferenceModel
from bench.ties import TIE_GAP
from bench.workload import (
    Workload,
    build_engine,
    describe_engine,
    engine_config,
    load_workload,
    speculation_off,
    speculation_on,
)
from server.config import SamplingParams
from server.engine.engine import Engine

TEMPERATURE = 0.8
FIRST_SEED = 1000


@dataclass(frozen=True, slots=True)
class Outputs:
    """What each way of running made of the same turns, turn by turn."""

    turns: tuple[Turn, ...]
    greedy_on: list[Output]
    greedy_off: list[Output]
    sampled_on: list[Output]
    sampled_off: list[Output]
    transformers: list[Output]


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


def produce(
    engine: Engine, reference: ReferenceModel, workload: Workload, options: BenchOptions
) -> tuple[Outputs, tuple[SkippedTurn, ...]]:
    """Answer every turn in all five ways; greedy answers with speculation form the contexts."""
    on, off = speculation_on(options), speculation_off()
    greedy = greedy_params(options)
    with progress("greedy, speculation on", len(workload.conversations)) as advance:
        answered = answer_turns(engine, workload.conversations, greedy, on, advance)
    turns = answered.turns
    same = [greedy] * len(turns)
    seeded = [sampled_params(options, rank) for rank in range(len(turns))]
    with progress("greedy, speculation off", len(turns)) as advance:
        greedy_off = answer_again(engine, turns, same, off, advance)
    with progress("sampled, speculation on", len(turns)) as advance:
        sampled_on = answer_again(engine, turns, seeded, on, advance)
    with progress("sampled, speculation off", len(turns)) as advance:
        sampled_off = answer_again(engine, turns, seeded, off, advance)
    transformers: list[Output] = []
    with progress("greedy, transformers", len(turns)) as advance:
        for turn in turns:
            _, output = reference.generate(turn.prompt_token_ids, options.max_new_tokens)
            transformers.append(output)
            advance()
    outputs = Outputs(
        turns=turns,
        greedy_on=[trace.token_ids for trace in answered.traces],
        greedy_off=[trace.token_ids for trace in greedy_off],
        sampled_on=[trace.token_ids for trace in sampled_on],
        sampled_off=[trace.token_ids for trace in sampled_off],
        transformers=transformers,
    )
    return outputs, answered.skipped


def greedy_params(options: BenchOptions) -> SamplingParams:
    """How the greedy outputs are drawn."""
    return SamplingParams(max_tokens=options.max_new_tokens, temperature=0.0)


def sampled_params(options: BenchOptions, rank: int) -> SamplingParams:
    """How the sample of the turn at index `rank` is drawn."""
    return replace(greedy_params(options), temperature=TEMPERATURE, seed=FIRST_SEED + rank)


def make_pairs(outputs: Outputs, options: BenchOptions) -> list[Pair]:
    """Lay side by side what must be equal."""
    pairs: list[Pair] = []
    greedy = greedy_params(options)
    for rank, turn in enumerate(outputs.turns):
        ours, plain = outputs.greedy_on[rank], outputs.greedy_off[rank]
        theirs = outputs.transformers[rank]
        samples = outputs.sampled_on[rank], outputs.sampled_off[rank]
        pairs += [
            Pair("greedy_vs_transformers", turn, (ours, theirs), greedy),
            Pair("greedy_on_vs_off", turn, (ours, plain), greedy),
            Pair("sampled_on_vs_off", turn, samples, sampled_params(options, rank)),
        ]
    return pairs


def run(options: BenchOptions) -> Outcome:
    """Produce the outputs and compare them; in float32 unless the options name another type.

    Raises:
        BenchError: If the prompts are wrong.
        EuryaleError: If the engine cannot be built or refuses a request.
    """
    workload = load_workload(options)
    dtype = "float32" if options.dtype == "auto" else options.dtype
    engine = build_engine(engine_config(options, tree="auto", dtype=dtype))
    reference = ReferenceModel(engine.loaded)
    outputs, skipped = produce(engine, reference, workload, options)
    result = summarise(make_pairs(outputs, options), Judge(reference))
    return Outcome(
        result=result,
        device=engine.loaded.device,
        dtype=engine.loaded.dtype,
        extra={**describe_engine(engine), **workload.describe(skipped)},
        passed=result.num_unexplained == 0,
    )
