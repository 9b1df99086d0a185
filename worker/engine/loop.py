"""The engine's loop: arrivals, slots, one decode call, tokens, frames; then again.

Everything here runs in one thread. What is undecided it asks of pure parts: `slots.py` where a
sequence lives, `scheduler.py` what goes into a step, `sampling.py` which token comes out.
"""

import queue
import time
from collections.abc import Sequence as Drafts
from operator import attrgetter

import structlog

from shared.errors import CannotContinue, DeadlineExceeded, MeshError, WorkerFailed
from shared.protocol import Fail, Frame
from worker.engine.calibration import Calibration
from worker.engine.decoder import Decoder
from worker.engine.embedding import Embedder, EmbedJob
from worker.engine.fair_queue import FairQueue
from worker.engine.filling import Sampled, fill, fill_decoding
from worker.engine.intake import Intake, Rejected
from worker.engine.job import Job
from worker.engine.lanes import deal, overlap
from worker.engine.llama import Batch
from worker.engine.outbox import Outbox
from worker.engine.prefixes import Prefixes
from worker.engine.scheduler import Pace, Piece
from worker.engine.sequence import NoTokenLeft, Sequence
from worker.engine.slots import TOKENS_A_GAP_STEP, Placement, Slots, hole
from worker.engine.speculation.candidates import Candidate
from worker.engine.speculation.speculator import Speculator
from worker.engine.tally import Tally
from worker.engine.threads import Threads
from worker.link import CancelAttempts, EngineStats, Stop

__all__ = ("Loop",)

log = structlog.get_logger()

_IDLE_SECONDS = 0.5
_LANE_ROUNDS = 32
"""Rounds of lanes after which deadlines and drafts are looked at again."""
_slot_of = attrgetter("place")


class Loop:
    """Serves one model until told to stop."""

    def __init__(
        self,
        context: Decoder,
        embedder: Embedder,
        intake: Intake,
        outbox: Outbox,
        calibration: Calibration,
        speculator: Speculator | None,
        *,
        step_tokens: int,
        prefix_memory: int,
    ) -> None:
        self._context = context
        self._batch = Batch(step_tokens)
        self._step_tokens = step_tokens
        self._embedder = embedder
        self._intake = intake
        self._log = intake.log
        self._outbox = outbox
        self._speculator = speculator
        self._slots = Slots(context.slots)
        self._prefixes = Prefixes(context, self._slots, prefix_memory)
        self._threads = Threads(context, calibration, speculator)
        self._pace = Pace(step_tokens)
        self._waiting: FairQueue[Sequence] = FairQueue()
        self._running: list[Sequence] = []
        self._jobs: dict[int, Job | EmbedJob] = {}
        self._gap_steps = 0
        self._tally = Tally()
        self._stopped = False

    def run(self) -> None:
        """Serve until `Stop`.

        Raises:
            RuntimeError: llama.cpp failed in a way that leaves the cache in doubt; the process is
                to end, and the agent tells all who wait.
        """
        while not self._stopped:
            self._take_arrivals()
            self._expire()
            # Slots that these freed, and refusals, are not to wait for a step they have no part in.
            self._outbox.flush(self._stats)
            self._admit()
            if self._running:
                self._close_gap()
                self._step()
            if self._embedder:
                self._embed()
            self._outbox.flush(self._stats)

    # arrivals

    def _take_arrivals(self) -> None:
        idle = not (self._running or self._waiting or self._embedder)
        while True:
            try:
                arrival = (
                    self._intake.arrivals.get(timeout=_IDLE_SECONDS)
                    if idle
                    else self._intake.arrivals.get_nowait()
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
                self._stopped = True
                return

    def _begin(self, job: Job) -> None:
        if job.record is not None and (before := self._log.begin(job.record)) in self._jobs:
            self._fail(before, CannotContinue("The client reads on on another connection."))
        self._jobs[job.attempt] = job
        left = [sequence for sequence in job.sequences if sequence.over is None]
        if job.begun:
            # Somebody is in the middle of reading this.
            self._waiting.push_first(left)
        else:
            batch, now = job.request.priority == "batch", time.monotonic()
            for sequence in left:
                owner, cost = job.request.owner, job.cost(sequence)
                self._waiting.push(sequence, owner=owner, cost=cost, batch=batch, now=now)
        if job.told or len(left) < len(job.sequences) or not left:
            frames = self._outbox.frames(job.reply)
            frames += job.told
            for sequence in job.sequences:
                sequence.finish(frames)
            self._closed(job, len(job.sequences) - len(left), frames)

    def _closed(self, job: Job, count: int, frames: list[Frame]) -> None:
        """So many more of its choices are complete."""
        job.open -= count
        if job.open == 0:
            frames.append(job.end())
            self._log.end(job.record)
            del self._jobs[job.attempt]
            self._outbox.ended(job.attempt)

    def _expire(self) -> None:
        now = time.time()
        for attempt, job in list(self._jobs.items()):
            if job.request.deadline < now:
                self._fail(attempt, DeadlineExceeded("the deadline passed on the worker"))

    def _reject(self, reply: str, attempt: int, error: MeshError) -> None:
        frame = Fail(attempt, error.code, error.message, error.param, error.retry_after)
        self._outbox.frames(reply).append(frame)
        self._outbox.ended(attempt)

    def _fail(self, attempt: int, error: MeshError) -> None:
        self._reject(self._jobs[attempt].reply, attempt, error)
        self._drop(attempt, tell=False)

    def _drop(self, attempt: int, *, tell: bool = True) -> None:
        """Free all that an attempt holds."""
        job = self._jobs.pop(attempt)
        if isinstance(job, EmbedJob):
            self._embedder.remove(job)
        else:
            self._log.end(job.record)
            for sequence in [s for s in self._running if s.job is job]:
                self._retire(sequence)
            self._waiting.remove(lambda sequence: sequence.job is job)
        if tell:
            self._outbox.ended(attempt)

    # slots

    def _admit(self) -> None:
        deferred: list[Sequence] = []
        slots = len(self._slots.all)
        # Who was looked at is next whoever comes: no more than may be running together.
        while self._waiting and len(self._slots.active) < slots and len(deferred) < slots:
            sequence = self._waiting.pop(time.monotonic())
            placement = self._slots.place(sequence.tokens)
            if placement is None:
                deferred.append(sequence)
            else:
                self._occupy(sequence, placement)
        self._waiting.push_first(deferred)

    def _occupy(self, sequence: Sequence, placement: Placement) -> None:
        job = sequence.job
        reuse = self._prefixes.bring(placement, sequence.tokens)
        if self._speculator is not None:
            # What came from the store, the draft model does not have.
            known = min(reuse, placement.reuse)
            self._speculator.took(Placement(placement.slot, placement.source, known))
            sequence.drafting = self._speculator.begin(sequence.tokens, job.request.owner)
        placement = Placement(placement.slot, placement.source, reuse)
        sequence.slot = self._slots.take(placement, sequence.tokens, len(job.prompt))
        if job.start():
            self._outbox.started(job.attempt)
        reuse = min(reuse, len(job.prompt))
        job.cached = max(job.cached, reuse) if sequence is job.sequences[0] else job.cached
        self._tally.cached_tokens += reuse
        self._tally.prompt_tokens += len(job.prompt)
        self._running.append(sequence)

    def _retire(self, sequence: Sequence) -> None:
        self._running.remove(sequence)
        slot = sequence.slot
        if slot is not None:
            if self._speculator is not None:
                self._speculator.remember(
                    sequence.job.request.owner, slot.tokens, len(sequence.job.prompt)
                )
            self._slots.release(slot)
            sequence.slot = None

    def _close_gap(self) -> None:
        while (gap := hole(self._slots.active)) is not None:
            source, target = gap
            tokens = self._slots.all[source].cached + self._slots.all[target].cached
            if tokens > (self._gap_steps + 1) * TOKENS_A_GAP_STEP:
                self._gap_steps += 1
                return
            if not self._context.swap(source, target):
                raise RuntimeError(f"llama.cpp could not swap slots {source} and {target}")
            if self._speculator is not None:
                self._speculator.swapped(source, target)
            moved = next(s for s in self._running if s.slot is self._slots.all[source])
            moved.slot = self._slots.swap(source, target)
        self._gap_steps = 0

    # a step

    def _step(self) -> None:
        running = self._running
        remaining = [s.remaining for s in running]
        decoding = remaining.count(1)
        drafts: Drafts[list[int]] = ()
        pieces: Drafts[Piece] = ()
        alone = decoding == len(running)
        if alone:
            running.sort(key=_slot_of)
            if self._speculator is not None:
                drafts = self._draft(self._speculator)
        speculating = any(drafts)
        if alone and not speculating and self._context.lanes > 1 and len(running) > 1:
            self._decode_in_lanes()
            return
        if alone and not speculating:
            rows, sampled = fill_decoding(self._batch, running)
        else:
            left = [Piece(s.stretch, s.computed) for s in running]
            step = self._pace.plan(left, urgent=any(s.awaited for s in running))
            pieces = [piece for piece, whole in zip(step, left, strict=True) if whole.rows > 1]
            rows, sampled = fill(self._batch, running, [piece.rows for piece in step], drafts)
        # an idle prefill, with no row in this step, leaves it one of decoding alone
        alone = alone or rows == decoding
        self._threads.choose(prefill=not alone)
        began = time.perf_counter()
        code = self._context.decode(self._batch, rows)
        if code != 0:
            raise RuntimeError(f"llama_decode returned {code} for {rows} rows")
        seconds = time.perf_counter() - began
        if alone:
            self._threads.measured(rows, seconds)
        if not speculating:
            self._pace.measured(decoding, pieces, seconds)
        self._tally.steps += 1
        if sampled:
            before = self._tally.completion_tokens
            self._advance(sampled)
            if alone and self._speculator is not None:
                self._speculator.finished(self._tally.completion_tokens - before, seconds, rows)

    def _decode_in_lanes(self) -> None:
        """Decode all that run, a part at a time, until there is something else to do."""
        count, began = len(self._running), time.perf_counter()
        self._threads.choose(prefill=False)
        before = self._tally.completion_tokens
        lanes = deal(list(self._running), self._context.lanes)
        left = _LANE_ROUNDS * len(lanes)

        def begin(lane: Drafts[Sequence]) -> list[Sampled]:
            rows, sampled = fill_decoding(self._batch, lane)
            self._context.begin(self._batch, rows)
            return sampled

        def finish(sampled: list[Sampled]) -> bool:
            nonlocal left
            left -= 1
            self._context.finish()
            self._advance(sampled)
            self._outbox.flush(self._stats)
            return (
                left > 0
                and len(self._running) == count
                and self._intake.arrivals.empty()
                and not self._embedder
            )

        rounds = overlap(lanes, begin, finish) / len(lanes)
        self._tally.steps += round(rounds)
        seconds = (time.perf_counter() - began) / rounds
        self._pace.measured(count, (), seconds)
        if self._speculator is not None:
            tokens = self._tally.completion_tokens - before
            self._speculator.finished(round(tokens / rounds), seconds, count)

    def _draft(self, speculator: Speculator) -> Drafts[list[int]]:
        candidates = []
        for sequence in self._running:
            slot = sequence.slot
            if slot is None or sequence.drafting is None:
                return ()
            left = min(sequence.limit - sequence.count, self._context.context - len(slot.tokens))
            candidates.append(
                Candidate(
                    sequence.drafting, slot, max(0, left - 1), sequence.guesser, sequence.allowed
                )
            )
        return speculator.propose(candidates, time.perf_counter)

    def _advance(self, sampled: list[Sampled]) -> None:
        logits = self._context.logits(sum(1 + len(entry.draft) for entry in sampled))
        now = time.monotonic()
        row = 0
        for index, (sequence, draft, end) in enumerate(sampled):
            rows = logits[row : row + 1 + len(draft)]
            row += 1 + len(draft)
            job = sequence.job
            if job.attempt not in self._jobs:
                continue  # failed by a sibling in this very step
            if not job.first_token:
                job.first_token = now
            frames = self._outbox.frames(job.reply)
            try:
                advance = sequence.advance(rows, draft, frames)
            except NoTokenLeft:
                self._fail(job.attempt, WorkerFailed("constraint and biases forbid every token"))
                continue
            except MeshError as error:
                self._fail(job.attempt, error)
                continue
            self._tally.completion_tokens += len(advance.tokens)
            slot = sequence.slot
            assert slot is not None  # noqa: S101
            slot.tokens += advance.tokens
            if job.record is not None:
                job.record.take(sequence.choice, advance.tokens, sequence.over)
            slot.cached = end + advance.rows - 1
            if advance.rows < len(rows):
                self._context.forget(slot.index, slot.cached)
            if sequence.drafting is not None and self._speculator is not None:
                sequence.drafting.lookup.extend(advance.tokens)
                if draft:
                    drafted = self._speculator.verified(
                        index, advance.rows - 1, advance.complete, slot.cached
                    )
                    job.drafted += drafted
                    job.accepted += min(drafted, advance.rows - 1)
            if not advance.complete:
                continue
            self._retire(sequence)
            self._closed(job, 1, frames)

    def _embed(self) -> None:
        if (begun := self._embedder.begin_next()) is not None:
            self._outbox.started(begun.attempt)
        done = self._embedder.step(self._pace.budget(len(self._running)))
        if done is not None:
            self._outbox.frames(done.reply).append(done.result())
            self._tally.prompt_tokens += sum(map(len, done.inputs))
            del self._jobs[done.attempt]
            self._outbox.ended(done.attempt)

    def _stats(self) -> EngineStats:
        held = sum(s.slot.cached for s in self._running if s.slot is not None)
        return self._tally.stats(
            running=len(self._running),
            waiting=len(self._waiting) + len(self._embedder),
            kv_used=held / (self._context.slots * self._context.context),
            speculation=self._speculator.counters if self._speculator is not None else None,
        )
