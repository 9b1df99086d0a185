"""From logits to a token: a function of (logits, parameters, history, draw) and nothing else.

Order: logit bias, repeat / presence / frequency penalties, constraint mask (by the caller, in
between), temperature, top-k, top-p, min-p, draw. Arrays are one row of the vocabulary, float32.
"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from shared.protocol import Sampling

__all__ = (
    "REPEAT_WINDOW",
    "Logits",
    "Sampler",
    "choose",
    "confidence",
    "log_probabilities",
    "most_likely",
)

REPEAT_WINDOW = 64
"""Tokens that `repeat_penalty` looks back on, prompt included; llama.cpp's `repeat_last_n`."""

_TAIL = 24.0
"""Candidates further than this many nats below the best are dropped before anything is sorted: all
of a 10^5-token vocabulary together holds less than 10^-5 of the mass there."""

Logits = NDArray[np.float32]


class Sampler:
    """Penalties and biases of one sequence, with the counts they need."""

    __slots__ = (
        "_bias",
        "_counts",
        "_counts_of",
        "_params",
        "_window",
        "greedy",
        "plain",
        "unchanging",
    )

    def __init__(self, params: Sampling, prompt: Sequence[int], end_tokens: frozenset[int]) -> None:
        self._params = params
        self._counts: dict[int, int] = {}
        self._counts_of = params.presence_penalty != 0 or params.frequency_penalty != 0
        repeats = params.repeat_penalty != 1.0
        self._window: list[int] | None = list(prompt[-REPEAT_WINDOW:]) if repeats else None
        bias = dict(params.logit_bias)
        if params.ignore_eos:
            bias.update(dict.fromkeys(end_tokens, -math.inf))
        self._bias = (
            (np.fromiter(bias, np.int64), np.fromiter(bias.values(), np.float32)) if bias else None
        )
        self.greedy = params.temperature == 0
        self.plain = not (self._counts_of or repeats or bias)
        """Nothing here changes the logits."""
        self.unchanging = not (self._counts_of or repeats)
        """Nothing here depends on the tokens emitted: `accept` is of no use."""

    def adjust(self, row: Logits) -> None:
        """Apply bias and penalties in place."""
        if self._bias is not None:
            ids, values = self._bias
            row[ids] += values
        params = self._params
        if self._window:
            seen = np.unique(np.array(self._window))
            values = row[seen]
            penalty = params.repeat_penalty
            row[seen] = np.where(values > 0, values / penalty, values * penalty)
        if self._counts:
            ids = np.fromiter(self._counts, np.int64, len(self._counts))
            counts = np.fromiter(self._counts.values(), np.float32, len(self._counts))
            row[ids] -= params.presence_penalty + params.frequency_penalty * counts

    def accept(self, token: int) -> None:
        """Take note of an emitted token."""
        if self._window is not None:
            self._window.append(token)
            if len(self._window) > REPEAT_WINDOW:
                del self._window[0]
        if self._counts_of:
            self._counts[token] = self._counts.get(token, 0) + 1


def choose(row: Logits, params: Sampling, draw: float) -> int:
    """Draw a token from adjusted and masked logits; `draw` is in [0, 1).

    Temperature 0 takes the most likely one, of equals the lowest id.
    """
    if params.temperature == 0:
        return int(row.argmax())
    best = float(row.max())
    reach = _TAIL
    if params.min_p > 0:
        reach = min(reach, -math.log(params.min_p))
    ids = np.flatnonzero(row >= best - params.temperature * reach)
    scaled = (row[ids].astype(np.float64) - best) / params.temperature
    if 0 < params.top_k < ids.size:
        order = np.argsort(-scaled, kind="stable")[: params.top_k]
        ids, scaled = ids[order], scaled[order]
    weights = np.exp(scaled)
    if params.top_p < 1:
        order = np.argsort(-weights, kind="stable")
        ids, weights = ids[order], weights[order]
        mass = np.cumsum(weights)
        keep = int(np.searchsorted(mass, params.top_p * mass[-1], side="left")) + 1
        ids, weights = ids[:keep], weights[:keep]
    mass = np.cumsum(weights)
    index = int(np.searchsorted(mass, draw * mass[-1], side="right"))
    return int(ids[min(index, ids.size - 1)])


def confidence(row: Logits, token: int, temperature: float) -> float:
    """The probability of a token at a temperature above 0, in single precision: an estimate."""
    scaled = (row - row[token]) / np.float32(temperature)
    # what is far above the token leaves it no probability, and must not overflow
    return 1.0 / float(np.exp(np.minimum(scaled, 60.0)).sum())


def log_probabilities(row: Logits) -> NDArray[np.float64]:
    """Natural log probabilities of a row, in double precision."""
    shifted = row.astype(np.float64)
    shifted -= shifted.max()
    shifted -= math.log(float(np.exp(shifted).sum()))
    return shifted


def most_likely(logprobs: NDArray[np.float64], count: int) -> list[int]:
    """The `count` most likely tokens, best first, of equals the lowest id."""
    if count == 0:
        return []
    picked = np.argpartition(-logprobs, count - 1)[:count]
    return [int(t) for t in picked[np.lexsort((picked, -logprobs[picked]))]]
