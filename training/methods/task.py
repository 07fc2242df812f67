"""What a training run works with, whatever its method."""

from dataclasses import dataclass

import torch

from server.model.loading import LoadedModel
from training.commands.options import TrainOptions
from training.data.dataset import Corpus
from training.loop.processes import Processes
from training.loop.usage import Usage
from training.states.hidden_states import HiddenStateEncoder, HiddenStates


@dataclass(frozen=True, slots=True, eq=False)
class Task:
    """What is trained for, and on what.

    Attributes:
        encoder: Runs the base model.
        states: Of the plain base model: computed by the encoder, or kept on disk.
    """

    options: TrainOptions
    loaded: LoadedModel
    encoder: HiddenStateEncoder
    states: HiddenStates
    train: Corpus
    held_out: Corpus
    data_sha256: str
    processes: Processes
    usage: Usage

    @property
    def compute_dtype(self) -> torch.dtype:
        """Of the heads' matrix products."""
        precision = self.options.mixed_precision
        if precision == "auto":
            return torch.float32 if self.encoder.dtype == torch.float32 else torch.bfloat16
        return {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
