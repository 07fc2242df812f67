"""What a logit processor is made from."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from server.core.processor import LogitProcessor
from server.core.request import Request


@dataclass(frozen=True, slots=True)
class ProcessorContext:
    """What a processor may look at when it is made, before the request's first step.

    Attributes:
        request: Its sampling parameters say whether the processor is wanted.
        vocab_size: Length of a row of logits.
        device: Where rows of logits lie.
    """

    request: Request
    vocab_size: int
    device: torch.device


# Returns None where the request does not ask for the processor.
MakeProcessor = Callable[[ProcessorContext], LogitProcessor | None]
