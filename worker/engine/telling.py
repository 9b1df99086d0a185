"""Frames of one step of a sequence: as few as keep what they say in order."""

from shared.protocol import Delta, Frame, TokenLogprob, ToolDelta

__all__ = ("Telling",)


class Telling:
    """Gathers the tokens of a step; `tell` makes a frame of them, and so does `add` if it must."""

    __slots__ = (
        "_attempt",
        "_choice",
        "_deltas",
        "_first",
        "_frames",
        "_logprobs",
        "_reasoning",
        "_text",
        "_tokens",
    )

    def __init__(self, attempt: int, choice: int, first: int, frames: list[Frame]) -> None:
        self._attempt = attempt
        self._choice = choice
        self._first = first
        self._frames = frames
        self._clear()

    def _clear(self) -> None:
        self._tokens: list[int] = []
        self._text = self._reasoning = ""
        self._logprobs: tuple[TokenLogprob, ...] = ()
        self._deltas: tuple[ToolDelta, ...] = ()

    def add(
        self,
        token: int,
        text: str,
        logprobs: tuple[TokenLogprob, ...],
        deltas: tuple[ToolDelta, ...],
        reasoning: str,
    ) -> None:
        """A frame says reasoning first, then text, then tool calls."""
        if (reasoning and (self._text or self._deltas)) or (text and self._deltas):
            self.tell()
        self._tokens.append(token)
        self._text += text
        self._reasoning += reasoning
        self._logprobs += logprobs
        self._deltas += deltas

    def tell(self) -> None:
        """Make a frame of what has gathered."""
        if not self._tokens:
            return
        self._frames.append(
            Delta(
                self._attempt,
                self._choice,
                self._first,
                tuple(self._tokens),
                self._text,
                self._logprobs,
                self._deltas,
                self._reasoning,
            )
        )
        self._first += len(self._tokens)
        self._clear()
