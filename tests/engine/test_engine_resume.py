"""Answers cut at every few tokens and resumed on another engine, beside the undisturbed ones."""

import asyncio
import itertools
import json
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import msgspec
import pytest
import pytest_asyncio
from asking import PERSON, frames_of, request, text_of, tokens_of
from engine_driver import EngineDriver, new_attempt

from loadtests.near_ties import Judge
from loadtests.rings import model_file
from shared.assembly import Assembly
from shared.protocol import (
    ChatInput,
    Constraint,
    Delta,
    Done,
    End,
    Fail,
    Frame,
    Generate,
    Message,
    Resumed,
    Sampling,
    TextInput,
    Tool,
    ToolChoice,
)

pytestmark = [pytest.mark.model, pytest.mark.asyncio(loop_scope="module")]

NEAR = 0.1
"""Logits by which two tokens may differ where two runs part."""
DRAWN = Sampling(seed=11, temperature=0.8)
TOOL = Tool(
    "get_weather",
    "Weather of a city",
    json.dumps(
        {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 20}},
            "required": ["city"],
            "additionalProperties": False,
        }
    ),
)

ASKED = {
    "greedy": {"text": "Tell me about the sea.", "max_tokens": 40},
    "drawn": {"text": "Tell me about a train.", "max_tokens": 40, "sampling": DRAWN},
    "penalties": {
        "text": "Tell me about a garden.",
        "max_tokens": 32,
        "sampling": Sampling(
            seed=2, temperature=0.8, repeat_penalty=1.2, presence_penalty=0.6, frequency_penalty=0.4
        ),
    },
    "schema": {
        "text": "Describe a baker as JSON.",
        "max_tokens": 80,
        "constraint": Constraint("json_schema", PERSON),
        "sampling": DRAWN,
    },
    "tool": {
        "input": ChatInput(
            (Message("user", "How is the weather in Oslo and in Rome?"),),
            tools=(TOOL,),
            tool_choice=ToolChoice("required"),
        ),
        "max_tokens": 60,
        "sampling": DRAWN,
    },
    "logprobs": {
        "input": TextInput("Once upon a time"),
        "max_tokens": 24,
        "logprobs": 3,
        "sampling": DRAWN,
    },
    "choices": {"text": "Say something surprising.", "max_tokens": 20, "n": 2, "sampling": DRAWN},
}


def cut_off(frames: list[Frame], count: int, wanted: Generate) -> tuple[list[Frame], Assembly]:
    """The first `count` frames, as a router has taken them."""
    assembly = Assembly(wanted.attempt, wanted.n)
    assert {assembly.check(frame) for frame in frames[:count]} <= {"take"}
    return frames[:count], assembly


async def resumed(
    engine: EngineDriver, wanted: Generate, had: list[Frame], assembly: Assembly
) -> list[Frame]:
    """What a client gets in all if the answer goes on on this engine."""
    attempt = new_attempt()
    again = msgspec.structs.replace(
        wanted, attempt=attempt, resume=assembly.resume, deadline=time.time() + 100
    )
    assembly = assembly.again(attempt)
    rest = await frames_of(engine, again)
    assert isinstance(rest[-1], End), rest[-1]
    verdicts = [(assembly.check(frame), frame) for frame in rest]
    # Only the text behind the last token may have been told before.
    assert all(v == "take" or (v == "drop" and not f.tokens) for v, f in verdicts)
    return had + [frame for verdict, frame in verdicts if verdict == "take"]


def compare(wanted: Generate, whole: list[Frame], found: list[Frame], judge: Judge) -> bool:
    """Whether two answers are equal; if not, that they part at a near tie."""
    equal = True
    for choice in range(wanted.n):
        one, other = tokens_of(whole, choice), tokens_of(found, choice)
        if one == other:
            assert text_of(found, choice) == text_of(whole, choice)
            assert arguments(found, choice) == arguments(whole, choice)
            assert ends(found, choice) == ends(whole, choice)
            told, there = logprobs(found, choice), logprobs(whole, choice)
            assert [entry.token for entry in told] == [entry.token for entry in there]
            for left, right in zip(told, there, strict=True):
                assert left.logprob == pytest.approx(right.logprob, abs=NEAR)
            continue
        equal = False
        pairs = itertools.zip_longest(one, other)
        index = next(i for i, (left, right) in enumerate(pairs) if left != right)
        left, right = (t[index] if index < len(t) else None for t in (one, other))
        gap = judge.gap(wanted, one[:index], left, right, choice=choice)
        print(f"{wanted.id}, choice {choice}: parts at token {index}, gap {gap:.4f}")
        assert gap < NEAR
    return equal


def arguments(frames: list[Frame], choice: int) -> list[tuple[int, str, str, str]]:
    calls: dict[int, list[str]] = {}
    for frame in frames:
        if isinstance(frame, Delta) and frame.choice == choice:
            for piece in frame.tools:
                call = calls.setdefault(piece.index, ["", "", ""])
                call[0] += piece.id
                call[1] += piece.name
                call[2] += piece.arguments
    return [(index, *call) for index, call in calls.items()]


def logprobs(frames: list[Frame], choice: int):
    return [e for f in frames if isinstance(f, Delta) and f.choice == choice for e in f.logprobs]


def ends(frames: list[Frame], choice: int):
    return [
        (f.count, f.reason, f.stopped_by)
        for f in frames
        if isinstance(f, Done) and f.choice == choice
    ]


async def every_kind(
    undisturbed: EngineDriver, other: EngineDriver, judge: Judge, *, every: int
) -> dict[str, tuple[int, int]]:
    """By kind how many of the resumed answers were equal, and how many there were.

    Cuts of different kinds take turns at its two slots, so that none of the other engine's holds
    what is resumed.
    """
    asked = {kind: request(**fields) for kind, fields in ASKED.items()}
    whole = {kind: await frames_of(undisturbed, wanted) for kind, wanted in asked.items()}
    text = text_of(whole["greedy"])
    middle = len(text) // 2
    asked["stop"] = msgspec.structs.replace(asked["greedy"], stop=(text[middle : middle + 18],))
    whole["stop"] = await frames_of(undisturbed, asked["stop"])
    assert ends(whole["stop"], 0)[0][1:] == ("stop", text[middle : middle + 18])
    results = dict.fromkeys(asked, (0, 0))
    for count in range(1, max(map(len, whole.values())), every):
        cut = {
            kind: cut_off(whole[kind], count, wanted)
            for kind, wanted in asked.items()
            if count < len(whole[kind])
        }
        going_on = (resumed(other, asked[kind], *before) for kind, before in cut.items())
        answers = await asyncio.gather(*going_on)
        for (kind, (had, _)), found in zip(cut.items(), answers, strict=True):
            wanted = asked[kind]
            usage, before = found[-1].usage, whole[kind][-1].usage
            assert usage.prompt == before.prompt
            assert usage.completion == sum(len(tokens_of(found, c)) for c in range(wanted.n))
            assert found[-1].timings.replayed == sum(
                len(tokens_of(had, choice)) for choice in range(wanted.n)
            )
            same = compare(wanted, whole[kind], found, judge)
            equal, all_of = results[kind]
            results[kind] = (equal + same, all_of + 1)
    return results


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def start() -> AsyncIterator[Callable]:
    """Start engines that end with the module: `await start(path, speculation="off")`."""
    drivers: list[EngineDriver] = []

    async def make(path: Path, **options) -> EngineDriver:
        fields = {"slots": 2, "context": 1024, "threads": 1, "speculation": "off"} | options
        driver = EngineDriver(str(path), **fields)
        drivers.append(driver)
        await driver.start()
        return driver

    yield make
    for driver in drivers:
        await driver.stop()


async def test_every_kind_of_answer_goes_on_as_if_nothing_had_happened(start, q4_0):
    undisturbed, other = await start(q4_0), await start(q4_0)
    judge = Judge(q4_0)
    try:
        results = await every_kind(undisturbed, other, judge, every=5)
    finally:
        judge.close()
    print(results)

    assert all(found for _, found in results.values())
    equal, found = (sum(column) for column in zip(*results.values(), strict=True))
    assert equal >= 0.9 * found


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("target", ["F32", "Q4_0", "Q4_1"])
@pytest.mark.parametrize("speculation", ["off", "auto"])
async def test_so_it_is_with_every_format_and_with_speculation(
    start, models: Path, target, speculation
):
    path = model_file(target, models)
    undisturbed, other = await start(path), await start(path, speculation=speculation)
    judge = Judge(path)
    try:
        results = await every_kind(undisturbed, other, judge, every=2)
    finally:
        judge.close()
    print(target, speculation, results)

    equal, found = (sum(column) for column in zip(*results.values(), strict=True))
    assert equal >= 0.95 * found


async def test_where_all_was_told_nothing_is_computed(engine):
    wanted = request(max_tokens=5)
    whole = await frames_of(engine, wanted)
    steps = engine.stats.steps
    tokens = tuple(tokens_of(whole))

    ended = msgspec.structs.replace(wanted, attempt=new_attempt(), resume=(Resumed(tokens),))
    frames = await frames_of(engine, ended)
    done = msgspec.structs.replace(wanted, attempt=new_attempt(), resume=(Resumed(done=5),))
    last = await frames_of(engine, done)

    assert [f for f in frames[:-1] if isinstance(f, Done)] == [Done(ended.attempt, 0, 5, "length")]
    assert [type(frame) for frame in last] == [End]
    assert frames[-1].usage.completion == last[-1].usage.completion == 5
    assert last[-1].timings.prefill_ms == last[-1].timings.decode_ms == 0
    assert engine.stats.steps == steps


@pytest.mark.parametrize(
    "resume",
    [(Resumed((1,)), Resumed()), (Resumed((10**6,)),)],
)
async def test_what_cannot_be_resumed_is_refused_by_name(engine, resume):
    (frame,) = await frames_of(engine, request(resume=resume))

    assert isinstance(frame, Fail)
    assert (frame.code, frame.param) == ("invalid_value", "resume")


async def test_a_resumed_answer_does_not_wait_behind_others(start, q4_0):
    alone = await start(q4_0, slots=1)
    wanted = request(max_tokens=10)
    whole = await frames_of(alone, wanted)
    _, assembly = cut_off(whole, 4, wanted)

    running = alone.submit(request("Count to a thousand.", max_tokens=30))
    await anext(running)
    ended: list[str] = []

    def ask(name: str, asked: Generate) -> None:
        alone.ask(asked, lambda frame: ended.append(name) if isinstance(frame, End) else None)

    ask("waiting", request(max_tokens=3))
    again = msgspec.structs.replace(wanted, attempt=new_attempt(), resume=assembly.resume)
    ask("resumed", again)
    async for _ in running:
        pass
    later = await frames_of(alone, request(max_tokens=1))

    assert isinstance(later[-1], End)
    assert ended == ["resumed", "waiting"]
