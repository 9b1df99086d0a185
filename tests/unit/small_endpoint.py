"""A small OpenAI endpoint over HTTP that does everything right, or one thing wrong."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from typing import Any

import uvicorn

WORDS = [" one", " two", " three", " four", " five", " six"] * 400

__all__ = ("SmallEndpoint", "running")


class SmallEndpoint:
    """An ASGI application; `fault` names what it does wrong."""

    model = "small"

    def __init__(
        self, fault: str = "", *, mesh: bool = False, room: int = 1000, crowd: int = 0
    ) -> None:
        self.fault = fault
        self.mesh = mesh
        """It has a mesh's /metrics."""
        self.room = room
        """Requests at once; more are told to come again."""
        self._awaited = crowd
        """Requests that are still to come before the first is answered."""
        self._all_came = asyncio.Event()
        self.in_flight = 0
        self.left = 0
        """Clients that were seen to leave."""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        body = b""
        more = scope["method"] == "POST"
        while more:
            message = await receive()
            body += message.get("body", b"")
            more = message.get("more_body", False)
        path = scope["path"]
        if path == "/metrics" and self.mesh:
            count = f'mesh_router_in_flight{{model="small"}} {self.in_flight}.0\n'
            text = f"# TYPE mesh_router_in_flight gauge\n{count}"
            await self._send(send, 200, text.encode(), "text/plain")
        elif path == "/v1/models":
            await self._json(send, 200, {"object": "list", "data": [self._card()]})
        elif path == f"/v1/models/{self.model}":
            await self._json(send, 200, self._card())
        elif path in ("/v1/chat/completions", "/v1/completions"):
            await self._counted(path == "/v1/completions", body, receive, send)
        else:
            await self._refuse(send, 404, "no such path", None, "not_found")

    def _card(self) -> dict[str, Any]:
        return {"id": self.model, "object": "model", "created": 1, "owned_by": "test"}

    async def _counted(self, text: bool, body: bytes, receive: Any, send: Any) -> None:
        self._awaited -= 1
        if self._awaited <= 0:
            self._all_came.set()
        if self.in_flight >= self.room:
            if self.fault == "500 when full":
                await self._refuse(send, 500, "full", None, None)
            elif self.fault == "no Retry-After":
                await self._refuse(send, 429, "full", None, "queue_full")
            else:
                header = [(b"retry-after", b"1")]
                await self._refuse(send, 429, "full", None, "queue_full", header)
            return
        self.in_flight += 1
        leaving = asyncio.create_task(self._until_left(receive))
        answering = asyncio.create_task(self._answer(text, body, send))
        try:
            await asyncio.wait({leaving, answering}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            gone = not answering.done()
            leaving.cancel()
            answering.cancel()
            await asyncio.wait({leaving, answering})
            self.left += gone
            if not (gone and self.fault == "slot not freed"):
                self.in_flight -= 1
        if not gone:
            answering.result()

    async def _until_left(self, receive: Any) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    async def _answer(self, text: bool, body: bytes, send: Any) -> None:
        if self.fault == "hangs" or (self.fault == "hangs after a client left" and self.left):
            await asyncio.sleep(1000)
        try:
            asked = json.loads(body)
        except ValueError:
            await self._refuse(send, 400, "not JSON", None, "invalid_value")
            return
        if asked.get("model") != self.model:
            await self._refuse(send, 404, "no such model", "model", "model_not_found")
        elif "prompt" not in asked and "messages" not in asked:
            await self._refuse(send, 400, "missing", "messages", "invalid_value")
        elif not isinstance(asked.get("max_tokens", 1), int):
            await self._refuse(send, 400, "wanted a number", "max_tokens", "invalid_value")
        elif asked.get("temperature", 1) > 2 and self.fault != "takes any temperature":
            await self._refuse(send, 400, "too hot", "temperature", "invalid_value")
        else:
            await self._all_came.wait()
            words = WORDS[: asked["max_tokens"]]
            # Long enough for others to come meanwhile, and for a client to leave.
            await asyncio.sleep(0.02 if len(words) < 100 else 2.0 * (not asked.get("stream")))
            tell = self._stream if asked.get("stream") else self._whole
            await tell(send, text, words, asked)

    async def _whole(self, send: Any, text: bool, words: list[str], asked: Any) -> None:
        said = "".join(words)
        choice: dict[str, Any] = {"index": 0, "finish_reason": "length"}
        choice |= {"text": said} if text else {"message": {"role": "assistant", "content": said}}
        answer = self._head("text_completion" if text else "chat.completion")
        answer |= {"choices": [choice], "usage": self._usage(words)}
        if self.fault == "no usage":
            del answer["usage"]
        if self.fault == "role is robot" and not text:
            choice["message"]["role"] = "robot"
        await self._json(send, 200, answer)

    async def _stream(self, send: Any, text: bool, words: list[str], asked: Any) -> None:
        kind = "text/plain" if self.fault == "text/plain" else "text/event-stream; charset=utf-8"
        await send(
            {
                "type": "http.response.start",
                "status": 200,
                "headers": [(b"content-type", kind.encode())],
            }
        )
        events = self._events(text, words, bool(asked.get("stream_options")))
        for data in events:
            end = b"\n" if self.fault == "one newline" else b"\n\n"
            await self._more(send, b"data: " + data.encode() + end)
            await asyncio.sleep(0.01 if len(events) > 100 else 0)
        if self.fault == "breaks off":
            raise ConnectionError("on purpose")
        if self.fault == "goes on after [DONE]":
            await self._more(send, b"data: {}\n\n")
        await send({"type": "http.response.body", "body": b""})

    def _events(self, text: bool, words: list[str], with_usage: bool) -> list[str]:
        head = self._head("text_completion" if text else "chat.completion.chunk")

        def event(said: str, reason: str | None = None, **delta: str) -> dict[str, Any]:
            choice: dict[str, Any] = {"index": 0, "finish_reason": reason}
            if text:
                choice["text"] = said
            else:
                choice["delta"] = delta | ({"content": said} if said else {})
            return head | {"choices": [choice]}

        said = words[:-2] if self.fault == "text is cut" else words
        roles = {"role": "assistant"}
        events = [event("", **({} if self.fault == "no role" else roles))]
        more = roles if self.fault == "role in every chunk" else {}
        events += [event(word, **more) for word in said]
        if self.fault == "breaks with an error":
            wrong = {"message": "the worker was lost", "type": "server_error"}
            events.append({"error": wrong | {"param": None, "code": "worker_failed"}})
            return [json.dumps(data) for data in events]
        if self.fault != "no finish_reason":
            events.append(event("", "length"))
        if with_usage and self.fault != "no usage":
            events.append(head | {"choices": [], "usage": self._usage(words)})
        told = [json.dumps(data) for data in events]
        return told if self.fault in ("no [DONE]", "breaks off") else [*told, "[DONE]"]

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": "x-1", "object": kind, "created": 1, "model": self.model}

    def _usage(self, words: list[str]) -> dict[str, int]:
        total = 5 + len(words) + (self.fault == "usage does not add up")
        return {"prompt_tokens": 5, "completion_tokens": len(words), "total_tokens": total}

    async def _refuse(
        self,
        send: Any,
        status: int,
        message: str,
        param: str | None,
        code: str | None,
        headers: list[tuple[bytes, bytes]] | None = None,
    ) -> None:
        error: Any = {"message": message, "type": "invalid_request_error"}
        error |= {"param": param, "code": code}
        if self.fault == "no param":
            error["param"] = None
        if self.fault == "every refusal is a 500":
            status = 500
        wrong = {"detail": message} if self.fault == "wrong error object" else {"error": error}
        await self._send(send, status, json.dumps(wrong).encode(), "application/json", headers)

    async def _json(self, send: Any, status: int, value: Any) -> None:
        await self._send(send, status, json.dumps(value).encode(), "application/json")

    async def _more(self, send: Any, body: bytes) -> None:
        await send({"type": "http.response.body", "body": body, "more_body": True})

    async def _send(
        self,
        send: Any,
        status: int,
        body: bytes,
        kind: str,
        headers: list[tuple[bytes, bytes]] | None = None,
    ) -> None:
        every = [(b"content-type", kind.encode()), *(headers or [])]
        await send({"type": "http.response.start", "status": status, "headers": every})
        await send({"type": "http.response.body", "body": body})


@contextlib.asynccontextmanager
async def running(endpoint: SmallEndpoint) -> AsyncIterator[str]:
    """Serve it on a port of this host; its base URL."""
    config = uvicorn.Config(
        endpoint, host="127.0.0.1", port=0, log_level="critical", lifespan="off", ws="none"
    )
    server = uvicorn.Server(config)
    server.capture_signals = contextlib.nullcontext  # type: ignore[method-assign]
    serving = asyncio.create_task(server.serve())
    try:
        async with asyncio.timeout(10):
            while not server.started:  # noqa: ASYNC110 - uvicorn offers no event
                await asyncio.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.should_exit = True
        server.force_exit = True
        await serving
