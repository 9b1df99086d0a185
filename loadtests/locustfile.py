"""Locust users that read server-sent events: time to first token and gaps have rows of their own.

    locust -f loadtests/locustfile.py --host http://127.0.0.1:9337 --headless -u 20 -r 5 -t 60s

MESH_LOAD_MODEL      the model; default: the first that /v1/models lists
MESH_LOAD_TOKENS     tokens of each answer; default 48
MESH_LOAD_KEY        API key, if one is wanted
"""

import json
import os
import random
import time
from collections.abc import Iterator
from typing import Any

from locust import FastHttpUser, between, events, task
from locust.env import Environment
from locust.exception import StopUser

_WORDS = ("river", "stone", "market", "engine", "garden", "window", "letter", "bridge", "ocean")
_TOKENS = int(os.environ.get("MESH_LOAD_TOKENS", "48"))


def sentence() -> str:
    """Return a prompt that no prefix cache has seen."""
    return f"Case {random.randrange(10**6)}: tell of {', '.join(random.choices(_WORDS, k=6))}."


def texts(line: bytes) -> str:
    """Return the text in one line of an event stream; empty where there is none."""
    if not line.startswith(b"data: {"):
        return ""
    event = json.loads(line[6:])
    if "error" in event:
        raise RuntimeError(f"error event: {event['error']}")
    for choice in event.get("choices", ()):
        piece = choice.get("text") or (choice.get("delta") or {}).get("content")
        if piece:
            return str(piece)
    return ""


class MeshUser(FastHttpUser):
    """Asks for chats, completions and embeddings, streamed and whole."""

    wait_time = between(0.05, 0.5)
    network_timeout = 120.0
    connection_timeout = 10.0

    def on_start(self) -> None:
        """Find out which model to ask."""
        key = os.environ.get("MESH_LOAD_KEY", "")
        self.own_headers = {"Authorization": f"Bearer {key}"} if key else {}
        self.model = os.environ.get("MESH_LOAD_MODEL") or self._first_model()

    def _first_model(self) -> str:
        with self.client.get("/v1/models", headers=self.own_headers, catch_response=True) as answer:
            listed = answer.json()["data"] if answer.status_code == 200 else []
            if not listed:
                answer.failure("no model is listed")
                raise StopUser
            return str(listed[0]["id"])

    @task(6)
    def chat_streamed(self) -> None:
        """A streamed chat completion."""
        messages = [{"role": "user", "content": sentence()}]
        self._stream("/v1/chat/completions", {"messages": messages})

    @task(2)
    def chat_whole(self) -> None:
        """A chat completion in one piece."""
        messages = [{"role": "user", "content": sentence()}]
        self._whole("/v1/chat/completions", {"messages": messages, "max_tokens": _TOKENS})

    @task(2)
    def completion_streamed(self) -> None:
        """A streamed text completion."""
        self._stream("/v1/completions", {"prompt": sentence()})

    @task(1)
    def embeddings(self) -> None:
        """Embeddings of two inputs."""
        self._whole("/v1/embeddings", {"input": [sentence(), sentence()]})

    def _whole(self, path: str, body: dict[str, Any]) -> None:
        self.client.post(path, json={"model": self.model, **body}, headers=self.own_headers)

    def _stream(self, path: str, body: dict[str, Any]) -> None:
        body = {"model": self.model, "max_tokens": _TOKENS, "stream": True, **body}
        name = f"{path} (stream)"
        started = previous = time.perf_counter()
        first = True
        with self.client.post(
            path,
            json=body,
            name=name,
            headers=self.own_headers,
            stream=True,
            catch_response=True,
        ) as answer:
            if answer.status_code != 200:
                answer.failure(f"HTTP {answer.status_code}")
                return
            try:
                for piece in self._pieces(answer.stream):
                    now = time.perf_counter()
                    row = "TTFT" if first else "inter-token"
                    self._measure(row, name, (now - previous) * 1e3, len(piece))
                    first, previous = False, now
            except Exception as error:  # a broken stream is a failed request, not a failed user
                answer.failure(f"broken stream: {error!r}")
                return
            # Locust itself would stop the clock at the headers.
            answer.request_meta["response_time"] = (time.perf_counter() - started) * 1e3

    def _pieces(self, stream: Any) -> Iterator[str]:
        while True:
            line = stream.readline(b"\n")
            if not line:
                raise RuntimeError("the stream ended without [DONE]")
            if line.startswith(b"data: [DONE]"):
                stream.read()
                return
            if piece := texts(line):
                yield piece

    def _measure(self, row: str, name: str, milliseconds: float, length: int) -> None:
        self.environment.events.request.fire(
            request_type=row,
            name=name,
            response_time=milliseconds,
            response_length=length,
            exception=None,
            context=self.context(),
        )


def fail_on_failures(environment: Environment, **_: object) -> None:
    """Let the exit code tell of failed requests."""
    if environment.stats.total.num_failures:
        environment.process_exit_code = 1


events.quitting.add_listener(fail_on_failures)  # type: ignore[no-untyped-call]
