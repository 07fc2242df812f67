"""How checkpoints name the tensors of the MTP layer that they ship with the base model.

    DeepSeek-V3   model.layers.N.: enorm, hnorm, eh_proj, shared_head.norm, and a decoder layer;
                  N is the number of the base's layers. GLM-4.5 has the same names.
    Qwen3-Next    mtp.: pre_fc_norm_embedding, pre_fc_norm_hidden, fc, norm, and a decoder layer
                  under layers.0.
    MiMo          model.mtp_layers.0.: token_layernorm, hidden_layernorm, input_proj,
                  final_layernorm, and a decoder layer

The projection's input is [embedding; hidden state], MiMo's the other way round. A layer may repeat
the base's embedding and unembedding, which it shares.

Sources: DeepSeek-V3, arXiv:2412.19437, 2.2; vLLM's deepseek_mtp, glm4_moe_mtp, qwen3_next_mtp and
mimo_mtp.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from server.errors import ModelError

_MAX_NAMED = 4


@dataclass(frozen=True, slots=True)
class MTPLayout:
    """Names of one layout.

    Attributes:
        name: The model that introduced it.
        prefix: Begins the names of everything but the decoder layer.
        decoder_prefix: Begins the names of the decoder layer's tensors.
        layers: Matches the names of all MTP layers; its group is the layer's number.
        first_layer: Number of the first MTP layer.
        hidden_norm: What follows the prefix in the name of the hidden state's norm, as the further
            attributes say it of other tensors.
        is_hidden_first: Whether the projection's left half is for the hidden state.
    """

    name: str
    prefix: str
    decoder_prefix: str
    layers: re.Pattern[str]
    first_layer: int
    hidden_norm: str
    embedding_norm: str
    projection: str
    final_norm: str
    is_hidden_first: bool
    input_embedding: str = "embed_tokens.weight"
    unembedding: str = "shared_head.head.weight"

    def parts(self) -> list[str]:
        """Return the full names of all that the layer has besides its decoder layer."""
        names = (self.hidden_norm, self.embedding_norm, self.projection, self.final_norm)
        return [self.prefix + name for name in names]

    def shared(self) -> list[str]:
        """Return the full names of the base's matrices, which the layer may repeat."""
        return [self.prefix + self.input_embedding, self.prefix + self.unembedding]


@dataclass(frozen=True, slots=True)
class MTPNames:
    """Names of a checkpoint's first MTP layer.

    Attributes:
        decoder: Full names of the decoder layer's tensors.
        shared: Which of the base's matrices the layer repeats.
        num_layers: MTP layers of the checkpoint.
    """

    layout: MTPLayout
    decoder: tuple[str, ...]
    shared: tuple[str, ...]
    num_layers: int


def find_mtp_layer(model: str, names: Iterable[str], num_base_layers: int) -> MTPNames:
    """Find the first MTP layer among the names of a checkpoint's tensors.

    Args:
        model: What errors call the model.
        names: All tensors of the checkpoint.
        num_base_layers: Decoder layers of the base model.

    Raises:
        ModelError: If there is none, or tensors of it are missing or unknown.
    """
    names = list(names)
    layouts = _layouts(num_base_layers)
    found = [layout for layout in layouts if any(name.startswith(layout.prefix) for name in names)]
    if not found:
        prefixes = ", ".join(layout.prefix for layout in layouts)
        raise ModelError(
            f"{model} ships no native MTP layer: none of its tensors begins with one of "
            f"{prefixes}; give a checkpoint that does, or train heads for this one"
        )
    if len(found) > 1:
        raise ModelError(
            f"{model} has MTP tensors in the layouts of {[layout.name for layout in found]}; give "
            "a checkpoint with those of one"
        )
    (layout,) = found
    numbers = {name: int(at[1]) for name in names if (at := layout.layers.match(name))}
    num_layers = len({at for at in numbers.values() if at >= layout.first_layer})
    own = [
        name
        for name in names
        if name.startswith(layout.prefix)
        and numbers.get(name, layout.first_layer) == layout.first_layer
    ]
    missing = [name for name in layout.parts() if name not in own]
    others = [name for name in own if name not in layout.parts() + layout.shared()]
    unknown = [name for name in others if not name.startswith(layout.decoder_prefix)]
    for what, wrong in (("lacks", missing), ("has the unknown", unknown)):
        if wrong:
            raise ModelError(
                f"the MTP layer of {model} {what} {wrong[:_MAX_NAMED]}; in the layout of "
                f"{layout.name} it has {layout.parts()} and a decoder layer under "
                f"{layout.decoder_prefix}"
            )
    shared = tuple(name for name in layout.shared() if name in own)
    return MTPNames(layout, tuple(others), shared, num_layers)


def _layouts(num_base_layers: int) -> tuple[MTPLayout, ...]:
    behind = f"model.layers.{num_base_layers}."
    return (
        MTPLayout(
            name="DeepSeek-V3",
            prefix=behind,
            decoder_prefix=behind,
            layers=re.compile(r"model\.layers\.(\d+)\."),
            first_layer=num_base_layers,
            hidden_norm="hnorm.weight",
            embedding_norm="enorm.weight",
            projection="eh_proj.weight",
            final_norm="shared_head.norm.weight",
            is_hidden_first=False,
        ),
        MTPLayout(
            name="Qwen3-Next",
            prefix="mtp.",
            decoder_prefix="mtp.layers.0.",
            layers=re.compile(r"mtp\.layers\.(\d+)\."),
            first_layer=0,
            hidden_norm="pre_fc_norm_hidden.weight",
            embedding_norm="pre_fc_norm_embedding.weight",
            projection="fc.weight",
            final_norm="norm.weight",
            is_hidden_first=False,
        ),
        MTPLayout(
            name="MiMo",
            prefix="model.mtp_layers.0.",
            decoder_prefix="model.mtp_layers.0.",
            layers=re.compile(r"model\.mtp_layers\.(\d+)\."),
            first_layer=0,
            hidden_norm="hidden_layernorm.weight",
            embedding_norm="token_layernorm.weight",
            projection="input_proj.weight",
            final_norm="final_layernorm.weight",
            is_hidden_first=True,
        ),
    )
