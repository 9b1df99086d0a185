"""Short requests of every kind a client may send, the wrong ones and those left early included.

Every prompt, schema and unknown name is a new one, so that whatever is kept by content shows.
"""

import asyncio
import random
from typing import Literal

from loadtests.http_client import Client, Target
from loadtests.http_reply import Reply

__all__ = ("MixedLoad",)

Kind = Literal[
    "chat", "stream", "completion", "embedding", "schema", "leaves", "leaves early", "bad"
]
MIX: dict[Kind, int] = {
    "chat": 28,
    "stream": 28,
    "completion": 10,
    "embedding": 10,
    "schema": 10,
    "leaves": 6,
    "leaves early": 4,
    "bad": 4,
}
WORDS = ("river", "stone", "market", "engine", "garden", "window", "letter", "system", "bridge")


class Requests:
    """Short requests of mixed kinds, no two the same."""

    def __init__(self, target: Target, model: str, seed: int = 1) -> None:
        self._target = target
        self._model = model
        self._random = random.Random(seed)
        self._number = 0

    def next(self) -> tuple[Kind, bytes]:
        """Draw a kind and make a request of it."""
        self._number += 1
        (kind,) = self._random.choices(list(MIX), list(MIX.values()))
        path, body = self._make(kind)
        return kind, self._target.post(path, {"model": self._model} | body)

    def pause(self) -> float:
        """Seconds after which a client leaves."""
        return self._random.uniform(0.0, 0.15)

    def _text(self) -> str:
        words = self._random.choices(WORDS, k=self._random.randint(1, 12))
        return f"{self._number} {' '.join(words)}"

    def _make(self, kind: Kind) -> tuple[str, dict[str, object]]:
        tokens = self._random.randint(1, 8)
        seed = self._number
        chat: dict[str, object] = {
            "messages": [{"role": "user", "content": self._text()}],
            "max_tokens": tokens,
            "seed": seed,
        }
        match kind:
            case "completion":
                return "/v1/completions", {"prompt": self._text(), "max_tokens": tokens}
            case "embedding":
                return "/v1/embeddings", {"input": [self._text(), self._text()]}
            case "schema":
                schema = {
                    "type": "object",
                    "properties": {
                        f"field_{seed}": {"type": "string"},
                        self._random.choice(WORDS): {"type": "integer"},
                    },
                    "required": [f"field_{seed}"],
                    "additionalProperties": False,
                }
                named = {"name": "answer", "schema": schema, "strict": True}
                return "/v1/chat/completions", chat | {
                    "response_format": {"type": "json_schema", "json_schema": named}
                }
            case "bad":
                wrong: tuple[dict[str, object], ...] = (
                    {"model": f"unknown-{seed}"},
                    {"temperature": 99},
                    {"messages": []},
                )
                return "/v1/chat/completions", chat | self._random.choice(wrong)
            case "leaves" | "leaves early":
                more = {"max_tokens": 400, "ignore_eos": True, "stream": kind == "leaves"}
                return "/v1/chat/completions", chat | more
            case "stream":
                usage = {"include_usage": bool(seed % 2)}
                return "/v1/chat/completions", chat | {"stream": True, "stream_options": usage}
            case "chat":
                return "/v1/chat/completions", chat


class MixedLoad:
    """Sends batches of requests over a few connections, and counts what came of them."""

    def __init__(self, target: Target, model: str, connections: int) -> None:
        self.ended: dict[str, int] = {}
        self._requests = Requests(target, model)
        self._target = target
        self._connections = connections
        self._left = 0

    async def send(self, count: int) -> None:
        """Send so many requests, and wait until each has ended.

        Raises:
            RuntimeError: one ended otherwise than it should.
        """
        self._left = count
        async with asyncio.TaskGroup() as users:
            for _ in range(self._connections):
                users.create_task(self._user())

    async def _user(self) -> None:
        client = Client(self._target)
        try:
            while self._left:
                client = await self._one(client)
        finally:
            client.abort()

    async def _one(self, client: Client) -> Client:
        self._left -= 1
        kind, request = self._requests.next()
        if kind.startswith("leaves"):
            client.begin(request)
            await asyncio.sleep(self._requests.pause())
            client.abort()
            client = Client(self._target)
        else:
            reply = await client.send(request, timeout=120)
            if not _as_wanted(kind, reply):
                raise RuntimeError(f"a request of kind '{kind}' ended with {reply}")
        self.ended[kind] = self.ended.get(kind, 0) + 1
        return client


def _as_wanted(kind: Kind, reply: Reply) -> bool:
    return reply.status in (400, 404) if kind == "bad" else not reply.error
