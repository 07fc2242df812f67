"""MTP modules to begin training with."""

from dataclasses import dataclass

import torch

from heads.mtp import MTPConfig, MTPModule
from server.model.decoder_layer import DecoderLayer
from server.model.loading import LoadedModel
from training.dataset import Corpus, frequent_tokens
from training.options import TrainOptions


@dataclass(frozen=True, slots=True, eq=False)
class FreshMTP:
    """An untrained module with float32 weights, and what runs its block."""

    module: MTPModule
    block: DecoderLayer


def fresh_mtp(options: TrainOptions, loaded: LoadedModel, train: Corpus) -> FreshMTP:
    """Make a module; its block is random by the seed, its draft vocabulary from the answers.

    Raises:
        ModelError: If the base model has no plain decoder blocks.
    """
    size = min(options.draft_vocab_size, loaded.vocab_size) or loaded.vocab_size
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        block = DecoderLayer(loaded.model)
    module = MTPModule(
        MTPConfig(loaded.hidden_size, loaded.vocab_size, size),
        block.module,
        loaded.unembedding(),
        loaded.input_embedding(),
        frequent_tokens(train.documents, loaded.vocab_size, size),
    )
    return FreshMTP(module.to(loaded.device).float(), block)
