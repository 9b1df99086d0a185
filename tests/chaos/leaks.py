"""What a fleet at rest holds, to be compared before and after."""

from collections.abc import Mapping
from typing import Any

import httpx
import psutil
from fleet import ROUTERS, WORKERS, Fleet

from loadtests.metric_sums import metric_sums
from shared.broker import NatsServer

__all__ = ("held", "more")

COME_AND_GO = {"descriptors": 4}
"""Differences that are none: connections that a client keeps open a little longer."""


async def held(fleet: Fleet[NatsServer], monitor: str) -> dict[str, int]:
    """Requests without an end, busy slots, descriptors and tasks of each part, subscriptions.

    Args:
        fleet: all of it.
        monitor: URL of the NATS server's monitoring.
    """
    found = {"busy attempts": fleet.busy(*WORKERS)}
    for name in (*ROUTERS, *WORKERS):
        process = fleet.process(name)
        for part in (process, *process.children()):
            # An engine has a new number after each start, but always the same parent.
            key = f"descriptors of {name}" + (f"'s {part.name()}" if part is not process else "")
            found[key] = found.get(key, 0) + _descriptors(part)
    for name in WORKERS:
        found[f"tasks of {name}"] = fleet.heard.workers[name].tasks
    async with httpx.AsyncClient(timeout=10, trust_env=False) as client:
        for name in ROUTERS:
            url = f"{fleet.url(name).removesuffix('/v1')}/metrics"
            metrics = metric_sums((await client.get(url)).text)
            found[f"tasks of {name}"] = int(metrics["mesh_router_tasks"])
            found[f"in flight at {name}"] = int(metrics.get("mesh_router_in_flight", 0))
        subscriptions: dict[str, Any] = (await client.get(f"{monitor}/subsz")).json()
    found["subscriptions"] = subscriptions["num_subscriptions"]
    return found


def more(now: Mapping[str, int], before: Mapping[str, int]) -> dict[str, tuple[int, int]]:
    """What there is more of than before: its counts before and now."""
    return {
        name: (before.get(name, 0), count)
        for name, count in now.items()
        if count > before.get(name, 0) + COME_AND_GO.get(name.split(" of ")[0], 0)
    }


def _descriptors(process: psutil.Process) -> int:
    try:
        return process.num_fds()
    except psutil.NoSuchProcess:
        return 0
