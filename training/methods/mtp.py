"""The method `mtp`: an MTP module over a frozen base model."""

from dataclasses import dataclass
from functools import partial
from typing import Annotated, ClassVar

import torch

from heads.mtp import MTPConfig, MTPModule
from server.cli.values import Between, Count, Whole
from server.model.decoder_layer import DecoderLayer
from training.data.dataset import frequent_tokens
from training.loop.objective import ParameterGroup, Trainable
from training.methods.drafts import MTPDrafts
from training.methods.frozen_base import FrozenBase, fill_memory
from training.methods.method import Run, Task
from training.methods.mtp_objective import MTPObjective
from training.states.encoded import EncodedBatch, EncodedSource

# Prompts count too, so a document takes more memory than its examples would.
_GROUP_SIZE = 256


@dataclass(frozen=True, kw_only=True)
class MTP(FrozenBase):
    """An MTP module over a frozen base model.

    Attributes:
        num_depths: Depths that the module is unrolled to, and measured at.
        draft_vocab_size: Most frequent tokens of the answers, which the module can draft; 0 is all
            tokens.
        batch_tokens: Tokens of an optimiser step, over all processes, prompts included.
        learning_rate: Learning rate at its peak.
    """

    name: ClassVar[str] = "mtp"

    num_depths: Count = 4
    draft_vocab_size: Whole = 4096
    batch_tokens: Count = 4096
    learning_rate: Annotated[float, Between(0, 1)] = 1e-3

    def prepare(self, task: Task) -> Run[EncodedBatch]:
        """Put a module and its documents together; see `Method.prepare`."""
        states = self.hidden_states(task)
        module, layer = self._fresh_module(task)
        source = EncodedSource(task.train, states, task.batch_plan(self.batch_tokens, _GROUP_SIZE))
        fill_memory(task, source)
        trainable = Trainable(
            module,
            (ParameterGroup(tuple(module.parameters())),),
            source,
            MTPObjective(module, layer, self.num_depths, task.compute_dtype, self.kl_weight),
            self.learning_rate,
        )
        drafts_of = partial(MTPDrafts, module=module, layer=layer, num_depths=self.num_depths)
        return Run(module, trainable, states, drafts_of)

    def _fresh_module(self, task: Task) -> tuple[MTPModule, DecoderLayer]:
        """Make an untrained module with float32 weights, and what runs its layer."""
        loaded = task.loaded
        size = min(self.draft_vocab_size, loaded.vocab_size) or loaded.vocab_size
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(task.seed)
            layer = DecoderLayer(loaded.model)
        module = MTPModule(
            MTPConfig(loaded.hidden_size, loaded.vocab_size, size),
            layer.module,
            loaded.unembedding(),
            loaded.input_embedding(),
            frequent_tokens(task.train.documents, loaded.vocab_size, size),
        )
        return module.to(loaded.device).float(), layer
