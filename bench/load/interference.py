"""Streams that decode while a long prompt arrives, and the cost of the prompt's chunks alone."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

from bench.errors import BenchError
from bench.load.loops import Chunk, GapFigures, Percentiles, gap_figures, percentiles_ms
from bench.measure.timing import device_waiter
from server.core.request import Request, RequestOutput
from server.engine.engine import Engine

# Steps in which the streams' trees come into use before anything is measured.
_SETTLING_STEPS = 4


@dataclass(frozen=True, slots=True)
class Interference:
    """Latencies of streams without and with a long prompt in the same steps.

    Attributes:
        quiet: Gaps while the streams are alone.
        busy: Gaps from the prompt's arrival to its first token.
        chunk_cost_ms: Duration of the steps that compute the prompt's chunks alone.
        chunk_tokens: Prompt tokens of each step, in both cases.
    """

    quiet: GapFigures
    busy: GapFigures
    chunk_cost_ms: Percentiles
    chunk_tokens: tuple[int, ...]

    @property
    def itl_rise_ms(self) -> float:
        """Rise of the 95th percentile of the time per token."""
        return self.busy.itl_ms.p95 - self.quiet.itl_ms.p95

    @property
    def chunk_gap_rise_ms(self) -> float:
        """Rise of the 95th percentile of the time between chunks."""
        return self.busy.chunk_gap_ms.p95 - self.quiet.chunk_gap_ms.p95


class Streams:
    """Requests that decode in the same steps, and when their tokens came.

    Args:
        engine: Idle; has room for all requests and one more.
        requests: Long enough to outlast the measurement.
    """

    def __init__(self, engine: Engine, requests: Sequence[Request]) -> None:
        self._engine = engine
        self._num_preemptions = engine.counters.num_preemptions
        self._chunks: dict[str, list[Chunk]] = {request.request_id: [] for request in requests}
        for request in requests:
            engine.add_request(request)

    @property
    def all_began(self) -> bool:
        """Whether each stream has brought a token."""
        return all(self._chunks.values())

    def step(self) -> list[RequestOutput]:
        """Let the engine make a step.

        Raises:
            BenchError: If a stream ended, or the KV cache is too small for all of them.
        """
        outputs = self._engine.step()
        at_s = time.perf_counter()
        if self._engine.counters.num_preemptions > self._num_preemptions:
            raise BenchError(
                f"the KV cache of {self._engine.blocks.num_blocks} blocks is too small for "
                f"{len(self._chunks)} streams and the long prompt; give fewer --streams or fewer "
                "--long-prompt-tokens"
            )
        for output in outputs:
            if output.request_id not in self._chunks:
                continue
            if output.finish_reason is not None:
                raise BenchError(
                    f"a stream reached the context's end of {self._engine.max_model_len} tokens "
                    "before the long prompt was through; give fewer --long-prompt-tokens"
                )
            self._chunks[output.request_id].append(Chunk(at_s, len(output.token_ids)))
        return outputs

    def run(self, num_steps: int) -> None:
        """Make so many steps; raises what `step` raises."""
        for _ in range(num_steps):
            self.step()

    def take(self) -> list[tuple[Chunk, ...]]:
        """Chunks of each stream since the last call, after the last chunk that was taken then."""
        taken = [tuple(chunks) for chunks in self._chunks.values()]
        for chunks in self._chunks.values():
            del chunks[:-1]
        return taken

    def abort(self) -> None:
        """End all streams."""
        for request_id in self._chunks:
            self._engine.abort(request_id)


def measure_interference(
    engine: Engine, streams: Sequence[Request], prompt: Request, prompt_alone: Request
) -> Interference:
    """Let a long prompt arrive while streams decode, then compute one of the same length alone.

    Half of the quiet steps come before the prompt and half after it, since the steps of a stream
    take longer as it grows.

    Args:
        engine: Idle before and after; `max_num_seqs` is above the number of streams.
        streams: Long enough to outlast the prompt.
        prompt: Not in the prefix cache; asks for two tokens at least.
        prompt_alone: Another prompt of as many tokens, not in the prefix cache either.

    Raises:
        BenchError: If a stream ended, or the KV cache is too small for all requests.
    """
    running = Streams(engine, streams)
    while not running.all_began:
        running.step()
    running.run(_SETTLING_STEPS)
    running.take()
    budget = engine.config.max_prefill_tokens or engine.config.max_tokens_per_step
    num_quiet_steps = -(-len(prompt.prompt_token_ids) // (2 * budget))
    running.run(num_quiet_steps)
    quiet = running.take()
    chunk_tokens = _chunks_until_first_token(engine, running, prompt)
    busy = running.take()
    engine.abort(prompt.request_id)
    running.run(num_quiet_steps)
    quiet += running.take()
    running.abort()
    return Interference(
        quiet=gap_figures(quiet),
        busy=gap_figures(busy),
        chunk_cost_ms=percentiles_ms(time_chunks(engine, prompt_alone, chunk_tokens)),
        chunk_tokens=tuple(chunk_tokens),
    )


def _chunks_until_first_token(engine: Engine, streams: Streams, prompt: Request) -> list[int]:
    """Let a prompt arrive; returns its tokens in each step that has any."""
    chunk_tokens: list[int] = []
    engine.add_request(prompt)
    has_begun = False
    while not has_begun:
        engine.trace.clear()
        outputs = streams.step()
        if engine.trace.num_prompt_tokens:
            chunk_tokens.append(engine.trace.num_prompt_tokens)
        has_begun = any(output.request_id == prompt.request_id for output in outputs)
    return chunk_tokens


def time_chunks(engine: Engine, request: Request, chunk_tokens: Sequence[int]) -> list[float]:
    """Seconds of the steps that compute a prompt alone, in chunks of these sizes.

    Args:
        engine: Idle before and after.
        request: Its prompt has as many tokens as the chunks together, none of them cached.
        chunk_tokens: Size of each chunk; the scheduler alone would take larger ones while nothing
            decodes.
    """
    wait_for_device = device_waiter(engine.loaded.device)
    first, *further = chunk_tokens
    sizes = iter(further)
    seconds: list[float] = []
    engine.limit_prompts(first)
    engine.add_request(request)
    outputs: list[RequestOutput] = []
    while not outputs:
        start = time.perf_counter()
        # Behind the prompt's last chunk no more tokens of it are left.
        outputs = engine.step(admit=lambda: engine.limit_prompts(next(sizes, 0)))
        wait_for_device()
        seconds.append(time.perf_counter() - start)
    engine.abort(request.request_id)
    engine.limit_prompts(None)
    return seconds
