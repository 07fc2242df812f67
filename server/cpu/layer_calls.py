"""How a model calls its decoder layers, recorded from one pass, so that they can run without it.

Layers that compute the same but for their tensors have equal signatures.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel
from typing_extensions import override

from server.attention.backend import AttentionBackend, AttentionBatch
from server.attention.hook import AttentionContext, install_attention
from server.errors import CompilationError

# Tokens of the recorded pass. An axis of that size counts tokens, so no size of a model may equal
# it.
NUM_TOKENS = 61
_CONTEXT = "attention_context"
_PLAIN_TYPES = (bool, int, float, str, type(None))


@dataclass(frozen=True, slots=True)
class CallForm:
    """What a module is called with, apart from the tensors themselves.

    Attributes:
        tensors: Keywords whose value is a tensor (None) or a tuple of that many tensors.
        constants: All other keywords with their values, except for the attention context.
    """

    tensors: tuple[tuple[str, int | None], ...]
    constants: tuple[tuple[str, object], ...]

    def flatten(self, hidden: Tensor, keywords: Mapping[str, Any]) -> list[Tensor] | None:
        """List the tensors of a call; None if it is of another form."""
        if len(keywords) != len(self.tensors) + len(self.constants):
            return None
        if any(keywords.get(name, self) is not value for name, value in self.constants):
            return None
        inputs = [hidden]
        for name, size in self.tensors:
            value = keywords.get(name)
            if size is None and isinstance(value, Tensor):
                inputs.append(value)
            elif size is not None and isinstance(value, tuple) and len(value) == size:
                inputs += value
            else:
                return None
        return inputs

    def keywords(self, inputs: Sequence[Tensor]) -> dict[str, Any]:
        """The keywords of a call with these tensors, the first of which is the argument."""
        found: dict[str, Any] = dict(self.constants)
        rest = iter(inputs[1:])
        for name, size in self.tensors:
            found[name] = next(rest) if size is None else tuple(next(rest) for _ in range(size))
        return found


@dataclass(frozen=True, slots=True, eq=False)
class ModuleCall:
    """One recorded call of a module.

    Attributes:
        inputs: Tensors of the call; the first is its only positional argument.
        output: What the module returned.
        layer: Index of the layer as which the module attends; None if it does not attend.
    """

    module: nn.Module
    form: CallForm
    inputs: list[Tensor]
    output: Tensor
    layer: int | None

    @property
    def tensor_names(self) -> list[str]:
        """Parameters and buffers of the module."""
        return list(_tensors(self.module))

    @property
    def tensors(self) -> list[Tensor]:
        """The tensors with the names of `tensor_names`, not copies."""
        return list(_tensors(self.module).values())

    @property
    def signature(self) -> object:
        """Equal for calls that compute the same but for the tensors and the layer."""
        modules = [
            (name, type(module), _plain_attributes(module))
            for name, module in self.module.named_modules()
        ]
        shapes = [(tuple(x.shape), x.dtype) for x in (*self.inputs, *self.tensors)]
        return modules, self.tensor_names, shapes, self.form, self.layer is None

    def first_token(self) -> tuple[list[Tensor], Tensor]:
        """Inputs and output of the first token; the output only if tokens do not see others."""
        inputs = [_first(x) for x in self.inputs]
        return inputs, _first(self.output)

    def compute(self, inputs: list[Tensor], tensors: list[Tensor]) -> Any:
        """Call the module with other inputs and other tensors of its own."""
        named = dict(zip(self.tensor_names, tensors, strict=True))
        return functional_call(self.module, named, (inputs[0],), self.form.keywords(inputs))


class EchoBackend(AttentionBackend):
    """Attends to nothing; its output depends on all that a layer decides about attention.

    Attributes:
        layers: Index of each layer that called it, in order.
    """

    def __init__(self) -> None:
        self.layers: list[int] = []

    @override
    def prepare(self, batch: AttentionBatch) -> None:
        """Layers share nothing."""

    @override
    def forward(
        self,
        queries_HTC: Tensor,
        keys_HTC: Tensor,
        values_HTC: Tensor,
        layer: int,
        scaling: float,
        sliding_window: int | None,
        metadata: object,
    ) -> Tensor:
        """Note the layer, and echo the tensors."""
        self.layers.append(layer)
        num_groups = queries_HTC.shape[0] // keys_HTC.shape[0]
        kv_HTC = (keys_HTC + values_HTC).repeat_interleave(num_groups, dim=0)
        # The logarithm keeps a wide window from hiding the rest.
        output_HTC = (queries_HTC + kv_HTC) * scaling + math.log1p(sliding_window or 0)
        return output_HTC.transpose(0, 1).contiguous()


@torch.inference_mode()
def record_calls(model: PreTrainedModel, modules: Sequence[nn.Module]) -> list[ModuleCall]:
    """Run some tokens through a model and note how it calls some of its modules.

    Args:
        model: Gets our attention, if it does not have it yet.
        modules: Parts of the model in the order of their calls. Each attends once, except for the
            last ones, which need not attend.

    Raises:
        CompilationError: If a module is called in a way that does not fit a `CallForm`.
    """
    install_attention(model)
    backend = EchoBackend()
    calls: list[ModuleCall] = []

    def note(module: nn.Module, args: Any, keywords: dict[str, Any], output: Any) -> None:
        num_attended = len(backend.layers) - len(calls)
        layer = backend.layers[-1] if num_attended == 1 else None
        calls.append(_module_call(module, args, keywords, output, layer))

    handles = [module.register_forward_hook(note, with_kwargs=True) for module in modules]
    positions_T = torch.arange(NUM_TOKENS, device=model.device)
    num_tokens = model.get_input_embeddings().get_parameter("weight").shape[0]
    try:
        model(
            input_ids=(positions_T % num_tokens).unsqueeze(0),
            position_ids=positions_T.unsqueeze(0),
            use_cache=False,
            logits_to_keep=positions_T,
            attention_context=AttentionContext(backend, None),
        )
    finally:
        for handle in handles:
            handle.remove()
    if [call.module for call in calls] != list(modules):
        raise CompilationError(f"of {len(modules)} modules {len(calls)} were called in order")
    return calls


def _module_call(
    module: nn.Module, args: Any, keywords: dict[str, Any], output: Any, layer: int | None
) -> ModuleCall:
    kind = type(module).__name__
    if len(args) != 1 or not isinstance(args[0], Tensor) or not isinstance(output, Tensor):
        raise CompilationError(f"{kind} does not map one tensor to one tensor")
    tensors: list[tuple[str, int | None]] = []
    constants: list[tuple[str, object]] = []
    for name, value in keywords.items():
        if isinstance(value, Tensor):
            tensors.append((name, None))
        elif isinstance(value, tuple) and all(isinstance(item, Tensor) for item in value):
            tensors.append((name, len(value)))
        elif value is None or isinstance(value, bool):
            constants.append((name, value))
        elif name != _CONTEXT:
            raise CompilationError(f"{kind} gets {name} of type {type(value).__name__}")
    form = CallForm(tuple(tensors), tuple(constants))
    rest = {name: value for name, value in keywords.items() if name != _CONTEXT}
    inputs = form.flatten(args[0], rest)
    if inputs is None:
        raise AssertionError("a call does not fit its own form")
    return ModuleCall(module, form, inputs, output, layer)


def _first(x: Tensor) -> Tensor:
    for axis, size in enumerate(x.shape):
        if size == NUM_TOKENS:
            x = x.narrow(axis, 0, 1)
    return x


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _plain_attributes(module: nn.Module) -> list[tuple[str, object]]:
    return sorted(
        (name, value)
        for name, value in vars(module).items()
        if isinstance(value, _PLAIN_TYPES) and name != "layer_idx"
    )
