"""What `/v1/chat/completions` answers with, as types: whole, and as the chunks of a stream."""

from typing import Literal

import msgspec
from msgspec import UNSET, UnsetType

from router.dialects.answer import TimingsObject, UsageObject

__all__ = (
    "AnsweredCall",
    "AnsweredFunction",
    "AnsweredMessage",
    "CallPiece",
    "ChatChoice",
    "ChatChunk",
    "ChatCompletion",
    "ChatDelta",
    "ChatLogprobs",
    "ChunkChoice",
    "FunctionPiece",
    "TokenEntry",
    "TopLogprob",
)


class TopLogprob(msgspec.Struct, frozen=True):
    """A token that was likely, its natural log probability and its exact bytes."""

    token: str
    logprob: float
    bytes: list[int]


class TokenEntry(msgspec.Struct, frozen=True):
    """A token that was chosen, and the most likely ones in its place."""

    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct, frozen=True):
    """One entry a token."""

    content: list[TokenEntry]
    refusal: None = None


class AnsweredFunction(msgspec.Struct, frozen=True):
    """The function to call; `arguments` is JSON text."""

    name: str
    arguments: str


class AnsweredCall(msgspec.Struct, frozen=True):
    """A call that the model asks for."""

    id: str
    type: Literal["function"]
    function: AnsweredFunction


class AnsweredMessage(msgspec.Struct, frozen=True):
    """What the model said; without text beside calls, `content` is null."""

    role: Literal["assistant"]
    content: str | None
    refusal: None = None
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[AnsweredCall] | UnsetType = UNSET


class ChatChoice(msgspec.Struct, frozen=True):
    """One of the `n` answers."""

    index: int
    message: AnsweredMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"]


class ChatCompletion(msgspec.Struct, frozen=True):
    """The answer of `/v1/chat/completions`."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: UsageObject
    timings: TimingsObject


class FunctionPiece(msgspec.Struct, frozen=True):
    """More of a call's arguments; the name comes with the first piece only."""

    arguments: str
    name: str | UnsetType = UNSET


class CallPiece(msgspec.Struct, frozen=True):
    """A piece of call number `index`; id and type come with the first piece only."""

    index: int
    function: FunctionPiece
    id: str | UnsetType = UNSET
    type: Literal["function"] | UnsetType = UNSET


class ChatDelta(msgspec.Struct, frozen=True):
    """What is new in a choice; the role comes with the first chunk only."""

    role: Literal["assistant"] | UnsetType = UNSET
    content: str | UnsetType = UNSET
    refusal: UnsetType | None = UNSET
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[CallPiece] | UnsetType = UNSET


class ChunkChoice(msgspec.Struct, frozen=True):
    """What is new in one of the `n` answers."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"] | None


class ChatChunk(msgspec.Struct, frozen=True):
    """One event of a stream; usage comes with the last one if asked for, timings always do."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: UsageObject | UnsetType | None = UNSET
    timings: TimingsObject | UnsetType = UNSET
