"""One simulated run: traffic through routers to a fleet, and what came of it."""

import random
import time
from collections import Counter
from functools import partial

import msgspec

from loadtests.simulation.clock import START, Clock
from loadtests.simulation.fleet import Fleet, FleetPlan
from loadtests.simulation.hosts import Request
from loadtests.simulation.oracle import Oracle, foresee
from loadtests.simulation.routers import Policy, Router
from loadtests.simulation.traffic import (
    Conversation,
    Workload,
    conversations,
    name,
    shifts,
)

__all__ = ("ColdStart", "Run", "Scenario", "simulate")

SAMPLE = 2.0
CAUGHT_UP = 10.0
FOLLOWED = 300.0
"""Seconds for which a model that has become popular is followed."""


class Scenario(msgspec.Struct, frozen=True):
    """What is simulated."""

    plan: FleetPlan
    workload: Workload
    seconds: float
    policy: Policy = "mesh"
    oracle: bool = False
    """Whether the centre that knows everything decides about roles."""
    warm: float = 120.0
    """Seconds at the start of which nothing counts: nobody can have foreseen them."""
    patience: float = 120.0
    """Seconds after which a client that is held gives up."""


class ColdStart(msgspec.Struct):
    """A model that nobody served when it was asked for; seconds since the first request waited."""

    at: float
    model: str
    decided: float | None = None
    ready: float | None = None


class Run(msgspec.Struct):
    """What came of it; times in seconds."""

    scenario: Scenario
    ttft: list[float] = []
    """Of every answer that began after the warm-up: from asking to its first token."""
    cold: list[ColdStart] = []
    behind: list[float] = []
    """Of each shift: how long after it the model had, at last, slots for all its requests."""
    asked: int = 0
    gave_up: int = 0
    replica_seconds: float = 0.0
    needed_seconds: float = 0.0
    """As many replicas as the requests in flight fill, at every moment, rounded up."""
    in_flight_seconds: float = 0.0
    most_replicas: int = 0
    course: list[tuple[float, int, int]] = []
    """Of the whole run: seconds, replicas held, replicas needed."""
    changes: list[tuple[float, str]] = []
    """Promotions and demotions after the warm-up: when, and which."""
    evictions: int = 0
    conflicts: int = 0
    entries_per_second: float = 0.0
    entry_bytes: float = 0.0
    changes_per_second: float = 0.0
    decide_ms: list[float] = []
    cpu: float = 0.0
    events: int = 0


def simulate(scenario: Scenario, seed: int = 1) -> Run:
    """Run a scenario from beginning to end; the same seed gives the same run, but for CPU times."""
    return _Simulation(scenario, seed).run()


class _Simulation:
    def __init__(self, scenario: Scenario, seed: int) -> None:
        self.scenario = scenario
        self.seed = seed
        self.clock = Clock()
        self.result = Run(scenario)
        models = [name(number) for number in range(scenario.workload.models)]
        self.fleet = Fleet(scenario.plan, models, self.clock, seed)
        self.routers = [
            Router(
                f"router-{number}",
                clock=self.clock,
                hosts=self.fleet.hosts,
                policy=scenario.policy,
                slots=scenario.plan.slots,
                patience=scenario.patience,
                rng=random.Random(f"router {number} {seed}"),
            )
            for number in range(scenario.plan.routers)
        ]
        self.cold: dict[str, ColdStart] = {}
        self.in_flight: Counter[str] = Counter()
        self.last_behind: dict[int, float] = {}
        self.caught_up: set[int] = set()
        self.shifts = shifts(scenario.workload, seed, scenario.seconds)
        self.coming = conversations(scenario.workload, seed, scenario.seconds)
        self.rng = random.Random(f"balancer {seed}")

    def run(self) -> Run:
        began = time.process_time()
        fleet, scenario = self.fleet, self.scenario
        fleet.routers = self.routers
        fleet.first_token = self.first_token
        fleet.ended = self.ended
        fleet.became_ready = self.became_ready
        for router in self.routers:
            router.waits = partial(self.waits, router)
            router.gave_up = self.gave_up
        fleet.start(decides=not scenario.oracle)
        if scenario.oracle:
            coming = conversations(scenario.workload, self.seed, scenario.seconds)
            Oracle(fleet, foresee(coming, scenario.plan.speed, scenario.seconds))
        self.clock.every(SAMPLE, self.sample, SAMPLE)
        self.next_conversation()
        self.clock.run(START + scenario.seconds)
        self.finish(time.process_time() - began)
        return self.result

    # what clients do

    def next_conversation(self) -> None:
        following = next(self.coming, None)
        if following is not None:
            self.clock.after(START + following.begins - self.clock.now, self.begins, following)

    def begins(self, conversation: Conversation) -> None:
        self.next_conversation()
        self.ask(conversation, 0, conversation.turns[0].fresh)

    def ask(self, conversation: Conversation, turn: int, prompt: int) -> None:
        self.result.asked += self.counts()
        self.in_flight[conversation.model] += 1
        request = Request(conversation, turn, prompt, self.clock.now)
        self.rng.choice(self.routers).arrive(request)

    def first_token(self, request: Request) -> None:
        if self.counts():
            self.result.ttft.append(self.clock.now - request.since)

    def ended(self, request: Request) -> None:
        conversation, turn = request.conversation, request.turn
        self.left(request.model)
        request.router.ledger.generated(
            request.model, conversation.turns[turn].answer, self.clock.now
        )
        if turn + 1 < len(conversation.turns):
            prompt = request.prompt + request.answer + conversation.turns[turn + 1].fresh
            self.clock.after(
                conversation.turns[turn].think, self.ask, conversation, turn + 1, prompt
            )

    def gave_up(self, request: Request) -> None:
        self.left(request.model)
        self.result.gave_up += self.counts()

    def left(self, model: str) -> None:
        self.in_flight[model] -= 1
        if not self.in_flight[model]:
            del self.in_flight[model]

    # what is observed

    def counts(self) -> bool:
        return self.clock.now - START >= self.scenario.warm

    def waits(self, router: Router, model: str) -> None:
        self.fleet.tell_now(router)
        if model not in self.cold and not any(lease[0] == model for lease in self.fleet.leases):
            self.cold[model] = ColdStart(self.clock.now, model)

    def became_ready(self, model: str) -> None:
        start = self.cold.pop(model, None)
        if start is None:
            return
        start.ready = self.clock.now - start.at
        decided = [
            at
            for at, action in reversed(self.fleet.telling.changes[-2000:])
            if action.model == model and action.kind == "promote" and at + START >= start.at
        ]
        start.decided = decided[-1] + START - start.at if decided else None
        start.at -= START
        if start.at >= self.scenario.warm:
            self.result.cold.append(start)

    def sample(self) -> None:
        elapsed = self.clock.now - START
        slots = self.scenario.plan.slots
        replicas: Counter[str] = Counter()
        ready: Counter[str] = Counter()
        for host in self.fleet.hosts.values():
            for model, loaded in host.models.items():
                replicas[model] += 1
                ready[model] += loaded.state == "ready"
        for number, shift in enumerate(self.shifts):
            if 0 < elapsed - shift.at <= FOLLOWED:
                behind = self.in_flight[shift.model] > slots * ready[shift.model]
                self.follow(number, elapsed - shift.at, behind)
        result = self.result
        held = replicas.total()
        needed = sum(-(-count // slots) for count in self.in_flight.values())
        result.course.append((elapsed, held, needed))
        if not self.counts():
            return
        result.replica_seconds += held * SAMPLE
        result.most_replicas = max(result.most_replicas, held)
        result.needed_seconds += SAMPLE * needed
        result.in_flight_seconds += SAMPLE * self.in_flight.total()

    def follow(self, number: int, since: float, behind: bool) -> None:
        """The time behind ends when the model has had slots enough for `CAUGHT_UP` seconds."""
        last = self.last_behind.setdefault(number, 0.0)
        if number not in self.caught_up:
            if behind:
                self.last_behind[number] = since
            elif last and since - last >= CAUGHT_UP:
                self.caught_up.add(number)

    def finish(self, cpu: float) -> None:
        result, telling, scenario = self.result, self.fleet.telling, self.scenario
        result.cold += [
            start for start in self.cold.values() if self.clock.now - start.at > scenario.patience
        ]
        result.behind = [
            seconds
            for number, seconds in sorted(self.last_behind.items())
            if scenario.seconds - self.shifts[number].at >= FOLLOWED
        ]
        moved = [(at, action) for at, action in telling.changes if action.kind != "adopt"]
        result.changes = [(at, action.kind) for at, action in moved if at >= scenario.warm]
        result.evictions = sum(
            action.reason.startswith("makes room") for at, action in moved if at >= scenario.warm
        )
        result.conflicts = telling.conflicts
        result.entries_per_second = telling.entries / scenario.seconds
        result.entry_bytes = telling.entry_bytes / max(1, telling.entries)
        result.changes_per_second = len(result.changes) / (scenario.seconds - scenario.warm)
        result.decide_ms = [1e3 * seconds for seconds in telling.decisions]
        result.cpu = cpu
        result.events = self.clock.events
