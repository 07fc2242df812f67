"""Plots of benches, written to files; matplotlib is loaded on first use."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from training.measure.plots import new_figure


class LevelRatios(Protocol):
    """What is drawn of a load, such as the serving bench's result."""

    @property
    def concurrency(self) -> int | None:
        """Number of clients."""

    @property
    def throughput_ratios(self) -> Sequence[float]:
        """Throughput ratio of each round."""

    @property
    def throughput_ratio(self) -> float:
        """Median of the rounds' throughput ratios."""

    @property
    def itl_p95_ratio(self) -> float:
        """Median of the rounds' ratios of the 95th percentile of the time per token."""


def check_plots() -> None:
    """Look for matplotlib before anything is measured.

    Raises:
        RunError: If it is not installed.
    """
    new_figure("", "", "")


def plot_ratios(levels: Sequence[LevelRatios], path: Path) -> None:
    """Draw auto / off of throughput and of p95 inter-token latency over the concurrency."""
    figure, axes = new_figure("speculation auto / off", "concurrency", "ratio")
    axes.axhline(1.0, color="grey", linestyle="--")
    places = [level.concurrency or 0 for level in levels]
    for place, level in zip(places, levels, strict=True):
        ratios = level.throughput_ratios
        axes.scatter([place] * len(ratios), ratios, s=12, color="C0", alpha=0.4)
    throughput = [level.throughput_ratio for level in levels]
    axes.plot(places, throughput, marker="o", color="C0", label="throughput")
    itl = [level.itl_p95_ratio for level in levels]
    axes.plot(places, itl, marker="s", color="C1", label="p95 time per token (lower is better)")
    axes.set_xscale("log", base=2)
    axes.set_xticks(places, [str(place) for place in places])
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
