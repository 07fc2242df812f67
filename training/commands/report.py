"""`report`: a run's metrics and its heads' measurement in, one HTML page with plots out."""

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from server.cli.options import Command, Settings
from training.data.jsonl import replace_file
from training.errors import DataError
from training.loop.metrics import METRICS_FILE, read_metrics
from training.measure import plots
from training.measure.acceptance import ACCEPTANCE_FILE, load_acceptance

_STYLE = (
    "body{font-family:sans-serif;max-width:1320px;margin:2em auto;padding:0 1em}"
    "svg{max-width:100%;height:auto}table{border-collapse:collapse}"
    "td,th{padding:.2em .8em;border:1px solid #ccc;text-align:left}"
)


@dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """Heads that were trained or evaluated.

    Attributes:
        heads: Directory of the heads, with acceptance.json.
        output: Page to write; not given, `report.html` in that directory.
    """

    heads: Path
    output: Path | None = None


def run(options: ReportOptions) -> dict[str, Any]:
    """Write the page; returns the result to print.

    Raises:
        DataError: If the measurement is missing or damaged, or the metrics are.
        RunError: If matplotlib is not installed.
    """
    acceptance = load_acceptance(options.heads)
    metrics = _metrics(options.heads)
    output = options.output or options.heads / "report.html"
    try:
        page = _page(options.heads.name, acceptance, metrics)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise DataError(
            f"{ACCEPTANCE_FILE} or {METRICS_FILE} in {options.heads} is damaged ({error!r}); "
            "evaluate the heads again, or remove the metrics"
        ) from error
    replace_file(output, page.encode())
    return {"report": str(output), "has_metrics": bool(metrics)}


def _metrics(directory: Path) -> Sequence[Mapping[str, Any]]:
    path = directory / METRICS_FILE
    if not path.exists():
        return []
    try:
        return read_metrics(directory)
    except ValueError as error:
        raise DataError(f"{path} is damaged ({error}); remove it or train again") from error


def _page(name: str, acceptance: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]]) -> str:
    title = html.escape(f"Draft heads {name}")
    tree = acceptance["tree"]
    drawings = [
        plots.tokens_by_tree_size(
            acceptance["expected_tokens_per_step"], acceptance["mean_acceptance_length"]
        ),
        plots.accept_rates(acceptance["accept_rates"]),
        plots.calibration(acceptance["calibration"]),
        plots.by_category(acceptance["by_category"]),
        plots.best_tree(tree["parents"], tree["ranks"], tree["values"]),
    ]
    training = "<p>There are no metrics of a training run with these heads.</p>"
    if metrics:
        training = plots.loss_curves(metrics) + plots.learning_rate(metrics)
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f"<style>{_STYLE}</style></head><body><h1>{title}</h1>\n{_table(acceptance)}\n"
        f"<h2>Acceptance</h2>\n{''.join(drawings)}\n<h2>Training</h2>\n{training}\n</body></html>\n"
    )


def _table(acceptance: Mapping[str, Any]) -> str:
    tree_size = len(acceptance["tree"]["parents"])
    rows = {
        "base model": acceptance["base"],
        "held-out answers": f"{acceptance['num_answers']:,}",
        "their tokens": f"{acceptance['num_answer_tokens']:,}",
        "data, sha256": acceptance["data_sha256"],
        "nodes of the tree drawn, and behind rates and categories": str(tree_size),
        "best single candidate, depth 1": f"{acceptance['accept_rates'][0][0]:.3f}",
    }
    for size, length in acceptance["mean_acceptance_length"].items():
        rows[f"mean acceptance length, {size} nodes"] = f"{length:.3f}"
    cells = "".join(
        f"<tr><th>{html.escape(name)}</th><td>{html.escape(value)}</td></tr>"
        for name, value in rows.items()
    )
    return f"<table>{cells}</table>"


REPORT = Command(
    "report", "Plot a training run and its heads.", run, {"options": Settings(ReportOptions)}
)
