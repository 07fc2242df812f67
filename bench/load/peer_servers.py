"""Servers of other projects as contenders: started as a process, asked over HTTP, ended by us.

A server is ready when its `/health` answers 200. Its output goes to a file, whose end is part of
the error if the server fails.
"""

import asyncio
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from bench.errors import BenchError
from bench.load.contenders import Contender, Run
from bench.load.http_events import http_client, post_events
from bench.measure.timing import Timing
from bench.workload.dialogues import Turn
from server.tokenizer import Tokenizer

_HOST = "127.0.0.1"
_READY_S = 180.0
_STOP_S = 10.0
_POLL_S = 0.1
_NUM_ERROR_CHARACTERS = 800


@contextmanager
def running(name: str, command: Sequence[str], num_threads: int) -> Iterator[None]:
    """Run a server until the block ends.

    Args:
        name: For messages.
        command: Its last argument is the port.
        num_threads: CPU threads that OpenMP gives it.

    Raises:
        BenchError: If it ends, or is not ready in time.
    """
    environment = os.environ | {"OMP_NUM_THREADS": str(num_threads)}
    with (
        tempfile.TemporaryFile() as log,
        subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment
        ) as process,
    ):
        try:
            deadline_s = time.monotonic() + _READY_S
            while not _is_ready(int(command[-1])):
                if process.poll() is not None or time.monotonic() > deadline_s:
                    log.seek(0)
                    said = log.read().decode(errors="replace")[-_NUM_ERROR_CHARACTERS:].strip()
                    raise BenchError(f"{name} did not become ready; it said: {said}")
                time.sleep(_POLL_S)
            yield
        finally:
            process.terminate()
            try:
                process.wait(_STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on now."""
    with socket.create_server((_HOST, 0)) as taken:
        port: int = taken.getsockname()[1]
    return port


def _is_ready(port: int) -> bool:
    try:
        response = httpx.get(f"http://{_HOST}:{port}/health", timeout=5.0, trust_env=False)
    except httpx.HTTPError:
        return False
    return response.status_code == httpx.codes.OK


def transformers_command(model: str, dtype: str, device: str, port: int) -> list[str]:
    """Command line of `transformers serve` in this environment, without its look for updates."""
    program = "from transformers.cli.transformers import app; app()"
    options = ["--host", _HOST, "--dtype", dtype, "--device", device, "--port", str(port)]
    return [sys.executable, "-c", program, "serve", model, *options]


def llama_command(
    program: Path, model: Path, num_threads: int, context_len: int, port: int
) -> list[str]:
    """Command line of llama.cpp's server, for one request at a time."""
    options = ["--host", _HOST, "--threads", str(num_threads), "--ctx-size", str(context_len)]
    return [str(program), "--model", str(model), *options, "--parallel", "1", "--port", str(port)]


def transformers_contender(model: str, tokenizer: Tokenizer, port: int) -> Contender:
    """`transformers serve`: its chat completions; token ids are those of the text."""

    def answer(turn: Turn, max_new_tokens: int) -> Run:
        body = {
            "model": model,
            "messages": turn.messages,
            "max_tokens": max_new_tokens,
            "temperature": 0.0,
            "stream": True,
        }
        reply = asyncio.run(_timed(port, "/v1/chat/completions", body))
        choices = [choice for event in reply.events for choice in event["choices"]]
        text = "".join(choice["delta"].get("content") or "" for choice in choices)
        token_ids = tokenizer.encode(text, add_special_tokens=False)
        if any(choice.get("finish_reason") == "stop" for choice in choices):
            token_ids += sorted(tokenizer.eos_token_ids)[:1]
        usage = next(event["usage"] for event in reversed(reply.events) if event.get("usage"))
        return reply.run(tuple(token_ids), int(usage["completion_tokens"]))

    return answer


def llama_contender(port: int) -> Contender:
    """llama.cpp's server: its own completion route, which takes a prompt's token ids."""

    def answer(turn: Turn, max_new_tokens: int) -> Run:
        body = {
            "prompt": turn.prompt_token_ids,
            "n_predict": max_new_tokens,
            "temperature": 0.0,
            "cache_prompt": False,
            "return_tokens": True,
            "stream": True,
        }
        reply = asyncio.run(_timed(port, "/completion", body))
        token_ids = tuple(token for event in reply.events for token in event.get("tokens", ()))
        return reply.run(token_ids, int(reply.events[-1]["tokens_predicted"]))

    return answer


@dataclass(frozen=True, slots=True)
class _Reply:
    events: tuple[dict[str, Any], ...]
    request_s: float
    first_token_s: float

    def run(self, token_ids: tuple[int, ...], num_tokens: int) -> Run:
        timing = Timing(max(1, num_tokens), self.request_s, self.first_token_s)
        return Run(timing, token_ids, timing.num_decode_tokens)


async def _timed(port: int, path: str, body: Mapping[str, Any]) -> _Reply:
    """Send a request to a server and read the answer's events."""
    first_token_s = 0.0
    events: list[dict[str, Any]] = []
    async with http_client(f"http://{_HOST}:{port}") as client:
        start = time.perf_counter()
        async with aclosing(post_events(client, path, body)) as stream:
            async for event in stream:
                if not first_token_s and _has_text(event):
                    first_token_s = time.perf_counter() - start
                events.append(event)
    if not events:
        raise BenchError(f"the server on port {port} sent no events for {path}")
    request_s = time.perf_counter() - start
    return _Reply(tuple(events), request_s, first_token_s or request_s)


def _has_text(event: Mapping[str, Any]) -> bool:
    if event.get("content"):
        return True
    return any(choice["delta"].get("content") for choice in event.get("choices", ()))
