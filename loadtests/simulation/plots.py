"""Plots of simulated runs, as SVG that is the same for the same figures.

matplotlib is imported only when something is drawn; it comes with the `bench` extra.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from loadtests.simulation.costs import Cost
from loadtests.simulation.run import Run

__all__ = ("draw_costs", "draw_course", "draw_ttft")

_COLOURS = ("#0b6e4f", "#c1440e", "#7a5195", "#5c5c5c", "#2f6db5", "#b8860b")
_POINTS = 200


def _draw(path: Path, paint: Callable[[Any], None]) -> None:
    import matplotlib as mpl
    from matplotlib.figure import Figure

    # no random ids, no date, text as text: a run that found the same gives the same file
    with mpl.rc_context({"svg.hashsalt": "mesh", "svg.fonttype": "none"}):
        figure = Figure(figsize=(6.4, 3.8), layout="constrained")
        axes = figure.subplots()
        paint(axes)
        axes.grid(alpha=0.25)
        axes.legend(frameon=False, fontsize=8)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})


def draw_ttft(runs: Sequence[tuple[str, Run]], path: Path) -> None:
    """Which share of answers takes longer to their first token than so many seconds."""

    def paint(axes: Any) -> None:
        for (name, run), colour in zip(runs, _COLOURS, strict=False):
            ordered = sorted(run.ttft)
            shares = [10 ** (-4 * step / _POINTS) for step in range(_POINTS + 1)]
            last = len(ordered) - 1
            values = [ordered[min(last, int(len(ordered) * (1 - share)))] for share in shares]
            axes.plot(values, shares, label=name, color=colour, linewidth=1.3)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("seconds to the first token")
        axes.set_ylabel("share of answers that take longer")

    _draw(path, paint)


def draw_course(runs: Sequence[tuple[str, Run]], path: Path) -> None:
    """Replicas held over time, and those that the requests in flight filled."""

    def paint(axes: Any) -> None:
        for (name, run), colour in zip(runs, _COLOURS, strict=False):
            minutes = [at / 60 for at, _, _ in run.course]
            axes.plot(minutes, [held for _, held, _ in run.course], label=name, color=colour)
        minutes = [at / 60 for at, _, _ in runs[0][1].course]
        needed = [needed for _, _, needed in runs[0][1].course]
        axes.plot(minutes, needed, label="needed", color="black", linewidth=0.8)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("minutes")
        axes.set_ylabel("replicas")

    _draw(path, paint)


def draw_costs(costs: Sequence[Cost], path: Path) -> None:
    """Milliseconds of a decision over workers."""

    def paint(axes: Any) -> None:
        workers = [cost.workers for cost in costs]
        lines = (
            ("nothing has to move", [cost.quiet_ms for cost in costs]),
            ("a tenth of the models asked for", [cost.busy_ms for cost in costs]),
            ("the same, and no room", [cost.full_ms for cost in costs]),
            ("adding up demand", [cost.sum_ms for cost in costs]),
        )
        for (label, values), colour in zip(lines, _COLOURS, strict=False):
            axes.plot(workers, values, label=label, color=colour, marker="o", markersize=4)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("workers")
        axes.set_ylabel("ms of CPU")

    _draw(path, paint)
