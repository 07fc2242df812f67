"""What every bench starts from: its common options, the sampled conversations and an engine."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from bench.measure.report import Outcome
from bench.workload.conversations import Workload, load_workload
from bench.workload.dialogues import SkippedTurn, Turn, first_turns
from server.cli.options import Count, Settings
from server.config import EngineConfig, SamplingParams, SpeculationParams
from server.engine.engine import Engine

PLAIN = SpeculationParams(method="none")
ENGINE_OPTIONS = (
    "model",
    "heads",
    "max_nodes",
    "tree_size",
    "dtype",
    "quantization",
    "compile",
    "device",
    "num_threads",
)
# `BatchOptions` has a tree size with another default.
BATCH_ENGINE_OPTIONS = tuple(name for name in ENGINE_OPTIONS if name != "tree_size")
_LEAST_STEP_TOKENS = 512
_log = logging.getLogger("euryale.bench")


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptOptions:
    """Prompts and answers.

    Attributes:
        data: JSON lines with turns, messages or a prompt, gzip-compressed or not; the prompts that
            ship with the package if not given.
        limit: Conversations to sample, spread over the categories; all if not given.
        max_new_tokens: Longest output.
    """

    data: Path | None = None
    limit: Count | None = None
    max_new_tokens: Count = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchOptions:
    """Requests in flight.

    Attributes:
        concurrency: Number of requests in flight.
        tree_size: Nodes of each draft tree, root included; auto chooses them for each step by the
            measured step cost; as many as --max-nodes allows if not given.
    """

    concurrency: Count = 8
    tree_size: Literal["auto"] | Count | None = None

    def applied(self, config: EngineConfig) -> EngineConfig:
        """The engine's configuration with these options."""
        tree_size = config.max_nodes if self.tree_size is None else self.tree_size
        return with_room(replace(config, tree_size=tree_size), self.concurrency)


def common_settings(
    engine_options: Sequence[str] = ENGINE_OPTIONS, **defaults: Any
) -> dict[str, Settings]:
    """Settings of the arguments `prompts`, `config` and `speculation` of a bench's `run`.

    Args:
        engine_options: Fields of `EngineConfig` that are options of the bench.
        defaults: Their defaults where these are not those of `EngineConfig`.
    """
    engine_defaults = {"compile": "auto", "prefix_caching": False, "max_num_seqs": 1, **defaults}
    return {
        "prompts": Settings(PromptOptions),
        "config": Settings(EngineConfig, only=engine_options, defaults=engine_defaults),
        "speculation": Settings(SpeculationParams, only=("method",)),
    }


def with_room(config: EngineConfig, concurrency: int) -> EngineConfig:
    """Let so many requests run at once, each with the largest tree.

    The scheduler keeps a quarter of a step for prompts and shrinks trees that do not fit the rest.
    """
    tree_tokens = concurrency * config.max_nodes
    return replace(
        config,
        max_num_seqs=concurrency,
        max_tokens_per_step=max(_LEAST_STEP_TOKENS, -(-tree_tokens * 4 // 3)),
    )


def build_engine(config: EngineConfig) -> Engine:
    """Load an engine; a lack of draft heads is logged."""
    engine = Engine.from_config(config)
    if engine.heads_name is None:
        _log.info("no draft heads are loaded: speculation on is plain decoding too")
    return engine


@dataclass(frozen=True, slots=True)
class Setup:
    """What a bench runs.

    Attributes:
        workload: The sampled conversations.
        engine: The engine under test.
        greedy: Greedy decoding up to an end token or the longest output.
        speculation: Speculation as the options ask for it; `PLAIN` is its counterpart.
    """

    workload: Workload
    engine: Engine
    greedy: SamplingParams
    speculation: SpeculationParams

    def first_turns(self) -> tuple[list[Turn], tuple[SkippedTurn, ...]]:
        """The first turn of each conversation that fits the context, and those that do not.

        Raises:
            BenchError: If none fits.
        """
        return first_turns(self.engine, self.workload.conversations, self.greedy)

    def outcome(
        self,
        result: Any,
        skipped: Sequence[SkippedTurn],
        extra: Mapping[str, Any] | None = None,
        passed: bool = True,
    ) -> Outcome:
        """A bench's result with fields that say what ran, on which data.

        Args:
            result: The bench's dataclass.
            skipped: Turns that were left out.
            extra: Further fields of the report.
            passed: False if the bench is a check and it failed.
        """
        described = {
            **(extra or {}),
            **describe_engine(self.engine),
            **self.workload.describe(),
            "skipped": [asdict(turn) for turn in skipped],
        }
        loaded = self.engine.loaded
        return Outcome(result, loaded.device, loaded.dtype, described, passed)


def prepare(
    prompts: PromptOptions,
    config: EngineConfig,
    speculation: SpeculationParams,
    build: Callable[[EngineConfig], Engine] = build_engine,
) -> Setup:
    """Read the prompts, then load the engine.

    Args:
        prompts: Which conversations are sampled, and the longest output.
        config: What the engine is built from.
        speculation: What the command line says of it; trees are as large as the engine allows.
        build: Loads the engine.

    Raises:
        EuryaleError: If the prompts are wrong, or the engine cannot be built.
    """
    workload = load_workload(prompts.data, prompts.limit)
    return Setup(
        workload=workload,
        engine=build(config),
        greedy=SamplingParams(max_tokens=prompts.max_new_tokens, temperature=0.0),
        speculation=replace(speculation, max_nodes=config.max_nodes),
    )


def describe_engine(engine: Engine) -> dict[str, Any]:
    """Fields of the report that say what ran."""
    config = engine.config
    return {
        "model": engine.model_name,
        "heads": engine.heads_name,
        "quantization": config.quantization,
        "compile": config.compile,
        "is_compiled": engine.is_compiled,
        "max_nodes": config.max_nodes,
        "tree_size": config.tree_size,
    }
