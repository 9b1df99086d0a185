"""Reading one HTTP/1.1 reply as it arrives, with the moments that matter in it.

A token is counted for every event with text in it. A worker that stamps its tokens
("@<CLOCK_MONOTONIC> ") lets the reader count them one by one where deltas were merged, and tell how
long each was under way.
"""

import re
from array import array
from typing import Any

import msgspec

__all__ = ("Recorder", "Reply", "ReplyReader", "request_bytes")

_STAMP = re.compile(rb"@(\d+\.\d+) ")


class Recorder:
    """What all connections of a run add up; nothing is added while `recording` is off."""

    __slots__ = ("gaps", "lags", "recording", "tokens")

    def __init__(self) -> None:
        self.recording = True
        self.tokens = 0
        self.gaps = array("d")
        """Seconds between an event and the one before it in the same stream."""
        self.lags = array("d")
        """Seconds from a token's stamp to its arrival."""


class Reply(msgspec.Struct):
    """One request's fate. Times are CLOCK_MONOTONIC seconds; 0: it never came to that."""

    sent: float
    first: float = 0.0
    """Arrival of the first text, or of the first body byte where nothing is streamed."""
    ended: float = 0.0
    tokens: int = 0
    status: int = 0
    error: str = ""
    usage: dict[str, Any] = {}
    timings: dict[str, Any] = {}
    text: bytes = b""
    """Body of a reply that is not streamed, or of an error."""

    @property
    def ttft(self) -> float:
        """Seconds from sending to the first token."""
        return self.first - self.sent

    @property
    def total(self) -> float:
        """Seconds from sending to the end."""
        return self.ended - self.sent


class ReplyReader:
    """Parses one reply; `feed` returns True when it is complete and `reply` is filled in."""

    __slots__ = (
        "_body",
        "_buffer",
        "_chunked",
        "_event",
        "_left",
        "_previous",
        "_recorder",
        "_started",
        "_streamed",
        "finished_stream",
        "keep_alive",
        "reply",
    )

    def __init__(self, recorder: Recorder, sent: float) -> None:
        self.reply = Reply(sent)
        self.keep_alive = True
        self.finished_stream = False
        self._recorder = recorder
        self._buffer = b""
        self._event = b""
        self._body: list[bytes] = []
        self._started = False
        self._streamed = False
        self._chunked = False
        self._left = -1
        self._previous = 0.0

    @property
    def untouched(self) -> bool:
        """Whether not one byte of the reply has come."""
        return not self._started and not self._buffer

    def feed(self, data: bytes, now: float) -> bool:
        """Take what the socket gave."""
        if self._buffer:
            data, self._buffer = self._buffer + data, b""
        if not self._started:
            end = data.find(b"\r\n\r\n")
            if end < 0:
                self._buffer = data
                return False
            self._head(data[:end].lower())
            data = data[end + 4 :]
        if self._chunked:
            return self._dechunk(data, now)
        if data:
            self._take(data, now)
        if self._left >= 0:
            self._left -= len(data)
            return self._left <= 0 and self._complete(now)
        return False

    def lost(self, now: float) -> None:
        """The connection ended: a reply without a length is complete, any other one is cut."""
        if self._started and not self._chunked and self._left < 0:
            self._complete(now)
        else:
            self.fail("cut in the middle of the reply" if self._started else "connection lost", now)

    def fail(self, error: str, now: float) -> None:
        """End the reply with an error."""
        self.reply.error = error
        self.reply.ended = now

    def _head(self, head: bytes) -> None:
        self._started = True
        self.reply.status = int(head[9:12])
        self._streamed = b"text/event-stream" in head and self.reply.status == 200
        self._chunked = b"transfer-encoding: chunked" in head
        self.keep_alive = b"connection: close" not in head
        at = head.find(b"content-length:")
        if at >= 0:
            self._left = int(head[at + 15 :].split(b"\r\n", 1)[0])

    def _dechunk(self, data: bytes, now: float) -> bool:
        position, size = 0, len(data)
        while position < size:
            line = data.find(b"\r\n", position)
            if line < 0:
                break
            length = int(data[position:line].split(b";", 1)[0], 16)
            end = line + 2 + length
            if size < end + 2:
                break
            if length == 0:
                return self._complete(now)
            self._take(data[line + 2 : end], now)
            position = end + 2
        self._buffer = data[position:]
        return False

    def _take(self, body: bytes, now: float) -> None:
        if not self._streamed:
            if not self.reply.first:
                self.reply.first = now
            self._body.append(body)
            return
        *events, self._event = (self._event + body).split(b"\n\n")
        for event in events:
            self._on_event(event, now)

    def _on_event(self, event: bytes, now: float) -> None:
        at = event.find(b'"content":')
        if at >= 0:
            at += 10
        else:
            at = event.find(b'"text":')
            if at < 0:
                self._on_bare_event(event)
                return
            at += 7
        if event[at : at + 1] == b" ":
            at += 1
        if event[at : at + 1] != b'"' or event[at + 1 : at + 2] == b'"':
            self._on_bare_event(event)
            return
        # A real model may well begin a text with "@".
        stamp = _STAMP.match(event, at + 1)
        count = event.count(b"@", at) if stamp else 1
        self.reply.tokens += count
        recorder = self._recorder
        if not self.reply.first:
            self.reply.first = now
        elif recorder.recording:
            recorder.gaps.append(now - self._previous)
        self._previous = now
        if recorder.recording:
            recorder.tokens += count
            if stamp:
                recorder.lags.append(now - float(stamp[1]))

    def _on_bare_event(self, event: bytes) -> None:
        if event.startswith(b"data: [DONE]"):
            self.finished_stream = True
        elif b'"usage":{' in event or b'"timings":{' in event or b'"error":' in event:
            self._account(msgspec.json.decode(event[event.index(b"{") :]))

    def _account(self, body: Any) -> None:
        if not isinstance(body, dict):
            return
        self.reply.usage = body.get("usage") or self.reply.usage
        self.reply.timings = body.get("timings") or self.reply.timings
        if body.get("error"):
            self.reply.error = f"error event: {body['error']}"[:200]

    def _complete(self, now: float) -> bool:
        reply = self.reply
        reply.ended = now
        reply.text = b"".join(self._body)
        if reply.status != 200:
            reply.error = f"HTTP {reply.status} {reply.text[:160].decode(errors='replace')}"
        elif self._streamed:
            if not self.finished_stream and not reply.error:
                reply.error = "stream without [DONE]"
        elif reply.text:
            self._account(msgspec.json.decode(reply.text))
        return True


def request_bytes(url_host: str, path: str, body: dict[str, Any], *, key: str = "") -> bytes:
    """Encode a POST with a JSON body."""
    data = msgspec.json.encode(body)
    authorization = f"Authorization: Bearer {key}\r\n" if key else ""
    head = (
        f"POST {path} HTTP/1.1\r\nHost: {url_host}\r\n{authorization}"
        f"Content-Type: application/json\r\nAccept: */*\r\nContent-Length: {len(data)}\r\n\r\n"
    )
    return head.encode() + data
