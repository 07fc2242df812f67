"""Runs an engine on a thread of its own and streams its outputs to the event loop.

    event loop     generate -> admit ------ inbox ----> add, abort    engine thread
                   generate <- queue <----- deliver <-- step

The event loop never waits for a step: it puts commands into an inbox, the engine thread takes them
before each launch and hands each step's outputs back in one call. The requests of one `generate`
share one queue. `_run`, `_step`, `_take_commands`, `_add` and `_end` run on the engine thread, all
else on the event loop's.

NOTE: On CPU no other living thread may have computed, or steps take twice the time: build the
engine by `in_own_thread`.
"""

import asyncio
import functools
import logging
import queue
import threading
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field

from server.core.request import Request, RequestOutput
from server.engine.engine import Engine
from server.errors import EngineStoppedError, EuryaleError, InvalidRequestError, QueueFullError
from server.metrics import EngineMetrics
from server.tokenizer import Tokenizer

_LOG = logging.getLogger("euryale.engine")
_MIN_RETRY_S = 1.0
_MAX_RETRY_S = 60.0

_Command = Callable[[], None]
_Item = tuple[int, RequestOutput] | EuryaleError


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What may be known of an engine outside its thread.

    Attributes:
        model_name: The base model as the configuration names it.
        tokenizer: The model's tokenizer, which any thread may use.
        max_model_len: Longest prompt plus output, in tokens.
        heads_name: Name of the draft heads; None without heads.
        adapter_sha256: Digest of the adapter that the heads brought; None without one.
    """

    model_name: str
    tokenizer: Tokenizer
    max_model_len: int
    heads_name: str | None
    adapter_sha256: str | None


@dataclass(slots=True, eq=False)
class _InFlight:
    """A request that has not ended, and its way back to the client.

    Attributes:
        index: Its place among the requests that were given together.
        items: Queue that those requests share.
    """

    request: Request
    index: int
    items: asyncio.Queue[_Item]
    arrived_s: float = field(default_factory=time.monotonic)
    has_output: bool = False


class AsyncEngine:
    """The engine as the API sees it.

    Attributes:
        engine: Belongs to the engine thread once that runs.
        info: What the API needs to know of the engine.
        metrics: Updated after each step.
    """

    def __init__(self, engine: Engine, max_queue: int = 256) -> None:
        self.engine = engine
        self.info = EngineInfo(
            model_name=engine.model_name,
            tokenizer=engine.tokenizer,
            max_model_len=engine.max_model_len,
            heads_name=engine.heads_name,
            adapter_sha256=engine.loaded.adapter_sha256,
        )
        self.metrics = EngineMetrics(engine.totals)
        self._max_num_seqs = engine.config.max_num_seqs
        self._capacity = self._max_num_seqs + max_queue
        self._in_flight: dict[str, _InFlight] = {}
        self._inbox: queue.SimpleQueue[_Command] = queue.SimpleQueue()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._is_draining = False
        self._has_ended = False
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
        return len(self._in_flight)

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
        while self._in_flight and time.monotonic() < deadline and self.is_alive:
            await asyncio.sleep(0.02)
        self._fail_all("the server is stopping")
        self._inbox.put(self._end)
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join)

    async def generate(
        self, requests: Sequence[Request]
    ) -> AsyncGenerator[tuple[int, RequestOutput], None]:
        """Run requests side by side; yield each output with the index of its request.

        They are admitted together or not at all. Closing the generator, and an error of one of
        them, aborts them all.

        Args:
            requests: With ids that no request in flight has.

        Raises:
            InvalidRequestError: If one of them, or so many of them, can never run here.
            QueueFullError: If the queue has no room for so many now.
            EngineStoppedError: If the engine drains, or stops or fails before they have ended.
        """
        self._check_admission(requests)
        items: asyncio.Queue[_Item] = asyncio.Queue()
        given = [_InFlight(request, index, items) for index, request in enumerate(requests)]
        self._in_flight.update((entry.request.request_id, entry) for entry in given)
        self._inbox.put(functools.partial(self._add, given))
        num_running = len(given)
        try:
            while num_running:
                item = await items.get()
                if isinstance(item, EuryaleError):
                    raise item
                num_running -= item[1].finish_reason is not None
                yield item
        finally:
            for entry in given:
                self._abandon(entry)

    def _check_admission(self, requests: Sequence[Request]) -> None:
        num_requests, num_in_flight = len(requests), len(self._in_flight)
        if not self.is_ready:
            reason = self._failure or "the server is shutting down"
            raise EngineStoppedError(f"{reason}; send the request to another server")
        if num_requests > self._capacity:
            raise InvalidRequestError(
                f"{num_requests} completions were asked for at once, but this server holds at most "
                f"{self._capacity}; ask for fewer",
                param="n",
            )
        if num_in_flight + num_requests > self._capacity:
            raise QueueFullError(
                f"{num_in_flight} requests are in flight and at most {self._capacity} may be, "
                f"{num_requests} more were asked for; retry later",
                retry_after_s=self._retry_after_s(),
            )
        for request_id in (request.request_id for request in requests):
            if request_id in self._in_flight:
                raise ValueError(f"request id {request_id!r} is already in flight")

    def _retry_after_s(self) -> float:
        """Roughly the time until the next request ends, from the mean time of the recent ones."""
        estimate = self._request_s / self._max_num_seqs
        return min(max(estimate, _MIN_RETRY_S), _MAX_RETRY_S)

    def _abandon(self, entry: _InFlight) -> None:
        """Abort a request unless it has ended."""
        if self._forget(entry):
            self.metrics.requests.labels(finish_reason="abort").inc()
            request_id = entry.request.request_id
            self._inbox.put(lambda: self.engine.abort(request_id))

    def _forget(self, entry: _InFlight) -> bool:
        """Free a request's place and id; False if it had none any more."""
        request_id = entry.request.request_id
        # Another request may have the id by now.
        is_known = self._in_flight.get(request_id) is entry
        if is_known:
            del self._in_flight[request_id]
        return is_known

    def _run(self) -> None:
        """The engine thread: take commands, step, hand the outputs over."""
        try:
            while not self._has_ended:
                if not self.engine.has_unfinished:
                    self._take_commands(wait=True)
                if self.engine.has_unfinished and not self._has_ended:
                    self._step()
        except Exception:  # noqa: BLE001  # whatever failed, no client may wait for ever
            _LOG.exception("the engine failed")
            self._failure = "the engine failed"
            self._call_in_loop(functools.partial(self._fail_all, self._failure))

    def _step(self) -> None:
        started_s = time.perf_counter()
        outputs = self.engine.step(admit=self._take_commands)
        self.metrics.step_seconds.observe(time.perf_counter() - started_s)
        self._call_in_loop(functools.partial(self._deliver, outputs))

    def _take_commands(self, wait: bool = False) -> None:
        """Run all commands in the inbox; with `wait`, one at least."""
        while True:
            try:
                command = self._inbox.get(block=wait)
            except queue.Empty:
                return
            command()
            wait = False

    def _end(self) -> None:
        self._has_ended = True

    def _add(self, given: Sequence[_InFlight]) -> None:
        """Queue requests in the engine, all or none; a failure concerns no other client.

        They are checked here and not in the event loop, which long prompts would hold up.
        """
        failure: EuryaleError
        try:
            for entry in given:
                self.engine.add_request(entry.request)
            return
        except InvalidRequestError as error:
            failure = error
        except Exception as error:  # noqa: BLE001  # one request must not end the engine
            _LOG.exception("request %s could not be queued", entry.request.request_id)
            failure = EngineStoppedError(f"the request could not be queued: {error}")
        for entry in given:
            self.engine.abort(entry.request.request_id)
        self._call_in_loop(functools.partial(self._fail, given, failure))

    def _fail(self, given: Sequence[_InFlight], failure: EuryaleError) -> None:
        given[0].items.put_nowait(failure)
        if isinstance(failure, InvalidRequestError):
            # What never ran is not counted as aborted.
            for entry in given:
                self._forget(entry)

    def _fail_all(self, reason: str) -> None:
        for entry in self._in_flight.values():
            entry.items.put_nowait(EngineStoppedError(reason))

    def _deliver(self, outputs: Sequence[RequestOutput]) -> None:
        for output in outputs:
            entry = self._in_flight.get(output.request_id)
            if entry is not None:
                self._observe(entry, output)
                entry.items.put_nowait((entry.index, output))

    def _observe(self, entry: _InFlight, output: RequestOutput) -> None:
        elapsed_s = time.monotonic() - entry.arrived_s
        if not entry.has_output:
            entry.has_output = True
            self.metrics.ttft_seconds.observe(elapsed_s)
        if output.finish_reason is not None:
            self._forget(entry)
            self.metrics.request_seconds.observe(elapsed_s)
            self.metrics.requests.labels(finish_reason=output.finish_reason).inc()
            self._request_s += 0.1 * (elapsed_s - self._request_s)

    def _call_in_loop(self, callback: Callable[[], None]) -> None:
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(callback)
