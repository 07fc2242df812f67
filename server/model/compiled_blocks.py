"""Runs a model's decoder blocks compiled, on CPU.

Small steps spend half of their time on hundreds of small operations between the products of a
block, one after the other from Python. Compiled, a block is one call of machine code, in which
these are a handful of loops; only products and attention are still called.

The model's own code calls its blocks as before; each has a forward of ours in place of its own.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from server.errors import CompilationError
from server.model.attention_hook import AttentionContext, attending
from server.model.block_calls import ModuleCall, echo_context, record_calls
from server.model.compiled_package import Runner, compile_call
from server.model.int8_linear import Int8Linear

# How far the compiled change of a hidden state may be from the plain one, relative to its norm.
# An 8-bit code that turns over is a thousandth.
_TOLERANCE = 0.02
# How many roundings of the hidden state itself may come on top, which is what counts in bfloat16.
_ROUNDINGS = 4


class CompiledForward:
    """Takes the place of a module's forward; calls of another form go to the module's own."""

    def __init__(self, call: ModuleCall, run: Runner) -> None:
        self._form = call.form
        self._layer = call.layer
        self._sizes, self._dtype = _token_sizes(call.inputs[0]), call.inputs[0].dtype
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
        is_known = not args and (attention_context is None) == (self._layer is None)
        # Compiled code does not look at sizes, so what it was not made for must not reach it.
        is_known = is_known and _token_sizes(hidden) == self._sizes and hidden.dtype == self._dtype
        inputs = self._form.flatten(hidden, keywords) if is_known else None
        if inputs is None or not hidden.numel():
            if attention_context is not None:
                keywords["attention_context"] = attention_context
            return self._plain(hidden, *args, **keywords)
        return self.run(inputs, attention_context)

    def run(self, inputs: list[Tensor], context: AttentionContext | None) -> Tensor:
        """Run the compiled code."""
        if context is None or self._layer is None:
            return self._run(inputs + self._tensors)
        with attending(context, self._layer):
            return self._run(inputs + self._tensors)


@torch.inference_mode()
def compile_blocks(model: PreTrainedModel, report: Callable[[str], None]) -> None:
    """Compile a model's decoder blocks, and its unembedding if that has int8 weights.

    Each compiled module is run on what it got in a plain pass and must give the same.

    Args:
        model: On the CPU, its layers packed or quantised; unchanged if an error is raised.
        report: Called with a short line at each stage.

    Raises:
        CompilationError: If the blocks cannot be compiled, or compute something else then.
    """
    layers = getattr(model.base_model, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise CompilationError(f"{type(model).__name__} has no plain list of decoder blocks")
    modules = list(layers)
    unembedding = model.get_output_embeddings()
    if isinstance(unembedding, Int8Linear):
        modules.append(unembedding)
    try:
        forwards = _compiled(model, modules, len(layers), report)
    except CompilationError:
        raise
    except Exception as error:  # What a server can do without must not keep it from starting.
        raise CompilationError(
            f"{type(model).__name__} cannot be compiled: {type(error).__name__}: {error}"
        ) from error
    for module, forward in zip(modules, forwards, strict=True):
        module.forward = forward


def _compiled(
    model: PreTrainedModel,
    modules: list[nn.Module],
    num_blocks: int,
    report: Callable[[str], None],
) -> list[CompiledForward]:
    found: list[tuple[object, Runner]] = []
    forwards: list[CompiledForward] = []
    calls = record_calls(model, modules)
    if any(call.layer is None for call in calls[:num_blocks]):
        raise CompilationError(f"not every block of {type(model).__name__} attends once")
    for call in calls:
        signature = call.signature
        run = next((run for known, run in found if known == signature), None)
        if run is None:
            run = compile_call(call, report)
            found.append((signature, run))
        forwards.append(CompiledForward(call, run))
        _check(call, forwards[-1])
    return forwards


def _token_sizes(hidden_1TD: Tensor) -> tuple[int, ...]:
    """All sizes but the number of tokens."""
    return (*hidden_1TD.shape[:1], *hidden_1TD.shape[2:])


def _check(call: ModuleCall, forward: CompiledForward) -> None:
    """Run the compiled code on all tokens of the recorded pass, and on the first one alone.

    No token of that pass sees another, so each of them has the same output in any company.
    """
    context = None if call.layer is None else echo_context()
    for inputs, output in (call.inputs, call.output), call.first_token():
        found, expected = forward.run(list(inputs), context), output
        if call.layer is not None:
            # The hidden state that passes by would hide a difference.
            found, expected = found - inputs[0], expected - inputs[0]
        distance, norm = float((found - expected).norm()), float(expected.norm())
        rounding = _ROUNDINGS * torch.finfo(output.dtype).eps * float(output.norm())
        if not distance <= _TOLERANCE * norm + rounding:
            raise CompilationError(
                f"{type(call.module).__name__} computes something else when it is compiled: at a "
                f"distance of {distance:.3g}, where the norm is {norm:.3g}, for layer {call.layer} "
                f"and {output.shape[1]} tokens"
            )
