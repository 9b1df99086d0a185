"""`mesh chat`: a conversation in the terminal, over the same HTTP endpoint that any client uses."""

import sys
from collections.abc import Iterator
from typing import Literal, TextIO

import httpx
import msgspec

from mesh.errors import CommandError

__all__ = ("Chat", "Manner", "answer_pieces", "converse", "first_model")

_TIMEOUT = httpx.Timeout(120.0, connect=5.0)


class _Delta(msgspec.Struct):
    content: str | None = None


class _Choice(msgspec.Struct):
    delta: _Delta = msgspec.field(default_factory=_Delta)
    finish_reason: str | None = None


class _Error(msgspec.Struct):
    message: str


class _Event(msgspec.Struct):
    choices: tuple[_Choice, ...] = ()
    error: _Error | None = None


class _Model(msgspec.Struct):
    id: str


class _Models(msgspec.Struct):
    data: tuple[_Model, ...]


class _Failure(msgspec.Struct):
    error: _Error


class _Turn(msgspec.Struct, frozen=True):
    role: Literal["system", "user", "assistant"]
    content: str


class Manner(msgspec.Struct, frozen=True):
    """How a conversation is held."""

    system: str = ""
    temperature: float = 0.5
    max_tokens: int = 1024
    """Of one answer."""


def answer_pieces(lines: Iterator[str]) -> Iterator[str]:
    """The text in a stream of server-sent events.

    Raises:
        CommandError: the stream holds an error, is no chat stream, or ends before `[DONE]`.
    """
    for line in lines:
        if not line.startswith("data:"):
            continue
        data = line[len("data:") :].strip()
        if data == "[DONE]":
            return
        try:
            event = msgspec.json.decode(data, type=_Event)
        except msgspec.DecodeError as error:
            raise CommandError(f"the answer is not an OpenAI chat stream: {error}") from error
        if event.error is not None:
            raise CommandError(event.error.message)
        for choice in event.choices:
            if choice.delta.content:
                yield choice.delta.content
    raise CommandError("the connection ended before the answer did")


def first_model(client: httpx.Client) -> str:
    """The first model that the endpoint lists.

    Raises:
        CommandError: it lists none, or cannot be reached.
    """
    try:
        response = client.get("/models")
    except httpx.HTTPError as error:
        raise _unreachable(client, error) from error
    if response.status_code != httpx.codes.OK:
        raise CommandError(_failure(response))
    try:
        models = msgspec.json.decode(response.content, type=_Models).data
    except msgspec.DecodeError as error:
        raise CommandError(f"{client.base_url} is no OpenAI endpoint: {error}") from error
    if not models:
        raise CommandError(f"{client.base_url} serves no model yet")
    return models[0].id


class Chat:
    """A conversation that is sent whole with every turn."""

    def __init__(self, client: httpx.Client, model: str, manner: Manner | None = None) -> None:
        self._client = client
        self._model = model
        self._manner = manner or Manner()
        system = self._manner.system
        self._turns = [_Turn("system", system)] if system else []

    def say(self, text: str) -> Iterator[str]:
        """Send a turn and yield the answer as it comes.

        An answer that is left half-way stays in the conversation as far as it came; a turn that
        fails does not.

        Raises:
            CommandError: the endpoint refuses the turn, cannot be reached or fails half-way.
        """
        turns = [*self._turns, _Turn("user", text)]
        body = {
            "model": self._model,
            "messages": turns,
            "temperature": self._manner.temperature,
            "max_completion_tokens": self._manner.max_tokens,
            "stream": True,
        }
        said: list[str] = []
        try:
            with self._client.stream(
                "POST",
                "/chat/completions",
                content=msgspec.json.encode(body),
                headers={"Content-Type": "application/json"},
            ) as response:
                if response.status_code != httpx.codes.OK:
                    response.read()
                    raise CommandError(_failure(response))
                for piece in answer_pieces(response.iter_lines()):
                    said.append(piece)
                    yield piece
        except (GeneratorExit, KeyboardInterrupt):
            self._turns = [*turns, _Turn("assistant", "".join(said))]
            raise
        except httpx.HTTPError as error:
            raise _unreachable(self._client, error) from error
        self._turns = [*turns, _Turn("assistant", "".join(said))]


def converse(url: str, model: str | None, manner: Manner, stdin: TextIO, stdout: TextIO) -> None:
    """Talk until the input ends; input that is not a terminal is one turn.

    Raises:
        CommandError: nobody answers there, or (not in a terminal) the turn failed.
    """
    try:
        client = httpx.Client(base_url=url, timeout=_TIMEOUT)
    except (httpx.InvalidURL, ValueError) as error:
        raise CommandError(f"{url!r} is not a URL: {error}") from error
    with client:
        chat = Chat(client, model or first_model(client), manner)
        if stdin.isatty():
            _talk(chat, stdout)
            return
        text = stdin.read().strip()
        if not text:
            raise CommandError("the input is empty; nothing to ask")
        _print(chat.say(text), stdout)


def _talk(chat: Chat, stdout: TextIO) -> None:
    import readline  # noqa: F401 - imported for its effect: editing and history in input()

    stdout.write("Ctrl-C stops an answer, and ends the chat at the prompt.\n")
    while True:
        try:
            text = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            stdout.write("\n")
            return
        if not text:
            continue
        try:
            _print(chat.say(text), stdout)
        except KeyboardInterrupt:
            stdout.write(" …\n")
        except CommandError as error:
            stdout.write("\n")
            sys.stderr.write(f"mesh chat: {error}\n")


def _print(pieces: Iterator[str], stdout: TextIO) -> None:
    for piece in pieces:
        stdout.write(piece)
        stdout.flush()
    stdout.write("\n")


def _failure(response: httpx.Response) -> str:
    try:
        return msgspec.json.decode(response.content, type=_Failure).error.message
    except msgspec.DecodeError:
        return f"{response.request.url} answered {response.status_code} {response.reason_phrase}"


def _unreachable(client: httpx.Client, error: httpx.HTTPError) -> CommandError:
    return CommandError(f"{client.base_url} does not answer: {error}; is `mesh up` running?")
