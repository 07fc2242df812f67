"""Plots of benches, written to files; matplotlib is loaded on first use."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from bench.errors import BenchError

_SIZE_INCHES = (6.4, 3.8)


class LevelRatios(Protocol):
    """What is drawn of a load; see `bench.benches.serving.LevelResult`."""

    @property
    def concurrency(self) -> int | None:
        """Clients."""

    @property
    def throughput_ratios(self) -> Sequence[float]:
        """Of each round."""

    @property
    def throughput_ratio(self) -> float:
        """Their median."""

    @property
    def itl_p95_ratio(self) -> float:
        """Median of the rounds."""


def check_plots() -> None:
    """Look for matplotlib before anything is measured.

    Raises:
        BenchError: If it is not installed.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise BenchError(
            "plots need matplotlib, which is not installed; pip install 'euryale[report]'"
        ) from error


def plot_ratios(levels: Sequence[LevelRatios], path: Path) -> None:
    """Draw auto / off of throughput and of p95 inter-token latency over the concurrency."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=_SIZE_INCHES, layout="constrained")
    axes = figure.subplots()
    axes.set(title="speculation auto / off", xlabel="concurrency", ylabel="ratio")
    axes.grid(visible=True, alpha=0.3)
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
