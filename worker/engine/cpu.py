"""What this build of llama.cpp makes of this CPU."""

import llama_cpp.llama_cpp as ll

from worker.format_advice import cpu_flags

__all__ = ("features",)


def features() -> frozenset[str]:
    """Instruction sets and kernels that are compiled in and used, as "AVX2" and "REPACK"."""
    return cpu_flags(ll.llama_print_system_info().decode())
