"""A context in which a row's logits are the same in any company, at the price of some more rows."""

from typing import Final

import numpy as np

from worker.engine.batch import Batch
from worker.engine.batch_invariance import Beside, beside
from worker.engine.llama import Context, LoadError, Model
from worker.link import EngineConfig

__all__ = ("FLASH_ATTENTION_SPLIT", "InvariantContext", "make_context", "variance")

FLASH_ATTENTION_SPLIT: Final = 256
"""Cells from which on llama.cpp's threads share those of a row that is alone in flash attention on
a CPU (`ggml_compute_forward_flash_attn_ext`: 512 of them, counted in units of 256)."""


def make_context(
    model: Model,
    config: EngineConfig,
    *,
    slots: int,
    context: int,
    threads: int,
    prefill_threads: int,
) -> Context:
    """The context that the configuration asks for.

    Raises:
        LoadError: there is no memory for it, or the model cannot be run so.
    """
    asked = config.batch_invariant
    wanted = asked == "on" or (asked == "auto" and model.all_f32)
    kind = InvariantContext if wanted and _possible(model) else Context
    return kind(
        model,
        slots=slots,
        context=context,
        step_tokens=config.step_tokens,
        threads=threads,
        prefill_threads=prefill_threads,
    )


def variance(model: Model, config: EngineConfig) -> str:
    """Why answers depend on their company though they are not to; empty: they do not, or may."""
    if config.batch_invariant != "on":
        return ""
    if config.ring is not None:
        return "not batch-invariant: several workers carry the model"
    return "" if _possible(model) else "not batch-invariant: on a GPU, or with a recurrent state"


def _possible(model: Model) -> bool:
    return not model.gpu_layers and not model.keeps_state


class InvariantContext(Context):
    """Logits that do not depend on the step's other rows, nor on the number of threads, bit by bit.

    But for a sequence's last token of all, behind which no other has room. Arguments and errors are
    those of `Context`.
    """

    def __init__(
        self,
        model: Model,
        *,
        slots: int,
        context: int,
        step_tokens: int,
        threads: int,
        prefill_threads: int,
    ) -> None:
        super().__init__(
            model,
            slots=slots,
            context=context,
            step_tokens=step_tokens,
            threads=threads,
            prefill_threads=prefill_threads,
            batch_invariant=True,
        )
        self._decode_threads = threads
        self._alike = self._rounds_alike(max(model.bos, 0))
        """A row alone is rounded as several are, where few tokens are cached."""

    def set_threads(self, decode: int, prefill: int) -> None:
        """See `Context.set_threads`."""
        super().set_threads(decode, prefill)
        self._decode_threads = decode

    def decode(self, batch: Batch, rows: int) -> int:
        """See `Context.decode`."""
        found = self._beside(batch, rows)
        return (
            self._decode_beside(batch, rows, found) if any(found) else super().decode(batch, rows)
        )

    def _beside(self, batch: Batch, rows: int) -> Beside:
        found = beside(batch.slot[:rows].tolist(), batch.output[:rows].tolist())
        if not any(found):
            return found
        least, outputs = 0, found.outputs
        if self._alike:
            least = FLASH_ATTENTION_SPLIT if self._decode_threads > 1 else self.context
            outputs = ()
        most = self.context - 2
        again = tuple(row for row in found.again if least <= batch.position[row] <= most)
        return Beside(again, outputs)

    def _decode_beside(self, batch: Batch, rows: int, found: Beside) -> int:
        asked = np.flatnonzero(batch.output[:rows])
        for behind, row in enumerate(found.again, rows):
            batch.repeat(row, behind)
        batch.output[list(found.outputs)] = 1
        code = super().decode(batch, rows + len(found.again))
        for row in found.again:
            self.forget(int(batch.slot[row]), int(batch.position[row]) + 1)
        if code == 0 and found.outputs:
            computed = np.flatnonzero(batch.output[:rows])
            logits = self.logits(len(computed))
            for row, at in enumerate(np.searchsorted(computed, asked)):
                if row != at:
                    logits[row] = logits[at]
        return code

    def _rounds_alike(self, token: int) -> bool:
        """Compute a row alone and beside another one."""
        batch = Batch(1)
        batch.fill_decoding([0], [token], [0])
        found = []
        try:
            for which in (Beside(), Beside(again=(0,))):
                if code := self._decode_beside(batch, 1, which):
                    raise LoadError(f"llama.cpp could not compute one token: {code}")
                found.append(self.logits(1)[0].copy())
                self.forget(0)
        finally:
            batch.close()
        return bool(np.array_equal(*found))
