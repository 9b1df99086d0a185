"""Tables of simulated runs and of what deciding costs."""

from collections.abc import Sequence

from loadtests.figures import markdown, percentile
from loadtests.simulation.costs import Cost
from loadtests.simulation.run import Run

__all__ = ("cost_table", "roles_table", "ttft_table")


def _at(values: Sequence[float], share: float, digits: int = 1) -> str:
    return f"{percentile(values, share):.{digits}f}" if values else "-"


def ttft_table(runs: Sequence[tuple[str, Run]]) -> str:
    """Time to first token, of all answers, in seconds."""
    rows = [
        [
            name,
            f"{run.asked:,}",
            *(_at(run.ttft, share, 2) for share in (0.5, 0.9, 0.95, 0.99, 0.999)),
            f"{sum(run.ttft) / max(1, len(run.ttft)):.2f}",
            f"{run.gave_up:,}",
        ]
        for name, run in runs
    ]
    head = ("", "requests", "p50 s", "p90 s", "p95 s", "p99 s", "p99.9 s", "mean s", "gave up")
    return markdown(head, rows)


def roles_table(runs: Sequence[tuple[str, Run]]) -> str:
    """How soon models are served, what is held for it, and how much moves."""
    rows = []
    for name, run in runs:
        hours = (run.scenario.seconds - run.scenario.warm) / 3600
        cold = [start for start in run.cold if start.ready is not None]
        decided = [start.decided for start in cold if start.decided is not None]
        served = [start.ready for start in cold if start.ready is not None]
        per_hour = len(run.changes) / hours
        rows.append(
            [
                name,
                f"{len(run.cold):,}",
                f"{_at(decided, 0.5)} / {_at(decided, 0.99)} / {_at(decided, 1.0)}",
                f"{_at(served, 0.5, 0)} / {_at(served, 0.95, 0)}",
                f"{_at(run.behind, 0.5, 0)} / {_at(run.behind, 1.0, 0)}",
                f"{run.replica_seconds / max(1.0, run.needed_seconds):.2f}",
                f"{per_hour:,.0f}",
                f"{per_hour / run.scenario.workload.models:.1f}",
                f"{run.evictions:,}",
                f"{run.conflicts:,}",
            ]
        )
    head = (
        "", "cold starts", "decided after s, p50 / p99 / most", "served after s, p50 / p95",
        "newly hot is behind for s, p50 / most", "replica-seconds / needed",
        "role changes an hour", "of one model", "evictions", "claims lost",
    )  # fmt: skip
    return markdown(head, rows)


def _size(amount: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if amount < 1000 or unit == "GB":
            break
        amount /= 1000
    return f"{amount:.3g} {unit}"


def cost_table(costs: Sequence[Cost]) -> str:
    """CPU of a decision, and messages."""
    rows = [
        [
            f"{cost.workers:,}",
            str(cost.models),
            str(cost.routers),
            f"{cost.sum_ms:.2f}",
            f"{cost.quiet_ms:.2f}",
            f"{cost.busy_ms:.2f}",
            f"{cost.full_ms:.2f}",
            f"{cost.worker_in:,.0f} ({_size(cost.worker_in_bytes)})",
            f"{cost.worker_out:.1f}",
            f"{cost.router_in:,.0f} ({_size(cost.router_in_bytes)})",
            f"{cost.router_out:,.0f}",
            f"{cost.delivered:,.0f}",
        ]
        for cost in costs
    ]
    head = (
        "workers", "models", "routers", "demand summed, ms", "decision, quiet, ms",
        "models asked for, ms", "no room, ms", "a worker hears /s", "and tells /s",
        "a router hears /s", "and tells /s", "NATS delivers /s",
    )  # fmt: skip
    return markdown(head, rows)
