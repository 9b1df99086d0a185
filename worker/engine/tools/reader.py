"""Reading text that arrives in pieces as if it were there already.

Parsers are generators that wait (yield) where they need more text. So they decide on the text
alone, never on where it was cut into pieces: any split gives the same result.
"""

import json
import re
from collections.abc import Callable, Generator
from typing import TypeVar

__all__ = ("Reader", "Wait")

T = TypeVar("T")
Wait = Generator[None, None, T]

_STRUCTURE = re.compile(r'[{}\[\]"]')
_STRING_END = re.compile(r'["\\]')
_SCALAR_END = re.compile(r"[\s,\]}]")
_NO_SPACE = re.compile(r"\S")


class Reader:
    """The text that has arrived and is not used up, with a cursor.

    Text from `hold` on is kept, so that a parser can `rewind` to it.
    """

    __slots__ = ("_ended", "_hold", "_pos", "_text")

    def __init__(self) -> None:
        self._text = ""
        self._pos = 0
        self._hold: int | None = None
        self._ended = False

    def feed(self, text: str) -> None:
        """Add text that has arrived."""
        cut = self._pos if self._hold is None else self._hold
        self._text = self._text[cut:] + text
        self._pos -= cut
        if self._hold is not None:
            self._hold = 0

    def end(self) -> None:
        """Nothing more will arrive."""
        self._ended = True

    def hold(self) -> None:
        """Keep everything from the cursor on, until `release` or `rewind`."""
        self._hold = self._pos

    def release(self) -> None:
        """Give up the wish to rewind."""
        self._hold = None

    def rewind(self) -> None:
        """Put the cursor back to where `hold` was called."""
        if self._hold is not None:
            self._pos, self._hold = self._hold, None

    def _advance(self, pattern: re.Pattern[str]) -> tuple[str, str]:
        """Take what precedes the pattern and the character it matched, as far as has arrived."""
        match = pattern.search(self._text, self._pos)
        start, self._pos = self._pos, len(self._text) if match is None else match.end()
        if match is None:
            return self._text[start:], ""
        return self._text[start : match.start()], match.group()

    def peek(self) -> Wait[str]:
        """The next character, or nothing at the end."""
        while self._pos >= len(self._text) and not self._ended:
            yield
        return self._text[self._pos : self._pos + 1]

    def space(self) -> Wait[None]:
        """Skip white space."""
        while True:
            match = _NO_SPACE.search(self._text, self._pos)
            self._pos = len(self._text) if match is None else match.start()
            if match is not None or self._ended:
                return
            yield

    def take(self, literal: str) -> Wait[bool]:
        """Skip the literal if it comes next; else stay."""
        while (
            not self._ended
            and len(self._text) - self._pos < len(literal)
            and literal.startswith(self._text[self._pos :])
        ):
            yield
        if not self._text.startswith(literal, self._pos):
            return False
        self._pos += len(literal)
        return True

    def take_while(self, pattern: re.Pattern[str]) -> Wait[str]:
        """Take the characters that match `pattern`, which describes one character."""
        out = []
        while (char := (yield from self.peek())) and pattern.match(char):
            out.append(char)
            self._pos += 1
        return "".join(out)

    def until(self, literal: str, emit: Callable[[str], None]) -> Wait[bool]:
        """Emit everything before the literal; put the cursor on it. False: it never came."""
        while True:
            found = self._text.find(literal, self._pos)
            cut = found if found >= 0 else self._before_start_of(literal)
            if cut > self._pos:
                emit(self._text[self._pos : cut])
                self._pos = cut
            if found >= 0:
                return True
            if self._ended:
                return False
            yield

    def _before_start_of(self, literal: str) -> int:
        """Where an end of the text that may become the literal begins."""
        end = len(self._text)
        if not self._ended:
            for start in range(max(self._pos, end - len(literal) + 1), end):
                if literal.startswith(self._text[start:]):
                    return start
        return end

    def rest(self, emit: Callable[[str], None]) -> Wait[None]:
        """Emit everything until the end."""
        while True:
            if self._pos < len(self._text):
                emit(self._text[self._pos :])
                self._pos = len(self._text)
            if self._ended:
                return
            yield

    def string(self) -> Wait[str | None]:
        """Take a JSON string and decode it; None if there is none."""
        if (yield from self.peek()) != '"':
            return None
        parts: list[str] = []
        if not (yield from self.value(parts.append)):
            return None
        try:
            decoded = json.loads("".join(parts), strict=False)
        except ValueError:
            return None
        return decoded if isinstance(decoded, str) else None

    def value(self, emit: Callable[[str], None]) -> Wait[bool]:
        """Take a JSON value, emitting its text as it arrives; False if the text ends inside.

        Only its extent is found (strings and brackets); its grammar is not checked.
        """
        first = yield from self.peek()
        if first == "":
            return False
        if first == '"' or first not in "{[":
            return (yield from (self._string(emit) if first == '"' else self._scalar(emit)))
        depth = 0
        while True:
            text, char = self._advance(_STRUCTURE)
            if char == '"':
                if text:
                    emit(text)
                self._pos -= 1
                if not (yield from self._string(emit)):
                    return False
                continue
            if text or char:
                emit(text + char)
            if char:
                depth += 1 if char in "{[" else -1
                if depth == 0:
                    return True
            elif self._ended:
                return False
            else:
                yield

    def _string(self, emit: Callable[[str], None]) -> Wait[bool]:
        emit('"')
        self._pos += 1
        while True:
            text, char = self._advance(_STRING_END)
            if text or char:
                emit(text + char)
            if char == '"':
                return True
            if char == "\\":
                escaped = yield from self.peek()
                if escaped == "":
                    return False
                emit(escaped)
                self._pos += 1
            elif self._ended:
                return False
            else:
                yield

    def _scalar(self, emit: Callable[[str], None]) -> Wait[bool]:
        while True:
            text, char = self._advance(_SCALAR_END)
            if text:
                emit(text)
            if char:
                self._pos -= 1
                return True
            if self._ended:
                return False
            yield
