"""Tool calls out of streamed text, for every family.

Only text that has turned out to be a call of a known function leaves the content; whatever merely
looks like one is given back as content, unchanged. White space and separators that frame calls are
dropped.
"""

import re
from collections.abc import Callable

from shared.protocol import Tool, ToolChoice, ToolDelta
from worker.engine.tools.calls import Calls, read_call
from worker.engine.tools.families import (
    MISTRAL_ARGS,
    MISTRAL_CALLS,
    PYTHON_TAG,
    TOOL_CALL,
    TOOL_CALL_END,
    ToolFamily,
)
from worker.engine.tools.reader import Reader, Wait

__all__ = ("ToolParser",)

_NAME_CHAR = re.compile(r"[\w.-]")
_ID_CHAR = re.compile(r"[A-Za-z0-9]")


class ToolParser:
    """Parses the output of one choice.

    `salt` makes the ids of the calls; two choices must not share it.
    """

    __slots__ = ("_calls", "_parse", "_reader")

    def __init__(
        self, family: ToolFamily, tools: tuple[Tool, ...], choice: ToolChoice, *, salt: str
    ) -> None:
        active = () if choice.mode == "none" else tools
        names = frozenset(tool.name for tool in active)
        self._reader = Reader()
        self._calls = Calls(names, salt=salt, parallel=choice.parallel)
        self._parse: Wait[None] | None = None
        if names:
            self._parse = _FAMILIES[family](self._reader, self._calls)
            next(self._parse)

    @property
    def called(self) -> bool:
        """A function was called: the finish reason is `tool_calls`."""
        return self._calls.count > 0

    @property
    def finished(self) -> bool:
        """The only call that the request allows is complete: the choice may end here.

        If it goes on, further calls are told as content.
        """
        return self._calls.finished

    def push(self, text: str) -> tuple[str, tuple[ToolDelta, ...]]:
        """Take new text; return the content and the pieces of calls that are certain now."""
        if self._parse is None:
            return text, ()
        if not text:
            return "", ()
        self._reader.feed(text)
        next(self._parse)
        return self._calls.collect()

    def flush(self) -> tuple[str, tuple[ToolDelta, ...]]:
        """The text ends here: what is still held turns out to be content."""
        if self._parse is None:
            return "", ()
        self._reader.end()
        for _ in self._parse:
            raise AssertionError("a tool parser waits for text after the end")
        self._parse = None
        self._calls.end()
        return self._calls.collect()


def _hermes(reader: Reader, calls: Calls) -> Wait[None]:
    while not calls.full and (yield from reader.until(TOOL_CALL, calls.content)):
        reader.hold()
        yield from reader.take(TOOL_CALL)
        yield from reader.space()
        if (yield from read_call(reader, calls)):
            yield from reader.space()
            yield from reader.take(TOOL_CALL_END)
        else:
            yield from _give_back(reader, calls, TOOL_CALL)
    yield from _rest(reader, calls)


def _llama3(reader: Reader, calls: Calls) -> Wait[None]:
    reader.hold()
    yield from reader.space()
    if (yield from read_call(reader, calls)):
        yield from _more_llama3(reader, calls)
    else:
        reader.rewind()
    while not calls.full and (yield from reader.until(PYTHON_TAG, calls.content)):
        reader.hold()
        yield from reader.take(PYTHON_TAG)
        yield from reader.space()
        if (yield from read_call(reader, calls)):
            yield from _more_llama3(reader, calls)
        else:
            yield from _give_back(reader, calls, PYTHON_TAG)
    yield from _rest(reader, calls)


def _more_llama3(reader: Reader, calls: Calls) -> Wait[None]:
    while not calls.full:
        reader.hold()
        yield from reader.space()
        yield from reader.take(";")
        yield from reader.space()
        if not (yield from read_call(reader, calls)):
            reader.rewind()
            return


def _mistral(reader: Reader, calls: Calls) -> Wait[None]:
    while not calls.full and (yield from reader.until(MISTRAL_CALLS, calls.content)):
        reader.hold()
        yield from reader.take(MISTRAL_CALLS)
        yield from reader.space()
        if (yield from reader.take("[")):
            made = yield from _mistral_array(reader, calls)
        else:
            made = yield from _mistral_named(reader, calls)
        if not made:
            yield from _give_back(reader, calls, MISTRAL_CALLS)
    yield from _rest(reader, calls)


def _mistral_array(reader: Reader, calls: Calls) -> Wait[bool]:
    before = calls.count
    while not calls.full:
        yield from reader.space()
        if not (yield from read_call(reader, calls)):
            break
        reader.hold()
        yield from reader.space()
        if not (yield from reader.take(",")):
            break
    if calls.count == before:
        return False
    reader.rewind()
    yield from reader.space()
    yield from reader.take("]")
    return True


def _mistral_named(reader: Reader, calls: Calls) -> Wait[bool]:
    name = yield from reader.take_while(_NAME_CHAR)
    if name not in calls.names:
        return False
    if (yield from reader.take("[CALL_ID]")):
        yield from reader.take_while(_ID_CHAR)
    yield from reader.take(MISTRAL_ARGS)
    yield from reader.space()
    if (yield from reader.peek()) != "{":
        return False
    reader.release()
    calls.begin(name)
    yield from reader.value(calls.arguments)
    return True


def _rest(reader: Reader, calls: Calls) -> Wait[None]:
    calls.finished = calls.full
    yield from reader.rest(calls.content)


def _give_back(reader: Reader, calls: Calls, marker: str) -> Wait[None]:
    """What began with the marker is no call: the marker is content, the rest is read again."""
    reader.rewind()
    yield from reader.take(marker)
    calls.content(marker)


_FAMILIES: dict[ToolFamily, Callable[[Reader, Calls], Wait[None]]] = {
    "hermes": _hermes,
    "llama3": _llama3,
    "mistral": _mistral,
    "mistral_args": _mistral,
}
