"""Builds what an engine is made of: model, KV cache, heads, limits and the measured step cost."""

import logging
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from server.attention.create import create_attention
from server.cache import cache_dir
from server.config import NATIVE_HEADS, EngineConfig
from server.core.limits import RequestLimits
from server.device.base import Accelerated, AccelerateOptions, Device
from server.device.create import create_device
from server.errors import ConfigError
from server.executor import EXECUTORS
from server.executor.executor import Executor
from server.executor.model_runner import ModelRunner
from server.kv.block_manager import BlockManager
from server.kv.kv_cache import KVCache, KVLayout
from server.model.draft_heads import (
    DraftHeads,
    heads_directory,
    load_draft_heads,
    native_draft_heads,
)
from server.model.loading import LoadedModel, load_model
from server.sampling.acceptance import check_acceptance, check_default
from server.speculation.cost_cache import CostCache, cached_costs, cost_key
from server.speculation.cost_model import CostModel, StepCosts
from server.speculation.source import SourceContext
from server.speculation.sources import make_sources
from server.speculation.speculator import Speculator
from server.speculation.step_probes import step_probes
from server.speculation.tree_sizes import FixedSizes, PlannedSizes, TreeSizes

_log = logging.getLogger("euryale.build")


@dataclass(frozen=True, slots=True)
class EngineParts:
    """What an engine is assembled from.

    Attributes:
        is_compiled: Whether the base model's decoder layers run compiled.
    """

    config: EngineConfig
    loaded: LoadedModel
    executor: Executor
    blocks: BlockManager
    speculator: Speculator
    limits: RequestLimits
    heads_name: str | None
    is_compiled: bool


def build_parts(config: EngineConfig, keeps_hidden: bool = False) -> EngineParts:
    """Load and measure everything.

    Args:
        config: Validated options.
        keeps_hidden: Whether the KV cache is to keep the hidden states of all tokens.

    Raises:
        ConfigError: If the options do not fit each other or the machine, or a path is wrong.
        ModelError: If the model cannot be loaded or is not supported.
        HeadsMismatchError: If the heads belong to another base model.
    """
    check_default(config.acceptance)
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    model = _ready_model(config, keeps_hidden)
    config, loaded = model.config, model.loaded
    num_blocks = _num_blocks(config, model.layout, model.device, loaded.max_model_len)
    max_len = _max_len(config, loaded, num_blocks)
    cache = KVCache(model.layout, num_blocks)
    blocks = BlockManager(num_blocks, config.block_size, config.prefix_caching)
    products = model.accelerated.draft_products
    sources = make_sources(SourceContext(config, model.draft, cache, blocks, products))
    drafters = {source.name: source.drafter for source in sources if source.drafter is not None}
    runner = ModelRunner(loaded, cache, create_attention(model.accelerated.attention, cache))
    executor = EXECUTORS[model.device.kind](runner, model.layout, drafters)
    sizes: TreeSizes = FixedSizes(_tree_size(config))
    if sources and config.tree_size == "auto":
        costs = _costs(model, executor, bool(drafters), num_blocks)
        sizes = PlannedSizes(StepCosts(costs), drafters.keys())
    speculator = Speculator(sources, sizes, config.max_nodes)
    return EngineParts(
        config=config,
        loaded=loaded,
        executor=executor,
        blocks=blocks,
        speculator=speculator,
        limits=RequestLimits(max_len, loaded.vocab_size, speculator.methods, check_acceptance),
        heads_name=model.heads_name,
        is_compiled=model.accelerated.is_compiled,
    )


@dataclass(frozen=True, slots=True)
class _ReadyModel:
    """A model and its heads as fast as the device makes them, before there is a KV cache.

    Attributes:
        config: The options with the device's defaults.
    """

    config: EngineConfig
    device: Device
    loaded: LoadedModel
    draft: DraftHeads | None
    heads_name: str | None
    layout: KVLayout
    accelerated: Accelerated


def _ready_model(config: EngineConfig, keeps_hidden: bool) -> _ReadyModel:
    device = create_device(config.device)
    prefill_tokens = config.max_prefill_tokens or device.max_prefill_tokens
    config = replace(config, max_prefill_tokens=prefill_tokens)
    options = AccelerateOptions(config.quantization, config.compile, config.attention)
    device.check(device.dtype(config.dtype), options)
    directory = heads_directory(config.heads, config.model)
    loaded, draft = _load(config, directory)
    layout = kv_layout(loaded, config.block_size, draft, keeps_hidden)
    options = replace(options, has_heads=draft is not None)
    accelerated = device.accelerate(loaded.model, layout, options)
    heads_name = directory.name if directory else None
    if config.heads == NATIVE_HEADS:
        heads_name = NATIVE_HEADS
    return _ReadyModel(config, device, loaded, draft, heads_name, layout, accelerated)


def _tree_size(config: EngineConfig) -> int:
    """Nodes of each tree where no cost says how many pay."""
    return config.max_nodes if config.tree_size == "auto" else config.tree_size


def _load(config: EngineConfig, directory: Path | None) -> tuple[LoadedModel, DraftHeads | None]:
    """Load the model, and the heads in a directory or the model's own MTP layer."""
    _log.info("loading model %s", config.model)
    loaded = load_model(config.model, config.device, config.dtype, directory)
    if loaded.adapter_sha256 is not None:
        _log.info(
            "merged the adapter of the heads (sha256 %s) into the model", loaded.adapter_sha256
        )
    if directory is not None:
        _log.info("loading heads %s", directory.name)
        return loaded, load_draft_heads(directory, loaded)
    if config.heads == NATIVE_HEADS:
        _log.info("loading the MTP layer that the model ships")
        return loaded, native_draft_heads(loaded)
    return loaded, None


def _costs(
    model: _ReadyModel, executor: Executor, has_drafters: bool, num_blocks: int
) -> CostModel:
    config, loaded = model.config, model.loaded
    num_slots = num_blocks * config.block_size
    probes = step_probes(executor, has_drafters, num_slots, loaded.max_model_len)
    key = cost_key(
        loaded, model.draft, config.block_size, config.max_nodes, probes, model.accelerated
    )
    return cached_costs(CostCache(cache_dir("costs"), key), probes, config.remeasure)


def kv_layout(
    loaded: LoadedModel, block_size: int, draft: DraftHeads | None, keeps_hidden: bool = False
) -> KVLayout:
    """Size a token's place in the KV cache; an MTP module has a layer and needs hidden states."""
    is_mtp = draft is not None and draft.layer is not None
    return KVLayout(
        num_layers=loaded.num_layers + is_mtp,
        num_kv_heads=loaded.num_kv_heads,
        head_dim=loaded.head_dim,
        block_size=block_size,
        dtype=loaded.dtype,
        device=loaded.device,
        hidden_size=loaded.hidden_size if is_mtp or keeps_hidden else 0,
    )


def _num_blocks(config: EngineConfig, layout: KVLayout, device: Device, max_model_len: int) -> int:
    if config.num_blocks is not None:
        return config.num_blocks
    num_bytes = config.kv_cache_bytes
    if num_bytes is None:
        num_bytes = device.cache_bytes()
    # All sequences at their longest need no more than this.
    useful = config.max_num_seqs * -(-max_model_len // config.block_size)
    num_blocks = min(num_bytes // layout.block_bytes, useful)
    if num_blocks < 1:
        raise ConfigError(
            f"the KV cache has {num_bytes} bytes, but one block takes {layout.block_bytes}; give "
            "a larger kv_cache_bytes"
        )
    return num_blocks


def _max_len(config: EngineConfig, loaded: LoadedModel, num_blocks: int) -> int:
    """Longest prompt plus output that was asked for, or that is possible."""
    possible = min(loaded.max_model_len, num_blocks * config.block_size)
    asked = config.max_model_len
    if asked is not None and asked > possible:
        raise ConfigError(
            f"max_model_len is {asked}, but the model and the KV cache allow {possible}; lower it "
            "or enlarge kv_cache_bytes"
        )
    return possible if asked is None else asked
