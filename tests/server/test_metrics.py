"""Prometheus metrics: totals are read at the time of a scrape, and each name is rendered once."""

from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from server.metrics import EngineMetrics

TOTALS = {
    "num_steps": 1,
    "num_verify_steps": 2,
    "num_prompt_tokens": 3,
    "num_cached_tokens": 4,
    "num_generated_tokens": 5,
    "num_draft_tokens": 6,
    "num_accepted_tokens": 7,
    "num_preemptions": 8,
    "num_running": 9,
    "num_waiting": 10,
    "num_blocks_in_use": 11,
    "num_blocks": 12,
}


def scrape(metrics: EngineMetrics) -> dict[str, float]:
    """Sample values by name and labels, as a Prometheus server would read them."""
    text = generate_latest(metrics.registry).decode()
    samples = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = ",".join(f"{key}={value}" for key, value in sorted(sample.labels.items()))
            samples[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
    return samples


class TestEngineMetrics:
    def test_every_total_and_gauge_of_the_engine_is_rendered(self) -> None:
        samples = scrape(EngineMetrics(lambda: TOTALS))
        values = {samples[name] for name in samples if not name.endswith(("_created", "_bucket"))}
        assert set(map(float, TOTALS.values())) <= values
        assert samples["euryale_generated_tokens_total"] == 5
        assert samples["euryale_running_requests"] == 9

    def test_values_are_read_anew_at_each_scrape(self) -> None:
        totals = dict(TOTALS)
        metrics = EngineMetrics(lambda: totals)
        assert scrape(metrics)["euryale_steps_total"] == 1
        totals["num_steps"] = 100
        assert scrape(metrics)["euryale_steps_total"] == 100

    def test_latencies_are_histograms_in_seconds(self) -> None:
        metrics = EngineMetrics(lambda: TOTALS)
        metrics.ttft_seconds.observe(0.3)
        metrics.step_seconds.observe(0.02)
        metrics.request_seconds.observe(100.0)
        samples = scrape(metrics)
        assert samples["euryale_time_to_first_token_seconds_count"] == 1
        assert samples["euryale_time_to_first_token_seconds_bucket{le=0.25}"] == 0
        assert samples["euryale_time_to_first_token_seconds_bucket{le=0.5}"] == 1
        assert samples["euryale_step_seconds_sum"] == 0.02
        assert samples["euryale_request_seconds_bucket{le=60.0}"] == 0
        assert samples["euryale_request_seconds_bucket{le=+Inf}"] == 1

    def test_ended_requests_are_counted_by_reason(self) -> None:
        metrics = EngineMetrics(lambda: TOTALS)
        metrics.requests.labels(finish_reason="stop").inc()
        metrics.requests.labels(finish_reason="stop").inc()
        metrics.requests.labels(finish_reason="abort").inc()
        samples = scrape(metrics)
        assert samples["euryale_requests_total{finish_reason=stop}"] == 2
        assert samples["euryale_requests_total{finish_reason=abort}"] == 1

    def test_two_engines_do_not_share_a_registry(self) -> None:
        first, second = EngineMetrics(lambda: TOTALS), EngineMetrics(lambda: TOTALS)
        first.requests.labels(finish_reason="stop").inc()
        assert "euryale_requests_total{finish_reason=stop}" not in scrape(second)
