"""`peers`: tokens per second of one request at a time, compared with other programs.

    auto                 our engine, speculation as the options ask for it
    off                  our engine, plain decoding
    transformers         `generate` of a plain model
    transformers_lookup  the same with transformers' own prompt lookup
    transformers_serve   transformers' server, `transformers serve`, over HTTP
    llama_cpp            llama.cpp's `llama-server` with the same GGUF file, over HTTP

They answer the first turns of the prompts greedily, prompt by prompt and in rotating order, after
one short warm-up. transformers' models have the engine's dtype, which is float32 on CPU. Servers
are asked not to keep prompts, and are timed as their client sees them. What cannot run is left out
and listed with what it lacks.
"""

import logging
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers.utils.import_utils import is_serve_available

from bench.benches.setup import PLAIN, PromptOptions, common_settings, prepare
from bench.errors import BenchError
from bench.load.contenders import (
    Contender,
    Race,
    engine_contender,
    race_turn,
    reference_contender,
    warm_up,
)
from bench.load.peer_servers import (
    free_port,
    llama_command,
    llama_contender,
    running,
    transformers_command,
    transformers_contender,
)
from bench.measure.reference import ReferenceModel
from bench.measure.report import Outcome
from bench.measure.timing import Speed, Speedup, speed, speedup
from server.cache import cache_dir
from server.cli.console import progress_bar
from server.cli.options import Command, Settings
from server.config import EngineConfig, SpeculationParams
from server.engine.engine import Engine
from server.model.builtin import SMOLLM2, builtin_gguf
from server.model.source import resolve_model

OURS = "auto"
_LLAMA_PROGRAM = "llama-server"
_log = logging.getLogger("euryale.bench")
# What transformers' documentation takes.
_NUM_LOOKUP_TOKENS = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class PeersOptions:
    """Other programs.

    Attributes:
        llama_server: llama.cpp's server; looked for on PATH if not given.
    """

    llama_server: Path | None = None


@dataclass(frozen=True, slots=True)
class PeersResult:
    """What the bench reports; keys are contenders.

    Attributes:
        tokens_per_s: Speed over whole requests: all tokens by all seconds.
        ratios: Our speed with speculation by that of each other contender; above 1, we are faster.
        not_installed: Contenders that did not run, and what they lack.
        speeds: With decode-only figures and the time to the first token.
        speedups: `ratios` with medians and decode-only figures.
        num_outputs: Prompts that all answered.
        num_same_outputs: Outputs with the same tokens as ours; those of a server that sends text
            are its text's tokens.
    """

    tokens_per_s: dict[str, float]
    ratios: dict[str, float]
    not_installed: dict[str, str]
    speeds: dict[str, Speed]
    speedups: dict[str, Speedup]
    num_outputs: int
    num_same_outputs: dict[str, int]


def summarise(races: Sequence[Race], not_installed: dict[str, str]) -> PeersResult:
    """Pool the races, of which there is at least one."""
    timings = {name: [race.runs[name].timing for race in races] for name in races[0].runs}
    speeds = {name: speed(own) for name, own in timings.items()}
    others = [name for name in timings if name != OURS]
    speedups = {name: speedup(timings[OURS], timings[name]) for name in others}
    return PeersResult(
        tokens_per_s={name: own.tokens_per_s for name, own in speeds.items()},
        ratios={name: own.total for name, own in speedups.items()},
        not_installed=not_installed,
        speeds=speeds,
        speedups=speedups,
        num_outputs=len(races),
        num_same_outputs={
            name: sum(race.runs[name].token_ids == race.runs[OURS].token_ids for race in races)
            for name in others
        },
    )


def find_llama_server(given: Path | None) -> Path | None:
    """The program that is given, or on PATH.

    Raises:
        BenchError: If the given one is no file.
    """
    if given is not None:
        if not given.is_file():
            raise BenchError(f"llama-server is {str(given)!r}, which is no file; give the program")
        return given
    found = shutil.which(_LLAMA_PROGRAM)
    return Path(found) if found else None


def gguf_file(model: str) -> Path | None:
    """The GGUF file that a model is read from, or None if it is read from something else."""
    if model == SMOLLM2.name:
        return builtin_gguf(SMOLLM2, cache_dir("gguf"))
    path = Path(model).expanduser()
    return path if path.suffix.lower() == ".gguf" and path.is_file() else None


class Contenders:
    """Puts the contenders together.

    Args:
        engine: Our engine, idle.
        speculation: Request parameters of our engine with drafts.
        llama_server: llama.cpp's server; None if there is none.
        stack: The servers among the contenders run until it is left.

    Attributes:
        ready: Contenders that can run, by name.
        missing: What the others lack, by name.
    """

    def __init__(
        self,
        engine: Engine,
        speculation: SpeculationParams,
        llama_server: Path | None,
        stack: ExitStack,
    ) -> None:
        self._engine = engine
        self._speculation = speculation
        self._llama_server = llama_server
        self._stack = stack
        self.ready: dict[str, Contender] = {}
        self.missing: dict[str, str] = {}

    def add_all(self) -> None:
        """Prepare everything that can run here."""
        engine, reference = self._engine, ReferenceModel(self._engine.loaded)
        self.ready[OURS] = engine_contender(engine, self._speculation)
        self.ready["off"] = engine_contender(engine, PLAIN)
        self.ready["transformers"] = reference_contender(reference)
        self.ready["transformers_lookup"] = reference_contender(reference, _NUM_LOOKUP_TOKENS)
        self._add_transformers_serve()
        self._add_llama()
        for name, reason in self.missing.items():
            _log.info(f"{name} does not run: {reason}")

    def _add_transformers_serve(self) -> None:
        if not is_serve_available():
            self.missing["transformers_serve"] = (
                "not installed: its server lacks packages; pip install 'transformers[serving]'"
            )
            return
        _log.info("starting transformers serve")
        loaded, port = self._engine.loaded, free_port()
        model = resolve_model(loaded.name)
        dtype = str(loaded.dtype).removeprefix("torch.")
        command = transformers_command(model, dtype, loaded.device.type, port)
        self._stack.enter_context(running("transformers serve", command, torch.get_num_threads()))
        self.ready["transformers_serve"] = transformers_contender(model, loaded.tokenizer, port)

    def _add_llama(self) -> None:
        if self._llama_server is None:
            self.missing["llama_cpp"] = (
                "not installed: there is no llama-server on PATH; build llama.cpp "
                "(https://github.com/ggml-org/llama.cpp) and give --llama-server FILE"
            )
            return
        model = gguf_file(self._engine.config.model)
        if model is None:
            self.missing["llama_cpp"] = (
                f"it needs a GGUF file, and model is {self._engine.config.model!r}; give smollm2 "
                "or a .gguf file"
            )
            return
        _log.info("starting llama-server")
        port, num_threads = free_port(), torch.get_num_threads()
        command = llama_command(
            self._llama_server, model, num_threads, self._engine.max_model_len, port
        )
        self._stack.enter_context(running(_LLAMA_PROGRAM, command, num_threads))
        self.ready["llama_cpp"] = llama_contender(port)


def run(
    prompts: PromptOptions,
    config: EngineConfig,
    speculation: SpeculationParams,
    others: PeersOptions,
) -> Outcome:
    """Race our engine against what is installed here.

    Raises:
        BenchError: If no prompt fits the context, or a server fails.
        EuryaleError: If the prompts are wrong, or the engine cannot be built or rejects a request.
    """
    program = find_llama_server(others.llama_server)
    setup = prepare(prompts, config, speculation)
    turns, skipped = setup.first_turns()
    races: list[Race] = []
    with ExitStack() as stack:
        contenders = Contenders(setup.engine, setup.speculation, program, stack)
        contenders.add_all()
        warm_up(contenders.ready, turns[0], prompts.max_new_tokens)
        with progress_bar("peers", len(turns)) as bar:
            for number, turn in enumerate(turns):
                races.append(race_turn(contenders.ready, turn, prompts.max_new_tokens, number))
                bar.advance()
    result = summarise(races, contenders.missing)
    return setup.outcome(result, skipped, {"num_lookup_tokens": _NUM_LOOKUP_TOKENS})


COMMAND = Command(
    "peers",
    "Tokens per second at batch 1, compared with transformers and llama.cpp.",
    run,
    {**common_settings(), "others": Settings(PeersOptions)},
)
