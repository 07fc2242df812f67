"""Interleaved rounds of load: at each load both arms answer the same requests, one after the other.

The *arms* are `auto`, speculation as the options ask for it, and `off`, plain decoding, on the same
engine. Which one begins alternates from round to round.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from bench.errors import BenchError
from bench.load.loops import Answer, Ask, LoadFigures, closed_loop, load_figures, open_loop
from bench.load.targets import Target
from bench.workload.dialogues import Turn
from server.cli.options import Between, Count
from server.config import SpeculationParams
from server.speculation.tree_sizes import Foresight

Arm = Literal["auto", "off"]
_ARMS: tuple[Arm, ...] = ("auto", "off")
_LEAST_REQUESTS = 8
_OPEN_REQUESTS = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadPlan:
    """The load.

    Attributes:
        concurrency: Numbers of clients, each of a closed loop of its own.
        rate: Requests per second of an open loop, which runs too if this is given.
        rounds: Counted rounds.
        requests_per_round: Requests of each loop in a round; twice the clients and at least 8 if
            not given, 32 for the open loop.
        seconds_per_round: Seconds after which a closed loop begins no further request; no limit if
            not given.
        seed: Seed of the order of the prompts, their longest outputs and the open loop's times.

    Raises:
        BenchError: If a number of clients is given twice.
    """

    concurrency: tuple[Count, ...] = (1, 2, 4, 8, 16, 32, 64)
    rate: Annotated[float, Between(0.0, excludes_low=True)] | None = None
    rounds: Count = 5
    requests_per_round: Count | None = None
    seconds_per_round: Annotated[float, Between(0.0, excludes_low=True)] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if len(set(self.concurrency)) < len(self.concurrency):
            counts = ",".join(map(str, self.concurrency))
            raise BenchError(f"--concurrency {counts} names a count twice; give each once")


@dataclass(frozen=True, slots=True)
class Closed:
    """A closed loop of so many clients."""

    concurrency: int


@dataclass(frozen=True, slots=True)
class Open:
    """An open loop of so many requests per second."""

    rate: float


Level = Closed | Open


@dataclass(frozen=True, slots=True)
class ArmRun:
    """One arm's share of a round.

    Attributes:
        figures: What the clients saw.
        foresight: How well the planner predicted this run's steps; None if nothing is planned.
    """

    figures: LoadFigures
    foresight: Foresight | None


@dataclass(frozen=True, slots=True)
class RoundPair:
    """Both arms' runs of the same requests."""

    level: Level
    auto: ArmRun
    off: ArmRun


def levels(plan: LoadPlan) -> tuple[Level, ...]:
    """The loads of a round, in order."""
    closed = tuple(Closed(concurrency) for concurrency in plan.concurrency)
    return closed if plan.rate is None else (*closed, Open(plan.rate))


def num_requests(level: Level, plan: LoadPlan) -> int:
    """Requests of a load in a round."""
    if plan.requests_per_round is not None:
        return plan.requests_per_round
    return (
        _OPEN_REQUESTS if isinstance(level, Open) else max(_LEAST_REQUESTS, 2 * level.concurrency)
    )


def num_runs(plan: LoadPlan) -> int:
    """Runs of arms in all, those that warm up included."""
    return (plan.rounds + 1) * len(levels(plan)) * len(_ARMS)


class Draws:
    """Draws requests: each prompt once, in random order, then all again.

    The longest outputs are drawn between a quarter of `max_new_tokens` and all of it.
    """

    def __init__(self, turns: Sequence[Turn], max_new_tokens: int, seed: int) -> None:
        self._turns = turns
        self._max_new_tokens = max_new_tokens
        self._random = random.Random(seed)
        self._deck: list[Turn] = []

    def draw(self, count: int) -> list[Ask]:
        """The next requests."""
        least = max(1, self._max_new_tokens // 4)
        asks = []
        for _ in range(count):
            if not self._deck:
                self._deck = self._random.sample(self._turns, len(self._turns))
            max_tokens = self._random.randint(least, self._max_new_tokens)
            asks.append(Ask(self._deck.pop(), max_tokens))
        return asks


class LoadRounds:
    """Runs the rounds.

    Args:
        target: Answers requests.
        draws: Where requests come from.
        arms: Both arms' speculation.
        plan: Loads and rounds.
        foresight: How well the planner of the engine that answers predicted its steps until now;
            None if nothing is planned.
    """

    def __init__(
        self,
        target: Target,
        draws: Draws,
        arms: Mapping[Arm, SpeculationParams],
        plan: LoadPlan,
        foresight: Callable[[], Foresight | None],
    ) -> None:
        self._target = target
        self._draws = draws
        self._arms = arms
        self._plan = plan
        self._foresight = foresight

    async def run(self, on_pair: Callable[[RoundPair], None], on_run: Callable[[], None]) -> None:
        """Run all rounds, the first of which warms up and is not counted.

        Args:
            on_pair: Called with each counted pair as soon as it is complete.
            on_run: Called after each arm's run.
        """
        for number in range(self._plan.rounds + 1):
            for level in levels(self._plan):
                pair = await self._pair(level, number, on_run)
                if number:
                    on_pair(pair)

    async def _pair(self, level: Level, number: int, on_run: Callable[[], None]) -> RoundPair:
        asks = self._draws.draw(num_requests(level, self._plan))
        max_seconds = self._plan.seconds_per_round
        runs: dict[Arm, ArmRun] = {}
        for arm in _ARMS if number % 2 else _ARMS[::-1]:
            before = self._foresight()
            answers = await self._load(level, arm, asks, number, max_seconds)
            runs[arm] = ArmRun(load_figures(answers), _since(before, self._foresight()))
            # The second arm gets exactly what the first one began in its time.
            asks, max_seconds = asks[: len(answers)], None
            on_run()
        return RoundPair(level, runs["auto"], runs["off"])

    async def _load(
        self, level: Level, arm: Arm, asks: Sequence[Ask], number: int, max_seconds: float | None
    ) -> list[Answer]:
        async def send(ask: Ask) -> Answer:
            return await self._target.answer(ask, self._arms[arm])

        if isinstance(level, Closed):
            return await closed_loop(send, asks, level.concurrency, max_seconds)
        return await open_loop(send, asks, level.rate, seed=self._plan.seed + number)


def _since(before: Foresight | None, after: Foresight | None) -> Foresight | None:
    if before is None or after is None:
        return None
    return Foresight(
        num_tokens=after.num_tokens - before.num_tokens,
        seconds=after.seconds - before.seconds,
        measured_tokens=after.measured_tokens - before.measured_tokens,
        measured_seconds=after.measured_seconds - before.measured_seconds,
    )
