"""How well a model foretells a text, and what its routers think of their experts meanwhile.

Perplexity as llama.cpp's `llama-perplexity` reckons it: the text in pieces of `context` tokens, the
first of each replaced by the model's BOS where it has one, and of each only the second half counts,
so that every token has at least half a context before it:

    exp(mean over the counted tokens of -ln p(token | those before it in its piece))

Gate mass is the sum over all tokens of what a layer's router gave to each expert (softmax over all
of them, before the choice), taken out of the graph as `ffn_moe_probs-N`.
"""

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import llama_cpp.llama_cpp as ll
import msgspec
import numpy as np
from numpy.typing import NDArray

from worker.engine.batch import Batch
from worker.engine.llama import Context, Model
from worker.engine.tensors import tensor_name, tensor_rows

__all__ = ("Score", "ScoreError", "score")

_PROBS = re.compile(rb"ffn_moe_probs-(\d+)")


class ScoreError(ValueError):
    """The text cannot be used; the message is one line."""


class Score(msgspec.Struct, frozen=True):
    """What came of a text."""

    perplexity: float
    error: float
    """Of its logarithm's mean: standard deviation over the root of the tokens; times perplexity."""
    counted: int
    """Tokens that counted."""
    tokens: int
    """Tokens that were computed."""
    masses: tuple[tuple[float, ...], ...] = ()
    """Gate mass by layer and expert, as shares of the layer's; empty: it has no experts."""


class _Masses:
    """Sums of what the routers gave."""

    def __init__(self) -> None:
        self.sums: dict[int, NDArray[np.float64]] = {}

        @ll.ggml_backend_sched_eval_callback  # type: ignore[untyped-decorator]
        def watch(tensor: int, ask: bool, _: Any) -> bool:
            match = _PROBS.fullmatch(tensor_name(tensor))
            if match is None:
                return not ask
            if not ask:
                self._add(int(match[1]), tensor_rows(tensor))
            return True

        self.watch = watch

    def _add(self, layer: int, rows: NDArray[np.float32]) -> None:
        total = rows.sum(axis=0, dtype=np.float64)
        self.sums[layer] = self.sums[layer] + total if layer in self.sums else total

    def shares(self) -> tuple[tuple[float, ...], ...]:
        layers = [self.sums[layer] for layer in sorted(self.sums)]
        return tuple(tuple((one / one.sum()).tolist()) for one in layers)


def score(
    model: Model,
    tokens: Sequence[int],
    *,
    context: int,
    most: int,
    threads: int,
    tell: Callable[[int, int], None] = lambda done, of: None,
) -> Score:
    """Score a text.

    Args:
        model: a whole model, or a shard.
        tokens: of the text, at least two pieces' worth.
        context: tokens of a piece, even.
        most: pieces at most; 0: all.
        threads: to compute with.
        tell: told the pieces that are done, and how many there are.

    Raises:
        ScoreError: the text is too short, or `context` is no even number above 8.
        LoadError: there is no memory.
        RuntimeError: llama.cpp failed.
    """
    if context < 8 or context % 2:
        raise ScoreError(f"ctx: {context}; wanted an even number from 8 on")
    pieces = len(tokens) // context
    if pieces < 2:
        raise ScoreError(
            f"the text has {len(tokens)} tokens; wanted at least {2 * context}, two pieces of ctx"
        )
    pieces = min(pieces, most) if most else pieces
    masses = _Masses()
    own = Context(
        model,
        slots=1,
        context=context,
        step_tokens=context,
        threads=threads,
        prefill_threads=threads,
        watch=masses.watch,
    )
    try:
        losses = np.concatenate(
            [
                _piece(own, model, tokens[n * context : (n + 1) * context], tell, n, pieces)
                for n in range(pieces)
            ]
        )
    finally:
        own.close()
    mean = float(losses.mean())
    spread = float(losses.std(ddof=1)) / math.sqrt(len(losses))
    return Score(
        perplexity=math.exp(mean),
        error=math.exp(mean) * spread,
        counted=len(losses),
        tokens=pieces * context,
        masses=masses.shares(),
    )


def _piece(
    context: Context,
    model: Model,
    tokens: Sequence[int],
    tell: Callable[[int, int], None],
    number: int,
    count: int,
) -> NDArray[np.float64]:
    """The negative log probabilities of the second half of a piece."""
    tell(number, count)
    rows = len(tokens)
    batch = Batch(rows)
    batch.fill(0, 0, [model.bos, *tokens[1:]] if model.adds_bos else tokens, 0)
    half = rows // 2
    # The row before a token foretells it; the last one foretells what is not in this piece.
    batch.output[half : rows - 1] = 1
    context.forget(0)
    code = context.decode(batch, rows)
    if code != 0:
        raise RuntimeError(f"llama_decode returned {code} for {rows} rows")
    logits = context.logits(rows - 1 - half).astype(np.float64)
    top = logits.max(axis=1)
    totals: NDArray[np.float64] = top + np.log(np.exp(logits - top[:, None]).sum(axis=1))
    own: NDArray[np.float64] = logits[np.arange(len(logits)), tokens[half + 1 :]]
    losses: NDArray[np.float64] = totals - own
    return losses
