"""SmolLM2 as a mixture of experts: its feed-forward layers several times over, with routers.

Where the copies are alike, whatever a router chooses, the mixture computes what the dense model
does: llama.cpp makes the weights of the chosen experts sum up to 1. With noise added to each copy
they differ, and it matters which are there.
"""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

__all__ = ("EXPERTS", "USED", "upcycle")

EXPERTS = 8
USED = 2
ROUTER = 0.5
"""Standard deviation of a router's weights: uneven enough that a few experts get most."""

_FEED_FORWARD = ("ffn_gate", "ffn_up", "ffn_down")


def upcycle(
    source: Path, target: Path, *, noise: float, seed: int = 0, experts: int = EXPERTS
) -> Path:
    """Write the mixture in F16, if it is not there.

    Args:
        source: the dense model, in F32.
        target: the new file.
        noise: standard deviation of what is added to each expert's weights, as a part of their own.
        seed: of routers and noise.
        experts: copies; 0: none, the dense model in F16.
    """
    if target.exists():
        return target
    draw = np.random.default_rng(seed)
    reader = gguf.GGUFReader(source)
    partial = target.with_suffix(".partial")
    writer = gguf.GGUFWriter(partial, "llama")
    for key, field in reader.fields.items():
        if key.startswith("GGUF.") or key in ("general.architecture", "general.file_type"):
            continue
        kind = field.types[0]
        inner = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(key, field.contents(), kind, inner)
    writer.add_file_type(int(gguf.LlamaFileType.MOSTLY_F16))
    if experts:
        writer.add_expert_count(experts)
        writer.add_expert_used_count(USED)
    for tensor in reader.tensors:
        data = np.asarray(tensor.data, dtype=np.float32)
        part = tensor.name.removesuffix(".weight").rpartition(".")[2]
        if experts and part in _FEED_FORWARD:
            several = _noisy(data, experts, noise, draw)
            writer.add_tensor(tensor.name.replace(part, f"{part}_exps"), several)
        else:
            writer.add_tensor(tensor.name, data if data.ndim == 1 else data.astype(np.float16))
        if experts and part == "ffn_gate":
            router = ROUTER * draw.standard_normal((experts, data.shape[1]), dtype=np.float32)
            writer.add_tensor(tensor.name.replace(part, "ffn_gate_inp"), router)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    partial.replace(target)
    return target


def _noisy(data: NDArray[np.float32], experts: int, noise: float, draw: Any) -> NDArray[np.float16]:
    several = np.empty((experts, *data.shape), dtype=np.float16)
    scale = noise * float(data.std())
    for number in range(experts):
        added = scale * draw.standard_normal(data.shape, dtype=np.float32) if noise else 0.0
        several[number] = (data + added).astype(np.float16)
    return several
