"""The logit processors of this server: one file each, and the table that names them."""

import torch

from server.core.processor import LogitProcessor
from server.core.request import Request
from server.sampling.processors.bias import make_bias
from server.sampling.processors.making import MakeProcessor, ProcessorContext
from server.sampling.processors.penalties import make_penalties

# In the order in which they are applied.
PROCESSORS: dict[str, MakeProcessor] = {
    "penalties": make_penalties,
    "logit_bias": make_bias,
}


def make_processors(
    request: Request, vocab_size: int, device: torch.device
) -> tuple[LogitProcessor, ...]:
    """The processors that a request asks for, in order; none for most requests."""
    context = ProcessorContext(request, vocab_size, device)
    made = (make(context) for make in PROCESSORS.values())
    return tuple(processor for processor in made if processor is not None)
