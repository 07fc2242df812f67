"""The options of `evaluate` on the command line."""

import argparse
from pathlib import Path
from typing import Any

from training.commands.arguments import add_switch, adder, count
from training.data.data_source import data_source


def add_evaluate(parser: argparse.ArgumentParser, options: Any) -> None:
    """Add the options of `evaluate`, but for those of the base model; defaults are a type's."""
    add, default = adder(parser, options)
    add("heads", type=Path, metavar="DIR", help="heads checkpoint")
    add(
        "data",
        type=data_source,
        action="append",
        metavar="FILE",
        help="held-out answers (.gz) or hf:NAME#SPLIT; repeatable",
    )
    add("limit", type=count, metavar="N", help="conversations, from the beginning of the data")
    add("num-ranks", type=count, metavar="R", help="candidates per depth in the profile")
    add("num-depths", type=count, metavar="K", help="mtp: depths to measure")
    add_switch(parser, "save", default["save"], "write the profile into the checkpoint")
