"""Ends a run when its module no longer gets better on held-out answers, and keeps the best weights.

A trainer asks a `Validation` after each step and knows nothing else of it; its best measurement is
part of the run's state, so that a run that was killed ends as one that was not.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn
from typing_extensions import override

from training.loop.processes import Processes
from training.loop.run_state import Best

LENGTH = "mean_acceptance_length"


class Validation(Protocol):
    """What a trainer asks after each step.

    Attributes:
        best: Best measurement so far; set when a run is resumed.
    """

    best: Best | None

    def after_step(self, step: int, is_last: bool) -> dict[str, float]:
        """Measure the module if it is due; returns what was found, for the metrics."""

    def is_over(self, step: int) -> bool:
        """Whether the run ends after a step, measured or not."""

    def finish(self) -> None:
        """Give the module the weights that the run ends with."""


class NoValidation(Validation):
    """Never measures and never ends a run."""

    def __init__(self) -> None:
        self.best: Best | None = None

    @override
    def after_step(self, step: int, is_last: bool) -> dict[str, float]:
        return {}

    @override
    def is_over(self, step: int) -> bool:
        return False

    @override
    def finish(self) -> None:
        pass


@dataclass(frozen=True, slots=True)
class StoppingPlan:
    """When a module is measured, and when it is measured for the last time.

    Attributes:
        interval: Steps between two measurements; the last step of a run has one too.
        patience: A run ends after so many measurements in a row of which none was the best.
    """

    interval: int
    patience: int


class EarlyStopping(Validation):
    """Measures at intervals.

    Args:
        module: What is trained.
        measure: Returns the mean acceptance length of what the module drafts now. Called on the
            first process alone, whose result counts for all.
        plan: Says when to measure and when to end.
        processes: Those that train together.
    """

    def __init__(
        self,
        module: nn.Module,
        measure: Callable[[], float],
        plan: StoppingPlan,
        processes: Processes,
    ) -> None:
        self.best: Best | None = None
        self._module = module
        self._measure = measure
        self._plan = plan
        self._processes = processes

    @override
    def after_step(self, step: int, is_last: bool) -> dict[str, float]:
        if step % self._plan.interval and not is_last:
            return {}
        length = self._measured()
        if self.best is None or length > self.best.length:
            parameters = self._module.named_parameters()
            weights = {name: p.detach().to("cpu", copy=True) for name, p in parameters}
            self.best = Best(step, length, weights)
        return {LENGTH: length}

    def _measured(self) -> float:
        length = 0.0
        if self._processes.is_main:
            self._module.eval()
            length = self._measure()
            self._module.train()
        # Float64, so that all get what the first one has.
        shared = torch.tensor(length, dtype=torch.float64, device=self._processes.device)
        return float(self._processes.sum(shared))

    @override
    def is_over(self, step: int) -> bool:
        if self.best is None:
            return False
        return step - self.best.step >= self._plan.patience * self._plan.interval

    @override
    @torch.no_grad()
    def finish(self) -> None:
        if self.best is not None:
            for name, parameter in self._module.named_parameters():
                parameter.copy_(self.best.weights[name])
