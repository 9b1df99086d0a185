"""The attempts that an engine has, from their arrival to their end."""

import queue
import time

from shared.errors import CannotContinue, DeadlineExceeded, MeshError
from shared.protocol import Fail, Frame
from worker.engine.embedding import Embedder, EmbedJob
from worker.engine.fair_queue import FairQueue
from worker.engine.intake import Inbox, Rejected
from worker.engine.job import Job
from worker.engine.outbox import Outbox
from worker.engine.running import Running
from worker.engine.sequence import Sequence
from worker.link import CancelAttempts, Stop

__all__ = ("Jobs",)

_IDLE_SECONDS = 0.5


class Jobs:
    """Whatever ends one of them, it is told once and what it held is free."""

    def __init__(self, inbox: Inbox, outbox: Outbox, embedder: Embedder, running: Running) -> None:
        self.waiting: FairQueue[Sequence] = FairQueue()
        """Sequences without a slot."""
        self.stopped = False
        """The engine was told to end."""
        self._arrivals = inbox.arrivals
        self._log = inbox.log
        self._outbox = outbox
        self._embedder = embedder
        self._running = running
        self._jobs: dict[int, Job | EmbedJob] = {}

    def __contains__(self, attempt: int) -> bool:
        return attempt in self._jobs

    def take_arrivals(self) -> None:
        """Take all that has come; wait for it a while where nothing else is to be done."""
        idle = not (self._running or self.waiting or self._embedder)
        while True:
            try:
                arrival = (
                    self._arrivals.get(timeout=_IDLE_SECONDS)
                    if idle
                    else self._arrivals.get_nowait()
                )
            except queue.Empty:
                return
            idle = False
            if isinstance(arrival, Job):
                self._begin(arrival)
            elif isinstance(arrival, EmbedJob):
                self._jobs[arrival.attempt] = arrival
                self._embedder.add(arrival)
            elif isinstance(arrival, Rejected):
                self._reject(arrival.reply, arrival.attempt, arrival.error)
            elif isinstance(arrival, CancelAttempts):
                for attempt in arrival.attempts:
                    if attempt in self._jobs:
                        self._drop(attempt)
                    # else it has ended already, its frames crossed the cancellation
            elif isinstance(arrival, Stop):
                self.stopped = True
                return

    def expire(self) -> None:
        """Fail those whose deadline has passed."""
        now = time.time()
        for attempt, job in list(self._jobs.items()):
            if job.request.deadline < now:
                self.fail(attempt, DeadlineExceeded("the deadline passed on the worker"))

    def fail(self, attempt: int, error: MeshError) -> None:
        """End an attempt with an error; it must be here."""
        self._reject(self._jobs[attempt].reply, attempt, error)
        self._drop(attempt, tell=False)

    def completed(self, job: Job, count: int, frames: list[Frame]) -> None:
        """So many more of a job's choices are complete; after the last one the job is over."""
        job.open -= count
        if job.open == 0:
            frames.append(job.end())
            self._log.end(job.record)
            del self._jobs[job.attempt]
            self._outbox.ended(job.attempt)

    def embedded(self, job: EmbedJob) -> None:
        """All inputs of a job are computed."""
        self._outbox.frames(job.reply).append(job.result())
        del self._jobs[job.attempt]
        self._outbox.ended(job.attempt)

    def _begin(self, job: Job) -> None:
        if job.record is not None and (before := self._log.begin(job.record)) in self._jobs:
            self.fail(before, CannotContinue("The client reads on on another connection."))
        self._jobs[job.attempt] = job
        left = [sequence for sequence in job.sequences if sequence.over is None]
        if job.begun:
            # Somebody is in the middle of reading this.
            self.waiting.push_first(left)
        else:
            batch, now = job.request.priority == "batch", time.monotonic()
            for sequence in left:
                owner, cost = job.request.owner, job.cost(sequence)
                self.waiting.push(sequence, owner=owner, cost=cost, batch=batch, now=now)
        if job.told or len(left) < len(job.sequences) or not left:
            frames = self._outbox.frames(job.reply)
            frames += job.told
            for sequence in job.sequences:
                sequence.finish(frames)
            self.completed(job, len(job.sequences) - len(left), frames)

    def _reject(self, reply: str, attempt: int, error: MeshError) -> None:
        frame = Fail(attempt, error.code, error.message, error.param, error.retry_after)
        self._outbox.frames(reply).append(frame)
        self._outbox.ended(attempt)

    def _drop(self, attempt: int, *, tell: bool = True) -> None:
        """Free all that an attempt holds."""
        job = self._jobs.pop(attempt)
        if isinstance(job, EmbedJob):
            self._embedder.remove(job)
        else:
            self._log.end(job.record)
            for sequence in [s for s in self._running.sequences if s.job is job]:
                self._running.retire(sequence)
            self.waiting.remove(lambda sequence: sequence.job is job)
        if tell:
            self._outbox.ended(attempt)
