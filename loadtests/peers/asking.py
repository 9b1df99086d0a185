"""Asking a system, one request or several at once, and what can be told of the replies."""

import asyncio
from collections.abc import Iterable, Sequence

from loadtests.crowd import Crowd
from loadtests.figures import percentile
from loadtests.http_client import Client
from loadtests.http_reply import Reply
from loadtests.peers.systems import System
from loadtests.peers.texts import Message

__all__ = (
    "PartFailed",
    "ask",
    "ask_all",
    "cached_tokens",
    "chat",
    "milliseconds",
    "pauses",
    "settle",
    "try_all",
)

BURST = 0.0005
"""Seconds. Tokens that arrive closer together came of one step (speculation accepts several)."""

TIMEOUT = 600.0


class PartFailed(Exception):
    """A system did not answer as it must; no figure is made of that."""


def chat(
    system: System,
    messages: Sequence[Message],
    tokens: int,
    *,
    ignore_eos: bool = True,
    stream: bool = True,
) -> bytes:
    """Encode a greedy request for an answer of at most `tokens` tokens."""
    body: dict[str, object] = {
        "model": system.model,
        "messages": list(messages),
        "max_tokens": tokens,
        "temperature": 0,
        "seed": 1,
        "ignore_eos": ignore_eos,
        "stream": stream,
    }
    if stream:
        body["stream_options"] = {"include_usage": True}
    return system.target.post("/v1/chat/completions", body)


async def _reply(system: System, request: bytes) -> Reply:
    client = Client(system.target)
    try:
        return await client.send(request, TIMEOUT)
    except TimeoutError:
        return Reply(0.0, error=f"no answer in {TIMEOUT:g} s")
    finally:
        client.abort()


async def ask(system: System, request: bytes) -> Reply:
    """Send one request over a connection of its own and await its reply.

    Raises:
        PartFailed: it was refused, broke off, or took ten minutes.
    """
    return _checked(system, await _reply(system, request))


def _checked(system: System, reply: Reply) -> Reply:
    if reply.error:
        raise PartFailed(f"{system.name}: {reply.error}")
    return reply


async def try_all(system: System, requests: Sequence[bytes], at_once: int) -> list[Reply]:
    """Send all requests, at most `at_once` at a time; the replies in their order, failed or not."""
    waiting = list(enumerate(requests))
    waiting.reverse()
    replies: dict[int, Reply] = {}

    async def one_user() -> None:
        while waiting:
            number, request = waiting.pop()
            replies[number] = await _reply(system, request)

    async with asyncio.TaskGroup() as users:
        for _ in range(min(at_once, len(requests))):
            users.create_task(one_user())
    return [replies[number] for number in range(len(requests))]


async def ask_all(system: System, requests: Sequence[bytes], at_once: int) -> list[Reply]:
    """As `try_all`, where every reply has to be good.

    Raises:
        PartFailed: one was refused, broke off, or took ten minutes.
    """
    return [_checked(system, reply) for reply in await try_all(system, requests, at_once)]


async def settle(system: System, crowd: Crowd) -> None:
    """Wait until every stream of a crowd has its first token.

    Raises:
        PartFailed: one failed, or took too long.
    """
    try:
        await crowd.settled()
    except (RuntimeError, TimeoutError) as error:
        why = str(error) or "a stream did not begin in time"
        raise PartFailed(f"{system.name}: {why}") from None


def cached_tokens(reply: Reply) -> int:
    """Tokens of the prompt that the system says it did not compute anew."""
    details = reply.usage.get("prompt_tokens_details") or {}
    return int(details.get("cached_tokens") or 0)


def milliseconds(values: Iterable[float], share: float) -> float:
    """The percentile of seconds, in milliseconds."""
    return percentile(values, share) * 1e3


def pauses(gaps: Iterable[float]) -> list[float]:
    """Leave out the gaps inside a burst: what is left is what a reader sees as pauses."""
    return [gap for gap in gaps if gap >= BURST]
