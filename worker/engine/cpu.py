"""What this build of llama.cpp makes of this CPU."""

from pathlib import Path

import llama_cpp.llama_cpp as ll

from worker.format_advice import advice, cpu_flags
from worker.gguf_header import read_header

__all__ = ("advise",)


def advise(path: str, *, gpu_layers: int) -> str:
    """What `worker.format_advice` says of a model on this CPU; nothing if a GPU takes part.

    Raises:
        GgufError: as `read_header`.
    """
    if gpu_layers:
        return ""
    return advice(read_header(Path(path)), cpu_flags(ll.llama_print_system_info().decode()))
