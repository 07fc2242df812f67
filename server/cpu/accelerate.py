"""Makes a model fast on CPU: faster products, our own attention and compiled decoder layers.

Everything that our own machine code computes is also computed by torch, more slowly, where the
code cannot run; a log line says why.
"""

import functools
import logging

import torch
from transformers import PreTrainedModel

from heads.packed_product import PackedProduct
from server.cpu.compiled_layers import compile_layers
from server.cpu.int8_kernel import Int8Kernel, load_int8_kernel
from server.cpu.int8_linear import Int8Product, quantize_linears
from server.cpu.packed_linear import pack_linears
from server.cpu.tree_attention import OwnEcho, TreeAttention, can_attend, load_tree_attention
from server.device.base import Accelerated, AccelerateOptions, DraftProducts
from server.errors import CompilationError, ConfigError
from server.kv.kv_cache import KVLayout

_log = logging.getLogger("euryale.cpu")


def accelerate(model: PreTrainedModel, layout: KVLayout, options: AccelerateOptions) -> Accelerated:
    """Replace a model's linear layers, choose its attention and compile its decoder layers.

    Args:
        model: On the CPU, with plain linear layers; changed in place.
        layout: Layout of the KV cache that the model will run with.
        options: What is wanted; int8 weights need float32 and a machine that `can_quantize`.

    Raises:
        ConfigError: If compiling is insisted on and impossible.
    """
    is_int8 = options.quantization == "int8"
    is_float = layout.dtype == torch.float32
    kernel = None
    if is_int8 or (options.has_heads and is_float):
        kernel = _int8_kernel(options, "int8 weights" if is_int8 else "draft heads")
    if is_int8:
        quantize_linears(model, kernel)
    else:
        pack_linears(model)
    library = _tree_attention(options, layout)
    is_compiled = options.compile != "off" and _compile(model, options, library)
    attention = options.attention
    if attention == "auto":
        attention = "sdpa" if library is None else "cpu"
    return Accelerated(
        attention=attention,
        draft_products=draft_products(kernel),
        quantization=options.quantization,
        is_compiled=is_compiled,
        own_code={
            "layers": is_compiled,
            "weights": is_int8 and kernel is not None,
            "heads": kernel is not None,
        },
    )


def draft_products(kernel: Int8Kernel | None) -> DraftProducts:
    """Let draft heads multiply in int8 by our own kernel; None packs their float weights."""
    if kernel is None:
        return DraftProducts(PackedProduct, pack_linears)
    return DraftProducts(
        make=functools.partial(Int8Product, kernel=kernel),
        replace_linears=functools.partial(quantize_linears, kernel=kernel),
        is_own=True,
    )


def _int8_kernel(options: AccelerateOptions, what: str) -> Int8Kernel | None:
    """Our own int8 kernel for something, where compiled code is wanted and this CPU runs it."""
    if options.compile == "off":
        return None
    try:
        return load_int8_kernel()
    except CompilationError as error:
        _log.info("%s without our own int8 kernel, which is faster: %s", what, error)
        return None


def _tree_attention(options: AccelerateOptions, layout: KVLayout) -> TreeAttention | None:
    """Our own attention, where it is wanted and this CPU runs it."""
    if options.compile == "off" or options.attention not in ("auto", "cpu"):
        return None
    if layout.dtype != torch.float32:
        return None
    if not can_attend(layout):
        _log.info(
            "without our own attention, which is not for %s channels per head", layout.head_dim
        )
        return None
    try:
        return load_tree_attention()
    except CompilationError as error:
        _log.info("without our own attention, which is faster: %s", error)
        return None


def _compile(
    model: PreTrainedModel, options: AccelerateOptions, library: TreeAttention | None
) -> bool:
    """Compile the model's decoder layers if that is possible; say whether."""
    try:
        try:
            compile_layers(model, None if library is None else OwnEcho(library))
        except CompilationError as error:
            if library is None:
                raise
            _log.info("compiling again for attention by way of Python: %s", error)
            compile_layers(model)
    except CompilationError as error:
        if options.compile == "on":
            raise ConfigError(
                f"compile is 'on', but {error}; install a C++ compiler if there is none, or give "
                "'off'"
            ) from error
        _log.info("running uncompiled, which is slower: %s", error)
        return False
    return True
