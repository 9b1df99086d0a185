"""What a model thinks before it answers: `<think>…</think>`, as Qwen 3 and DeepSeek write it."""

from worker.engine.tools.reader import Reader, Wait

__all__ = ("ReasoningParser", "reasoning_open")

THINK = "<think>"
THINK_END = "</think>"


def reasoning_open(prompt: str) -> bool:
    """The rendered prompt ends inside a thought, so the output begins in it."""
    return prompt.rstrip().endswith(THINK)


class ReasoningParser:
    """Splits the output of one choice into content and reasoning.

    A thought counts at the start of the output only. White space around it is dropped. `opened`:
    the prompt ended with `<think>` (see `reasoning_open`).
    """

    __slots__ = ("_content", "_parse", "_reader", "_reasoning", "_space")

    def __init__(self, *, opened: bool = False) -> None:
        self._reader = Reader()
        self._content: list[str] = []
        self._reasoning: list[str] = []
        self._space = ""
        self._parse: Wait[None] = self._run(opened)
        next(self._parse)

    def push(self, text: str) -> tuple[str, str]:
        """Take new text; return the content and the reasoning that are certain now."""
        if not text:
            return "", ""
        self._reader.feed(text)
        next(self._parse)
        return self._collect()

    def flush(self) -> tuple[str, str]:
        """The text ends here; return what is still held."""
        self._reader.end()
        for _ in self._parse:
            raise AssertionError("the reasoning parser waits for text after the end")
        return self._collect()

    def _collect(self) -> tuple[str, str]:
        content, self._content = "".join(self._content), []
        reasoning, self._reasoning = "".join(self._reasoning), []
        return content, reasoning

    def _run(self, opened: bool) -> Wait[None]:
        reader = self._reader
        reader.hold()
        yield from reader.space()
        # A model whose prompt opened the thought may still repeat the tag.
        if (yield from reader.take(THINK)) or opened:
            reader.release()
            yield from reader.space()
            yield from reader.until(THINK_END, self._think)
            yield from reader.take(THINK_END)
            yield from reader.space()
        else:
            reader.rewind()
        yield from reader.rest(self._answer)

    def _answer(self, text: str) -> None:
        self._content.append(text)

    def _think(self, text: str) -> None:
        text = self._space + text
        kept = text.rstrip()
        self._space = text[len(kept) :]
        if kept:
            self._reasoning.append(kept)
