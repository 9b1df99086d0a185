"""Event ids: where a client is in an answer, as short text that only a router has to understand.

A client that lost its connection sends the last one back, and any router can go on from it. Nothing
of it is secret from its client, and nothing keeps a client from making one up: it would read its
own answers wrong, for workers keep what they know of an answer by its owner.

Layout, as base64 without padding: a byte of version and flags, the answer's key, the Unix time at
which it was created, a fingerprint of the request; then by part (a prompt) a hash of the worker
that has it, and by choice a number, which holds the count of its tokens and three flags, the check
of the tokens where there are any, and the length of its text where the dialect needs it. How many
parts and choices there are follows from the request.
"""

import binascii
import struct
from base64 import urlsafe_b64decode
from functools import lru_cache
from hashlib import blake2b

import msgspec

__all__ = (
    "Place",
    "Told",
    "decode_place",
    "encode_place",
    "fingerprint",
    "fingerprint_of",
    "hash_worker",
)

LONGEST = 4096
"""Characters; 128 choices take 1,600."""
NOBODY = bytes(4)
"""In place of a worker's hash."""

_VERSION = 1
_head = struct.Struct(">BQI4s")
_check = struct.Struct(">I")
_BEGUN, _WHOLE, _DONE = 1, 2, 4
_MOST = 1 << 31


class Told(msgspec.Struct):
    """What of one choice was told."""

    count: int = 0
    """So many tokens, with all the text that they made certain."""
    check: int = 0
    """Of their ids (`shared.token_check`)."""
    begun: bool = False
    """Its role, or the prompt's echo, was told."""
    whole: bool = False
    """And the text that only the end made certain."""
    done: bool = False
    """And its finish reason."""
    offset: int = 0
    """Length of the text, as offsets of log probabilities count it."""


class Place(msgspec.Struct):
    """Where the client is in its answer."""

    key: int
    created: int
    """Unix time in seconds."""
    fingerprint: bytes
    workers: list[bytes]
    """By part, the hash of the worker that has it."""
    choices: list[Told]
    """Of all parts, one after the other."""
    usage: bool = False
    """The usage was told."""


@lru_cache(maxsize=16_384)
def hash_worker(name: str) -> bytes:
    """Four bytes by which routers know a worker again; an empty name is nobody's."""
    return blake2b(name.encode(), digest_size=4).digest() if name else NOBODY


def fingerprint(body: bytes, owner: str, model: str) -> bytes:
    """Four bytes by which a request is known again, with its owner and the model that answers."""
    whose = blake2b(body, digest_size=16).digest() + f"{owner}\0{model}".encode()
    return blake2b(whose, digest_size=4).digest()


def encode_place(place: Place, *, offsets: bool) -> bytes:
    """As ASCII; `offsets`: the dialect needs the lengths of the texts."""
    data = bytearray(
        _head.pack(
            _VERSION << 1 | place.usage,
            place.key,
            place.created,
            place.fingerprint,
        )
    )
    choices, parts = place.choices, len(place.workers)
    each = len(choices) // parts
    for part, worker in enumerate(place.workers):
        data += worker
        for told in choices[part * each : (part + 1) * each]:
            flags = told.begun | told.whole << 1 | told.done << 2
            _add(data, told.count << 3 | flags)
            if told.count:
                data += _check.pack(told.check)
            if offsets:
                _add(data, told.offset)
    return binascii.b2a_base64(data, newline=False).translate(_URL_SAFE).rstrip(b"=")


_URL_SAFE = bytes.maketrans(b"+/", b"-_")


def decode_place(text: bytes, *, parts: int, each: int, offsets: bool) -> Place:
    """Read an id for an answer of so many parts with so many choices each.

    Raises:
        ValueError: it is none.
    """
    reader = _Reader(text)
    first, key, created, mark = reader.head()
    workers: list[bytes] = []
    choices: list[Told] = []
    for _ in range(parts):
        workers.append(reader.take(4))
        choices += [_told(reader, offsets=offsets) for _ in range(each)]
    if reader.left:
        raise ValueError("there is something behind its end")
    return Place(key, created, mark, workers, choices, usage=bool(first & 1))


def fingerprint_of(text: bytes) -> bytes:
    """The fingerprint of the request that an id is of; raises as `decode_place`."""
    mark: bytes = _Reader(text).head()[3]
    return mark


_ALPHABET = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"


class _Reader:
    def __init__(self, text: bytes) -> None:
        if not 0 < len(text) <= LONGEST or len(text) % 4 == 1:
            raise ValueError("its length is wrong")
        if text.translate(None, _ALPHABET):
            raise ValueError("it holds other characters than A-Z, a-z, 0-9, '-' and '_'")
        self._data = urlsafe_b64decode(text + b"=" * (-len(text) % 4))
        self._at = 0

    def head(self) -> tuple[int, int, int, bytes]:
        first, key, created, mark = _head.unpack(self.take(_head.size))
        if first >> 1 != _VERSION or key >= 1 << 63:
            raise ValueError("it is of another version")
        return first, key, created, mark

    @property
    def left(self) -> int:
        return len(self._data) - self._at

    def take(self, size: int) -> bytes:
        if self.left < size:
            raise ValueError("it is cut off")
        self._at += size
        return self._data[self._at - size : self._at]

    def number(self) -> int:
        value = shift = 0
        while True:
            (byte,) = self.take(1)
            value |= (byte & 127) << shift
            if byte < 128:
                return value
            shift += 7
            if shift > 35:
                raise ValueError("a number in it is too large")


def _told(reader: _Reader, *, offsets: bool) -> Told:
    number = reader.number()
    count = number >> 3
    check = _check.unpack(reader.take(4))[0] if count else 0
    offset = reader.number() if offsets else 0
    if max(count, offset) >= _MOST:
        raise ValueError("a number in it is too large")
    return Told(
        count=count,
        check=check,
        begun=bool(number & _BEGUN),
        whole=bool(number & _WHOLE),
        done=bool(number & _DONE),
        offset=offset,
    )


def _add(data: bytearray, number: int) -> None:
    """Seven bits a byte, the lowest first; the top bit says that more follow."""
    while number > 127:
        data.append(number & 127 | 128)
        number >>= 7
    data.append(number)
