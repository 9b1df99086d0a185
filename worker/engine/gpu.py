"""How much of a model an engine puts onto GPUs, and what its operator should know of that."""

from pathlib import Path
from typing import NamedTuple

import llama_cpp.llama_cpp as ll

from shared.model_shape import Size
from shared.sizes import format_size
from worker import hardware
from worker.link import MOST_CONTEXT, EngineConfig
from worker.offload import all_layers, fitting_layers
from worker.shape import read_shape

__all__ = ("WHOLE_PART", "Offload", "offload")

WHOLE_PART = 9999
"""More layers than any model has. Of a part of a model all or none: which of its layers are the
last ones says nothing there."""


class Offload(NamedTuple):
    """What is loaded onto GPUs."""

    layers: int
    """As llama.cpp counts them, see `worker.offload`."""
    advice: str = ""
    """A line for the operator, or nothing."""


def offload(config: EngineConfig, path: str) -> Offload:
    """Decide for the model, part or draft at `path`, with what GPUs have free now.

    Args:
        config: what the engine was told; its `gpu_layers` of None means as many as fit.
        path: the file.

    Raises:
        GgufError: it is no model that could be read.
    """
    asked = config.gpu_layers
    gpus = hardware.gpus()
    if asked == 0 or (asked is None and not gpus):
        return Offload(0)
    if not ll.llama_supports_gpu_offload():
        names = " and ".join(sorted({gpu.name for gpu in gpus})) or "GPUs"
        return Offload(
            0,
            f"llama.cpp was built without CUDA and leaves {names} alone; "
            "CMAKE_ARGS=-DGGML_CUDA=ON make env builds it anew",
        )
    shape = read_shape(Path(path))
    every = all_layers(shape)
    if asked is not None:
        wanted = every if asked < 0 else min(asked, every)
        return Offload(WHOLE_PART if config.ring is not None else wanted)
    cells = config.slots * (config.context or min(shape.context or MOST_CONTEXT, MOST_CONTEXT))
    size = Size(config.kv_tokens or cells, config.step_tokens)
    fitting = fitting_layers(shape, size, [gpu.free for gpu in gpus])
    if fitting == every:
        return Offload(WHOLE_PART if config.ring is not None else every)
    free = format_size(sum(gpu.free for gpu in gpus))
    if config.ring is not None:
        return Offload(0, f"{free} of GPU memory are free: the part is computed by the CPU")
    return Offload(
        fitting,
        f"{free} of GPU memory are free: {fitting} of {every} layers are there, the others on "
        "the CPU; fewer --slots or a shorter --ctx make room",
    )
