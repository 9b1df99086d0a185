"""Messages gone wrong: seeded mutations of real ones, some of bytes and some of what they mean."""

import random
from collections.abc import Callable
from typing import Any

import msgspec

__all__ = ("MOST", "Mutator")

MOST = 1 << 20
"""Bytes of a message; NATS itself refuses those above `max_payload`."""

_ODD: tuple[Any, ...] = (
    *(-1, 0, 1, 2**31, 2**53, 2**63 - 1, 2**64 - 1, -(2**63)),
    *(float("nan"), float("inf"), -float("inf"), 1e308, -0.0),
    *("", "\r\nx: y", "a b*>", "x" * 70, "\x00", "\U0001f600" * 9, b"", b"\xff" * 9),
    *(None, True, False, [], {}, [[[[]]]], {"x": {"y": []}}),
)
# Nested deeply, and lengths of which nothing comes.
_STUFFING = (b"\x91" * 3000 + b"\x90", b"[" * 3000, b"\xdd\xff\xff\xff\xff", b"\xc6\xff\xff")


class Mutator:
    """Makes one message out of another; the same seed makes the same ones."""

    def __init__(self, seed: int, *, json: bool = False) -> None:
        self.random = random.Random(seed)
        self._codec: Any = msgspec.json if json else msgspec.msgpack
        self._last = b"\x00"
        self._ways: tuple[Callable[[bytes], bytes], ...] = (
            *[self._meant] * 6,
            *[self._flipped] * 2,
            self._cut,
            self._spliced,
            self._doubled,
            self._stuffed,
            self._noise,
            self._whole,
        )

    def mutate(self, message: bytes) -> bytes:
        """One mutation of a message."""
        mutated = self.random.choice(self._ways)(message)
        self._last = message
        return mutated[:MOST]

    def _meant(self, message: bytes) -> bytes:
        """Something odd in the place of a part."""
        tree = self._codec.decode(message)
        for _ in range(self.random.choice((1, 1, 2, 4))):
            tree = self._odd(tree, depth=self.random.randint(1, 5))
        return self._codec.encode(tree)

    def _odd(self, node: Any, depth: int) -> Any:
        if depth and isinstance(node, list) and node:
            place = self.random.randrange(len(node))
            rest = node[:place], node[place + 1 :]
            many = self.random.choice((1, 1, 1, 0, 2, 50))
            return [*rest[0], *[self._odd(node[place], depth - 1)] * many, *rest[1]]
        if depth and isinstance(node, dict) and node:
            key = self.random.choice(list(node))
            if self.random.random() < 0.1:
                return {name: value for name, value in node.items() if name != key}
            return node | {key: self._odd(node[key], depth - 1)}
        # Mostly of the same type, so that it is not at once told from a message.
        alike = [odd for odd in _ODD if type(odd) is type(node)]
        odd = self.random.choice(alike if alike and self.random.random() < 0.7 else _ODD)
        return list(odd) if isinstance(odd, bytes) and self._codec is msgspec.json else odd

    def _flipped(self, message: bytes) -> bytes:
        data = bytearray(message or b"\x00")
        for _ in range(self.random.choice((1, 1, 2, 8))):
            data[self.random.randrange(len(data))] ^= 1 << self.random.randrange(8)
        return bytes(data)

    def _cut(self, message: bytes) -> bytes:
        return message[: self.random.randrange(len(message) + 1)]

    def _spliced(self, message: bytes) -> bytes:
        one, other = self._cut(message), self._last[self.random.randrange(len(self._last) + 1) :]
        return one + other

    def _doubled(self, message: bytes) -> bytes:
        start = self.random.randrange(len(message) + 1)
        end = self.random.randint(start, len(message))
        return message[:end] + message[start:end] * self.random.choice((1, 2, 100)) + message[end:]

    def _stuffed(self, message: bytes) -> bytes:
        place = self.random.randrange(len(message) + 1)
        return message[:place] + self.random.choice(_STUFFING) + message[place:]

    def _noise(self, message: bytes) -> bytes:
        return self.random.randbytes(self.random.choice((0, 1, 8, 64, 5000)))

    def _whole(self, message: bytes) -> bytes:
        return message
