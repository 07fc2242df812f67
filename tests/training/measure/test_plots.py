import re
import sys
from xml.etree import ElementTree

import pytest

from heads.tree_search import best_tree
from tests.training.measurements import PROFILE
from training.errors import RunError
from training.measure import plots


def texts(svg: str) -> str:
    """Comments of an SVG: matplotlib writes each text there, and draws it as a path."""
    ElementTree.fromstring(svg)
    return " | ".join(re.findall("<!--(.*?)-->", svg))


def test_plots_are_svg_with_what_they_are_named_for() -> None:
    steps = [
        {"step": step, "loss_per_head": [3.0 / step, 4.0 / step], "learning_rate": 0.1}
        for step in (10, 20)
    ]
    assert "head 2" in texts(plots.loss_curves(steps))
    assert "learning rate" in texts(plots.learning_rate(steps))
    assert "depth 2" in texts(plots.accept_rates([[0.5, 0.2], [0.3, 0.1]]))
    bins = [{"num_candidates": 2, "mean_confidence": 0.4, "accept_rate": 0.5}]
    assert "calibrated" in texts(plots.calibration([bins, bins]))
    assert "walked" in texts(plots.tokens_by_tree_size({"1": 1.0, "8": 2.0}, {"1": 1.0, "8": 1.9}))
    assert "math" in texts(plots.by_category({"math": 2.0, "": 1.0}))


def test_a_tree_is_drawn_with_every_node() -> None:
    tree = best_tree(PROFILE, 5)
    drawn = texts(plots.best_tree(tree.parents, tree.ranks, [1.0, 0.4, 0.3, 0.2, 0.1]))
    assert "root" in drawn
    assert "probability of acceptance" in drawn


def test_a_root_alone_can_be_drawn() -> None:
    assert "root" in texts(plots.best_tree([-1], [0], [1.0]))


def test_categories_with_signs_of_formulas_and_markup_are_plain_text() -> None:
    svg = plots.by_category({"a$b$_{c": 1.0, "<script>alert(1)</script>": 2.0})
    assert "<script>" not in svg
    ElementTree.fromstring(svg)


def test_a_missing_matplotlib_is_named_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(RunError, match=r"pip install 'euryale\[report\]'"):
        plots.accept_rates([[0.5]])
