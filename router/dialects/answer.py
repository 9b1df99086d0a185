"""What every dialect's answer has in common: the contract, and the parts that look alike.

An answer is fed the frames of its request, in order and checked, and gives bytes: for a stream
those to send at once, for a whole answer nothing until `finish`. Whole answers are Structs, from
which the OpenAPI description is derived.
"""

import time
from typing import Any, Protocol

import msgspec
from msgspec import UNSET, UnsetType

from shared.protocol import Delta, Done, EmbedResult, End, Timings, ToolDelta, Usage

__all__ = (
    "DONE",
    "LOWEST",
    "PING",
    "Answer",
    "Completed",
    "Earlier",
    "PromptDetails",
    "TimingsObject",
    "UsageObject",
    "add_timings",
    "add_usage",
    "encode",
    "event",
    "merge_tools",
    "now",
    "quote",
    "timings_object",
    "usage_object",
)

encode = msgspec.json.Encoder().encode

DONE = b"data: [DONE]\n\n"
PING = b": ping\n\n"
LOWEST = -9999.0
"""OpenAI's stand-in for the logarithm of zero, which JSON cannot hold."""

_LINE_ENDS = (
    ("\u2028".encode(), b"\\u2028"),
    ("\u2029".encode(), b"\\u2029"),
    ("\x85".encode(), b"\\u0085"),
)

Completed = End | EmbedResult


class Earlier(msgspec.Struct, frozen=True):
    """What a stream has to know of the events that its client has, or will have on a connection
    that it may lose.
    """

    number: int
    """96 bits, for the id of all chunks."""
    created: int
    begun: frozenset[int]
    """Choices whose role, or whose prompt's echo, was told."""
    offsets: tuple[int, ...]
    """By choice, the length of its text, as offsets of log probabilities count it."""


class PromptDetails(msgspec.Struct, frozen=True):
    """Tokens of the prompt whose KV was reused."""

    cached_tokens: int


class UsageObject(msgspec.Struct, frozen=True):
    """OpenAI's usage."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails


class TimingsObject(msgspec.Struct, frozen=True):
    """Where the time went on the worker, and what speculation brought."""

    queue_ms: float
    prefill_ms: float
    decode_ms: float
    tokens_per_second: float
    draft_n: int | UnsetType = UNSET
    """Tokens drafted and verified, as llama-server calls it; only where there were any."""
    draft_n_accepted: int | UnsetType = UNSET
    """Those of them that are part of the answer."""
    resumed: int | UnsetType = UNSET
    """How often the answer went on on another worker; only where it did."""


class Answer(Protocol):
    """Renders one request's frames. `part` counts the inputs a request was fanned out to."""

    def delta(self, part: int, frame: Delta) -> bytes:
        """Take new tokens."""
        ...

    def done(self, part: int, frame: Done) -> bytes:
        """Take the end of one choice."""
        ...

    def finish(self, ends: list[Completed]) -> bytes:
        """All parts are complete; `ends` are in the order of the parts."""
        ...


def now() -> int:
    """Unix time in whole seconds, for `created`."""
    return int(time.time())


def event(value: Any) -> bytes:
    """One server-sent event."""
    return b"data: %b\n\n" % _one_line(encode(value))


def quote(text: str) -> bytes:
    """Encode text as a JSON string fit for an event."""
    return encode(text) if text.isascii() else _one_line(encode(text))


def _one_line(data: bytes) -> bytes:
    # Legal in JSON, but clients that split a stream with str.splitlines would cut here.
    for raw, escaped in _LINE_ENDS:
        if raw in data:
            data = data.replace(raw, escaped)
    return data


def usage_object(usage: Usage) -> UsageObject:
    """Tokens as OpenAI counts them."""
    return UsageObject(
        prompt_tokens=usage.prompt,
        completion_tokens=usage.completion,
        total_tokens=usage.prompt + usage.completion,
        prompt_tokens_details=PromptDetails(usage.cached),
    )


def timings_object(timings: Timings, usage: Usage) -> TimingsObject:
    """Times in milliseconds, rounded; drafts and resumes only where there were any."""
    timed = usage.completion - timings.replayed
    rate = timed * 1000 / timings.decode_ms if timings.decode_ms > 0 else 0.0
    return TimingsObject(
        queue_ms=round(timings.queue_ms, 3),
        prefill_ms=round(timings.prefill_ms, 3),
        decode_ms=round(timings.decode_ms, 3),
        tokens_per_second=round(rate, 2),
        draft_n=usage.drafted if usage.drafted else UNSET,
        draft_n_accepted=usage.accepted if usage.drafted else UNSET,
        resumed=timings.resumed or UNSET,
    )


def add_usage(ends: list[Completed]) -> Usage:
    """The sum over all parts."""
    return Usage(
        prompt=sum(end.usage.prompt for end in ends),
        completion=sum(end.usage.completion for end in ends),
        cached=sum(end.usage.cached for end in ends),
        drafted=sum(end.usage.drafted for end in ends),
        accepted=sum(end.usage.accepted for end in ends),
    )


def add_timings(ends: list[Completed]) -> Timings:
    """Parts run side by side: the longest of each."""
    timings = [end.timings for end in ends if isinstance(end, End)]
    return Timings(
        queue_ms=max((t.queue_ms for t in timings), default=0.0),
        prefill_ms=max((t.prefill_ms for t in timings), default=0.0),
        decode_ms=max((t.decode_ms for t in timings), default=0.0),
        replayed=sum(t.replayed for t in timings),
        resumed=sum(t.resumed for t in timings),
    )


def merge_tools(pieces: tuple[ToolDelta, ...]) -> tuple[ToolDelta, ...]:
    """Join the pieces of each tool call, in the order the calls began."""
    calls: dict[int, list[ToolDelta]] = {}
    for piece in pieces:
        calls.setdefault(piece.index, []).append(piece)
    return tuple(
        ToolDelta(
            index=index,
            id="".join(piece.id for piece in group),
            name="".join(piece.name for piece in group),
            arguments="".join(piece.arguments for piece in group),
        )
        for index, group in calls.items()
    )
