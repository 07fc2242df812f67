"""Prometheus metrics of the engine, on a registry of their own.

Totals and gauges are read from the engine at each scrape and cost a step nothing; latencies are
observed as they happen.
"""

from collections.abc import Callable, Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)

_TOTALS = {
    "num_steps": ("euryale_steps", "Forward passes of the base model"),
    "num_verify_steps": ("euryale_verify_steps", "Verify steps, summed over sequences"),
    "num_prompt_tokens": ("euryale_prompt_tokens", "Prompt tokens of started requests"),
    "num_cached_tokens": ("euryale_cached_prompt_tokens", "Prompt tokens taken from the cache"),
    "num_generated_tokens": ("euryale_generated_tokens", "Tokens emitted"),
    "num_draft_tokens": ("euryale_draft_tokens", "Draft tokens verified"),
    "num_accepted_tokens": ("euryale_accepted_tokens", "Draft tokens accepted and emitted"),
    "num_preemptions": ("euryale_preemptions", "Sequences preempted for lack of KV blocks"),
}
_GAUGES = {
    "num_running": ("euryale_running_requests", "Requests that hold KV blocks"),
    "num_waiting": ("euryale_waiting_requests", "Requests that wait for admission"),
    "num_blocks_in_use": ("euryale_kv_blocks_in_use", "KV blocks with an owner"),
    "num_blocks": ("euryale_kv_blocks", "KV blocks in all"),
}


class _EngineCollector(Collector):
    """Reads totals and gauges at each scrape."""

    def __init__(self, read: Callable[[], Mapping[str, int]]) -> None:
        self._read = read

    def collect(self) -> Iterator[Metric]:
        values = self._read()
        for key, (name, text) in _TOTALS.items():
            yield CounterMetricFamily(name, text, value=values[key])
        for key, (name, text) in _GAUGES.items():
            yield GaugeMetricFamily(name, text, value=values[key])


class EngineMetrics:
    """Metrics of one engine.

    Attributes:
        registry: What `/metrics` renders.
        requests: Ended requests by reason: `stop`, `length` or `abort`.
        step_seconds: Time of an engine step.
        ttft_seconds: From arrival to the first token.
        request_seconds: From arrival to the last token.
    """

    def __init__(self, read: Callable[[], Mapping[str, int]]) -> None:
        """Register all metrics.

        Args:
            read: Returns the engine's current totals and gauges by name; called at each scrape, in
                any thread.
        """
        self.registry = CollectorRegistry()
        self.registry.register(_EngineCollector(read))
        self.requests = Counter(
            "euryale_requests",
            "Requests that ended, by reason",
            ["finish_reason"],
            registry=self.registry,
        )
        self.step_seconds = self._histogram("euryale_step_seconds", "Seconds of an engine step")
        self.ttft_seconds = self._histogram(
            "euryale_time_to_first_token_seconds", "Seconds from arrival to the first token"
        )
        self.request_seconds = self._histogram(
            "euryale_request_seconds", "Seconds from arrival to the last token"
        )

    def _histogram(self, name: str, text: str) -> Histogram:
        return Histogram(name, text, buckets=_SECONDS, registry=self.registry)
