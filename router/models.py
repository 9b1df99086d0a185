"""`/v1/models`: what is served, in OpenAI's form, with what the mesh knows beside it."""

from typing import Any

import msgspec
from litestar import Request, Response, get
from litestar.handlers import HTTPRouteHandler

from router.dispatch import Dispatcher
from router.fleet import ModelView

__all__ = ("model_routes",)

_encode = msgspec.json.Encoder().encode


def model_routes(dispatcher: Dispatcher) -> list[HTTPRouteHandler]:
    """Routes for the list and for one model; names may hold slashes."""

    @get("/v1/models", sync_to_thread=False)
    def models() -> Response[bytes]:
        return _json({"object": "list", "data": [_object(v) for v in dispatcher.fleet.models()]})

    @get("/v1/models/{name:path}", sync_to_thread=False)
    def model(request: Request[Any, Any, Any]) -> Response[bytes]:
        # Not the path parameter: Litestar folds repeated slashes.
        name = request.scope["path"].removeprefix("/v1/models/")
        view = dispatcher.fleet.model(name)
        if view is None:
            raise dispatcher.nobody(name, [])
        return _json(_object(view))

    return [models, model]


def _object(view: ModelView) -> dict[str, Any]:
    return {
        "id": view.name,
        "object": "model",
        "created": view.created,
        "owned_by": "mesh",
        "meta": {
            "state": view.state,
            "workers": view.workers,
            "context": view.context,
            "embeddings": view.embeddings,
        },
    }


def _json(value: Any) -> Response[bytes]:
    return Response(content=_encode(value), media_type="application/json")
