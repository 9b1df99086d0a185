"""A part of a model's layers, fed with activations instead of tokens.

Activations go in as `llama_batch.embd`. What comes out of the last layer, before the last norm, no
public function of llama.cpp tells; it is taken out of the graph as it is computed, by the
context's `cb_eval`, which is asked about every tensor of a step: some 0.3 ms for 15 layers.

llama.cpp computes sequences with unequal numbers of rows, or with gaps between their slots, in
passes of its own. So a step here has as many rows of each sequence, and consecutive slots, sequence
after sequence: then there is one pass, and rows come out in the order in which they went in.
"""

from collections.abc import Callable, Sequence
from typing import Any

import llama_cpp.llama_cpp as ll
import numpy as np
from numpy.typing import NDArray

from worker.engine.batch import Batch
from worker.engine.llama import Context, Model
from worker.engine.tensors import tensor_name, tensor_rows

__all__ = ("Rows", "Stage", "input_scale")

Rows = NDArray[np.float32]


def input_scale(architecture: str, width: int) -> float:
    """By what activations are to be multiplied before they go into a stage.

    llama.cpp multiplies all that goes into Gemma 2 by the root of its width, activations too
    (src/models/gemma2.cpp); Gemma 3's only where they are tokens.
    """
    return float(width**-0.5) if architecture == "gemma2" else 1.0


class Stage:
    """Some layers with the keys and values of all sequences.

    Args:
        model: a stage's file, or a whole model.
        head: whether logits come out instead of activations.
        scale: see `input_scale`.
        slots: sequences.
        context: tokens of each.
        step_tokens: rows of a step at most.
        threads: of every step.

    Raises:
        LoadError: there is no memory for it, or the model cannot be run so.
    """

    def __init__(
        self,
        model: Model,
        *,
        head: bool,
        scale: float,
        slots: int,
        context: int,
        step_tokens: int,
        threads: int,
    ) -> None:
        self.head = head
        self._scale = np.float32(scale)
        self._model = model
        self.width = model.embedding_size
        self._taken: Rows | None = None
        self._watch = None if head else _watching(model, self._take)
        self.context = Context(
            model,
            slots=slots,
            context=context,
            step_tokens=step_tokens,
            threads=threads,
            prefill_threads=threads,
            watch=self._watch,
        )
        self._batch = Batch(step_tokens, self.width)

    def close(self) -> None:
        """Free cache and buffers; the model is the caller's."""
        self.context.close()
        self._batch.close()

    def run(
        self,
        rows: Rows,
        slots: Sequence[int],
        positions: Sequence[int],
        outputs: Sequence[int] | None = None,
    ) -> Rows:
        """Run activations through the layers.

        Args:
            rows: (n, width); as many of each sequence, one sequence after the other.
            slots: n sequences.
            positions: n places in them.
            outputs: of the head, the rows whose logits are wanted, ascending; None: all.

        Returns:
            Activations (n, width), or logits (outputs, vocabulary); an array of its own.

        Raises:
            ValueError: they do not fit a step, or are not in that order.
            RuntimeError: llama.cpp could not.
        """
        count = len(rows)
        self._check(count, slots)
        batch = self._batch
        np.multiply(rows, self._scale, out=batch.rows[:count])
        batch.slot[:count] = slots
        batch.position[:count] = positions
        wanted = range(count) if outputs is None or not self.head else outputs
        batch.output[:count] = 0
        batch.output[wanted] = 1
        batch.native.n_tokens = count
        self._taken = None
        code = int(ll.llama_decode(self.context.handle, batch.native))
        ll.llama_synchronize(self.context.handle)
        if code:
            raise RuntimeError(f"llama.cpp could not run the stage: {code}")
        if self.head:
            empty = np.empty((0, self._model.vocab_size), dtype=np.float32)
            return self.context.logits(len(wanted)).copy() if len(wanted) else empty
        return self._out(count)

    def _out(self, count: int) -> Rows:
        """What the watcher has taken in this step."""
        if self._taken is None or len(self._taken) != count:
            raise RuntimeError("llama.cpp did not compute the stage in one pass")
        return self._taken

    def _check(self, count: int, slots: Sequence[int]) -> None:
        if not 0 < count <= self._batch.capacity:
            raise ValueError(f"{count} rows; a step has 1 to {self._batch.capacity}")
        first, each = slots[0], list(slots).count(slots[0])
        if count % each or list(slots) != [first + row // each for row in range(count)]:
            raise ValueError(
                "rows must be as many of each sequence, one after the other, in consecutive slots"
            )

    def _take(self, tensor: int) -> None:
        self._taken = tensor_rows(tensor)


def _watching(model: Model, take: Callable[[int], None]) -> Any:
    """A `cb_eval` that gives the last layer's output away."""
    wanted = f"l_out-{int(ll.llama_model_n_layer(model.handle)) - 1}".encode()

    @ll.ggml_backend_sched_eval_callback  # type: ignore[untyped-decorator]
    def watch(tensor: int, ask: bool, _: Any) -> bool:
        if tensor_name(tensor) != wanted:
            return not ask
        if not ask:
            take(tensor)
        return True

    return watch
