"""The fleet in virtual time: how soon models are served, what is held and moved for it, and what
deciding costs as the fleet grows.

A discrete-event simulation, seeded, that runs the very functions of `shared/`: the ledgers of the
routers, the placement function that every worker asks, and the routers' choice of a worker. Made up
are hosts (as one GPU of the middle class), clients (conversations with models whose popularity
follows Zipf's law and shifts) and wires. The same seed gives the same tables, but for milliseconds
of CPU. See `loadtests/simulation/` and `docs/simulation.md`.
"""

import sys
import time
from pathlib import Path
from typing import Annotated, Literal

import cyclopts

from loadtests.figures import markdown
from loadtests.simulation.costs import Cost, measure
from loadtests.simulation.noise import LOADS, as_it_is, downs_per_hour, simpler
from loadtests.simulation.report import cost_table, roles_table, ttft_table
from loadtests.simulation.run import Run, simulate
from loadtests.simulation.suites import SUITES, Suite, growth

Part = Literal["noise", "costs", "policies", "trouble", "defaults", "growth"]
PARTS: tuple[Part, ...] = ("noise", "costs", "policies", "trouble", "defaults", "growth")

GROWTH = ((10, 20, 1), (100, 50, 2), (1000, 200, 4), (10_000, 500, 8))
"""Workers, models, routers."""

app = cyclopts.App(help=__doc__)


def run_all(suite: Suite, seed: int) -> list[tuple[str, Run]]:
    """Simulate one scenario after another; tells on stderr which is done."""
    found = []
    for name, scenario in suite:
        began = time.monotonic()
        found.append((name, simulate(scenario, seed)))
        run = found[-1][1]
        print(
            f"{name}: {scenario.seconds / 60:.0f} virtual minutes, {run.asked:,} requests, "
            f"{run.events:,} events in {time.monotonic() - began:.0f} s",
            file=sys.stderr,
            flush=True,
        )
    return found


def show(title: str, *tables: str) -> None:
    """Print a heading with what belongs to it."""
    print(f"\n## {title}\n", *tables, sep="\n", flush=True)


def noise(seed: int) -> None:
    """Count what a steady load moves."""
    rows = []
    for title, rule in (("as it is", as_it_is), ("simpler", simpler)):
        for seconds in (5.0, 30.0, 90.0):
            found = (downs_per_hour(load, seconds, rule, 10, seed) for load in LOADS)
            rows.append([title, f"{seconds:.0f} s", *(f"{value:.2f}" for value in found)])
    head = ("rule", "answers last", *(f"load {load:g}" for load in LOADS))
    show("To and fro under a steady load, times an hour", markdown(head, rows))


def costs(plots: Path | None) -> None:
    """Measure a decision at every size."""
    found: list[Cost] = [measure(*size) for size in GROWTH]
    show("What deciding costs", cost_table(found))
    if plots is not None:
        from loadtests.simulation.plots import draw_costs

        draw_costs(found, plots / "simulation-costs.svg")


def policies(seed: int, plots: Path | None) -> None:
    """Compare with simple and with all-knowing routing and roles."""
    found = run_all(SUITES["policies"](), seed)
    show("Against round robin, and against a centre that knows everything", ttft_table(found), "")
    print(roles_table([one for one in found if one[0] in ("mesh", "oracle")]))
    if plots is not None:
        from loadtests.simulation.plots import draw_course, draw_ttft

        draw_ttft(found, plots / "simulation-ttft.svg")
        course = [one for one in found if one[0] in ("mesh", "oracle")]
        draw_course(course, plots / "simulation-replicas.svg")


def suite_of(part: Part, seed: int, largest: bool) -> None:
    """Any other part: both tables."""
    found = run_all(growth(largest) if part == "growth" else SUITES[part](), seed)
    title = {
        "trouble": "In trouble",
        "defaults": "Other defaults",
        "growth": "From ten workers to ten thousand",
    }[part]
    show(title, roles_table(found), "", ttft_table(found))


@app.default
def main(
    *,
    part: tuple[Part, ...] = PARTS,
    seed: int = 1,
    largest: bool = True,
    plots: Annotated[Path | None, cyclopts.Parameter(name="--plots")] = None,
) -> None:
    """Print the tables.

    Args:
        part: what is simulated; may be given several times
        seed: of everything random
        largest: whether `growth` goes up to 10,000 workers, which takes most of its time
        plots: folder for SVG files; needs matplotlib
    """
    for one in part:
        if one == "noise":
            noise(seed)
        elif one == "costs":
            costs(plots)
        elif one == "policies":
            policies(seed, plots)
        else:
            suite_of(one, seed, largest)


if __name__ == "__main__":
    app()
