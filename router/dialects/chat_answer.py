"""`/v1/chat/completions`: frames as chunks of a stream, or as one whole answer.

Nearly every frame of a stream is a bit of plain text, so the bytes around the text are made once
per choice, and a token costs one JSON string and two joins.
"""

from random import getrandbits
from typing import Any, Literal

from msgspec import UNSET

from router.dialects.answer import (
    DONE,
    LOWEST,
    Completed,
    Earlier,
    add_timings,
    add_usage,
    encode,
    event,
    merge_tools,
    now,
    quote,
    timings_object,
    usage_object,
)
from router.dialects.chat_objects import (
    AnsweredCall,
    AnsweredFunction,
    AnsweredMessage,
    CallPiece,
    ChatChoice,
    ChatChunk,
    ChatCompletion,
    ChatDelta,
    ChatLogprobs,
    ChunkChoice,
    FunctionPiece,
    TokenEntry,
    TopLogprob,
)
from shared.protocol import Delta, Done, TokenLogprob, ToolDelta

__all__ = ("ChatAnswer", "ChatStream")


class ChatStream:
    """Renders `chat.completion.chunk` events."""

    def __init__(
        self, model: str, n: int, *, include_usage: bool, earlier: Earlier | None = None
    ) -> None:
        """`earlier` is of a stream that its client may go on reading on another connection."""
        self._common: dict[str, Any] = {
            "id": f"chatcmpl-{earlier.number if earlier else getrandbits(96):024x}",
            "object": "chat.completion.chunk",
            "created": earlier.created if earlier else now(),
            "model": model,
        }
        self._include_usage = include_usage
        start = encode(self._common)[:-1]
        self._before = [
            b'data: %b,"choices":[{"index":%d,"delta":{"content":' % (start, choice)
            for choice in range(n)
        ]
        self._after = b'},"logprobs":null,"finish_reason":null}]%b}\n\n' % (
            b',"usage":null' if include_usage else b""
        )
        # The first chunk of a choice names the role; taken out once it was sent.
        self._roles = [
            b""
            if earlier and choice in earlier.begun
            else self._chunk(choice, ChatDelta(role="assistant", content="", refusal=None))
            for choice in range(n)
        ]
        self._held = b""

    def delta(self, part: int, frame: Delta) -> bytes:
        """Render new tokens; nothing if they hold no text yet."""
        choice = frame.choice
        if frame.logprobs or frame.tools or frame.reasoning:
            rendered = self._rich(frame)
        elif frame.text:
            rendered = self._before[choice] + quote(frame.text) + self._after
        else:
            return b""
        if self._roles[choice]:
            rendered = self._roles[choice] + rendered
            self._roles[choice] = b""
        return rendered

    def done(self, part: int, frame: Done) -> bytes:
        """Render the end of a choice, held back by one so that the last can carry the timings."""
        role, self._roles[frame.choice] = self._roles[frame.choice], b""
        ready, self._held = self._held, self._chunk(frame.choice, ChatDelta(), reason=frame.reason)
        return ready + role

    def finish(self, ends: list[Completed]) -> bytes:
        """Render the last finish reason with timings, the usage if asked for, and `[DONE]`."""
        usage = add_usage(ends)
        timings = b',"timings":%b}\n\n' % encode(timings_object(add_timings(ends), usage))
        if not self._include_usage:
            return self._held[: -len(b"}\n\n")] + timings + DONE
        last = event(ChatChunk(**self._common, choices=[], usage=usage_object(usage)))
        return self._held + last[: -len(b"}\n\n")] + timings + DONE

    def _chunk(
        self,
        choice: int,
        delta: ChatDelta,
        *,
        reason: Literal["stop", "length", "tool_calls"] | None = None,
        logprobs: ChatLogprobs | None = None,
    ) -> bytes:
        return event(
            ChatChunk(
                **self._common,
                choices=[ChunkChoice(choice, delta, logprobs, reason)],
                usage=None if self._include_usage else UNSET,
            )
        )

    def _rich(self, frame: Delta) -> bytes:
        delta = ChatDelta(
            reasoning_content=frame.reasoning or UNSET,
            content=frame.text if frame.text or not (frame.tools or frame.reasoning) else UNSET,
            tool_calls=[_tool_piece(piece) for piece in merge_tools(frame.tools)] or UNSET,
        )
        logprobs = logprobs_object(frame.logprobs) if frame.logprobs else None
        return self._chunk(frame.choice, delta, logprobs=logprobs)


class _Choice:
    def __init__(self) -> None:
        self.text: list[str] = []
        self.reasoning: list[str] = []
        self.logprobs: list[TokenLogprob] = []
        self.tools: list[ToolDelta] = []
        self.reason: Literal["stop", "length", "tool_calls"] = "stop"


class ChatAnswer:
    """Collects frames and renders one `chat.completion`."""

    def __init__(self, model: str, n: int, *, logprobs: bool) -> None:
        self._model = model
        self._logprobs = logprobs
        self._choices = [_Choice() for _ in range(n)]

    def delta(self, part: int, frame: Delta) -> bytes:
        """Keep new tokens."""
        choice = self._choices[frame.choice]
        choice.text.append(frame.text)
        choice.reasoning.append(frame.reasoning)
        choice.logprobs.extend(frame.logprobs)
        choice.tools.extend(frame.tools)
        return b""

    def done(self, part: int, frame: Done) -> bytes:
        """Keep why a choice ended."""
        self._choices[frame.choice].reason = frame.reason
        return b""

    def finish(self, ends: list[Completed]) -> bytes:
        """Render the answer."""
        usage = add_usage(ends)
        return encode(
            ChatCompletion(
                id=f"chatcmpl-{getrandbits(96):024x}",
                object="chat.completion",
                created=now(),
                model=self._model,
                choices=[
                    ChatChoice(
                        index=index,
                        message=_message(choice),
                        logprobs=logprobs_object(choice.logprobs) if self._logprobs else None,
                        finish_reason=choice.reason,
                    )
                    for index, choice in enumerate(self._choices)
                ],
                usage=usage_object(usage),
                timings=timings_object(add_timings(ends), usage),
            )
        )


def _message(choice: _Choice) -> AnsweredMessage:
    text = "".join(choice.text)
    calls = [
        AnsweredCall(call.id, "function", AnsweredFunction(call.name, call.arguments))
        for call in merge_tools(tuple(choice.tools))
    ]
    return AnsweredMessage(
        role="assistant",
        content=text if text or not calls else None,
        reasoning_content="".join(choice.reasoning) or UNSET,
        tool_calls=calls or UNSET,
    )


def _tool_piece(piece: ToolDelta) -> CallPiece:
    if not piece.name:
        return CallPiece(piece.index, FunctionPiece(piece.arguments))
    return CallPiece(
        piece.index, FunctionPiece(piece.arguments, piece.name), id=piece.id, type="function"
    )


def logprobs_object(entries: list[TokenLogprob] | tuple[TokenLogprob, ...]) -> ChatLogprobs:
    """OpenAI's logprobs of a chat choice."""
    return ChatLogprobs(
        [
            TokenEntry(
                entry.text,
                max(LOWEST, entry.logprob),
                list(entry.data),
                [TopLogprob(t.text, max(LOWEST, t.logprob), list(t.data)) for t in entry.top],
            )
            for entry in entries
        ]
    )
