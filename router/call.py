"""One request: what becomes of it once a worker has it, and when that is lost.

A call is driven by what arrives, not by a task. `router.asking` finds the worker.

    asking --Accepted--> running --End, Fail, late, left--> over
     |  ^ ^                 |
     |  | +-----------------+ lost, silent, a frame missing: asked again with the tokens that came
     |  | 503, Busy: where `router.search` says next
     +--+
     |  ^
     |  | nobody serves the model yet: held (`router.waiting`) until somebody does
     +--+

`router.handover` moves a running attempt whose worker wants to be rid of it.
"""

import random
import time

import msgspec

from router.asking import Asking
from router.desk import Desk, Loss, Sink
from router.handover import Handover
from router.retrying import pause
from router.search import Search
from router.secret import attempt_number
from shared.errors import DeadlineExceeded, MeshError, Unavailable, WorkerFailed, error_from_code
from shared.protocol import (
    Accepted,
    Busy,
    Delta,
    EmbedResult,
    End,
    Fail,
    Frame,
    Handback,
    Request,
)

__all__ = ("Call",)

SUSPICION = 2.0
"""Seconds within which a stream must go on after the connection to NATS was interrupted."""
PATIENCE = 6
"""Times the stall timeout after which a stream is given up although nobody else could go on."""


class Call(Asking):
    """One request and its current attempt."""

    __slots__ = (
        "_cache_key",
        "_handover",
        "_losses",
        "_part",
        "_proved",
        "_resumed",
        "_sink",
        "accepted_at",
        "position",
    )

    def __init__(
        self, desk: Desk, request: Request, sink: Sink, part: int, cache_key: str = ""
    ) -> None:
        super().__init__(desk, request, cache_key)
        self._sink = sink
        self._part = part
        self._cache_key = cache_key
        self._losses = 0
        """Attempts that were lost, of which the settings allow so many."""
        self._resumed = 0
        """Attempts that went on behind tokens of others."""
        self._handover: Handover | None = None
        self._proved = 0
        """The attempt that was last told to have worked."""
        self.accepted_at = 0.0
        """When a worker took it (monotonic); 0: none has said so yet."""
        self.position = 0
        """Its place in the worker's queue when it was taken; 0: it ran at once."""

    # Running

    def receive(self, frame: Frame) -> None:
        """Take one frame of the current attempt."""
        if type(frame) is not Delta and self._misnamed(frame):
            return
        verdict = self._assembly.check(frame)
        if verdict == "take":
            if type(frame) is Delta:
                self._sink.frame(self._part, frame)
            else:
                self._control(frame)
        elif verdict == "gap":
            self._lose("gap", WorkerFailed("Part of the worker's answer was lost on the way."))

    def _misnamed(self, frame: Frame) -> bool:
        """Whether a worker that was asked by name answers in another's: he would bear the blame."""
        if not isinstance(frame, Accepted | Busy) or self._target in ("", frame.worker):
            return False
        self._desk.rejects.add("misnamed", worker=self._target, named=frame.worker)
        return True

    def _control(self, frame: Frame) -> None:
        if isinstance(frame, Accepted):
            if self._search.passes_on(frame):
                self._ask_another()
                return
            self._accepted(frame)
            if self._body:
                self._desk.spawn(self._send_body())
        elif isinstance(frame, Busy):
            self._busy_worker(frame)
        elif isinstance(frame, Fail):
            error = error_from_code(
                frame.code, frame.message, param=frame.param, retry_after=frame.retry_after
            )
            if frame.lost or self._may_work_elsewhere(error):
                self._lose("failed", error, self._assembly.worker)
            else:
                self._fail(error)
        elif isinstance(frame, Handback):
            self._hand_over()
        else:
            if isinstance(frame, End | EmbedResult):
                self._works()
                self._desk.demand.generated(self._request.model, frame.usage.completion)
                self._close()
                if self._resumed and isinstance(frame, End):
                    timings = msgspec.structs.replace(frame.timings, resumed=self._resumed)
                    frame = msgspec.structs.replace(frame, timings=timings)
            self._sink.frame(self._part, frame)

    def _may_work_elsewhere(self, error: MeshError) -> bool:
        """Whether the worker is at fault, nothing has come, and there is another one."""
        if error.status < 500 or isinstance(error, DeadlineExceeded) or self._assembly.count:
            return False
        return self._search.others(self._assembly.worker)

    def _works(self) -> None:
        """The current attempt's worker does what it should."""
        if self._proved != self._request.attempt:
            self._proved = self._request.attempt
            self._desk.breakers.worked(self._assembly.worker, self._asked_at)

    def _accepted(self, frame: Accepted) -> None:
        self.accepted_at = time.monotonic()
        self.position = frame.position
        self._began = True
        self._desk.demand.began(self._request.model)
        # The group's choice is known only now.
        self._search.take(frame.worker)

    # Ending

    def leave(self) -> None:
        """Nobody waits for the answer any more: free the worker."""
        if not self.over:
            self._abandon()
            self._close()

    def tick(self, now: float, wall: float) -> None:
        """End what takes too long."""
        if self.over:
            return
        settings = self._desk.settings
        if wall > self._request.deadline:
            self._give_up(DeadlineExceeded("The request's time is up."))
        elif self._held or not self._desk.bus.connected:
            return
        elif not self._heard:
            if self._asked_at and now - self._asked_at > settings.accept_timeout:
                self._unanswered(now)
        else:
            self._watch(now)

    def _unanswered(self, now: float) -> None:
        """Nobody has said that the request was taken."""
        if self._target:
            self._desk.breakers.failed(self._target, self._asked_at)
        self._search.refuse(self._target)
        if self._assembly.count or self._desk.retries.take(now):
            self._ask_another()
        else:
            self._give_up(_spent(WorkerFailed("No worker has taken the request in time.")))

    def _watch(self, now: float) -> None:
        """See whether tokens still come."""
        fresh = self._fresh
        if fresh:
            self._works()
        quiet = self._silence.seconds(now, fresh)
        worker, stall = self._assembly.worker, self._desk.settings.stall_timeout
        error = WorkerFailed("The worker fell silent before the answer was complete.")
        if self._silence.suspect:
            if quiet > SUSPICION:
                self._lose("interrupted", error)
        elif quiet > PATIENCE * stall or (quiet > stall and self._search.others(worker)):
            self._lose("stalled", error, worker)

    # Going on after a loss

    def _lose(self, reason: Loss, error: MeshError, worker: str = "") -> None:
        """The attempt is lost, maybe by a worker to be kept away from: go on on another one."""
        if self.over:
            return
        if self._losses >= self._desk.settings.resumes:
            self._give_up(error)
            return
        if worker:
            self._desk.breakers.failed(worker, self._asked_at)
        if not self._assembly.count and not self._desk.retries.take(time.monotonic()):
            self._give_up(_spent(error))
            return
        self._losses += 1
        self._loss = error
        self._count(reason)
        self._search.leave(worker, self._assembly.count)
        self._ask_another(pause=pause(self._losses, random.random()))

    def _count(self, reason: Loss) -> None:
        self._resumed += self._assembly.count > 0
        self._sink.resumed(reason)

    def _hand_over(self) -> None:
        """The worker offers the attempt: take it elsewhere if there is a free slot."""
        if self._handover is not None or not self._desk.settings.resumes:
            return
        request = self._request
        search = Search(self._desk.fleet, self._desk.breakers, request, self._cache_key)
        door = search.elsewhere(self._assembly.worker, request.attempt)
        if door is not None:
            request = msgspec.structs.replace(self._resuming(request), attempt=attempt_number())
            self._handover = Handover(self._desk, self, self._request.attempt, request, search)
            self._desk.spawn(self._handover.begin(door))

    def moved(self, accepted: Accepted, search: Search, body: bytes) -> None:
        """Another worker goes on; the first one is still at it."""
        self._handover = None
        self._desk.cancel(self._assembly.worker, self._request.attempt)
        self._count("handed_back")
        self._search.release()
        self._search = search
        self._target = accepted.worker
        self._begin_attempt(accepted.attempt)
        self._asked_at = time.monotonic()
        self._desk.inbox.register(accepted.attempt, self)
        self._body = body
        self.receive(accepted)

    def stays(self) -> None:
        """Nobody else has taken it: its frames come here again."""
        self._handover = None
        self._desk.inbox.register(self._request.attempt, self)

    def interrupted(self, now: float) -> None:
        """The connection was away: what was asked may be lost, and so may any frame."""
        if self._held:
            return
        if self._fresh:
            self._silence.interrupted(now, self._fresh)
        else:
            self._search.begin_anew()
            self._ask_another()

    def cut_off(self) -> None:
        """NATS is away for longer than answers wait for it."""
        self._fail(Unavailable("The mesh is not reachable now: NATS is away.", retry_after=2))

    def lost(self, worker: str, why: str) -> None:
        """A worker is gone."""
        if self._assembly.worker == worker:
            error = WorkerFailed(f"The worker {why} before the answer was complete.")
            self._lose("lost", error, worker)
        elif self._target == worker and not self._heard:
            self._search.refuse(worker)
            self._ask_another()

    def unheard(self, worker: str) -> None:
        """A worker is not connected: go on elsewhere if that can be, else see if it comes back."""
        if self._assembly.worker == worker and self._search.others(worker):
            self.lost(worker, "lost its connection")

    def broken(self) -> None:
        """A frame could not be rendered."""
        self._give_up(MeshError("The answer could not be rendered."))

    def _give_up(self, error: MeshError) -> None:
        self._abandon()
        self._fail(error)

    def _fail(self, error: MeshError) -> None:
        if not self.over:
            self._close()
            self._sink.fail(error)

    def _close(self) -> None:
        self.over = True
        self._body = b""
        if self._handover is not None:
            self._handover.stop()
            self._handover = None
        self._stop_waiting()
        self._search.release()
        self._stop_running()
        if self._desk.waiting:
            self._desk.waiting.look((self._request.model,))
        self._desk.inbox.forget(self._request.attempt, self)


def _spent(error: MeshError) -> MeshError:
    """The error of a request that is not tried again."""
    return type(error)(
        f"{error.message} It was not tried again: too many requests of this router have failed "
        "lately."
    )
