"""A decoder layer of a base model's own class, for modules that are built from one.

Shape suffixes: T flat tokens, D model width.
"""

import copy
import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from server.attention.hook import ATTENTION_NAME, AttentionContext, register_attention
from server.errors import ModelError


class DecoderLayer:
    """A fresh layer of the base model's shape and how to run it with our attention.

    Its index among the layers of the KV cache is the one after the base model's last one.

    Args:
        model: The base model; left as it is.

    Attributes:
        module: Float32, randomly initialised as the model's class does it.

    Raises:
        ModelError: If the model's decoder is not a list of layers with rotary positions.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        decoder = model.base_model
        layers, rotary = getattr(decoder, "layers", None), getattr(decoder, "rotary_emb", None)
        if not isinstance(layers, nn.ModuleList) or not isinstance(rotary, nn.Module):
            raise ModelError(
                f"{type(decoder).__name__} has no plain list of decoder layers with shared rotary "
                "positions; MTP modules need one, Medusa heads do not"
            )
        config: PreTrainedConfig = copy.deepcopy(model.config.get_text_config(decoder=True))
        config._attn_implementation = ATTENTION_NAME
        register_attention()
        # Some classes look their index up in the config, so this one is built as the last one.
        self.module: nn.Module = type(layers[-1])(config, len(layers) - 1)
        for part in self.module.modules():
            if getattr(part, "layer_idx", None) is not None:
                # nn.Module types attributes as tensors.
                part.layer_idx = len(layers)  # type: ignore[assignment]
        self.module.apply(model._init_weights)
        self._rotary = rotary
        self._rotary_keywords: dict[str, Any] = {}
        # Some classes rotate by another base in layers with a window.
        if "layer_type" in inspect.signature(rotary.forward).parameters:
            self._rotary_keywords["layer_type"] = config.layer_types[-1]

    def run(self, u_TD: Tensor, positions_T: Tensor, context: AttentionContext) -> Tensor:
        """Run the layer on flat tokens; `context` brings attention and KV."""
        u_1TD, positions_1T = u_TD.unsqueeze(0), positions_T.unsqueeze(0)
        output = self.module(
            u_1TD,
            attention_mask=None,
            position_ids=positions_1T,
            position_embeddings=self._rotary(
                u_1TD, position_ids=positions_1T, **self._rotary_keywords
            ),
            use_cache=False,
            attention_context=context,
        )
        # Some classes return a tuple whose first entry is the hidden state.
        hidden_1TD: Tensor = output[0] if isinstance(output, tuple) else output
        return hidden_1TD[0]

    def runner(self, positions_T: Tensor, context: AttentionContext) -> Callable[[Tensor], Tensor]:
        """Return `run` with everything but the input given."""
        return lambda u_TD: self.run(u_TD, positions_T, context)
