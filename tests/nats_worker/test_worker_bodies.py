"""Requests too large for one message."""

import time

import msgspec
import pytest

from shared.protocol import (
    Accepted,
    Busy,
    ChatInput,
    End,
    Fail,
    Generate,
    Message,
    Sampling,
    TextInput,
    encode,
)
from worker import body

pytestmark = pytest.mark.nats
SIZE = 256 * 1024


def whole(attempt: int, *, size: int = 3 * SIZE, **changes) -> Generate:
    request = Generate(
        id="large",
        attempt=attempt,
        model="tiny",
        input=TextInput("tokens=2 " + "x" * size),
        sampling=Sampling(seed=1),
        deadline=time.time() + 60,
    )
    return msgspec.structs.replace(request, **changes)


def head(request: Generate, size: int, **changes) -> bytes:
    empty = ChatInput(()) if isinstance(request.input, ChatInput) else TextInput("")
    return encode(msgspec.structs.replace(request, input=empty, body_size=size, **changes))


async def send_chunks(router, attempt: int, data: bytes, *, skip: int = -1) -> None:
    for index, start in enumerate(range(0, len(data), SIZE)):
        if index != skip:
            await router.chunk("worker-1", attempt, index, data[start : start + SIZE])


async def begin(router, request: Generate, data: bytes, **changes):
    asked = await router.send(head(request, len(data), **changes), request.attempt, "tiny")
    assert isinstance(await asked.first(), Accepted)
    return asked


async def test_a_body_in_chunks_arrives_whole(start, router):
    await start()
    request = whole(21, size=2 * 1024 * 1024)
    data = encode(request)
    asked = await begin(router, request, data)
    await send_chunks(router, 21, data)
    assert isinstance(await asked.last(), End)
    assert asked.text == "t0 t1 "


async def test_a_conversation_in_chunks(start, router):
    await start()
    request = whole(22, input=ChatInput((Message("user", "x" * 2 * SIZE),)))
    data = encode(request)
    asked = await begin(router, request, data)
    await send_chunks(router, 22, data)
    assert isinstance(await asked.last(), End)


async def test_doubled_chunks_and_strange_ones_are_ignored(start, router):
    await start()
    request = whole(23)
    data = encode(request)
    asked = await begin(router, request, data)
    await router.chunk("worker-1", 23, 0, data[:SIZE])
    await router.chunk("worker-1", 24, 0, b"of nobody")
    await send_chunks(router, 23, data)
    assert isinstance(await asked.last(), End)


async def test_a_lost_chunk_fails_the_attempt(start, router):
    await start(slots=1)
    request = whole(25)
    data = encode(request)
    asked = await begin(router, request, data)
    await router.nobody()
    await send_chunks(router, 25, data, skip=1)
    last = await asked.last()
    assert isinstance(last, Fail)
    assert last.code == "worker_failed"
    assert "chunk 1" in last.message
    await router.somebody()


async def test_a_body_that_stops_coming_gives_its_slot_back(start, router, monkeypatch):
    monkeypatch.setattr(body, "CHUNK_SECONDS", 0.2)
    await start(slots=1)
    request = whole(26)
    data = encode(request)
    asked = await begin(router, request, data)
    last = await asked.last()
    assert isinstance(last, Fail)
    assert last.code == "worker_failed"
    await router.somebody()


async def test_a_deadline_counts_for_bodies(start, router):
    await start(slots=1)
    request = whole(27, deadline=time.time() + 1.0)
    asked = await begin(router, request, encode(request))
    last = await asked.last()
    assert isinstance(last, Fail)
    assert last.code == "deadline_exceeded"
    await router.somebody()


async def test_a_cancel_ends_a_body(start, router):
    await start(slots=1)
    request = whole(28)
    data = encode(request)
    asked = await begin(router, request, data)
    await router.nobody()
    await router.cancel("worker-1", 28)
    await router.somebody()
    await send_chunks(router, 28, data)
    assert isinstance(await (await router.ask("tokens=1")).last(), End)
    assert len(asked.frames) == 1


async def test_a_body_of_another_request_is_refused(start, router):
    await start()
    request, other = whole(29), whole(30)
    data = encode(other)
    asked = await begin(router, request, data)
    await send_chunks(router, 29, data)
    last = await asked.last()
    assert isinstance(last, Fail)
    assert last.code == "invalid_value"


async def test_a_body_that_is_no_request_is_refused(start, router):
    await start()
    asked = await begin(router, whole(31), b"\xc1" * SIZE)
    await send_chunks(router, 31, b"\xc1" * SIZE)
    last = await asked.last()
    assert isinstance(last, Fail)
    assert last.code == "invalid_value"


async def test_more_than_was_announced_is_refused(start, router):
    await start()
    request = whole(32)
    asked = await begin(router, request, b"x" * (SIZE - 1))
    await router.chunk("worker-1", 32, 0, b"x" * SIZE)
    last = await asked.last()
    assert isinstance(last, Fail)
    assert "announced" in last.message


async def test_a_body_beyond_the_limit_is_refused_with_the_number(start, router):
    await start()
    request = whole(33, size=1)
    asked = await router.send(head(request, 9 * 1024 * 1024), 33, "tiny")
    last = await asked.last()
    assert isinstance(last, Fail)
    assert last.code == "payload_too_large"
    assert str(8 * 1024 * 1024) in last.message


async def test_bodies_hold_a_bounded_number_of_bytes(start, router):
    await start(slots=16)
    size = 8 * 1024 * 1024
    answers = []
    for attempt in range(40, 50):
        asked = await router.send(head(whole(attempt, size=1), size), attempt, "tiny")
        answers.append(await asked.first())
    assert [type(answer) for answer in answers] == [Accepted] * 8 + [Busy] * 2


async def test_an_attempt_whose_body_another_model_awaits_is_none(start, router):
    await start("tiny", "other", slots=1)
    request = whole(77)
    data = encode(request)
    asked = await begin(router, request, data)
    twin = msgspec.structs.replace(request, model="other")
    await router.send(head(twin, len(data)), 77, "other", worker="worker-1")
    await router.beat("worker-1", lambda beat: beat.dropped == 1)
    # It has taken no slot there, and nothing from the first.
    await (await router.ask("tokens=1", model="other")).last()
    await send_chunks(router, 77, data)
    await asked.last()
    assert asked.text == "t0 t1 "
