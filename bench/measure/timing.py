"""Times whole requests at batch 1, and compares the speeds of two ways to run them."""

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import torch

from bench.workload.tracing import Trace, make_trace
from server.core.request import Request, RequestOutput
from server.engine.engine import Engine


@dataclass(frozen=True, slots=True)
class Timing:
    """One request's clock.

    Attributes:
        num_tokens: Length of the output, at least 1.
        request_s: Seconds from handing the request over to its last token.
        first_token_s: Seconds from handing the request over to its first token: the prefill.
    """

    num_tokens: int
    request_s: float
    first_token_s: float

    @property
    def decode_s(self) -> float:
        """Seconds between the first and the last token."""
        return self.request_s - self.first_token_s

    @property
    def num_decode_tokens(self) -> int:
        """Tokens after the first."""
        return self.num_tokens - 1


@dataclass(frozen=True, slots=True)
class Speed:
    """Speed over many requests: all tokens by all seconds.

    Attributes:
        tokens_per_s: Speed over whole requests, prefill included.
        decode_tokens_per_s: Speed of the tokens after each request's first; 0.0 if there are none.
    """

    tokens_per_s: float
    decode_tokens_per_s: float
    median_first_token_s: float


@dataclass(frozen=True, slots=True)
class Speedup:
    """How many times faster one way is than another, over the same requests.

    Attributes:
        total: Ratio of all tokens by all seconds.
        median: Median over the requests of the ratio of their tokens per second.
        decode_total: Ratio of all tokens by all seconds, without the prefill.
        decode_median: Median over the requests of this ratio, without the prefill.
    """

    total: float
    median: float
    decode_total: float
    decode_median: float


def device_waiter(device: torch.device) -> Callable[[], None]:
    """A function that waits until the device has done all its work."""
    if device.type == "cuda":
        return functools.partial(torch.cuda.synchronize, device)
    return lambda: None


def time_request(engine: Engine, request: Request) -> tuple[Timing, Trace]:
    """Run one request on an idle engine."""
    outputs: list[RequestOutput] = []
    first_token_s = 0.0
    start = time.perf_counter()
    engine.add_request(request)
    while engine.has_unfinished:
        outputs += engine.step()
        if outputs and not first_token_s:
            first_token_s = time.perf_counter() - start
    request_s = time.perf_counter() - start
    trace = make_trace(request, outputs)
    return Timing(len(trace.token_ids), request_s, first_token_s), trace


def speed(timings: Sequence[Timing]) -> Speed:
    """Pool requests, of which there is at least one."""
    return Speed(
        tokens_per_s=_rate(sum(t.num_tokens for t in timings), sum(t.request_s for t in timings)),
        decode_tokens_per_s=_rate(
            sum(t.num_decode_tokens for t in timings), sum(t.decode_s for t in timings)
        ),
        median_first_token_s=median(t.first_token_s for t in timings),
    )


def speedup(fast: Sequence[Timing], slow: Sequence[Timing]) -> Speedup:
    """Compare two ways request by request; both have them in the same order."""
    ratios, decode_ratios = [], []
    for a, b in zip(fast, slow, strict=True):
        ratios.append(_ratio(_rate(a.num_tokens, a.request_s), _rate(b.num_tokens, b.request_s)))
        if a.num_decode_tokens and b.num_decode_tokens:
            decode_ratios.append(
                _ratio(
                    _rate(a.num_decode_tokens, a.decode_s), _rate(b.num_decode_tokens, b.decode_s)
                )
            )
    fast_speed, slow_speed = speed(fast), speed(slow)
    return Speedup(
        total=_ratio(fast_speed.tokens_per_s, slow_speed.tokens_per_s),
        median=median(ratios),
        decode_total=_ratio(fast_speed.decode_tokens_per_s, slow_speed.decode_tokens_per_s),
        decode_median=median(decode_ratios) if decode_ratios else 0.0,
    )


def _rate(count: int, seconds: float) -> float:
    return count / seconds if seconds > 0.0 else 0.0


def _ratio(fast: float, slow: float) -> float:
    return fast / slow if slow > 0.0 else 0.0
