"""Where one request is asked: which worker's door, or the queue group, and where next.

The queue group takes whoever has a free slot, known or not, so that it is asked only while nobody
has to be kept out: first where one worker is known, or all are thought to be full and one may have
become free since; last where everybody known has refused.
"""

from functools import lru_cache
from typing import Literal, NamedTuple

from router.breakers import Breakers
from router.conversation import conversation_key, has_begun, rough_tokens
from router.fleet import Fleet
from shared import subjects
from shared.protocol import Accepted, Busy, Generate, Request
from shared.routing import Choice, Pool, Reason

__all__ = ("STALE_INTEREST", "Door", "Search", "Why")

GROUP_TRIES = 3
MOST_PASSES = 2
MOST_REFUSALS = 8
"""Full workers that are asked: the emptiest come first, and a fleet that has no room is not to have
each request of it knock at every door."""
STALE_INTEREST = 0.0015
"""Seconds for which a new subscription may be unknown to another NATS node."""

Why = Reason | Literal["queue_group", "had_it"]
"""`had_it`: a client goes on reading an answer that the worker has, or had."""

_group = lru_cache(maxsize=4096)(subjects.infer)
_door = lru_cache(maxsize=16_384)(subjects.infer_direct)


class Door(NamedTuple):
    """A subject to ask on."""

    subject: str
    worker: str
    """Whose door it is; empty: the group's."""


class Search:
    """The way of one request through the workers of its model."""

    __slots__ = (
        "_begun",
        "_breakers",
        "_cache_key",
        "_fleet",
        "_group_tries",
        "_grown",
        "_hoped",
        "_key",
        "_left",
        "_model",
        "_passes",
        "_pool",
        "_prefer",
        "_probing",
        "_refused",
        "_request",
        "_slots",
        "_taken",
        "_tokens",
        "_wary",
        "barred",
        "busy",
        "candidates",
        "reason",
    )

    def __init__(self, fleet: Fleet, breakers: Breakers, request: Request, cache_key: str) -> None:
        self._fleet = fleet
        self._breakers = breakers
        self._model = request.model
        # Only looked at where there is a choice: most meshes have one worker a model.
        self._request: Request | None = request
        self._cache_key = cache_key
        self._key: int | None = None
        self._tokens = 0
        self._grown = 0
        self._begun = False
        self._hoped = False
        self._passes = 0
        self._slots = request.n if isinstance(request, Generate) else 1
        reading = request.reading if isinstance(request, Generate) else None
        self._prefer = reading.worker if reading is not None else ""
        self._refused: set[str] = set()
        self._left = ""
        self._wary = False
        self._group_tries = 0
        self._pool: Pool | None = None
        self._taken = ""
        self._probing = False
        """Whether this is the one try of a worker that has failed again and again."""
        self.barred = 0
        """Candidates that were left out of the last choice because they fail again and again."""
        self.busy: list[float] = []
        """Seconds after which those who are full want to be asked again."""
        self.reason: Why | None = None
        """Why it was asked where it was asked last; None: nowhere yet."""
        self.candidates = 0

    def next(self, draw: int) -> Door | None:
        """The door to ask at now; None: there is none left."""
        self.release()
        pool = self._fleet.pool(self._model)
        if pool is None:
            return self._ask_group() if self._may_ask_group else None
        if len(self.busy) >= MOST_REFUSALS:
            return None
        candidates = self.candidates = pool.candidates
        barred = self._bar(pool)
        worker, self._prefer = self._prefer, ""
        if worker and worker in pool.eligible and worker not in barred:
            self.reason = "had_it"
            self.take(worker)
            return Door(_door(self._model, worker), worker)
        open_to_all = pool.all_eligible and not self._wary and not barred
        if open_to_all and not self._group_tries and (candidates == 1 or not pool.free):
            return self._ask_group()
        choice = self._choose(pool, draw, self._left, barred)
        if choice is None and barred:
            # Better one that may fail than none.
            self.barred = 0
            choice = self._choose(pool, draw, self._left)
        if choice is None and self._left and not self.busy:
            # Nobody else is there.
            self._left = ""
            choice = self._choose(pool, draw)
        if choice is not None:
            self.reason = choice.reason
            self._hoped = candidates > 1 and pool.has_room(choice.worker)
            self.take(choice.worker)
            return Door(_door(self._model, choice.worker), choice.worker)
        if open_to_all and not self.busy and self._may_ask_group:
            return self._ask_group()
        return None

    def elsewhere(self, worker: str, draw: int) -> Door | None:
        """The door of another than this worker that is thought to have a free slot."""
        self.release()
        pool = self._fleet.pool(self._model)
        if pool is None:
            return None
        choice = self._choose(pool, draw, worker, self._bar(pool))
        if choice is None or not pool.has_room(choice.worker):
            return None
        self.candidates, self.reason = pool.candidates, choice.reason
        self.take(choice.worker)
        return Door(_door(self._model, choice.worker), choice.worker)

    def others(self, worker: str) -> bool:
        """Whether another than this worker serves the model near enough."""
        pool = self._fleet.pool(self._model)
        return pool is not None and any(name != worker for name in pool.eligible)

    def _bar(self, pool: Pool) -> frozenset[str]:
        barred = self._breakers.barred()
        self.barred = sum(name in pool for name in barred)
        return barred if self.barred else frozenset()

    def _choose(
        self, pool: Pool, draw: int, left: str = "", barred: frozenset[str] = frozenset()
    ) -> Choice | None:
        if pool.candidates > 1 and self._request is not None:
            request, self._request = self._request, None
            self._key = conversation_key(request, self._cache_key)
            self._tokens = rough_tokens(request) if pool.contexts_differ else 0
            self._begun = has_begun(request)
        refused = self._refused | {left} if left else self._refused
        if barred:
            refused = refused | barred
        tokens = self._tokens + self._grown if self._tokens else 0
        return pool.choose(self._key, tokens=tokens, refused=refused, draw=draw, begun=self._begun)

    @property
    def _may_ask_group(self) -> bool:
        # It may still have one that hangs, and has lost this very request, for a member.
        return self._group_tries < GROUP_TRIES and not self._wary

    def _ask_group(self) -> Door:
        self._group_tries += 1
        self._hoped = False
        self.reason = "queue_group"
        return Door(_group(self._model), "")

    def passes_on(self, accepted: Accepted) -> bool:
        """Whether to leave a worker that was thought to have a free slot, and has a queue.

        Others may have a free one. Their beats come twice a second, and what other routers place
        is known only then; so this happens, and only so often that it ends.
        """
        if not accepted.position or not self._hoped or self._passes >= MOST_PASSES:
            return False
        self._passes += 1
        self.release()
        if (pool := self._fleet.pool(self._model)) is not None:
            pool.full(accepted.worker)
        return True

    def take(self, worker: str) -> None:
        """Count the request as this worker's, until `release`."""
        if self._taken:
            return
        pool = self._fleet.pool(self._model)
        if pool is not None:
            pool.placed(worker, self._slots)
            self._pool, self._taken = pool, worker
            self._probing = self._breakers.try_once(worker)

    def release(self) -> None:
        """It is no worker's any more."""
        if self._pool is not None:
            self._pool.ended(self._taken, self._slots)
            if self._probing:
                self._probing = False
                self._breakers.tried(self._taken)
            self._pool, self._taken = None, ""

    def refuse(self, worker: str) -> None:
        """Do not ask this worker again."""
        self._refused.add(worker)

    def refused(self, busy: Busy) -> None:
        """A worker has said that it does not take it."""
        self._refused.add(busy.worker)
        if busy.reason in ("full", "late"):
            self.busy.append(busy.retry_after)
        # One that is late for this request may have time enough for others.
        if busy.reason == "full" and (pool := self._fleet.pool(self._model)) is not None:
            self.release()
            pool.full(busy.worker)

    def leave(self, worker: str, grown: int) -> None:
        """The request was lost: it is asked anew, here only if nobody else is there.

        Args:
            worker: who lost it; empty: nobody to be kept away from.
            grown: tokens by which it is longer than it was at first.
        """
        self.begin_anew()
        self._left = worker
        self._wary = self._wary or bool(worker)
        self._grown = grown

    def begin_anew(self) -> None:
        """What has been learnt of the workers counts no more."""
        self._left = ""
        self._group_tries = 0
        self._refused.clear()
        self.busy.clear()
