"""Probes and metrics: whether the process lives, whether it can serve, and what it has done."""

from typing import Literal

import msgspec
from litestar import Response, get
from litestar.handlers import HTTPRouteHandler
from prometheus_client import CONTENT_TYPE_LATEST

from router.dispatch import Dispatcher
from router.metrics import Metrics
from shared.errors import Unavailable

__all__ = ("Health", "health_routes")

_encode = msgspec.json.Encoder().encode


class Health(msgspec.Struct, frozen=True):
    """What a probe is told when all is well."""

    status: Literal["alive", "ready"]


def health_routes(dispatcher: Dispatcher, metrics: Metrics) -> list[HTTPRouteHandler]:
    """Routes for `/livez`, `/readyz` and `/metrics`."""

    @get("/livez", sync_to_thread=False)
    def livez() -> Response[bytes]:
        return Response(content=_encode(Health("alive")), media_type="application/json")

    @get("/readyz", sync_to_thread=False)
    def readyz() -> Response[bytes]:
        if not dispatcher.bus.connected:
            raise Unavailable("NATS is away.", retry_after=2)
        if dispatcher.draining:
            raise Unavailable("This router is shutting down.", retry_after=2)
        if not dispatcher.informed:
            raise Unavailable("This router is getting to know the workers.", retry_after=1)
        return Response(content=_encode(Health("ready")), media_type="application/json")

    @get("/metrics", sync_to_thread=False)
    def prometheus() -> Response[bytes]:
        return Response(content=metrics.render(), media_type=CONTENT_TYPE_LATEST)

    return [livez, readyz, prometheus]
