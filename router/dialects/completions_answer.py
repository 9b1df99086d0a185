"""`/v1/completions`: frames as chunks of a stream, or as one whole answer.

The choice `j` of prompt `i` has the index `i * n + j`.
"""

from random import getrandbits
from typing import Any, Literal

import msgspec
from msgspec import UNSET, UnsetType

from router.dialects.answer import (
    DONE,
    LOWEST,
    Completed,
    Earlier,
    TimingsObject,
    UsageObject,
    add_timings,
    add_usage,
    encode,
    event,
    now,
    quote,
    timings_object,
    usage_object,
)
from shared.protocol import Delta, Done, TokenLogprob

__all__ = ("CompletionAnswer", "CompletionStream", "TextChunk", "TextCompletion")

Reason = Literal["stop", "length", "tool_calls"]


class TextLogprobs(msgspec.Struct, frozen=True):
    """The older logprobs: parallel arrays, with each token's place in the text."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class TextChoice(msgspec.Struct, frozen=True):
    """One of the `n` texts of one of the prompts."""

    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: Reason


class TextCompletion(msgspec.Struct, frozen=True):
    """The answer of `/v1/completions`."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChoice]
    usage: UsageObject
    timings: TimingsObject


class TextChunkChoice(msgspec.Struct, frozen=True):
    """What is new in one of the texts."""

    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: Reason | None


class TextChunk(msgspec.Struct, frozen=True):
    """One event of a stream; usage comes with the last one if asked for, timings always do."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChunkChoice]
    usage: UsageObject | UnsetType | None = UNSET
    timings: TimingsObject | UnsetType = UNSET


class CompletionStream:
    """Renders `text_completion` events."""

    def __init__(
        self,
        model: str,
        n: int,
        prompts: list[str],
        *,
        include_usage: bool,
        earlier: Earlier | None = None,
    ) -> None:
        """Make it.

        Args:
            model: its name.
            n: choices a prompt.
            prompts: the texts to echo, empty where there is nothing to echo.
            include_usage: whether the last event holds the usage.
            earlier: of a stream that its client may go on reading on another connection.
        """
        self._common: dict[str, Any] = {
            "id": f"cmpl-{earlier.number if earlier else getrandbits(96):024x}",
            "object": "text_completion",
            "created": earlier.created if earlier else now(),
            "model": model,
        }
        self._n = n
        self._include_usage = include_usage
        start = encode(self._common)[:-1]
        choices = range(n * len(prompts))
        self._before = [
            b'data: %b,"choices":[{"index":%d,"text":' % (start, choice) for choice in choices
        ]
        self._after = b',"logprobs":null,"finish_reason":null}]%b}\n\n' % (
            b',"usage":null' if include_usage else b""
        )
        begun = earlier.begun if earlier else ()
        self._echoes = ["" if choice in begun else prompts[choice // n] for choice in choices]
        self._offsets = list(earlier.offsets) if earlier else [len(echo) for echo in self._echoes]
        self._held = b""

    def delta(self, part: int, frame: Delta) -> bytes:
        """Render new tokens; nothing if they hold no text yet."""
        choice = part * self._n + frame.choice
        text = frame.reasoning + frame.text
        if echo := self._echoes[choice]:
            text = echo + text
            self._echoes[choice] = ""
        if frame.logprobs:
            logprobs = logprobs_object(frame.logprobs, self._offsets[choice])
            self._offsets[choice] += sum(len(entry.text) for entry in frame.logprobs)
            return self._chunk(choice, text, logprobs=logprobs)
        return self._before[choice] + quote(text) + self._after if text else b""

    def done(self, part: int, frame: Done) -> bytes:
        """Render the end of a choice, held back by one so that the last can carry the timings."""
        choice = part * self._n + frame.choice
        echo, self._echoes[choice] = self._echoes[choice], ""
        ready, self._held = self._held, self._chunk(choice, echo, reason=frame.reason)
        return ready

    def finish(self, ends: list[Completed]) -> bytes:
        """Render the last finish reason with timings, the usage if asked for, and `[DONE]`."""
        usage = add_usage(ends)
        timings = b',"timings":%b}\n\n' % encode(timings_object(add_timings(ends), usage))
        if not self._include_usage:
            return self._held[: -len(b"}\n\n")] + timings + DONE
        last = event(TextChunk(**self._common, choices=[], usage=usage_object(usage)))
        return self._held + last[: -len(b"}\n\n")] + timings + DONE

    def _chunk(
        self,
        choice: int,
        text: str,
        *,
        reason: Reason | None = None,
        logprobs: TextLogprobs | None = None,
    ) -> bytes:
        return event(
            TextChunk(
                **self._common,
                choices=[TextChunkChoice(choice, text, logprobs, reason)],
                usage=None if self._include_usage else UNSET,
            )
        )


class CompletionAnswer:
    """Collects frames and renders one `text_completion`."""

    def __init__(self, model: str, n: int, prompts: list[str], *, logprobs: bool) -> None:
        self._model = model
        self._n = n
        self._logprobs = logprobs
        count = n * len(prompts)
        self._echoes = [prompts[choice // n] for choice in range(count)]
        self._texts: list[list[str]] = [[echo] for echo in self._echoes]
        self._entries: list[list[TokenLogprob]] = [[] for _ in range(count)]
        self._reasons: list[Reason] = ["stop"] * count

    def delta(self, part: int, frame: Delta) -> bytes:
        """Keep new tokens."""
        choice = part * self._n + frame.choice
        self._texts[choice].append(frame.reasoning + frame.text)
        self._entries[choice].extend(frame.logprobs)
        return b""

    def done(self, part: int, frame: Done) -> bytes:
        """Keep why a choice ended."""
        self._reasons[part * self._n + frame.choice] = frame.reason
        return b""

    def finish(self, ends: list[Completed]) -> bytes:
        """Render the answer."""
        usage = add_usage(ends)
        return encode(
            TextCompletion(
                id=f"cmpl-{getrandbits(96):024x}",
                object="text_completion",
                created=now(),
                model=self._model,
                choices=[
                    TextChoice(
                        index=index,
                        text="".join(text),
                        logprobs=(
                            logprobs_object(self._entries[index], len(self._echoes[index]))
                            if self._logprobs
                            else None
                        ),
                        finish_reason=self._reasons[index],
                    )
                    for index, text in enumerate(self._texts)
                ],
                usage=usage_object(usage),
                timings=timings_object(add_timings(ends), usage),
            )
        )


def logprobs_object(
    entries: list[TokenLogprob] | tuple[TokenLogprob, ...], offset: int
) -> TextLogprobs:
    """Entries as parallel arrays; `offset` is where the first token begins."""
    offsets = []
    for entry in entries:
        offsets.append(offset)
        offset += len(entry.text)
    return TextLogprobs(
        tokens=[entry.text for entry in entries],
        token_logprobs=[max(LOWEST, entry.logprob) for entry in entries],
        top_logprobs=[
            {top.text: max(LOWEST, top.logprob) for top in entry.top} for entry in entries
        ],
        text_offset=offsets,
    )
