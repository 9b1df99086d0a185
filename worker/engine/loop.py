"""The engine's loop: arrivals, slots, one decode call, tokens, frames; then again.

Everything here runs in one thread. What is undecided it asks of others: `jobs.py` what there is to
do, `running.py` where a sequence lives, `scheduler.py` what goes into a step, `sampling.py` which
token comes out.
"""

import threading
import time
from collections.abc import Sequence as Drafts

from shared.errors import MeshError, WorkerFailed
from worker.engine.batch import Batch
from worker.engine.calibration import Calibration
from worker.engine.decoder import Decoder
from worker.engine.embedding import Embedder
from worker.engine.filling import Sampled, fill, fill_decoding
from worker.engine.intake import Inbox
from worker.engine.jobs import Jobs
from worker.engine.lanes import deal, overlap
from worker.engine.llama import INTERRUPTED
from worker.engine.outbox import Outbox
from worker.engine.running import Running
from worker.engine.scheduler import Pace, Piece
from worker.engine.sequence import NoTokenLeft, Sequence
from worker.engine.speculation.candidates import Candidate
from worker.engine.speculation.speculator import Speculator
from worker.engine.tally import Tally
from worker.engine.threads import Threads
from worker.engine.tiles import Tiles
from worker.link import CancelAttempts, EngineStats

__all__ = ("Loop",)

_LANE_ROUNDS = 32
"""Rounds of lanes after which deadlines and drafts are looked at again."""
_LONGEST_TILE = 2.0
"""Seconds that a tile of a prompt may take: all others wait for it. Where it takes longer, as with
a large model on few cores, prompts are computed in smaller pieces only. Far from what usual models
take, so that workers that share a model seldom differ in it."""


class Loop:
    """Serves one model until told to stop, or until the ring that it is the head of is over."""

    def __init__(
        self,
        context: Decoder,
        embedder: Embedder,
        inbox: Inbox,
        outbox: Outbox,
        calibration: Calibration,
        speculator: Speculator | None,
        *,
        step_tokens: int,
        prefix_memory: int,
    ) -> None:
        self._context = context
        self._batch = Batch(step_tokens)
        self._embedder = embedder
        self._arrivals = inbox.arrivals
        self._outbox = outbox
        self._speculator = speculator
        self._tally = Tally()
        tile = context.tile
        seconds = tile * calibration.prefill_row_seconds
        wide = tile <= min(context.together, step_tokens) and seconds <= _LONGEST_TILE
        self._running = Running(
            context,
            speculator,
            outbox,
            self._tally,
            prefix_memory=prefix_memory,
            tiles=Tiles(tile if wide else 0),
        )
        self._jobs = Jobs(inbox, outbox, embedder, self._running)
        self._threads = Threads(context, calibration, speculator)
        self._pace = Pace(step_tokens, calibration.seconds, tile)
        self._prefilling: frozenset[int] = frozenset()
        """Attempts whose prompts are computed in the step that runs."""
        self._interrupting = threading.Lock()
        """So that what is broken off is that step and not the next."""
        inbox.on_cancel = self._interrupt

    def run(self) -> None:
        """Serve until `Stop`.

        Raises:
            RingBroken: the ring is over, and with it all that ran.
            RuntimeError: llama.cpp failed in a way that leaves the cache in doubt; the process is
                to end, and the agent tells all who wait.
        """
        jobs, running = self._jobs, self._running
        while not jobs.stopped:
            jobs.take_arrivals()
            jobs.expire()
            # Slots that these freed, and refusals, are not to wait for a step they have no part in.
            self._outbox.flush(self._stats)
            running.admit(jobs.waiting)
            if running:
                running.close_gap()
                self._step()
            if self._embedder:
                self._embed()
            self._outbox.flush(self._stats)

    def close(self) -> None:
        """Free the batch; nothing is to be run any more."""
        self._batch.close()

    def _step(self) -> None:
        running = self._running.sequences
        decoding = sum(s.remaining == 1 for s in running)
        drafts: Drafts[list[int]] = ()
        held: list[tuple[Sequence, int]] = []
        pieces: Drafts[Piece] = ()
        alone = decoding == len(running)
        if alone:
            self._running.sort()
            if self._speculator is not None:
                drafts = self._draft(self._speculator)
        speculating = any(drafts)
        if alone and not speculating and self._context.lanes > 1 and len(running) > 1:
            self._decode_in_lanes()
            return
        if alone and not speculating:
            rows, sampled = fill_decoding(self._batch, running)
        else:
            left = [s.left for s in running]
            step = self._pace.plan(left, urgent=any(s.awaited for s in running))
            both = list(zip(step, left, strict=True))
            pieces = [piece for piece, whole in both if whole.rows > 1 and piece.rows]
            decoding = sum(piece.rows == 1 == whole.rows for piece, whole in both)
            alone = not pieces
            held = [(s, s.computed) for s in running]
            self._prefilling = frozenset(
                s.job.attempt
                for s, (piece, whole) in zip(running, both, strict=True)
                if whole.rows > 1 and piece.rows
            )
            counts = [piece.rows for piece in step]
            rows, sampled = fill(self._batch, running, counts, drafts)
        self._threads.choose(prefill=not alone)
        began = time.perf_counter()
        code = self._context.decode(self._batch, rows)
        if self._prefilling:
            with self._interrupting:
                self._prefilling = frozenset()
                self._context.clear_interrupt()
        if code == INTERRUPTED:
            self._go_back(held)
            return
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

    def _interrupt(self, cancelled: CancelAttempts) -> None:
        """Break off a step that computes prompts only for those who have left.

        What else is in it is computed once more: a row of each stream, against up to 0.4 s in which
        all of them wait for what nobody wants. Called in the intake's thread.
        """
        with self._interrupting:
            prefilling = self._prefilling
            if prefilling and prefilling.issubset(cancelled.attempts):
                self._context.interrupt()

    def _go_back(self, held: Drafts[tuple[Sequence, int]]) -> None:
        """A step was broken off: these have so many tokens in the cache as before."""
        for sequence, computed in held:
            slot = sequence.slot
            if slot is not None and slot.cached != computed:
                slot.cached = computed
                self._context.forget(slot.index, computed)

    def _decode_in_lanes(self) -> None:
        """Decode all that run, a part at a time, until there is something else to do."""
        count, began = len(self._running), time.perf_counter()
        self._threads.choose(prefill=False)
        before = self._tally.completion_tokens
        lanes = deal(list(self._running.sequences), self._context.lanes)
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
                and self._arrivals.empty()
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
        for sequence in self._running.sequences:
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
                self._jobs.fail(
                    job.attempt, WorkerFailed("constraint and biases forbid every token")
                )
                continue
            except MeshError as error:
                self._jobs.fail(job.attempt, error)
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
            self._running.retire(sequence)
            self._jobs.completed(job, 1, frames)

    def _embed(self) -> None:
        if (begun := self._embedder.begin_next()) is not None:
            self._outbox.started(begun.attempt)
        done = self._embedder.step(self._pace.budget(len(self._running)))
        if done is not None:
            self._tally.prompt_tokens += sum(map(len, done.inputs))
            self._jobs.embedded(done)

    def _stats(self) -> EngineStats:
        return self._tally.stats(
            running=len(self._running),
            waiting=len(self._jobs.waiting) + len(self._embedder),
            kv_used=self._running.kv_used,
            speculation=self._speculator.counters if self._speculator is not None else None,
        )
