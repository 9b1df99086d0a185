"""Reading tensors of a graph that is being computed, for a context's `cb_eval`.

These functions of ggml are exported beside llama.cpp's, but not by the binding.
"""

import ctypes

import llama_cpp.llama_cpp as ll
import numpy as np
from numpy.typing import NDArray

__all__ = ("tensor_name", "tensor_rows")

tensor_name = ctypes.CFUNCTYPE(ctypes.c_char_p, ctypes.c_void_p)(("ggml_get_name", ll._lib))
"""The name of a tensor, as bytes."""

_bytes = ctypes.CFUNCTYPE(ctypes.c_size_t, ctypes.c_void_p)(("ggml_nbytes", ll._lib))
_rows = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_void_p)(("ggml_nrows", ll._lib))
_get = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t)(
    ("ggml_backend_tensor_get", ll._lib)
)


def tensor_rows(tensor: int) -> NDArray[np.float32]:
    """A copy of a tensor of 32-bit numbers that lies in one piece, (rows, width)."""
    size, rows = _bytes(tensor), _rows(tensor)
    out = np.empty((rows, size // 4 // rows), dtype=np.float32)
    _get(tensor, out.ctypes.data, 0, size)
    return out
