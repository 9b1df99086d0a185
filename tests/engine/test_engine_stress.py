"""Requests of every kind at once, a third of them given up midway: nothing leaks, nothing mixes."""

import asyncio
import json
import random

import pytest
from asking import PERSON, frames_of, idle, request, text_of

from shared.assembly import Assembly
from shared.protocol import ChatInput, Constraint, End, Fail, Message, Sampling, Tool, ToolChoice

pytestmark = [pytest.mark.model, pytest.mark.asyncio(loop_scope="module")]

TOOL = Tool(
    "look_up", "Looks a word up", '{"type":"object","properties":{"word":{"enum":["a","b"]}}}'
)


def random_request(rng: random.Random):
    kind = rng.choice(["plain", "plain", "schema", "tool", "choices", "long", "stop"])
    sampling = Sampling(seed=rng.randrange(2**32), temperature=rng.choice([0.0, 0.7, 1.3]))
    if kind == "schema":
        return kind, request(
            "A person as JSON.",
            max_tokens=90,
            constraint=Constraint("json_schema", PERSON),
            sampling=sampling,
        )
    if kind == "tool":
        source = ChatInput(
            (Message("user", f"Look up {rng.random()}"),),
            tools=(TOOL,),
            tool_choice=ToolChoice("required"),
        )
        return kind, request(input=source, max_tokens=60, sampling=sampling)
    if kind == "choices":
        return kind, request(n=rng.randrange(2, 8), max_tokens=rng.randrange(1, 12))
    if kind == "long":
        return kind, request("many words " * rng.randrange(50, 300), max_tokens=4)
    stop = ("e", "the") if kind == "stop" else ()
    return kind, request(
        f"Tell me about number {rng.randrange(5)}.",
        max_tokens=rng.randrange(1, 40),
        stop=stop,
        sampling=sampling,
        logprobs=rng.choice([None, 0, 3]),
    )


@pytest.mark.parametrize("seed", [1])
@pytest.mark.timeout(300)
async def test_a_storm_of_requests_leaves_the_engine_idle_and_whole(engine, seed):
    rng = random.Random(seed)

    async def one(delay: float, give_up: int | None) -> None:
        await asyncio.sleep(delay)
        kind, wanted = random_request(rng)
        if give_up is not None:
            stream = engine.submit(wanted)
            for _ in range(give_up):
                await anext(stream, None)
            await stream.aclose()
            return
        frames = await frames_of(engine, wanted)
        assembly = Assembly(wanted.attempt, wanted.n)
        assert {assembly.check(frame) for frame in frames} == {"take"}
        assert isinstance(frames[-1], End), frames[-1]
        if kind == "schema" and wanted.sampling.temperature == 0:
            json.loads(text_of(frames))

    async with asyncio.TaskGroup() as group:
        for _ in range(24):
            give_up = rng.randrange(1, 6) if rng.random() < 0.33 else None
            group.create_task(one(rng.random() * 8, give_up))
    await idle(engine)

    assert engine.stats.kv_used == 0
    after = await frames_of(engine, request("Still there?", max_tokens=3))
    assert not isinstance(after[-1], Fail)
