"""A typed skin over the part of llama.cpp's C interface that the engine uses.

It owns the native handles and their lifetimes and turns C conventions into Python ones; it decides
nothing. The KV cache is not unified: each slot is a stream of its own, so that a sequence's
rounding does not depend on its company and flash attention reads no other sequence's cells.
llama.cpp computes streams together in one pass only where their slot numbers are consecutive
(`llama_batch_allocr::split_equal`), which is why `slots.py` keeps them compact.
"""

import ctypes
from collections.abc import Callable
from typing import Any, Final, NamedTuple

import llama_cpp.llama_cpp as ll
import numpy as np
from numpy.typing import NDArray

from worker.engine.batch import Batch
from worker.engine.cache_state import CacheFormat, UnknownState, for_flash_attention

__all__ = ("INTERRUPTED", "Context", "LoadError", "Model", "silence")

FLASH_ATTENTION_OFF: Final = 0
FLASH_ATTENTION_ON: Final = 1
FLASH_ATTENTION_TILE: Final = 64
"""From so many rows of one sequence on, llama.cpp's flash attention works in tiles on a CPU
(`ggml_compute_forward_flash_attn_ext_f16`): behind 1,500 tokens 64 rows then take as long as 32,
and are rounded otherwise, by up to 0.9 in a logit. On either side of it every row is bit by bit
what it is in any other number of rows and in any company (`tests/engine/test_tiles.py`)."""
_ALL_F32: Final = "0"
"""`general.file_type` of a GGUF whose weights have 32 bits: llama.cpp's `enum llama_ftype`."""
POOLING_NONE: Final = 0
INTERRUPTED: Final = 2
"""What `Context.decode` returns where `Context.interrupt` has broken it off (`llama_decode`)."""

_log_tail: list[str] = []

_logits_address = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)(("llama_get_logits", ll._lib))
"""The binding's own makes a pointer object, whose address costs more to find out than the call."""

_is_set = ctypes.cast(ctypes.CDLL(None).strlen, ll.ggml_abort_callback)
"""llama.cpp asks it after each of a thousand operations of a pass whether to go on, so it must not
be Python: of a buffer of one character and a zero, the C library's `strlen` says 0 or 1."""


class LoadError(Exception):
    """llama.cpp refused the file or the context; the message holds its own last words."""


@ll.llama_log_callback  # type: ignore[untyped-decorator]
def _remember(level: int, text: bytes, _: Any) -> None:
    if level >= 4:  # GGML_LOG_LEVEL_ERROR
        _log_tail.append(text.decode(errors="replace").strip())
        del _log_tail[:-5]


def silence() -> None:
    """Start the backend; keep only llama.cpp's errors, for `LoadError`."""
    ll.llama_log_set(_remember, None)
    ll.llama_backend_init()


def _words(fallback: str) -> str:
    text = "; ".join(line for line in _log_tail if line)
    _log_tail.clear()
    return text or fallback


class Model:
    """A loaded model and its vocabulary.

    Raises:
        LoadError: the file is no model that this build of llama.cpp can load.
    """

    def __init__(
        self,
        path: str,
        *,
        gpu_layers: int = 0,
        vocab_only: bool = False,
        on_progress: Callable[[float], None] | None = None,
    ) -> None:
        params = ll.llama_model_default_params()
        self.gpu_layers = params.n_gpu_layers = gpu_layers
        if not gpu_layers:
            # Else a context takes half a GiB of each GPU, and wide steps are computed there.
            self._no_devices = (ctypes.c_void_p * 1)(None)
            params.devices = ctypes.cast(self._no_devices, ctypes.c_void_p)
        params.vocab_only = vocab_only

        @ll.llama_progress_callback  # type: ignore[untyped-decorator]
        def progress(fraction: float, _: Any) -> bool:
            if on_progress is not None:
                on_progress(fraction)
            return True

        self._progress = progress  # llama.cpp keeps the pointer while it loads
        params.progress_callback = progress
        self.handle = ll.llama_model_load_from_file(path.encode(), params)
        if not self.handle:
            raise LoadError(_words("llama.cpp could not load the file"))
        self.vocab = ll.llama_model_get_vocab(self.handle)
        self.vocab_size = int(ll.llama_vocab_n_tokens(self.vocab))
        self.trained_context = int(ll.llama_model_n_ctx_train(self.handle))
        self.embedding_size = int(ll.llama_model_n_embd(self.handle))
        self.all_f32 = self.metadata("general.file_type") == _ALL_F32
        self.bos = int(ll.llama_vocab_bos(self.vocab))
        self.eos = int(ll.llama_vocab_eos(self.vocab))
        self.adds_bos = bool(ll.llama_vocab_get_add_bos(self.vocab))
        self.end_tokens = frozenset(
            t for t in range(self.vocab_size) if ll.llama_vocab_is_eog(self.vocab, t)
        )
        self.keeps_state = bool(
            ll.llama_model_is_recurrent(self.handle) or ll.llama_model_is_hybrid(self.handle)
        )
        """Of a kind that cannot go back behind a token."""
        self.has_encoder = bool(ll.llama_model_has_encoder(self.handle))
        self.has_decoder = bool(ll.llama_model_has_decoder(self.handle))

    def close(self) -> None:
        """Free the weights."""
        if self.handle:
            ll.llama_model_free(self.handle)
            self.handle = None

    def description(self) -> str:
        """llama.cpp's own line, as "llama 135M Q4_1"."""
        buffer = ctypes.create_string_buffer(256)
        ll.llama_model_desc(self.handle, buffer, 256)
        return buffer.value.decode(errors="replace")

    def metadata(self, key: str) -> str | None:
        """A value of the GGUF header as text."""
        size = ll.llama_model_meta_val_str(self.handle, key.encode(), None, 0)
        if size < 0:
            return None
        buffer = ctypes.create_string_buffer(size + 1)
        ll.llama_model_meta_val_str(self.handle, key.encode(), buffer, size + 1)
        return buffer.value.decode(errors="replace")

    def tokenize(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        """Text to tokens. `parse_special` lets the names of control tokens stand for them."""
        data = text.encode()
        room = len(data) + 8
        buffer = (ll.llama_token * room)()
        count = ll.llama_tokenize(
            self.vocab, data, len(data), buffer, room, add_special, parse_special
        )
        if count < 0:
            room = -count
            buffer = (ll.llama_token * room)()
            count = ll.llama_tokenize(
                self.vocab, data, len(data), buffer, room, add_special, parse_special
            )
        return list(buffer[:count])

    def pieces(self, *, special: bool) -> list[bytes]:
        """The bytes of every token; control tokens are empty unless `special`."""
        out: list[bytes] = []
        buffer = ctypes.create_string_buffer(512)
        for token in range(self.vocab_size):
            size = ll.llama_token_to_piece(self.vocab, token, buffer, 512, 0, special)
            if size < 0:
                long = ctypes.create_string_buffer(-size)
                ll.llama_token_to_piece(self.vocab, token, long, -size, 0, special)
                out.append(long.raw)
            else:
                out.append(buffer.raw[:size])
        return out


class _State(NamedTuple):
    data: Any
    """Pointer to bytes."""
    size: int


def _pointer(data: NDArray[np.uint8]) -> Any:
    return ctypes.cast(data.ctypes.data, ctypes.POINTER(ctypes.c_uint8))


class Context:
    """KV cache and compute buffers for `slots` sequences of at most `context` tokens each.

    With `batch_invariant`, keys and values have 16 bits whatever the weights, several rows of a
    sequence are rounded as one of each of several, and a step has room for twice `step_tokens`
    rows: `InvariantContext` needs all three.

    Raises:
        LoadError: there is no memory for it, or the model cannot be run so.
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
        embeddings: bool = False,
        whole_inputs: bool = False,
        watch: Any = None,
        batch_invariant: bool = False,
    ) -> None:
        params = ll.llama_context_default_params()
        if watch is not None:
            params.cb_eval = watch
        params.n_ctx = slots * context
        params.n_seq_max = slots
        params.n_batch = params.n_ubatch = context if whole_inputs else step_tokens
        params.n_threads = threads
        params.n_threads_batch = prefill_threads
        params.kv_unified = False
        if batch_invariant:
            params.n_batch = 2 * params.n_ubatch
        exact = model.all_f32 and not batch_invariant
        self.cache_format = CacheFormat.EXACT if exact else CacheFormat.FLASH
        if exact:
            params.type_k = params.type_v = ll.GGML_TYPE_F32
            params.flash_attn_type = FLASH_ATTENTION_OFF
        else:
            params.flash_attn_type = FLASH_ATTENTION_ON
        params.no_perf = True
        if embeddings:
            params.embeddings = True
            params.pooling_type = POOLING_NONE
        self.handle = ll.llama_init_from_model(model.handle, params)
        if not self.handle:
            raise LoadError(_words("llama.cpp could not make a context (memory?)"))
        self._model = model
        self._memory = ll.llama_get_memory(self.handle)
        # A state that cannot go back behind a token would be in doubt.
        self._may_interrupt = not model.keeps_state
        self._interrupt = ctypes.create_string_buffer(2)
        ll.llama_set_abort_callback(
            self.handle, _is_set, ctypes.cast(self._interrupt, ctypes.c_void_p)
        )
        # Fewer are computed row by row, which on a CPU takes twice as long behind 1,500 tokens; a
        # state that cannot be cut has no use for a rule by which it would be cut.
        cpu = self._may_interrupt and not model.gpu_layers
        self.tile = FLASH_ATTENTION_TILE if cpu and not exact else 0
        self.together = int(params.n_ubatch)
        self.slots = slots
        self.lanes = 1
        self.latency = 0.0
        self.context = int(ll.llama_n_ctx_seq(self.handle))
        self._states = [np.empty(0, dtype=np.uint8) for _ in range(2)]
        self._logits: NDArray[np.float32] = np.empty((0, 0), dtype=np.float32)
        self._logits_address: int | None = None

    def close(self) -> None:
        """Free cache and buffers."""
        if self.handle:
            ll.llama_free(self.handle)
            self.handle = None

    def set_threads(self, decode: int, prefill: int) -> None:
        """Threads of the next steps: `decode` for one row alone, `prefill` for several."""
        ll.llama_set_n_threads(self.handle, decode, prefill)

    def decode(self, batch: Batch, rows: int) -> int:
        """Run the first `rows` rows; 0: done, 1: no room in the cache, `INTERRUPTED`: the rows that
        have been computed are to be forgotten, there are no logits; else an error.
        """
        batch.native.n_tokens = rows
        code = int(ll.llama_decode(self.handle, batch.native))
        ll.llama_synchronize(self.handle)
        return code

    def interrupt(self) -> None:
        """Break off the step that runs, or else the next, within milliseconds; from any thread.

        Until `clear_interrupt`. It does nothing on a GPU, or to a model whose memory cannot be cut.
        """
        if self._may_interrupt:
            self._interrupt.value = b"\1"

    def clear_interrupt(self) -> None:
        """Let steps run to their end again."""
        self._interrupt.value = b""

    def begin(self, batch: Batch, rows: int) -> None:
        """See `Decoder.begin`: there is one lane, and its step is computed at once.

        Raises:
            RuntimeError: llama.cpp failed.
        """
        if code := self.decode(batch, rows):
            raise RuntimeError(f"llama_decode returned {code} for {rows} rows")

    def finish(self) -> None:
        """See `Decoder.finish`: `begin` has left nothing to wait for."""

    def logits(self, outputs: int) -> NDArray[np.float32]:
        """Logits of the rows that asked for output, (outputs, vocabulary).

        The array is llama.cpp's own memory, valid until the next decode, and may be written to.
        """
        address = _logits_address(self.handle)
        if address != self._logits_address or outputs > len(self._logits):
            # Making a view takes 20 us; llama.cpp moves its memory only when it needs more.
            size = self._model.vocab_size
            pointer = ctypes.cast(address, ctypes.POINTER(ctypes.c_float))
            flat = np.ctypeslib.as_array(pointer, (outputs * size,))
            self._logits, self._logits_address = flat.reshape(outputs, size), address
        return self._logits[:outputs]

    def embeddings(self, outputs: int) -> NDArray[np.float32]:
        """Hidden states after the last norm, (outputs, embedding size), until the next decode."""
        pointer = ll.llama_get_embeddings(self.handle)
        size = self._model.embedding_size
        flat = np.ctypeslib.as_array(pointer, (outputs * size,))
        return flat.reshape(outputs, size)

    def forget(self, slot: int, start: int = 0) -> bool:
        """Drop a slot's tokens from `start` on; False: this model's memory cannot be cut there."""
        return bool(ll.llama_memory_seq_rm(self._memory, slot, start, -1))

    def copy(self, source: int, target: int) -> bool:
        """Make `target` hold what `source` holds, bit for bit; False: llama.cpp refused.

        Goes through the sequence state, which costs only the tokens in use: `llama_memory_seq_cp`
        between streams copies a whole stream however little of it is used.
        """
        state = self._save(source, 0)
        return state is not None and self._restore(state, target)

    def swap(self, left: int, right: int) -> bool:
        """Exchange what two slots hold; False: llama.cpp refused, and both are in doubt."""
        first, second = self._save(left, 0), self._save(right, 1)
        if first is None or second is None:
            return False
        return self._restore(first, right) and self._restore(second, left)

    def take(self, slot: int, other: "Context") -> bool:
        """Make a slot hold what the same slot of another context holds, whose model has the same
        layers; False: it cannot be had, and the slot is empty.
        """
        self.forget(slot)
        if self.cache_format is other.cache_format:
            state = other._save(slot, 0)
            return state is not None and self._restore(state, slot)
        if self.cache_format is CacheFormat.EXACT or (exact := other.save(slot)) is None:
            return False
        try:
            return self.restore(slot, for_flash_attention(exact))
        except UnknownState:
            return False

    def save(self, slot: int) -> NDArray[np.uint8] | None:
        """A slot's state as an array of its own, for `restore`; None: llama.cpp refused."""
        size = int(ll.llama_state_seq_get_size(self.handle, slot))
        array = np.empty(size, dtype=np.uint8)
        written = ll.llama_state_seq_get_data(self.handle, _pointer(array), size, slot)
        return array if written == size else None

    def restore(self, slot: int, state: NDArray[np.uint8]) -> bool:
        """Make a slot hold what `save` gave, of this context or one just like it; False: llama.cpp
        refused, and the slot is in doubt.
        """
        return self._restore(_State(_pointer(state), state.size), slot)

    def _save(self, slot: int, place: int) -> _State | None:
        """Write a slot's state into one of two buffers; None: llama.cpp refused."""
        size = int(ll.llama_state_seq_get_size(self.handle, slot))
        if self._states[place].size < size:
            self._states[place] = np.empty(size + size // 4, dtype=np.uint8)
        state = _State(_pointer(self._states[place]), size)
        written = ll.llama_state_seq_get_data(self.handle, state.data, size, slot)
        return state if written == size else None

    def _restore(self, state: _State, slot: int) -> bool:
        self.forget(slot)
        return bool(ll.llama_state_seq_set_data(self.handle, state.data, state.size, slot))
