"""One tool call in a stream of text: the object that names a function and its arguments."""

import hashlib
import json
from collections.abc import Collection

from shared.protocol import ToolDelta
from worker.engine.tools.reader import Reader, Wait

__all__ = ("Calls", "call_id", "read_call")

_NAMES = ("name", "function")
_ARGUMENTS = ("arguments", "parameters")
_IGNORED = ("id", "type")


def call_id(salt: str, index: int) -> str:
    """The id of a call: the same for the same salt and index, so that a resumed stream agrees."""
    digest = hashlib.blake2b(f"{salt}:{index}".encode(), digest_size=12)
    return f"call_{digest.hexdigest()}"


class Calls:
    """What a parser has found: content and pieces of calls, until they are collected."""

    __slots__ = (
        "_content",
        "_deltas",
        "_fresh",
        "_limit",
        "_salt",
        "_space",
        "count",
        "finished",
        "names",
    )

    def __init__(self, names: Collection[str], *, salt: str, parallel: bool) -> None:
        self.names = names
        self.count = 0
        """Calls begun so far."""
        self.finished = False
        """The only call that is allowed is complete."""
        self._salt = salt
        self._limit = None if parallel else 1
        self._content: list[str] = []
        self._deltas: list[ToolDelta] = []
        # White space at the start and after a call is content only if other content follows it.
        self._fresh = True
        self._space = ""

    @property
    def full(self) -> bool:
        """No further call is allowed."""
        return self._limit is not None and self.count >= self._limit

    def content(self, text: str) -> None:
        """Text that belongs to no call."""
        if self._fresh:
            text = self._space + text
            if text.isspace():
                self._space = text
                return
            self._fresh, self._space = False, ""
        self._content.append(text)

    def begin(self, name: str) -> None:
        """A call of the function begins."""
        self._fresh, self._space = True, ""
        self._deltas.append(ToolDelta(self.count, call_id(self._salt, self.count), name))
        self.count += 1

    def arguments(self, text: str) -> None:
        """More of the JSON text of the last call's arguments."""
        self._deltas.append(ToolDelta(self.count - 1, arguments=text))

    def end(self) -> None:
        """Nothing more comes: white space that was held back is content if nothing else is."""
        if self._space and not self.count:
            self._content.append(self._space)
        self._space = ""

    def collect(self) -> tuple[str, tuple[ToolDelta, ...]]:
        """What was found since the last time, pieces of one call joined."""
        content, self._content = "".join(self._content), []
        deltas, self._deltas = self._deltas, []
        joined: list[ToolDelta] = []
        for delta in deltas:
            last = joined[-1] if joined else None
            if last is not None and last.index == delta.index:
                delta = ToolDelta(last.index, last.id, last.name, last.arguments + delta.arguments)
                joined[-1] = delta
            else:
                joined.append(delta)
        return content, tuple(joined)


def read_call(reader: Reader, calls: Calls) -> Wait[bool]:
    """Read an object `{"name": …, "arguments": …}`; False: it is no call, and nothing was said.

    The caller holds the reader, and rewinds it on False. As soon as name and the begin of the
    arguments are known the call counts as made: the reader is released, and the arguments are told
    as they arrive.
    """
    if not (yield from reader.take("{")):
        return False
    call = _Call(reader, calls)
    while True:
        yield from reader.space()
        if (yield from reader.take("}")):
            return call.close()
        if (yield from reader.take(",")):
            continue
        key = yield from reader.string()
        yield from reader.space()
        if key is None or not (yield from reader.take(":")):
            return call.made
        yield from reader.space()
        if not (yield from call.member(key)):
            return call.made


class _Call:
    """What is known of one call while its object is read."""

    __slots__ = ("_arguments", "_calls", "_name", "_reader", "made")

    def __init__(self, reader: Reader, calls: Calls) -> None:
        self._reader = reader
        self._calls = calls
        self._name = ""
        self._arguments = ""
        self.made = False
        """The call was told; there is no way back."""

    def member(self, key: str) -> Wait[bool]:
        """Read the value of a key; False: the object ends or goes wrong here."""
        if self.made or key in _IGNORED:
            return (yield from self._reader.value(_drop))
        if key in _NAMES and not self._name:
            return (yield from self._read_name())
        if key in _ARGUMENTS and not self._arguments:
            return (yield from self._read_arguments())
        return False

    def close(self) -> bool:
        """The object is complete; tell whether it was a call. Without arguments there are none."""
        if self._name and not self.made:
            self._tell(self._arguments or "{}")
        return self.made

    def _tell(self, arguments: str = "") -> None:
        self.made = True
        self._reader.release()
        self._calls.begin(self._name)
        if arguments:
            self._calls.arguments(arguments)

    def _read_name(self) -> Wait[bool]:
        name = yield from self._reader.string()
        if name is None or name not in self._calls.names:
            return False
        self._name = name
        if self._arguments:
            self._tell(self._arguments)
        return True

    def _read_arguments(self) -> Wait[bool]:
        if self._name and (yield from self._reader.peek()) == "{":
            self._tell()
            return (yield from self._reader.value(self._calls.arguments))
        # Arguments before the name, or within a string, cannot be told as they arrive.
        parts: list[str] = []
        if not (yield from self._reader.value(parts.append)):
            return False
        self._arguments = _object_text("".join(parts))
        if self._name and self._arguments:
            self._tell(self._arguments)
        return bool(self._arguments)


def _object_text(text: str) -> str:
    """The JSON object that the text is, or holds as a string; `null` means none; else nothing."""
    try:
        value = json.loads(text, strict=False)
        if isinstance(value, str):
            value.encode()  # refuses lone surrogates, which could not be sent
            text, value = value, json.loads(value)
    except (ValueError, RecursionError):
        return ""
    if value is None:
        return "{}"
    return text if isinstance(value, dict) else ""


def _drop(text: str) -> None:
    """Ignore a value that says nothing about the call."""
