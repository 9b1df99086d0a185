"""Streams of every kind whose worker may go away in their middle, and what a client sees of it."""

import asyncio
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

__all__ = ("KINDS", "Told", "bodies", "run")

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 60},
        "tags": {
            "type": "array",
            "items": {"type": "string", "maxLength": 20},
            "minItems": 4,
            "maxItems": 6,
        },
    },
    "required": ["name", "tags"],
    "additionalProperties": False,
}
TOOL = {
    "type": "function",
    "function": {
        "name": "write_letter",
        "description": "Writes a letter",
        "parameters": {
            "type": "object",
            "properties": {"to": {"type": "string", "maxLength": 60}, "tags": {"type": "string"}},
            "required": ["to", "tags"],
            "additionalProperties": False,
        },
    },
}
THINGS = ("a harbour", "a violin", "the moon", "bread", "a train", "winter", "a fox", "a clock")

KINDS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0, "ignore_eos": True},
    "drawn": {"temperature": 0.8, "ignore_eos": True},
    "schema": {
        "temperature": 0.8,
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "thing", "schema": SCHEMA},
        },
    },
    "tools": {"temperature": 0.8, "tools": [TOOL], "tool_choice": "required"},
    "logprobs": {"temperature": 0.8, "ignore_eos": True, "logprobs": True, "top_logprobs": 3},
}


def bodies(model: str, kind: str, count: int, tokens: int) -> list[dict[str, Any]]:
    """Requests of a kind, each with a prompt and a seed of its own."""
    return [
        {
            "model": model,
            "messages": [
                {"role": "user", "content": f"Tell me about {THINGS[n % 8]}, number {n} ({kind})."}
            ],
            "max_tokens": tokens,
            "seed": 1000 + n,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        | KINDS[kind]
        for n in range(count)
    ]


@dataclass
class Told:
    """One stream as its client saw it."""

    kind: str
    url: str = ""
    text: str = ""
    calls: dict[int, list[str]] = field(default_factory=dict)
    """By index: id, name, arguments."""
    logprobs: list[tuple[str, list[int]]] = field(default_factory=list)
    reason: str = ""
    worker: str = ""
    resumed: int = 0
    usage: dict[str, Any] = field(default_factory=dict)
    error: str = ""
    whole: bool = False
    times: list[float] = field(default_factory=list)
    """When events came (monotonic)."""
    ended: float = 0.0
    """When it was over, one way or another (monotonic)."""

    @property
    def said(self) -> tuple[Any, ...]:
        """What must not depend on whether a worker was lost."""
        return self.text, self.calls, self.logprobs, self.reason, self.usage["completion_tokens"]

    @property
    def longest_gap(self) -> float:
        """Seconds."""
        return max((b - a for a, b in zip(self.times, self.times[1:], strict=False)), default=0.0)

    def take(self, chunk: dict[str, Any]) -> None:
        if "error" in chunk:
            self.error = chunk["error"]["message"]
            return
        self.usage = chunk.get("usage") or self.usage
        self.resumed = chunk.get("timings", {}).get("resumed", self.resumed)
        for choice in chunk["choices"]:
            delta = choice["delta"]
            self.text += delta.get("content") or ""
            self.reason = choice["finish_reason"] or self.reason
            for entry in (choice["logprobs"] or {}).get("content") or []:
                self.logprobs.append((entry["token"], entry["bytes"]))
            for piece in delta.get("tool_calls") or []:
                call = self.calls.setdefault(piece["index"], ["", "", ""])
                call[0] += piece.get("id") or ""
                call[1] += piece["function"].get("name") or ""
                call[2] += piece["function"]["arguments"]


async def run(
    urls: str | Sequence[str],
    asked: list[tuple[str, dict[str, Any]]],
    during: Callable[[list[Told]], None] | None = None,
    after: int = 8,
) -> list[Told]:
    """Run all streams at once, by turns at the URLs.

    `during` is called when most of them have had `after` events. What ends a connection is told as
    the error of its stream.
    """
    bases = (urls,) if isinstance(urls, str) else urls
    told = [Told(kind, url=bases[n % len(bases)]) for n, (kind, _) in enumerate(asked)]
    enough = asyncio.Event()
    async with httpx.AsyncClient(timeout=120, trust_env=False, limits=httpx.Limits()) as client:

        async def one(mine: Told, body: dict[str, Any]) -> None:
            try:
                await read(mine, body)
            except httpx.HTTPError as error:
                mine.error = f"{type(error).__name__}: {error}"
            mine.ended = time.monotonic()

        async def read(mine: Told, body: dict[str, Any]) -> None:
            async with client.stream(
                "POST", f"{mine.url}/chat/completions", json=body, headers={"x-mesh-explain": "1"}
            ) as answer:
                if answer.status_code != 200:
                    mine.error = (await answer.aread()).decode()
                    return
                mine.worker = answer.headers.get("x-mesh-worker", "")
                async for line in answer.aiter_lines():
                    if not line.startswith("data: "):
                        continue
                    mine.times.append(time.monotonic())
                    if sum(len(t.times) >= after or t.whole for t in told) >= 0.8 * len(told):
                        enough.set()
                    if line == "data: [DONE]":
                        mine.whole = True
                    else:
                        mine.take(json.loads(line.removeprefix("data: ")))

        async def interfere() -> None:
            if during is None:
                return
            await enough.wait()
            await asyncio.to_thread(during, told)

        async with asyncio.TaskGroup() as group:
            group.create_task(interfere())
            for mine, (_, body) in zip(told, asked, strict=True):
                group.create_task(one(mine, body))
    return told
