"""What the stages of a model send each other: one message a hop.

    head                 stage 0              stage 1              head
      |  Pass + activations  |                    |                  |
      |--------------------->|  Pass + its output |                  |
      |                      |------------------->|  Pass + output   |
      |                      |                    |----------------->|  logits, tokens
      |--------------------->|  (the next one meanwhile)             |

A pass goes through all stages unchanged but for its rows; numbers without a gap show each stage
that none was lost. What is done to the caches (a sequence cut, copied, swapped with another)
travels with the next pass and happens before its rows are computed, so that all caches stay alike.

A message is the length of its head (4 bytes, little endian), the head as MessagePack, and the rows:
numbers of 16 bits (IEEE 754 binary16, beyond its range the largest) or 32, little endian, row after
row. A sender splits what would exceed NATS's limit into several passes.
"""

import struct
from typing import Annotated

import msgspec

from shared.bounds import Count
from shared.decoding import decoded

__all__ = (
    "Broken",
    "Copy",
    "Forget",
    "Hello",
    "Operation",
    "Pass",
    "StageMessage",
    "Swap",
    "decode_message",
    "encode_message",
)

_LENGTH = struct.Struct("<I")
_MOST_HEAD = 1 << 20

_Group = Annotated[str, msgspec.Meta(min_length=1, max_length=64)]
_Slot = Annotated[int, msgspec.Meta(ge=0, lt=1 << 16)]
_Rows = Annotated[int, msgspec.Meta(ge=1, lt=1 << 16)]


class Forget(msgspec.Struct, frozen=True, array_like=True, tag="f"):
    """Drop a sequence's tokens from `start` on."""

    slot: _Slot
    start: Count


class Copy(msgspec.Struct, frozen=True, array_like=True, tag="c"):
    """Make `target` hold what `source` holds."""

    source: _Slot
    target: _Slot


class Swap(msgspec.Struct, frozen=True, array_like=True, tag="s"):
    """Exchange what two sequences hold."""

    left: _Slot
    right: _Slot


Operation = Forget | Copy | Swap


class Hello(msgspec.Struct, frozen=True, array_like=True, tag="h"):
    """Goes round before the first pass: all stages are there, and agree on their sizes.

    And now and then between two steps, to measure the way round.
    """

    group: _Group
    slots: Count
    context: Count
    """Tokens of a sequence."""
    width: Count
    """Numbers in a row."""
    stages: tuple[str, ...] = ()
    """Workers that have passed it on."""
    number: Count = 0
    """Tells one from another; 0 while the ring is not complete."""


class Pass(msgspec.Struct, frozen=True, array_like=True, tag="p"):
    """`each` rows of each of some sequences with consecutive slots, one after the other."""

    group: _Group
    number: Count
    """From 0 on, without a gap."""
    first: _Slot
    """Slot of the first sequence."""
    starts: tuple[Count, ...]
    """Position of each sequence's first row."""
    each: _Rows
    half: bool
    """Rows of 16 bits, not 32."""
    operations: tuple[Operation, ...] = ()
    """To be done first."""

    @property
    def rows(self) -> int:
        """In all."""
        return self.each * len(self.starts)


class Broken(msgspec.Struct, frozen=True, array_like=True, tag="b"):
    """A stage cannot go on, and with it the group; told to the head."""

    group: _Group
    worker: str
    reason: str


StageMessage = Hello | Pass | Broken

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[StageMessage] = msgspec.msgpack.Decoder(Hello | Pass | Broken)


def encode_message(head: StageMessage, rows: bytes = b"") -> bytes:
    """Encode a message; `rows` are those of a `Pass`."""
    data = _encoder.encode(head)
    return b"".join((_LENGTH.pack(len(data)), data, rows))


def decode_message(data: bytes) -> tuple[StageMessage, memoryview]:
    """Decode a message and its rows.

    Raises:
        msgspec.DecodeError: it is none.
    """
    if len(data) < _LENGTH.size:
        raise msgspec.DecodeError("a message of a stage is at least 4 bytes")
    (size,) = _LENGTH.unpack_from(data)
    end = _LENGTH.size + size
    if size > _MOST_HEAD or end > len(data):
        raise msgspec.DecodeError(f"a head of {size} bytes in a message of {len(data)}")
    return decoded(_decoder, data[_LENGTH.size : end]), memoryview(data)[end:]
