"""`/v1/models`: what is served, in OpenAI's form, with what the mesh knows beside it."""

from typing import Any, Literal

import msgspec
from litestar import Request, Response, get
from litestar.handlers import HTTPRouteHandler

from router.dispatch import Dispatcher
from router.fleet import Availability, ModelView

__all__ = ("ModelList", "ModelObject", "model_routes")

_encode = msgspec.json.Encoder().encode


class ModelMeta(msgspec.Struct, frozen=True):
    """What the mesh knows of a model."""

    state: Availability
    """The best that any worker says; `unavailable` when no worker is left."""
    workers: int
    """Workers that are ready to serve it."""
    context: int
    """Most tokens that a prompt and its answer may have together."""
    embeddings: bool


class ModelObject(msgspec.Struct, frozen=True):
    """One model."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    meta: ModelMeta


class ModelList(msgspec.Struct, frozen=True):
    """The answer of `/v1/models`."""

    object: Literal["list"]
    data: list[ModelObject]


def model_routes(dispatcher: Dispatcher) -> list[HTTPRouteHandler]:
    """Routes for the list and for one model; names may hold slashes."""

    @get("/v1/models", sync_to_thread=False)
    def models() -> Response[bytes]:
        return _json(ModelList("list", [_object(view) for view in dispatcher.fleet.models()]))

    @get("/v1/models/{name:path}", sync_to_thread=False)
    def model(request: Request[Any, Any, Any]) -> Response[bytes]:
        # Not the path parameter: Litestar folds repeated slashes.
        name = request.scope["path"].removeprefix("/v1/models/")
        view = dispatcher.fleet.model(name)
        if view is None:
            raise dispatcher.nobody(name, [])
        return _json(_object(view))

    return [models, model]


def _object(view: ModelView) -> ModelObject:
    return ModelObject(
        id=view.name,
        object="model",
        created=view.created,
        owned_by="mesh",
        meta=ModelMeta(view.state, view.workers, view.context, view.embeddings),
    )


def _json(value: Any) -> Response[bytes]:
    return Response(content=_encode(value), media_type="application/json")
