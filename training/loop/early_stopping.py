"""Ends a run when its module no longer gets better on held-out answers, and keeps the best weights.

A trainer asks a `Validation` after each step and knows no more of it; what it found is part of the
run's state, so that a run that was killed ends as one that was not.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from training.loop.processes import Processes
from training.loop.run_state import Best

LENGTH = "mean_acceptance_length"


class Validation(Protocol):
    """What a trainer asks after each step.

    Attributes:
        best: What was best so far; set when a run is taken up.
    """

    best: Best | None

    def after_step(self, step: int, is_last: bool) -> dict[str, float]:
        """Measure the module if it is time to; returns what was found, for the metrics."""

    def is_over(self, step: int) -> bool:
        """Whether the run ends after a step, measured or not."""

    def finish(self) -> None:
        """Give the module the weights that it is to end with."""


class NoValidation:
    """Never measures and never ends a run."""

    def __init__(self) -> None:
        self.best: Best | None = None

    def after_step(self, step: int, is_last: bool) -> dict[str, float]:
        """See `Validation.after_step`."""
        return {}

    def is_over(self, step: int) -> bool:
        """See `Validation.is_over`."""
        return False

    def finish(self) -> None:
        """See `Validation.finish`."""


@dataclass(frozen=True, slots=True)
class StoppingPlan:
    """When a module is measured, and how often it may be none the better.

    Attributes:
        interval: Steps between two measurements; the last step of a run has one too.
        patience: A run ends when so many measurements in a row brought nothing better.
    """

    interval: int
    patience: int


class EarlyStopping:
    """Measures at intervals; see `Validation`.

    Args:
        module: That is trained.
        measure: Returns the mean acceptance length of what the module drafts now. Called on the
            first process alone, whose word counts for all.
        plan: When.
        processes: Of the run.
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

    def after_step(self, step: int, is_last: bool) -> dict[str, float]:
        """See `Validation.after_step`."""
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

    def is_over(self, step: int) -> bool:
        """See `Validation.is_over`."""
        if self.best is None:
            return False
        return step - self.best.step >= self._plan.patience * self._plan.interval

    @torch.no_grad()
    def finish(self) -> None:
        """See `Validation.finish`."""
        if self.best is not None:
            for name, parameter in self._module.named_parameters():
                parameter.copy_(self.best.weights[name])
