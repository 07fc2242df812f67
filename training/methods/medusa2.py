"""The method `medusa2`: Medusa heads and a LoRA adapter of the base model learn together.

Fresh heads are trained alone first, in a run of their own inside of this one's directory.
"""

from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Annotated, ClassVar

from heads.medusa import MedusaHeads
from server.cli.values import Between, Count
from server.errors import ModelError
from training.data.batches import DocumentBatch, DocumentSource
from training.errors import RunError
from training.loop.objective import ParameterGroup, Trainable
from training.methods.drafts import MedusaDrafts
from training.methods.lora import ALL_LINEAR, AdaptedBase, LoraPlan
from training.methods.medusa import Medusa
from training.methods.medusa2_objective import DIVERGENCE, Medusa2Module, Medusa2Objective
from training.methods.medusa_objective import medusa_groups
from training.methods.method import Run, Task
from training.methods.starting_heads import StartingHeads, load_medusa_heads

_LEARNING_RATE = 1e-4


@dataclass(frozen=True, kw_only=True)
class Medusa2(StartingHeads):
    """Medusa heads and an adapter of their base model.

    Attributes:
        batch_size: Examples of an optimiser step, over all processes.
        learning_rate: Learning rate of the heads at its peak; not given, it is 0.0001, and 0.002 in
            the warm-up.
        root_rate_factor: Multiplies the learning rate of the maps of the root's embedding.
        warmup_epochs: Epochs in which fresh heads are trained alone; heads to begin with need none.
        lora_rank: Rank of the adapter; its alpha is twice that.
        lora_targets: Last parts of the names of the layers to adapt; `all-linear` is all but the
            unembedding.
        lora_learning_rate: Learning rate of the adapter at its peak.
        divergence_weight: Weight of the divergence of the adapted base model from the plain one,
            where the first head's loss has the weight 1.

    Raises:
        RunError: If the heads have no learning rate, or a warm-up is asked for with heads to begin
            with.
    """

    name: ClassVar[str] = "medusa2"
    is_base_frozen: ClassVar[bool] = False

    batch_size: Count = 2048
    learning_rate: Annotated[float, Between(0, 1)] | None = None
    root_rate_factor: Annotated[float, Between(0, 1000)] = 16.0
    warmup_epochs: Count = 1
    lora_rank: Count = 16
    lora_targets: tuple[str, ...] = (ALL_LINEAR,)
    lora_learning_rate: Annotated[float, Between(0, 1)] = 4e-4
    divergence_weight: Annotated[float, Between(0, 1e6)] = 30.0

    def __post_init__(self) -> None:
        if self.learning_rate == 0.0:
            raise RunError("learning_rate is 0.0; for medusa2 give the heads a rate above 0")
        default = {item.name: item.default for item in fields(self)}
        if self.init_heads is not None and self.warmup_epochs != default["warmup_epochs"]:
            raise RunError(
                f"warmup_epochs is {self.warmup_epochs}, but heads to begin with get no warm-up; "
                "leave out one of --warmup-epochs and --init-heads"
            )

    def check_sharded(self) -> None:
        """Reject processes that have a part of each layer; see `Method.check_sharded`.

        Raises:
            RunError: Always.
        """
        raise RunError("method is medusa2, whose adapter lies in the layers; leave out --sharding")

    def prepare(self, task: Task) -> Run[DocumentBatch]:
        """Warm heads up and put them and an adapter together; see `Method.prepare`."""
        with task.usage.stage("warmup"):
            heads = self._warm_heads(task)
        base = self._adapted(task)
        rate = _LEARNING_RATE if self.learning_rate is None else self.learning_rate
        weights = tuple(base.parameters.values())
        adapter = ParameterGroup(weights, self.lora_learning_rate / rate)
        unembedding_VD = task.loaded.unembedding()
        trainable = Trainable(
            Medusa2Module(heads, base),
            (*medusa_groups(heads, self.root_rate_factor), adapter),
            DocumentSource(task.train, task.batch_plan(self.batch_size)),
            Medusa2Objective(heads, base, task.encoder, unembedding_VD, task.compute_dtype),
            rate,
            {DIVERGENCE: self.divergence_weight},
        )
        drafts_of = partial(MedusaDrafts, heads=heads)
        return Run(heads, trainable, task.encoder, drafts_of, base, self.digests())

    def _warm_heads(self, task: Task) -> MedusaHeads:
        """Heads that a checkpoint brings, or fresh ones that were trained alone."""
        if self.init_heads is not None:
            return self.starting_heads(task.loaded, task.train)
        shape = {item.name: getattr(self, item.name) for item in fields(StartingHeads)}
        alone = Medusa(**shape, batch_size=self.batch_size, root_rate_factor=self.root_rate_factor)
        if self.learning_rate is not None:
            alone = replace(alone, learning_rate=self.learning_rate)
        directory = task.train_first(alone, self.warmup_epochs)
        return load_medusa_heads(directory, task.loaded)

    def _adapted(self, task: Task) -> AdaptedBase:
        """Put a fresh adapter on the base model."""
        if not task.encoder.has_plain_logits:
            raise ModelError(
                f"model {task.loaded.name!r} scales, caps or shifts its logits; method medusa2 "
                "does not support that"
            )
        plan = LoraPlan(self.lora_rank, 2.0 * self.lora_rank, self.lora_targets, task.seed)
        return AdaptedBase(task.loaded, plan)
