"""Decoding what others sent: whatever is wrong with it is one kind of error."""

from typing import Protocol, TypeVar

import msgspec

__all__ = ("decoded",)

T_co = TypeVar("T_co", covariant=True)


class _Decoder(Protocol[T_co]):
    def decode(self, data: bytes, /) -> T_co: ...


def decoded(decoder: _Decoder[T_co], data: bytes) -> T_co:
    """Decode a message.

    Raises:
        msgspec.DecodeError: it is not one; also where msgspec raises something else for that.
    """
    try:
        return decoder.decode(data)
    except RecursionError:
        raise msgspec.ValidationError("nested too deeply") from None
    except UnicodeDecodeError as error:
        # msgspec lets this one through where a name or a tag is not UTF-8.
        raise msgspec.DecodeError(f"text that is not UTF-8: {error.reason}") from None
