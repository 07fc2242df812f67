"""Runs an engine on a thread of its own and streams its outputs to the event loop.

The event loop never waits for a step: it puts commands into an inbox, the engine thread takes them
before each step and hands each step's outputs back in one call. All methods belong to the event
loop's thread.

NOTE: On CPU no other living thread may have computed, or steps take twice the time: build the
engine by `in_own_thread`.
"""

import asyncio
import functools
import logging
import queue
import threading
import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field

from server.core.request import Request, RequestOutput
from server.engine.engine import Engine
from server.errors import EngineStoppedError, EuryaleError, InvalidRequestError, QueueFullError
from server.metrics import EngineMetrics

_LOG = logging.getLogger("euryale.engine")
_MIN_RETRY_S = 1.0
_MAX_RETRY_S = 60.0

_Command = Callable[[], None]


@dataclass(slots=True)
class _Stream:
    """One request's way back to its client."""

    outputs: asyncio.Queue[RequestOutput | EuryaleError] = field(default_factory=asyncio.Queue)
    arrived_s: float = field(default_factory=time.monotonic)
    has_output: bool = False


class AsyncEngine:
    """The engine as the API sees it.

    Attributes:
        engine: Only its read-only attributes (tokenizer, names, limits, totals) may be used here.
        metrics: Updated after each step.
    """

    def __init__(self, engine: Engine, max_queue: int = 256) -> None:
        self.engine = engine
        self.metrics = EngineMetrics(engine.totals)
        self._capacity = engine.config.max_num_seqs + max_queue
        self._streams: dict[str, _Stream] = {}
        self._inbox: queue.SimpleQueue[_Command | None] = queue.SimpleQueue()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._is_draining = False
        self._failure: str | None = None
        self._request_s = _MIN_RETRY_S

    @property
    def is_alive(self) -> bool:
        """Whether the engine thread runs and has not failed."""
        return self._thread is not None and self._thread.is_alive() and self._failure is None

    @property
    def is_ready(self) -> bool:
        """Whether new requests are admitted."""
        return self.is_alive and not self._is_draining

    @property
    def num_in_flight(self) -> int:
        """Requests that have not ended."""
        return len(self._streams)

    async def start(self) -> None:
        """Start the engine thread."""
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._run, name="euryale-engine", daemon=True)
        self._thread.start()

    async def stop(self, drain_s: float = 0.0) -> None:
        """Refuse new requests, let running ones end within `drain_s` seconds, then stop.

        A second call while the first drains stops at once.
        """
        deadline = time.monotonic() + (0.0 if self._is_draining else drain_s)
        self._is_draining = True
        while self._streams and time.monotonic() < deadline and self.is_alive:
            await asyncio.sleep(0.02)
        self._end_streams("the server is stopping")
        self._inbox.put(None)
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join)

    def check_admission(self, num_requests: int = 1) -> None:
        """Refuse requests that would not be admitted now.

        Raises:
            InvalidRequestError: If the server could never hold that many.
            QueueFullError: If the queue has no room for that many now.
            EngineStoppedError: If the engine drains, has stopped or has failed.
        """
        if not self.is_ready:
            reason = self._failure or "the server is shutting down"
            raise EngineStoppedError(f"{reason}; send the request to another server")
        if num_requests > self._capacity:
            raise InvalidRequestError(
                f"{num_requests} completions were asked for at once, but this server holds at most "
                f"{self._capacity}; ask for fewer",
                param="n",
            )
        if len(self._streams) + num_requests > self._capacity:
            raise QueueFullError(
                f"{len(self._streams)} requests are in flight and at most {self._capacity} may "
                f"be, {num_requests} more were asked for; retry later",
                retry_after_s=self._retry_after_s(),
            )

    async def generate(self, request: Request) -> AsyncGenerator[RequestOutput, None]:
        """Stream a request's outputs; closing the iterator early aborts the request.

        Raises:
            InvalidRequestError: If the request can never run here.
            QueueFullError: If the queue is full.
            EngineStoppedError: If the engine stops or fails before the request ends.
        """
        self.check_admission()
        if request.request_id in self._streams:
            raise ValueError(f"request id {request.request_id!r} is already in flight")
        stream = _Stream()
        self._streams[request.request_id] = stream
        self._inbox.put(functools.partial(self._add, request))
        finish_reason, is_refused = None, False
        try:
            while finish_reason is None:
                output = await stream.outputs.get()
                if isinstance(output, EuryaleError):
                    is_refused = isinstance(output, InvalidRequestError)
                    raise output
                finish_reason = output.finish_reason
                self._observe(stream, finish_reason)
                yield output
        finally:
            self._streams.pop(request.request_id, None)
            if finish_reason is None and not is_refused:
                self.metrics.requests.labels(finish_reason="abort").inc()
                self._inbox.put(lambda: self.engine.abort(request.request_id))

    def _observe(self, stream: _Stream, finish_reason: str | None) -> None:
        elapsed_s = time.monotonic() - stream.arrived_s
        if not stream.has_output:
            stream.has_output = True
            self.metrics.ttft_seconds.observe(elapsed_s)
        if finish_reason is not None:
            self.metrics.request_seconds.observe(elapsed_s)
            self.metrics.requests.labels(finish_reason=finish_reason).inc()
            self._request_s += 0.1 * (elapsed_s - self._request_s)

    def _retry_after_s(self) -> float:
        """Roughly the time until the next request ends, from the mean time of the recent ones."""
        estimate = self._request_s / self.engine.config.max_num_seqs
        return min(max(estimate, _MIN_RETRY_S), _MAX_RETRY_S)

    def _run(self) -> None:
        """The engine thread: take commands, step, hand the outputs over."""
        try:
            while self._take_commands():
                started_s = time.perf_counter()
                outputs = self.engine.step()
                self.metrics.step_seconds.observe(time.perf_counter() - started_s)
                self._call_in_loop(functools.partial(self._deliver, outputs))
        except Exception:  # noqa: BLE001  # whatever failed, no client may wait for ever
            _LOG.exception("the engine failed")
            self._failure = "the engine failed"
            self._call_in_loop(functools.partial(self._end_streams, self._failure))

    def _take_commands(self) -> bool:
        """Run all waiting commands, waiting for one if the engine is idle; False means stop."""
        while True:
            try:
                command = self._inbox.get(block=not self.engine.has_unfinished)
            except queue.Empty:
                return True
            if command is None:
                return False
            command()

    def _add(self, request: Request) -> None:
        """Queue a request in the engine; if that fails, nobody but its own client is told."""
        try:
            self.engine.add_request(request)
        except InvalidRequestError as error:
            # NOTE: Checked here and not in the event loop, which a long prompt would hold up.
            self._call_in_loop(functools.partial(self._fail, request.request_id, error))
        except Exception as error:  # noqa: BLE001  # one request must not end the engine
            _LOG.exception("request %s could not be queued", request.request_id)
            failure = EngineStoppedError(f"the request could not be queued: {error}")
            self._call_in_loop(functools.partial(self._fail, request.request_id, failure))

    def _fail(self, request_id: str, failure: EuryaleError) -> None:
        stream = self._streams.get(request_id)
        if stream is not None:
            stream.outputs.put_nowait(failure)

    def _deliver(self, outputs: list[RequestOutput]) -> None:
        for output in outputs:
            stream = self._streams.get(output.request_id)
            if stream is not None:
                stream.outputs.put_nowait(output)

    def _end_streams(self, reason: str) -> None:
        for stream in self._streams.values():
            stream.outputs.put_nowait(EngineStoppedError(reason))

    def _call_in_loop(self, callback: Callable[[], None]) -> None:
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(callback)
