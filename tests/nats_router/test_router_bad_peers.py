"""A worker that has gone bad: what it sends harms no stream but its own, and is counted."""

import asyncio
import contextlib
import itertools
import json
import os
import random
import time
from urllib.parse import unquote, urlsplit

import httpx
import msgspec
import pytest
from scripted_worker import WAIT
from test_router_streaming import events

from shared import subjects
from shared.presence import Beat, LoadableModel, ModelState, RoleChange, decode_beat, encode_beat
from shared.protocol import (
    Accepted,
    Busy,
    Delta,
    Done,
    EmbedResult,
    End,
    Fail,
    Handback,
    Timings,
    TokenLogprob,
    ToolDelta,
    Usage,
    decode_frames,
    encode,
)
from tests.mutations import Mutator

pytestmark = pytest.mark.nats

CHAT = "/v1/chat/completions"
WORDS = [f"t{number} " for number in range(30)]


def frames(attempt: int) -> list[list]:
    """What an honest worker may say of an attempt, by message."""
    top = TokenLogprob(4, -2.5, "b", b"b")
    logprobs = (TokenLogprob(3, -0.5, "a", b"a", (top,)),)
    return [
        [Accepted(attempt, "worker-2", 3)],
        [Busy(attempt, "worker-2", 2.5, "full")],
        [Delta(attempt, 0, 0, (3,), "a", logprobs), Delta(attempt, 0, 1, (300, 70_000), " word")],
        [Delta(attempt, 0, 0, (5,), "", (), (ToolDelta(0, "call_1", "f", '{"a":'),), "because")],
        [Delta(attempt, 1, 0, (5,), "x")],
        [Done(attempt, 0, 3, "stop", "\n"), End(attempt, Usage(5, 3), Timings(0.1, 2.0, 3.0))],
        [EmbedResult(attempt, (b"\0\0\x80?" * 4,), Usage(5, 0))],
        [Fail(attempt, "invalid_value", "no", "messages", 3)],
        [Fail(attempt, "worker_failed", "the engine died", lost=True)],
        [Handback(attempt)],
    ]


def beat(model: str, sequence: int) -> bytes:
    """What the worker tells of itself."""
    state = ModelState(model, "ready", 4, 3, 1, 8, 2048, 0.2, 31.5, created=1, size=2**27)
    able = LoadableModel(model, 2**28, 2048, 4, 2**27, 1, aliases=("alias-of-it",))
    return encode_beat(
        Beat(
            "worker-2",
            "ready",
            sequence,
            (state,),
            host="h",
            started=1.0,
            memory_total=2**33,
            memory_used=2**32,
            able=(able,),
            memory_budget=2**32,
            changes=(RoleChange(1.0, model, "promote", "wanted"),),
        )
    )


def readable(decode, data: bytes) -> bool:
    try:
        decode(data)
    except msgspec.DecodeError:
        return False
    return True


def counted(metrics: str, name: str) -> float:
    return sum(float(line.split()[-1]) for line in metrics.splitlines() if line.startswith(name))


def text_of(answer):
    *chunks, last = events(answer.text)
    assert last == "[DONE]"
    return "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks)


async def slowly(job):
    await job.accept()
    for word in WORDS:
        await job.send(job.delta(word))
        await asyncio.sleep(0.01)
    await job.send(job.done(), job.end())


async def ask_for_ever(http, url, body, ends):
    """One request after the other; each must end, somehow."""
    while True:
        answer = await http.post(url, json=body, headers={"x-request-timeout": "2"})
        ends.append(answer.status_code)
        if answer.status_code != 200:
            # What the worker says of its own failure may be anything.
            assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


async def stream_for_ever(http, url, body, told):
    while True:
        answer = await http.post(url, json=body)
        assert answer.status_code == 200, answer.text
        told.append(text_of(answer))


@contextlib.asynccontextmanager
async def beside(*works):
    tasks = [asyncio.create_task(work) for work in works]
    try:
        yield
        for task in tasks:
            if task.done():
                task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


@pytest.mark.parametrize(
    "count", [4_000, pytest.param(100_000, marks=[pytest.mark.chaos, pytest.mark.timeout(900)])]
)
async def test_whatever_a_worker_sends_nothing_breaks_but_its_own(
    start_router, start_worker, http, chat, unique, eventually, monkeypatch, count
):
    # What is given up before a worker has named itself is remembered for so long.
    monkeypatch.setattr("router.orphan.ORPHAN_LIFE", 2.0)
    seed = int(os.environ.get("MESH_CHAOS_SEED", random.randrange(10**6)))
    print(f"seed {seed}")
    other = f"{unique}-other"
    router = await start_router()
    own: list[int] = []

    async def hold(job):
        own.append(job.attempt)
        await job.accept()

    await start_worker(slowly, name="worker-1")
    bad = await start_worker(hold, name="worker-2", model=other, slots=64, free=64)
    bad.beating = False
    tasks = len(asyncio.all_tasks())
    ends: list[int] = []
    told: list[str] = []
    url = f"{router.url}{CHAT}"
    stray = random.Random(seed)
    mutator, beats = Mutator(seed), Mutator(seed + 1, json=True)
    unread = {"frames": 0, "beat": 0, "misnamed_beat": 0}

    async with httpx.AsyncClient(timeout=WAIT, trust_env=False) as bads:
        lives = [stream_for_ever(http, url, chat(stream=True), told) for _ in range(3)]
        bodies = [chat(model=other, stream=stream) for stream in (True, False)]
        lives += [ask_for_ever(bads, url, body, ends) for body in bodies]
        async with beside(*lives):
            reply = (await bad.job()).reply
            began = time.monotonic()
            # How many requests so many messages end depends on the machine's speed.
            for number in itertools.count():
                if number >= count and len(ends) > count // 1000:
                    break
                if number % 100 == 99:
                    data = beats.mutate(beat(other, number))
                    await bad.bus.publish(subjects.beat("worker-2"), data)
                    if not readable(decode_beat, data):
                        unread["beat"] += 1
                    elif decode_beat(data).worker != "worker-2":
                        unread["misnamed_beat"] += 1
                    # It stays one that is asked.
                    await bad.beat()
                    for path in ("/v1/models", "/metrics"):
                        assert (await http.get(f"{router.url}{path}")).status_code == 200
                    continue
                attempt = own[-1] if number % 2 else stray.getrandbits(63)
                data = mutator.mutate(encode(stray.choice(frames(attempt))))
                unread["frames"] += not readable(decode_frames, data)
                await bad.bus.publish(reply, data)
                if number % 50 == 0:
                    await bad.bus.barrier()
                    await asyncio.sleep(0)
            await bad.bus.barrier()
            await router.dispatcher.bus.barrier()
            begun = len(told)
            await eventually(lambda: len(told) >= begun + 3)
        print(f"{number} messages in {time.monotonic() - began:.1f} s, {unread} unreadable")
        print(f"{len(told)} streams beside, {len(ends)} of its own: {sorted(set(ends))}")

    assert unread["frames"] > count // 5
    assert set(told) == {"".join(WORDS)}
    metrics = (await http.get(f"{router.url}/metrics")).text
    for kind, number in unread.items():
        assert counted(metrics, f'mesh_dropped_messages_total{{kind="{kind}"}}') == number, kind
    assert counted(metrics, "mesh_stray_frames_total ") > 0
    # Nothing is left of it: what its own requests began has ended, too.
    await eventually(lambda: not len(router.dispatcher.inbox))
    await eventually(lambda: len(asyncio.all_tasks()) <= tasks)
    assert not router.dispatcher.watched


async def test_who_answers_in_anothers_name_is_not_believed(router, start_worker, http, chat):
    """What goes wrong with the answer would be put down to the other one."""

    async def script(job):
        await job.send(Accepted(job.attempt, "worker-9"))
        await job.send(Busy(job.attempt, "worker-9", 60.0, "full"))
        await job.speak("its ", "own")

    worker = await start_worker(script=script)
    await worker.group.leave()

    answer = await http.post(f"{router.url}{CHAT}", json=chat())

    assert [job.door for job in worker.jobs] == ["direct"]
    assert answer.json()["choices"][0]["message"]["content"] == "its own"
    metrics = (await http.get(f"{router.url}/metrics")).text
    assert counted(metrics, 'mesh_dropped_messages_total{kind="misnamed"}') == 2


async def test_who_was_out_of_it_cannot_speak_in_the_answer(router, start_worker, http, chat):
    """It knows the attempt that it was asked with, and may publish where the answer goes."""
    forged = asyncio.Event()

    async def refuse(job):
        await job.send(job.busy())
        await forged.wait()
        for frames in (
            [Accepted(job.attempt, "worker-2")],
            [job.delta("evil "), job.done(), job.end()],
            [job.failure("invalid_value", "evil")],
            [job.failure("worker_failed", "evil", lost=True)],
            [job.handback()],
        ):
            await job.send(*frames)
        await job.worker.bus.barrier()

    async def speak(job):
        await job.accept()
        await job.send(job.delta("good "))
        forged.set()
        await asyncio.sleep(0.3)
        await job.send(job.delta("text"), job.done(), job.end())

    # The one with more room is asked first.
    bad = await start_worker(refuse, name="worker-2", slots=8, free=8)
    good = await start_worker(speak, name="worker-1", slots=4, free=1)
    answer = await http.post(f"{router.url}{CHAT}", json=chat(stream=True))

    assert (len(bad.jobs), len(good.jobs)) == (1, 1)
    assert text_of(answer) == "good text"
    assert router.dispatcher.inbox.strays == 7
    assert not good.cancels


class Raw:
    """A connection to NATS of which the bytes are ours."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    def send(self, line: str, payload: bytes | None = None) -> None:
        self.writer.write(line.encode() + b"\r\n")
        if payload is not None:
            self.writer.write(payload + b"\r\n")

    async def until(self, word: str) -> str:
        """The next line that begins with the word."""
        async with asyncio.timeout(WAIT):
            while line := (await self.reader.readline()).decode():
                if line.startswith(word):
                    return line
        raise AssertionError(f"the connection ended before {word}")


@contextlib.asynccontextmanager
async def raw(server, name):
    parts = urlsplit(server.url_for(name))
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    wire = Raw(reader, writer)
    login = {"user": unquote(parts.username), "pass": unquote(parts.password)}
    options = {"verbose": False, "pedantic": False, "headers": True, "no_responders": True}
    wire.send("CONNECT " + json.dumps(options | login))
    wire.send("PING")
    await wire.until("PONG")
    try:
        yield wire
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


async def test_nobody_makes_up_a_status_for_another_s_request(
    router, nats_server, start_worker, http, chat
):
    """Clients can write what only the server should: that nobody takes the request."""
    forged = asyncio.Event()

    async def speak(job):
        await asyncio.wait_for(forged.wait(), WAIT)
        await job.speak("good ", "text")

    worker = await start_worker(speak, name="worker-1")
    async with raw(nats_server, "worker-2") as bad:
        asked = asyncio.create_task(http.post(f"{router.url}{CHAT}", json=chat(stream=True)))
        job = await worker.job()
        status = b"NATS/1.0 503\r\n\r\n"
        bad.send(f"HPUB {job.reply} {len(status)} {len(status)}", status)
        refused = await bad.until("-ERR")
        forged.set()
        answer = await asked

    assert "Permissions Violation" in refused
    assert text_of(answer) == "good text"
    assert len(worker.jobs) == 1


async def test_what_is_too_large_or_no_protocol_cuts_its_sender_alone(
    router, nats_server, start_worker, http, chat
):
    await start_worker()
    size = router.dispatcher.bus.max_payload + 1
    async with raw(nats_server, "worker-2") as bad:
        bad.send(f"PUB {subjects.beat('worker-2')} {size}")
        assert "Maximum Payload" in await bad.until("-ERR")
    async with raw(nats_server, "worker-2") as bad:
        bad.send("PUBLISH all of it")
        assert "Unknown Protocol" in await bad.until("-ERR")
    answer = await http.post(f"{router.url}{CHAT}", json=chat(stream=True))
    assert text_of(answer) == "Hello"
