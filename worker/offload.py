"""Which layers of a model go onto GPUs. Pure, but for `built_with_cuda`.

llama.cpp counts layers from the end: one is the output, two are the output and the last layer, and
one more than the model has layers is all of them (`llama_model_base::load_tensors`). The embedding
stays in main memory, except that a model whose embedding is its output, too, has a copy there.
"""

import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from shared.model_shape import ModelShape, Scales, Size

__all__ = ("RESERVE", "all_layers", "built_with_cuda", "fitting_layers")

RESERVE: Final = 1 << 30
"""Bytes of each GPU that are left for CUDA itself and for what a forecast misses: as llama.cpp's
own `--fit-target` has it."""


def all_layers(shape: ModelShape) -> int:
    """How llama.cpp calls for all layers and the output."""
    return len(shape.layers) + 1


def fitting_layers(shape: ModelShape, size: Size, free: Sequence[int]) -> int:
    """Most layers that fit, as llama.cpp counts them; 0: none.

    Args:
        shape: the model.
        size: of its KV cache and its widest step.
        free: bytes that each GPU has left.
    """
    room = sum(max(0, bytes_ - RESERVE) for bytes_ in free)
    scales, count = Scales(shape, size), len(shape.layers)
    main_memory = min(shape.embedding, shape.output)
    for layers in range(all_layers(shape), 0, -1):
        start = count - layers + 1
        if scales.memory(start, count, head=True) - main_memory <= room:
            return layers
    return 0


def built_with_cuda() -> bool:
    """Whether the llama.cpp at hand can use NVIDIA's GPUs: by its libraries, without loading it."""
    told = os.environ.get("LLAMA_CPP_LIB_PATH")
    found = importlib.util.find_spec("llama_cpp")
    if told:
        folder = Path(told)
    elif found is not None and found.origin is not None:
        folder = Path(found.origin).parent / "lib"
    else:
        return False
    return any(folder.glob("libggml-cuda*"))
