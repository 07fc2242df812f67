"""What a training method is, what it is given and what it returns.

A method is a frozen dataclass whose fields are its own options:

    method = Medusa(num_heads=4)
    run = method.prepare(task)        # heads, batches and losses, put together for a task

`training.methods.table` names all methods; a new one is a file and a line there.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol

import torch

from heads.kinds import AnyHeads
from server.model.loading import LoadedModel
from training.data.batches import BatchPlan
from training.data.dataset import Corpus
from training.loop.objective import Batch, Trainable
from training.loop.processes import Processes
from training.loop.usage import Usage
from training.measure.drafts import Drafts
from training.methods.lora import AdaptedBase
from training.states.hidden_states import HiddenStateEncoder, HiddenStates

# Directory of a run that is trained first, inside of the run that asks for it.
WARMUP_DIR = "warmup"


@dataclass(frozen=True, slots=True, eq=False)
class Run(Generic[Batch]):
    """What is trained, ready to be trained.

    Attributes:
        heads: Draft heads that the run trains, and that its checkpoint holds.
        trainable: Their weights (and an adapter's), batches and losses.
        states: Hidden states of the base model as it is while it is trained.
        drafts_of: Returns what the heads draft from given hidden states.
        adapted: Base model with the adapter that is trained; None if the base is frozen.
    """

    heads: AnyHeads
    trainable: Trainable[Batch]
    states: HiddenStates
    drafts_of: Callable[[HiddenStates], Drafts]
    adapted: AdaptedBase | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Task:
    """What is trained for and on what, whichever the method.

    Attributes:
        loaded: Base model.
        encoder: Runs the base model over documents.
        answers: Documents to train on and held-out ones.
        train: Documents to train on.
        compute_dtype: Type of the heads' matrix products.
        is_cached: Whether all hidden states are kept in memory.
        seed: Decides the order of the examples and random weights.
        processes: Those that train together.
        usage: Takes the time of each stage.
        run_first: Trains another method's heads in a run of their own; see `train_first`.
    """

    loaded: LoadedModel
    encoder: HiddenStateEncoder
    answers: Corpus
    train: Corpus
    compute_dtype: torch.dtype
    is_cached: bool
    seed: int
    processes: Processes
    usage: Usage
    run_first: "Callable[[Task, Method, int], Path]"

    def batch_plan(self, size: int, group_size: int = 512) -> BatchPlan:
        """Return how the documents are put into batches of a size."""
        return BatchPlan(size, self.seed, self.is_cached, group_size)

    def train_first(self, method: "Method", epochs: int) -> Path:
        """Train heads by another method before this one, unless an earlier process has done so.

        That run has the directory `WARMUP_DIR` inside of this one's, and is resumed like any other.
        Its times are not added to this task's usage.

        Args:
            method: What trains them.
            epochs: Passes over the examples.

        Returns:
            Directory of a heads checkpoint with float32 weights.
        """
        return self.run_first(replace(self, usage=Usage()), method, epochs)


class Method(Protocol):
    """A training method with its options.

    Attributes:
        name: What `--method` takes for it.
        is_base_frozen: Whether the base model stays as it is, so that it may be loaded with faster
            layers that have no gradients.
    """

    name: ClassVar[str]
    is_base_frozen: ClassVar[bool]

    def check_sharded(self) -> None:
        """Check that the base model's layers may be spread over processes.

        Raises:
            RunError: If one process would have to run the base without the others, or the method
                changes its layers.
        """

    def kept_options(self) -> Mapping[str, object]:
        """Return the options that must be the same when a run is resumed, as JSON values."""

    def prepare(self, task: Task) -> Run[Any]:
        """Put heads, batches and losses together.

        Raises:
            RunError: If the options do not fit the base model, or something is not installed.
            ModelError: If heads cannot be trained for such a base model.
            ConfigError: If heads to begin with cannot be read.
        """


def options_without(method: Any, *names: str) -> dict[str, object]:
    """Return the options of a method but those named, as JSON values."""
    return {name: value for name, value in asdict(method).items() if name not in names}
