"""What deciding costs one worker, and what has to be told, as the fleet grows.

The decision and the summing-up of demand are measured on this machine, one core, on fleets made up
for it. Messages are counted from the intervals that the parts are built with, their bytes from
what their encoders give for typical contents; subjects and NATS's own framing come on top.
"""

import math
import random
import time
from collections.abc import Callable

import msgspec

from loadtests.simulation.clock import START
from shared.demand import REFRESH, Demand, DemandEntry, encode_entry, total
from shared.leases import RENEW_SECONDS
from shared.placement import decide
from shared.presence import Beat, LoadableModel, ModelState, encode_beat
from shared.snapshot import DEFAULT_SLOTS, Holding, LeaseView, Snapshot, WorkerView
from worker.outlook import LEAST_PAUSE, MOST_HEARD

__all__ = ("Cost", "measure")

GIB = 1 << 30
BEAT = 0.5
"""Seconds between two beats that routers hear."""
SUBJECT = 60
"""Bytes of subject and header of a message, about."""
LEASE = 120
"""Bytes of a lease."""


class Cost(msgspec.Struct, frozen=True):
    """At one size of the fleet."""

    workers: int
    models: int
    routers: int
    sum_ms: float
    """CPU to add up all routers' demand."""
    quiet_ms: float
    """CPU of a decision while nothing has to move."""
    busy_ms: float
    """The same, while a tenth of the models are asked for that nobody serves."""
    full_ms: float
    """The same, with no room but what evictions make."""
    worker_in: float
    """Messages that one worker hears, a second."""
    worker_in_bytes: float
    worker_out: float
    router_in: float
    router_in_bytes: float
    router_out: float
    delivered: float
    """Messages that NATS delivers, a second, to all together."""


def measure(workers: int, models: int, routers: int, seed: int = 1, times: int = 5) -> Cost:
    """Measure one size."""
    world = _World(workers, models, routers, seed)
    demand = total(world.entries, START)
    quiet = world.snapshot(demand)
    asked = {
        name: Demand(waiting=3, waiting_since=START - 1, last_use=START) for name in world.unserved
    }
    busy = world.snapshot({**demand, **asked})
    full = world.snapshot({**demand, **asked}, shrink=True)
    if decide(quiet, START).actions:
        raise AssertionError("the quiet fleet is not quiet")
    beat = encode_beat(world.beat())
    entry = encode_entry(world.entries[0])
    leases = len(world.leases)
    pause = max(LEAST_PAUSE, workers / MOST_HEARD)
    told = len(world.entries) / REFRESH
    beats_to_workers = workers / pause
    renewals = leases / RENEW_SECONDS
    sizes = [len(part) + SUBJECT for part in (beat, entry)]
    worker_in = beats_to_workers + renewals + told
    router_in = workers / BEAT + told + routers
    return Cost(
        workers=workers,
        models=models,
        routers=routers,
        sum_ms=_cpu(lambda: total(world.entries, START), times),
        quiet_ms=_cpu(lambda: decide(quiet, START), times),
        busy_ms=_cpu(lambda: decide(busy, START), times),
        full_ms=_cpu(lambda: decide(full, START), times),
        worker_in=worker_in,
        worker_in_bytes=beats_to_workers * sizes[0] + renewals * LEASE + told * sizes[1],
        worker_out=1 / BEAT + 1 / pause + leases / workers / RENEW_SECONDS,
        router_in=router_in,
        router_in_bytes=workers / BEAT * sizes[0] + told * sizes[1],
        router_out=told / routers + 1,
        delivered=worker_in * workers + router_in * routers,
    )


def _cpu(work: Callable[[], object], times: int) -> float:
    """The least CPU milliseconds of some tries: what the work takes, less what disturbs it."""
    found = []
    for _ in range(times):
        began = time.process_time()
        work()
        found.append(time.process_time() - began)
    return 1e3 * min(found)


def _load(replicas: int) -> float:
    """A load at which so many replicas are neither too few nor too many."""
    slots = DEFAULT_SLOTS * replicas
    return max(DEFAULT_SLOTS / 2, slots - 3.5 * math.sqrt(slots))


class _World:
    """A fleet in which every other worker holds one or two models, by Zipf's law."""

    def __init__(self, workers: int, models: int, routers: int, seed: int) -> None:
        rng = random.Random(f"world {workers} {seed}")
        names = [f"model-{number:03}" for number in range(models)]
        self.unserved = names[models - models // 10 :]
        served = names[: models - models // 10]
        self.able = {name: (1 + number % 4) * GIB for number, name in enumerate(names)}
        weights = [1 / (rank + 1) for rank in range(len(served))]
        self.holds: dict[str, list[str]] = {}
        self.leases: list[LeaseView] = []
        counts = dict.fromkeys(served, 0)
        for number in range(workers):
            held = self.holds[f"worker-{number:05}"] = []
            if number % 2:
                continue
            for model in sorted({*rng.choices(served, weights, k=2)}):
                held.append(model)
                self.leases.append(LeaseView(model, counts[model], f"worker-{number:05}"))
                counts[model] += 1
        self.entries = [
            DemandEntry(
                model, f"router-{router}", START, requests=12.3456789, tokens=2345.678901,
                running=2, load=_load(counts[model]) / routers,
                sustained=_load(counts[model]) / routers, last_use=START,
            )
            for model in served
            if counts[model]
            for router in range(routers)
        ]  # fmt: skip

    def snapshot(self, demand: dict[str, Demand], shrink: bool = False) -> Snapshot:
        """All workers; `shrink`: with no room for anything beside what they hold."""
        workers = []
        for name, held in self.holds.items():
            holds = tuple(
                Holding(model, "ready", START - 900, 1, self.able[model]) for model in held
            )
            used = sum(holding.memory for holding in holds)
            memory = used if shrink else max(16 * GIB, used)
            workers.append(WorkerView(name, memory, self.able, holds))
        return Snapshot(tuple(workers), tuple(self.leases), demand=demand)

    def beat(self) -> Beat:
        """A worker's that holds one model and could load twenty."""
        state = ModelState(
            "SmolLM2-135M-Instruct", "ready", slots=8, free=3, context=4096, kv_used=0.4321,
            tokens_per_second=123.456, size=GIB, created=1_700_000_000, memory=GIB, busy=5,
            since=START, last_use=START, drafted=123456, accepted=65432, prompt_tokens=1234567,
        )  # fmt: skip
        able = tuple(
            LoadableModel(f"SmolLM2-135M-Instruct.{n}", GIB, 4096, 8, GIB, 1_700_000_000)
            for n in range(20)
        )
        return Beat(
            "worker-0123456789", "ready", 123456, (state,), "host.example", "0.1", START,
            64 * GIB, 32 * GIB, able, memory_budget=48 * GIB,
        )  # fmt: skip
