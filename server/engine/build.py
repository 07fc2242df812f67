"""Builds what an engine is made of: model, KV cache, heads, limits and the measured step cost."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import torch

import heads as heads_package
from server.cache import cache_dir
from server.config import NATIVE_HEADS, SHIPPED_HEADS, EngineConfig
from server.core.limits import RequestLimits
from server.cpu.compiled_blocks import compile_blocks
from server.cpu.int8_kernel import Int8Kernel, load_int8_kernel
from server.cpu.tree_attention import TreeAttention, can_attend, load_tree_attention
from server.errors import CompilationError, ConfigError
from server.executor.executor import Executor
from server.executor.host import HostExecutor
from server.executor.model_runner import ModelRunner
from server.kv.block_manager import BlockManager
from server.kv.kv_cache import KVCache, KVLayout
from server.model.draft_heads import DraftHeads, load_draft_heads, native_draft_heads
from server.model.loading import LoadedModel, load_model
from server.sampling.acceptance import check_acceptance, check_default
from server.speculation.cost_cache import CostCache, cached_costs, cost_key
from server.speculation.cost_model import StepCosts
from server.speculation.source import SourceContext
from server.speculation.sources import make_sources
from server.speculation.speculator import Speculator
from server.speculation.step_probes import step_probes
from server.speculation.tree_sizes import FixedSizes, PlannedSizes, TreeSizes

_MAX_CPU_CACHE_BYTES = 4 << 30
_CPU_MEMORY_SHARE = 0.25
_CUDA_MEMORY_SHARE = 0.85
# Of the heads that ship for the built-in model; docs/benchmarks.md says why.
_DEFAULT_KIND = "medusa"
# About three times the time of a decode step of the built-in model.
_CPU_PREFILL_TOKENS = 64


@dataclass(frozen=True, slots=True)
class EngineParts:
    """What an engine is assembled from.

    Attributes:
        is_compiled: Whether the base model's blocks run compiled.
    """

    config: EngineConfig
    loaded: LoadedModel
    executor: Executor
    blocks: BlockManager
    speculator: Speculator
    limits: RequestLimits
    heads_name: str | None
    is_compiled: bool


def build_parts(
    config: EngineConfig, report: Callable[[str], None], keeps_hidden: bool = False
) -> EngineParts:
    """Load and measure everything; see `Engine.from_config`."""
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    report(f"loading model {config.model}")
    heads_dir = _heads_directory(config)
    is_int8 = config.quantization == "int8"
    int8_kernel = _int8_kernel(config, "int8 weights", report) if is_int8 else None
    loaded = load_model(
        config.model,
        config.device,
        config.dtype,
        heads_dir,
        quantization=config.quantization,
        int8_kernel=int8_kernel,
    )
    if loaded.adapter_sha256 is not None:
        report(f"merged the adapter of the heads (sha256 {loaded.adapter_sha256}) into the model")
    loaded_heads = None
    if heads_dir is not None:
        report(f"loading heads {heads_dir.name}")
        loaded_heads = load_draft_heads(heads_dir, loaded)
    elif config.heads == NATIVE_HEADS:
        report("loading the MTP layer that the model ships")
        loaded_heads = native_draft_heads(loaded)
    layout = kv_layout(loaded, config.block_size, loaded_heads, keeps_hidden)
    draft_kernel = int8_kernel
    if loaded_heads is not None and not is_int8 and _is_float_on_cpu(layout):
        draft_kernel = _int8_kernel(config, "draft heads", report)
    num_blocks = _num_blocks(config, layout, loaded.max_model_len)
    max_len = min(loaded.max_model_len, num_blocks * config.block_size)
    if config.max_model_len is not None:
        max_len = _checked_max_len(config.max_model_len, max_len)
    if config.max_prefill_tokens is None and loaded.device.type == "cpu":
        config = replace(config, max_prefill_tokens=_CPU_PREFILL_TOKENS)
    kv_cache = KVCache(layout, num_blocks)
    blocks = BlockManager(num_blocks, config.block_size, config.prefix_caching)
    attention = _tree_attention(config, layout, report)
    is_compiled = _compile(config, loaded, attention, report)
    check_default(config.acceptance)
    if not _is_float_on_cpu(layout):
        draft_kernel = None
    sources = make_sources(SourceContext(config, loaded_heads, kv_cache, blocks, draft_kernel))
    drafters = {source.name: source.drafter for source in sources if source.drafter is not None}
    executor = HostExecutor(ModelRunner(loaded, kv_cache, attention), layout, drafters)
    sizes: TreeSizes = FixedSizes(
        config.max_nodes if config.tree_size == "auto" else config.tree_size
    )
    if sources and config.tree_size == "auto":
        num_slots = num_blocks * config.block_size
        probes = step_probes(executor, bool(drafters), num_slots, loaded.max_model_len)
        own_code = {
            "blocks": is_compiled,
            "attention": attention is not None,
            "weights": int8_kernel is not None,
            "heads": draft_kernel is not None,
        }
        key = cost_key(loaded, loaded_heads, config.block_size, config.max_nodes, probes, own_code)
        cache = CostCache(cache_dir() / "costs", key)
        costs = cached_costs(cache, probes, report, config.remeasure)
        sizes = PlannedSizes(StepCosts(costs), drafters.keys())
    speculator = Speculator(sources, sizes, config.max_nodes)
    return EngineParts(
        config=config,
        loaded=loaded,
        executor=executor,
        blocks=blocks,
        speculator=speculator,
        limits=RequestLimits(max_len, loaded.vocab_size, speculator.methods, check_acceptance),
        heads_name=_heads_name(config, heads_dir),
        is_compiled=is_compiled,
    )


def _int8_kernel(
    config: EngineConfig, what: str, report: Callable[[str], None]
) -> Int8Kernel | None:
    """Our own int8 kernel for something, where compiled code is wanted and this CPU runs it."""
    if config.compile == "off":
        return None
    try:
        return load_int8_kernel(report)
    except CompilationError as error:
        report(f"{what} without our own int8 kernel, which is faster: {error}")
        return None


def _tree_attention(
    config: EngineConfig, layout: KVLayout, report: Callable[[str], None]
) -> TreeAttention | None:
    """Our own attention, where compiled code is wanted and this CPU runs it."""
    if config.compile == "off" or not _is_float_on_cpu(layout):
        return None
    if not can_attend(layout):
        report(f"without our own attention, which is not for {layout.head_dim} channels per head")
        return None
    try:
        return load_tree_attention(report)
    except CompilationError as error:
        report(f"without our own attention, which is faster: {error}")
        return None


def _compile(
    config: EngineConfig,
    loaded: LoadedModel,
    attention: TreeAttention | None,
    report: Callable[[str], None],
) -> bool:
    """Compile the base model's blocks if that is asked for and possible; say whether."""
    if config.compile == "off" or (config.compile == "auto" and loaded.device.type != "cpu"):
        return False
    if loaded.device.type != "cpu":
        raise ConfigError(
            f"compile is 'on', but the model is on {loaded.device}; it is for cpu, give 'off'"
        )
    try:
        try:
            compile_blocks(loaded.model, report, attention)
        except CompilationError as error:
            if attention is None:
                raise
            report(f"compiling again for attention by way of Python: {error}")
            compile_blocks(loaded.model, report)
    except CompilationError as error:
        if config.compile == "on":
            raise ConfigError(
                f"compile is 'on', but {error}; install a C++ compiler if there is none, or give "
                "'off'"
            ) from error
        report(f"running uncompiled, which is slower: {error}")
        return False
    return True


def kv_layout(
    loaded: LoadedModel, block_size: int, draft: DraftHeads | None, keeps_hidden: bool = False
) -> KVLayout:
    """Size a token's place in the KV cache; an MTP module has a layer and needs hidden states."""
    is_mtp = draft is not None and draft.block is not None
    return KVLayout(
        num_layers=loaded.num_layers + is_mtp,
        num_kv_heads=loaded.num_kv_heads,
        head_dim=loaded.head_dim,
        block_size=block_size,
        dtype=loaded.dtype,
        device=loaded.device,
        hidden_size=loaded.hidden_size if is_mtp or keeps_hidden else 0,
    )


def _is_float_on_cpu(layout: KVLayout) -> bool:
    return layout.dtype == torch.float32 and layout.device.type == "cpu"


def _heads_name(config: EngineConfig, directory: Path | None) -> str | None:
    if config.heads == NATIVE_HEADS:
        return NATIVE_HEADS
    return directory.name if directory else None


def _heads_directory(config: EngineConfig) -> Path | None:
    if config.heads in ("none", NATIVE_HEADS):
        return None
    if config.heads in ("auto", *SHIPPED_HEADS):
        kind = _DEFAULT_KIND if config.heads == "auto" else config.heads
        shipped = Path(heads_package.__path__[0]) / "pretrained" / f"{config.model}-{kind}"
        if config.model.isidentifier() and shipped.is_dir():
            return shipped
        if config.heads != "auto":
            raise ConfigError(
                f"heads is {config.heads!r}, but none of that kind ship for {config.model}; give "
                "a heads checkpoint, 'auto' or 'none'"
            )
        return None
    path = Path(config.heads)
    if not path.is_dir():
        raise ConfigError(
            f"heads is {config.heads!r}, which is no directory; give a heads checkpoint, 'auto', "
            "'native' or 'none', or the kind of the heads that ship: 'medusa' or 'mtp'"
        )
    return path


def _num_blocks(config: EngineConfig, layout: KVLayout, max_model_len: int) -> int:
    if config.num_blocks is not None:
        return config.num_blocks
    num_bytes = config.kv_cache_bytes
    if num_bytes is None and layout.device.type == "cuda":
        num_bytes = int(torch.cuda.mem_get_info(layout.device)[0] * _CUDA_MEMORY_SHARE)
    elif num_bytes is None:
        available = psutil.virtual_memory().available
        num_bytes = min(int(available * _CPU_MEMORY_SHARE), _MAX_CPU_CACHE_BYTES)
    # All sequences at their longest need no more than this.
    useful = config.max_num_seqs * -(-max_model_len // config.block_size)
    num_blocks = min(num_bytes // layout.block_bytes, useful)
    if num_blocks < 1:
        raise ConfigError(
            f"the KV cache has {num_bytes} bytes, but one block takes {layout.block_bytes}; give "
            "a larger kv_cache_bytes"
        )
    return num_blocks


def _checked_max_len(asked: int, possible: int) -> int:
    if asked > possible:
        raise ConfigError(
            f"max_model_len is {asked}, but the model and the KV cache allow {possible}; lower it "
            "or enlarge kv_cache_bytes"
        )
    return asked
