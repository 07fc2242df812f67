"""What every bench starts from: the sampled conversations and an engine."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

from bench.options import BenchOptions
from bench.progress import note
from bench.workload.conversations import (
    SAMPLE_PATH,
    Conversation,
    PromptSet,
    read_prompts,
    sample_evenly,
)
from bench.workload.dialogues import SkippedTurn
from server.config import DtypeName, EngineConfig, SamplingParams, SpeculationParams
from server.engine.engine import Engine

_DEFAULT_STEP_TOKENS = 512


@dataclass(frozen=True, slots=True)
class Workload:
    """A prompt file and the part of it that the bench runs."""

    prompts: PromptSet
    conversations: tuple[Conversation, ...]

    def describe(self, skipped: tuple[SkippedTurn, ...]) -> dict[str, Any]:
        """Fields of the report: rows of the file, prompts sampled, turns left out."""
        return {
            "data": self.prompts.file_name,
            "data_sha256": self.prompts.sha256,
            "num_rows": len(self.prompts.conversations),
            "num_prompts": len(self.conversations),
            "skipped": [asdict(turn) for turn in skipped],
        }


def load_workload(options: BenchOptions) -> Workload:
    """Read and sample the prompts.

    Raises:
        BenchError: If the file is wrong.
    """
    prompts = read_prompts(options.data or SAMPLE_PATH)
    return Workload(prompts, tuple(sample_evenly(prompts.conversations, options.limit)))


def engine_config(
    options: BenchOptions, tree_size: Literal["auto"] | int, dtype: DtypeName | None = None
) -> EngineConfig:
    """What the engine under test is built from.

    Prefix caching is off, so that no run starts with what an earlier one computed. The step is
    large enough for a full tree of every request in flight: the scheduler keeps a quarter of it
    for prompts and would shrink the trees otherwise.

    Args:
        options: What the bench was asked for.
        tree_size: Nodes of each draft tree if the options say nothing about it.
        dtype: Type of the weights; None takes that of the options.
    """
    tree_tokens = options.concurrency * options.max_nodes
    return EngineConfig(
        model=options.model,
        heads=options.heads,
        device=options.device,
        dtype=dtype or options.dtype,
        quantization=options.quantization,
        compile=options.compile,
        max_num_seqs=options.concurrency,
        max_tokens_per_step=max(_DEFAULT_STEP_TOKENS, -(-tree_tokens * 4 // 3)),
        max_nodes=options.max_nodes,
        tree_size=tree_size if options.tree_size is None else options.tree_size,
        prefix_caching=False,
        num_threads=options.num_threads,
    )


def build_engine(config: EngineConfig) -> Engine:
    """Load an engine; its stages, and a lack of draft heads, are told on stderr."""
    engine = Engine.from_config(config, note)
    if engine.heads_name is None:
        note("no draft heads are loaded: speculation on is plain decoding too")
    return engine


def greedy(options: BenchOptions) -> SamplingParams:
    """Greedy decoding up to an end token or the options' length."""
    return SamplingParams(max_tokens=options.max_new_tokens, temperature=0.0)


def speculation_on(options: BenchOptions) -> SpeculationParams:
    """Speculation as the options ask for it."""
    return SpeculationParams(method=options.method, max_nodes=options.max_nodes)


def speculation_off() -> SpeculationParams:
    """Plain decoding."""
    return SpeculationParams(method="none")


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
