"""The fleet: hosts that decide for themselves by the real placement function, and a board between.

The board stands for the buckets: demand entries of all routers and leases, claimed by
compare-and-set. Hosts look at it once a second, in a few groups at different moments, each of which
decides once on what it sees, since all that see the same decide the same (a test shows that).
"""

import random
import time
from collections.abc import Callable
from functools import partial

import msgspec

from loadtests.simulation.clock import START, Clock
from loadtests.simulation.hosts import Host, HostSpeed, Request
from loadtests.simulation.routers import Router
from shared.demand import Demand, DemandEntry, encode_entry, total
from shared.kv import LEASE_SECONDS
from shared.placement import Action, decide
from shared.replicas import Timing
from shared.snapshot import LeaseView, Snapshot, WorkerView

__all__ = ("EXPIRY", "Fleet", "FleetPlan", "Telling")

EXPIRY = 2.0
"""Seconds of silence after which routers take a worker for dead."""
BEAT = 0.5
TICK = 1.0
"""Seconds between two decisions of a worker."""


class FleetPlan(msgspec.Struct, frozen=True):
    """Hosts, and what happens to them."""

    hosts: int
    routers: int = 3
    memory: tuple[int, ...] = (12 << 30, 24 << 30, 48 << 30)
    """Sizes of hosts, in turn."""
    model_memory: tuple[int, ...] = (1 << 30, 2 << 30, 4 << 30, 8 << 30)
    """Sizes of models, in turn."""
    slots: int = 8
    groups: int = 2
    """Moments within a second at which hosts decide."""
    cells: int = 1
    """Parts of the fleet of which hosts see only their own."""
    deaths_per_hour: float = 0.0
    """Of one host; another one comes a minute later."""
    partitions: tuple[tuple[float, float, float], ...] = ()
    """When (seconds), for how long, and which share of the hosts cannot reach anybody."""
    speed: HostSpeed = HostSpeed()
    timing: Timing = Timing()


class Telling:
    """What was sent over the board, and what deciding cost."""

    def __init__(self) -> None:
        self.entries = 0
        self.entry_bytes = 0
        self.lease_writes = 0
        self.conflicts = 0
        self.decisions: list[float] = []
        """CPU seconds."""
        self.changes: list[tuple[float, Action]] = []


class Fleet:
    """Hosts, routers and the board."""

    def __init__(self, plan: FleetPlan, models: list[str], clock: Clock, seed: int) -> None:
        self.plan = plan
        self.clock = clock
        self.hosts: dict[str, Host] = {}
        self.away: set[str] = set()
        """Those whose silence has been noticed."""
        self.routers: list[Router] = []
        self.telling = Telling()
        self.entries: dict[tuple[str, str], DemandEntry] = {}
        self.leases: dict[tuple[str, int], LeaseView] = {}
        self.became_ready: Callable[[str], None] = lambda model: None
        self.first_token: Callable[[Request], None] = lambda request: None
        self.ended: Callable[[Request], None] = lambda request: None
        self.able = {
            model: plan.model_memory[number % len(plan.model_memory)]
            for number, model in enumerate(models)
        }
        self._rng = random.Random(f"fleet {seed}")
        self._named = 0
        self._numbers: dict[tuple[str, str], int] = {}
        """Replica by host and model."""
        self._views: dict[str, WorkerView] = {}
        self._cut: set[str] = set()
        for _ in range(plan.hosts):
            self._add()

    def start(self, decides: bool = True) -> None:
        """Begin to beat, to decide (unless somebody else does), to die and to be cut off."""
        clock = self.clock
        clock.every(BEAT, self._beat, BEAT)
        clock.every(0.25, self._tell, 0.25)
        if decides:
            for group in range(self.plan.groups):
                for cell in range(self.plan.cells):
                    phase = (group + cell / self.plan.cells) / self.plan.groups
                    clock.every(TICK, partial(self._decide, group, cell), phase)
        if self.plan.deaths_per_hour:
            self._plan_death()
        for at, lasts, share in self.plan.partitions:
            clock.after(at, self._partition, lasts, share)

    def demand(self) -> dict[str, Demand]:
        """All that routers have told, summed up now."""
        return total(self.entries.values(), self.clock.now)

    def tell_now(self, router: Router) -> None:
        """A router tells what cannot wait."""
        if router.ledger.urgent:
            self._tell_of(router)

    def act(self, action: Action) -> None:
        """A host does what was decided about it, if the board lets it."""
        host = self.hosts.get(action.worker)
        if host is None or not host.open or host.name in self._cut:
            return
        model, loaded = action.model, host.models.get(action.model)
        if action.kind == "demote":
            if loaded is None or loaded.state != "ready":
                return
            host.drain(model)
        else:
            key = (model, action.replica)
            self.telling.lease_writes += 1
            if key in self.leases:
                self.telling.conflicts += 1
                return
            there = loaded is not None and loaded.state == "ready"
            self.leases[key] = LeaseView(
                model,
                action.replica,
                host.name,
                state="ready" if there else "loading",
                since=self.clock.now,
            )
            self._numbers[host.name, model] = action.replica
            if action.kind == "promote":
                host.load(model)
        self.telling.changes.append((self.clock.now - START, action))

    def snapshot(self, cell: int = 0) -> Snapshot:
        """What a host of a cell sees."""
        cells, views = self.plan.cells, self._views
        workers = []
        for number, (name, host) in enumerate(self.hosts.items()):
            if name in self.away or (cells > 1 and number % cells != cell):
                continue
            if host.models:
                workers.append(host.view())
                continue
            view = views.get(name)
            if view is None or view.open != host.open:
                view = views[name] = host.view()
            workers.append(view)
        return Snapshot(
            tuple(workers),
            tuple(self.leases.values()),
            demand=self.demand(),
            slots=dict.fromkeys(self.able, self.plan.slots),
        )

    def _decide(self, group: int, cell: int) -> None:
        snapshot = self.snapshot(cell)
        began = time.process_time()
        decision = decide(snapshot, self.clock.now, self.plan.timing)
        self.telling.decisions.append(time.process_time() - began)
        groups, cells = self.plan.groups, self.plan.cells
        mine = (
            {
                name
                for number, name in enumerate(self.hosts)
                if number // cells % groups == group and (cells == 1 or number % cells == cell)
            }
            if decision.actions
            else ()
        )
        for action in decision.actions:
            if action.worker in mine:
                self.act(action)

    def _add(self) -> None:
        number = self._named
        self._named += 1
        host = Host(
            f"host-{number:05}",
            self.plan.memory[number % len(self.plan.memory)],
            self.able,
            clock=self.clock,
            speed=self.plan.speed,
            slots=self.plan.slots,
            rng=self._rng,
        )
        host.changed = self._changed
        host.first_token = lambda request: self.first_token(request)
        host.ended = self._ended
        host.handed_back = self._handed_back
        self.hosts[host.name] = host

    def _changed(self, host: Host, model: str) -> None:
        loaded = host.models.get(model)
        if loaded is not None and loaded.state == "ready":
            key = (model, self._numbers.get((host.name, model), -1))
            if key in self.leases:
                self.leases[key] = msgspec.structs.replace(
                    self.leases[key], state="ready", since=self.clock.now
                )
            if host.name not in self._cut:
                for router in self.routers:
                    router.ready(model, host)
                self.became_ready(model)
            return
        for router in self.routers:
            router.not_ready(model, host.name)
        if loaded is None:
            self._release(host.name, model)

    def _release(self, name: str, model: str) -> None:
        key = (model, self._numbers.pop((name, model), -1))
        lease = self.leases.get(key)
        if lease is not None and lease.worker == name:
            del self.leases[key]

    def _ended(self, request: Request) -> None:
        assert request.worker is not None
        request.router.ended(request, request.worker.name)
        self.ended(request)

    def _handed_back(self, request: Request) -> None:
        assert request.worker is not None
        request.router.ended(request, request.worker.name)
        request.worker = None
        request.router.place(request)

    def _beat(self) -> None:
        for name, host in self.hosts.items():
            if host.models and name not in self._cut:
                for router in self.routers:
                    for model in host.models:
                        router.told(model, host)
        for router in self.routers:
            for model in list(router.held):
                router.retry(model)

    def _tell(self) -> None:
        for router in self.routers:
            self._tell_of(router)

    def _tell_of(self, router: Router) -> None:
        for entry in router.ledger.due(self.clock.now):
            self.entries[entry.router, entry.model] = entry
            self.telling.entries += 1
            self.telling.entry_bytes += len(encode_entry(entry))

    def _plan_death(self) -> None:
        rate = self.plan.deaths_per_hour * self.plan.hosts / 3600
        self.clock.after(self._rng.expovariate(rate), self._death)

    def _death(self) -> None:
        self._plan_death()
        victim = self._rng.choice([h for h in self.hosts.values() if h.name not in self._cut])
        held = list(victim.models)
        lost = victim.die()
        del self.hosts[victim.name]
        self._views.pop(victim.name, None)
        self.clock.after(EXPIRY, self._noticed, victim.name, held, lost)
        self.clock.after(LEASE_SECONDS, self._expired, victim.name, held)
        self.clock.after(60.0, self._add)

    def _noticed(self, name: str, held: list[str], lost: list[Request]) -> None:
        """Routers have missed its beats: what it did is resumed elsewhere."""
        for router in self.routers:
            for model in held:
                router.not_ready(model, name)
        for request in lost:
            request.router.ended(request, name)
            request.worker = None
            request.router.place(request)

    def _expired(self, name: str, held: list[str]) -> None:
        if name not in self.hosts or name in self._cut:
            for model in held:
                self._release(name, model)

    def _partition(self, lasts: float, share: float) -> None:
        names = self._rng.sample(sorted(self.hosts), int(len(self.hosts) * share))
        for name in names:
            host = self.hosts[name]
            self._cut.add(name)
            host.reachable = False
            lost = host.cut_off()
            held = list(host.models)
            self.clock.after(EXPIRY, self._noticed, name, held, lost)
            self.clock.after(EXPIRY, self.away.add, name)
            self.clock.after(LEASE_SECONDS, self._expired, name, held)
            self.clock.after(lasts, self._healed, name)

    def _healed(self, name: str) -> None:
        self._cut.discard(name)
        self.away.discard(name)
        host = self.hosts[name]
        host.reachable = True
        for model, loaded in host.models.items():
            if loaded.state == "ready":
                for router in self.routers:
                    router.ready(model, host)
                self.became_ready(model)
