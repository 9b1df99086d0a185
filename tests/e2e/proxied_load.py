"""Requests of every kind the endpoint takes, each judged by what came back."""

import asyncio
import itertools
import json
import math
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import httpx

__all__ = ("MIX", "STREAMED", "Kind", "Load", "Outcome")

Kind = Callable[[httpx.AsyncClient, str, int], Awaitable[None]]
"""Makes one request for a model; raises when the answer is not what was asked for."""

SCHEMA = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}},
    "required": ["ok"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "switch_light", "parameters": SCHEMA}}


async def _post(client: httpx.AsyncClient, path: str, body: dict[str, Any]) -> dict[str, Any]:
    response = await client.post(path, json=body)
    assert response.status_code == 200, response.text
    assert response.headers["x-request-id"]
    answer: dict[str, Any] = response.json()
    return answer


async def _stream(client: httpx.AsyncClient, path: str, body: dict[str, Any]) -> list[Any]:
    async with client.stream("POST", path, json=body | {"stream": True}) as response:
        assert response.status_code == 200, await response.aread()
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line async for line in response.aiter_lines()]
    events = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
    assert events, lines
    assert events[-1] == "[DONE]", events[-1]
    chunks = [json.loads(event) for event in events[:-1]]
    assert not any("error" in chunk for chunk in chunks), chunks
    reasons = [choice["finish_reason"] for chunk in chunks for choice in chunk["choices"]]
    assert reasons[-1] in ("stop", "length")
    return chunks


def _chat(model: str, number: int, **more: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": f"Tell me about the number {number}."}]
    return {"model": model, "messages": messages, "max_tokens": 4} | more


async def chat(client: httpx.AsyncClient, model: str, number: int) -> None:
    answer = await _post(client, "/chat/completions", _chat(model, number))
    assert 1 <= answer["usage"]["completion_tokens"] <= 4


async def chat_streamed(client: httpx.AsyncClient, model: str, number: int) -> None:
    body = _chat(model, number, stream_options={"include_usage": True})
    chunks = await _stream(client, "/chat/completions", body)
    assert 1 <= chunks[-1]["usage"]["completion_tokens"] <= 4


async def several_choices(client: httpx.AsyncClient, model: str, number: int) -> None:
    answer = await _post(client, "/chat/completions", _chat(model, number, n=2))
    assert [choice["index"] for choice in answer["choices"]] == [0, 1]


async def tools(client: httpx.AsyncClient, model: str, number: int) -> None:
    more = {"tools": [TOOL], "tool_choice": "required", "max_tokens": 64}
    answer = await _post(client, "/chat/completions", _chat(model, number, **more))
    call = answer["choices"][0]["message"]["tool_calls"][0]["function"]
    assert call["name"] == "switch_light"
    assert isinstance(json.loads(call["arguments"])["ok"], bool)


async def schema(client: httpx.AsyncClient, model: str, number: int) -> None:
    wanted = {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA}}
    body = _chat(model, number, response_format=wanted, max_tokens=64)
    answer = await _post(client, "/chat/completions", body)
    content = json.loads(answer["choices"][0]["message"]["content"])
    assert isinstance(content["ok"], bool)


async def completion(client: httpx.AsyncClient, model: str, number: int) -> None:
    body = {"model": model, "prompt": [f"{number} is", f"{number + 1} is"], "max_tokens": 3}
    answer = await _post(client, "/completions", body)
    assert [choice["index"] for choice in answer["choices"]] == [0, 1]


async def completion_streamed(client: httpx.AsyncClient, model: str, number: int) -> None:
    body = {"model": model, "prompt": f"The number {number} is", "max_tokens": 4}
    assert await _stream(client, "/completions", body)


async def embedding(client: httpx.AsyncClient, model: str, number: int) -> None:
    body = {"model": model, "input": [f"number {number}", "light"]}
    answer = await _post(client, "/embeddings", body)
    assert len(answer["data"]) == 2
    for item in answer["data"]:
        assert math.isclose(math.hypot(*item["embedding"]), 1, rel_tol=1e-3)


async def models(client: httpx.AsyncClient, model: str, number: int) -> None:
    response = await client.get("/models")
    assert response.status_code == 200, response.text
    assert [item["id"] for item in response.json()["data"]] == [model]


STREAMED: tuple[Kind, ...] = (chat_streamed, completion_streamed)
_LIGHT: tuple[Kind, ...] = (
    chat,
    chat_streamed,
    completion,
    embedding,
    completion_streamed,
    models,
)
MIX: tuple[Kind, ...] = (*_LIGHT * 3, several_choices, schema, several_choices, tools)
"""In this order over and over; a tool call costs a small CPU ten times what a chat does."""


@dataclass(frozen=True)
class Outcome:
    """One request that is over; times are monotonic seconds."""

    kind: Kind
    began: float
    ended: float
    error: Exception | None

    def __str__(self) -> str:
        return f"{self.kind.__name__}: {self.error!r}"


class Load:
    """So many requests at a time, all kinds in turn, until there are enough or it is told to end.

    No request is ever tried again here: what fails has failed.
    """

    def __init__(
        self, url: str, model: str, *, at_once: int, mix: Sequence[Kind] = MIX, timeout: float = 60
    ) -> None:
        self.outcomes: list[Outcome] = []
        self.enough = asyncio.Event()
        self._url = url
        self._model = model
        self._at_once = at_once
        self._mix = mix
        self._timeout = timeout
        self._numbers = itertools.count()

    async def run(self, most: int | None = None) -> None:
        """Make `most` requests, or go on until `enough` is set."""
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=self._at_once // 2)
        async with (
            httpx.AsyncClient(
                base_url=self._url, timeout=self._timeout, limits=limits, trust_env=False
            ) as client,
            asyncio.TaskGroup() as group,
        ):
            for _ in range(self._at_once):
                group.create_task(self._repeat(client, most))

    async def _repeat(self, client: httpx.AsyncClient, most: int | None) -> None:
        while not self.enough.is_set():
            number = next(self._numbers)
            if most is not None and number >= most:
                return
            kind = self._mix[number % len(self._mix)]
            began = time.monotonic()
            error: Exception | None = None
            try:
                await kind(client, self._model, number)
            except (httpx.HTTPError, AssertionError, LookupError, ValueError) as raised:
                error = raised
            self.outcomes.append(Outcome(kind, began, time.monotonic(), error))
