"""A small MTP module of a tiny model, trained by nobody."""

import torch

from heads.mtp import MTPConfig, MTPModule
from server.model.decoder_layer import DecoderLayer
from server.model.loading import LoadedModel


def make_module(
    loaded: LoadedModel, draft_vocab_ids: torch.Tensor
) -> tuple[MTPModule, DecoderLayer]:
    """Weights are drawn so that the token counts as much as the state."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layer = DecoderLayer(loaded.model)
        module = MTPModule(
            MTPConfig(loaded.hidden_size, loaded.vocab_size, len(draft_vocab_ids)),
            layer.module,
            loaded.unembedding(),
            loaded.input_embedding(),
            draft_vocab_ids,
        )
        torch.nn.init.normal_(module.projection.weight, std=0.3)
    return module.eval(), layer
