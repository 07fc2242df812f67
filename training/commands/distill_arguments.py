"""The options of `distill` on the command line."""

import argparse
from pathlib import Path
from typing import Any

from server.config import METHODS
from training.commands.arguments import (
    add_switch,
    adder,
    between,
    count,
    shard,
    temperatures,
    weights,
    whole,
)
from training.data.data_source import data_source


def add_distill(parser: argparse.ArgumentParser, options: Any) -> None:
    """Add the options of `distill`, but for those of the base model; defaults are a type's."""
    add, default = adder(parser, options)
    add("data", type=data_source, metavar="PROMPTS", help="JSON lines (.gz) or hf:NAME#SPLIT")
    add("output", type=Path, metavar="FILE", help="JSON lines to write; an earlier run goes on")
    add("limit", type=count, metavar="N", help="conversations, from the beginning of PROMPTS")
    add("shard", type=shard, metavar="I/N", help="every Nth of them, from number I on")
    add("max-tokens", type=count, metavar="N", help="begin none after so many answer tokens")
    add(
        "category-weights",
        type=weights,
        metavar="NAME=W,NAME=W",
        help="balance answer tokens over categories; 1 if not named",
    )
    add("max-new-tokens", type=count, metavar="N", help="longest answer")
    add("temperatures", type=temperatures, metavar="T,T", help="one per conversation; 0 is greedy")
    add("top-p", type=between(0.0, 1.0), metavar="P", help="nucleus mass")
    add("top-k", type=whole, metavar="K", help="most probable tokens kept; 0 is off")
    add("seed", type=whole, metavar="S", help="each answer's own seed derives from it")
    add("method", choices=METHODS, help="draft source; changes no token")
    add("heads", help="directory of draft heads, auto or none, if METHOD is not none")
    add("concurrency", type=count, metavar="N", help="conversations in flight")
    add_switch(parser, "stop-repeats", default["stop_repeats"], "end answers that go in circles")
