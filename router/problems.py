"""Errors as HTTP: OpenAI's error object, status and `Retry-After`.

The only place where an error meets HTTP. Adds to `shared.errors` the few that only HTTP knows.
"""

import msgspec

from shared.errors import MeshError

__all__ = (
    "JSON",
    "ErrorAnswer",
    "MethodNotAllowed",
    "RouteNotFound",
    "UnsupportedMediaType",
    "error_body",
    "error_headers",
)

JSON = (b"content-type", b"application/json")

_encode = msgspec.json.Encoder().encode


class RouteNotFound(MeshError):
    """No such path."""

    status = 404
    type = "invalid_request_error"
    code = "not_found"


class MethodNotAllowed(MeshError):
    """The path exists, for other methods; `allow` names them."""

    status = 405
    type = "invalid_request_error"
    code = "method_not_allowed"

    def __init__(self, message: str, *, allow: str = "") -> None:
        super().__init__(message)
        self.allow = allow


class UnsupportedMediaType(MeshError):
    """The body is not declared as JSON."""

    status = 415
    type = "invalid_request_error"
    code = "unsupported_media_type"


class ErrorObject(msgspec.Struct, frozen=True):
    """OpenAI's error; `param` names the field at fault, `code` is for programs."""

    message: str
    type: str
    param: str | None
    code: str


class ErrorAnswer(msgspec.Struct, frozen=True):
    """The answer of every request that failed."""

    error: ErrorObject


def error_body(error: MeshError) -> bytes:
    """Encode OpenAI's error object."""
    return _encode(ErrorAnswer(ErrorObject(error.message, error.type, error.param, error.code)))


def error_headers(error: MeshError) -> list[tuple[bytes, bytes]]:
    """Headers that belong to an error; `Retry-After` stays within the 1 to 60 s SDKs honour."""
    headers = [JSON]
    if error.status in (429, 503):
        seconds = min(60, max(1, error.retry_after or 1))
        headers.append((b"retry-after", b"%d" % seconds))
    if isinstance(error, MethodNotAllowed) and error.allow:
        headers.append((b"allow", error.allow.encode()))
    return headers
