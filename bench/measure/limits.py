"""The physical limit of a decode step: weights that must be read, by the speed of the memory."""

import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

_PROBE_BYTES = 512 << 20
_NUM_REPEATS = 5


@dataclass(frozen=True, slots=True)
class WeightTraffic:
    """Weight bytes that a step reads at least, and the speed at which the memory delivers them.

    Attributes:
        weight_bytes: Weights of the base model, read once per step for any number of tokens. All
            experts of a mixture count, so for such a model it is an upper bound.
        memory_gb_per_s: Measured speed of reading memory on this device.
        plain_gb_per_s: Weight bytes by the measured seconds of a plain decode step.
        speculation_gb_per_s: Weight bytes by the measured seconds of a step with a draft tree; its
            larger matrix products and the draft heads take time too, so it is lower.
    """

    weight_bytes: int
    memory_gb_per_s: float
    plain_gb_per_s: float
    speculation_gb_per_s: float

    def describe(self) -> dict[str, float]:
        """Fields of the report, with the share of the memory's speed that plain steps reach."""
        return {**asdict(self), "plain_share": self.plain_gb_per_s / self.memory_gb_per_s}


def weight_bytes(model: PreTrainedModel, quantization: str = "none") -> int:
    """Bytes of the parameters that a decode step reads in full.

    An input embedding is looked up row by row, so it counts only if the unembedding shares it.

    Args:
        model: The plain model.
        quantization: What the engine made of its linear layers, as `EngineConfig.quantization`.
    """
    lookup = model.get_input_embeddings().weight
    tied = model.get_output_embeddings().weight is lookup
    read = {id(p): p for p in model.parameters() if tied or p is not lookup}
    if quantization == "none":
        return distinct_bytes(read.values())
    weights = [module.weight for module in model.modules() if type(module) is nn.Linear]
    for weight in weights:
        read.pop(id(weight), None)
    return distinct_bytes(read.values()) + sum(weight.numel() for weight in weights)


def distinct_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of tensors, counting shared ones once."""
    return sum({t.data_ptr(): t.numel() * t.element_size() for t in tensors}.values())


def read_speed(device: torch.device, num_bytes: int = _PROBE_BYTES) -> float:
    """Gigabytes per second at which a sum reads a large tensor: the best of a few tries."""
    probe = torch.ones(num_bytes // 4, dtype=torch.float32, device=device)
    best_s = float("inf")
    for _ in range(_NUM_REPEATS):
        start = time.perf_counter()
        probe.sum().item()
        best_s = min(best_s, time.perf_counter() - start)
    return num_bytes / best_s / 1e9
