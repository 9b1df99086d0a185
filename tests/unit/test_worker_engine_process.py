"""The supervisor of one engine, with a child that plays one."""

import asyncio
import sys
import time
from pathlib import Path

import pytest

from shared.protocol import Generate, Sampling, TextInput, encode
from worker.engine_process import EngineGaveUp, EngineProcess
from worker.link import EngineConfig, Ready, RingPlace, Step, Submit

FAKE_ENGINE = Path(__file__).parents[1] / "nats_worker" / "fake_engine.py"
RING = RingPlace(group="g", workers=("a",), index=0, nats="nats://127.0.0.1:1", identity="a")


class Told:
    """What an owner is told, in order."""

    def __init__(self) -> None:
        self.ready = asyncio.Event()
        self.stepped = asyncio.Event()
        self.steps = 0
        self.lost: list[str] = []

    def on_loading(self, progress: float) -> None:
        pass

    def on_ready(self, ready: Ready) -> None:
        self.ready.set()

    def on_step(self, step: Step) -> None:
        self.steps += 1
        self.stepped.set()

    def on_lost(self, reason: str) -> None:
        self.lost.append(reason)


async def test_what_a_killed_engine_had_still_said_is_not_heard(tmp_path: Path) -> None:
    told = Told()
    config = EngineConfig(path=str(tmp_path), model="tiny", worker="worker-1", slots=1, ring=RING)
    engine = EngineProcess(config, told, command=(sys.executable, str(FAKE_ENGINE)))
    running = asyncio.create_task(engine.run())
    async with asyncio.timeout(20):
        await told.ready.wait()
        request = Generate(
            id="request-1",
            attempt=1,
            model="tiny",
            input=TextInput("tokens=100000 every=0.002"),
            sampling=Sampling(seed=1),
            deadline=time.time() + 60,
        )
        engine.submit(Submit("inbox.r.1", encode(request), time.time()))
        await told.stepped.wait()
        # The engine goes on meanwhile, and its steps wait to be read.
        time.sleep(0.1)  # noqa: ASYNC251
        before = told.steps
        engine.kill()
        with pytest.raises(EngineGaveUp, match="SIGKILL"):
            await running
    assert told.steps == before
    assert len(told.lost) == 1
