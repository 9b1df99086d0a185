"""Whether another format of a model's file would run faster on this CPU. Pure.

llama.cpp rearranges the weights of some formats while it loads them, for kernels that use the
whole width of the CPU's vectors (ggml-cpu/repack.cpp and ggml-cpu/amx/amx.cpp); the same model
in another format of the same size may take twice the time.
"""

import re
import shlex
from collections.abc import Set
from pathlib import Path

from worker.ggml_types import NAMES
from worker.gguf_header import Header

__all__ = ("advice", "cpu_flags", "packed_types")

_SLOWER = frozenset(
    {"F32", "F16", "BF16", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS"}
)
"""Formats of at least 4 bits a weight. Not packed, they take 1.4 to 2.5 times as long as a packed
Q4_0 or Q4_K (width 1024, one thread with AVX-512, 1 to 8 rows; F32 up to 5 times)."""
_PACKED_ENOUGH = 0.5
"""Share of the weights from which on packing is what decides the speed."""

_FLAG = re.compile(r"(\w+) = (\w+)")
_FORMAT_IN_NAME = re.compile(r"[._-](?:I?Q\d\w*|B?F16|F32|MXFP4)$", re.IGNORECASE)


def cpu_flags(system_info: str) -> frozenset[str]:
    """Read the features that `llama_print_system_info` lists as on: those of CPU and build."""
    return frozenset(name for name, value in _FLAG.findall(system_info) if value != "0")


def packed_types(flags: Set[str]) -> frozenset[str]:
    """Tensor types for which a llama.cpp with these features has packed kernels."""
    packed: set[str] = set()
    if "REPACK" in flags:
        if "AVX2" in flags:
            packed |= {"Q4_0", "Q4_K", "IQ4_NL", "MXFP4"}
        if "AVX512" in flags:
            packed |= {"Q2_K"}
        if "NEON" in flags and flags & {"DOTPROD", "MATMUL_INT8"}:
            packed |= {"Q4_0", "Q4_K", "Q5_K", "Q6_K", "Q8_0"}
        if {"NEON", "DOTPROD"} <= flags:
            packed |= {"IQ4_NL", "MXFP4"}
        if "VXE" in flags:
            packed |= {"Q4_0"}
    if {"AMX_INT8", "AVX512_VNNI"} <= flags:
        packed |= {"F16", "Q4_0", "Q4_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS"}
    return frozenset(packed)


def advice(header: Header, flags: Set[str]) -> str:
    """One sentence and a command if the file's format is slow on this CPU; else empty.

    Only the format that holds most of the layers counts: requantizing keeps embedding and output
    wider. Files below 4 bits are let be: what they have lost does not come back, and they would
    grow.

    Args:
        header: the model, on the CPU in whole.
        flags: of `cpu_flags`.
    """
    packed = packed_types(flags)
    total = sum(header.layer_bytes.values())
    advised = _advised(header, packed)
    if not advised or not total:
        return ""
    sizes = {NAMES.get(kind, ""): size for kind, size in header.layer_bytes.items()}
    if sum(size for name, size in sizes.items() if name in packed) >= _PACKED_ENOUGH * total:
        return ""
    main = max(sizes, key=lambda name: sizes[name])
    if main not in _SLOWER:
        return ""
    return (
        f"llama.cpp has no packed kernels for {main} on this CPU; {advised} would run faster, at "
        f"some loss of quality: {_command(Path(header.path), advised)}"
    )


def _advised(header: Header, packed: Set[str]) -> str:
    # As fast as Q4_0 and closer to the original, but its blocks are 256 wide.
    if "Q4_K" in packed and not (header.embedding_length | header.feed_forward_length) % 256:
        return "Q4_K_S"
    return "Q4_0" if "Q4_0" in packed else ""


def _command(path: Path, file_type: str) -> str:
    first = re.sub(r"-00001-of-\d{5}$", "", path.stem)
    target = path.with_name(f"{_FORMAT_IN_NAME.sub('', first)}.{file_type}.gguf")
    words = ("mesh", "models", "requantize", str(path), str(target), "--type", file_type)
    return shlex.join(words)
