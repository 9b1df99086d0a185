"""A worker that does what its test tells it, over a real bus."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec

from shared import subjects
from shared.bus import Bus, BusMessage, BusUnavailable, Subscription
from shared.presence import Beat, LoadableModel, ModelState, encode_beat
from shared.protocol import (
    Accepted,
    Busy,
    ChatInput,
    Chunk,
    Delta,
    Done,
    EmbedResult,
    End,
    Fail,
    Frame,
    Generate,
    Handback,
    Request,
    Timings,
    TokenInput,
    Usage,
    decode_cancel,
    decode_chunk,
    decode_request,
    encode,
)

WAIT = 20.0
"""Only keeps a broken test from hanging."""


class Job:
    """One request as the worker got it, and the frames it may answer with."""

    def __init__(self, worker: "ScriptedWorker", request: Request, reply: str, door: str) -> None:
        self.worker = worker
        self.take(request)
        self.reply = reply
        self.door = door
        self.attempt = request.attempt
        self.cancelled = asyncio.Event()

    def take(self, request: Request) -> None:
        """Answer this; what other attempts brought of it is there already."""
        self.request = request
        before = request.resume if isinstance(request, Generate) else ()
        self._counts = {i: max(b.done, len(b.tokens)) for i, b in enumerate(before)}

    @property
    def prompt(self) -> str:
        """The prompt, or the last message, as text."""
        assert isinstance(self.request, Generate)
        prompt = self.request.input
        if isinstance(prompt, ChatInput):
            return prompt.messages[-1].content
        if isinstance(prompt, TokenInput):
            return " ".join(map(str, prompt.tokens))
        return prompt.text

    async def send(self, *frames: Frame) -> None:
        await self.worker.bus.publish(self.reply, encode(list(frames)))

    def delta(self, text: str = "", choice: int = 0, tokens: int = 1, **more: Any) -> Delta:
        first = self._counts.get(choice, 0)
        self._counts[choice] = first + tokens
        return Delta(self.attempt, choice, first, tuple(range(first, first + tokens)), text, **more)

    def done(self, choice: int = 0, reason: Any = "stop") -> Done:
        return Done(self.attempt, choice, self._counts.get(choice, 0), reason)

    def end(self, **usage: int) -> End:
        completion = sum(self._counts.values())
        return End(
            self.attempt,
            Usage(**({"prompt": 7, "completion": completion, "cached": 3} | usage)),
            Timings(1.0, 2.0, 4.0),
        )

    def failure(self, code: str, message: str, **more: Any) -> Fail:
        return Fail(self.attempt, code, message, **more)

    def busy(self, reason: str = "full", retry_after: float = 3.2) -> Busy:
        return Busy(self.attempt, self.worker.name, retry_after, reason)

    def handback(self) -> Handback:
        return Handback(self.attempt)

    def vectors(self, *vectors: bytes) -> EmbedResult:
        return EmbedResult(self.attempt, vectors, Usage(5, 0))

    async def accept(self) -> None:
        await self.send(Accepted(self.attempt, self.worker.name))

    async def speak(self, *pieces: str, reason: Any = "stop") -> None:
        """A whole answer, one message a token, the same for every choice."""
        assert isinstance(self.request, Generate)
        await self.accept()
        for piece in pieces:
            for choice in range(self.request.n):
                await self.send(self.delta(piece, choice))
        dones = [self.done(choice, reason) for choice in range(self.request.n)]
        await self.send(*dones, self.end())


Script = Callable[[Job], Awaitable[None]]


async def hello(job: Job) -> None:
    """The script of a worker that is not told anything else."""
    if isinstance(job.request, Generate):
        await job.speak("Hel", "lo")
    else:
        await job.accept()
        await job.send(job.vectors(*[b"\0\0\x80?" * 2 for _ in job.request.inputs]))


class ScriptedWorker:
    """Serves one model; every request runs the script as a task of its own."""

    def __init__(self, bus: Bus, model: str, script: Script = hello, **state: Any) -> None:
        self.bus = bus
        self.name = bus.identity
        self.model = model
        self.script = script
        self.jobs: list[Job] = []
        self.cancels: list[int] = []
        self.beating = True
        self.able: tuple[LoadableModel, ...] = ()
        self.state = ModelState(
            **({"name": model, "state": "ready", "slots": 4, "free": 4, "context": 512} | state)
        )
        self._subscriptions: list[Subscription] = []
        self._bodies: dict[int, tuple[Job, list[bytes]]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._moved = asyncio.Event()
        self._sequence = 0
        self.failures: list[BaseException] = []

    async def __aenter__(self) -> "ScriptedWorker":
        await self.join_group()
        for subject, callback in (
            (subjects.infer_direct(self.model, self.name), self._on_direct),
            (subjects.cancel(self.name), self._on_cancel),
            (subjects.body(self.name), self._on_chunk),
            (subjects.ping(self.name), self._on_ping),
        ):
            self._subscriptions.append(await self.bus.subscribe(subject, callback))
        await self.beat()
        await self.bus.barrier()
        self._run(self._keep_beating())
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.leave()
        if self.failures:
            raise ExceptionGroup("scripts failed", self.failures)  # type: ignore[type-var]

    async def leave(self) -> None:
        """End as an orderly worker does; a second time changes nothing."""
        subscriptions, self._subscriptions = self._subscriptions, []
        if not subscriptions:
            return
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self.bus.connected:
            if self.beating:
                await self.beat("gone")
            for subscription in subscriptions:
                await subscription.leave()
            await self.bus.barrier()

    async def join_group(self) -> Subscription:
        group = await self.bus.subscribe(
            subjects.infer(self.model), self._on_group, queue=subjects.FREE
        )
        self._subscriptions.append(group)
        self.group = group
        return group

    async def beat(
        self,
        state: Any = "ready",
        model_state: Any = None,
        *,
        started: float = 1.0,
        losses: int = 0,
    ) -> None:
        self._sequence += 1
        model = self.state
        if model_state:
            model = msgspec.structs.replace(model, state=model_state)
        await self.bus.publish(
            subjects.beat(self.name),
            encode_beat(
                Beat(
                    self.name,
                    state,
                    self._sequence,
                    (model,),
                    started=started,
                    able=self.able,
                    losses=losses,
                )
            ),
        )

    async def job(self, number: int = 0) -> Job:
        """The request of that number, once it is there."""
        await self.until(lambda: len(self.jobs) > number)
        return self.jobs[number]

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(WAIT):
            while not condition():
                self._moved.clear()
                await self._moved.wait()

    async def _keep_beating(self) -> None:
        while True:
            await asyncio.sleep(0.3)
            if self.beating:
                try:
                    await self.beat()
                except BusUnavailable:
                    continue

    def _on_group(self, message: BusMessage) -> None:
        self._take(message, "group")

    def _on_direct(self, message: BusMessage) -> None:
        self._take(message, "direct")

    def _take(self, message: BusMessage, door: str) -> None:
        assert message.headers is not None
        assert message.headers["Mesh-Version"] == "1"
        job = Job(self, decode_request(message.data), message.reply, door)
        if job.request.body_size:
            self._bodies[job.attempt] = (job, [])
            self._run(job.accept())
            return
        self._start(job)

    def _on_chunk(self, message: BusMessage) -> None:
        chunk: Chunk = decode_chunk(message.data)
        job, pieces = self._bodies[chunk.attempt]
        assert chunk.index == len(pieces)
        pieces.append(chunk.data)
        body = b"".join(pieces)
        if len(body) == job.request.body_size:
            del self._bodies[chunk.attempt]
            job.take(decode_request(body))
            self._start(job)

    def _start(self, job: Job) -> None:
        self.jobs.append(job)
        self._moved.set()
        self._run(self.script(job))

    def _run(self, work: Awaitable[None]) -> None:
        async def guarded() -> None:
            try:
                await work
            except BusUnavailable:
                return
            except Exception as error:
                self.failures.append(error)

        task = asyncio.create_task(guarded())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _on_ping(self, message: BusMessage) -> None:
        self._run(self.bus.publish(message.reply, message.data))

    def _on_cancel(self, message: BusMessage) -> None:
        attempts = decode_cancel(message.data).attempts
        self.cancels += attempts
        for job in self.jobs:
            if job.attempt in attempts:
                job.cancelled.set()
        self._moved.set()
