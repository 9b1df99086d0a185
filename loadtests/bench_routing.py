"""What routing brings: prompts that need not be computed again, and no waiting behind long answers.

    conversations  real engines: 64 conversations of 8 turns through two routers in turn, and how
                   much of their prompts was computed, against a random worker for each turn
    skewed         token workers of a given speed with real queues, an open loop of requests of
                   which a fifth is ten times as long as the others, and how long the first token
                   took

Each part runs with each routing of `loadtests.routed_router`, one after the other in each
repetition.
"""

import asyncio
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import cyclopts
import msgspec
import uvloop

from loadtests.figures import markdown, median_and_range, percentile
from loadtests.http_client import Client, Target
from loadtests.http_reply import Reply
from loadtests.stack import Stack, get, smollm2_q4_0

Part = Literal["conversations", "skewed"]
Routing = Literal["mesh", "random", "round-robin", "group"]
Speculation = Literal["off", "ngram"]
PARTS: tuple[Part, ...] = ("conversations", "skewed")
CHAT = "/v1/chat/completions"
ROUTERS = 2
TOLD_EVERY = 64
SETTLE = 2.0
"""Seconds until every router has heard every worker and measured its distance."""


class Skew(msgspec.Struct, frozen=True):
    """The skewed load: seconds and tokens."""

    workers: int = 4
    slots: int = 4
    interval: float = 0.010
    short: int = 20
    factor: int = 10
    share: float = 0.2
    load: float = 0.8
    """Of what the workers can do."""
    seconds: float = 60.0

    @property
    def rate(self) -> float:
        """Requests a second."""
        tokens = self.short * (1 - self.share + self.share * self.factor)
        return self.load * self.workers * self.slots / (tokens * self.interval)


class Talk(msgspec.Struct, frozen=True):
    """The conversations."""

    workers: int = 4
    slots: int = 4
    count: int = 64
    turns: int = 8
    tokens: int = 48
    at_once: int = 8
    speculation: Speculation = "off"
    prefix_memory: str = "512MiB"


async def _ask(client: Client, request: bytes) -> Reply:
    reply = await client.send(request, timeout=600.0)
    if reply.error:
        raise SystemExit(f"a request failed: {reply.error}")
    return reply


async def _start(stack: Stack, routing: Routing) -> list[Target]:
    os.environ["MESH_ROUTING"] = routing
    targets = []
    for number in range(1, ROUTERS + 1):
        port = await stack.router(f"router-{number}", program="loadtests.routed_router")
        targets.append(Target(f"http://127.0.0.1:{port}"))
    return targets


async def conversations(routing: Routing, talk: Talk, model: Path) -> dict[str, Any]:
    """Hold all conversations once."""
    async with Stack(routers=ROUTERS, workers=talk.workers) as stack:
        targets = await _start(stack, routing)
        options = (
            *("--threads", "1", "--slots", str(talk.slots)),
            *("--speculation", talk.speculation, "--prefix-memory", talk.prefix_memory),
        )
        # The first alone, so that what it measures of the model holds, and is kept for the rest:
        # four that measure at once disturb each other.
        await stack.worker("worker-1", model, *options)
        name = await stack.wait_model("router-1", "worker-1")
        for number in range(2, talk.workers + 1):
            await stack.worker(f"worker-{number}", model, *options)
        await _until(targets[0], name, talk.workers)
        await asyncio.sleep(SETTLE)
        gate = asyncio.Semaphore(talk.at_once)
        replies: list[Reply] = []

        async def hold(number: int) -> None:
            clients = [Client(target) for target in targets]
            topics = ("rivers", "bread", "clocks", "stars", "bridges", "glass", "tea", "maps")
            messages = [
                {
                    "role": "user",
                    "content": f"This is talk {number}. Tell me about {topics[number % 8]}.",
                }
            ]
            for turn in range(talk.turns):
                target = (number + turn) % ROUTERS
                body: dict[str, object] = {
                    "model": name,
                    "messages": messages,
                    "max_tokens": talk.tokens,
                    "ignore_eos": True,
                    "temperature": 0,
                }
                async with gate:
                    reply = await _ask(clients[target], targets[target].post(CHAT, body))
                replies.append(reply)
                _tell(f"{routing}: {len(replies)} of {talk.count * talk.turns} turns", replies)
                answer = msgspec.json.decode(reply.text)["choices"][0]["message"]["content"]
                messages += [
                    {"role": "assistant", "content": answer},
                    {"role": "user", "content": f"And then? {turn}"},
                ]
            for client in clients:
                client.abort()

        started = time.monotonic()
        await asyncio.gather(*(hold(number) for number in range(talk.count)))
        seconds = time.monotonic() - started
    prompt = sum(reply.usage["prompt_tokens"] for reply in replies)
    cached = sum(reply.usage["prompt_tokens_details"]["cached_tokens"] for reply in replies)
    return {
        "part": "conversations",
        "routing": routing,
        "prompt_tokens": prompt,
        "computed_tokens": prompt - cached,
        "prefill_ms": sum(reply.timings["prefill_ms"] for reply in replies),
        "total_p50_ms": percentile([reply.total for reply in replies], 0.5) * 1e3,
        "seconds": seconds,
    }


async def skewed(routing: Routing, skew: Skew, seed: int) -> dict[str, Any]:
    """Send the load once; the same arrivals and lengths for the same seed."""
    draw = random.Random(seed)
    async with Stack(routers=ROUTERS, workers=skew.workers) as stack:
        targets = await _start(stack, routing)
        for number in range(1, skew.workers + 1):
            await stack.token_worker(
                f"worker-{number}",
                "--model=tokens",
                f"--interval-ms={skew.interval * 1e3:g}",
                f"--slots={skew.slots}",
                "--queue=1000",
            )
        await _until(targets[0], "tokens", skew.workers)
        await asyncio.sleep(SETTLE)
        idle: list[list[Client]] = [[] for _ in targets]
        replies: list[Reply] = []

        async def one(number: int, tokens: int) -> None:
            at = number % ROUTERS
            client = idle[at].pop() if idle[at] else Client(targets[at])
            body: dict[str, object] = {
                "model": "tokens",
                "messages": [{"role": "user", "content": f"question {seed} {number}"}],
                "max_tokens": tokens,
                "stream": True,
            }
            replies.append(await _ask(client, targets[at].post(CHAT, body)))
            _tell(f"{routing}: {len(replies)} requests answered", replies)
            idle[at].append(client)

        due = time.monotonic()
        end = due + skew.seconds
        async with asyncio.TaskGroup() as tasks:
            number = 0
            while (due := due + draw.expovariate(skew.rate)) < end:
                long = draw.random() < skew.share
                await asyncio.sleep(max(0.0, due - time.monotonic()))
                tokens = skew.short * (skew.factor if long else 1)
                tasks.create_task(one(number, tokens))
                number += 1
        for clients in idle:
            for client in clients:
                client.abort()
    ttft = [reply.ttft * 1e3 for reply in replies]
    return {
        "part": "skewed",
        "routing": routing,
        "requests": len(replies),
        "ttft_p50_ms": percentile(ttft, 0.5),
        "ttft_p90_ms": percentile(ttft, 0.9),
        "ttft_p99_ms": percentile(ttft, 0.99),
    }


def _tell(progress: str, replies: Sequence[Reply]) -> None:
    """A sign of life now and then: a part takes minutes."""
    if len(replies) % TOLD_EVERY == 0:
        print(progress, file=sys.stderr, flush=True)


async def _until(target: Target, model: str, workers: int) -> None:
    """Wait until a router knows so many workers of the model."""
    async with asyncio.timeout(120):
        while True:
            _, body = await get(target.port, "/v1/models")
            listed = msgspec.json.decode(body)["data"]
            if any(m["id"] == model and m["meta"]["workers"] == workers for m in listed):
                return
            await asyncio.sleep(0.1)


def report(rows: Sequence[dict[str, Any]]) -> str:
    """The tables of all repetitions."""
    tables: list[str] = []
    columns = {
        "conversations": (
            ("prompt tokens", "prompt_tokens"),
            ("computed", "computed_tokens"),
            ("prompt time, ms", "prefill_ms"),
            ("answer p50, ms", "total_p50_ms"),
            ("all, s", "seconds"),
        ),
        "skewed": (
            ("requests", "requests"),
            ("TTFT p50, ms", "ttft_p50_ms"),
            ("p90", "ttft_p90_ms"),
            ("p99", "ttft_p99_ms"),
        ),
    }
    compared = {"conversations": "prefill_ms", "skewed": "ttft_p99_ms"}
    for part in PARTS:
        mine = [row for row in rows if row["part"] == part]
        if not mine:
            continue
        ours = [row[compared[part]] for row in mine if row["routing"] == "mesh"]
        lines = []
        for routing in dict.fromkeys(row["routing"] for row in mine):
            found = [row for row in mine if row["routing"] == routing]
            cells = [median_and_range([row[key] for row in found]) for _, key in columns[part]]
            theirs = [row[compared[part]] for row in found]
            ratios = [a / b for a, b in zip(ours, theirs, strict=False) if b]
            lines.append((routing, *cells, median_and_range(ratios)))
        head = ("routing", *(title for title, _ in columns[part]), "ours over it")
        tables.append(markdown(head, lines))
    return "\n\n".join(tables)


async def measure(
    parts: Sequence[Part],
    routings: Sequence[Routing],
    seeds: Sequence[int],
    skew: Skew,
    talk: Talk,
) -> list[dict[str, Any]]:
    """Run everything."""
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="mesh-routing-") as folder:
        model = smollm2_q4_0(Path(folder)) if "conversations" in parts else Path()
        for seed in seeds:
            for part in parts:
                for routing in routings:
                    if part == "conversations":
                        row = await conversations(routing, talk, model)
                    else:
                        row = await skewed(routing, skew, seed)
                    rows.append(row)
                    print(json.dumps(row), flush=True)
    return rows


app = cyclopts.App(help=__doc__)


@app.default
def main(
    *,
    part: tuple[Part, ...] = PARTS,
    routing: tuple[Routing, ...] = ("mesh", "random", "round-robin", "group"),
    reps: int = 3,
    seed: int = 0,
    seconds: float = 60.0,
    load: float = 0.8,
    conversations: int = 64,
    tokens: int = 48,
    at_once: int = 8,
    speculation: Speculation = "off",
    prefix_memory: str = "512MiB",
    json_file: Annotated[Path | None, cyclopts.Parameter(name="--json")] = None,
) -> None:
    """Print the tables.

    Args:
        part: which parts to run; may be given several times
        routing: which routings to compare; may be given several times
        reps: repetitions, of which the median is shown
        seed: of the first repetition; each further one has the next
        seconds: length of one skewed load
        load: of the skewed load, as a share of what the workers can do
        conversations: how many are held, in 8 turns each
        tokens: of each of their answers
        at_once: turns at once; with 1, prompts are computed beside nothing else
        speculation: of the workers that hold them
        prefix_memory: of each of these workers, for conversations that are not in its slots
        json_file: where to write every repetition
    """
    skew, talk = (
        Skew(seconds=seconds, load=load),
        Talk(
            count=conversations,
            tokens=tokens,
            at_once=at_once,
            speculation=speculation,
            prefix_memory=prefix_memory,
        ),
    )
    rows = uvloop.run(measure(part, routing, range(seed, seed + reps), skew, talk))
    if json_file is not None:
        json_file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    print(f"\n{report(rows)}")


if __name__ == "__main__":
    app()
