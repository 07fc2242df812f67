"""A LoRA adapter of the base model in PEFT's format, and how it is merged into the weights.

    adapter_config.json          rank, alpha and what else PEFT has options for
    adapter_model.safetensors    for each adapted linear layer its A, [rank, inputs], and its B,
                                 [outputs, rank]

A merged weight is W + scale * B A, with scale = alpha / rank, or alpha / sqrt(rank) for rsLoRA.
What PEFT can express beyond that is rejected with an error that names it. Knows no model class:
layers are found by their names among any module's linear layers.

Shape suffixes: R rank, I input features, O output features.
"""

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from heads.errors import HeadsCheckpointError

ADAPTER_CONFIG_FILE = "adapter_config.json"
ADAPTER_WEIGHTS_FILE = "adapter_model.safetensors"

_PREFIX = "base_model.model."
_SIDES = ("lora_A", "lora_B")
_SCALE_KEYS = {"r", "lora_alpha", "use_rslora"}
# These say where the adapter came from, which layers it was put on and how it was trained, but not
# what it computes; the weights name their layers themselves.
_FREE_KEYS = {
    "auto_mapping",
    "base_model_name_or_path",
    "exclude_modules",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "lora_dropout",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "target_modules",
    "task_type",
}
# Other values are refused: PiSSA, for one, changes the base's own weights.
_FIXED_KEYS: Mapping[str, tuple[object, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "init_lora_weights": (True, False, "gaussian"),
}


@dataclass(frozen=True, slots=True)
class AdapterFiles:
    """The two files of an adapter, byte by byte."""

    config: bytes
    weights: bytes


@dataclass(frozen=True, slots=True, eq=False)
class LoraUpdate:
    """What one linear layer gets added: `scale * b_OR @ a_RI`."""

    a_RI: Tensor
    b_OR: Tensor
    scale: float

    def merge_into(self, weight_OI: Tensor) -> None:
        """Add the update in place; computed in float32, rounded once."""
        a_RI, b_OR = self.a_RI.to(weight_OI.device), self.b_OR.to(weight_OI.device)
        delta_OI = self.scale * (b_OR.float() @ a_RI.float())
        weight_OI.copy_(weight_OI.float() + delta_OI)


def read_updates(files: AdapterFiles) -> dict[str, LoraUpdate]:
    """Read an adapter: the update of each layer, by the layer's name in the base model.

    Raises:
        HeadsCheckpointError: If a file is damaged, or the adapter is more than plain LoRA.
    """
    try:
        config = json.loads(files.config)
        tensors = safetensors.torch.load(files.weights)
    except (ValueError, SafetensorError) as error:
        raise HeadsCheckpointError(f"the adapter cannot be read: {error}") from error
    rank, scale = _rank_and_scale(config)
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        path, _, side = name.removesuffix(".weight").rpartition(".")
        is_known = path.startswith(_PREFIX) and name.endswith(".weight") and side in _SIDES
        if not is_known:
            raise HeadsCheckpointError(
                f"the adapter has the weight {name}, but only lora_A and lora_B of linear layers "
                "are supported; train it with plain LoRA"
            )
        found.setdefault(path.removeprefix(_PREFIX), {})[side] = tensor
    if not found:
        raise HeadsCheckpointError("the adapter has no weights; copy or train it again")
    return {layer: _update(layer, sides, rank, scale) for layer, sides in sorted(found.items())}


def _update(layer: str, sides: Mapping[str, Tensor], rank: int, scale: float) -> LoraUpdate:
    shapes = {side: tuple(tensor.shape) for side, tensor in sides.items()}
    if set(sides) != set(_SIDES):
        raise HeadsCheckpointError(
            f"the adapter has {sorted(sides)} for {layer}, but both of {list(_SIDES)} are needed"
        )
    a_RI, b_OR = (sides[side] for side in _SIDES)
    if a_RI.dim() != 2 or b_OR.dim() != 2 or a_RI.shape[0] != rank or b_OR.shape[1] != rank:
        raise HeadsCheckpointError(
            f"the adapter's weights for {layer} have the shapes {shapes}, which do not fit its "
            f"rank r = {rank}"
        )
    return LoraUpdate(a_RI, b_OR, scale)


def _rank_and_scale(config: Any) -> tuple[int, float]:
    if not isinstance(config, dict):
        raise HeadsCheckpointError(f"{ADAPTER_CONFIG_FILE} holds {config!r:.80}, no object")
    for key, value in config.items():
        if key in _FIXED_KEYS:
            is_supported = value in _FIXED_KEYS[key]
        else:
            is_supported = key in _FREE_KEYS | _SCALE_KEYS or not value
        if not is_supported:
            raise HeadsCheckpointError(
                f"the adapter has {key} {value!r}, which is not supported; only plain LoRA on "
                "linear layers is, with r, lora_alpha and use_rslora"
            )
    missing = {"peft_type", "r", "lora_alpha"} - config.keys()
    if missing:
        raise HeadsCheckpointError(f"{ADAPTER_CONFIG_FILE} has no {', '.join(sorted(missing))}")
    rank, alpha = config["r"], config["lora_alpha"]
    if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, int | float):
        raise HeadsCheckpointError(
            f"the adapter has r {rank!r} and lora_alpha {alpha!r}; give a whole number from 1 and "
            "a number"
        )
    return rank, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


@torch.no_grad()
def merge_adapter(model: nn.Module, files: AdapterFiles) -> int:
    """Merge an adapter into a base model's weights, in place.

    Args:
        model: Its adapted layers are `nn.Linear`, hence not packed yet.
        files: The adapter.

    Returns:
        The number of layers that changed.

    Raises:
        HeadsCheckpointError: If the adapter is damaged, more than plain LoRA, or names a layer that
            the model does not have or that shares its weight; the model is then unchanged.
    """
    updates = read_updates(files)
    modules = dict(model.named_modules())
    weights = {
        layer: _weight(modules.get(layer), layer, update) for layer, update in updates.items()
    }
    names = Counter(id(weight) for _, weight in model.named_parameters(remove_duplicate=False))
    for layer, weight in weights.items():
        if names[id(weight)] > 1:
            raise HeadsCheckpointError(
                f"the adapter is for the layer {layer}, whose weight the base model uses elsewhere "
                "too; leave that layer out"
            )
    for layer, update in updates.items():
        update.merge_into(weights[layer])
    return len(updates)


def _weight(module: nn.Module | None, layer: str, update: LoraUpdate) -> Tensor:
    """The weight of a layer, checked to fit its update."""
    if type(module) is not nn.Linear:
        kind = "missing" if module is None else type(module).__name__
        raise HeadsCheckpointError(
            f"the adapter is for a layer {layer}, which is {kind} in the base model; only its "
            "linear layers can be adapted"
        )
    expected = (update.b_OR.shape[0], update.a_RI.shape[1])
    if tuple(module.weight.shape) != expected:
        raise HeadsCheckpointError(
            f"the adapter is for a layer {layer} of shape {expected}, but the base model's has "
            f"{tuple(module.weight.shape)}"
        )
    return module.weight
