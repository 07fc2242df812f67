"""Command line of the benches: one frozen value that every command takes.

Knows no model and no engine beyond the names of their options.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from server.config import MAX_TREE_NODES, METHODS, DeviceName, DtypeName, Method, QuantizationName

COMMANDS = {
    "latency": "tokens per second at batch 1: speculation on, off, and transformers' generate",
    "acceptance": "mean acceptance length, in all, by category and by depth",
    "exactness": "token equality against transformers and between speculation on and off",
    "quality": "typical against exact acceptance when sampling: speed, perplexity, variety",
    "quantization": "quantised weights against plain ones: step seconds, perplexity, agreement",
    "overhead": "share of a step that the engine spends outside the model",
}
# Commands that keep several requests in flight; the others measure batch 1.
_BATCHED = ("acceptance", "exactness")
_DEFAULT_CONCURRENCY = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchOptions:
    """What a bench was asked to do.

    Attributes:
        command: One of `COMMANDS`.
        data: Prompts as JSON lines; None takes the set that ships with the package.
        limit: Number of conversations to sample; None takes all.
        max_new_tokens: Upper bound on each output.
        model: As `EngineConfig.model`.
        heads: As `EngineConfig.heads`.
        rival_heads: Heads of a second engine in the latency bench; None runs none.
        method: Draft source of the runs with speculation.
        max_nodes: Largest tree, root included.
        static: Whether trees are the heads' own, without prompt lookup.
        dtype: As `EngineConfig.dtype`.
        quantization: As `EngineConfig.quantization`.
        device: As `EngineConfig.device`.
        num_threads: CPU threads; None leaves torch's choice.
        concurrency: Requests in flight; 1 for commands that measure batch 1.
        output: File that also gets the JSON object.
    """

    command: str
    data: Path | None = None
    limit: int | None = None
    max_new_tokens: int = 128
    model: str = "smollm2"
    heads: str = "auto"
    rival_heads: str | None = None
    method: Method = "auto"
    max_nodes: int = 32
    static: bool = False
    dtype: DtypeName = "auto"
    quantization: QuantizationName = "none"
    device: DeviceName = "auto"
    num_threads: int | None = None
    concurrency: int = 1
    output: Path | None = None


def parse_options(argv: Sequence[str]) -> BenchOptions:
    """Read a command line; prints a message and exits with 2 if it is wrong."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, summary in COMMANDS.items():
        command = commands.add_parser(
            name,
            help=summary,
            description=summary,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )
        _add_common(command)
        if name == "latency":
            command.add_argument(
                "--rival-heads", metavar="DIR", help="other draft heads to race in the same process"
            )
        if name == "quantization":
            command.set_defaults(quantization="int8")
        if name in _BATCHED:
            command.add_argument(
                "--concurrency",
                type=_positive,
                default=_DEFAULT_CONCURRENCY,
                metavar="N",
                help="requests in flight",
            )
    return BenchOptions(**vars(parser.parse_args(argv)))


def _add_common(parser: argparse.ArgumentParser) -> None:
    default = BenchOptions(command="")
    add = parser.add_argument
    add("--data", type=Path, metavar="FILE", help="JSON lines with turns, messages or prompt (.gz)")
    add("--limit", type=_positive, metavar="N", help="conversations, spread over the categories")
    add(
        "--max-new-tokens",
        type=_positive,
        default=default.max_new_tokens,
        metavar="M",
        help="longest output",
    )
    add("--model", default=default.model, help="hub id, directory, .gguf file or smollm2")
    add("--heads", default=default.heads, help="directory of draft heads, auto or none")
    add("--method", choices=METHODS, default=default.method, help="draft source")
    add("--max-nodes", type=_tree_size, default=default.max_nodes, metavar="N", help="largest tree")
    add("--static", action="store_true", help="the heads' own tree of --max-nodes nodes every time")
    add("--dtype", choices=get_args(DtypeName), default=default.dtype, help="weights' type")
    add(
        "--quantization",
        choices=get_args(QuantizationName),
        default=default.quantization,
        help="8-bit weights",
    )
    add("--device", choices=get_args(DeviceName), default=default.device, help="where to run")
    add("--num-threads", type=_positive, metavar="N", help="CPU threads")
    add("--output", type=Path, metavar="FILE", help="also write the JSON object there")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no count; give a whole number from 1")
    return int(text)


def _tree_size(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= MAX_TREE_NODES:
        raise argparse.ArgumentTypeError(f"{text!r} is no tree size; give 1 to {MAX_TREE_NODES}")
    return int(text)
