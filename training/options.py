"""Command line of training: one frozen value per command.

Knows no model and no engine beyond the names of their options.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from server.config import DeviceName, DtypeName, Method
from training.distilled import Sampling
from training.trainer import TrainConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelOptions:
    """The base model and where it runs, as `EngineConfig` has them."""

    model: str = "smollm2"
    device: DeviceName = "auto"
    dtype: DtypeName = "auto"
    num_threads: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class DistillOptions(ModelOptions):
    """What `distill` was asked to do.

    Attributes:
        data: Prompts.
        output: Distilled file; a run that it holds is continued.
        limit: Number of conversations from the beginning of the file; None takes all.
        max_tokens: No conversation begins once there are so many answer tokens; None is no end.
        method: Draft source; changes the speed but no token.
        heads: As `EngineConfig.heads`.
        concurrency: Conversations in flight.
    """

    data: Path
    output: Path
    limit: int | None
    max_tokens: int | None
    sampling: Sampling
    method: Method
    heads: str
    concurrency: int


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadsOptions:
    """Shape of the heads to train.

    Attributes:
        draft_vocab_size: Most frequent tokens that the heads can draft; 0 takes all.
    """

    num_heads: int = 4
    num_blocks: int = 1
    root_conditioned: bool = True
    draft_vocab_size: int = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainOptions(ModelOptions):
    """What `train` was asked to do.

    Attributes:
        data: Distilled file.
        output: Directory of the run and of the heads.
        limit: Number of conversations from the beginning of the file; None takes all.
        held_out: Fraction of the conversations that the heads are measured on.
        cache: Keep all hidden states in memory.
        overwrite: Drop the run and the heads that `output` holds.
    """

    data: Path
    output: Path
    limit: int | None
    heads: HeadsOptions
    config: TrainConfig
    batch_size: int
    held_out: float
    cache: bool
    seed: int
    overwrite: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluateOptions(ModelOptions):
    """What `evaluate` was asked to do.

    Attributes:
        heads: Directory of the heads.
        data: Distilled file that they were not trained on.
        limit: Number of conversations from the beginning of the file; None takes all.
        num_ranks: Candidates per head that the profile covers.
        save: Write the profile into the checkpoint.
    """

    heads: Path
    data: Path
    limit: int | None
    num_ranks: int
    save: bool


Options = DistillOptions | TrainOptions | EvaluateOptions


def parse_options(argv: Sequence[str]) -> Options:
    """Read a command line; prints a message and exits with 2 if it is wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m training", description="Train draft heads for a base model."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, summary, add_options in (
        ("distill", "have the base model answer prompts", _add_distill),
        ("train", "train Medusa heads on distilled answers", _add_train),
        ("evaluate", "measure heads on answers they were not trained on", _add_evaluate),
    ):
        command = commands.add_parser(
            name,
            help=summary,
            description=summary,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )
        add_options(command)
        _add_model(command)
    values = vars(parser.parse_args(argv))
    read = {"distill": _distill_options, "train": _train_options}
    return read.get(values.pop("command"), _evaluate_options)(values)


def _distill_options(values: dict[str, object]) -> Options:
    return DistillOptions(**values)  # type: ignore[arg-type]
