"""The `euryale` command.

Options come from the configuration dataclasses: each field that a table below names is an option
`--like-this` and an environment variable `EURYALE_LIKE_THIS`. Errors of ours end as one line on
stderr and an exit code: 2 for a wrong option, 3 for the model, 4 for the heads, 1 for others.
"""

import asyncio
import functools
import inspect
import logging
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer
from rich.console import Console
from rich.segment import Segment, Segments
from rich.text import Text

from server.api.config import ApiConfig, ServerConfig, installed_version
from server.config import METHODS, EngineConfig, SamplingParams, SpeculationParams
from server.core.completion import join_outputs
from server.core.request import Request, RequestOutput, RequestStats
from server.errors import (
    ConfigError,
    EuryaleError,
    HeadsCheckpointError,
    HeadsMismatchError,
    InvalidRequestError,
    ModelError,
)

if TYPE_CHECKING:
    from server.engine.engine import Engine

ENGINE_OPTIONS: Mapping[str, str] = {
    "model": "Hub id, local directory, .gguf file or the built-in smollm2.",
    "heads": "Directory of draft heads; auto, medusa and mtp take those shipped for the model, "
    "native the MTP layer of its own checkpoint, none has none.",
    "device": "Where the model runs; auto takes CUDA if there is a device.",
    "dtype": "Weight type; auto is float32 on CPU and bfloat16 on CUDA.",
    "quantization": "int8 stores weights in 8 bits, on CPU only; faster and a little less exact.",
    "compile": "Compile the model's blocks, on CPU, which needs a C++ compiler once; auto where it "
    "can. Also for our own int8 product and attention.",
    "block_size": "Tokens per KV block.",
    "num_blocks": "KV blocks in all; derived from --kv-cache-bytes if not given.",
    "kv_cache_bytes": "Memory of the KV cache; a share of the free memory if not given.",
    "max_num_seqs": "Sequences that run at once.",
    "max_tokens_per_step": "Tokens of one forward pass, prompt chunks and tree nodes together.",
    "max_prefill_tokens": "Prompt tokens of a step in which others decode; 64 on CPU if not given.",
    "max_model_len": "Longest prompt plus output; the model's own limit if not given.",
    "max_nodes": "Largest draft tree of a sequence, root included.",
    "tree_size": "Nodes of each draft tree; auto chooses by the measured step cost.",
    "lookup": "Draft from earlier text of the prompt and the output too.",
    "acceptance": "Rule of requests that ask for auto and have no seed and no log-probs.",
    "prefix_caching": "Reuse the KV of earlier prompts with the same beginning.",
    "num_threads": "CPU threads of the model; torch's choice if not given.",
    "remeasure": "Measure the step cost although an earlier start kept it.",
}
API_OPTIONS: Mapping[str, str] = {
    "served_model_name": "Name that clients give as model; that of --model if not given.",
    "api_key": "Bearer token that clients must send; none is asked for if not given.",
    "max_request_bytes": "Longest request body.",
}
SERVER_OPTIONS: Mapping[str, str] = {
    "host": "Address to listen on.",
    "port": "Port to listen on; 0 takes a free one.",
    "max_queue": "Requests that may wait beyond those that run; more are answered with 429.",
    "drain_s": "Seconds that running requests get to end after the first SIGTERM.",
    "log_level": "Least severe messages that are logged; info logs accesses.",
}
SAMPLING_OPTIONS: Mapping[str, str] = {
    "max_tokens": "Longest output in tokens.",
    "temperature": "0 takes the most probable token every time.",
    "top_p": "Sample from the most probable tokens of this total probability.",
    "top_k": "Sample from this many most probable tokens; 0 is off.",
    "min_p": "Drop tokens less probable than this share of the most probable one.",
    "seed": "Makes a sampled text reproducible.",
}
SPECULATION_OPTIONS: Mapping[str, str] = {
    "method": f"Draft source, one of {', '.join(METHODS)}; none decodes plainly.",
}
_SPECIAL_TYPES: Mapping[str, Any] = {"tree_size": str}
_EXIT_CODES: tuple[tuple[type[EuryaleError], int], ...] = (
    (ConfigError, 2),
    (InvalidRequestError, 2),
    (ModelError, 3),
    (HeadsMismatchError, 4),
    (HeadsCheckpointError, 2),
    (EuryaleError, 1),
)
# Colours of accepted tokens by depth in the draft tree; deeper ones share the last.
_DEPTH_STYLES = ("green", "cyan", "yellow", "magenta", "red")
_CONTROL_CHARACTERS = {
    code: "\N{REPLACEMENT CHARACTER}"
    for code in (*range(0x20), *range(0x7F, 0xA0))
    if chr(code) not in "\n\t"
}

app = typer.Typer(
    name="euryale",
    help="An LLM inference server that speculates.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    # Boxes would cut the names of environment variables off.
    rich_markup_mode=None,
)

Command = Callable[..., None]


def _one_line_errors(command: Command) -> Command:
    """Turn an error of ours into one line and an exit code."""

    @functools.wraps(command)
    def wrapped(**kwargs: object) -> None:
        try:
            command(**kwargs)
        except EuryaleError as error:
            typer.echo(f"error: {' '.join(str(error).split())}", err=True)
            code = next(code for kind, code in _EXIT_CODES if isinstance(error, kind))
            raise typer.Exit(code) from error

    return wrapped


def _takes(
    argument: str, config_type: type, options: Mapping[str, str], **defaults: object
) -> Callable[[Command], Command]:
    """Give a command options for a dataclass, which it then gets as one keyword argument.

    Args:
        argument: Name of the keyword argument.
        config_type: The dataclass; a field's default is its option's default.
        options: Help by field; fields that are not named keep their default.
        defaults: Defaults by field that differ here.
    """
    hints = get_type_hints(config_type)
    parameters = []
    for item in fields(config_type):
        if item.name in options:
            flag = f"--{item.name.replace('_', '-')}"
            option = typer.Option(
                f"{flag}/--no{flag[1:]}" if hints[item.name] is bool else flag,
                envvar=f"EURYALE_{item.name.upper()}",
                help=options[item.name],
            )
            annotation = _SPECIAL_TYPES.get(item.name, hints[item.name])
            parameters.append(
                inspect.Parameter(
                    item.name,
                    inspect.Parameter.KEYWORD_ONLY,
                    default=defaults.get(item.name, item.default),
                    annotation=Annotated[annotation, option],
                )
            )

    def decorate(command: Command) -> Command:
        @functools.wraps(command)
        def wrapped(**kwargs: object) -> None:
            values = {name: kwargs.pop(name) for name in options}
            command(**kwargs, **{argument: config_type(**_parsed(values))})

        own = inspect.signature(command).parameters.values()
        kept = [parameter for parameter in own if parameter.name != argument]
        # Typer reads a command's options from its signature.
        wrapped.__signature__ = inspect.Signature([*kept, *parameters])  # type: ignore[attr-defined]
        return wrapped

    return decorate


def _parsed(values: Mapping[str, Any]) -> dict[str, Any]:
    """Read the options whose value is a word or a number."""
    parsed = dict(values)
    for name in ("tree_size",):
        value = parsed.get(name, "auto")
        if value != "auto":
            if not value.isdecimal():
                raise ConfigError(f"{name} is {value!r}; give auto or a number of nodes")
            parsed[name] = int(value)
    return parsed


@app.callback()
def euryale() -> None:
    """An LLM inference server that speculates."""
    _ignore_service_link()


def _ignore_service_link() -> None:
    """Unset `EURYALE_PORT` if Kubernetes has set it.

    A pod gets the variables of "service links" for each service of its namespace. For one that is
    called euryale, EURYALE_PORT is the service's address, like tcp://10.0.0.1:8000, and it would
    be taken for the option --port. Commands read their options from the environment after this.
    """
    if os.environ.get("EURYALE_PORT", "").startswith("tcp://"):
        del os.environ["EURYALE_PORT"]


@app.command()
def version() -> None:
    """Print the version."""
    typer.echo(installed_version())


@app.command()
@_one_line_errors
@_takes("api_config", ApiConfig, API_OPTIONS)
@_takes("server_config", ServerConfig, SERVER_OPTIONS)
@_takes("engine_config", EngineConfig, ENGINE_OPTIONS, compile="auto")
def serve(
    *, engine_config: EngineConfig, api_config: ApiConfig, server_config: ServerConfig
) -> None:
    """Serve a model over an OpenAI-compatible HTTP API."""
    # NOTE: Imported here because torch takes seconds, which --help should not.
    from server.api.serving import listen
    from server.api.serving import serve as serve_http
    from server.engine.async_engine import AsyncEngine
    from server.engine.engine import Engine
    from server.engine.own_thread import in_own_thread

    logging.basicConfig(
        level=server_config.log_level.upper(), format="%(asctime)s %(levelname)s %(message)s"
    )
    with listen(server_config) as taken:
        report = logging.getLogger("euryale").info
        engine = in_own_thread(lambda: Engine.from_config(engine_config, report))
        async_engine = AsyncEngine(engine, server_config.max_queue)
        asyncio.run(serve_http(async_engine, api_config, server_config, taken))


@app.command()
@_one_line_errors
@_takes("engine_config", EngineConfig, ENGINE_OPTIONS, compile="auto")
@_takes("speculation", SpeculationParams, SPECULATION_OPTIONS)
@_takes("sampling", SamplingParams, SAMPLING_OPTIONS, temperature=0.0)
def generate(
    prompt: Annotated[str, typer.Argument(help="What to say to the model.", show_default=False)],
    *,
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue PROMPT as it stands, without chat template.")
    ] = False,
    engine_config: EngineConfig,
    sampling: SamplingParams,
    speculation: SpeculationParams,
) -> None:
    """Stream an answer to the terminal; accepted draft tokens are coloured by depth."""
    from server.engine.engine import Engine

    notes = Console(stderr=True, highlight=False)
    engine = Engine.from_config(engine_config, lambda stage: notes.print(stage, style="dim"))
    if raw:
        token_ids = engine.tokenizer.encode(prompt)
    else:
        token_ids = engine.tokenizer.apply_chat_template([{"role": "user", "content": prompt}])
    request = Request("generate", tuple(token_ids), sampling, speculation)
    run = _stream(engine, request, Console(highlight=False))
    notes.print(_summary(run), soft_wrap=True)


@dataclass(frozen=True, slots=True)
class _Run:
    """A finished generation."""

    stats: RequestStats
    first_token_s: float
    elapsed_s: float


def _stream(engine: "Engine", request: Request, console: Console) -> _Run:
    started_s = time.perf_counter()
    engine.add_request(request)
    outputs: list[RequestOutput] = []
    first_token_s = 0.0
    num_shown = 0
    while engine.has_unfinished:
        for output in engine.step():
            first_token_s = first_token_s or time.perf_counter() - started_s
            outputs.append(output)
            for text, depth in zip(output.token_texts, output.depths, strict=True):
                _show(console, text, _style(depth))
                num_shown += len(text)
    # A character that the last token left incomplete belongs to no token's text.
    completion = join_outputs(outputs)
    _show(console, f"{completion.text[num_shown:]}\n", _style(0))
    return _Run(completion.stats, first_token_s, time.perf_counter() - started_s)


def _show(console: Console, text: str, style: str) -> None:
    """Write text as it is; a terminal gets no control characters, which could command it."""
    if console.is_terminal:
        text = text.translate(_CONTROL_CHARACTERS)
    # NOTE: A segment and not a Text, which would expand tabs.
    console.print(Segments([Segment(text, console.get_style(style))]), end="", soft_wrap=True)


def _style(depth: int) -> str:
    return _DEPTH_STYLES[min(depth, len(_DEPTH_STYLES)) - 1] if depth else "none"


def _summary(run: _Run) -> Text:
    """Speed and acceptance of a run, with the legend of the colours."""
    stats, num_tokens = run.stats, run.stats.num_output_tokens
    summary = Text(
        f"\n{num_tokens} tokens in {run.elapsed_s:.2f} s, {num_tokens / run.elapsed_s:.1f} "
        f"tokens/s, the first after {run.first_token_s * 1000:.0f} ms\n"
        f"method {stats.method}, {stats.acceptance} acceptance, mean acceptance length "
        f"{stats.mean_acceptance_length:.2f} ({stats.num_accepted_tokens} of "
        f"{stats.num_draft_tokens} draft tokens in {stats.num_steps} steps)"
    )
    if stats.accepted_per_depth:
        summary.append("\naccepted at depth")
        for depth, count in enumerate(stats.accepted_per_depth, start=1):
            summary.append(f"  {depth}: {count}", _style(depth))
    return summary


def main() -> None:
    """Run the command line."""
    app()


if __name__ == "__main__":
    main()
