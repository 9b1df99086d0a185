"""A stage of a ring, fed with made-up activations as fast as it computes: what it could do at most.

    python -m loadtests.stage_bound STAGE.gguf --slots 32 --context 512 [--head]

reads lines `ROWS SECONDS FIRST LAST` from stdin: decode steps of so many sequences for so long,
each between FIRST and LAST tokens long. It answers each with the seconds that a step took, the
mean, and ends with stdin.
"""

import sys
import time
from pathlib import Path
from typing import Annotated

import cyclopts
import numpy as np

from worker.engine.llama import Model, silence
from worker.engine.stage import Stage, input_scale

app = cyclopts.App(help=__doc__, version_flags=[])


def seconds_of_step(stage: Stage, rows: int, seconds: float, first: int, last: int) -> float:
    """The mean time of a step of one row for each of `rows` sequences.

    Their caches fill up from `first` tokens to `last`, again and again: attention is paid by what
    they hold.
    """
    drawn = np.random.default_rng(1).standard_normal((rows, stage.width), dtype=np.float32)
    slots = list(range(rows))
    for slot in slots:
        stage.context.forget(slot)
        for start in range(0, first, rows):
            each = min(rows, first - start)
            stage.run(drawn[:each], [slot] * each, list(range(start, start + each)), [])
    steps, spent = 0, 0.0
    while spent < seconds:
        for slot in slots:
            stage.context.forget(slot, first)
        began = time.perf_counter()
        for position in range(first, last):
            stage.run(drawn, slots, [position] * rows)
        spent += time.perf_counter() - began
        steps += last - first
    return spent / steps


@app.default
def main(
    path: Path,
    /,
    *,
    slots: int,
    context: int,
    head: Annotated[bool, cyclopts.Parameter(negative=())] = False,
) -> None:
    """Answer until stdin ends."""
    silence()
    model = Model(str(path))
    stage = Stage(
        model,
        head=head,
        scale=input_scale(model.metadata("general.architecture") or "", model.embedding_size),
        slots=slots,
        context=context,
        step_tokens=max(slots, 32),
        threads=1,
    )
    print("ready", flush=True)
    for line in sys.stdin:
        rows, seconds, first, last = line.split()
        mean = seconds_of_step(stage, int(rows), float(seconds), int(first), int(last))
        print(mean, flush=True)


if __name__ == "__main__":
    app()
