"""A fleet in virtual time whose workers do what the placement function says of them.

Loading and draining take some seconds; a lease is had by whoever claims it first; of demand it is
only known what the test says. Each worker may be given a view of its own.
"""

import random
from collections.abc import Callable

import msgspec

from shared.demand import Demand
from shared.placement import Action, Decision, decide
from shared.snapshot import Holding, LeaseView, ModelSettings, Snapshot, WorkerView

START = 1_800_000_000.0
GIB = 1 << 30
ABLE = {"a": GIB, "b": GIB, "c": GIB, "big": 6 * GIB}

View = Callable[[str, Snapshot], Snapshot]


class ToyFleet:
    def __init__(self, *, load: float = 3.0, drain: float = 1.0, beat: float = 0.5) -> None:
        self.now = START
        self.load, self.drain, self.beat = load, drain, beat
        self.workers: dict[str, WorkerView] = {}
        self.leases: dict[tuple[str, int], LeaseView] = {}
        self.settings: dict[str, ModelSettings] = {}
        self.slots: dict[str, int] = {}
        self.loads: dict[str, float] = {}
        self.unserved: dict[str, float] = {}
        self.last_use: dict[str, float] = {}
        self.done: list[tuple[float, Action]] = []

    def add(self, name: str, memory: int, able: dict[str, int], *pinned: str) -> None:
        holds = tuple(
            Holding(model, "ready", self.now, memory=able[model], pinned=True) for model in pinned
        )
        self.workers[name] = WorkerView(name, memory, able, holds)

    def remove(self, name: str) -> None:
        """It dies, and what it holds is held no more."""
        del self.workers[name]
        self.leases = {key: lease for key, lease in self.leases.items() if lease.worker != name}

    def close(self, name: str) -> None:
        self.workers[name] = msgspec.structs.replace(self.workers[name], open=False)

    def ask(self, model: str, load: float = 0.5) -> None:
        """So many requests are in flight from now on; they wait while nobody serves them."""
        self.loads[model] = load
        self.unserved.setdefault(model, self.now)

    def leave(self, model: str) -> None:
        """Nobody asks for the model any more."""
        self.last_use[model] = self.now
        self.loads.pop(model, None)

    def snapshot(self) -> Snapshot:
        served = {
            holding.model
            for worker in self.workers.values()
            for holding in worker.holds
            if worker.open and holding.state == "ready"
        }
        demand = {model: Demand(last_use=at) for model, at in self.last_use.items()}
        for model, load in self.loads.items():
            if model in served:
                self.unserved.pop(model, None)
                demand[model] = Demand(
                    running=round(load) or 1, load=load, sustained=load, last_use=self.now
                )
            else:
                since = self.unserved.setdefault(model, self.now)
                demand[model] = Demand(waiting=1, waiting_since=since, last_use=self.now)
        return Snapshot(
            tuple(self.workers.values()),
            tuple(self.leases.values()),
            dict(self.settings),
            demand,
            dict(self.slots),
        )

    def step(self, seconds: float = 1.0, view: View | None = None) -> list[Action]:
        """Let all workers decide once, and then time pass."""
        everything = self.snapshot()
        same = decide(everything, self.now)
        acted: list[Action] = []
        for name, worker in list(self.workers.items()):
            if worker.open:
                said = same if view is None else decide(view(name, everything), self.now)
                acted += self._act(name, said)
        self.done += [(self.now, action) for action in acted]
        self.pass_time(seconds)
        return acted

    def settle(self, rounds: int = 60, seconds: float = 15.0, view: View | None = None) -> int:
        """Go on until nothing moves any more; how many rounds it took.

        Raises:
            AssertionError: something still moves after all rounds.
        """
        quiet = 0
        for number in range(rounds):
            quiet = 0 if self.step(seconds, view) or self.moving() else quiet + 1
            if quiet == 6:
                return number
        raise AssertionError(f"still moving: {self.done[-10:]}")

    def moving(self) -> bool:
        return any(h.state != "ready" for w in self.workers.values() for h in w.holds)

    def pass_time(self, seconds: float) -> None:
        self.now += seconds
        for name, worker in self.workers.items():
            held: list[Holding] = []
            for holding in worker.holds:
                age = self.now - holding.since
                if holding.state == "loading" and age >= self.load:
                    held.append(msgspec.structs.replace(holding, state="ready", since=self.now))
                elif holding.state == "draining" and age >= self.drain:
                    self._free(name, holding.model)
                else:
                    held.append(holding)
            self.workers[name] = msgspec.structs.replace(worker, holds=tuple(held))

    def count(self, model: str, *states: str) -> int:
        wanted = states or ("loading", "ready")
        return sum(
            holding.model == model and holding.state in wanted
            for worker in self.workers.values()
            for holding in worker.holds
        )

    def where(self, model: str) -> list[str]:
        return sorted(
            name for name, w in self.workers.items() if any(h.model == model for h in w.holds)
        )

    def used(self, name: str) -> int:
        return sum(holding.memory for holding in self.workers[name].holds)

    def _act(self, name: str, said: Decision) -> list[Action]:
        acted = []
        for action in said.of(name):
            worker = self.workers[name]
            model = action.model
            if action.kind == "demote":
                held = tuple(
                    msgspec.structs.replace(holding, state="draining", since=self.now)
                    if holding.model == model
                    else holding
                    for holding in worker.holds
                )
            else:
                key = (model, action.replica)
                if key in self.leases:
                    continue
                self.leases[key] = LeaseView(model, action.replica, name, "loading", self.now)
                held = worker.holds
                if action.kind == "promote":
                    assert all(holding.model != model for holding in held)
                    new = Holding(model, "loading", self.now, memory=worker.able[model])
                    held = (*held, new)
            self.workers[name] = msgspec.structs.replace(worker, holds=held)
            acted.append(action)
        return acted

    def _free(self, name: str, model: str) -> None:
        self.leases = {
            key: lease
            for key, lease in self.leases.items()
            if (lease.worker, lease.model) != (name, model)
        }


def shuffled(snapshot: Snapshot, rng: random.Random) -> Snapshot:
    """The same, in another order."""

    def mix(values: dict[str, object]) -> dict[str, object]:
        return dict(rng.sample(list(values.items()), len(values)))

    workers = [
        msgspec.structs.replace(
            worker,
            able=mix(dict(worker.able)),
            holds=tuple(rng.sample(worker.holds, len(worker.holds))),
        )
        for worker in snapshot.workers
    ]
    return Snapshot(
        tuple(rng.sample(workers, len(workers))),
        tuple(rng.sample(snapshot.leases, len(snapshot.leases))),
        mix(dict(snapshot.settings)),
        mix(dict(snapshot.demand)),
        mix(dict(snapshot.slots)),
    )


def fleet_of(count: int, memory: int = 8 * GIB, **options: float) -> ToyFleet:
    fleet = ToyFleet(**options)
    for number in range(count):
        fleet.add(f"w{number}", memory, ABLE)
    return fleet
