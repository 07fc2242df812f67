import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from heads.medusa import MedusaConfig, MedusaHeads
from server.model.loading import LoadedModel
from tests.training.corpora import corpus
from training.data.batches import BatchPlan
from training.data.dataset import Corpus
from training.errors import DivergedError, RunError
from training.loop.early_stopping import NoValidation, Validation
from training.loop.metrics import read_metrics
from training.loop.objective import ParameterGroup, Trainable
from training.loop.processes import Processes
from training.loop.run_state import STATE_FILE, RunRecord
from training.loop.trackers import NO_TRACKING, Tracking
from training.loop.trainer import StepMetrics, TrainConfig, Trainer
from training.methods.medusa_objective import MedusaObjective, medusa_groups
from training.states.examples import Examples, ExampleSource
from training.states.hidden_states import HiddenStateEncoder

pytestmark = pytest.mark.slow

CONFIG = TrainConfig(epochs=3, save_interval=4, log_interval=2)
OPTIONS: dict[str, object] = {"model": "tiny"}
# What no two runs have in common.
MEASURED = {"examples_per_s", "peak_memory_bytes"}


class Killed(Exception):
    """Stands for the process being killed."""


def make_heads(loaded: LoadedModel) -> MedusaHeads:
    config = MedusaConfig(loaded.hidden_size, loaded.vocab_size, num_heads=2)
    return MedusaHeads(config, loaded.unembedding(), loaded.input_embedding())


def make_trainer(
    loaded: LoadedModel,
    encoder: HiddenStateEncoder,
    directory: Path,
    config: TrainConfig = CONFIG,
    is_cached: bool = True,
    documents: Corpus | None = None,
    root_rate_factor: float = 16.0,
    options: dict[str, object] = OPTIONS,
    learning_rate: float = 0.01,
    tracking: Tracking = NO_TRACKING,
    validation_of: Callable[[MedusaHeads], Validation] = lambda _: NoValidation(),
) -> Trainer[Examples]:
    plan = BatchPlan(16, 0, is_cached, group_size=4)
    heads = make_heads(loaded)
    trainable = Trainable(
        heads,
        medusa_groups(heads, root_rate_factor),
        ExampleSource(documents or corpus(9), encoder, 2, plan),
        MedusaObjective(heads, torch.float32),
        learning_rate,
    )
    record = RunRecord(directory, options, tracking)
    return Trainer(trainable, config, record, Processes("cpu"), validation_of(heads))


def weights(trainer: Trainer[Examples]) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in trainer.module.parameters()]


def train_until(trainer: Trainer[Examples], last_step: int) -> None:
    def stop(metrics: StepMetrics) -> None:
        if metrics.step == last_step:
            raise Killed

    with pytest.raises(Killed):
        trainer.train(stop)


def test_training_learns_the_answers_by_heart(
    loaded: LoadedModel, encoder: HiddenStateEncoder, tmp_path: Path
) -> None:
    config = replace(CONFIG, epochs=80)
    trainer = make_trainer(loaded, encoder, tmp_path, config, documents=corpus(3))
    seen: list[StepMetrics] = []
    trainer.train(seen.append)
    first, last = seen[0].loss_per_head, seen[-1].loss_per_head
    assert all(after < 0.3 * before for before, after in zip(first, last, strict=True))


@pytest.mark.parametrize("is_cached", [True, False])
@pytest.mark.parametrize("killed_at", [1, 4, 7, 12])
def test_a_killed_run_ends_with_the_weights_of_one_that_was_not(
    loaded: LoadedModel,
    encoder: HiddenStateEncoder,
    tmp_path: Path,
    killed_at: int,
    is_cached: bool,
) -> None:
    whole = make_trainer(loaded, encoder, tmp_path / "whole", is_cached=is_cached)
    whole.train(lambda _: None)
    first = make_trainer(loaded, encoder, tmp_path / "killed", is_cached=is_cached)
    train_until(first, killed_at)
    second = make_trainer(loaded, encoder, tmp_path / "killed", is_cached=is_cached)
    assert second.resume() == (killed_at > CONFIG.save_interval)
    second.train(lambda _: None)
    assert all(map(torch.equal, weights(second), weights(whole)))
    logged = [
        [{k: v for k, v in line.items() if k not in MEASURED} for line in read_metrics(path)]
        for path in (tmp_path / "killed", tmp_path / "whole")
    ]
    assert logged[0] == logged[1]


def test_a_finished_run_that_is_resumed_trains_no_step(
    loaded: LoadedModel, encoder: HiddenStateEncoder, tmp_path: Path
) -> None:
    make_trainer(loaded, encoder, tmp_path).train(lambda _: None)
    again = make_trainer(loaded, encoder, tmp_path)
    assert again.resume()
    assert again.step == again.num_steps
    again.train(lambda _: pytest.fail("a step was taken"))


def test_a_run_with_other_options_is_not_resumed(
    loaded: LoadedModel, encoder: HiddenStateEncoder, tmp_path: Path
) -> None:
    make_trainer(loaded, encoder, tmp_path).train(lambda _: None)
    other = make_trainer(loaded, encoder, tmp_path, options={"model": "other"})
    with pytest.raises(RunError, match="model 'tiny', but now it is 'other'"):
        other.resume()


def test_the_learning_rate_rises_and_falls_to_nothing(
    loaded: LoadedModel, encoder: HiddenStateEncoder, tmp_path: Path
) -> None:
    config = replace(CONFIG, epochs=20, warmup_fraction=0.25)
    trainer = make_trainer(loaded, encoder, tmp_path, config, learning_rate=0.5)
    rates = [trainer.learning_rate(step) for step in range(trainer.num_steps)]
    peak = rates.index(max(rates))
    assert max(rates) == 0.5
    assert peak == pytest.approx(0.25 * len(rates), abs=1.5)
    assert rates[:peak] == sorted(rates[:peak])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert rates[-1] < 0.005


@pytest.mark.parametrize("is_bad_from_the_start", [True, False])
def test_a_loss_that_is_no_number_stops_the_run_and_keeps_the_last_good_state(
    loaded: LoadedModel,
    encoder: HiddenStateEncoder,
    tmp_path: Path,
    is_bad_from_the_start: bool,
) -> None:
    trainer = make_trainer(loaded, encoder, tmp_path)
    bad_step = 1 if is_bad_from_the_start else 6

    def spoil(metrics: StepMetrics) -> None:
        if metrics.step == bad_step - 1:
            with torch.no_grad():
                next(trainer.module.parameters()).fill_(math.nan)

    spoil(StepMetrics(0, 0, 0.0, [], 0.0, 0.0, 0, 0.0))
    with pytest.raises(DivergedError, match=rf"step {bad_step}: the loss is nan .*0\.01"):
        trainer.train(spoil)
    assert (tmp_path / STATE_FILE).exists() == (not is_bad_from_the_start)
    resumed = make_trainer(loaded, encoder, tmp_path)
    resumed.resume()
    assert all(bool(weight.isfinite().all()) for weight in weights(resumed))


def test_the_base_model_is_left_as_it_was(
    loaded: LoadedModel, encoder: HiddenStateEncoder, tmp_path: Path
) -> None:
    before = {name: value.clone() for name, value in loaded.model.named_parameters()}
    make_trainer(loaded, encoder, tmp_path).train(lambda _: None)
    for name, value in loaded.model.named_parameters():
        assert torch.equal(value, before[name])
        assert value.grad is None


def test_discarding_the_state_leaves_the_metrics(
    loaded: LoadedModel, encoder: HiddenStateEncoder, tmp_path: Path
) -> None:
    trainer = make_trainer(loaded, encoder, tmp_path)
    trainer.train(lambda _: None)
    trainer.discard_state()
    trainer.discard_state()
    assert not (tmp_path / STATE_FILE).exists()
    steps = [line["step"] for line in read_metrics(tmp_path)]
    assert steps == sorted({*range(2, trainer.num_steps, 2), trainer.num_steps})


def test_the_maps_of_the_root_embedding_learn_faster_by_their_factor(
    loaded: LoadedModel, encoder: HiddenStateEncoder, tmp_path: Path
) -> None:
    # The first step of AdamW moves every weight by the learning rate.
    config = replace(CONFIG, warmup_fraction=0.0)
    trainer = make_trainer(
        loaded, encoder, tmp_path, config, root_rate_factor=7.0, learning_rate=0.01
    )
    train_until(trainer, 1)
    moved = float(trainer.module.get_parameter("root_weights").detach().abs().max())
    assert moved == pytest.approx(7.0 * 0.01, rel=0.01)
    others = float(trainer.module.get_parameter("layer_weights").detach().abs().max())
    assert others == pytest.approx(0.01, rel=0.01)


@pytest.mark.parametrize("limit", [0.01, math.inf])
def test_gradients_are_clipped_to_the_norm_and_not_at_all_without_one(
    limit: float, loaded: LoadedModel, encoder: HiddenStateEncoder, tmp_path: Path
) -> None:
    trainer = make_trainer(loaded, encoder, tmp_path, replace(CONFIG, max_grad_norm=limit))
    found: list[float] = []
    trainer.train(lambda metrics: found.append(metrics.gradient_norm))
    gradients = [p.grad for p in trainer.module.parameters() if p.grad is not None]
    norm = math.sqrt(sum(float(gradient.square().sum()) for gradient in gradients))
    assert found[-1] > 0.01
    assert norm == pytest.approx(min(found[-1], limit), rel=1e-3)


class Stored:
    """Examples of two depths: labels, and losses, [examples, depths]."""

    def __init__(self, labels: torch.Tensor, losses: torch.Tensor) -> None:
        self.labels, self.losses = labels, losses

    def __len__(self) -> int:
        return len(self.labels)

    def divide(self, num_parts: int) -> list["Stored"]:
        columns = self.labels.tensor_split(num_parts), self.losses.tensor_split(num_parts)
        return [Stored(*part) for part in zip(*columns, strict=True)]


class StoredLosses:
    """An objective that knows its answer."""

    def __init__(self, weight: torch.nn.Parameter) -> None:
        self.weight = weight

    def num_labels(self, batch: Stored) -> torch.Tensor:
        return batch.labels.sum(dim=0)

    def __call__(self, batch: Stored) -> torch.Tensor:
        assert len(batch)
        return batch.losses.sum(dim=0) * self.weight[0]


class OneBatch:
    def __init__(self, batch: Stored) -> None:
        self.batch = batch

    def num_batches(self, epoch: int) -> int:
        return 1

    def batches(self, epoch: int, first: int = 0) -> Iterator[Stored]:
        yield self.batch


# With more parts than examples some parts are empty.
@pytest.mark.parametrize("gradient_accumulation", [1, 2, 3, 7])
@pytest.mark.parametrize("has_second", [True, False])
def test_each_depths_sum_is_divided_by_its_labels_then_weighted(
    has_second: bool, gradient_accumulation: int, tmp_path: Path
) -> None:
    module = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.ones_(module.weight)
    labels = torch.tensor([[1, 1], [1, 0], [1, 1], [1, 0]])
    losses = torch.tensor([[1.0, 2.0], [2.0, 0.0], [4.0, 4.0], [1.0, 0.0]])
    mask = torch.tensor([1, int(has_second)])
    weight = module.get_parameter("weight")
    trainable = Trainable(
        module,
        (ParameterGroup((weight,)),),
        OneBatch(Stored(labels * mask, losses * mask)),
        StoredLosses(weight),
        0.002,
    )
    config = TrainConfig(
        epochs=1,
        head_decay=0.5,
        warmup_fraction=0.0,
        gradient_accumulation=gradient_accumulation,
    )
    found: list[StepMetrics] = []
    record = RunRecord(tmp_path, {})
    Trainer(trainable, config, record, Processes("cpu"), NoValidation()).train(found.append)
    expected = [2.0, 3.0 if has_second else 0.0]
    assert found[0].loss_per_head == expected
    assert found[0].loss == expected[0] + 0.5 * expected[1]
    assert found[0].gradient_norm == pytest.approx(found[0].loss)
    assert found[0].num_examples == 4


class WithFurther:
    """A Medusa objective with a loss of its own behind those of the heads."""

    def __init__(self, heads: MedusaHeads, further: float) -> None:
        self._of_heads = MedusaObjective(heads, torch.float32)
        self._further = further

    def num_labels(self, batch: Examples) -> torch.Tensor:
        num_labels_K = self._of_heads.num_labels(batch)
        return torch.cat((num_labels_K, num_labels_K.new_tensor([4])))

    def __call__(self, batch: Examples) -> torch.Tensor:
        losses_K = self._of_heads(batch)
        return torch.cat((losses_K, losses_K.new_tensor([4 * self._further])))


def test_further_losses_are_weighed_and_reported_after_those_of_the_depths(
    loaded: LoadedModel, encoder: HiddenStateEncoder, tmp_path: Path
) -> None:
    plan, heads = BatchPlan(16, 0), make_heads(loaded)
    source = ExampleSource(corpus(9), encoder, 2, plan)
    found: list[StepMetrics] = []
    for name in ("with", "without"):
        objective = (
            WithFurther(heads, 0.25) if name == "with" else MedusaObjective(heads, torch.float32)
        )
        further = {"divergence": 3.0} if name == "with" else {}
        trainable = Trainable(heads, medusa_groups(heads, 1.0), source, objective, 0.0, further)
        config = replace(CONFIG, epochs=1, log_interval=1)
        processes, never = Processes("cpu"), NoValidation()
        trainer = Trainer(trainable, config, RunRecord(tmp_path / name, OPTIONS), processes, never)
        trainer.train(found.append)
    ours, plain = found[0], found[len(found) // 2]
    assert ours.loss == pytest.approx(plain.loss + 3.0 * 0.25)
    assert ours.loss_per_head == plain.loss_per_head
    assert (ours.further_losses, plain.further_losses) == ({"divergence": 0.25}, {})
    assert read_metrics(tmp_path / "with")[0]["further_losses"] == {"divergence": 0.25}
