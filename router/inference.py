"""The routes that generate: body in, calls out, answer by an `Exchange`."""

import math
import secrets
import time
from typing import Any

from litestar import Request, post
from litestar.handlers import HTTPRouteHandler
from litestar.types import ASGIApp

from router.body import read_json_body
from router.dialects.chat import chat_to_generate, parse_chat
from router.dialects.chat_answer import ChatAnswer, ChatStream
from router.dispatch import Dispatcher
from router.exchange import REQUEST_ID, Exchange
from router.metrics import Metrics
from router.settings import Settings
from shared.errors import InvalidRequest, Unavailable

__all__ = ("inference_routes",)

LONGEST_TIMEOUT = 86_400.0


def inference_routes(
    dispatcher: Dispatcher, metrics: Metrics, settings: Settings
) -> list[HTTPRouteHandler]:
    """Routes for chat, completions and embeddings."""

    @post("/v1/chat/completions", status_code=200)
    async def chat(request: Request[Any, Any, Any]) -> ASGIApp:
        body = await _admit(request)
        wanted = parse_chat(body)
        generate = chat_to_generate(wanted, **_origin(request.scope, settings))
        n = generate.n
        include_usage = bool(wanted.stream_options and wanted.stream_options.include_usage)
        return Exchange(
            dispatcher,
            metrics,
            requests=[generate],
            answer=(
                ChatStream(wanted.model, n, include_usage=include_usage)
                if wanted.stream
                else ChatAnswer(wanted.model, n, logprobs=bool(wanted.logprobs))
            ),
            stream=bool(wanted.stream),
            route="/v1/chat/completions",
        )

    async def _admit(request: Request[Any, Any, Any]) -> bytes:
        if not dispatcher.bus.connected:
            raise Unavailable("The mesh is not reachable now: NATS is away.", retry_after=2)
        return await read_json_body(request.scope, request.receive, settings.max_body)

    return [chat]


def _origin(scope: Any, settings: Settings) -> dict[str, Any]:
    """What a request has beside its body: its id, a fresh attempt, its deadline, its trace."""
    timeout = settings.request_timeout
    traceparent = ""
    for name, value in scope["headers"]:
        if name == b"x-request-timeout":
            timeout = _timeout(value)
        elif name == b"traceparent" and len(value) <= 128:
            traceparent = value.decode("latin-1")
    return {
        "id": scope[REQUEST_ID],
        "attempt": secrets.randbits(63),
        "deadline": time.time() + timeout,
        "traceparent": traceparent,
    }


def _timeout(value: bytes) -> float:
    try:
        timeout = float(value)
    except ValueError:
        timeout = math.nan
    if not 0 < timeout <= LONGEST_TIMEOUT:
        raise InvalidRequest(
            f"'X-Request-Timeout' must be a number of seconds above 0 and at most "
            f"{LONGEST_TIMEOUT:g}.",
            param="X-Request-Timeout",
        )
    return timeout
