"""Command line of training: one frozen value per command.

Knows no model and no engine beyond the names of their options.
"""

import argparse
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from server.config import DeviceName, DtypeName, Method
from training.commands.arguments import adder, count
from training.commands.config_file import OptionParser, config_path
from training.commands.distill_arguments import add_distill
from training.commands.evaluate_arguments import add_evaluate
from training.commands.train_arguments import (
    ALL_LINEAR,
    LEARNING_RATES,
    MixedPrecision,
    Sharding,
    TrainMethod,
    add_train,
)
from training.data.data_source import DataSource
from training.data.distilled import WHOLE, Sampling, Shard
from training.loop.trainer import TrainConfig
from training.states.encoded import TokenPlan
from training.states.examples import BatchPlan


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelOptions:
    """The base model and where it runs, as `EngineConfig` has them."""

    model: str = "smollm2"
    device: DeviceName = "auto"
    dtype: DtypeName = "auto"
    num_threads: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class HiddenCacheOptions(ModelOptions):
    """Where hidden states are kept, beside the base model that they are of.

    Attributes:
        hidden_cache: Directory of the states, which runs may share; None keeps none on disk.
        hidden_cache_dtype: Of the states on disk; `auto` is the base model's, which loses nothing.
    """

    hidden_cache: Path | None = None
    hidden_cache_dtype: DtypeName = "auto"


@dataclass(frozen=True, slots=True, kw_only=True)
class DistillOptions(HiddenCacheOptions):
    """What `distill` was asked to do.

    Attributes:
        data: Prompts, in a file or a data set.
        output: Distilled file; a run that it holds is continued.
        limit: Number of conversations from the beginning of the file; None takes all.
        shard: Which of them this run answers.
        max_tokens: No conversation begins once there are so many answer tokens; None is no end.
        category_weights: Share of answer tokens by category; None keeps the order of the file.
        temperatures: Each conversation has one of them.
        method: Draft source; changes the speed but no token.
        heads: As `EngineConfig.heads`.
        concurrency: Conversations in flight.
    """

    data: DataSource
    output: Path
    limit: int | None = None
    shard: Shard = WHOLE
    max_tokens: int | None = None
    category_weights: Mapping[str, float] | None = None
    max_new_tokens: int = 256
    temperatures: tuple[float, ...] = (0.0,)
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    stop_repeats: bool = True
    method: Method = "none"
    heads: str = "auto"
    concurrency: int = 64

    @property
    def sampling(self) -> Sampling:
        """How answers are drawn."""
        return Sampling(
            max_new_tokens=self.max_new_tokens,
            temperatures=self.temperatures,
            top_p=self.top_p,
            top_k=self.top_k,
            seed=self.seed,
            stop_repeats=self.stop_repeats,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainOptions(HiddenCacheOptions):
    """What `train` was asked to do.

    Attributes:
        data: Answers, in files or data sets.
        output: Directory of the run and of the heads.
        method: `medusa` trains Medusa heads, `medusa2` an adapter of the base with them, `mtp` an
            MTP module.
        init_heads: Medusa heads to begin with; None begins with fresh ones.
        limit: Number of conversations from the beginning of the files; None takes all.
        num_depths: Depths that an MTP module is unrolled to.
        draft_vocab_size: Most frequent tokens that the heads can draft; 0 takes all.
        batch_tokens: Tokens of a step of an MTP module, prompts included.
        learning_rate: At its peak; None is what suits the method.
        root_rate_factor: Multiplies the learning rate of the maps of the root embedding. Embeddings
            are an order of magnitude smaller than hidden states, so that their maps' weights have
            a longer way to go.
        held_out: Fraction of the conversations that the heads are measured on.
        early_stopping: Measurements in a row without a better one that end the run; 0 never does.
        validation_interval: Steps between these measurements.
        cache: Keep all hidden states in memory.
        tensorboard: Directory that gets the metrics for TensorBoard too.
        overwrite: Drop the run and the heads that `output` holds.
        batch_size: Examples of an optimiser step, on all processes together.
        gradient_accumulation: Parts in which each process goes through its share of a batch.
        max_grad_norm: Longer gradients are scaled down to this norm; 0 leaves them.
        mixed_precision: Of the matrix products; `auto` is bf16 for a base model of 16 bits.
        kl_weight: Share of the divergence from the base model's own distribution in the loss.
        sharding: `fsdp` spreads the layers of the base over the processes.
        warmup_epochs: In which `medusa2` trains fresh heads alone; heads to begin with need none.
        lora_rank: Of the adapter; its alpha is twice that.
        lora_targets: Layers that are adapted; `all-linear` is all but the unembedding.
        lora_learning_rate: Of the adapter, at its peak.
        divergence_weight: Weight of the divergence of the adapted base from the plain one, where
            the first head's loss has the weight 1.
    """

    data: tuple[DataSource, ...]
    output: Path
    method: TrainMethod = "medusa"
    init_heads: Path | None = None
    limit: int | None = None
    num_heads: int = 4
    num_blocks: int = 2
    root_conditioned: bool = True
    num_depths: int = 4
    draft_vocab_size: int = 4096
    epochs: int = 3
    batch_size: int = 2048
    batch_tokens: int = 4096
    gradient_accumulation: int = 1
    learning_rate: float | None = None
    root_rate_factor: float = 16.0
    warmup_fraction: float = 0.03
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    mixed_precision: MixedPrecision = "auto"
    sharding: Sharding = "none"
    head_decay: float = 0.8
    kl_weight: float = 0.0
    held_out: float = 0.03
    early_stopping: int = 0
    validation_interval: int = 200
    cache: bool = True
    save_interval: int = 200
    log_interval: int = 10
    tensorboard: Path | None = None
    seed: int = 0
    overwrite: bool = False
    warmup_epochs: int = 1
    lora_rank: int = 16
    lora_targets: tuple[str, ...] = (ALL_LINEAR,)
    lora_learning_rate: float = 4e-4
    divergence_weight: float = 30.0

    @property
    def peak_learning_rate(self) -> float:
        """The learning rate at its peak."""
        if self.learning_rate is None:
            return LEARNING_RATES[self.method]
        return self.learning_rate

    @property
    def train_config(self) -> TrainConfig:
        """How heads are trained."""
        return TrainConfig(
            epochs=self.epochs,
            learning_rate=self.peak_learning_rate,
            warmup_fraction=self.warmup_fraction,
            weight_decay=self.weight_decay,
            clip_norm=self.max_grad_norm or math.inf,
            gradient_accumulation=self.gradient_accumulation,
            head_decay=self.head_decay,
            save_interval=self.save_interval,
            log_interval=self.log_interval,
            tensorboard=self.tensorboard,
        )

    @property
    def batch_plan(self) -> BatchPlan:
        """How examples are put into batches."""
        return BatchPlan(batch_size=self.batch_size, is_cached=self.cache, seed=self.seed)

    @property
    def token_plan(self) -> TokenPlan:
        """How whole documents are put into batches."""
        return TokenPlan(batch_tokens=self.batch_tokens, is_cached=self.cache, seed=self.seed)


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluateOptions(HiddenCacheOptions):
    """What `evaluate` was asked to do.

    Attributes:
        heads: Directory of the heads.
        data: Answers that they were not trained on, in files or data sets.
        limit: Number of conversations from the beginning of the files; None takes all.
        num_ranks: Candidates per depth that the profile covers.
        num_depths: Depths that an MTP module is measured at; None is as many as its profile has.
        save: Write the profile into the checkpoint.
    """

    heads: Path
    data: tuple[DataSource, ...]
    limit: int | None = None
    num_ranks: int = 16
    num_depths: int | None = None
    save: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvertOptions(ModelOptions):
    """What `convert` was asked to do.

    Attributes:
        source: Original Medusa heads; or what `model` says, for the MTP layer that it ships.
        output: Directory of the heads.
        overwrite: Replace heads that `output` holds.
    """

    source: Path
    output: Path
    overwrite: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportOptions:
    """What `report` was asked to do.

    Attributes:
        heads: Directory of heads that were trained or evaluated.
        output: Page to write; None is `report.html` beside the heads.
    """

    heads: Path
    output: Path | None = None


Options = DistillOptions | TrainOptions | EvaluateOptions | ConvertOptions | ReportOptions


def parse_options(argv: Sequence[str]) -> Options:
    """Read a command line and its file; prints a message and exits with 2 if the former is wrong.

    Raises:
        ConfigError: If the file is wrong.
    """
    parser = argparse.ArgumentParser(
        prog="python -m training", description="Train draft heads for a base model."
    )
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="COMMAND", parser_class=OptionParser
    )
    path, values = config_path(argv), dict[str, Any]()
    for name, command in _COMMANDS.items():
        subparser = commands.add_parser(
            name,
            help=command.summary,
            description=command.summary,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )
        command.add_options(subparser, command.type)
        if issubclass(command.type, ModelOptions):
            _add_model(subparser)
        if issubclass(command.type, HiddenCacheOptions):
            _add_hidden_cache(subparser)
        subparser.add_config()
        if path is not None and name in argv[:1]:
            values = subparser.read_config(path, command.type)
    for name, value in vars(parser.parse_args(argv)).items():
        values[name] = tuple(value) if isinstance(value, list) else value
    del values["config"]
    return _COMMANDS[values.pop("command")].type(**values)


def _add_convert(parser: argparse.ArgumentParser, options: Any) -> None:
    add, _ = adder(parser, options)
    add(
        "source",
        type=Path,
        metavar="DIR",
        help="config.json and medusa_lm_head.*, or --model again",
    )
    add("output", type=Path, metavar="DIR", help="heads to write")
    parser.add_argument("--overwrite", action="store_true", help="replace what --output holds")


def _add_report(parser: argparse.ArgumentParser, options: Any) -> None:
    add, _ = adder(parser, options)
    add("heads", type=Path, metavar="DIR", help="heads with acceptance.json")
    add("output", type=Path, metavar="FILE", help="page to write; DIR/report.html if not given")


def _add_model(parser: argparse.ArgumentParser) -> None:
    add, _ = adder(parser, ModelOptions)
    add("model", help="hub id, directory, .gguf file or smollm2")
    add("device", choices=get_args(DeviceName), help="where the model runs")
    add("dtype", choices=get_args(DtypeName), help="type of its weights")
    add("num-threads", type=count, metavar="N", help="CPU threads")


def _add_hidden_cache(parser: argparse.ArgumentParser) -> None:
    add, _ = adder(parser, HiddenCacheOptions)
    add("hidden-cache", type=Path, metavar="DIR", help="keep hidden states on disk, for all runs")
    add("hidden-cache-dtype", choices=get_args(DtypeName), help="type of the states on disk")


@dataclass(frozen=True, slots=True)
class _Command:
    summary: str
    type: type[Options]
    add_options: Callable[[argparse.ArgumentParser, Any], None]


_COMMANDS: Mapping[str, _Command] = {
    "distill": _Command("have the base model answer prompts", DistillOptions, add_distill),
    "train": _Command("train draft heads on distilled answers", TrainOptions, add_train),
    "evaluate": _Command(
        "measure heads on answers they were not trained on", EvaluateOptions, add_evaluate
    ),
    "report": _Command("plot a training run and its heads", ReportOptions, _add_report),
    "convert": _Command("import Medusa heads or a native MTP layer", ConvertOptions, _add_convert),
}
