"""The OpenAPI description, derived from the Structs that check bodies and render answers.

Litestar would derive it from handlers' signatures; ours decode bodies themselves, so that errors
name the field in OpenAI's way, and write streams past Litestar. What remains to be said here is
which Struct belongs to which path.
"""

from functools import cache
from typing import Any

import msgspec
from litestar import Response, get
from litestar.handlers import HTTPRouteHandler

from router.dialects.chat import ChatRequest
from router.dialects.chat_objects import ChatChunk, ChatCompletion
from router.dialects.completions import CompletionRequest
from router.dialects.completions_answer import TextChunk, TextCompletion
from router.dialects.embeddings import EmbeddingList, EmbeddingRequest
from router.dialects.fields import ModelName
from router.health import Health
from router.inference import IdempotencyKey, RequestTimeout
from router.kept_answers import KeyReused
from router.models import ModelList, ModelObject
from router.problems import ErrorAnswer, UnsupportedMediaType
from shared import __version__
from shared.errors import (
    CannotContinue,
    DeadlineExceeded,
    InvalidRequest,
    MeshError,
    ModelNotFound,
    PayloadTooLarge,
    QueueFull,
    Unavailable,
    WorkerFailed,
)

__all__ = ("describe", "openapi_route")

PATH = "/openapi.json"
PLACE = "#/components/schemas/{name}"


class Operation(msgspec.Struct, frozen=True):
    """One method of one path."""

    method: str
    path: str
    name: str
    summary: str
    answer: type | None
    """None: plain text."""
    body: type | None = None
    chunk: type | None = None
    """What an event of its stream holds, if it can stream."""
    errors: tuple[type[MeshError], ...] = ()


_GENERATING: tuple[type[MeshError], ...] = (
    InvalidRequest,
    ModelNotFound,
    CannotContinue,
    PayloadTooLarge,
    UnsupportedMediaType,
    KeyReused,
    QueueFull,
    MeshError,
    WorkerFailed,
    Unavailable,
    DeadlineExceeded,
)

OPERATIONS = (
    Operation(
        "post",
        "/v1/chat/completions",
        "createChatCompletion",
        "Answer a conversation",
        ChatCompletion,
        body=ChatRequest,
        chunk=ChatChunk,
        errors=_GENERATING,
    ),
    Operation(
        "post",
        "/v1/completions",
        "createCompletion",
        "Go on from a prompt, or from each of several",
        TextCompletion,
        body=CompletionRequest,
        chunk=TextChunk,
        errors=_GENERATING,
    ),
    Operation(
        "post",
        "/v1/embeddings",
        "createEmbedding",
        "Embed texts as vectors of length 1",
        EmbeddingList,
        body=EmbeddingRequest,
        errors=_GENERATING,
    ),
    Operation("get", "/v1/models", "listModels", "List what is served", ModelList),
    Operation(
        "get",
        "/v1/models/{id}",
        "retrieveModel",
        "Look one model up; its name may hold slashes",
        ModelObject,
        errors=(ModelNotFound, Unavailable),
    ),
    Operation("get", "/livez", "live", "Whether the process works", Health),
    Operation(
        "get", "/readyz", "ready", "Whether requests can be taken", Health, errors=(Unavailable,)
    ),
    Operation("get", "/metrics", "metrics", "Counts in Prometheus's text format", None),
)


def openapi_route() -> HTTPRouteHandler:
    """The route that shows the description."""

    @get(PATH, sync_to_thread=False)
    def openapi() -> Response[bytes]:
        return Response(content=_encoded(), media_type="application/json")

    return openapi


@cache
def _encoded() -> bytes:
    return msgspec.json.encode(describe())


def describe() -> dict[str, Any]:
    """The whole description, as OpenAPI 3.1."""
    kinds = {kind for op in OPERATIONS for kind in (op.body, op.answer, op.chunk)} | {ErrorAnswer}
    named = sorted((kind for kind in kinds if kind is not None), key=lambda kind: kind.__name__)
    _, schemas = msgspec.json.schema_components(named, ref_template=PLACE)
    (name, timeout, key), _ = msgspec.json.schema_components(
        (ModelName, RequestTimeout, IdempotencyKey)
    )
    headers = {"X-Request-Timeout": timeout, "Idempotency-Key": key}
    paths: dict[str, Any] = {}
    for operation in OPERATIONS:
        described = _operation(operation, name, headers)
        paths.setdefault(operation.path, {})[operation.method] = described
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Mesh",
            "version": __version__,
            "description": "OpenAI's API, served by many hosts. Fields that are not described "
            "are ignored; described ones that cannot be honoured are a 400 that names them.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "paths": paths,
        "components": {"schemas": schemas},
    }


def _operation(
    operation: Operation, name: dict[str, Any], headers: dict[str, Any]
) -> dict[str, Any]:
    described: dict[str, Any] = {
        "operationId": operation.name,
        "summary": operation.summary,
        "responses": _responses(operation),
    }
    if "{id}" in operation.path:
        described["parameters"] = [{"name": "id", "in": "path", "required": True, "schema": name}]
    if operation.body is not None:
        described["parameters"] = [
            {"name": header, "in": "header", "schema": schema} for header, schema in headers.items()
        ]
        described["requestBody"] = {
            "required": True,
            "content": {"application/json": {"schema": _reference(operation.body)}},
        }
    return described


def _responses(operation: Operation) -> dict[str, Any]:
    content: dict[str, Any] = {}
    if operation.answer is None:
        content["text/plain"] = {"schema": {"type": "string"}}
    else:
        content["application/json"] = {"schema": _reference(operation.answer)}
    if operation.chunk is not None:
        content["text/event-stream"] = {"schema": _event(operation.chunk)}
    responses = {"200": {"description": "Success", "headers": _headers(), "content": content}}
    for error in operation.errors:
        responses[str(error.status)] = {
            "description": (error.__doc__ or "").strip(),
            "headers": _headers(retry=error.status in (429, 503)),
            "content": {"application/json": {"schema": _reference(ErrorAnswer)}},
        }
    return responses


def _event(chunk: type) -> dict[str, Any]:
    """One server-sent event; OpenAPI 3.1 has no word of its own for a sequence of them."""
    return {
        "description": "With `stream`: events one by one, `[DONE]` as the last. "
        "An answer that fails after it has begun ends with an event that holds an error.",
        "type": "object",
        "required": ["data"],
        "properties": {
            "id": {
                "type": "string",
                "description": "Where the client is, if it asked for that by "
                "`X-Mesh-Resumable: 1`; as `Last-Event-ID` of the same request it goes on from "
                "there.",
            },
            "data": {
                "anyOf": [
                    {"const": "[DONE]"},
                    {
                        "type": "string",
                        "contentMediaType": "application/json",
                        "contentSchema": {"anyOf": [_reference(chunk), _reference(ErrorAnswer)]},
                    },
                ]
            },
        },
    }


def _headers(*, retry: bool = False) -> dict[str, Any]:
    headers: dict[str, Any] = {
        "X-Request-Id": {
            "description": "The request's own id, or one made for it",
            "required": True,
            "schema": {"type": "string", "minLength": 1, "maxLength": 128},
        }
    }
    if retry:
        headers["Retry-After"] = {
            "description": "Seconds after which to try again",
            "required": True,
            "schema": {"type": "integer", "minimum": 1, "maximum": 60},
        }
    return headers


def _reference(kind: type) -> dict[str, str]:
    return {"$ref": PLACE.format(name=kind.__name__)}
