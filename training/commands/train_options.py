"""The options of `train` that every method has; methods and the training loop have their own."""

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Literal

import torch

from server.cli.options import Between, Count, Whole
from training.commands.common import ModelOptions
from training.data.data_source import DataOptions
from training.errors import RunError
from training.loop.trackers import Tracking
from training.resuming import MAY_CHANGE

_DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class TrainOptions(ModelOptions):
    """Answers, a base model and where the heads go.

    Attributes:
        data: Answers to learn from: JSON lines (.gz) or `hf:NAME#SPLIT`; repeatable.
        output: Directory of the run and of the heads; an unfinished run goes on.
        limit: Conversations, from the beginning of the data; not given, all.
        held_out: Share of the conversations that the heads are measured on.
        early_stopping: Measurements in a row without a better one that end the run; 0 never does.
        validation_interval: Steps between these measurements.
        mixed_precision: Type of the heads' matrix products; `auto` is bf16 for a base model of 16
            bits, else no.
        sharding: `fsdp` spreads the layers of the base model over the processes.
        cache: Whether all hidden states are kept in memory.
        seed: Decides the order of the examples.
        track: Experiment trackers that get the metrics too, such as `tensorboard,wandb`; not
            given, none do.
        track_dir: Directory of the trackers' files; not given, `tracking` in OUTPUT.
        overwrite: Whether a run and heads are dropped that OUTPUT holds.
    """

    # Compared by content, not by name.
    data: DataOptions = field(metadata=MAY_CHANGE)
    output: Path = field(metadata=MAY_CHANGE)
    limit: Count | None = None
    held_out: Annotated[float, Between(0, 0.5)] = 0.03
    early_stopping: Whole = 0
    validation_interval: Count = 200
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = "auto"
    sharding: Literal["none", "fsdp"] = field(default="none", metadata=MAY_CHANGE)
    cache: bool = True
    seed: Whole = 0
    track: tuple[str, ...] | None = field(default=None, metadata=MAY_CHANGE)
    track_dir: Path | None = field(default=None, metadata=MAY_CHANGE)
    overwrite: bool = field(default=False, metadata=MAY_CHANGE)

    def check(self) -> None:
        """Check what one option says about another.

        Raises:
            RunError: If options do not go together.
        """
        default = {item.name: item.default for item in fields(self)}["validation_interval"]
        if self.early_stopping == 0 and self.validation_interval != default:
            raise RunError(
                f"validation_interval is {self.validation_interval}, but without early_stopping "
                "nothing is measured on the way; give --early-stopping too or leave it out"
            )
        if self.early_stopping and self.sharding == "fsdp":
            raise RunError(
                f"early_stopping is {self.early_stopping}, for which one process measures alone, "
                "but with sharding all must run the base together; leave out one of them"
            )

    @property
    def tracking(self) -> Tracking:
        """Trackers of the run.

        Raises:
            RunError: If a tracker is unknown or not installed.
        """
        directory = self.output / "tracking" if self.track_dir is None else self.track_dir
        return Tracking(self.track or (), directory, self.output.resolve().name)

    def compute_dtype(self, base_dtype: torch.dtype) -> torch.dtype:
        """Return the type of the heads' matrix products over a base model of a type."""
        if self.mixed_precision == "auto":
            return torch.float32 if base_dtype == torch.float32 else torch.bfloat16
        return _DTYPES[self.mixed_precision]
