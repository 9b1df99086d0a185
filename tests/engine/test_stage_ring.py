"""Engines in a ring over a real NATS server: they answer as one does; and what breaks a ring."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path

import msgspec
import pytest
import pytest_asyncio
from asking import PERSON, frames_of, idle, request, text_of, tokens_of
from engine_driver import EngineDied, EngineDriver

from shared.broker import NatsServer
from shared.broker_config import ring_url, ring_user
from shared.protocol import Constraint, Sampling
from worker.cut_file import make_stage
from worker.link import RingPlace
from worker.model_bytes import FileBytes
from worker.stage_cut import Wanted

pytestmark = [pytest.mark.model, pytest.mark.nats]

WORKERS = ("worker-1", "worker-2", "worker-3")
CUTS = (0, 11, 22, 30)
SIZE = {"slots": 4, "context": 512, "threads": 1, "step_tokens": 128}


def place_of(nats: NatsServer, group: str, index: int, *, timeout: float = 5.0) -> RingPlace:
    worker = WORKERS[index]
    return RingPlace(
        group=group,
        workers=WORKERS,
        index=index,
        nats=ring_url(nats.url_for(worker)),
        identity=ring_user(worker),
        half=False,
        timeout=timeout,
    )


class Ring:
    """Three stages of the real model; `head` is asked like any engine."""

    def __init__(self, nats: NatsServer, model: Path, group: str) -> None:
        self.engines: list[EngineDriver] = []
        for index in range(len(WORKERS)):
            head = index == len(WORKERS) - 1
            wanted = Wanted(CUTS[index], CUTS[index + 1], head=head)
            stages = model.parent / "stages"
            made = make_stage(FileBytes(model), wanted, stages, progress=lambda *_: None)
            engine = EngineDriver(str(made.path), **SIZE)
            engine.config = msgspec.structs.replace(
                engine.config, ring=place_of(nats, group, index)
            )
            self.engines.append(engine)
        self.head = self.engines[-1]

    async def start(self) -> None:
        async with asyncio.TaskGroup() as group:
            for engine in self.engines:
                group.create_task(engine.start())

    async def stop(self) -> None:
        for engine in reversed(self.engines):
            await engine.stop()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def ring(nats_server: NatsServer, q4_0: Path) -> AsyncIterator[Ring]:
    made = Ring(nats_server, q4_0, f"ring-{os.getpid()}")
    await made.start()
    yield made
    await made.stop()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def whole(q4_0: Path) -> AsyncIterator[EngineDriver]:
    engine = EngineDriver(str(q4_0), **SIZE)
    await engine.start()
    yield engine
    await engine.stop()


THINGS = ("the sea", "a violin", "bread", "a train that is late", "winter", "the number seven")
KINDS = {
    "greedy": {},
    "drawn": {"sampling": Sampling(seed=11, temperature=0.9, top_p=0.95)},
    "schema": {
        "sampling": Sampling(seed=3, temperature=0.9),
        "constraint": Constraint("json_schema", PERSON),
    },
    "two choices": {"sampling": Sampling(seed=5, temperature=0.8), "n": 2},
}


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("kind", KINDS)
async def test_a_ring_answers_as_the_whole_model_does(
    ring: Ring, whole: EngineDriver, kind: str
) -> None:
    """Several at once, more than there are slots."""

    async def answers(engine: EngineDriver) -> list[list[str]]:
        asked = [request(f"Tell me about {it}.", **KINDS[kind]) for it in THINGS]
        got = await asyncio.gather(*(frames_of(engine, one) for one in asked))
        return [[text_of(frames, choice) for choice in range(asked[0].n)] for frames in got]

    alone, split = await answers(whole), await answers(ring.head)
    assert all(all(texts) for texts in split)
    equal = sum(a == b for a, b in zip(alone, split, strict=True))
    # Slots and company differ, and with them the last bits of a logit.
    assert equal >= len(THINGS) - 1


@pytest.mark.asyncio(loop_scope="module")
async def test_a_conversation_goes_on_where_it_was(ring: Ring, whole: EngineDriver) -> None:
    """Caches are copied, cut and moved at all stages alike."""
    first = "Once upon a time there was a small harbour with many boats, and every morning " * 6
    for text in (first, first + "the fishermen", first + "the gulls"):
        alone = tokens_of(await frames_of(whole, request(text)))
        assert tokens_of(await frames_of(ring.head, request(text))) == alone
    await idle(ring.head)
    stats = ring.head.stats
    assert stats is not None
    assert stats.cached_tokens > 100


@pytest.mark.asyncio(loop_scope="module")
async def test_one_that_leaves_frees_its_slot(ring: Ring) -> None:
    async for _ in ring.head.submit(request(max_tokens=300)):
        break
    await idle(ring.head)
    assert text_of(await frames_of(ring.head, request()))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=lambda n: n.name)
@pytest.mark.parametrize("lost", [0, 1])
async def test_a_stage_that_is_lost_ends_the_ring(
    nats_server: NatsServer, q4_0: Path, unique: str, number: signal.Signals, lost: int
) -> None:
    ring = Ring(nats_server, q4_0, unique)
    await ring.start()
    pid = ring.engines[lost].pid
    try:
        stream = ring.head.submit(request(max_tokens=400))
        await anext(stream)
        os.kill(pid, number)
        with pytest.raises(EngineDied):
            await asyncio.wait_for(_read_out(stream), 20)
    finally:
        if number is signal.SIGSTOP:
            os.kill(pid, signal.SIGKILL)
        await ring.stop()


async def test_those_that_are_left_of_a_ring_are_part_of_another(
    nats_server: NatsServer, q4_0: Path, unique: str
) -> None:
    """The head and a stage keep what they have loaded, and answer with another in the third place;
    the head also where it is told to leave while it waits for a stage that hangs."""
    ring = Ring(nats_server, q4_0, unique)
    await ring.start()
    first, head = ring.engines[0], ring.head
    pids = first.pid, head.pid
    lost = ring.engines[1].pid
    try:
        before = tokens_of(await frames_of(head, request("Tell me about bread.")))
        stream = head.submit(request(max_tokens=400))
        await anext(stream)
        os.kill(lost, signal.SIGKILL)
        with pytest.raises(EngineDied):
            await asyncio.wait_for(_read_out(stream), 20)
        await ring.engines[1].stop()
        ring.engines[1] = again = EngineDriver(ring.engines[1].config.path, **SIZE)
        second = [place_of(nats_server, f"{unique}-2", index, timeout=60.0) for index in range(3)]
        again.config = msgspec.structs.replace(again.config, ring=second[1])
        async with asyncio.TaskGroup() as group:
            group.create_task(again.start())
            group.create_task(first.join(second[0]))
            group.create_task(head.join(second[2]))
        assert tokens_of(await frames_of(head, request("Tell me about bread."))) == before

        stream = head.submit(request(max_tokens=400))
        await anext(stream)
        os.kill(again.pid, signal.SIGSTOP)
        await asyncio.sleep(0.5)  # the head waits for the stage that hangs
        third = [place_of(nats_server, f"{unique}-3", index) for index in range(3)]
        joining = [
            asyncio.create_task(one.join(to))
            for one, to in zip((first, head), third[::2], strict=True)
        ]
        os.kill(again.pid, signal.SIGCONT)
        joining.append(asyncio.create_task(again.join(third[1])))
        await asyncio.gather(*joining)
        await stream.aclose()
        assert tokens_of(await frames_of(head, request("Tell me about bread."))) == before
        assert (first.pid, head.pid) == pids
        await idle(head)
    finally:
        with suppress(ProcessLookupError):
            os.kill(lost, signal.SIGKILL)
        await ring.stop()


async def _read_out(stream: AsyncIterator[object]) -> None:
    async for _ in stream:
        pass


async def test_stages_that_do_not_agree_are_told_apart(
    nats_server: NatsServer, q4_0: Path, unique: str
) -> None:
    ring = Ring(nats_server, q4_0, unique)
    ring.engines[1].config = msgspec.structs.replace(ring.engines[1].config, slots=3)
    try:
        with pytest.raises(ExceptionGroup) as caught:
            await ring.start()
        assert "worker-2: slots, context and width are (3, 512, 576) here" in str(
            caught.value.exceptions[0]
        )
    finally:
        await ring.stop()
