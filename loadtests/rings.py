"""Rings of stages as engine processes alone, for benchmarks: no agents, no router, no HTTP."""

import asyncio
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec

from loadtests.engine_driver import EngineDriver, new_attempt
from loadtests.stack import smollm2, smollm2_f32, smollm2_q4_0
from shared.broker_config import ring_url, ring_user
from shared.partition import Stage
from shared.protocol import ChatInput, Delta, End, Generate, Message, Sampling
from worker.cut_file import make_stage
from worker.link import RingPlace
from worker.model_bytes import FileBytes
from worker.stage_cut import Wanted

__all__ = (
    "CONTEXT",
    "Target",
    "asked",
    "model_file",
    "pin",
    "prompt_tokens",
    "rate_of",
    "report",
    "ring_of",
    "stage_files",
)

Target = Literal["F32", "Q4_0", "Q4_1"]
CONTEXT = 512


def model_file(target: Target, folder: Path) -> Path:
    """SmolLM2 in a format; made in the folder if it is not there."""
    if target == "Q4_1":
        return smollm2()
    return smollm2_f32(folder) if target == "F32" else smollm2_q4_0(folder)


def report(number: int) -> str:
    """A prompt whose answer nobody can foresee."""
    return f"Write a long report about case {number} of the harbour."


def asked(text: str, tokens: int) -> Generate:
    """A greedy request for so many tokens."""
    return Generate(
        id="bench",
        attempt=new_attempt(),
        model="bench",
        input=ChatInput((Message("user", text),)),
        sampling=Sampling(seed=1, temperature=0, ignore_eos=True),
        deadline=time.time() + 600,
        max_tokens=tokens,
    )


async def rate_of(
    engine: EngineDriver,
    streams: int,
    tokens: int,
    first: int,
    prompt: Callable[[int], str] = report,
) -> float:
    """Tokens a second while all streams run: from the last one's first to the first one's last.

    Args:
        engine: the engine, or the head of a ring.
        streams: at once.
        tokens: of each answer.
        first: number of the first prompt.
        prompt: by its number.
    """
    begun: list[float] = []
    ended: list[float] = []
    came: list[float] = []

    async def one(number: int) -> None:
        mine = 0
        async for frame in engine.submit(asked(prompt(number), tokens)):
            if isinstance(frame, Delta) and frame.tokens:
                now = time.perf_counter()
                if not mine:
                    begun.append(now)
                mine += len(frame.tokens)
                came.extend([now] * len(frame.tokens))
        ended.append(time.perf_counter())

    async with asyncio.TaskGroup() as group:
        for number in range(streams):
            group.create_task(one(first + number))
    start, stop = max(begun), min(ended)
    return sum(start < at <= stop for at in came) / (stop - start)


async def prompt_tokens(engine: EngineDriver) -> int:
    """How long a prompt of `report` is."""
    async for frame in engine.submit(asked(report(0), 1)):
        if isinstance(frame, End):
            return frame.usage.prompt
    raise RuntimeError("an answer came without its end")


def pin(engine: EngineDriver, cores: set[int]) -> None:
    """Keep all of a process on these cores."""
    for task in Path(f"/proc/{engine.pid}/task").iterdir():
        os.sched_setaffinity(int(task.name), cores)


def stage_files(model: Path, folder: Path, stages: Sequence[Stage]) -> list[Path]:
    """Cut the model; files in the order of the stages."""
    return [
        make_stage(
            FileBytes(model),
            Wanted(stage.start, stage.stop, head=stage.head),
            folder,
            progress=lambda *_: None,
        ).path
        for stage in stages
    ]


def ring_of(
    model: Path,
    paths: Sequence[Path],
    workers: Sequence[str],
    url: Callable[[str], str],
    *,
    half: bool = False,
    timeout: float = 10.0,
    group: str = "bench",
    **options: Any,
) -> list[EngineDriver]:
    """The stages' engines, not started, the head last.

    Args:
        model: tells rings of several models apart.
        paths: the stages' files.
        workers: who they are, in the same order.
        url: of NATS, for a worker.
        half: send 16 bits a number.
        timeout: seconds after which a stage that does not answer is lost.
        group: the ring's name, with that of the model's format.
        options: of `EngineDriver`; a draft model is the head's alone.
    """
    engines: list[EngineDriver] = []
    draft = options.pop("draft", "")
    for index, (worker, path) in enumerate(zip(workers, paths, strict=True)):
        head = index == len(paths) - 1
        engine = EngineDriver(str(path), threads=1, draft=draft if head else "", **options)
        place = RingPlace(
            group=f"{group}-{model.stem.rpartition('.')[2]}",
            workers=tuple(workers),
            index=index,
            nats=ring_url(url(worker)),
            identity=ring_user(worker),
            half=half,
            timeout=timeout,
        )
        engine.config = msgspec.structs.replace(engine.config, ring=place)
        engines.append(engine)
    return engines
