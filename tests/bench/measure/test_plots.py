import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from bench.measure.plots import check_plots, plot_ratios
from training.errors import RunError


@dataclass(frozen=True)
class Ratios:
    concurrency: int
    throughput_ratios: tuple[float, ...]
    throughput_ratio: float
    itl_p95_ratio: float


def test_ratios_are_drawn_over_the_concurrency(tmp_path: Path) -> None:
    path = tmp_path / "new" / "ratios.svg"
    plot_ratios([Ratios(1, (1.5, 1.7), 1.6, 0.7), Ratios(16, (1.0, 1.1), 1.05, 0.9)], path)
    texts = path.read_text()
    for text in ("throughput", "p95 time per token (lower is better)", "concurrency", "16"):
        assert f"<!-- {text} -->" in texts


def test_a_missing_matplotlib_is_named_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    check_plots()
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(RunError, match=r"pip install 'euryale\[report\]'"):
        check_plots()
