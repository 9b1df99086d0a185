"""The runs that `loadtests.simulate` offers, each a list of named scenarios."""

from collections.abc import Callable
from typing import Any

import msgspec

from loadtests.simulation.fleet import FleetPlan
from loadtests.simulation.hosts import HostSpeed
from loadtests.simulation.run import Scenario
from loadtests.simulation.traffic import Workload
from shared.replicas import Timing

__all__ = ("LARGEST", "SIZES", "SUITES", "Suite", "growth", "tiny")

Suite = list[tuple[str, Scenario]]

SIZES = ((10, 30, 6.0, 1200.0), (100, 200, 60.0, 1200.0), (1000, 400, 500.0, 700.0))
"""Workers, models, requests a second, seconds."""
LARGEST = (10_000, 500, 1500.0, 600.0)


def _scenario(workers: int, models: int, rate: float, seconds: float) -> Scenario:
    return Scenario(
        FleetPlan(hosts=workers, routers=min(5, 1 + workers // 50)),
        Workload(models, requests_per_second=rate, zipf=1.1),
        seconds,
    )


def _usual(seconds: float = 1200.0) -> Scenario:
    return _scenario(100, 200, 60.0, seconds)


def growth(largest: bool) -> Suite:
    """The same rules from 10 workers to 10,000."""
    sizes = (*SIZES, LARGEST) if largest else SIZES
    return [(f"{size[0]:,} workers, {size[1]} models", _scenario(*size)) for size in sizes]


def policies() -> Suite:
    """Routing and roles against simple and against all-knowing ones."""
    usual = _usual()
    return [
        ("mesh", usual),
        ("mesh roles, random", _changed(usual, policy="random")),
        ("mesh roles, round robin", _changed(usual, policy="round_robin")),
        ("mesh roles, oracle routes", _changed(usual, policy="oracle")),
        ("oracle roles, mesh routes", _changed(usual, oracle=True)),
        ("oracle", _changed(usual, policy="oracle", oracle=True)),
    ]


def trouble() -> Suite:
    """Hosts that die, partitions, slow loads, and a fleet that is too small."""
    usual = _usual()
    plan = usual.plan
    cut = ((300.0, 60.0, 0.3), (600.0, 60.0, 0.3), (900.0, 60.0, 0.3))
    slow = msgspec.structs.replace(plan.speed, slow_share=0.5)
    return [
        ("none", usual),
        ("no shifts", _workload(usual, shift_every=0.0)),
        ("each host dies once an hour", _plan(usual, deaths_per_hour=1.0)),
        ("30 % of hosts cut off for 60 s, 3 times", _plan(usual, partitions=cut)),
        ("half of all loads take 6 times as long", _plan(usual, speed=slow)),
        ("50 workers instead of 100", _plan(usual, hosts=50)),
        ("25 workers instead of 100", _plan(usual, hosts=25)),
    ]


def defaults() -> Suite:
    """The times of the rules, one changed at a time; and parts of the fleet out of sight."""
    usual = _usual()

    def timing(**values: Any) -> Scenario:
        return _plan(usual, timing=Timing(**values))

    return [
        ("as they are", usual),
        ("idle after 15 s", timing(idle_after=15.0)),
        ("idle after 300 s", timing(idle_after=300.0)),
        ("settle 2 s", timing(settle=2.0)),
        ("settle 30 s", timing(settle=30.0)),
        ("no second worker for a slow first load", timing(hedge=1e9)),
        ("growing twofold", timing(growth=2)),
        ("growing eightfold", timing(growth=8)),
        ("4 cells of 25 workers", _plan(usual, cells=4)),
        ("25 workers", _plan(usual, hosts=25)),
        ("25 workers, evict after 2 s, stay 5 s", _plan(
            usual, hosts=25, timing=Timing(evict_after=2.0, least_stay=5.0)
        )),
    ]  # fmt: skip


SUITES: dict[str, Callable[[], Suite]] = {
    "policies": policies,
    "trouble": trouble,
    "defaults": defaults,
}


def _changed(scenario: Scenario, **values: object) -> Scenario:
    return msgspec.structs.replace(scenario, **values)


def _plan(scenario: Scenario, **values: object) -> Scenario:
    return _changed(scenario, plan=msgspec.structs.replace(scenario.plan, **values))


def _workload(scenario: Scenario, **values: object) -> Scenario:
    return _changed(scenario, workload=msgspec.structs.replace(scenario.workload, **values))


def tiny(seconds: float = 300.0) -> Scenario:
    """One for tests: 12 workers, 24 models, seconds of CPU."""
    return Scenario(
        FleetPlan(hosts=12, routers=2, speed=HostSpeed(load_per_gib=1.5)),
        Workload(24, requests_per_second=6.0, shift_every=100.0, shifted=1, among=3),
        seconds,
        warm=60.0,
    )
