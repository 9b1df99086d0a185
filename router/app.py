"""The ASGI application: routes, and one way for every error to become OpenAI's error object."""

import asyncio
from typing import Any

import structlog
from litestar import Litestar, Request, Response
from litestar.exceptions import HTTPException, MethodNotAllowedException, NotFoundException

from router.dispatch import Dispatcher
from router.front import Front
from router.health import health_routes
from router.inference import inference_routes
from router.metrics import Metrics, Tasks
from router.models import model_routes
from router.openapi import openapi_route
from router.problems import (
    MethodNotAllowed,
    RouteNotFound,
    error_body,
    error_headers,
)
from router.settings import Settings
from shared.errors import InvalidRequest, MeshError
from shared.wish import Wish

__all__ = ("create_app",)

log = structlog.get_logger(__name__)


def create_app(dispatcher: Dispatcher, settings: Settings) -> Front:
    """Build the application around a dispatcher that runs, or soon will."""
    metrics = Metrics(
        dispatcher.fleet.knows,
        lambda: dispatcher.bus.connected,
        held=dispatcher.waiting.counts,
        wishes=lambda: _wish(dispatcher),
        retries=dispatcher.retries,
        breakers=dispatcher.breakers,
        dropped=dispatcher.dropped,
        tasks=lambda: _tasks(dispatcher),
    )
    app = Litestar(
        route_handlers=[
            *inference_routes(dispatcher, metrics, settings),
            *model_routes(dispatcher),
            *health_routes(dispatcher, metrics),
            openapi_route(),
        ],
        exception_handlers={Exception: _respond},
        openapi_config=None,  # router.openapi describes what Litestar cannot see
        logging_config=None,
    )
    return Front(app, metrics)


def _tasks(dispatcher: Dispatcher) -> Tasks:
    workers = {beat.worker: beat.tasks for beat in dispatcher.fleet.beats()}
    return Tasks(len(asyncio.all_tasks()), workers)


def _wish(dispatcher: Dispatcher) -> Wish | None:
    """Workers wanted; None while this router does not know who is there and what is asked for."""
    knows = dispatcher.bus.connected and dispatcher.informed and dispatcher.board.informed
    return dispatcher.wishes.current() if knows else None


def _respond(_: Request[Any, Any, Any], error: Exception) -> Response[bytes]:
    mapped = _as_mesh_error(error)
    return Response(
        content=error_body(mapped),
        status_code=mapped.status,
        headers={name.decode(): value.decode() for name, value in error_headers(mapped)},
        media_type="application/json",
    )


def _as_mesh_error(error: Exception) -> MeshError:
    if isinstance(error, MeshError):
        return error
    if isinstance(error, NotFoundException):
        return RouteNotFound("There is no such path here.")
    if isinstance(error, MethodNotAllowedException):
        allowed = (error.headers or {}).get("allow", "")
        return MethodNotAllowed("This path does not take this method.", allow=allowed)
    if isinstance(error, HTTPException) and error.status_code < 500:
        return InvalidRequest(error.detail)
    log.error("request.crashed", exc_info=error)
    return MeshError("The router failed on this request.")
