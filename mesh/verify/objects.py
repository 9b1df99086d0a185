"""OpenAI's objects as a client reads them: what it relies on, and no more."""

from typing import Literal, TypeVar

import msgspec

from mesh.verify.finding import Fault

__all__ = (
    "ChatChunk",
    "ChatCompletion",
    "Completion",
    "CompletionChunk",
    "ErrorBody",
    "ErrorObject",
    "Model",
    "ModelList",
    "Timings",
    "Usage",
    "read",
)

T = TypeVar("T")

FinishReason = Literal["stop", "length", "tool_calls", "content_filter", "function_call"]


class Model(msgspec.Struct, frozen=True):
    """A model that is served."""

    id: str
    object: Literal["model"]


class ModelList(msgspec.Struct, frozen=True):
    """The answer of `/models`."""

    object: Literal["list"]
    data: tuple[Model, ...]


class ErrorObject(msgspec.Struct, frozen=True):
    """Why a request was refused; `param` names the field at fault."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(msgspec.Struct, frozen=True):
    """The answer to a request that was refused."""

    error: ErrorObject


class Usage(msgspec.Struct, frozen=True):
    """Tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Timings(msgspec.Struct, frozen=True):
    """What a mesh tells beside the usage."""

    resumed: int = 0


class _Message(msgspec.Struct, frozen=True):
    role: Literal["assistant"]
    content: str | None


class _ChatChoice(msgspec.Struct, frozen=True):
    index: int
    message: _Message
    finish_reason: FinishReason


class ChatCompletion(msgspec.Struct, frozen=True):
    """A whole answer of `/chat/completions`."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: tuple[_ChatChoice, ...]
    usage: Usage

    @property
    def text(self) -> str:
        """What the first choice says."""
        return (self.choices[0].message.content or "") if self.choices else ""

    @property
    def reason(self) -> str:
        """Why the first choice ended."""
        return self.choices[0].finish_reason if self.choices else ""


class _TextChoice(msgspec.Struct, frozen=True):
    index: int
    text: str
    finish_reason: FinishReason


class Completion(msgspec.Struct, frozen=True):
    """A whole answer of `/completions`."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: tuple[_TextChoice, ...]
    usage: Usage

    @property
    def text(self) -> str:
        """What the first choice says."""
        return self.choices[0].text if self.choices else ""

    @property
    def reason(self) -> str:
        """Why the first choice ended."""
        return self.choices[0].finish_reason if self.choices else ""


class _Delta(msgspec.Struct, frozen=True):
    role: str | None = None
    content: str | None = None


class _ChunkChoice(msgspec.Struct, frozen=True):
    index: int
    delta: _Delta
    finish_reason: FinishReason | None = None


class ChatChunk(msgspec.Struct, frozen=True):
    """An event of a chat's stream."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: tuple[_ChunkChoice, ...]
    usage: Usage | None = None
    timings: Timings | None = None

    @property
    def text(self) -> str:
        """What is new."""
        return "".join(choice.delta.content or "" for choice in self.choices)


class _TextChunkChoice(msgspec.Struct, frozen=True):
    index: int
    text: str
    finish_reason: FinishReason | None = None


class CompletionChunk(msgspec.Struct, frozen=True):
    """An event of the stream of `/completions`."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: tuple[_TextChunkChoice, ...]
    usage: Usage | None = None

    @property
    def text(self) -> str:
        """What is new."""
        return "".join(choice.text for choice in self.choices)


def read(data: bytes | str, kind: type[T], what: str) -> T:
    """Decode JSON into one of these objects.

    Raises:
        Fault: it is something else; the message begins with `what`.
    """
    try:
        return msgspec.json.decode(data, type=kind)
    except msgspec.DecodeError as error:
        said = data if isinstance(data, str) else data.decode(errors="replace")
        said = " ".join(said.split())
        short = said if len(said) <= _SHOWN else f"{said[:_SHOWN]}…"
        raise Fault(f"{what}: {_lower(str(error))}; it was {short or 'empty'}") from None


_SHOWN = 120
"""Characters of an answer that is not what it should be."""


def _lower(text: str) -> str:
    return text[:1].lower() + text[1:]
