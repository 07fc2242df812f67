"""Command line of the benches: one frozen value that every command takes.

Knows no model and no engine beyond the names of their options.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

from server.config import (
    MAX_TREE_NODES,
    METHODS,
    CompileName,
    DeviceName,
    DtypeName,
    Method,
    QuantizationName,
)

COMMANDS = {
    "latency": "tokens per second at batch 1: speculation on, off, and transformers' generate",
    "acceptance": "mean acceptance length, in all, by category and by depth",
    "exactness": "token equality against transformers and between speculation on and off",
    "quality": "typical against exact acceptance when sampling: speed, perplexity, variety",
    "quantization": "quantised weights against plain ones: step seconds, perplexity, agreement",
    "overhead": "share of a step that the engine spends outside the model",
    "serving": "a server under load, speculation on against off: throughput and latencies",
    "prefill": "what a cached prefix saves, and what a long prompt costs the streams beside it",
    "peers": "tokens per second at batch 1 beside transformers and llama.cpp",
}
# Commands that keep several requests in flight; the others measure batch 1.
_BATCHED = ("acceptance", "exactness")
_DEFAULT_CONCURRENCY = 8
_PLOT_SUFFIXES = (".png", ".svg", ".pdf")


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadOptions:
    """How the serving bench loads the server.

    Attributes:
        concurrencies: Numbers of clients of the closed loops.
        rate: Requests per second of an open loop beside them; None runs none.
        rounds: Counted rounds.
        requests_per_round: Of each loop; None takes twice the clients, at least 8, and 32 for an
            open loop.
        seconds_per_round: Time after which a closed loop begins no further request; None sets none.
        seed: Of the draws.
        engine: Whether to leave HTTP out.
        plot: File for the plot; None draws none.
    """

    concurrencies: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    rate: float | None = None
    rounds: int = 5
    requests_per_round: int | None = None
    seconds_per_round: float | None = None
    seed: int = 0
    engine: bool = False
    plot: Path | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillOptions:
    """Sizes of the prefill bench.

    Attributes:
        prompt_tokens: Of a conversation's first message.
        long_prompt_tokens: Of the prompt that arrives while streams decode.
        streams: Requests that decode when it arrives.
        rounds: Counted rounds.
        max_prefill_tokens: As `EngineConfig.max_prefill_tokens`.
    """

    prompt_tokens: int = 2000
    long_prompt_tokens: int = 4000
    streams: int = 8
    rounds: int = 5
    max_prefill_tokens: int | None = None


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
        method: Draft source of the runs with speculation.
        max_nodes: Largest tree, root included.
        tree_size: As `EngineConfig.tree_size`; None takes `max_nodes` for acceptance and
            exactness, `auto` for the others.
        dtype: As `EngineConfig.dtype`.
        quantization: As `EngineConfig.quantization`.
        compile: As `EngineConfig.compile`.
        device: As `EngineConfig.device`.
        num_threads: CPU threads; None leaves torch's choice.
        concurrency: Requests in flight; 1 for commands that measure batch 1.
        load: Of the serving bench.
        prefill: Of the prefill bench.
        llama_server: llama.cpp's server for the peers bench; None looks for it on PATH.
        output: File that also gets the JSON object.
    """

    command: str
    data: Path | None = None
    limit: int | None = None
    max_new_tokens: int = 128
    model: str = "smollm2"
    heads: str = "auto"
    method: Method = "auto"
    max_nodes: int = 32
    tree_size: Literal["auto"] | int | None = None
    dtype: DtypeName = "auto"
    quantization: QuantizationName = "none"
    compile: CompileName = "auto"
    device: DeviceName = "auto"
    num_threads: int | None = None
    concurrency: int = 1
    load: LoadOptions = LoadOptions()
    prefill: PrefillOptions = PrefillOptions()
    llama_server: Path | None = None
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
        if name == "quantization":
            command.set_defaults(quantization="int8")
        if name == "peers":
            command.add_argument(
                "--llama-server",
                type=Path,
                metavar="FILE",
                help="llama.cpp's server, if not on PATH",
            )
        if name == "serving":
            _add_load(command)
        if name == "prefill":
            _add_prefill(command)
        if name in _BATCHED:
            command.add_argument(
                "--concurrency",
                type=_positive,
                default=_DEFAULT_CONCURRENCY,
                metavar="N",
                help="requests in flight",
            )
    values = vars(parser.parse_args(argv))
    if values["command"] == "serving":
        values["load"] = LoadOptions(**_take(values, LoadOptions))
    if values["command"] == "prefill":
        values["prefill"] = PrefillOptions(**_take(values, PrefillOptions))
    return BenchOptions(**values)


def _take(values: dict[str, Any], kind: type[LoadOptions] | type[PrefillOptions]) -> dict[str, Any]:
    return {field.name: values.pop(field.name) for field in fields(kind)}


def _add_load(parser: argparse.ArgumentParser) -> None:
    default = LoadOptions()
    add = parser.add_argument
    add(
        "--concurrency",
        dest="concurrencies",
        type=_counts,
        default=",".join(map(str, default.concurrencies)),
        metavar="N,N,...",
        help="clients of each closed loop",
    )
    add("--rate", type=_amount, metavar="R", help="an open loop too, of R requests per second")
    add("--rounds", type=_positive, default=default.rounds, metavar="N", help="counted rounds")
    add(
        "--requests-per-round",
        type=_positive,
        metavar="N",
        help="requests of each loop in a round; twice the clients, at least 8, if not given",
    )
    add(
        "--seconds-per-round",
        type=_amount,
        metavar="S",
        help="begin no further request of a closed loop after S seconds",
    )
    add("--seed", type=int, default=default.seed, help="of the draws")
    add("--engine", action="store_true", help="drive the asynchronous engine, without HTTP")
    add("--plot", type=_plot, metavar="FILE", help="draw the ratios over the concurrency")


def _add_prefill(parser: argparse.ArgumentParser) -> None:
    default = PrefillOptions()
    counts = {
        "--prompt-tokens": (default.prompt_tokens, "tokens of a conversation's first message"),
        "--long-prompt-tokens": (default.long_prompt_tokens, "tokens of the prompt beside streams"),
        "--streams": (default.streams, "requests that decode when it arrives"),
        "--rounds": (default.rounds, "counted rounds"),
        "--max-prefill-tokens": (None, "as of euryale serve"),
    }
    for name, (count, meaning) in counts.items():
        parser.add_argument(name, type=_positive, default=count, metavar="N", help=meaning)


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
    add(
        "--tree-size",
        type=_tree_size_or_auto,
        metavar="N",
        help="nodes of every tree, or auto: chosen for each step; if not given, --max-nodes for "
        "acceptance and exactness, auto for the others",
    )
    add("--dtype", choices=get_args(DtypeName), default=default.dtype, help="weights' type")
    add(
        "--quantization",
        choices=get_args(QuantizationName),
        default=default.quantization,
        help="8-bit weights",
    )
    add(
        "--compile",
        choices=get_args(CompileName),
        default=default.compile,
        help="compile the model's blocks, on CPU",
    )
    add("--device", choices=get_args(DeviceName), default=default.device, help="where to run")
    add("--num-threads", type=_positive, metavar="N", help="CPU threads")
    add("--output", type=Path, metavar="FILE", help="also write the JSON object there")


def _tree_size_or_auto(text: str) -> Literal["auto"] | int:
    return "auto" if text == "auto" else _tree_size(text)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no count; give a whole number from 1")
    return int(text)


def _counts(text: str) -> tuple[int, ...]:
    counts = tuple(_positive(part.strip()) for part in text.split(","))
    if len(set(counts)) < len(counts):
        raise argparse.ArgumentTypeError(f"{text!r} names a count twice; give each once")
    return counts


def _amount(text: str) -> float:
    try:
        amount = float(text)
    except ValueError:
        amount = 0.0
    if not 0.0 < amount < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no amount; give a number above 0")
    return amount


def _plot(text: str) -> Path:
    path = Path(text)
    if path.suffix not in _PLOT_SUFFIXES:
        raise argparse.ArgumentTypeError(
            f"{text!r} names no image; give a file that ends in {', '.join(_PLOT_SUFFIXES)}"
        )
    return path


def _tree_size(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= MAX_TREE_NODES:
        raise argparse.ArgumentTypeError(f"{text!r} is no tree size; give 1 to {MAX_TREE_NODES}")
    return int(text)
