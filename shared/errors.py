"""The errors a client may see, as one tree.

MeshError
├── InvalidRequest        400 invalid_request_error
│   └── ContextExceeded   400 context_length_exceeded
├── ModelNotFound         404 model_not_found
├── CannotContinue        410 cannot_continue: what the client has of an answer cannot go on
├── PayloadTooLarge       413 payload_too_large
├── QueueFull             429 queue_full, Retry-After
├── WorkerFailed          502 worker_failed: a worker, its engine or its frames were lost
├── Unavailable           503 unavailable, Retry-After: no worker, or NATS is away
└── DeadlineExceeded      504 deadline_exceeded

Codes travel in `shared.protocol.Fail`; only the router turns them into HTTP.
"""

from typing import ClassVar

__all__ = (
    "CannotContinue",
    "ContextExceeded",
    "DeadlineExceeded",
    "InvalidRequest",
    "MeshError",
    "ModelNotFound",
    "PayloadTooLarge",
    "QueueFull",
    "Unavailable",
    "WorkerFailed",
    "error_from_code",
)


class MeshError(Exception):
    """An error with OpenAI's four parts: message, type, param, code; and an HTTP status."""

    status: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"
    code: ClassVar[str] = "internal_error"

    def __init__(
        self, message: str, *, param: str | None = None, retry_after: int | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after = retry_after
        """Seconds for `Retry-After`, 1 to 60: the range that OpenAI's SDKs honour."""


class InvalidRequest(MeshError):
    """The request cannot be honoured as it stands; `param` names the field."""

    status = 400
    type = "invalid_request_error"
    code = "invalid_value"


class ContextExceeded(InvalidRequest):
    """Prompt and wished completion do not fit the model's context."""

    code = "context_length_exceeded"


class ModelNotFound(MeshError):
    """No worker serves or has served a model of this name."""

    status = 404
    type = "invalid_request_error"
    code = "model_not_found"


class CannotContinue(MeshError):
    """What the client has of an answer cannot go on: it would be followed by something else.

    OpenAI's SDKs do not ask again by themselves after a 410, which would be in vain.
    """

    status = 410
    code = "cannot_continue"


class PayloadTooLarge(MeshError):
    """The body or the envelope exceeds a limit, which the message names with its number."""

    status = 413
    type = "invalid_request_error"
    code = "payload_too_large"


class QueueFull(MeshError):
    """Every worker of the model has its slots and its queue full."""

    status = 429
    type = "rate_limit_error"
    code = "queue_full"


class WorkerFailed(MeshError):
    """The worker, its engine, or a frame of its answer was lost."""

    status = 502
    code = "worker_failed"


class Unavailable(MeshError):
    """No worker is there for the model, or NATS is away."""

    status = 503
    code = "unavailable"


class DeadlineExceeded(MeshError):
    """The request's absolute deadline passed."""

    status = 504
    code = "deadline_exceeded"


_BY_CODE: dict[str, type[MeshError]] = {
    kind.code: kind
    for kind in (
        MeshError,
        InvalidRequest,
        ContextExceeded,
        ModelNotFound,
        CannotContinue,
        PayloadTooLarge,
        QueueFull,
        WorkerFailed,
        Unavailable,
        DeadlineExceeded,
    )
}


def error_from_code(
    code: str, message: str, *, param: str | None = None, retry_after: int | None = None
) -> MeshError:
    """Rebuild the error a worker reported; a code unknown to this version becomes MeshError."""
    return _BY_CODE.get(code, MeshError)(message, param=param, retry_after=retry_after)
