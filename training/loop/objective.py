"""What a trainer needs to know of the module that it trains: batches, and a loss for each depth.

Losses are sums, with the numbers of their labels apart, so that parts of a batch (micro-batches,
processes) can be added up before anything is divided.

Shape suffixes: K draft depths.
"""

from collections.abc import Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, field
from typing import Generic, Protocol, Self, TypeVar

import torch
from torch import Tensor, nn


class Divisible(Sized, Protocol):
    """A batch; its length is its examples."""

    def divide(self, num_parts: int) -> Sequence[Self]:
        """Split it into so many parts of about the same size, in order; some may be empty."""


Batch = TypeVar("Batch", bound=Divisible)
Batch_co = TypeVar("Batch_co", bound=Divisible, covariant=True)
Batch_contra = TypeVar("Batch_contra", bound=Divisible, contravariant=True)


class BatchSource(Protocol[Batch_co]):
    """The batches of each epoch; they depend on the epoch alone, so that a run can be resumed."""

    def num_batches(self, epoch: int) -> int:
        """Count the batches of an epoch."""

    def batches(self, epoch: int, first: int = 0) -> Iterator[Batch_co]:
        """Yield an epoch's batches from number `first` on."""


class Objective(Protocol[Batch_contra]):
    """A module's losses on a batch."""

    def num_labels(self, batch: Batch_contra, /) -> Tensor:
        """Count the labels that each depth learns from, int64 K, without running the module."""

    def __call__(self, batch: Batch_contra, /) -> Tensor:
        """Sum each depth's loss over its labels, in nats: float32 K with gradient.

        The trainable's further losses come after the K depths, here as in `num_labels`.
        """


@dataclass(frozen=True, slots=True, eq=False)
class ParameterGroup:
    """Parameters with a learning rate of their own.

    Attributes:
        rate_factor: Multiplies the run's learning rate.
    """

    parameters: tuple[nn.Parameter, ...]
    rate_factor: float = 1.0


@dataclass(frozen=True, slots=True, eq=False)
class Trainable(Generic[Batch]):
    """A module, what it learns from, and how well it does.

    Attributes:
        module: Has float32 weights, which are trained in place.
        groups: All parameters that are trained, each once.
        source: Batches to learn from.
        objective: Runs `module` on a batch.
        learning_rate: Learning rate at its peak, for groups with the factor 1.
        further_losses: Names and weights of the losses that the objective gives after those of
            the depths.
    """

    module: nn.Module
    groups: tuple[ParameterGroup, ...]
    source: BatchSource[Batch]
    objective: Objective[Batch]
    learning_rate: float
    further_losses: Mapping[str, float] = field(default_factory=dict)


class Losses(nn.Module, Generic[Batch]):
    """A trainable as one module whose forward pass is the objective's.

    Wrappers of modules learn from their forward passes when gradients are due, so the objective,
    which calls `module` as it likes, must be inside of what is wrapped.
    """

    def __init__(self, trainable: Trainable[Batch]) -> None:
        super().__init__()
        self.module = trainable.module
        self._objective = trainable.objective

    def forward(self, batch: Batch, num_losses: int) -> Tensor:
        """Return the objective's sums; for an empty batch zeros with a gradient of zero."""
        if len(batch):
            return self._objective(batch)
        # Every process must bring a gradient of every parameter, or the others wait for it.
        parameters = [p for p in self.module.parameters() if p.requires_grad]
        zero = torch.stack([p.sum() * 0.0 for p in parameters]).sum()
        return zero.expand(num_losses)
