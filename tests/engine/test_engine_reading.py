"""Clients that lost their connection at every few tokens and go on: from what was kept, or without.

Nothing that a client has is told again, and nothing is left out.
"""

import itertools
import secrets
import time

import msgspec
import pytest
from asking import frames_of, idle, request, text_of, tokens_of
from engine_driver import EngineDriver, new_attempt
from test_engine_resume import ASKED, compare, ends, logprobs, start  # noqa: F401  a fixture

from loadtests.near_ties import Judge
from loadtests.stack import smollm2
from shared.protocol import Delta, Done, End, Fail, Frame, Generate, Had, Reading, Resumed, Sampling
from shared.token_check import extend_check

pytestmark = [pytest.mark.model, pytest.mark.asyncio(loop_scope="module")]

NEAR = 0.1


def had_of(frames: list[Frame], n: int) -> tuple[Had, ...]:
    """What a client has that was told these frames."""
    had = []
    for choice in range(n):
        mine = [f for f in frames if isinstance(f, Delta | Done) and f.choice == choice]
        tokens = tokens_of(frames, choice)
        had.append(
            Had(
                len(tokens),
                extend_check(0, tokens),
                whole=any(isinstance(f, Delta) and not f.tokens for f in mine),
                done=any(isinstance(f, Done) for f in mine),
            )
        )
    return tuple(had)


def readable(wanted: Generate) -> Generate:
    """The same request, of a client that may lose its connection."""
    reading = Reading(secrets.randbits(63))
    return msgspec.structs.replace(
        wanted, attempt=new_attempt(), reading=reading, owner="me", deadline=time.time() + 100
    )


def going_on(wanted: Generate, had: list[Frame], **changed) -> Generate:
    """The request that goes on behind what the client has."""
    reading = msgspec.structs.replace(wanted.reading, had=had_of(had, wanted.n))
    fields = {"attempt": new_attempt(), "reading": reading, "deadline": time.time() + 100}
    return msgspec.structs.replace(wanted, **(fields | changed))


def joined(wanted: Generate, had: list[Frame], rest: list[Frame]) -> list[Frame]:
    """What the client has in all; tokens are those that the router was told of the rest."""
    for choice, before in enumerate(had_of(had, wanted.n)):
        told = [f for f in rest if isinstance(f, Delta) and f.choice == choice]
        assert not (before.done and told)
        for frame in told:
            if frame.first < before.count:
                assert frame.first + len(frame.tokens) <= before.count
                assert (frame.text, frame.logprobs, frame.tools, frame.reasoning) == (
                    "",
                    (),
                    (),
                    "",
                )
    done = {c for c, before in enumerate(had_of(had, wanted.n)) if before.done}
    return [
        msgspec.structs.replace(f, tokens=())
        if isinstance(f, Delta) and f.choice not in done
        else f
        for f in had
    ] + rest


async def interrupted(engine: EngineDriver, wanted: Generate, count: int) -> list[Frame]:
    """The first frames; then the client, or its router, is gone."""
    frames: list[Frame] = []
    submitted = engine.submit(wanted)
    async for frame in submitted:
        frames.append(frame)
        if len(frames) == count:
            break
    await submitted.aclose()
    return frames


def parted(wanted: Generate, whole: list[Frame], rest: list[Frame], judge: Judge) -> None:
    """It cannot go on because the answer came out different at a near tie."""
    assert isinstance(rest[-1], Fail)
    assert rest[-1].code == "cannot_continue"
    gaps = []
    for choice in range(wanted.n):
        one, other = tokens_of(whole, choice), tokens_of(rest, choice)
        for index, (left, right) in enumerate(zip(one, other, strict=False)):
            if left != right:
                gaps.append(judge.gap(wanted, one[:index], left, right, choice=choice))
                break
    assert min(gaps) < NEAR


WAYS = ("kept whole", "kept in part", "not kept")


async def go_on(
    first: EngineDriver, other: EngineDriver, wanted: Generate, had: list[Frame], way: str
) -> tuple[list[Frame], list[Frame]]:
    """What the client has, and what it gets then."""
    if way == "not kept":
        return had, await frames_of(other, going_on(wanted, had, owner="another"))
    if way == "kept in part":
        wanted = readable(wanted)
        had = await interrupted(first, wanted, len(had))
    steps = first.stats.steps
    rest = await frames_of(first, going_on(wanted, had))
    if way == "kept whole" and wanted.logprobs is None:
        # Nothing is computed.
        assert first.stats.steps == steps
    return had, rest


async def every_kind(
    first: EngineDriver, other: EngineDriver, judge: Judge, *, every: int, ways: int
) -> dict[str, list[int]]:
    """By way how many answers were read on and how many were equal, cut at every few tokens.

    At each cut what was kept whole, and so many of the other ways by turns.
    """
    asked = {kind: readable(request(**fields)) for kind, fields in ASKED.items()}
    whole = {kind: await frames_of(first, wanted) for kind, wanted in asked.items()}
    middle = len(text_of(whole["greedy"])) // 2
    stop = text_of(whole["greedy"])[middle : middle + 18]
    asked["stop"] = readable(msgspec.structs.replace(asked["greedy"], stop=(stop,)))
    whole["stop"] = await frames_of(first, asked["stop"])
    results = {way: [0, 0] for way in WAYS}
    turns = itertools.cycle(WAYS[1:])
    for count in range(1, max(map(len, whole.values())), every):
        for kind, wanted in asked.items():
            if count >= len(whole[kind]):
                continue
            for way in (WAYS[0], *itertools.islice(turns, ways)):
                before = whole[kind][:count]
                had, rest = await go_on(first, other, wanted, before, way)
                results[way][0] += 1
                if isinstance(rest[-1], Fail) and way == "not kept":
                    parted(wanted, whole[kind], rest, judge)
                    continue
                assert isinstance(rest[-1], End), rest[-1]
                found = joined(wanted, had, rest)
                same = compare(wanted, whole[kind], found, judge)
                assert same or way != "kept whole" or wanted.logprobs is not None
                results[way][1] += same
                tokens = sum(len(tokens_of(found, choice)) for choice in range(wanted.n))
                assert rest[-1].usage.completion == tokens
                assert rest[-1].usage.prompt == whole[kind][-1].usage.prompt
    return results


async def test_every_kind_of_answer_is_read_on(start, q4_0):  # noqa: F811
    engine = await start(q4_0)
    judge = Judge(q4_0)
    try:
        # What it has kept is another owner's where it is to have kept nothing.
        results = await every_kind(engine, engine, judge, every=31, ways=1)
    finally:
        judge.close()
    print(results)

    assert all(asked >= 4 for asked, _ in results.values())
    assert all(equal >= 0.85 * asked for asked, equal in results.values())


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("speculation", ["off", "auto"])
async def test_at_every_few_tokens_and_with_speculation(start, speculation):  # noqa: F811
    path = smollm2()
    first = await start(path, speculation=speculation)
    other = await start(path, speculation=speculation)
    judge = Judge(path)
    try:
        results = await every_kind(first, other, judge, every=3, ways=2)
    finally:
        judge.close()
    print(speculation, results)

    assert all(equal >= 0.95 * asked for asked, equal in results.values())


async def test_who_goes_on_takes_the_slot_of_the_connection_that_was_lost(engine):
    sampling = Sampling(seed=7, temperature=0, ignore_eos=True)
    wanted = readable(request("Count to a thousand.", max_tokens=150, sampling=sampling))
    submitted = engine.submit(wanted)
    had = [await anext(submitted)]
    again = going_on(wanted, had)
    engine.ask(again, lambda frame: None)
    # The router of the old connection may live, and has to know.
    lost = [frame async for frame in submitted]
    await idle(engine)

    assert isinstance(lost[-1], Fail)
    assert (lost[-1].code, lost[-1].lost) == ("cannot_continue", False)
    whole = await frames_of(engine, going_on(again, []))
    assert isinstance(whole[-1], End)
    assert whole[-1].usage.completion == 150


def part_of(whole: list[Frame]) -> list[Frame]:
    """Half of the frames with tokens; one may hold several, that were drafted."""
    told = [frame for frame in whole if isinstance(frame, Delta) and frame.tokens]
    return told[: max(1, len(told) // 2)]


async def test_what_another_has_asked_is_not_told(engine):
    wanted = readable(request(max_tokens=12))
    whole = await frames_of(engine, wanted)
    steps = engine.stats.steps
    had = part_of(whole)
    rest = await frames_of(engine, going_on(wanted, had, owner="another"))

    assert engine.stats.steps > steps
    assert text_of(joined(wanted, had, rest)) == text_of(whole)


async def test_an_answer_that_came_out_different_does_not_go_on(engine):
    wanted = readable(request(max_tokens=12))
    whole = await frames_of(engine, wanted)
    asks = going_on(wanted, part_of(whole), owner="another")
    (had,) = asks.reading.had
    wrong = msgspec.structs.replace(had, check=had.check ^ 1)
    reading = msgspec.structs.replace(asks.reading, had=(wrong,))
    rest = await frames_of(engine, msgspec.structs.replace(asks, reading=reading))

    assert isinstance(rest[-1], Fail)
    assert rest[-1].code == "cannot_continue"
    assert text_of(rest) == ""
    assert logprobs(rest, 0) == ends(rest, 0) == []


async def test_a_worker_that_is_lost_while_it_catches_up_is_gone_on_from(engine):
    wanted = readable(request(max_tokens=24, sampling=ASKED["drawn"]["sampling"]))
    whole = await frames_of(engine, wanted)
    had = part_of(whole)
    asks = going_on(wanted, had)
    for frames in (1, len(had) + 1):
        tokens = tuple(tokens_of(whole[:frames]))
        again = msgspec.structs.replace(asks, attempt=new_attempt(), owner=f"other-{frames}")
        again = msgspec.structs.replace(again, resume=(Resumed(tokens),))
        rest = await frames_of(engine, again)
        # What the router has passed on behind that, the client has by now.
        assert tokens_of(rest) == tokens_of(whole[frames:])
        assert text_of(rest) == text_of(whole[max(len(had), frames) :])
        assert rest[-1].usage.completion == len(tokens_of(whole))
