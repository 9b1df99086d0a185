"""Agents in this process, with real engine processes that only play one, on a real nats-server."""

import asyncio
import random
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import psutil
import pytest

from shared import subjects
from shared.broker import NatsServer
from shared.bus import Bus, BusMessage
from shared.presence import Beat, ModelState, decode_beat
from shared.protocol import (
    Accepted,
    Busy,
    Cancel,
    Chunk,
    EmbedResult,
    End,
    Fail,
    Frame,
    Generate,
    Sampling,
    TextInput,
    decode_frames,
    encode,
)
from shared.replicas import DEFAULT_TIMING, Timing
from worker.agent import Agent, AgentSettings
from worker.catalog import read_catalog
from worker.preparing import ServingSettings

FAKE_ENGINE = (sys.executable, str(Path(__file__).with_name("fake_engine.py")))
WAIT = 20.0
"""Only keeps a broken test from hanging."""


@pytest.fixture
def write_gguf() -> Callable[[Path], Path]:
    """Write a real, tiny GGUF."""

    def write(path: Path) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_block_count(1)
        writer.add_context_length(2048)
        writer.add_embedding_length(32)
        writer.add_head_count(1)
        writer.add_tensor("token_embd.weight", np.zeros((4, 32), dtype=np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return write


class Asked:
    """One attempt of a test's router and what came back for it."""

    def __init__(self, attempt: int, reply: str) -> None:
        self.attempt = attempt
        self.reply = reply
        self.frames: list[Frame] = []
        self.no_responders = False
        self.moved = asyncio.Event()

    async def until(self, condition: Callable[["Asked"], bool]) -> "Asked":
        async with asyncio.timeout(WAIT):
            while not condition(self):
                self.moved.clear()
                await self.moved.wait()
        return self

    async def first(self) -> Frame:
        await self.until(lambda asked: bool(asked.frames))
        return self.frames[0]

    async def accepted(self) -> Accepted:
        frame = await self.first()
        assert isinstance(frame, Accepted), frame
        return frame

    async def last(self) -> Frame:
        """The frame that ends the attempt."""
        await self.until(lambda asked: asked.ended)
        return self.frames[-1]

    @property
    def ended(self) -> bool:
        return bool(self.frames) and isinstance(self.frames[-1], Busy | End | EmbedResult | Fail)

    @property
    def text(self) -> str:
        return "".join(getattr(frame, "text", "") for frame in self.frames)


class Router:
    """Asks workers as a router does, and listens to their beats."""

    def __init__(self, bus: Bus) -> None:
        self.bus = bus
        self.asked: dict[int, Asked] = {}
        self.replies: dict[str, Asked] = {}
        self.beats: list[Beat] = []
        self.beaten = asyncio.Event()

    async def open(self) -> None:
        await self.bus.subscribe(f"{self.bus.inbox}.r.*", self._on_reply)
        await self.bus.subscribe(subjects.BEATS, self._on_beat)
        await self.bus.barrier()

    async def ask(
        self,
        prompt: str,
        *,
        model: str = "tiny",
        worker: str = "",
        version: str = "1",
        deadline: float | None = None,
        **fields: Any,
    ) -> Asked:
        """Ask the queue group, or one worker's own door."""
        attempt = fields.pop("attempt", None) or random.getrandbits(63)
        request = Generate(
            id=f"request-{attempt}",
            attempt=attempt,
            model=model,
            input=TextInput(prompt),
            sampling=Sampling(seed=1),
            deadline=time.time() + 60 if deadline is None else deadline,
            **fields,
        )
        return await self.send(encode(request), attempt, model, worker=worker, version=version)

    async def send(
        self, data: bytes, attempt: int, model: str, *, worker: str = "", version: str = "1"
    ) -> Asked:
        reply = f"{self.bus.inbox}.r.{len(self.replies)}"
        asked = self.asked.setdefault(attempt, Asked(attempt, reply))
        self.replies[reply] = asked
        subject = subjects.infer_direct(model, worker) if worker else subjects.infer(model)
        headers = {"Mesh-Version": version} if version else None
        await self.bus.publish(subject, data, reply=reply, headers=headers)
        return asked

    async def cancel(self, worker: str, *attempts: int) -> None:
        await self.bus.publish(subjects.cancel(worker), encode(Cancel(attempts)))

    async def chunk(self, worker: str, attempt: int, index: int, data: bytes) -> None:
        await self.bus.publish(subjects.body(worker), encode(Chunk(attempt, index, data)))

    async def beat(self, worker: str, condition: Callable[[Beat], bool]) -> Beat:
        """The first beat of a worker, from now on, that fulfils a condition."""
        seen = len(self.beats)
        async with asyncio.timeout(WAIT):
            while True:
                while seen < len(self.beats):
                    beat = self.beats[seen]
                    seen += 1
                    if beat.worker == worker and condition(beat):
                        return beat
                self.beaten.clear()
                await self.beaten.wait()

    async def model(
        self, worker: str, condition: Callable[[ModelState], bool], *, name: str = "tiny"
    ) -> ModelState:
        """The model's first state, from now on, that fulfils a condition."""

        def found(beat: Beat) -> list[ModelState]:
            return [model for model in beat.models if model.name == name and condition(model)]

        return found(await self.beat(worker, lambda beat: bool(found(beat))))[0]

    async def nobody(self, model: str = "tiny") -> None:
        """Wait until nobody is in the model's queue group."""
        async with asyncio.timeout(WAIT):
            while True:
                # Past its deadline, so that whoever gets it does not start it.
                asked = await self.ask("tokens=1", model=model, deadline=1.0)
                await asked.until(lambda asked: asked.no_responders or bool(asked.frames))
                if asked.no_responders:
                    return
                await asyncio.sleep(0.005)

    async def somebody(self, model: str = "tiny") -> None:
        """Wait until somebody is in the model's queue group."""
        async with asyncio.timeout(WAIT):
            while True:
                asked = await self.ask("tokens=1", model=model, deadline=1.0)
                await asked.until(lambda asked: asked.no_responders or bool(asked.frames))
                if asked.frames:
                    return
                await asyncio.sleep(0.005)

    def _on_reply(self, message: BusMessage) -> None:
        if message.status:
            asked = self.replies[message.subject]
            asked.no_responders = True
            asked.moved.set()
            return
        for frame in decode_frames(message.data):
            asked = self.asked[frame.attempt]
            asked.frames.append(frame)
            asked.moved.set()

    def _on_beat(self, message: BusMessage) -> None:
        self.beats.append(decode_beat(message.data))
        self.beaten.set()


@pytest.fixture
async def router(connect: Callable[..., Awaitable[Bus]]) -> Router:
    router = Router(await connect("router-1"))
    await router.open()
    return router


class Running:
    """An agent that runs in this process."""

    def __init__(self, agent: Agent, task: "asyncio.Task[None]", name: str) -> None:
        self.agent = agent
        self.task = task
        self.name = name

    async def engine_pid(self, model: str = "tiny") -> int:
        async with asyncio.timeout(WAIT):
            while True:
                pid = self.agent.engine_pids.get(model)
                # The child becomes the engine by exec; before that it is the launcher.
                if pid is not None and "fake_engine.py" in " ".join(psutil.Process(pid).cmdline()):
                    return pid
                await asyncio.sleep(0.005)


@asynccontextmanager
async def running(agent: Agent, name: str) -> AsyncIterator[Running]:
    task = asyncio.create_task(agent.run(), name=f"agent {name}")
    try:
        yield Running(agent, task, name)
    finally:
        agent.stop()
        agent.stop()
        await asyncio.wait({task}, timeout=WAIT)
        if not task.done():
            task.cancel()
            await asyncio.wait({task})
            pytest.fail(f"the agent {name} did not stop")


@pytest.fixture
async def start(
    tmp_path: Path, nats_server: NatsServer, router: Router, write_gguf: Callable[[Path], Path]
) -> AsyncIterator[Callable[..., Awaitable[Running]]]:
    """Start an agent with tiny models of these names; ready unless told otherwise.

    A standby has them, and waits for demand.
    """
    async with AsyncExitStack() as stack:

        async def start_agent(
            *models: str,
            name: str = "worker-1",
            url: str = "",
            ready: bool = True,
            grace: float = 30.0,
            memory: int = 0,
            standby: bool = False,
            timing: Timing = DEFAULT_TIMING,
            **serving: Any,
        ) -> Running:
            folder = tmp_path / name
            for model in models or ("tiny",):
                if not (folder / f"{model}.gguf").exists():
                    write_gguf(folder / f"{model}.gguf")
            settings = AgentSettings(
                url=url or nats_server.url_for(name),
                identity=name,
                grace=grace,
                memory=memory,
                timing=timing,
                serving=ServingSettings(command=FAKE_ENGINE, **serving),
            )
            sources = read_catalog(folder).choose(())
            agent = Agent(settings, (), sources) if standby else Agent(settings, sources)
            started = await stack.enter_async_context(running(agent, name))
            if ready and not standby:
                wanted = set(models or ("tiny",))
                await router.beat(
                    name, lambda b: {m.name for m in b.models if m.state == "ready"} >= wanted
                )
            return started

        yield start_agent
