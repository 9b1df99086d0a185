"""A router that has gone bad: what it sends harms no answer but its own, and is counted."""

import asyncio
import os
import random
import time

import msgspec
import pytest

from shared import subjects
from shared.protocol import (
    Cancel,
    ChatInput,
    Chunk,
    Constraint,
    Embed,
    Generate,
    Message,
    Resumed,
    Sampling,
    TextInput,
    TokenInput,
    Tool,
    ToolCall,
    ToolChoice,
    decode_cancel,
    decode_chunk,
    encode,
)
from tests.mutations import Mutator
from worker.intake import Rejected, read_request

pytestmark = pytest.mark.nats


def requests(attempt: int, **fields) -> list[Generate | Embed]:
    """What an honest router may ask."""
    call = ToolCall("call_1", "f", '{"a": 1}')
    turns = (
        Message("system", "be brief"),
        Message("user", "hi"),
        Message("assistant", "", tool_calls=(call,)),
        Message("tool", "2", tool_call_id="call_1"),
    )
    chat = ChatInput(turns, (Tool("f", "does it"),), ToolChoice("required"), {"think": False})
    drawn = Sampling(7, 0.8, 0.9, 40, 0.05, 1.1, 0.5, 0.5, {3: -100.0})
    same = {"id": "r", "attempt": attempt, "model": "tiny", "deadline": time.time() + 2} | fields
    return [
        Generate(input=chat, sampling=drawn, max_tokens=5, stop=("\\n",), logprobs=2, **same),
        Generate(input=TextInput("hello"), sampling=Sampling(1), n=2, owner="o", **same),
        Generate(
            input=TokenInput((1, 2, 3)),
            sampling=Sampling(1),
            constraint=Constraint("regex", "a+"),
            resume=(Resumed((4, 5)),),
            **same,
        ),
        Embed(inputs=(TextInput("a"), TokenInput((1, 2))), dimensions=3, **same),
    ]


def bad(data: bytes, headers: dict[str, str] | None) -> bool:
    read = read_request(data, headers, worker="worker-1", names=("tiny",), now=time.time())
    return isinstance(read, Rejected) and read.bad


def readable(decode, data: bytes) -> bool:
    try:
        decode(data)
    except msgspec.DecodeError:
        return False
    return True


@pytest.mark.parametrize(
    "count", [4_000, pytest.param(100_000, marks=[pytest.mark.chaos, pytest.mark.timeout(900)])]
)
async def test_whatever_a_router_sends_nothing_breaks_but_its_own(
    start, router, connect, monkeypatch, count
):
    # Bodies that were announced and never come hold their slots for so long.
    monkeypatch.setattr("worker.body.CHUNK_SECONDS", 0.3)
    seed = int(os.environ.get("MESH_CHAOS_SEED", random.randrange(10**6)))
    print(f"seed {seed}")
    running = await start("tiny", slots=64, queue=64)
    engine = await running.engine_pid()
    honest = [await router.ask("tokens=100 every=0.02") for _ in range(3)]
    for asked in honest:
        await asked.accepted()
    peer = await connect("router-2")
    tasks = len(asyncio.all_tasks())
    answers = 0

    def answered(_: object) -> None:
        nonlocal answers
        answers += 1

    await peer.subscribe(f"{peer.inbox}.r.*", answered)
    draw = random.Random(seed)
    mutator = Mutator(seed)
    expected = 0
    began = time.monotonic()
    for number in range(count):
        attempt = draw.getrandbits(63)
        kind = draw.choices(("request", "head", "cancel", "chunk", "ping"), (80, 4, 6, 8, 2))[0]
        if kind in ("request", "head"):
            fields = {"body_size": draw.randrange(1, 10**6)} if kind == "head" else {}
            data = mutator.mutate(encode(draw.choice(requests(attempt, **fields))))
            version = draw.choices(("1", "1.9", "2", "x", ""), (92, 2, 2, 2, 2))[0]
            headers = {"Mesh-Version": version} if version else None
            door = subjects.infer_direct("tiny", "worker-1")
            subject = draw.choice((subjects.infer("tiny"), door, door))
            if subject == door:
                # The group's door closes where all slots are taken; this one never does.
                expected += bad(data, headers)
            elif bad(data, headers):
                subject = door
                expected += 1
            reply = f"{peer.inbox}.r.{number}"
            await peer.publish(subject, data, reply=reply, headers=headers)
        elif kind == "cancel":
            data = mutator.mutate(encode(Cancel((attempt, attempt + 1))))
            expected += not readable(decode_cancel, data)
            await peer.publish(subjects.cancel("worker-1"), data)
        elif kind == "chunk":
            data = mutator.mutate(encode(Chunk(attempt, draw.randrange(3), b"x" * 100)))
            expected += not readable(decode_chunk, data)
            await peer.publish(subjects.body("worker-1"), data)
        else:
            reply = draw.choice(("", f"{peer.inbox}.q.{number}", "a.b", "x" * 300))
            await peer.publish(subjects.ping("worker-1"), mutator.mutate(b"1"), reply=reply)
        if number % 50 == 0:
            await peer.barrier()
            await asyncio.sleep(0)
    await peer.barrier()
    print(f"{count} messages in {time.monotonic() - began:.1f} s, {expected} of no use")

    for asked in honest:
        await asked.last()
        assert asked.text == "".join(f"t{number} " for number in range(100))
    assert expected > count // 4
    assert answers > count // 4
    beat = await router.beat("worker-1", lambda beat: beat.dropped >= expected)
    assert beat.dropped == expected
    await router.model("worker-1", lambda model: model.free == 64 and not model.queued)
    last = await router.ask("tokens=2")
    await last.last()
    assert last.text == "t0 t1 "
    assert await running.engine_pid() == engine
    assert not running.task.done()
    assert len(asyncio.all_tasks()) <= tasks
