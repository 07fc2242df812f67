"""The kinds of draft heads that a checkpoint can hold, and how each is described and built.

Shape suffixes: V vocabulary, D model width.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, TypeVar

from torch import Tensor, nn

from heads.medusa import MedusaConfig, MedusaHeads
from heads.mtp import MTPConfig, MTPModule

MEDUSA_TYPE = "medusa"
MTP_TYPE = "mtp"
TYPES = (MEDUSA_TYPE, MTP_TYPE)
AnyHeads = MedusaHeads | MTPModule
Value = TypeVar("Value")

_BLOCK_KEY = "block"
# Names that sizes and weights had in earlier checkpoints.
_FORMER_NAMES = {
    "num_blocks": "num_layers",
    "block_weights": "layer_weights",
    "block_biases": "layer_biases",
}


@dataclass(frozen=True, slots=True, eq=False)
class BaseParts:
    """What draft heads take from their base model.

    Attributes:
        unembedding_VD: Unembedding, in the dtype and on the device of the heads.
        input_embedding_VD: Input embedding, likewise.
        make_block: Makes a fresh decoder layer of the base's class; None if there is none to make,
            so that no MTP module can be built.
    """

    unembedding_VD: Tensor
    input_embedding_VD: Tensor
    make_block: Callable[[], nn.Module] | None = None


def type_of(heads: AnyHeads) -> str:
    """Return the name of the heads' kind."""
    return MEDUSA_TYPE if isinstance(heads, MedusaHeads) else MTP_TYPE


def describe(heads: AnyHeads) -> dict[str, Any]:
    """Return the heads' sizes as JSON; an MTP module's with the class of its decoder layer."""
    sizes = asdict(heads.config)
    if isinstance(heads, MTPModule):
        sizes[_BLOCK_KEY] = type(heads.block).__name__
    return sizes


def renamed(values: Mapping[str, Value]) -> dict[str, Value]:
    """Return sizes or weights of a checkpoint under the names that they have today."""
    return {_FORMER_NAMES.get(name, name): value for name, value in values.items()}


def build_heads(kind: str, sizes: Any, draft_vocab_ids: Tensor | None, base: BaseParts) -> AnyHeads:
    """Build heads that are still to get their weights.

    Args:
        kind: One of `TYPES`.
        sizes: What `describe` returned.
        draft_vocab_ids: Ids of the draft vocabulary, if the checkpoint has any.
        base: What the heads take from the base model that they belong to.

    Raises:
        ValueError: If the sizes are unknown or do not fit the base model.
    """
    matrices = (base.unembedding_VD, base.input_embedding_VD)
    if kind == MEDUSA_TYPE:
        # Heads that were saved before there were others do not say it.
        sizes = renamed(sizes) if isinstance(sizes, dict) else sizes
        config = MedusaConfig(**_known(sizes, MedusaConfig, {"own_unembedding": False}))
        return MedusaHeads(config, *matrices, draft_vocab_ids)
    if base.make_block is None:
        raise ValueError("an MTP module needs a decoder block of its base model, and none is given")
    if draft_vocab_ids is None:
        raise ValueError("draft_vocab_ids are missing from the weights of an MTP module")
    rest = dict(sizes) if isinstance(sizes, dict) else {}
    saved_block = rest.pop(_BLOCK_KEY, None)
    mtp_config = MTPConfig(**_known(rest, MTPConfig, {}))
    block = base.make_block()
    if type(block).__name__ != saved_block:
        raise ValueError(
            f"its block is a {saved_block}, but the base model's blocks are of class "
            f"{type(block).__name__}; use the transformers release it was trained with"
        )
    return MTPModule(mtp_config, block, *matrices, draft_vocab_ids)


def _known(
    sizes: Any, config: type[MedusaConfig] | type[MTPConfig], defaults: Mapping[str, Any]
) -> dict[str, Any]:
    known = {field.name for field in fields(config)}
    found = dict(defaults) | sizes if isinstance(sizes, dict) else {}
    if set(found) != known:
        raise ValueError(f"the heads' config is {sizes!r}; exactly {sorted(known)} are known")
    return found
