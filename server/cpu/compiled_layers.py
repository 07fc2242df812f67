"""Runs a model's decoder layers compiled, on CPU.

Small steps spend half of their time on hundreds of small operations between the products of a
layer, one after the other from Python. Compiled, a layer is one call of machine code, in which
these are a handful of loops; only products and attention are still called.

The model's own code calls its layers as before; each has our forward in place of its own.
NOTE: Its attribute `forward` is set, as another module in its place would lack attributes that the
model's code reads.
"""

import functools
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from server.attention.backend import AttentionBackend
from server.attention.hook import AttentionContext, attending, exporting_with
from server.cpu.compiled_package import Runner, compile_call
from server.cpu.int8_linear import Int8Linear
from server.cpu.layer_calls import EchoBackend, ModuleCall, record_calls
from server.errors import CompilationError

# How far the compiled change of a hidden state may be from the plain one, relative to its norm.
# An 8-bit code that turns over is a thousandth.
_TOLERANCE = 0.02
# How many roundings of the hidden state itself may come on top, which is what counts in bfloat16.
_ROUNDINGS = 4


class CompiledForward:
    """Takes the place of a module's forward; calls of another form go to the module's own.

    Args:
        call: A recorded call of the module.
        run: The compiled code.
        operator: By which the code attends, so that it runs with backends that have this operator
            alone; None if it attends by way of Python, with any backend.
    """

    def __init__(self, call: ModuleCall, run: Runner, operator: str | None) -> None:
        self._operator = operator
        self._form = call.form
        self._layer = call.layer
        hidden_1TD = call.inputs[0]
        self._num_axes, self._width = hidden_1TD.ndim, hidden_1TD.shape[-1]
        self._dtype = hidden_1TD.dtype
        self._tensors = call.tensors
        self._run = run
        self._plain = call.module.forward

    def __call__(
        self,
        hidden: Tensor,
        *args: Any,
        attention_context: AttentionContext | None = None,
        **keywords: Any,
    ) -> Any:
        """Map a hidden state of at least one token as the module does."""
        inputs = None
        if not args and self._can_attend(attention_context) and self._fits(hidden):
            inputs = self._form.flatten(hidden, keywords)
        if inputs is None:
            if attention_context is not None:
                keywords["attention_context"] = attention_context
            return self._plain(hidden, *args, **keywords)
        return self.run(inputs, attention_context)

    def _can_attend(self, context: AttentionContext | None) -> bool:
        if context is None or self._layer is None:
            return context is None and self._layer is None
        return self._operator is None or self._operator == context.backend.operator

    def _fits(self, hidden: Tensor) -> bool:
        """Compiled code does not look at sizes, so what it was not made for must not reach it."""
        sizes = hidden.shape
        return (
            len(sizes) == self._num_axes
            and sizes[0] == 1
            and sizes[1] > 0
            and sizes[-1] == self._width
            and hidden.dtype is self._dtype
        )

    def run(self, inputs: list[Tensor], context: AttentionContext | None) -> Tensor:
        """Run the compiled code with tensors of the recorded form."""
        if context is None or self._layer is None:
            return self._run(inputs + self._tensors)
        if self._operator is not None:
            context.backend.enter_layer(self._layer, context.metadata)
            return self._run(inputs + self._tensors)
        with attending(context, self._layer):
            return self._run(inputs + self._tensors)


@torch.inference_mode()
def compile_layers(model: PreTrainedModel, echo: AttentionBackend | None = None) -> None:
    """Compile a model's decoder layers, and its unembedding if that has int8 weights of oneDNN's.

    Each compiled module is run on what it got in a plain pass and must give the same. It holds the
    module's tensors themselves, so the model must not be moved or cast afterwards.

    Args:
        model: A model on the CPU, its linear layers packed or quantised; unchanged if an error is
            raised.
        echo: Attention that computes what `EchoBackend` computes, by the operator with which layers
            shall attend without Python; with backends of another operator they run uncompiled. None
            lets layers attend by way of Python.

    Raises:
        CompilationError: If the layers cannot be compiled, or then compute something else.
    """
    layers = getattr(model.base_model, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise CompilationError(f"{type(model).__name__} has no plain list of decoder layers")
    modules = list(layers)
    unembedding = model.get_output_embeddings()
    if isinstance(unembedding, Int8Linear) and not unembedding.is_one_call:
        modules.append(unembedding)
    try:
        forwards = _compiled(model, modules, len(layers), echo or EchoBackend())
    except CompilationError:
        raise
    except Exception as error:  # What a server can do without must not keep it from starting.
        raise CompilationError(
            f"{type(model).__name__} cannot be compiled: {type(error).__name__}: {error}"
        ) from error
    for module, forward in zip(modules, forwards, strict=True):
        module.forward = forward


def _compiled(
    model: PreTrainedModel, modules: list[nn.Module], num_layers: int, echo: AttentionBackend
) -> list[CompiledForward]:
    found: list[tuple[object, Runner]] = []
    forwards: list[CompiledForward] = []
    calls = record_calls(model, modules)
    if any(call.layer is None for call in calls[:num_layers]):
        raise CompilationError(f"not every decoder layer of {type(model).__name__} attends once")
    for call in calls:
        signature = call.signature
        check = functools.partial(check_compiled, call, echo=echo)
        run = next((run for known, run in found if known == signature), None)
        if run is None:
            with exporting_with(echo.operator):
                run = compile_call(call, check)
            found.append((signature, run))
        else:
            check(run)
        forwards.append(CompiledForward(call, run, echo.operator))
    return forwards


def check_compiled(call: ModuleCall, run: Runner, echo: AttentionBackend) -> None:
    """Compare compiled code with a recorded call, on all its tokens and on the first one alone.

    No token of that pass sees another, so each of them has the same output alone and with others.

    Args:
        call: A recorded call of the module, whose output the code must compute.
        run: The compiled code.
        echo: Attention that computes what `EchoBackend` computes, by the operator of the code.

    Raises:
        CompilationError: If any token's output is another than the recorded one.
    """
    context = None if call.layer is None else AttentionContext(echo, None)
    forward = CompiledForward(call, run, echo.operator)
    for inputs, output in (call.inputs, call.output), call.first_token():
        found, expected = forward.run(list(inputs), context), output
        if call.layer is not None:
            # The hidden state that passes by would hide a difference.
            found, expected = found - inputs[0], expected - inputs[0]
        distance_1T = (found - expected).float().norm(dim=-1)
        norm_1T = expected.float().norm(dim=-1)
        rounding_1T = output.float().norm(dim=-1) * torch.finfo(output.dtype).eps * _ROUNDINGS
        is_same_1T = distance_1T <= _TOLERANCE * norm_1T + rounding_1T
        if not bool(is_same_1T.all()):
            worst = int((~is_same_1T[0]).int().argmax())
            raise CompilationError(
                f"{type(call.module).__name__} computes something else when it is compiled: at a "
                f"distance of {float(distance_1T[0, worst]):.3g}, where the norm is "
                f"{float(norm_1T[0, worst]):.3g}, for layer {call.layer} and token {worst} of "
                f"{output.shape[1]}"
            )
