"""The plot of tokens a second over concurrency, as an SVG that is the same for the same figures.

matplotlib is imported only when something is drawn; it comes with the `bench` extra.
"""

import statistics
from collections.abc import Sequence
from pathlib import Path

from loadtests.peers.throughput import ThroughputRow

__all__ = ("Line", "draw", "lines_of")

_COLOURS = ("#0b6e4f", "#c1440e", "#7a5195", "#5c5c5c")


class Line:
    """One system: medians over concurrency, with the least and the most."""

    def __init__(self, name: str, rows: Sequence[ThroughputRow]) -> None:
        self.name = name
        self.levels = sorted({row.concurrent for row in rows})
        rates = [
            [row.tokens_per_second for row in rows if row.concurrent == level]
            for level in self.levels
        ]
        self.medians = [statistics.median(values) for values in rates]
        self.below = [middle - min(v) for middle, v in zip(self.medians, rates, strict=True)]
        self.above = [max(v) - middle for middle, v in zip(self.medians, rates, strict=True)]


def lines_of(rows: Sequence[ThroughputRow]) -> list[Line]:
    """One line a system, in the order in which they were measured first."""
    names = dict.fromkeys(row.system for row in rows)
    return [Line(name, [row for row in rows if row.system == name]) for name in names]


def draw(rows: Sequence[ThroughputRow], title: str, path: Path) -> None:
    """Write the plot to `path`, whose folder is made.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: there is nothing to draw.
    """
    if not rows:
        raise ValueError("no throughput was measured, so there is nothing to plot")
    import matplotlib as mpl
    from matplotlib.figure import Figure

    # no random ids, no date, text as text: a run that found the same gives the same file
    with mpl.rc_context({"svg.hashsalt": "mesh", "svg.fonttype": "none"}):
        figure = Figure(figsize=(6.4, 3.8), layout="constrained")
        axes = figure.subplots()
        for line, colour in zip(lines_of(rows), _COLOURS, strict=False):
            spread = (line.below, line.above)
            axes.errorbar(
                line.levels,
                line.medians,
                yerr=spread,
                label=line.name,
                color=colour,
                marker="o",
                markersize=4,
                capsize=3,
            )
        levels = sorted({row.concurrent for row in rows})
        axes.set_xscale("log", base=2)
        axes.set_xticks(levels, [str(level) for level in levels])
        axes.minorticks_off()
        axes.set_ylim(bottom=0)
        axes.set_xlabel("concurrent requests")
        axes.set_ylabel("tokens a second")
        axes.set_title(title, fontsize=10)
        axes.grid(alpha=0.25)
        axes.legend(frameon=False)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})
