"""Reading a request's body within a limit."""

from typing import Any

from router.problems import UnsupportedMediaType
from shared.errors import InvalidRequest, PayloadTooLarge

__all__ = ("read_json_body",)


async def read_json_body(scope: Any, receive: Any, limit: int) -> bytes:
    """Read the whole body.

    Raises:
        UnsupportedMediaType: it is declared as something else than JSON.
        PayloadTooLarge: it is, or says that it is, larger than the limit.
        InvalidRequest: the client left in the middle of it.
    """
    headers = dict(scope["headers"])
    kind = headers.get(b"content-type", b"application/json").partition(b";")[0].strip().lower()
    if kind != b"application/json":
        raise UnsupportedMediaType(
            f"The content type must be 'application/json', not '{kind.decode('latin-1')}'."
        )
    if (length := headers.get(b"content-length", b"")).isdigit() and int(length) > limit:
        raise _too_large(limit)
    pieces: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise InvalidRequest("The client left before its request was complete.")
        piece = message["body"]
        size += len(piece)
        if size > limit:
            raise _too_large(limit)
        pieces.append(piece)
        if not message["more_body"]:
            return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def _too_large(limit: int) -> PayloadTooLarge:
    return PayloadTooLarge(f"The body exceeds this router's limit of {limit} bytes.")
