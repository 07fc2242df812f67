"""What a Medusa-2 run is put together from, beside the heads."""

from heads.medusa import MedusaHeads
from server.errors import ModelError
from training.data.dataset import Corpus
from training.loop.objective import ParameterGroup, Trainable
from training.measure.perplexity import comparison, perplexity
from training.methods.lora import AdaptedBase, LoraPlan
from training.methods.losses import medusa_groups
from training.methods.medusa2_objective import (
    DIVERGENCE,
    DocumentBatch,
    DocumentSource,
    Medusa2Module,
    Medusa2Objective,
)
from training.methods.task import Task


def adapted_base(task: Task) -> AdaptedBase:
    """Put a fresh adapter on the task's base model.

    Raises:
        ModelError: If the divergence of such a model cannot be computed.
        RunError: If the options ask for an adapter that cannot be trained or served.
    """
    if not task.encoder.has_plain_logits:
        raise ModelError(
            f"model {task.loaded.name!r} scales, caps or shifts its logits; method medusa2 does "
            "not support that"
        )
    options = task.options
    plan = LoraPlan(options.lora_rank, 2.0 * options.lora_rank, options.lora_targets, options.seed)
    return AdaptedBase(task.loaded, plan)


def medusa2_trainable(
    task: Task, heads: MedusaHeads, base: AdaptedBase
) -> Trainable[DocumentBatch]:
    """Put heads and the adapter of their base together."""
    options = task.options
    rate_factor = options.lora_learning_rate / options.peak_learning_rate
    adapter = ParameterGroup(tuple(base.parameters.values()), rate_factor)
    unembedding_VD = task.loaded.unembedding()
    return Trainable(
        Medusa2Module(heads, base),
        (*medusa_groups(heads, options.root_rate_factor), adapter),
        DocumentSource(task.train, options.batch_size, options.seed),
        Medusa2Objective(heads, base, task.encoder, unembedding_VD, task.compute_dtype),
        {DIVERGENCE: options.divergence_weight},
    )


def perplexities(task: Task, base: AdaptedBase, held_out: Corpus) -> dict[str, float]:
    """Compare the base model without its adapter and with it, on held-out answers."""
    unembedding_VD = task.loaded.unembedding()
    with base.without():
        plain = perplexity(held_out, task.encoder, unembedding_VD)
    return comparison(plain, perplexity(held_out, task.encoder, unembedding_VD))
