"""Sequences over a vocabulary of ten tokens, to be advanced by logits that a test makes up."""

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from shared.errors import WorkerFailed
from shared.protocol import Delta, Done, Generate, Sampling, TextInput, Tool, ToolChoice
from worker.engine.job import Job
from worker.engine.sequence import Sequence
from worker.engine.tools import ReasoningParser, ToolParser

PIECES = [
    b"",
    b"a",
    b"b",
    b" c",
    b"</think>",
    b"<tool_call>",
    b"</tool_call>",
    b'{"name": "get", "arguments": {"x": 1}}',
    "\N{EURO SIGN}".encode()[:2],
    "\N{EURO SIGN}".encode()[2:],
]
END = 0
SIZE = len(PIECES)


class FakeMatcher:
    """Lets only tokens of one parity follow, in turn, and stops after so many."""

    def __init__(self, left, taken=0):
        self.left, self.taken = left, taken

    def apply(self, row):
        if self.left <= 0:
            raise WorkerFailed("asked after the end")
        row[np.arange(SIZE) % 2 == self.taken % 2] = -np.inf

    def accept(self, token):
        fits = token % 2 != self.taken % 2
        self.taken += 1
        self.left -= 1
        return fits

    def allowed(self, tokens):
        follows = FakeMatcher(self.left, self.taken)
        for index, token in enumerate(tokens):
            if follows.stopped or not follows.accept(token):
                return index
        return len(tokens)

    @property
    def stopped(self):
        return self.left <= 0

    def fork(self):
        return FakeMatcher(self.left, self.taken)


class Setup:
    """All that a run depends on, to make as many equal sequences as are wanted."""

    def __init__(
        self, sampling, *, stop=(), limit=12, logprobs=None, matched=None, tools=False, thinks=False
    ):
        self.request = Generate(
            "id", 1, "model", TextInput("x"), sampling, 0.0, stop=stop, logprobs=logprobs
        )
        self.limit, self.matched, self.tools, self.thinks = limit, matched, tools, thinks

    def sequence(self, quiet=None):
        job = Job(self.request, "reply", 0.0, [1, 2], frozenset((END,)))
        return Sequence(
            job,
            0,
            limit=self.limit,
            pieces=PIECES,
            matcher=FakeMatcher(self.matched) if self.matched else None,
            tools=ToolParser("hermes", (Tool("get"),), ToolChoice(), salt="s")
            if self.tools
            else None,
            reasoning=ReasoningParser(opened=True) if self.thinks else None,
            quiet=quiet,
        )


setups = st.builds(
    Setup,
    st.builds(
        Sampling,
        st.integers(0, 9),
        temperature=st.sampled_from([0.0, 0.7, 1.5]),
        repeat_penalty=st.sampled_from([1.0, 1.3]),
        frequency_penalty=st.sampled_from([0.0, 0.5]),
        ignore_eos=st.booleans(),
    ),
    stop=st.sampled_from([(), ("ab",), ("a b", "c")]),
    limit=st.integers(1, 16),
    logprobs=st.sampled_from([None, 0, 2]),
    matched=st.none() | st.integers(1, 12),
    tools=st.booleans(),
    thinks=st.booleans(),
)
logits = arrays(np.float32, (24, SIZE), elements=st.floats(-5, 5, width=32))


def plainly(setup, rows):
    """Token by token; the frames, and every token sampled, an end token included."""
    sequence, frames, sampled = setup.sequence(), [], []
    for row in rows:
        before = sequence.count
        advance = sequence.advance(row[None].copy(), [], frames)
        assert advance.rows == 1
        assert len(advance.tokens) == sequence.count - before
        sampled += advance.tokens or [END]
        if advance.complete:
            break
    return sequence, frames, sampled


def events(frames):
    """What is told, in order, letter by letter."""
    out = []
    for frame in frames:
        if isinstance(frame, Done):
            out.append(frame)
            continue
        if not isinstance(frame, Delta):
            continue
        out += [("thought", letter) for letter in frame.reasoning]
        out += [("text", letter) for letter in frame.text]
        for delta in frame.tools:
            out += [("call", delta.index, delta.id, delta.name)] if delta.id else []
            out += [("argument", delta.index, letter) for letter in delta.arguments]
    return out


def wanted(*tokens):
    """Logits that make greedy sampling say these tokens."""
    rows = np.zeros((len(tokens), SIZE), np.float32)
    rows[range(len(tokens)), tokens] = 5.0
    return rows
