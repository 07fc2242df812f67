"""Plots of the training report, each as an SVG text; matplotlib is loaded on first use."""

import io
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from training.errors import RunError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_SIZE_INCHES = (6.4, 3.8)
_WIDE_INCHES = (12.8, 4.6)


def new_figure(
    title: str, x_label: str, y_label: str, size: tuple[float, float] = _SIZE_INCHES
) -> tuple["Figure", "Axes"]:
    """Make a figure with one pair of axes.

    Args:
        title: Above the axes.
        x_label: Below the axes.
        y_label: Left of the axes.
        size: Width and height in inches.

    Raises:
        RunError: If matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise RunError(
            "plots need matplotlib, which is not installed; pip install 'euryale[report]'"
        ) from error
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    axes.set(title=title, xlabel=x_label, ylabel=y_label)
    axes.grid(visible=True, alpha=0.3)
    return figure, axes


def loss_curves(metrics: Sequence[Mapping[str, Any]]) -> str:
    """Loss of every head over the steps of a run."""
    figure, axes = new_figure("training loss", "step", "loss, nats")
    steps = [row["step"] for row in metrics]
    for head in range(len(metrics[0]["loss_per_head"])):
        axes.plot(steps, [row["loss_per_head"][head] for row in metrics], label=f"head {head + 1}")
    axes.legend()
    return _svg(figure)


def learning_rate(metrics: Sequence[Mapping[str, Any]]) -> str:
    """Learning rate over the steps of a run."""
    figure, axes = new_figure("learning rate", "step", "learning rate")
    axes.plot([row["step"] for row in metrics], [row["learning_rate"] for row in metrics])
    return _svg(figure)


def accept_rates(rates_KR: Sequence[Sequence[float]]) -> str:
    """Accept rate over rank, a line for each depth."""
    figure, axes = new_figure("accept rate by depth and rank", "rank", "accept rate")
    for depth, rates_R in enumerate(rates_KR, start=1):
        axes.plot(range(len(rates_R)), rates_R, marker="o", label=f"depth {depth}")
    axes.legend()
    return _svg(figure)


def calibration(bins_KC: Sequence[Sequence[Mapping[str, float]]]) -> str:
    """Accept rate over draft probability, a line for each depth; a calibrated head is diagonal."""
    figure, axes = new_figure("calibration", "draft probability", "share that was right")
    axes.plot((0, 1), (0, 1), color="grey", linestyle="--", label="calibrated")
    for depth, bins_C in enumerate(bins_KC, start=1):
        filled = [item for item in bins_C if item["num_candidates"]]
        axes.plot(
            [item["mean_confidence"] for item in filled],
            [item["accept_rate"] for item in filled],
            marker="o",
            label=f"depth {depth}",
        )
    axes.legend()
    return _svg(figure)


def tokens_by_tree_size(expected: Mapping[str, float], measured: Mapping[str, float]) -> str:
    """Tokens per verify step over the number of nodes."""
    figure, axes = new_figure(
        "tokens per step", "nodes of the tree, root included", "tokens per step"
    )
    for label, figures in (("expected from the rates", expected), ("walked", measured)):
        sizes = sorted(map(int, figures))
        axes.plot(sizes, [figures[str(size)] for size in sizes], marker="o", label=label)
    axes.set_xscale("log", base=2)
    axes.legend()
    return _svg(figure)


def by_category(lengths: Mapping[str, float]) -> str:
    """Mean acceptance length of every category."""
    figure, axes = new_figure("by category", "mean acceptance length", "")
    names = sorted(lengths, key=lambda name: lengths[name])
    # A dollar sign would begin a formula.
    labels = [name.replace("$", r"\$") or "(none)" for name in names]
    axes.barh(range(len(names)), [lengths[name] for name in names], tick_label=labels)
    return _svg(figure)


def best_tree(parents: Sequence[int], ranks: Sequence[int], values: Sequence[float]) -> str:
    """A draft tree; nodes carry their rank and are the darker the likelier they are accepted."""
    figure, axes = new_figure("best tree", "", "depth", _WIDE_INCHES)
    depths = [0] * len(parents)
    for node in range(1, len(parents)):
        depths[node] = depths[parents[node]] + 1
    across = _positions(parents)
    for node in range(1, len(parents)):
        ends = (node, parents[node])
        axes.plot([across[n] for n in ends], [depths[n] for n in ends], color="grey", zorder=1)
    dots = axes.scatter(across, depths, c=values, cmap="viridis_r", s=260, zorder=2, vmin=0, vmax=1)
    for node, rank in enumerate(ranks):
        colour = "white" if values[node] > 0.5 else "black"
        label = str(rank) if node else "root"
        axes.text(across[node], depths[node], label, ha="center", va="center", color=colour, size=7)
    axes.invert_yaxis()
    axes.set_xticks([])
    axes.set_yticks(range(max(depths) + 1))
    figure.colorbar(dots, label="probability of acceptance")
    return _svg(figure)


def _positions(parents: Sequence[int]) -> list[float]:
    """Where each node stands from left to right: leaves side by side, parents above the middle."""
    children: list[list[int]] = [[] for _ in parents]
    for node in range(1, len(parents)):
        children[parents[node]].append(node)
    order, stack = [], [0]
    while stack:
        node = stack.pop()
        order.append(node)
        stack += reversed(children[node])
    across = [0.0] * len(parents)
    leaves = (node for node in order if not children[node])
    for place, node in enumerate(leaves):
        across[node] = float(place)
    for node in reversed(order):
        if children[node]:
            across[node] = (across[children[node][0]] + across[children[node][-1]]) / 2
    return across


def _svg(figure: "Figure") -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    # Within a page there is no room for an XML declaration.
    return re.sub(r"^.*?(?=<svg)", "", buffer.getvalue(), flags=re.DOTALL)
