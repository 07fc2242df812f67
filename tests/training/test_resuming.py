from dataclasses import fields
from pathlib import Path
from typing import Any

from training.commands.train_options import TrainOptions
from training.loop.trainer import TrainConfig
from training.methods.medusa import Medusa
from training.methods.table import METHODS
from training.resuming import kept_options

FREE = {
    *("data", "output", "overwrite", "init_heads", "device", "num_threads", "log_interval"),
    *("track", "track_dir", "save_interval", "gradient_accumulation", "sharding", "hidden_cache"),
}


def test_all_options_are_kept_but_those_that_may_change() -> None:
    options = TrainOptions(data=(), output=Path("heads"))
    everything: tuple[Any, ...] = (
        options,
        TrainConfig(),
        *(method() for method in METHODS.values()),
    )
    names = {item.name for each in everything for item in fields(each)}
    assert names > FREE
    assert set(kept_options(*everything)) == names - FREE


def test_options_are_kept_with_their_values() -> None:
    found = kept_options(TrainConfig(epochs=7), Medusa(num_heads=2))
    assert (found["epochs"], found["num_heads"], found["draft_vocab_size"]) == (7, 2, 4096)
