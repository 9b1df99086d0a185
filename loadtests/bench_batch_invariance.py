"""What batch invariance costs: seconds of a decode step with it and without, by streams and depth.

Both contexts have the same weights and threads and take turns, the order reversed in every other
repetition. And by how much a row's logits depend on its company without it.
"""

import itertools
import statistics
import sys
import tempfile
import time
from pathlib import Path

import cyclopts
import numpy as np

from loadtests.figures import markdown, median_and_range
from loadtests.rings import Target, model_file
from worker.engine.batch import Batch
from worker.engine.invariant_context import make_context
from worker.engine.llama import Context, Model, silence
from worker.link import EngineConfig

_STEPS = 6
_PIECE = 60
"""Rows of a step that fills the cache: fewer than a tile."""


class Steps:
    """One context, in which every slot holds the same tokens."""

    def __init__(self, model: Model, slots: int, *, depth: int, threads: int, on: bool) -> None:
        config = EngineConfig("", "", "", batch_invariant="on" if on else "off")
        self._context: Context = make_context(
            model,
            config,
            slots=slots,
            context=depth + 64,
            threads=threads,
            prefill_threads=threads,
        )
        self._batch = Batch(max(slots, _PIECE))
        self._depth = depth
        self._tokens = (np.arange(depth + 1) * 7919 % model.vocab_size).tolist()
        for slot in range(slots):
            for begin in range(0, depth, _PIECE):
                piece = self._tokens[begin : min(begin + _PIECE, depth)]
                self._decode(self._batch.fill(0, slot, piece, begin))

    def close(self) -> None:
        """Free the context."""
        self._context.close()
        self._batch.close()

    def seconds(self, streams: int) -> float:
        """Of a step with a row of so many streams."""
        began = time.perf_counter()
        for _ in range(_STEPS):
            self._step(streams)
        return (time.perf_counter() - began) / _STEPS

    def difference(self) -> float:
        """The largest of a logit, between a row alone and the same row beside another."""
        rows = [self._step(streams)[0].copy() for streams in (1, 2)]
        return float(np.abs(rows[0] - rows[1]).max())

    def _step(self, streams: int) -> np.ndarray:
        slots = range(streams)
        rows = self._batch.fill_decoding(
            slots, [self._tokens[-1]] * streams, [self._depth] * streams
        )
        self._decode(rows)
        for slot in slots:
            self._context.forget(slot, self._depth)
        return self._context.logits(streams)

    def _decode(self, rows: int) -> None:
        if code := self._context.decode(self._batch, rows):
            raise RuntimeError(f"llama_decode returned {code} for {rows} rows")


def compare(
    path: Path, streams: tuple[int, ...], *, depth: int, threads: int, reps: int
) -> list[list[str]]:
    """A row of the table for each number of streams.

    Raises:
        RuntimeError: llama.cpp failed.
    """
    model = Model(str(path))
    slots = max(*streams, 2)
    both = [Steps(model, slots, depth=depth, threads=threads, on=on) for on in (False, True)]
    rows = []
    for count in streams:
        taken: list[list[float]] = [[], []]
        for rep in range(reps):
            for which in (1, 0) if rep % 2 else (0, 1):
                taken[which].append(both[which].seconds(count))
        ratios = [on / off for off, on in zip(*taken, strict=True)]
        rows.append(
            [
                path.stem.rsplit(".", 1)[-1],
                str(threads),
                str(depth),
                str(count),
                *(f"{statistics.median(each) * 1e3:.1f}" for each in taken),
                median_and_range(ratios),
                *(f"{each.difference():.2g}" if count == 1 else "" for each in both),
            ]
        )
    for each in both:
        each.close()
    model.close()
    return rows


def main(
    *,
    formats: tuple[Target, ...] = ("Q4_0", "Q4_1", "F32"),
    streams: tuple[int, ...] = (1, 4, 16),
    depth: tuple[int, ...] = (100, 600),
    threads: tuple[int, ...] = (1, 2),
    reps: int = 5,
) -> None:
    """Print the table.

    Parameters
    ----------
    formats
        Of SmolLM2.
    streams
        With a row each in a step.
    depth
        Tokens in each one's cache.
    threads
        Of the steps.
    reps
        Repetitions of each figure.
    """
    silence()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for form, count, tokens in itertools.product(formats, threads, depth):
            path = model_file(form, Path(folder))
            found = compare(path, streams, depth=tokens, threads=count, reps=reps)
            for row in found:
                print(" ".join(row), file=sys.stderr, flush=True)
            rows += found
    head = "format, threads, depth, streams, off ms, on ms, ratio, alone differs, with it"
    print(markdown(head.split(", "), rows))


if __name__ == "__main__":
    cyclopts.run(main)
