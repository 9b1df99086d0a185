"""Placement under whatever may happen to a fleet: what must hold at every step, and in the end.

Workers come, die and shut down, settings and demand change, leases are lost, some workers see only
some others; between these, time passes and all do what the placement function says.
"""

import random

import msgspec
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from shared.placement import Decision, decide, replicas_of
from shared.replicas import Want
from shared.snapshot import ModelSettings, Snapshot
from tests.unit.toy_fleet import GIB, ToyFleet, shuffled

MODELS = {"small": GIB, "middle": 2 * GIB, "also": 2 * GIB, "large": 5 * GIB}
models = st.sampled_from(sorted(MODELS))
MOST_WORKERS = 8


class PlacementMachine(RuleBasedStateMachine):
    @initialize(seed=st.integers(0, 2**32), blind=st.sampled_from([0.0, 0.0, 0.4]))
    def start(self, seed: int, blind: float) -> None:
        self.rng = random.Random(seed)
        self.blind = blind
        self.fleet = ToyFleet(load=7, drain=2)
        self.named = 0

    # what happens

    @precondition(lambda self: len(self.fleet.workers) < MOST_WORKERS)
    @rule(memory=st.integers(1, 9), able=st.sets(models), pinned=st.booleans())
    def worker_comes(self, memory: int, able: set[str], pinned: bool) -> None:
        self.named += 1
        can = {model: MODELS[model] for model in able}
        fits = sorted(model for model in able if MODELS[model] <= memory * GIB)
        held = fits[:1] if pinned else []
        self.fleet.add(f"worker-{self.named}", memory * GIB, can, *held)

    @precondition(lambda self: self.fleet.workers)
    @rule(data=st.data())
    def worker_dies(self, data: st.DataObject) -> None:
        self.fleet.remove(data.draw(st.sampled_from(sorted(self.fleet.workers))))

    @precondition(lambda self: self.fleet.workers)
    @rule(data=st.data())
    def worker_shuts_down(self, data: st.DataObject) -> None:
        self.fleet.close(data.draw(st.sampled_from(sorted(self.fleet.workers))))

    @rule(
        model=models,
        minimum=st.integers(0, 3),
        maximum=st.integers(0, 3),
        priority=st.integers(-1, 1),
        pin=st.booleans(),
    )
    def operator_decides(
        self, model: str, minimum: int, maximum: int, priority: int, pin: bool
    ) -> None:
        names = sorted(self.fleet.workers)[:1] if pin else ()
        self.fleet.settings[model] = ModelSettings(
            model, minimum, maximum, priority, pinned=tuple(names)
        )

    @rule(model=models, load=st.sampled_from([0.1, 1.0, 5.0, 9.0, 20.0, 60.0]))
    def clients_come(self, model: str, load: float) -> None:
        self.fleet.ask(model, load)

    @rule(model=models)
    def clients_leave(self, model: str) -> None:
        self.fleet.leave(model)

    @rule()
    def leases_are_lost(self) -> None:
        self.fleet.leases.clear()

    @rule(steps=st.integers(1, 20), seconds=st.sampled_from([0.5, 1.0, 5.0, 20.0]))
    def time_passes(self, steps: int, seconds: float) -> None:
        for _ in range(steps):
            self.decided()
            self.fleet.step(seconds, self.view if self.blind else None)
            self.memory_suffices()

    @rule()
    def comes_to_rest(self) -> None:
        """From any state, with all in sight again; and then nothing moves."""
        self.fleet.settle()
        snapshot = self.fleet.snapshot()
        assert decide(snapshot, self.fleet.now).actions == ()
        assert decide(snapshot, self.fleet.now + 0.5).actions == ()
        self.minimums_are_kept_where_memory_allows(snapshot)

    # what must hold

    @invariant()
    def memory_suffices(self) -> None:
        for name, worker in self.fleet.workers.items():
            assert self.fleet.used(name) <= worker.memory

    @invariant()
    def decided(self) -> None:
        fleet = self.fleet
        snapshot = fleet.snapshot()
        decision = decide(snapshot, fleet.now)
        mixed = decide(shuffled(snapshot, self.rng), fleet.now)
        assert (mixed.wants, mixed.actions) == (decision.wants, decision.actions)
        self.actions_are_sound(snapshot, decision)

    def actions_are_sound(self, snapshot: Snapshot, decision: Decision) -> None:
        workers = {worker.name: worker for worker in snapshot.workers}
        leases = {(lease.model, lease.replica) for lease in snapshot.leases}
        claimed = set()
        assert len({(a.worker, a.model) for a in decision.actions}) == len(decision.actions)
        for action in decision.actions:
            worker = workers[action.worker]
            held = {holding.model: holding for holding in worker.holds}
            assert worker.open
            assert action.reason
            if action.kind == "demote":
                assert held[action.model].state == "ready"
                assert not held[action.model].pinned
                continue
            assert (action.model, action.replica) not in leases | claimed
            claimed.add((action.model, action.replica))
            if action.kind == "adopt":
                assert held[action.model].state != "draining"
            else:
                assert action.model not in held
                used = sum(holding.memory for holding in worker.holds)
                assert used + worker.able[action.model] <= worker.memory
        for model, replicas in replicas_of(snapshot).items():
            self.enough_are_left(model, replicas, snapshot, decision)

    def enough_are_left(self, model, replicas, snapshot: Snapshot, decision: Decision) -> None:
        """Nothing goes below its minimum, and of what is in use one stays."""
        demoted = [a for a in decision.actions if a.kind == "demote" and a.model == model]
        gone = {action.worker for action in demoted}
        left = [replica for replica in replicas if replica.worker not in gone]
        wanted = decision.wants[model]
        assert len(left) >= min(self.floor(model, wanted), len(replicas))
        demand = snapshot.demand.get(model)
        if gone and demand is not None and (demand.running or demand.waiting):
            assert left
            assert left[0].ready
        if wanted.replicas >= len(replicas):
            assert all(action.reason.startswith("makes room") for action in demoted)

    def minimums_are_kept_where_memory_allows(self, snapshot: Snapshot) -> None:
        """A model below its minimum has no worker that could take it as things stand."""
        fleet = self.fleet
        replicas = replicas_of(snapshot)
        wants = decide(snapshot, fleet.now).wants
        for model, wanted in wants.items():
            if len(replicas.get(model, ())) >= self.floor(model, wanted):
                continue
            for worker in snapshot.workers:
                held = {holding.model for holding in worker.holds}
                if worker.open and model in worker.able and model not in held:
                    free = worker.memory - fleet.used(worker.name)
                    assert free < worker.able[model], f"{worker.name} could take {model}"

    def floor(self, model: str, wanted: Want) -> int:
        """What is to stay, as the operator says and as the placement function does."""
        known = self.fleet.settings.get(model)
        return max(wanted.floor, known.minimum if known else 0)

    def view(self, name: str, whole: Snapshot) -> Snapshot:
        seen = tuple(w for w in whole.workers if w.name == name or self.rng.random() > self.blind)
        return msgspec.structs.replace(whole, workers=seen)


PlacementMachine.TestCase.settings = settings(
    max_examples=60,
    stateful_step_count=30,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
TestPlacement = PlacementMachine.TestCase
