from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from heads.medusa import MedusaHeads
from server.model.loading import LoadedModel
from tests.training.corpora import corpus
from tests.training.loop.test_trainer import (
    CONFIG,
    MEASURED,
    make_trainer,
    train_until,
    weights,
)
from training.data.dataset import Corpus
from training.loop.early_stopping import EarlyStopping, NoValidation, StoppingPlan
from training.loop.metrics import read_metrics
from training.loop.processes import Processes
from training.loop.trainer import Trainer
from training.measure.validation import acceptance_length
from training.methods.drafts import MedusaDrafts
from training.states.examples import Examples
from training.states.hidden_states import HiddenStateEncoder

PLAN = StoppingPlan(interval=3, patience=2)


class Script:
    """A module with given measurements, whose one weight is the number of the step."""

    def __init__(self, lengths: Sequence[float], plan: StoppingPlan = PLAN) -> None:
        self.module = torch.nn.Linear(1, 1, bias=False)
        self.lengths = list(lengths)
        self.modes: list[bool] = []
        self.validation = EarlyStopping(self.module, self.measure, plan, Processes("cpu"))

    def measure(self) -> float:
        self.modes.append(self.module.training)
        return self.lengths.pop(0)

    def run(self, last_step: int, first_step: int = 1) -> list[tuple[int, dict[str, float]]]:
        """Take steps until it is over; what was found after which of them."""
        self.module.train()
        found = []
        for step in range(first_step, last_step + 1):
            self.set(step)
            after = self.validation.after_step(step, step == last_step)
            if after:
                found.append((step, after))
            if self.validation.is_over(step):
                break
        return found

    def set(self, value: float) -> None:
        torch.nn.init.constant_(self.module.weight, value)


def lengths_of(found: list[tuple[int, dict[str, float]]]) -> dict[int, float]:
    return {step: after["mean_acceptance_length"] for step, after in found}


def test_a_module_is_measured_at_intervals_and_after_the_last_step() -> None:
    script = Script([1.1, 1.2, 1.3])
    assert lengths_of(script.run(last_step=8)) == {3: 1.1, 6: 1.2, 8: 1.3}
    assert script.modes == [False] * 3
    assert script.module.training


def test_a_run_is_over_when_so_many_measurements_brought_nothing_better() -> None:
    # As good is not better.
    script = Script([1.1, 1.4, 1.3, 1.4, 9.0])
    assert list(lengths_of(script.run(last_step=30))) == [3, 6, 9, 12]
    best = script.validation.best
    assert best is not None
    assert (best.step, best.length) == (6, 1.4)
    script.validation.finish()
    assert script.module.weight.item() == 6.0


def test_a_better_measurement_gives_a_run_its_patience_back() -> None:
    script = Script([1.1, 1.0, 1.2, 1.1, 1.3, 1.2, 1.2])
    assert list(lengths_of(script.run(last_step=30))) == [3, 6, 9, 12, 15, 18, 21]
    script.validation.finish()
    assert script.module.weight.item() == 15.0


def test_a_run_that_gets_better_to_its_end_keeps_its_last_weights() -> None:
    script = Script([1.1, 1.2, 1.3])
    script.run(last_step=7)
    script.validation.finish()
    assert script.module.weight.item() == 7.0


def test_the_best_weights_do_not_change_with_the_modules() -> None:
    script = Script([1.1, 1.0])
    script.run(last_step=5)
    best = script.validation.best
    assert best is not None
    assert float(best.weights["weight"]) == 3.0


def test_without_validation_nothing_is_measured_and_nothing_ends() -> None:
    never = NoValidation()
    assert never.after_step(1, is_last=True) == {}
    assert not never.is_over(10**9)
    never.finish()
    assert never.best is None


HELD_OUT = Corpus(corpus(12).documents[9:])


def measured_trainer(
    loaded: LoadedModel, encoder: HiddenStateEncoder, directory: Path, plan: StoppingPlan = PLAN
) -> Trainer[Examples]:
    """Its heads are measured in earnest."""

    def validation_of(heads: MedusaHeads) -> EarlyStopping:
        drafts = MedusaDrafts(encoder, heads)
        measure = partial(acceptance_length, HELD_OUT, drafts)
        return EarlyStopping(heads, measure, plan, Processes("cpu"))

    config = replace(CONFIG, epochs=30, save_interval=5)
    return make_trainer(
        loaded, encoder, directory, config, validation_of=validation_of, learning_rate=0.05
    )


def lines(directory: Path) -> list[dict[str, Any]]:
    return [
        {key: value for key, value in line.items() if key not in MEASURED}
        for line in read_metrics(directory)
    ]


def test_a_trainer_stops_early_with_its_best_weights(
    loaded: LoadedModel, encoder: HiddenStateEncoder, tmp_path: Path
) -> None:
    trainer = measured_trainer(loaded, encoder, tmp_path)
    kept: dict[int, list[torch.Tensor]] = {}
    trainer.train(lambda metrics: kept.update({metrics.step: weights(trainer)}))
    assert trainer.step < trainer.num_steps
    found = {line["step"]: line["validation"] for line in lines(tmp_path) if line["validation"]}
    assert list(found) == list(range(3, trainer.step + 1, 3))
    best_step = max(found, key=lambda step: found[step]["mean_acceptance_length"])
    assert best_step == trainer.step - PLAN.patience * PLAN.interval
    assert all(map(torch.equal, weights(trainer), kept[best_step]))


@pytest.mark.parametrize("killed_at", [4, 6, 8, 100])
def test_a_killed_run_stops_where_it_would_have_and_with_the_same_weights(
    loaded: LoadedModel, encoder: HiddenStateEncoder, tmp_path: Path, killed_at: int
) -> None:
    whole = measured_trainer(loaded, encoder, tmp_path / "whole")
    whole.train(lambda _: None)
    first = measured_trainer(loaded, encoder, tmp_path / "killed")
    # The last one is killed when it is over, before anything is made of it.
    if killed_at <= whole.step:
        train_until(first, killed_at)
    else:
        first.train(lambda _: None)
    second = measured_trainer(loaded, encoder, tmp_path / "killed")
    assert second.resume() == (killed_at > 5)
    second.train(lambda _: None)
    assert second.step == whole.step
    assert all(map(torch.equal, weights(second), weights(whole)))
    assert lines(tmp_path / "killed") == lines(tmp_path / "whole")
