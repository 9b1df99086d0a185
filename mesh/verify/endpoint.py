"""Asking an endpoint: each wait is bounded, and what comes back is kept as it came."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import httpx
import msgspec

from mesh.verify.events import EventReader
from mesh.verify.finding import Fault
from mesh.verify.objects import ErrorBody, ErrorObject, ModelList, read

__all__ = (
    "CHAT",
    "DONE",
    "TEXT",
    "Endpoint",
    "Reply",
    "Story",
    "Streamed",
    "chat_body",
    "data_of",
    "error_of",
    "text_body",
)

T = TypeVar("T")
DONE = "[DONE]"
CHAT = "/chat/completions"
TEXT = "/completions"

_IN_FLIGHT = "mesh_router_in_flight"


class Reply(msgspec.Struct, frozen=True):
    """A whole answer."""

    what: str
    """The request, for messages: `POST /chat/completions`."""
    status: int
    headers: Mapping[str, str]
    content: bytes

    def ok(self, kind: type[T]) -> T:
        """The answer's object.

        Raises:
            Fault: the status is not 200, or it is another object.
        """
        if self.status != 200:
            raise Fault(f"{self.what} answered {self.status}{_reason(self.content)}")
        return read(self.content, kind, self.what)

    def refusal(self, *statuses: int) -> ErrorObject:
        """The error of a request that had to be refused.

        Raises:
            Fault: it was not refused, with another status, or without OpenAI's error object.
        """
        if self.status not in statuses:
            wanted = " or ".join(map(str, statuses))
            raise Fault(f"{self.what} answered {self.status}, not {wanted}")
        error = read(self.content, ErrorBody, f"{self.what}: the body of the {self.status}").error
        if not error.message or not error.type:
            raise Fault(f"{self.what}: the error of the {self.status} has no message or no type")
        return error


class Streamed(msgspec.Struct):
    """A stream as its client saw it."""

    what: str
    status: int = 0
    content_type: str = ""
    data: list[str] = []
    """Of each event, `[DONE]` too."""
    times: list[float] = []
    """When they came (monotonic)."""
    refused: bytes = b""
    """The body, if the status is not 200."""
    broken: str = ""
    """Why the connection ended before the answer; empty: it ended as it should."""

    @property
    def over(self) -> bool:
        """It has come to its end, one way or another."""
        return bool(self.broken or self.refused or (self.data and self.data[-1] == DONE))


Story = Callable[[Streamed], None]
"""Told whenever something has come."""


class Endpoint:
    """An endpoint and the model that is asked for there."""

    def __init__(self, client: httpx.AsyncClient, model: str, timeout: float) -> None:
        self.model = model
        self.timeout = timeout
        """Seconds within which each answer must be complete."""
        self._client = client

    async def get(self, path: str) -> Reply:
        """Ask for something.

        Raises:
            Fault: no answer in time, or a broken connection.
        """
        return await self._whole("GET", path, None)

    async def post(self, path: str, body: Mapping[str, Any] | bytes) -> Reply:
        """Send a body, as JSON unless it is bytes already; raises as `get`."""
        return await self._whole("POST", path, body)

    async def stream(
        self, path: str, body: Mapping[str, Any], heard: Story = lambda _: None
    ) -> Streamed:
        """Read a stream to its end, however it ends.

        Raises:
            Fault: it does not end in time, or is no stream of events.
        """
        seen = Streamed(f"the stream of {path}")
        reader = EventReader()
        try:
            async with self.opened(path, body) as answer:
                seen.status = answer.status_code
                seen.content_type = answer.headers.get("content-type", "")
                if answer.status_code != 200:
                    seen.refused = await answer.aread() or b"-"
                    heard(seen)
                    return seen
                async for piece in answer.aiter_bytes():
                    for data in reader.feed(piece):
                        seen.data.append(data)
                        seen.times.append(time.monotonic())
                        heard(seen)
                reader.end()
        except httpx.HTTPError as error:
            seen.broken = str(error) or type(error).__name__
            heard(seen)
        return seen

    @asynccontextmanager
    async def opened(self, path: str, body: Mapping[str, Any]) -> AsyncIterator[httpx.Response]:
        """A stream that may be left.

        Raises:
            Fault: the time is up.
            httpx.HTTPError: the connection cannot be made, or breaks.
        """
        request = self._request("POST", path, {**body, "stream": True})
        try:
            async with asyncio.timeout(self.timeout):
                answer = await self._client.send(request, stream=True)
                try:
                    yield answer
                finally:
                    await answer.aclose()
        except TimeoutError:
            raise Fault(f"the stream of {path} did not end within {self.timeout:g} s") from None

    async def in_flight(self) -> float | None:
        """Requests that a mesh says it has not answered; None: this is no mesh's router.

        Raises:
            Fault: as `get`.
        """
        root = str(self._client.base_url).rstrip("/").removesuffix("/v1")
        reply = await self._whole("GET", f"{root}/metrics", None)
        if reply.status != 200:
            return None
        lines = reply.content.decode(errors="replace").splitlines()
        if not any(line.startswith(f"# TYPE {_IN_FLIGHT} ") for line in lines):
            return None
        counts = [line.split()[-1] for line in lines if line.startswith(_IN_FLIGHT + "{")]
        try:
            return sum(map(float, counts))
        except ValueError:
            raise Fault(f"/metrics: {_IN_FLIGHT} is not a number") from None

    async def models(self) -> ModelList:
        """What is served; raises as `get`, and Fault if that is no list of models."""
        return (await self.get("/models")).ok(ModelList)

    async def _whole(self, method: str, path: str, body: Mapping[str, Any] | bytes | None) -> Reply:
        what = f"{method} {path}"
        try:
            async with asyncio.timeout(self.timeout):
                answer = await self._client.send(self._request(method, path, body))
        except TimeoutError:
            raise Fault(f"{what} was not answered within {self.timeout:g} s") from None
        except httpx.HTTPError as error:
            raise Fault(f"{what}: {str(error) or type(error).__name__}") from None
        return Reply(what, answer.status_code, answer.headers, answer.content)

    def _request(
        self, method: str, path: str, body: Mapping[str, Any] | bytes | None
    ) -> httpx.Request:
        if body is None:
            return self._client.build_request(method, path)
        content = body if isinstance(body, bytes) else msgspec.json.encode(body)
        headers = {"Content-Type": "application/json"}
        return self._client.build_request(method, path, content=content, headers=headers)


def chat_body(model: str, text: str, tokens: int, **more: Any) -> dict[str, Any]:
    """A question that has one answer: temperature 0, and a seed."""
    messages = [{"role": "user", "content": text}]
    asked = {"model": model, "messages": messages, "max_tokens": tokens}
    return asked | {"temperature": 0, "seed": 7} | more


def text_body(model: str, text: str, tokens: int, **more: Any) -> dict[str, Any]:
    """A text to go on with, as `chat_body`."""
    asked = {"model": model, "prompt": text, "max_tokens": tokens}
    return asked | {"temperature": 0, "seed": 7} | more


def data_of(streamed: Streamed) -> list[str]:
    """The data of the events before `[DONE]`.

    Raises:
        Fault: the stream was refused, is not whole, holds an error, or goes on after `[DONE]`.
    """
    what = streamed.what
    if streamed.refused:
        raise Fault(f"{what} answered {streamed.status}{_reason(streamed.refused)}")
    if error := error_of(streamed):
        raise Fault(f"{what} ended with an error: {error.message}")
    if streamed.broken:
        raise Fault(f"{what} broke after {len(streamed.data)} events: {streamed.broken}")
    if DONE not in streamed.data:
        raise Fault(f"{what} ended after {len(streamed.data)} events without [DONE]")
    *before, last = streamed.data
    if last != DONE or DONE in before:
        raise Fault(f"{what} goes on after [DONE]")
    return before


def error_of(streamed: Streamed) -> ErrorObject | None:
    """The error that a stream was refused or ended with, if it was."""
    said = streamed.refused or (streamed.data[-1] if streamed.data else b"")
    try:
        return msgspec.json.decode(said, type=ErrorBody).error
    except msgspec.DecodeError:
        return None


def _reason(content: bytes) -> str:
    try:
        return f": {msgspec.json.decode(content, type=ErrorBody).error.message}"
    except msgspec.DecodeError:
        return ""
