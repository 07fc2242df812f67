from collections import defaultdict

from server.metrics import EngineMetrics
from tests.docs.pages import code, page, table


def registered() -> dict[str, str]:
    """Types of all metrics, by the names that a scrape shows."""
    metrics = EngineMetrics(lambda: defaultdict(int))
    return {
        f"{family.name}_total" if family.type == "counter" else family.name: family.type
        for family in metrics.registry.collect()
    }


def test_the_table_of_metrics_has_every_metric_with_its_type() -> None:
    rows = table(page("serving.md"), "metrics")
    assert {code(row["metric"]): row["type"] for row in rows} == registered()
    assert len(rows) == len(registered())
    assert all(row["meaning"] for row in rows)
