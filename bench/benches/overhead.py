"""`overhead`: where a verify step's time goes at batch 1, above all outside the model.

Parts are the stages of the engine's own `StepTrace`; `other` is what no stage covers. One call of
`Engine.step` lands a step and launches the next, so its parts are of both.
"""

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from bench.benches.setup import PromptOptions, common_settings, prepare
from bench.errors import BenchError
from bench.measure.report import Outcome
from server.cli.console import progress_bar
from server.cli.options import Command
from server.config import EngineConfig, SpeculationParams
from server.core.request import Request
from server.engine.engine import Engine

FORWARD, DRAFT, OTHER = "forward", "draft", "other"


@dataclass(frozen=True, slots=True)
class StepLap:
    """One verify step: its wall seconds, and its parts' seconds with `other` completing them."""

    step_s: float
    parts_s: dict[str, float]


@dataclass(frozen=True, slots=True)
class OverheadResult:
    """What the bench reports; shares are of the summed seconds of all timed steps.

    Attributes:
        overhead_share: Share of everything but the model's forward pass and the draft heads.
        draft_share: Share of the draft heads' own computation.
        forward_share: Share of the model's forward pass, our attention included.
        step_ms: Mean wall time of a verify step.
        parts_ms: Mean milliseconds of each part, largest first.
        parts_share: Share of each part.
    """

    overhead_share: float
    draft_share: float
    forward_share: float
    step_ms: float
    median_step_ms: float
    parts_ms: dict[str, float]
    parts_share: dict[str, float]
    num_steps: int


def summarise(laps: Sequence[StepLap]) -> OverheadResult:
    """Pool the steps, of which there is at least one."""
    total_s = sum(lap.step_s for lap in laps)
    sums: Counter[str] = Counter()
    for lap in laps:
        sums.update(lap.parts_s)
    parts_s = dict(sums.most_common())
    shares = {name: seconds / total_s for name, seconds in parts_s.items()}
    forward, draft = shares.get(FORWARD, 0.0), shares.get(DRAFT, 0.0)
    return OverheadResult(
        overhead_share=1.0 - forward - draft,
        draft_share=draft,
        forward_share=forward,
        step_ms=total_s / len(laps) * 1e3,
        median_step_ms=median(lap.step_s for lap in laps) * 1e3,
        parts_ms={name: seconds / len(laps) * 1e3 for name, seconds in parts_s.items()},
        parts_share=shares,
        num_steps=len(laps),
    )


def time_steps(engine: Engine, request: Request) -> list[StepLap]:
    """Run one request on an idle engine; one lap for each verify step."""
    trace = engine.trace
    laps: list[StepLap] = []
    engine.add_request(request)
    while engine.has_unfinished:
        trace.clear()
        start = time.perf_counter()
        outputs = engine.step()
        step_s = time.perf_counter() - start
        if outputs and outputs[-1].is_verify_step:
            parts_s = dict(trace.stage_s)
            parts_s[OTHER] = step_s - sum(parts_s.values())
            laps.append(StepLap(step_s, parts_s))
    return laps


def run(prompts: PromptOptions, config: EngineConfig, speculation: SpeculationParams) -> Outcome:
    """Answer the first turn of each prompt with every part timed.

    Raises:
        BenchError: If no prompt fits the context, or no output is long enough for a verify step.
        EuryaleError: If the prompts are wrong, or the engine cannot be built or rejects a request.
    """
    setup = prepare(prompts, config, speculation)
    turns, skipped = setup.first_turns()
    requests = [turn.request(setup.greedy, setup.speculation) for turn in turns]
    laps: list[StepLap] = []
    with progress_bar("overhead", len(requests)) as bar:
        time_steps(setup.engine, requests[0])  # not counted: everything runs once first
        for request in requests:
            laps += time_steps(setup.engine, request)
            bar.advance()
    if not laps:
        raise BenchError("no output had a verify step; give a larger --max-new-tokens")
    return setup.outcome(summarise(laps), skipped)


COMMAND = Command(
    "overhead",
    "Share of a step that the engine spends outside the model.",
    run,
    common_settings(),
)
