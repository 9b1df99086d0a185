"""The routes that generate: body in, calls out, answer by an `Exchange`.

They are ASGI handlers: what Litestar does for other handlers (arguments by signature, a response
object made and sent) would be half of what a request costs, and an exchange needs none of it.
"""

import time
from collections.abc import Callable
from typing import Annotated, Any, NamedTuple, TypeVar

import msgspec
from litestar.handlers import ASGIRouteHandler

from router.automatic import AUTO, choose_model
from router.body import read_json_body
from router.conversation import BYTES_PER_TOKEN
from router.dialects.answer import Answer, Earlier
from router.dialects.chat import ChatRequest, chat_to_generate, parse_chat
from router.dialects.chat_answer import ChatAnswer, ChatStream
from router.dialects.completions import (
    CompletionRequest,
    completion_to_generates,
    parse_completion,
    prompts_of,
)
from router.dialects.completions_answer import CompletionAnswer, CompletionStream
from router.dialects.embeddings import (
    EmbeddingAnswer,
    EmbeddingRequest,
    embedding_to_embed,
    parse_embedding,
)
from router.dispatch import Dispatcher
from router.exchange import REQUEST_ID, Exchange
from router.explain import wants_explanation
from router.fleet import Fleet
from router.metrics import Metrics
from router.owner import bearer_key, owner_of
from router.problems import MethodNotAllowed
from router.reading import ReadableStream, Reader, same_model, wants_ids
from router.repeating import Repeating
from router.secret import attempt_number
from router.settings import Settings
from shared.errors import InvalidRequest, Unavailable
from shared.protocol import Embed, Generate, TextInput

__all__ = ("IdempotencyKey", "RequestTimeout", "inference_routes")

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
EMBEDDINGS = "/v1/embeddings"

RequestTimeout = Annotated[
    float,
    msgspec.Meta(
        gt=0, le=86_400, description="a number of seconds above 0 and at most 86400 (a day)"
    ),
]
"""`X-Request-Timeout`: how long the answer may take in all."""
_decode_timeout = msgspec.json.Decoder(RequestTimeout).decode

IdempotencyKey = Annotated[
    str,
    msgspec.Meta(
        min_length=1,
        max_length=255,
        pattern="^[!-~]+$",
        description="1 to 255 printable ASCII characters without spaces",
    ),
]
"""`Idempotency-Key`: what is sent again under the same key is done once."""

_Owned = TypeVar("_Owned", Generate, Embed)
_Named = TypeVar("_Named", ChatRequest, CompletionRequest, EmbeddingRequest)


class Origin(NamedTuple):
    """A request as it came: its body, and the fields that every internal request has."""

    body: bytes
    fields: dict[str, Any]
    key: bytes
    """The API key, which goes no further."""
    explain: bool
    """Whether the answer should say why it came from where it came."""
    idempotency: str = ""
    """The `Idempotency-Key`; empty: none."""
    readable: bool = False
    """Whether the client may want to go on reading on another connection."""
    last_event_id: bytes | None = None
    """Where it does so; None: the answer begins."""

    def own(self, request: _Owned) -> _Owned:
        """Say whose request it is."""
        owner = owner_of(self.key, request.user)
        return msgspec.structs.replace(request, owner=owner) if owner else request

    def reader(
        self, requests: list[Generate], *, stream: bool, offsets: bool = False
    ) -> Reader | None:
        """Where the client is in the answer to these requests; None: it asks for no ids.

        Raises:
            InvalidRequest: it is in no such answer.
        """
        if self.last_event_id is not None and not stream:
            raise InvalidRequest(
                "'Last-Event-ID' goes on with a stream: 'stream' must be true.",
                param="Last-Event-ID",
            )
        if not stream or not (self.readable or self.last_event_id is not None):
            return None
        return Reader(self.last_event_id, self.body, requests, offsets=offsets)


class _Making(NamedTuple):
    """What a dialect makes of a request."""

    requests: list[Generate]
    answer: Callable[[Earlier | None], Answer]
    offsets: bool = False
    """Its log probabilities tell where in the text they are."""


def _making_chat(wanted: ChatRequest, origin: Origin) -> _Making:
    generate = chat_to_generate(wanted, attempt=attempt_number(), **origin.fields)
    n = generate.n

    def answer(earlier: Earlier | None) -> Answer:
        if wanted.stream:
            usage = _includes_usage(wanted)
            return ChatStream(wanted.model, n, include_usage=usage, earlier=earlier)
        return ChatAnswer(wanted.model, n, logprobs=bool(wanted.logprobs))

    return _Making([generate], answer)


def _making_completion(wanted: CompletionRequest, origin: Origin) -> _Making:
    prompts = prompts_of(wanted)
    generates = completion_to_generates(
        wanted, [attempt_number() for _ in prompts], **origin.fields
    )
    echoes = [p.text if wanted.echo and isinstance(p, TextInput) else "" for p in prompts]
    n = generates[0].n
    logprobs = wanted.logprobs is not None

    def answer(earlier: Earlier | None) -> Answer:
        if wanted.stream:
            usage = _includes_usage(wanted)
            return CompletionStream(wanted.model, n, echoes, include_usage=usage, earlier=earlier)
        return CompletionAnswer(wanted.model, n, echoes, logprobs=logprobs)

    return _Making(generates, answer, offsets=logprobs)


def _named(fleet: Fleet, wanted: _Named, origin: Origin, *, embeddings: bool = False) -> _Named:
    """The same request for the model that `auto` stands for."""
    if wanted.model != AUTO:
        return wanted
    if origin.last_event_id is not None and not embeddings:
        owner = owner_of(origin.key, wanted.user or "")
        known = (view.name for view in fleet.models())
        model = same_model(origin.last_event_id, origin.body, owner, known)
    else:
        tokens = len(origin.body) // BYTES_PER_TOKEN
        model = choose_model(fleet, embeddings=embeddings, tokens=tokens)
    return msgspec.structs.replace(wanted, model=model)


def _exchange(
    dispatcher: Dispatcher,
    metrics: Metrics,
    origin: Origin,
    wanted: ChatRequest | CompletionRequest,
    making: _Making,
    route: str,
) -> Exchange:
    """What answers chat and completions, as a stream or whole, readable on or not."""
    requests = [origin.own(generate) for generate in making.requests]
    reader = origin.reader(requests, stream=bool(wanted.stream), offsets=making.offsets)
    answer = making.answer(reader.earlier if reader else None)
    if reader is not None:
        workers = dispatcher.fleet.workers()
        requests = reader.requests(workers, seeded=wanted.seed is not None)
        answer = ReadableStream(answer, reader, include_usage=_includes_usage(wanted))
    made = Exchange(
        dispatcher,
        metrics,
        requests=[*requests],
        answer=answer,
        stream=bool(wanted.stream),
        route=route,
        cache_key=wanted.prompt_cache_key or "",
        explain=origin.explain,
    )
    if isinstance(answer, ReadableStream):
        answer.worker_of = made.worker_of
    return made


def inference_routes(
    dispatcher: Dispatcher, metrics: Metrics, settings: Settings
) -> list[ASGIRouteHandler]:
    """Routes for chat, completions and embeddings."""

    fleet = dispatcher.fleet
    repeating = Repeating(dispatcher, metrics, settings)

    def chat(origin: Origin) -> Exchange:
        wanted = _named(fleet, parse_chat(origin.body), origin)
        making = _making_chat(wanted, origin)
        return _exchange(dispatcher, metrics, origin, wanted, making, CHAT)

    def completions(origin: Origin) -> Exchange:
        wanted = _named(fleet, parse_completion(origin.body), origin)
        making = _making_completion(wanted, origin)
        return _exchange(dispatcher, metrics, origin, wanted, making, COMPLETIONS)

    def embeddings(origin: Origin) -> Exchange:
        wanted = _named(fleet, parse_embedding(origin.body), origin, embeddings=True)
        embed = embedding_to_embed(wanted, attempt_number(), **origin.fields)
        return Exchange(
            dispatcher,
            metrics,
            requests=[origin.own(embed)],
            answer=EmbeddingAnswer(wanted.model, as_base64=wanted.encoding_format == "base64"),
            stream=False,
            route=EMBEDDINGS,
            explain=origin.explain,
        )

    def route(path: str, begin: Callable[[Origin], Exchange]) -> ASGIRouteHandler:
        async def handle(scope: Any, receive: Any, send: Any) -> None:
            if scope["method"] != "POST":
                raise MethodNotAllowed("This path does not take this method.", allow="POST")
            if not dispatcher.bus.connected:
                raise Unavailable("The mesh is not reachable now: NATS is away.", retry_after=2)
            read = _origin(scope, settings)
            body = await read_json_body(scope, receive, settings.max_body)
            origin = Origin(body, *read)
            again = origin.last_event_id is not None
            if again or not origin.idempotency or not settings.idempotency_memory:
                await begin(origin)(scope, receive, send)
                return
            # One that goes on reading wants the rest; what is kept is the whole.
            await repeating.answer(
                scope,
                receive,
                send,
                key=(owner_of(origin.key, ""), origin.idempotency),
                body=body,
                begin=lambda: begin(origin),
            )

        return ASGIRouteHandler(path, copy_scope=False)(handle)

    return [
        route(CHAT, chat),
        route(COMPLETIONS, completions),
        route(EMBEDDINGS, embeddings),
    ]


def _origin(
    scope: Any, settings: Settings
) -> tuple[dict[str, Any], bytes, bool, str, bool, bytes | None]:
    """What an `Origin` has beside its body, of which the fields are id, deadline and trace."""
    timeout = settings.request_timeout
    traceparent = ""
    key = b""
    explain = False
    idempotency = ""
    readable = False
    last_event_id: bytes | None = None
    for name, value in scope["headers"]:
        if name == b"x-request-timeout":
            timeout = _timeout(value)
        elif name == b"traceparent" and len(value) <= 128:
            traceparent = value.decode("latin-1")
        elif name == b"authorization":
            key = bearer_key(value)
        elif name == b"x-mesh-explain":
            explain = wants_explanation(value)
        elif name == b"idempotency-key":
            idempotency = _idempotency_key(value)
        elif name == b"x-mesh-resumable":
            readable = wants_ids(value)
        elif name == b"last-event-id":
            last_event_id = value.strip()
    fields = {
        "id": scope[REQUEST_ID],
        "deadline": time.time() + timeout,
        "traceparent": traceparent,
    }
    return fields, key, explain, idempotency, readable, last_event_id


def _includes_usage(wanted: ChatRequest | CompletionRequest) -> bool:
    return bool(wanted.stream_options and wanted.stream_options.include_usage)


def _timeout(value: bytes) -> float:
    try:
        return _decode_timeout(value)
    except msgspec.MsgspecError as error:
        raise InvalidRequest(
            "'X-Request-Timeout' must be a number of seconds above 0 and at most 86400.",
            param="X-Request-Timeout",
        ) from error


def _idempotency_key(value: bytes) -> str:
    try:
        return msgspec.convert(value.decode("latin-1"), IdempotencyKey)
    except msgspec.ValidationError as error:
        raise InvalidRequest(
            "'Idempotency-Key' must be 1 to 255 printable ASCII characters without spaces.",
            param="Idempotency-Key",
        ) from error
