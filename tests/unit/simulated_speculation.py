"""A machine on which a speculator can be run by the thousand tokens: nothing is computed, time
passes as it was measured for a real model, and texts are made up, so that it is known what
generating them without drafts would have taken.
"""

import random
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from itertools import groupby, takewhile
from typing import NamedTuple

from worker.engine.slots import Placement, Slot
from worker.engine.speculation.candidates import Candidate
from worker.engine.speculation.costs import StepCost
from worker.engine.speculation.speculator import Speculator

Table = tuple[tuple[int, float], ...]


def _table(*milliseconds: float) -> Table:
    widths = (1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 24, 32, 48)
    return tuple((rows, ms / 1e3) for rows, ms in zip(widths, milliseconds, strict=True))


# SmolLM2 135M on the two cores that the project is built on, by rows
F32 = _table(21.6, 24.5, 27.3, 30.3, 31.8, 32.8, 36.9, 38.7, 46.8, 56.6, 71.8, 94.3, 135.5)
Q4_0 = _table(5.8, 9.7, 11.8, 13.3, 17.6, 22.5, 22.6, 22.7, 27.2, 31.6, 47.4, 59.1, 87.5)
# of one core, on which rows are dear
F32_ONE_CORE = _table(
    27.7, 43.3, 49.4, 54.1, 57.6, 60.7, 67.9, 70.6, 86.3, 105.2, 139.5, 184.4, 250
)
Q4_0_ONE_CORE = _table(
    7.5, 17.2, 21.0, 25.9, 35.5, 39.6, 46.7, 39.9, 56.1, 60.8, 88.3, 116.9, 170.8
)
# of a GPU, on which rows are nearly free up to some width
FLAT = tuple((rows, 0.020 + 0.00005 * rows) for rows in (1, 8, 48))


def seconds(table: Table, rows: int) -> float:
    """Between the points of a table and beyond them, along straight lines."""
    right = min(max(1, bisect_right(table, (rows, float("inf")))), len(table) - 1)
    (low, start), (high, end) = table[right - 1], table[right]
    return start + (end - start) * (rows - low) / (high - low)


class Quality(NamedTuple):
    """Of a draft model: how often it is sure, and how often it is then right, and if not."""

    often: float
    right_if_sure: float
    right_if_not: float


GOOD = Quality(0.9, 0.97, 0.4)
FAIR = Quality(0.6, 0.93, 0.3)
HOPELESS = Quality(0.3, 0.3, 0.05)
OVERCONFIDENT = Quality(0.9, 0.1, 0.05)

Text = Callable[[random.Random, list[int]], Iterable[int]]
"""From a prompt to what follows it, without end."""


def new_text(rng: random.Random, _: list[int]) -> Iterable[int]:
    """Nothing in it was there before."""
    while True:
        yield rng.randrange(1, 10**9)


def copied_text(rng: random.Random, prompt: list[int]) -> Iterable[int]:
    """Stretches of the prompt with something new between, as when a file is edited."""
    while True:
        start = rng.randrange(len(prompt) - 40)
        yield from prompt[start : start + rng.randrange(10, 40)]
        yield rng.randrange(1, 10**9)


def babble(rng: random.Random, _: list[int]) -> Iterable[int]:
    """Every few words were there before, and were followed by something else."""
    while True:
        yield rng.randrange(1, 6)


class Machine:
    """A clock, and what calls of the two models take by it."""

    def __init__(self, rng: random.Random, *, noise: float) -> None:
        self.now = 0.0
        self.slowness = 1.0
        self._rng = rng
        self._noise = noise

    def spend(self, table: Table, rows: int) -> float:
        """Let a call with so many rows take its time; seconds."""
        took = seconds(table, rows) * self.slowness * self._rng.lognormvariate(0, self._noise)
        self.now += took
        return took


class Stream:
    """One sequence that is generated, and the text that it will turn out to be."""

    def __init__(self, slot: Slot, prompt: list[int], text: Iterable[int], length: int) -> None:
        self.slot = slot
        self.left = length
        self._text = iter(text)
        self._coming: list[int] = []
        slot.tokens, slot.cached, slot.busy = list(prompt), len(prompt) - 1, True

    def coming(self, count: int) -> list[int]:
        """What the model will say next, whatever is drafted."""
        while len(self._coming) < count:
            self._coming.append(next(self._text))
        return self._coming[:count]

    def advance(self, count: int) -> list[int]:
        """The next tokens have been sampled."""
        tokens = self.coming(count)
        del self._coming[:count]
        self.slot.tokens += tokens
        self.slot.cached = len(self.slot.tokens) - 1
        self.left -= count
        return tokens


TAKEN_SECONDS = 20e-6
"""What a draft model that is the target in another format takes for each token it takes over."""


class FakeDrafter:
    """A draft model that knows the text, and errs as often as it is told to."""

    def __init__(
        self, machine: Machine, table: Table, quality: Quality, beside: StepCost, *, kin: bool
    ) -> None:
        self.kin = kin
        self.cost = StepCost(table, beside=beside)
        self.quality = quality
        self.streams: dict[int, Stream] = {}
        self.passes = 0
        self._machine, self._table = machine, table
        self._rng = random.Random(7)
        self._valid: dict[int, int] = {}
        self._computed: dict[int, int] = {}

    def took(self, slot: int, source: int, reuse: int) -> None:
        self._valid[slot] = min(self._valid.get(source, 0), reuse)

    def accepted(self, slot: int, tokens: int) -> None:
        self._valid[slot] = min(self._computed[slot], tokens)

    def lacks(self, index: int, tokens: int) -> None:
        """So many tokens of a slot are not computed, beside its last one."""
        self._valid[index] = len(self.streams[index].slot.tokens) - 1 - tokens

    def lag(self, slot: Slot) -> int:
        return len(slot.tokens) - 1 - self._valid[slot.index]

    def catch_up_seconds(self, slot: Slot) -> float:
        if self.lag(slot) <= 1:
            return 0.0
        if self.kin:
            return slot.cached * TAKEN_SECONDS
        return (self.lag(slot) - 1) * self.cost.seconds(64) / 64

    def begins_with(self, slot: Slot, _: int) -> int:
        # One that lags by more has caught up wholly before it drafts.
        return 2 if self.lag(slot) == 1 else 1

    def catch_up(self, slots: Sequence[Slot]) -> bool:
        left = 128
        for slot in slots:
            if self.kin and self.lag(slot) > 1:
                self._machine.now += slot.cached * TAKEN_SECONDS
                self._valid[slot.index] = slot.cached
            rows = min(left, self.lag(slot))
            if rows > 1:
                self._pass(rows)
                self._valid[slot.index] += rows
                left -= rows
        return all(self.lag(slot) <= 1 for slot in slots)

    def draft(self, slots, guessers, most, goes_on):
        assert len(guessers) == len(slots)
        assert all(self.lag(slot) <= 1 for slot in slots)
        begin = 1 + max(self.lag(slot) for slot in slots)
        drafts: list[list[int]] = [[] for _ in slots]
        sure: list[list[float]] = [[] for _ in slots]
        wrong = [False] * len(slots)
        rows = begin * len(slots)
        for depth in range(most):
            self._pass(rows)
            rows = len(slots)
            for i, slot in enumerate(slots):
                is_sure = self._rng.random() < self.quality.often
                right = self.quality.right_if_sure if is_sure else self.quality.right_if_not
                wrong[i] = wrong[i] or self._rng.random() >= right
                token = self.streams[slot.index].coming(depth + 1)[-1]
                drafts[i].append(-token if wrong[i] else token)
                sure[i].append(0.97 if is_sure else self._rng.uniform(0.1, 0.8))
            if not goes_on([each[-1] for each in sure]):
                break
        for slot, draft in zip(slots, drafts, strict=True):
            self._valid[slot.index] = len(slot.tokens)
            self._computed[slot.index] = len(slot.tokens) + len(draft) - 1
        return drafts, sure

    def _pass(self, rows: int) -> None:
        self.passes += 1
        self.cost.measured(rows, self._machine.spend(self._table, rows))


class Told(NamedTuple):
    """What a step told of a sequence."""

    draft: list[int]
    drafted: int
    accepted: int


class Simulation:
    """A speculator among streams that are followed by new ones as they end.

    Args:
        count: streams at a time.
        text: what they say.
        quality: of the draft model; None: there is none.
        target, draft: seconds by rows.
        kin: the draft model takes over what the target has computed.
        noise: of every measurement, as the standard deviation of its logarithm.
        misjudged: the same of the calibration that the speculator begins with.
        prompt: tokens of each prompt.
        length: tokens of each answer.
    """

    def __init__(
        self,
        count: int,
        *,
        text: Text = new_text,
        quality: Quality | None = None,
        target: Table = F32,
        draft: Table = Q4_0,
        kin: bool = False,
        noise: float = 0.05,
        misjudged: float = 0.0,
        prompt: int = 100,
        length: int = 300,
        seed: int = 1,
    ) -> None:
        self.rng = rng = random.Random(seed)
        self.machine = Machine(rng, noise=noise)
        self.text = text
        self.tokens = 0
        self.plain_seconds = 0.0
        """What all tokens would have taken without drafts."""
        self.told: list[Told] = []
        """What the last step told, by stream."""
        cost = StepCost([(rows, s * rng.lognormvariate(0, misjudged)) for rows, s in target])
        self.drafter = FakeDrafter(self.machine, draft, quality, cost, kin=kin) if quality else None
        self.speculator = Speculator(
            cost,
            drafter=self.drafter,
            memory=None,
            most_rows=512,
        )
        self._target, self._prompt, self._length = target, prompt, length
        self._streams = [self._begin(Slot(index)) for index in range(count)]
        self._draftings = [self._drafting(stream) for stream in self._streams]

    @property
    def gain(self) -> float:
        """Over generating the same without drafts."""
        return self.plain_seconds / self.machine.now

    def run(self, tokens: int) -> float:
        """Generate so many tokens; the gain over them."""
        plain, now, end = self.plain_seconds, self.machine.now, self.tokens + tokens
        while self.tokens < end:
            self.step()
        return (self.plain_seconds - plain) / (self.machine.now - now)

    def step(self) -> None:
        """One step of the engine, as `loop.py` makes it."""
        speculator, machine, streams = self.speculator, self.machine, self._streams
        count = len(streams)
        candidates = [
            Candidate(drafting, stream.slot, stream.left - 1, lambda: None, len)
            for drafting, stream in zip(self._draftings, streams, strict=True)
        ]
        drafts = speculator.propose(candidates, lambda: machine.now)
        assert len(drafts) == count
        assert len({len(draft) for draft in drafts if draft}) <= 1
        began = machine.now
        rows = self._verify(drafts)
        took = machine.now - began
        came = 0
        self.told.clear()
        for index, (stream, draft) in enumerate(zip(streams, drafts, strict=True)):
            pairs = zip(draft, stream.coming(len(draft)), strict=True)
            accepted = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
            tokens = stream.advance(min(accepted + 1, stream.left))
            came += len(tokens)
            self._draftings[index].lookup.extend(tokens)
            drafted = 0
            if draft:
                drafted = speculator.verified(
                    index, len(tokens) - 1, stream.left == 0, stream.slot.cached
                )
            self.told.append(Told(draft, drafted, len(tokens) - 1))
        speculator.finished(came, took, rows)
        self.tokens += came
        self.plain_seconds += came * seconds(self._target, count) * machine.slowness / count
        for index, stream in enumerate(streams):
            if stream.left <= 0:
                streams[index] = self._begin(stream.slot)
                self._draftings[index] = self._drafting(streams[index])

    def _verify(self, drafts: Sequence[list[int]]) -> int:
        """llama.cpp computes consecutive slots with equally many rows in one pass."""
        length = max(map(len, drafts))
        if all(drafts):
            self.machine.spend(self._target, len(drafts) * (1 + length))
        else:
            self.machine.spend(self._target, len(drafts))
            for has_draft, group in groupby(drafts, key=bool):
                if has_draft:
                    self.machine.spend(self._target, len(list(group)) * length)
        return len(drafts) + sum(map(len, drafts))

    def _begin(self, slot: Slot) -> Stream:
        prompt = [self.rng.randrange(1, 10**6) for _ in range(self._prompt)]
        length = self.rng.randrange(self._length // 2, self._length * 3 // 2)
        stream = Stream(slot, prompt, self.text(self.rng, prompt), length)
        self.speculator.took(Placement(slot.index, slot.index, 0))
        if self.drafter is not None:
            self.drafter.streams[slot.index] = stream
        return stream

    def _drafting(self, stream: Stream):
        return self.speculator.begin(stream.slot.tokens, "")
