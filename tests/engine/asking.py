"""Requests for the tests of the engine, and what to read out of their frames."""

import asyncio
import json
import sys
import time
from pathlib import Path

from engine_driver import EngineDriver, new_attempt

from shared.protocol import ChatInput, Delta, Frame, Generate, Message, Sampling

STEADY_ENGINE = (sys.executable, str(Path(__file__).with_name("steady_engine.py")))
"""For `EngineDriver`: what is drafted does not hang on what else the machine does."""


PERSON = json.dumps(
    {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 20},
            "age": {"type": "integer", "minimum": 0, "maximum": 120},
        },
        "required": ["name", "age"],
        "additionalProperties": False,
    }
)


def request(text="Tell me about the sea.", *, sampling=None, **fields) -> Generate:
    source = fields.pop("input", None) or ChatInput((Message("user", text),))
    return Generate(
        id="test",
        attempt=new_attempt(),
        model="bench",
        input=source,
        sampling=sampling or Sampling(seed=7, temperature=0),
        deadline=fields.pop("deadline", time.time() + 100),
        max_tokens=fields.pop("max_tokens", 24),
        **fields,
    )


async def frames_of(engine: EngineDriver, wanted) -> list[Frame]:
    async with asyncio.timeout(100):
        return [frame async for frame in engine.submit(wanted)]


def text_of(frames: list[Frame], choice: int = 0) -> str:
    return "".join(f.text for f in frames if isinstance(f, Delta) and f.choice == choice)


def tokens_of(frames: list[Frame], choice: int = 0) -> list[int]:
    return [t for f in frames if isinstance(f, Delta) and f.choice == choice for t in f.tokens]


async def idle(engine: EngineDriver) -> None:
    async with asyncio.timeout(20):
        while engine.stats is None or engine.stats.running or engine.stats.waiting:  # noqa: ASYNC110
            await asyncio.sleep(0.02)
