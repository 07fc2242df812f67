"""`overhead`: where a verify step's time goes at batch 1, above all outside the model.

The parts are timed by wrappers around the engine's own functions; the engine runs unchanged. A
part's time excludes the parts inside it, and `other` is what no part covers.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from statistics import median
from unittest.mock import patch

import server.engine.engine as engine_module
from bench.benches.setup import PromptOptions, common_settings, prepare
from bench.errors import BenchError
from bench.measure.report import Outcome
from bench.measure.stopwatch import Stopwatch, device_waiter
from server.cli.console import progress_bar
from server.cli.options import Command
from server.config import EngineConfig, SpeculationParams
from server.core.request import Request
from server.engine.engine import Engine

FORWARD, DRAFT, OTHER = "forward", "draft", "other"
_ENGINE_FUNCTIONS = {"build_batch": "batch", "verify": "verify", "emit": "emit"}
_ENGINE_METHODS = {
    "_compact": "compact",
    "_advance": "advance",
    "_propose": "propose",
    "_count": "count",
    "_outputs": "outputs",
}


@dataclass(frozen=True, slots=True)
class StepLap:
    """One verify step: its wall seconds, and its parts' seconds with `other` completing them."""

    step_s: float
    parts_s: dict[str, float]


@dataclass(frozen=True, slots=True)
class OverheadResult:
    """What the bench reports; shares are of the summed seconds of all timed steps.

    Attributes:
        overhead_share: Everything but the model's forward pass and the draft heads.
        draft_share: The draft heads' own computation.
        forward_share: The model's forward pass, our attention included.
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


@contextmanager
def instrumented(engine: Engine, stopwatch: Stopwatch) -> Iterator[None]:
    """Time the parts of `engine.step` for as long as the context lasts."""
    with ExitStack() as stack:

        def wrap(owner: object, attribute: str, part: str, on_device: bool = False) -> None:
            function = getattr(owner, attribute)
            timed = stopwatch.timed(part, function, on_device)
            stack.enter_context(patch.object(owner, attribute, timed))

        for attribute, part in _ENGINE_FUNCTIONS.items():
            wrap(engine_module, attribute, part)
        for attribute, part in _ENGINE_METHODS.items():
            wrap(engine, attribute, part)
        wrap(engine._scheduler, "schedule", "schedule")
        wrap(engine._runner, "run", "prepare")
        wrap(engine.loaded.model, "forward", FORWARD, on_device=True)
        if engine.speculator.drafter is not None:
            wrap(engine.speculator.drafter, "propose", DRAFT, on_device=True)
        yield


def time_steps(engine: Engine, stopwatch: Stopwatch, request: Request) -> list[StepLap]:
    """Run one request on an idle, instrumented engine; one lap for each verify step."""
    laps: list[StepLap] = []
    engine.add_request(request)
    while engine.has_unfinished:
        stopwatch.lap()
        with stopwatch.part(OTHER):
            outputs = engine.step()
        parts_s = stopwatch.lap()
        if outputs and outputs[-1].is_verify_step:
            laps.append(StepLap(sum(parts_s.values()), parts_s))
    return laps


def run(prompts: PromptOptions, config: EngineConfig, speculation: SpeculationParams) -> Outcome:
    """Answer the first turn of each prompt with every part timed.

    Raises:
        BenchError: If no prompt fits the context, or no output is long enough for a verify step.
        EuryaleError: If the prompts are wrong, or the engine cannot be built or rejects a request.
    """
    setup = prepare(prompts, config, speculation)
    engine = setup.engine
    turns, skipped = setup.first_turns()
    requests = [turn.request(setup.greedy, setup.speculation) for turn in turns]
    stopwatch = Stopwatch(device_waiter(engine.loaded.device))
    laps: list[StepLap] = []
    with progress_bar("overhead", len(requests)) as bar, instrumented(engine, stopwatch):
        time_steps(engine, stopwatch, requests[0])  # not counted: everything runs once first
        for request in requests:
            laps += time_steps(engine, stopwatch, request)
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
