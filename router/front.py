"""The outermost layer: every answer bears a request id, and none is lost to the counts."""

import time
from collections.abc import MutableMapping
from random import getrandbits
from typing import Any

from router.exchange import RAW_SEND, REQUEST_ID, STARTED
from router.metrics import Metrics

__all__ = ("Front", "request_id")

LONGEST_ID = 128
_NAME = b"x-request-id"


def request_id(headers: list[tuple[bytes, bytes]]) -> str:
    """The client's own id if it is 1 to 128 printable ASCII characters, else a new one."""
    for name, value in headers:
        if name == _NAME:
            if 0 < len(value) <= LONGEST_ID and all(32 < byte < 127 for byte in value):
                return value.decode("ascii")
            break
    return f"req-{getrandbits(96):024x}"


class Front:
    """Wraps the application."""

    def __init__(self, app: Any, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Serve one connection, as an ASGI application."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        identity = request_id(scope["headers"])
        scope[REQUEST_ID] = identity
        scope[STARTED] = time.monotonic()
        # An exchange writes its own headers and counts itself.
        scope[RAW_SEND] = send

        async def tagged(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (_NAME, identity.encode())]
                route = scope.get("path_template", "")
                if not route or route.startswith("/v1/"):
                    self._metrics.other(route or "other", message["status"])
            await send(message)

        try:
            await self._app(scope, receive, tagged)
        finally:
            # It leads back to the scope: a ring that only the collector would find.
            del scope[RAW_SEND]
