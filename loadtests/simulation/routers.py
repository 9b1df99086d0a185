"""Made-up routers: the real ledger, distances, pools and choice, on made-up wires.

`mesh` routes as `shared.routing` says. To compare: `round_robin` and `random` over the same
workers, and `oracle`, which knows at every moment what every worker does, what it has cached, and
how long it would take.
"""

import random
from collections import deque
from collections.abc import Callable, Mapping
from typing import Literal

from loadtests.simulation.clock import Clock
from loadtests.simulation.hosts import Host, Request
from shared.distance import Distances
from shared.hash_ring import hash_key
from shared.ledger import DemandLedger
from shared.routing import Pool

__all__ = ("Policy", "Router")

Policy = Literal["mesh", "round_robin", "random", "oracle"]


class Router:
    """One replica of the router."""

    def __init__(
        self,
        name: str,
        *,
        clock: Clock,
        hosts: Mapping[str, Host],
        policy: Policy,
        slots: int,
        patience: float,
        rng: random.Random,
    ) -> None:
        self.ledger = DemandLedger(name)
        self.pools: dict[str, Pool] = {}
        self.held: dict[str, deque[Request]] = {}
        self.waits: Callable[[str], None] = lambda model: None
        """Hears that a request waits for a model that nobody serves."""
        self.gave_up: Callable[[Request], None] = lambda request: None
        self._clock = clock
        self._hosts = hosts
        self._policy = policy
        self._slots = slots
        self._patience = patience
        self._rng = rng
        self._distances = Distances()
        self._delays: dict[str, float] = {}
        self._turns: dict[str, int] = {}

    def arrive(self, request: Request) -> None:
        """A client asks."""
        request.router = self
        self.ledger.requested(request.model, self._clock.now)
        self.place(request)

    def place(self, request: Request) -> None:
        """Send a request to a worker, or hold it."""
        pool = self.pools.get(request.model)
        chosen = self._choose(pool, request) if pool else None
        if pool is None or chosen is None:
            self._hold(request)
        else:
            self._send(pool, request, chosen)

    def ended(self, request: Request, host: str) -> None:
        """Its last token has come, or its worker is lost: it is counted there no more."""
        pool = self.pools.get(request.model)
        if pool is not None:
            pool.ended(host)
        self.ledger.ended(request.model, self._clock.now)

    def ready(self, model: str, host: Host) -> None:
        """A beat tells that a worker serves a model now."""
        if host.name not in self._delays:
            self._delays[host.name] = self._rng.uniform(0.0005, 0.015)
            self._distances.observe(host.name, 2 * self._delays[host.name])
        pool = self.pools.setdefault(model, Pool(self._distances))
        pool.update(host.name, slots=self._slots, load=host.models[model].busy)
        self.retry(model)

    def not_ready(self, model: str, host: str) -> None:
        """It does no more."""
        pool = self.pools.get(model)
        if pool is not None:
            pool.remove(host)

    def told(self, model: str, host: Host) -> None:
        """A beat tells how busy it is."""
        pool = self.pools.get(model)
        loaded = host.models.get(model)
        if pool is not None and loaded is not None and host.name in pool:
            pool.update(host.name, slots=self._slots, load=loaded.busy)

    def retry(self, model: str) -> None:
        """Place what is held, as far as somebody takes it."""
        waiting = self.held.get(model)
        pool = self.pools.get(model)
        while waiting and pool:
            request = waiting[0]
            if not request.given_up:
                request.refused.clear()
                chosen = self._choose(pool, request)
                if chosen is None:
                    return
                request.held = False
                self.ledger.waits_no_more(model, self._clock.now)
                self._send(pool, request, chosen)
            waiting.popleft()
        if not waiting:
            self.held.pop(model, None)

    def _send(self, pool: Pool, request: Request, chosen: str) -> None:
        pool.placed(chosen)
        self.ledger.began(request.model, self._clock.now)
        self._clock.after(self._delays[chosen], self._deliver, request, chosen)

    def _hold(self, request: Request) -> None:
        model = request.model
        now = self._clock.now
        if now - request.since >= self._patience:
            self._give_up(request)
            return
        request.held = True
        self.held.setdefault(model, deque()).append(request)
        self.ledger.waits(model, now)
        self.waits(model)
        left = request.since + self._patience - now
        self._clock.after(left, self._out_of_time, request)

    def _out_of_time(self, request: Request) -> None:
        if request.held and not request.given_up:
            self.ledger.waits_no_more(request.model, self._clock.now)
            self._give_up(request)

    def _give_up(self, request: Request) -> None:
        if not request.given_up:
            request.given_up = True
            self.gave_up(request)

    def _deliver(self, request: Request, chosen: str) -> None:
        host = self._hosts.get(chosen)
        if host is not None and host.take(request):
            return
        self.ended(request, chosen)
        pool = self.pools.get(request.model)
        if pool is not None:
            pool.full(chosen)
        request.refused.append(chosen)
        self.place(request)

    def _choose(self, pool: Pool, request: Request) -> str | None:
        if self._policy == "mesh":
            key = hash_key(b"%d" % request.conversation.number)
            choice = pool.choose(key, refused=request.refused, draw=self._rng.getrandbits(32))
            return None if choice is None else choice.worker
        names = [name for name in pool.eligible if name not in request.refused]
        if not names:
            return None
        if self._policy == "random":
            return self._rng.choice(names)
        if self._policy == "round_robin":
            turn = self._turns.get(request.model, self._rng.randrange(len(names)))
            self._turns[request.model] = turn + 1
            return names[turn % len(names)]
        return min(names, key=lambda name: self._wait(name, request))

    def _wait(self, name: str, request: Request) -> float:
        """Seconds to the first token, as somebody would know who knows everything."""
        host = self._hosts.get(name)
        if host is None or request.model not in host.models:
            return float("inf")
        free = host.slots_free(request.model)
        queue = max(0, 1 - free) * 3.0 / self._slots
        return queue + host.prefill(request) + 2 * self._delays[name]
