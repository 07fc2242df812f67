"""Trains draft heads of any kind: AdamW, warm-up and cosine decay, resumable, by any processes.

A run that is killed and taken up again ends with the same weights as one that was not, on the same
machine with the same number of threads and processes. With another number of processes, or of
parts that a batch is taken in, it takes the same steps up to rounding: losses are divided by the
labels of whole batches.

Shape suffixes: K draft depths.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Generic

import torch
from torch import Tensor

from training.errors import DivergedError
from training.loop.early_stopping import Validation
from training.loop.metrics import MetricsLog, open_metrics
from training.loop.objective import Batch, Losses, Trainable
from training.loop.processes import Processes
from training.loop.run_state import STATE_FILE, Progress, load_state, save_state
from training.loop.usage import peak_cuda_memory_bytes, peak_memory_bytes


@dataclass(frozen=True, slots=True)
class TrainConfig:
    """How heads are trained.

    Attributes:
        epochs: Passes over the examples.
        learning_rate: At its peak.
        warmup_fraction: Share of the steps in which the learning rate rises from 0.
        weight_decay: Of AdamW.
        head_decay: Weight of a depth's loss relative to the one before it.
        clip_norm: Largest norm of the gradient.
        gradient_accumulation: Parts in which each process goes through its share of a batch.
        save_interval: Steps between two saved states.
        log_interval: Steps between two lines of metrics.
        tensorboard: Directory that gets the metrics too; None writes them to the run's alone.
    """

    epochs: int = 4
    learning_rate: float = 2e-3
    warmup_fraction: float = 0.03
    weight_decay: float = 0.0
    head_decay: float = 0.8
    clip_norm: float = 1.0
    gradient_accumulation: int = 1
    save_interval: int = 200
    log_interval: int = 10
    tensorboard: Path | None = None


@dataclass(frozen=True, slots=True)
class StepMetrics:
    """What a step brought.

    Attributes:
        step: From 1.
        loss: Weighted sum of all losses, in nats.
        loss_per_head: Each depth's mean loss, in nats; 0.0 for one without labels.
        gradient_norm: Before clipping.
        examples_per_s: Since this process began to train.
        peak_memory_bytes: Of this process; `peak_cuda_memory_bytes` of its device, 0 without CUDA.
        further_losses: Means of the trainable's further losses, in nats.
        validation: What was measured on held-out answers after this step, if anything was.
    """

    step: int
    epoch: int
    loss: float
    loss_per_head: list[float]
    learning_rate: float
    gradient_norm: float
    num_examples: int
    examples_per_s: float
    peak_memory_bytes: int = 0
    peak_cuda_memory_bytes: int = 0
    further_losses: dict[str, float] = field(default_factory=dict)
    validation: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, eq=False)
class _Loss:
    """Loss of a batch, without gradient: the weighted sum, and the means that it is of."""

    total: float
    per_depth_K: Tensor
    further: dict[str, float]


class Trainer(Generic[Batch]):
    """One run in one directory.

    Args:
        trainable: What to train.
        config: How to train.
        directory: Gets the state and the metrics.
        options: What must be the same when the run is taken up again; JSON values.
        processes: All have the same arguments otherwise; the first one writes.
        validation: Is asked after every step.

    Attributes:
        module: As it is after the last step.
    """

    def __init__(
        self,
        trainable: Trainable[Batch],
        config: TrainConfig,
        directory: Path,
        options: Mapping[str, object],
        processes: Processes,
        validation: Validation,
    ) -> None:
        self.module = trainable.module
        self._source = trainable.source
        self._objective = trainable.objective
        self._further_weights = trainable.further_losses
        self._config = config
        self._directory = directory
        self._options = options
        self._processes = processes
        self._validation = validation
        optimizer = torch.optim.AdamW(
            [
                {"params": list(group.parameters), "rate_factor": group.rate_factor}
                for group in trainable.groups
            ],
            betas=(0.9, 0.95),
            weight_decay=config.weight_decay,
        )
        self._optimizer = processes.prepare(Losses(trainable), optimizer)
        self._batches_per_epoch = [self._source.num_batches(e) for e in range(config.epochs)]
        self._progress = Progress(step=0, num_examples=0)

    @property
    def num_steps(self) -> int:
        """Optimiser steps of the whole run."""
        return sum(self._batches_per_epoch)

    @property
    def step(self) -> int:
        """Optimiser steps done, earlier processes' included."""
        return self._progress.step

    @property
    def num_examples(self) -> int:
        """Examples seen, earlier processes' included."""
        return self._progress.num_examples

    def resume(self) -> bool:
        """Take up the run that the directory holds; False if it holds none.

        Raises:
            RunError: If its state is damaged or of a run with other options.
        """
        found = load_state(self._directory, self.module, self._optimizer, self._options)
        if found is None:
            return False
        self._progress = found
        self._validation.best = found.best
        self._processes.set_loss_scaling(found.loss_scaling)
        return True

    def train(self, on_step: Callable[[StepMetrics], None]) -> None:
        """Train to the end of the last epoch or an earlier one, saving the state on the way.

        Args:
            on_step: Called after every step.

        Raises:
            DivergedError: If the loss is no longer a number; the last saved state stays.
        """
        self.module.train()
        with self._open_metrics() as metrics:
            started_s, num_before = time.perf_counter(), self._progress.num_examples
            for epoch, batch in self._remaining_batches():
                loss = self._backward(batch)
                gradient_norm = self._update(loss)
                self._advance(len(batch))
                rate = (self._progress.num_examples - num_before) / (
                    time.perf_counter() - started_s
                )
                validated = self._validation.after_step(self.step, self.step == self.num_steps)
                found = self._metrics(epoch, loss, gradient_norm, rate, validated)
                on_step(found)
                self._record(found, metrics)
        self._validation.finish()
        self.module.eval()

    def discard_state(self) -> None:
        """Remove the saved state of a run that has ended."""
        if self._processes.is_main:
            (self._directory / STATE_FILE).unlink(missing_ok=True)

    def _open_metrics(self) -> AbstractContextManager[MetricsLog | None]:
        if not self._processes.is_main:
            return nullcontext()
        return open_metrics(self._directory, self.step, self._config.tensorboard)

    def _remaining_batches(self) -> Iterator[tuple[int, Batch]]:
        first = self.step
        for epoch, num_batches in enumerate(self._batches_per_epoch):
            if first < num_batches:
                for batch in self._source.batches(epoch, first):
                    if self._validation.is_over(self.step):
                        return
                    yield epoch, batch
            first = max(0, first - num_batches)

    def _backward(self, batch: Batch) -> _Loss:
        """Compute a batch's loss and leave its gradient, the same on all processes."""
        self._optimizer.zero_grad(set_to_none=True)
        num_labels_K = self._objective.num_labels(batch).clamp(min=1)
        weights_K = self._weights(num_labels_K)
        num_parts = self._processes.count * self._config.gradient_accumulation
        parts = self._processes.own(batch.divide(num_parts))
        sums_K = torch.zeros_like(weights_K)
        for number, part in enumerate(parts, start=1):
            with self._processes.accumulating(is_last=number == len(parts)):
                part_sums_K = self._processes.run(part, len(weights_K))
                self._processes.backward((weights_K * part_sums_K / num_labels_K).sum())
            sums_K += part_sums_K.detach()
        means_K = self._processes.sum(sums_K) / num_labels_K
        num_depths = len(means_K) - len(self._further_weights)
        further = dict(zip(self._further_weights, means_K[num_depths:].tolist(), strict=True))
        return _Loss(float((weights_K * means_K).sum()), means_K[:num_depths], further)

    def _weights(self, num_labels_K: Tensor) -> Tensor:
        """Weights of the depths' losses and, behind them, of the further ones."""
        depths_K = torch.arange(len(num_labels_K), device=num_labels_K.device)
        weights_K = self._config.head_decay**depths_K
        num_depths = len(num_labels_K) - len(self._further_weights)
        for index, weight in enumerate(self._further_weights.values()):
            weights_K[num_depths + index] = weight
        return weights_K

    def _update(self, loss: _Loss) -> float:
        """Take one optimiser step; returns the gradient's norm."""
        for group in self._optimizer.param_groups:
            group["lr"] = self.learning_rate(self.step) * group["rate_factor"]
        norm = self._processes.clip(self.module.parameters(), self._config.clip_norm)
        # While there is a scale to lower, a gradient out of float16's range costs only this step.
        is_skipped = self._processes.loss_scale > 1.0 and not math.isfinite(norm)
        if not math.isfinite(loss.total) or not (math.isfinite(norm) or is_skipped):
            raise DivergedError(
                f"step {self.step + 1}: the loss is {loss.total} and its gradient's norm {norm}; "
                f"lower --learning-rate (now {self._config.learning_rate}) and start again; the "
                "state saved last is of an earlier step"
            )
        self._optimizer.step()
        return norm

    def _advance(self, num_examples: int) -> None:
        self._progress = Progress(
            self.step + 1,
            self._progress.num_examples + num_examples,
            self._processes.loss_scaling(),
        )

    def learning_rate(self, step: int) -> float:
        """Learning rate of a step, from 0: linear warm-up, then a cosine to 0."""
        num_warmup = max(1, round(self.num_steps * self._config.warmup_fraction))
        if step < num_warmup:
            return self._config.learning_rate * (step + 1) / num_warmup
        share = (step - num_warmup) / max(1, self.num_steps - num_warmup)
        return self._config.learning_rate * 0.5 * (1.0 + math.cos(math.pi * share))

    def _metrics(
        self,
        epoch: int,
        loss: _Loss,
        gradient_norm: float,
        rate: float,
        validated: dict[str, float],
    ) -> StepMetrics:
        return StepMetrics(
            step=self.step,
            epoch=epoch,
            loss=loss.total,
            loss_per_head=loss.per_depth_K.tolist(),
            learning_rate=self.learning_rate(self.step - 1),
            gradient_norm=gradient_norm,
            num_examples=self._progress.num_examples,
            examples_per_s=rate,
            peak_memory_bytes=peak_memory_bytes(),
            peak_cuda_memory_bytes=peak_cuda_memory_bytes(self._processes.device),
            further_losses=loss.further,
            validation=validated,
        )

    def _record(self, metrics: StepMetrics, file: MetricsLog | None) -> None:
        if file is None:
            return
        is_last = self.step == self.num_steps or self._validation.is_over(self.step)
        is_logged = self.step % self._config.log_interval == 0 or metrics.validation
        if is_last or is_logged:
            file.append(asdict(metrics))
        if is_last or self.step % self._config.save_interval == 0:
            progress = replace(self._progress, best=self._validation.best)
            save_state(self._directory, self.module, self._optimizer, progress, self._options)
