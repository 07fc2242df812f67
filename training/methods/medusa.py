"""The method `medusa`: Medusa heads over a frozen base model."""

from dataclasses import dataclass
from functools import partial
from typing import Annotated, ClassVar

from server.cli.values import Between, Count
from training.loop.objective import Trainable
from training.methods.drafts import MedusaDrafts
from training.methods.frozen_base import FrozenBase, fill_memory
from training.methods.medusa_objective import MedusaObjective, medusa_groups
from training.methods.method import Run, Task
from training.methods.starting_heads import StartingHeads
from training.states.examples import Examples, ExampleSource


@dataclass(frozen=True, kw_only=True)
class Medusa(StartingHeads, FrozenBase):
    """Medusa heads over a frozen base model.

    Attributes:
        batch_size: Examples of an optimiser step, over all processes.
        learning_rate: Learning rate at its peak.
        root_rate_factor: Multiplies the learning rate of the maps of the root's embedding, whose
            weights have a longer way to go: embeddings are an order of magnitude smaller than
            hidden states.
    """

    name: ClassVar[str] = "medusa"

    batch_size: Count = 2048
    learning_rate: Annotated[float, Between(0, 1)] = 2e-3
    root_rate_factor: Annotated[float, Between(0, 1000)] = 16.0

    def prepare(self, task: Task) -> Run[Examples]:
        """Put heads and their examples together; see `Method.prepare`."""
        states = self.hidden_states(task)
        heads = self.starting_heads(task.loaded, task.train)
        plan = task.batch_plan(self.batch_size)
        source = ExampleSource(task.train, states, heads.config.num_heads, plan)
        fill_memory(task, source)
        trainable = Trainable(
            heads,
            medusa_groups(heads, self.root_rate_factor),
            source,
            MedusaObjective(heads, task.compute_dtype, self.kl_weight),
            self.learning_rate,
        )
        drafts_of = partial(MedusaDrafts, heads=heads)
        return Run(heads, trainable, states, drafts_of, digests=self.digests())
