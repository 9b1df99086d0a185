"""An engine process without a model: a real child that speaks `worker.link` and does as it is told.

The prompt is the script: `tokens=5 every=0.01` emits five tokens; `hold` emits one and then nothing
until it is cancelled; `abort` dies as GGML does; `exit` leaves without a word; `garbage` writes
what is no message; `bulk=9000000` emits that many bytes in one step. The name of the model is one
too: `refuse…` cannot be served, `crash…` dies while loading, `slow…` takes a second to load.
"""

import argparse
import contextlib
import os
import select
import socket
import sys
import time

import msgspec

from shared.protocol import (
    Delta,
    Done,
    Embed,
    EmbedResult,
    End,
    Fail,
    Frame,
    Generate,
    Request,
    TextInput,
    Timings,
    Usage,
    decode_request,
    encode,
)
from worker.link import (
    LENGTH,
    CancelAttempts,
    EngineConfig,
    EngineStats,
    Failed,
    Join,
    Loading,
    Mail,
    Ready,
    Step,
    Stop,
    Submit,
    decode_config,
    decode_to_engine,
    pack,
)


class Job:
    def __init__(self, reply: str, request: Request) -> None:
        self.reply = reply
        self.request = request
        self.weight = request.n if isinstance(request, Generate) else 1
        self.count = 0
        self.next_at = 0.0
        text = (
            request.input.text
            if isinstance(request, Generate) and isinstance(request.input, TextInput)
            else ""
        )
        words = dict(word.partition("=")[::2] for word in text.split())
        self.tokens = int(words.get("tokens") or 1)
        self.every = float(words.get("every") or 0.0)
        self.bulk = int(words.get("bulk") or 0)
        self.hold = "hold" in words
        self.words = words


class Engine:
    def __init__(self, link: socket.socket) -> None:
        self.link = link
        self.buffer = b""
        self.config = decode_config(self.message())
        self.running: dict[int, Job] = {}
        self.waiting: dict[int, Job] = {}
        self.emitted = 0
        self.started: list[int] = []

    def message(self) -> bytes:
        while True:
            if len(self.buffer) >= LENGTH.size:
                (size,) = LENGTH.unpack_from(self.buffer)
                if len(self.buffer) >= LENGTH.size + size:
                    data = self.buffer[LENGTH.size : LENGTH.size + size]
                    self.buffer = self.buffer[LENGTH.size + size :]
                    return data
            more = self.link.recv(1 << 16)
            if not more:
                sys.exit(0)
            self.buffer += more

    def messages(self) -> bool:
        """Whether a message can be had without waiting."""
        if len(self.buffer) >= LENGTH.size:
            (size,) = LENGTH.unpack_from(self.buffer)
            if len(self.buffer) >= LENGTH.size + size:
                return True
        return bool(select.select([self.link], [], [], 0)[0])

    def send(self, message: object) -> None:
        self.link.sendall(pack(message))

    def load(self, config: EngineConfig) -> None:
        for progress in (0.0, 0.5, 1.0):
            self.send(Loading(progress))
            if config.model.startswith("slow"):
                time.sleep(0.3)
        if config.model.startswith("refuse"):
            self.send(Failed("the fake engine does not like this model"))
            sys.exit(1)
        if config.model.startswith("crash"):
            print("GGML_ASSERT(false) failed while loading", file=sys.stderr, flush=True)
            os.abort()
        self.ready()

    def ready(self) -> None:
        config = self.config
        group = "" if config.ring is None else config.ring.group
        told = Ready(context=config.context or 2048, slots=config.slots, threads=1, group=group)
        self.send(told)

    def serve(self) -> None:
        while True:
            due = [job.next_at for job in self.running.values() if not job.hold or not job.count]
            wait = max(0.0, min(due) - time.monotonic()) if due else None
            if len(self.buffer) < LENGTH.size:
                select.select([self.link], [], [], wait)
            ended: list[int] = []
            while self.messages():
                self.obey(decode_to_engine(self.message()), ended)
            self.start()
            self.step(ended)

    def obey(self, message: Submit | CancelAttempts | Join | Stop, ended: list[int]) -> None:
        if isinstance(message, Stop):
            sys.exit(0)
        if isinstance(message, Join):
            self.running.clear()
            self.waiting.clear()
            self.config = msgspec.structs.replace(self.config, ring=message.place)
            self.ready()
            return
        if isinstance(message, CancelAttempts):
            ended += [
                attempt
                for attempt in message.attempts
                if self.running.pop(attempt, None) or self.waiting.pop(attempt, None)
            ]
            return
        job = Job(message.reply, decode_request(message.request))
        self.waiting[job.request.attempt] = job

    def start(self) -> None:
        while self.waiting:
            attempt, job = next(iter(self.waiting.items()))
            used = sum(min(job.weight, self.config.slots) for job in self.running.values())
            if used + min(job.weight, self.config.slots) > self.config.slots:
                return
            self.running[attempt] = self.waiting.pop(attempt)
            self.started.append(attempt)

    def step(self, ended: list[int]) -> None:
        mail: dict[str, tuple[str, list[Frame]]] = {}
        now = time.monotonic()
        for attempt, job in list(self.running.items()):
            frames = self.emit(job, now)
            if frames:
                router = job.reply.rsplit(".", 1)[0]
                mail.setdefault(router, (job.reply, []))[1].extend(frames)
                if isinstance(frames[-1], End | Fail | EmbedResult):
                    ended.append(attempt)
                    del self.running[attempt]
        if mail or ended or self.started:
            letters = tuple(Mail(reply, encode(frames)) for reply, frames in mail.values())
            stats = EngineStats(
                running=len(self.running),
                waiting=len(self.waiting),
                kv_used=0.25,
                completion_tokens=self.emitted,
                prompt_tokens=10,
                cached_tokens=4,
                drafted=7,
                accepted=5,
                drafted_at=(4, 3),
                accepted_at=(4, 1),
                gain=1.5,
            )
            self.send(Step(letters, tuple(ended), stats, tuple(self.started)))
            self.started.clear()

    def emit(self, job: Job, now: float) -> list[Frame]:
        attempt = job.request.attempt
        if isinstance(job.request, Embed):
            size = len(job.request.inputs)
            return [EmbedResult(attempt, (b"\0\0\0\0",) * size, Usage(size, 0))]
        if "abort" in job.words:
            print("fake.cpp:1: GGML_ASSERT(n > 0) failed", file=sys.stderr, flush=True)
            os.abort()
        if "exit" in job.words:
            os._exit(7)
        if "garbage" in job.words:
            self.link.sendall(LENGTH.pack(3) + b"\xc1\xc1\xc1")
            time.sleep(60)
        if now < job.next_at or (job.hold and job.count):
            return []
        if job.bulk:
            # As many frames as there are MiB, so that the whole has to be divided.
            part = 1 << 20 if "single" not in job.words else job.bulk
            sizes = [min(part, job.bulk - start) for start in range(0, job.bulk, part)]
            frames: list[Frame] = [
                Delta(attempt, 0, index, (1,), "x" * size) for index, size in enumerate(sizes)
            ]
            job.count = len(frames)
            job.hold = "single" in job.words
            return frames if job.hold else [*frames, *self.finish(job)]
        frames = [Delta(attempt, 0, job.count, (job.count,), f"t{job.count} ")]
        job.count += 1
        self.emitted += 1
        job.next_at = now + job.every
        if job.count >= job.tokens and not job.hold:
            frames += self.finish(job)
        return frames

    def finish(self, job: Job) -> list[Frame]:
        attempt = job.request.attempt
        done: list[Frame] = [Done(attempt, 0, job.count, "stop")]
        n = job.request.n if isinstance(job.request, Generate) else 1
        done += [Done(attempt, choice, 0, "stop") for choice in range(1, n)]
        return [*done, End(attempt, Usage(1, job.count), Timings(0.0, 0.0, 0.0))]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--fd", type=int, required=True)
    link = socket.socket(fileno=parser.parse_args().fd)
    engine = Engine(link)
    engine.load(engine.config)
    with contextlib.suppress(BrokenPipeError, ConnectionResetError, msgspec.DecodeError):
        engine.serve()


if __name__ == "__main__":
    main()
