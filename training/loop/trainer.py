"""Trains draft heads of any kind: AdamW, warm-up and cosine decay, resumable, by any processes.

A run that is killed and resumed ends with the same weights as one that was not, on the same machine
with the same number of threads and processes. With another number of processes, or of parts that a
batch is divided into, it takes the same steps up to rounding: losses are divided by the labels of
whole batches.

Shape suffixes: K draft depths.
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from typing import Annotated, Generic

import torch
from torch import Tensor

from server.cli.values import Between, Count
from training.errors import DivergedError
from training.loop.early_stopping import Validation
from training.loop.metrics import MetricsLog, open_metrics
from training.loop.objective import Batch, Losses, Trainable
from training.loop.processes import Processes
from training.loop.run_state import STATE_FILE, Progress, RunRecord, load_state, save_state
from training.loop.usage import peak_cuda_memory_bytes, peak_memory_bytes
from training.resuming import MAY_CHANGE

Fraction = Annotated[float, Between(0, 1)]


@dataclass(frozen=True, slots=True)
class TrainConfig:
    """The training loop.

    Attributes:
        epochs: Passes over the examples.
        gradient_accumulation: Parts in which each process goes through its share of a batch.
        warmup_fraction: Share of the steps in which the learning rate rises from 0.
        weight_decay: Weight decay of AdamW.
        max_grad_norm: Gradients with a larger norm are scaled down to it; 0 leaves them.
        head_decay: Weight of a depth's loss relative to the one before it.
        save_interval: Steps between two saved states.
        log_interval: Steps between two lines of metrics.
    """

    epochs: Count = 3
    gradient_accumulation: Count = field(default=1, metadata=MAY_CHANGE)
    warmup_fraction: Fraction = 0.03
    weight_decay: Fraction = 0.0
    max_grad_norm: Annotated[float, Between(0, 1e6)] = 1.0
    head_decay: Fraction = 0.8
    save_interval: Count = field(default=200, metadata=MAY_CHANGE)
    log_interval: Count = field(default=10, metadata=MAY_CHANGE)


@dataclass(frozen=True, slots=True)
class StepMetrics:
    """Figures of one step.

    Attributes:
        step: From 1.
        epoch: From 0.
        loss: Weighted sum of all losses, in nats.
        loss_per_head: Each depth's mean loss, in nats; 0.0 for one without labels.
        gradient_norm: Norm of the gradient before clipping.
        num_examples: Examples seen, earlier processes' included.
        examples_per_s: Mean since this process began to train.
        peak_memory_bytes: Most main memory that this process has had.
        peak_cuda_memory_bytes: Most memory that it has had on its device; 0 without CUDA.
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
    """Loss of a batch, without gradient: the weighted sum and its parts, which are means."""

    total: float
    per_depth_K: Tensor
    further: dict[str, float]


class Trainer(Generic[Batch]):
    """One run in one directory.

    Args:
        trainable: What to train.
        config: How to train.
        record: Where state and metrics are written, by the first process.
        processes: Those that train together, each with the same arguments otherwise.
        validation: Asked after every step whether the run is over.

    Attributes:
        module: What is trained, with its weights of the last step.
    """

    def __init__(
        self,
        trainable: Trainable[Batch],
        config: TrainConfig,
        record: RunRecord,
        processes: Processes,
        validation: Validation,
    ) -> None:
        self.module = trainable.module
        self._source = trainable.source
        self._objective = trainable.objective
        self._further_weights = trainable.further_losses
        self._config = config
        self._peak_rate = trainable.learning_rate
        self._record = record
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
        """Resume the run that the directory holds; False if it holds none.

        Raises:
            RunError: If its state is damaged or of a run with other options.
        """
        found = load_state(self._record, self.module, self._optimizer)
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
                self._write(found, metrics)
        self._validation.finish()
        self.module.eval()

    def discard_state(self) -> None:
        """Remove the saved state of a run that has ended."""
        if self._processes.is_main:
            (self._record.directory / STATE_FILE).unlink(missing_ok=True)

    def _open_metrics(self) -> AbstractContextManager[MetricsLog | None]:
        if not self._processes.is_main:
            return nullcontext()
        return open_metrics(self._record, self.step)

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
        limit = self._config.max_grad_norm or math.inf
        norm = self._processes.clip(self.module.parameters(), limit)
        # While there is a scale to lower, a gradient out of float16's range costs only this step.
        is_skipped = self._processes.loss_scale > 1.0 and not math.isfinite(norm)
        if not math.isfinite(loss.total) or not (math.isfinite(norm) or is_skipped):
            raise DivergedError(
                f"step {self.step + 1}: the loss is {loss.total} and its gradient's norm {norm}; "
                f"lower --learning-rate (now {self._peak_rate}) and start again; the "
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
            return self._peak_rate * (step + 1) / num_warmup
        share = (step - num_warmup) / max(1, self.num_steps - num_warmup)
        return self._peak_rate * 0.5 * (1.0 + math.cos(math.pi * share))

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

    def _write(self, metrics: StepMetrics, file: MetricsLog | None) -> None:
        if file is None:
            return
        is_last = self.step == self.num_steps or self._validation.is_over(self.step)
        is_logged = self.step % self._config.log_interval == 0 or metrics.validation
        if is_last or is_logged:
            file.append(asdict(metrics))
        if is_last or self.step % self._config.save_interval == 0:
            progress = replace(self._progress, best=self._validation.best)
            save_state(self._record, self.module, self._optimizer, progress)
