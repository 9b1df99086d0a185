"""`python steady_engine.py --fd N`: an engine on a machine of one speed, however busy this one is.

What is drafted is decided by what steps cost. Here a pass of llama.cpp costs what a memory of
10 GB/s and 2 ms a row make of it, and nothing else takes time: which tokens are drafted depends on
the texts alone.
"""

import time

import llama_cpp.llama_cpp as ll

BYTES_A_SECOND = 10e9
ROW_SECONDS = 0.002

passed = 0.0


def perf_counter() -> float:
    return passed


# Before the engine's modules are imported: one of them has it as a default.
time.perf_counter = perf_counter

from worker.engine import __main__ as engine  # noqa: E402
from worker.engine.batch import Batch  # noqa: E402
from worker.engine.llama import Context  # noqa: E402

compute = Context.decode


def decode(context: Context, batch: Batch, rows: int) -> int:
    global passed
    code = compute(context, batch, rows)
    weights = ll.llama_model_size(ll.llama_get_model(context.handle))
    passed += weights / BYTES_A_SECOND + rows * ROW_SECONDS
    return code


if __name__ == "__main__":
    Context.decode = decode
    engine.main()
