"""Workers that cannot hold a model alone, with engine processes that play one: groups of them."""

import asyncio
import os
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest
from layered_gguf import write_layers
from router_side import RouterSide

from shared import subjects
from shared.groups import Group, Part, StageState
from shared.kv import ROLES, Kv
from shared.leases import Lease
from shared.presence import Beat
from shared.protocol import End, Fail, Handback
from shared.replicas import Timing
from worker import stages
from worker.gguf_header import estimate_memory, read_header
from worker.link import EngineConfig, Ready
from worker.outlook import Outlook
from worker.part import prepare_part

pytestmark = pytest.mark.nats

BRISK = Timing(idle_after=1.0, evict_after=0.3, least_stay=0.3, settle=0.3)
LAYERS = 8
ROOM = 8 << 20
"""Bytes: too few for the model, which takes some 12 MB, and enough for half of it."""
SMALL = {"context": 256, "slots": 1, "prefix_memory": 0, "speculation": "off", "memory": ROOM}


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Decide as soon as the settings are known; cut into a folder of the test's own."""
    monkeypatch.setattr(Outlook, "complete", property(lambda outlook: outlook.settings.known))
    monkeypatch.setenv("MESH_CACHE_DIR", str(tmp_path / "cache"))


def write_model(path: Path, *, layers: int = LAYERS, rows: int = 1024) -> Path:
    """A model that is too large for one worker, or with fewer layers its draft."""
    return write_layers(path, layers=layers, rows=rows, tokens=64)


@pytest.fixture
def write_gguf() -> Callable[[Path], Path]:
    """Write a model that is too large for one worker."""
    return write_model


class Side(RouterSide):
    """And what they hear."""

    def __init__(self, router: Any) -> None:
        super().__init__(router.bus)
        self.router = router

    def group(self, model: str) -> Group | None:
        entry = self.leases.get(subjects.lease_key(model, 0))
        if entry is None or entry.value is None:
            return None
        return msgspec.json.decode(entry.value, type=Lease).group

    async def formed(self, model: str, *, other_than: str = "") -> Group:
        """The group, once its head serves and all its stages are ready."""
        async with asyncio.timeout(30):
            while True:
                group = self.group(model)
                if group is not None and group.id != other_than and self.complete(group):
                    return group
                await asyncio.sleep(0.02)

    def complete(self, group: Group) -> bool:
        return all(
            any(
                stage.group == group.id and stage.state == "ready"
                for stage in self.last(worker).stages
            )
            for worker in group.workers
        )

    def last(self, worker: str) -> Beat:
        """What a worker has told last."""
        mine = (beat for beat in reversed(self.router.beats) if beat.worker == worker)
        return next(mine, Beat(worker, "standby", 0))


@pytest.fixture
async def side(router: Any) -> AsyncIterator[Side]:
    side = Side(router)
    async with side.running():
        yield side


def member(group: Group) -> str:
    (name,) = [worker for worker in group.workers if worker != group.head.worker]
    return name


async def both(start: Any, model: str) -> list[Any]:
    """Two workers whose operator has named the model."""
    return [
        await start(model, name=name, ready=False, timing=BRISK, **SMALL)
        for name in ("worker-1", "worker-2")
    ]


def heads(running: list[Any]) -> list[int]:
    """Process ids of the heads' engines."""
    return [pid for one in running for pid in one.agent.engine_pids.values()]


def stage_processes(running: list[Any]) -> list[psutil.Process]:
    """Engines beside those of heads."""
    others = heads(running)
    return [
        child
        for child in psutil.Process().children(recursive=True)
        if "fake_engine.py" in " ".join(child.cmdline()) and child.pid not in others
    ]


async def test_what_is_asked_for_is_carried_by_two_and_let_go_of_without_use(
    start: Any, router: Any, side: Side, unique: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stages, "KEEP_SECONDS", 0.5)
    for name in ("worker-1", "worker-2"):
        await start(unique, name=name, standby=True, timing=BRISK, **SMALL)
        beat = await router.beat(name, lambda beat: bool(beat.parts))
        assert beat.able == ()
        assert [part.name for part in beat.parts] == [unique]
    side.ledger.waits(unique, time.time())
    group = await side.formed(unique)
    first, head = group.parts
    assert (first.start, first.stop, head.stop) == (0, head.start, LAYERS)
    assert {first.worker, head.worker} == {"worker-1", "worker-2"}
    assert all(part.memory <= ROOM for part in group.parts)
    (stage,) = side.last(first.worker).stages
    assert (stage.model, stage.start, stage.stop, stage.memory) == (
        *(unique, first.start, first.stop),
        first.memory,
    )
    side.ledger.waits_no_more(unique, time.time())
    assert isinstance(await (await router.ask("tokens=2", model=unique)).last(), End)
    for worker in group.workers:
        await router.beat(worker, lambda beat: not (beat.models or beat.stages))
    assert side.group(unique) is None


async def test_what_an_operator_has_named_is_carried_without_demand(
    start: Any, router: Any, side: Side, unique: str
) -> None:
    await both(start, unique)
    group = await side.formed(unique)
    assert isinstance(await (await router.ask("tokens=2", model=unique)).last(), End)
    await asyncio.sleep(BRISK.idle_after + 1.0)
    assert side.group(unique) == group
    change = side.last(group.head.worker).changes[-1]
    assert change.reason == f"at least 1; with {member(group)}"


@pytest.mark.parametrize("room", [8 << 20, 10 << 20])
async def test_the_head_has_a_draft_beside_its_part_where_it_has_the_room(
    start: Any, router: Any, side: Side, unique: str, tmp_path: Path, room: int
) -> None:
    for name in ("worker-1", "worker-2"):
        draft = write_model(tmp_path / name / f"small-{unique}.gguf", layers=1, rows=64)
    memory = estimate_memory(read_header(draft), cells=256, step_tokens=256)
    asked = SMALL | {"speculation": "auto", "memory": room}
    for name in ("worker-1", "worker-2"):
        await start(unique, name=name, standby=True, timing=BRISK, **asked)
        await router.beat(name, lambda beat: bool(beat.parts))
    side.ledger.waits(unique, time.time())
    group = await side.formed(unique)
    (state,) = side.last(group.head.worker).models
    beside = state.memory - group.head.memory
    assert beside == (memory if room == 10 << 20 else 0)
    assert state.memory <= room
    assert (beside == 0) == (room - group.head.memory < memory)
    assert isinstance(await (await router.ask("tokens=2", model=unique)).last(), End)
    side.ledger.waits_no_more(unique, time.time())


async def test_a_part_that_is_lost_ends_the_group_and_another_is_formed(
    start: Any, router: Any, side: Side, unique: str
) -> None:
    running = await both(start, unique)
    group = await side.formed(unique)
    stream = await router.ask("tokens=500 every=0.05", model=unique)
    await stream.until(lambda asked: len(asked.frames) > 2)
    (stage,) = stage_processes(running)
    (head,) = heads(running)
    stage.kill()
    end = await stream.last()
    assert isinstance(end, Fail)
    assert end.lost
    again = await side.formed(unique, other_than=group.id)
    # Who is left has what it had.
    assert again.parts == group.parts
    assert heads(running) == [head]
    # What the head had still said of the answer that is over was not passed on.
    assert stream.frames[-1] is end
    assert isinstance(await (await router.ask("tokens=2", model=unique)).last(), End)
    assert "killed by SIGKILL" in side.last(group.head.worker).changes[-2].reason


async def test_when_the_head_is_lost_the_others_keep_what_is_loaded(
    start: Any, router: Any, side: Side, unique: str
) -> None:
    running = await both(start, unique)
    group = await side.formed(unique)
    (stage,) = stage_processes(running)
    (head,) = heads(running)
    os.kill(head, 9)
    again = await side.formed(unique, other_than=group.id)
    assert again.parts == group.parts
    assert stage_processes(running) == [stage]


async def test_a_part_that_is_on_its_way_is_part_of_the_next_group(
    start: Any, side: Side, unique: str, monkeypatch: pytest.MonkeyPatch, eventually: Any
) -> None:
    begun, go_on = 0, asyncio.Event()

    async def slowly(*given: Any, **more: Any) -> EngineConfig:
        nonlocal begun
        begun += 1
        await go_on.wait()
        return await prepare_part(*given, **more)

    monkeypatch.setattr(stages, "prepare_part", slowly)
    running = await both(start, unique)
    await eventually(lambda: begun and heads(running) and None not in heads(running))
    group = side.group(unique)
    assert group is not None
    (head,) = heads(running)
    os.kill(head, 9)
    await eventually(lambda: (now := side.group(unique)) is not None and now.id != group.id)
    go_on.set()
    again = await side.formed(unique, other_than=group.id)
    assert again.parts == group.parts
    assert begun == 1
    assert len(stage_processes(running)) == 1


async def test_a_worker_that_leaves_is_waited_for(
    start: Any, router: Any, side: Side, unique: str
) -> None:
    running = await both(start, unique)
    group = await side.formed(unique)
    stream = await router.ask("tokens=40 every=0.05", model=unique)
    await stream.until(lambda asked: len(asked.frames) > 2)
    (leaving,) = [one for one in running if one.name == member(group)]
    leaving.agent.stop()
    end = await stream.last()
    assert isinstance(end, End)
    # It was offered to others, of which there are none.
    assert any(isinstance(frame, Handback) for frame in stream.frames)
    async with asyncio.timeout(20):
        await leaving.task
    assert side.last(group.head.worker).changes[-1].reason == f"{leaving.name} leaves"


async def test_workers_that_are_too_small_together_say_so(
    start: Any, router: Any, side: Side, unique: str
) -> None:
    for name in ("worker-1", "worker-2"):
        await start(unique, name=name, ready=False, timing=BRISK, **(SMALL | {"memory": 5 << 20}))
    for name in ("worker-1", "worker-2"):
        beat = await router.beat(name, lambda beat: any(part.missing for part in beat.parts))
        (part,) = beat.parts
        assert "no host holds it alone" in part.missing
        assert part.pinned
    assert side.group(unique) is None


async def test_files_that_differ_are_not_joined(
    start: Any,
    router: Any,
    side: Side,
    unique: str,
    write_gguf: Callable[[Path], Path],
    tmp_path: Path,
) -> None:
    write_gguf(tmp_path / "worker-1" / f"{unique}.gguf")
    other = tmp_path / "worker-2" / f"{unique}.gguf"
    write_gguf(other)
    data = other.read_bytes()
    other.write_bytes(data.replace(b"t63", b"u63"))
    await both(start, unique)
    for name in ("worker-1", "worker-2"):
        await router.beat(name, lambda beat: any(part.missing for part in beat.parts))
    assert side.group(unique) is None


async def test_of_two_groups_that_are_formed_at_once_one_gets_the_memory(
    start: Any,
    router: Any,
    side: Side,
    unique: str,
    monkeypatch: pytest.MonkeyPatch,
    connect: Callable[..., Any],
) -> None:
    """Heads that do not know of each other count on the same worker."""
    monkeypatch.setattr(stages, "ROOM_SECONDS", 0.5)
    a, b = f"{unique}-a", f"{unique}-b"
    await start(a, b, standby=True, timing=BRISK, **SMALL)
    beat = await router.beat("worker-1", lambda beat: len(beat.parts) == 2)
    heads = Kv(await connect("worker-2"))
    now = time.time()
    for part in beat.parts:
        parts = (Part("worker-1", 0, 4, ROOM * 2 // 3), Part("worker-2", 4, LAYERS, 1))
        group = Group(part.name[-1], part.digest, parts, 1, 256, 32)
        lease = Lease("worker-2", now, now, "loading", group)
        key = subjects.lease_key(part.name, 0)
        await heads.tell(ROLES, key, msgspec.json.encode(lease), 0)
    beat = await router.beat(
        "worker-1", lambda beat: {s.state for s in beat.stages} == {"ready", "failed"}
    )
    (failed,) = [stage for stage in beat.stages if stage.state == "failed"]
    assert failed.detail == "there is no memory left for it"
    for part in beat.parts:
        await heads.tell(ROLES, subjects.lease_key(part.name, 0), None)


async def test_a_part_that_loads_when_its_group_ends_is_part_of_the_next(
    start: Any,
    router: Any,
    side: Side,
    unique: str,
    connect: Callable[..., Any],
    eventually: Callable[..., Any],
) -> None:
    """As of a worker that was started anew, and finds the lease of the group that it has left."""
    (running,) = [await start(f"slow-{unique}", standby=True, timing=BRISK, **SMALL)]
    beat = await router.beat("worker-1", lambda beat: len(beat.parts) == 1)
    (part,) = beat.parts
    head = Kv(await connect("worker-2"))
    key = subjects.lease_key(part.name, 0)

    async def lead(identity: str) -> None:
        parts = (Part("worker-1", 0, 4, ROOM * 2 // 3), Part("worker-2", 4, LAYERS, 1))
        group = Group(identity, part.digest, parts, 1, 256, 32)
        lease = Lease("worker-2", time.time(), time.time(), "loading", group)
        await head.tell(ROLES, key, msgspec.json.encode(lease))

    def states(beat: Beat) -> list[tuple[str, str]]:
        return [(stage.group, stage.state) for stage in beat.stages]

    await lead("first")
    await eventually(lambda: stage_processes([running]))
    (process,) = stage_processes([running])
    await head.tell(ROLES, key, None)
    await router.beat("worker-1", lambda beat: states(beat) == [("", "kept")])
    await lead("second")
    await router.beat("worker-1", lambda beat: states(beat) == [("second", "ready")])
    assert stage_processes([running]) == [process]
    assert not [beat for beat in router.beats if ("first", "ready") in states(beat)]
    await head.tell(ROLES, key, None)


def test_what_is_promised_counts_and_what_is_kept_does_not() -> None:
    states = ("loading", "ready", "failed", "kept")
    taken = [StageState("g", "m", 0, 1, 7, state).taken for state in states]
    assert taken == [7, 7, 0, 0]


def test_what_the_engine_of_a_part_advises_is_told() -> None:
    parts = (Part("worker-1", 0, 4, 1), Part("worker-2", 4, LAYERS, 1))
    carried = stages._Carried("m", Group("g", "d", parts, 1, 256, 32), parts[0], lambda: None)
    carried.on_ready(Ready(context=256, slots=1, threads=1, advice="the CPU computes it"))
    assert (carried.told.state, carried.told.detail) == ("ready", "the CPU computes it")
