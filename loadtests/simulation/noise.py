"""A steady load and chance: how often replicas come and go though nothing has changed.

One model: requests come at random and last as long as they like (M/M/c), for as many slots as its
replicas have, of which there are as many as the rule wants. What is counted is to and fro.
"""

import math
import random
from collections.abc import Callable, Sequence

from loadtests.simulation.clock import START
from shared.demand import LOAD_HALF_LIFE, SUSTAINED_HALF_LIFE, Demand
from shared.replicas import GROWTH, SETTLE, Replica, enough, want
from shared.snapshot import ModelSettings

__all__ = ("LOADS", "NoisyModel", "Rule", "as_it_is", "downs_per_hour", "simpler")

SLOTS = 8
PAUSE = 2.0
"""Seconds from one look to the next."""
LOADS = (1.5, 2.5, 3.5, 5.0, 6.0, 9.0, 13.0, 40.0, 100.0)
"""Requests in flight on average, of which some lie where one more replica is just wanted."""

Rule = Callable[[Demand, Sequence[Replica], float], int]
"""Replicas wanted, of those that are there and the moment."""


def as_it_is(demand: Demand, replicas: Sequence[Replica], now: float) -> int:
    """The rule of `shared.replicas`."""
    return want(ModelSettings("a"), demand, SLOTS, replicas, 0, now).replicas


def simpler(demand: Demand, replicas: Sequence[Replica], now: float) -> int:
    """More by the mean of the last 10 s, fewer at 4 deviations instead of 6."""
    present = len(replicas)
    up = math.ceil((demand.load + math.sqrt(demand.load)) / SLOTS)
    if up > present:
        settled = now - max(replica.since for replica in replicas) >= SETTLE
        return min(up, GROWTH * present) if settled else present
    most = max(demand.load, demand.sustained)
    return max(1, min(present, math.ceil((most + 4 * math.sqrt(most)) / SLOTS)))


class NoisyModel:
    """A model under steady load, as many replicas of which are there as the rule wants."""

    def __init__(self, load: float, seconds: float, seed: str, rule: Rule = as_it_is) -> None:
        self.ups: list[float] = []
        """Seconds at which more came."""
        self.downs: list[float] = []
        self._rng = random.Random(seed)
        self._arriving = load / seconds
        self._staying = math.exp(-PAUSE / seconds)
        self._running = round(load)
        self._load = self._sustained = load
        self._rule = rule
        self._now = START
        self._replicas = [self._replica(number) for number in range(enough(load, load, SLOTS))]

    def run(self, seconds: float) -> None:
        """Let time pass."""
        end = self._now + seconds
        while self._now < end:
            self._pass()
            demand = Demand(
                running=self._running,
                load=self._load,
                sustained=self._sustained,
                last_use=self._now,
            )
            wanted = self._rule(demand, self._replicas, self._now)
            present = len(self._replicas)
            if wanted > present:
                self.ups.append(self._now - START)
                self._replicas += [self._replica(number) for number in range(present, wanted)]
            elif wanted < present:
                self.downs.append(self._now - START)
                del self._replicas[wanted:]

    def _pass(self) -> None:
        rng = self._rng
        taken = min(self._running, SLOTS * len(self._replicas))
        self._running -= sum(rng.random() > self._staying for _ in range(taken))
        left = self._arriving * PAUSE
        while (left := left - rng.expovariate(1.0)) > 0:
            self._running += 1
        running = self._running
        self._load = running + (self._load - running) * 0.5 ** (PAUSE / LOAD_HALF_LIFE)
        self._sustained = running + (self._sustained - running) * 0.5 ** (
            PAUSE / SUSTAINED_HALF_LIFE
        )
        self._now += PAUSE

    def _replica(self, number: int) -> Replica:
        return Replica(True, number, f"worker-{number}", True, self._now, 0, 0, True)


def downs_per_hour(load: float, seconds: float, rule: Rule, hours: int, seed: int = 1) -> float:
    """How often a model lets a replica go that it will want again, after half an hour."""
    model = NoisyModel(load, seconds, f"{load} {seconds} {seed}", rule)
    model.run(1800 + 3600 * hours)
    return sum(at > 1800 for at in model.downs) / hours
