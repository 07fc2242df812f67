"""`euryale generate`: streams an answer to the terminal.

The text alone goes to stdout, so that it can be piped; log lines and the summary go to stderr.
"""

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from rich.console import Console
from rich.segment import Segment, Segments
from rich.text import Text

from server.cli.console import log_to_stderr
from server.cli.options import POSITIONAL, Command, Settings
from server.cli.serve import ENGINE, ENVIRONMENT
from server.config import EngineConfig, SamplingParams, SpeculationParams
from server.core.completion import join_outputs
from server.core.request import Request, RequestOutput, RequestStats

if TYPE_CHECKING:
    from server.engine.engine import Engine

# Colours of accepted tokens by depth in the draft tree; deeper ones share the last.
_DEPTH_STYLES = ("green", "cyan", "yellow", "magenta", "red")
_CONTROL_CHARACTERS = {
    code: "\N{REPLACEMENT CHARACTER}"
    for code in (*range(0x20), *range(0x7F, 0xA0))
    if chr(code) not in "\n\t"
}
_SAMPLING = ("max_tokens", "temperature", "top_p", "top_k", "min_p", "seed")


@dataclass(frozen=True, slots=True)
class PromptOptions:
    """What to say.

    Attributes:
        prompt: What to say to the model.
        raw: Continue the prompt as it stands, without the model's chat template.
    """

    prompt: Annotated[str, POSITIONAL]
    raw: bool = False


def generate(
    prompt: PromptOptions,
    sampling: SamplingParams,
    speculation: SpeculationParams,
    engine_config: EngineConfig,
) -> None:
    """Stream an answer; accepted draft tokens are coloured by depth.

    Raises:
        EuryaleError: If the model or its heads cannot be loaded, or the prompt is too long.
    """
    # NOTE: Imported here because torch takes seconds, which --help should not.
    from server.engine.engine import Engine

    log_to_stderr()
    engine = Engine.from_config(engine_config)
    if prompt.raw:
        token_ids = engine.tokenizer.encode(prompt.prompt)
    else:
        message = {"role": "user", "content": prompt.prompt}
        token_ids = engine.tokenizer.apply_chat_template([message])
    request = Request("generate", tuple(token_ids), sampling, speculation)
    run = _stream(engine, request, Console(highlight=False))
    Console(stderr=True, highlight=False).print(_summary(run), soft_wrap=True)


GENERATE = Command(
    "generate",
    "Stream an answer to the terminal; accepted draft tokens are coloured by depth.",
    generate,
    {
        "prompt": Settings(PromptOptions),
        "sampling": Settings(SamplingParams, only=_SAMPLING, defaults={"temperature": 0.0}),
        "speculation": Settings(SpeculationParams, only=["method"]),
        "engine_config": ENGINE,
    },
    ENVIRONMENT,
)


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
